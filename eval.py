"""Evaluation: the metrics of any folder of videos, and the paper's tables.

    python eval.py metrics --num 100 --out results/base                       the tiny model's samples, scored
    python eval.py metrics --num 100 --lora runs/tiny --out results/rl        same prompts and seeds, trained
    python eval.py metrics --videos DIR --prompts FILE --out results/x        anybody's mp4s
    python eval.py table --runs base=results/base rl=results/rl               the paper's tables

A results folder holds metrics.jsonl and metrics.csv (a row a video), summary.json (means with intervals) and,
of a sampled model, videos/. One reconstruction a video serves every metric. It takes `views` frames, evenly
spread; *held-out* frames lie midway between them and are rendered from cameras halfway between their
neighbours': a stricter test that no paper reports. Distances are in units of the video's median depth.
Definitions and sources stand in each function. Left out: FVD and metrics that need reference videos.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from tqdm import tqdm

import splat
from lora import merge_lora
from model import load_wan
from noise_warp import camera_path, parse_motion, relative_to_first, rotation_angle
from prompts import SPLITS, read_prompts, read_rows
from rewards import TERMS, add_reward_options, lpips_distance, motion_magnitude, native_intrinsics, rewards_of
from sample import check_size, psnr, read_video, sample_videos, sampling_of, write_video
from weights import TINY, read_json, write_json, written_whole


# --------------------------------------------------------------------------------------------------- pictures

def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of videos (F, 3, H, W) in [0, 1]: mean over frames, channels.

    scikit-image's with the paper's settings: a Gaussian window of deviation 1.5 over 11 x 11 pixels and
    population statistics, in float64; borders of 5 pixels are left out.
    """
    H, W = a.shape[2:]
    if min(H, W) < 11:
        raise ValueError(f"SSIM needs frames of at least 11x11 pixels, got {H}x{W}")
    frames = zip(a.double().cpu().numpy(), b.double().cpu().numpy(), strict=True)
    values = [structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                    data_range=1, channel_axis=0) for x, y in frames]
    return float(np.mean(values))


# ---------------------------------------------------------------------------------------------------- cameras

def camera_errors(path, recovered):
    """RotErr, TransErr and CamMC, absolute and relative (CamI2V's evaluation, after MotionCtrl, CameraCtrl).

    path, recovered: camera-to-world (F, 4, 4), both taken relative to their frame 0.
        rot_err      sum over frames of the angle between the rotations, in radians
        trans_err    sum of the distances of positions
        cam_mc       sum of the Frobenius norms of [R|t] - [R'|t']
        ..._rel      the same of paths that are divided by their own largest distance from frame 0: no scale
    Sums grow with the number of frames: report it.
    """
    requested, found = relative_to_first(path), relative_to_first(recovered)
    errors = {"rot_err": float(rotation_angle(requested[:, :3, :3], found[:, :3, :3]).sum())}
    for tag in ("", "_rel"):
        if tag:
            requested, found = unit_reach(requested), unit_reach(found)
        errors["trans_err" + tag] = float((requested[:, :3, 3] - found[:, :3, 3]).norm(dim=1).sum())
        errors["cam_mc" + tag] = float((requested[:, :3] - found[:, :3]).flatten(1).norm(dim=1).sum())
    return errors


def unit_reach(path):
    """A path (F, 4, 4), relative to frame 0, divided by its largest distance from there unless it is 0."""
    path = path.clone()
    reach = path[:, :3, 3].norm(dim=1).max()
    if reach > 1e-8:
        path[:, :3, 3] /= reach
    return path


def mvcs(depth, camera_to_world, intrinsics):
    """Multi-view consistency score (GeoVideo; VideoGPA's mvcs), a float in (0, 1].

    exp(-mean over consecutive frames of the squared difference between frame i's depth seen from camera i+1
    and frame i+1's own depth there). It depends on the scale of depth, so depths and positions are divided by
    the video's median depth. depth (F, h, w), poses (F, 4, 4), intrinsics (F, 3, 3) in pixels of the depth.
    NaN if no frames overlap.
    """
    depth = depth.double().cpu()
    poses = camera_to_world.double().cpu().clone()
    K = intrinsics.double().cpu()
    unit = depth.median()
    depth = depth / unit
    poses[:, :3, 3] /= unit

    h, w = depth.shape[1:]
    rows, columns = torch.arange(h, dtype=torch.float64) + .5, torch.arange(w, dtype=torch.float64) + .5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).flatten(1)  # (3, h w), homogeneous
    errors = []
    for i in range(len(depth) - 1):
        # frame i's pixels as points, in the axes of camera i+1
        points = torch.linalg.inv(K[i]) @ pixels * depth[i].flatten()
        step = torch.linalg.inv(poses[i + 1]) @ poses[i]
        points = step[:3, :3] @ points + step[:3, 3:]
        z = points[2]
        # where they land in frame i+1, and the depth it has there
        projected = K[i + 1] @ points
        x, y = projected[:2] / z.clamp_min(1e-9)
        inside = (z > 0) & (x >= 0) & (x < w) & (y >= 0) & (y < h)
        if inside.any():
            grid = torch.stack([2 * x / w - 1, 2 * y / h - 1], -1)[None, None]
            seen = F.grid_sample(depth[None, i + 1:i + 2], grid, mode="bilinear", padding_mode="border",
                                 align_corners=False)[0, 0, 0]  # (h w,)
            errors.append((z - seen)[inside].square().mean())
    if not errors:
        return math.nan
    return float(torch.exp(-torch.stack(errors).mean()))


def halfway(poses):
    """Cameras midway between consecutive ones, (F, 4, 4) -> (F-1, 4, 4): the mean position, and the rotation
    nearest to the mean of the two."""
    mean = (poses[:-1] + poses[1:]) / 2
    U, _, Vt = torch.linalg.svd(mean[:, :3, :3])
    mean[:, :3, :3] = U @ Vt  # a mean of two rotations less than half a turn apart has a positive determinant
    return mean


# -------------------------------------------------------------------------------------------------- one video

def rerender(rec, video, shown=None):
    """-> (rendered, true) frames at the reconstructed views, and the same at the held-out ones (None if no
    frame lies between). shown: the reconstructed views' renders (V, 3, H, W), where S_recon has made them
    already."""
    # the frames that the reconstruction was made of
    H, W = video.shape[2:]
    K = native_intrinsics(rec, H, W)
    if shown is None:
        shown = splat.render(rec.gaussians, rec.camera_to_world, K, H, W)[0].clamp(0, 1)
    reconstructed = shown.cpu(), video[rec.frames]

    # the frames midway between them, where there is room for one
    frames = [int(frame) for frame in rec.frames]
    gaps = [i for i in range(len(frames) - 1) if frames[i + 1] - frames[i] > 1]
    if not gaps:
        return reconstructed, None
    cameras = halfway(rec.camera_to_world)[gaps]
    rendered = splat.render(rec.gaussians, cameras, K[gaps], H, W)[0].clamp(0, 1)
    middle = [(frames[i] + frames[i + 1]) // 2 for i in gaps]
    return reconstructed, (rendered.cpu(), video[middle])


@torch.no_grad()
def measure(video, prompt, path, rewards):
    """Every metric of a video (F, 3, H, W) with its prompt and requested path (F, 4, 4) -> {name: float}."""
    clip = rewards.score(video, prompt, path)
    rec = clip.reconstruction
    if rec is None:
        raise ValueError(next(iter(clip.errors.values()), "there is no reconstruction"))
    device = rewards.device
    row = {f"reward_{name}": score for name, score in clip.scores.items()}

    # 3D consistency: what the reconstruction gives back of the frames it has seen, and of those it has not
    for tag, pair in zip(("", "_held_out"), rerender(rec, video, clip.rerender)):
        if pair is None:
            continue
        row["psnr" + tag] = psnr(*pair)
        row["ssim" + tag] = ssim(*pair)
        if tag == "" and clip.rerender is not None:
            row["lpips"] = 1 - clip.scores["recon"]  # the same distance of the same pictures
        else:
            rendered, true = pair
            row["lpips" + tag] = lpips_distance(rewards.lpips, rendered.to(device), true.to(device))
    row["mvcs"] = mvcs(rec.depth, rec.camera_to_world, rec.intrinsics)

    # camera control, in units of the median depth
    found = rec.camera_to_world.cpu().clone()
    found[:, :3, 3] /= float(rec.depth.median())
    row |= camera_errors(path[rec.frames], found)

    # the plain sum of the 3D terms, and how much moves by itself: a frozen scene is easy to reconstruct
    row["three_d"] = sum(clip.scores[name] for name, term in TERMS.items() if term.three_d)
    row["motion"] = motion_magnitude(video)
    row["frames"] = len(rec.frames)
    return row


def interval(values):
    """-> (mean, low, high): the mean with its 95 % interval, percentiles of 2,000 bootstrap samples.

    NaN and None are left out; NaNs if nothing is left. One value is its own interval.
    """
    known = np.array([value for value in values if value is not None and math.isfinite(value)])
    if len(known) == 0:
        return math.nan, math.nan, math.nan
    mean = float(known.mean())
    if len(known) == 1:
        return mean, mean, mean
    low, high = scipy.stats.bootstrap((known,), np.mean, n_resamples=2000, method="percentile",
                                      rng=np.random.default_rng(0)).confidence_interval
    return mean, float(low), float(high)


# ------------------------------------------------------------------------------------------------ many videos

def folder_videos(folder, prompt_file):
    """A folder's mp4s in order of name -> {name: prompt or None}, load(name).

    The file's rows belong to the videos by id where any id is a video's name, else in order.
    """
    folder = Path(folder)
    names = [file.stem for file in sorted(folder.glob("*.mp4"))]
    if not names:
        raise ValueError(f"{folder} holds no mp4")
    rows = read_rows(prompt_file)
    by_id = {str(row["id"]).removesuffix(".mp4"): row["prompt"] for row in rows}
    by_order = dict(zip(names, (row["prompt"] for row in rows)))
    matched = by_id if by_id.keys() & set(names) else by_order

    def load(name):
        video, _ = read_video(folder / f"{name}.mp4")
        return video

    return {name: matched.get(name) for name in names}, load


def sampled_videos(a, batch_size=10):
    """A model's samples for the prompts of a split -> {name: prompt}, load(name).

    A batch is sampled when its first video is asked for, and written to OUT/videos. Prompt k takes the seed's
    k-th noise: the same in every batch, and before and after training.
    """
    # which prompts
    file = a.prompts
    if not file:
        is_tiny = Path(a.model).resolve() == (TINY / "wan").resolve()
        file = TINY / "prompts.jsonl" if is_tiny else Path(__file__).parent / "prompts.jsonl"
    prompts = read_prompts(file)[a.split][:a.num]
    if not prompts:
        raise ValueError(f"{file} holds no {a.split} prompt; choose another --split")

    # which model, at what size
    check_size(a.frames, None, None)
    sampling = sampling_of(a.model, frames=a.frames)
    wan = load_wan(a.model, a.device, torch.bfloat16 if a.device.startswith("cuda") else torch.float32)
    if a.lora:
        merge_lora(wan.dit, a.lora)
    names = [f"{k:04d}" for k in range(len(prompts))]
    batch = {}  # name -> video

    def load(name):
        if name not in batch:
            start = names.index(name)
            members = range(start, min(start + batch_size, len(names)))
            videos, _ = sample_videos(wan, [prompts[k] for k in members], sampling, a.seed, members=members,
                                      transport=a.transport)
            batch.clear()
            for k, video in zip(members, videos):
                batch[names[k]] = video
                write_video(a.out / "videos" / f"{names[k]}.mp4", video, sampling.fps)
        return batch[name]

    return dict(zip(names, prompts)), load


def measured_row(name, prompt, load, rewards):
    """A video's row; if it cannot be scored, a row that says why: a bad file must not lose the rest."""
    row = dict(video=name, prompt=prompt)
    try:
        if not prompt:
            raise ValueError("no prompt for this video")
        video = load(name)  # (F, 3, H, W)
        frames, _, height, width = video.shape
        row["size"] = f"{frames}x{height}x{width}"
        row |= measure(video, prompt, camera_path(parse_motion(prompt), frames), rewards)
    except Exception as e:
        row["error"] = f"{type(e).__name__}: {e}".splitlines()[0]
        tqdm.write(f"{name}: {row['error']}")
    return row


def metrics(a):
    """Scores every video and writes the results folder -> exit status, 1 if a video could not be scored."""
    # videos and models: what is wrong with the arguments is found here
    if a.videos:
        prompts, load = folder_videos(a.videos, a.prompts)
    else:
        prompts, load = sampled_videos(a)
    rewards = rewards_of(a).load()

    # one row a video; written at once, so that a stopped run keeps what it has
    a.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with open(a.out / "metrics.jsonl", "w") as log:
        for name, prompt in tqdm(prompts.items(), desc="metrics", unit="video"):
            rows.append(measured_row(name, prompt, load, rewards))
            print(json.dumps(rows[-1]), file=log, flush=True)

    return write_results(a, rows)


def write_results(a, rows):
    """metrics.csv and summary.json of all rows, the summary printed -> exit status."""
    # a column for every metric that any video has
    good = [row for row in rows if "error" not in row]
    labels = ("video", "prompt", "size")
    names = [name for name in dict.fromkeys(key for row in good for key in row) if name not in labels]
    with written_whole(a.out / "metrics.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, [*labels, *names, "error"], restval="")
        writer.writeheader()
        writer.writerows(rows)

    # means over the videos that could be scored
    summary = {name: interval([row.get(name) for row in good]) for name in names}
    summary["vbench"] = vbench(Path(a.videos) if a.videos else a.out / "videos", a.out)
    sizes = sorted({row["size"] for row in good})
    failed = len(rows) - len(good)
    lpips = "AlexNet" if a.lpips == "alex" else "random trunk (a stand-in)"
    write_json(a.out / "summary.json", dict(
        videos=len(good), failed=failed, sizes=sizes, seed=a.seed, model=str(a.videos or a.model),
        lora=a.lora, lpips=lpips, summary=summary))

    print(f"{len(good)} videos ({', '.join(sizes)}), {failed} failed; LPIPS: {lpips}; "
          "mean [bootstrap 95 % interval]")
    for name in names:
        mean, low, high = summary[name]
        print(f"{name:20} {mean:10.4f}  [{low:.4f}, {high:.4f}]")
    print(f"{'vbench':20} {summary['vbench']}")
    return 1 if failed else 0


VBENCH = ("aesthetic_quality", "imaging_quality", "motion_smoothness", "subject_consistency",
          "background_consistency")


def vbench(videos, out):
    """The five dimensions by the real vbench package -> {dimension: score}, or what to install."""
    try:
        import vbench as package
    except ImportError:
        return "not measured: pip install vbench (it downloads its own models), then run this again"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = package.VBench(device, str(Path(package.__file__).parent / "VBench_full_info.json"), str(out))
    judge.evaluate(videos_path=str(videos), name="vbench", dimension_list=list(VBENCH), mode="custom_input")
    results = read_json(out / "vbench_eval_results.json")
    return {name: results[name][0] for name in VBENCH}


# ----------------------------------------------------------------------------------------------------- tables

PAPER = {  # World-R1 (arXiv 2604.24764), as published; VBench in percent
    "Wan2.1-1.3B": dict(
        psnr=17.40, ssim=.550, lpips=.467, mvcs=.974, rot_err=9.29, trans_err=62.94, cam_mc=66.21,
        aesthetic_quality=62.43, imaging_quality=66.51, motion_smoothness=97.44, subject_consistency=96.34,
        background_consistency=97.29),
    "Wan2.1-14B": dict(
        psnr=19.76, ssim=.629, lpips=.405, mvcs=.963, rot_err=17.01, trans_err=60.90, cam_mc=70.55),
    "World-R1-Small": dict(
        psnr=27.63, ssim=.858, lpips=.201, mvcs=.989, rot_err=1.50, trans_err=2.76, cam_mc=3.39,
        aesthetic_quality=65.74, imaging_quality=67.53, motion_smoothness=98.55, subject_consistency=97.58,
        background_consistency=96.67),
    "World-R1-Large": dict(
        psnr=27.67, ssim=.865, lpips=.162, mvcs=.993, rot_err=1.21, trans_err=1.30, cam_mc=2.95),
}
REWARDS = tuple(f"reward_{name}" for name in TERMS)
TABLES = {  # title -> columns
    "3D consistency (re-render of the reconstruction)":
        ("psnr", "ssim", "lpips", "mvcs", "psnr_held_out", "ssim_held_out", "lpips_held_out"),
    "Camera control": ("rot_err", "trans_err", "cam_mc", "trans_err_rel", "cam_mc_rel"),
    "Rewards and motion": (*REWARDS, "three_d", "motion"),
}
CHANGES = ("psnr", "psnr_held_out", *REWARDS, "three_d", "motion")


def good_rows(folder):
    """The scored videos of a results folder -> {(name, prompt, size): row}."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {(row["video"], row["prompt"], row["size"]): row for row in rows if "error" not in row}


def changes(before, after):
    """Videos of two results folders that share name, prompt and size -> {metric: (mean change, low, high,
    share that rose)}, the interval over videos; a metric that no shared video has is left out."""
    rows_before, rows_after = good_rows(before), good_rows(after)
    shared = [key for key in rows_before if key in rows_after]
    found = {}
    for name in CHANGES:
        rises = []
        for key in shared:
            rise = rows_after[key].get(name, math.nan) - rows_before[key].get(name, math.nan)
            if math.isfinite(rise):
                rises.append(rise)
        if rises:
            found[name] = *interval(rises), sum(rise > 0 for rise in rises) / len(rises)
    return found


def markdown(title, columns, rows):
    """A titled Markdown table. rows: [(label, cells)]."""
    lines = [f"**{title}**", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]
    return "\n".join(lines)


def paper_rows(columns):
    """The paper's rows that have any of these columns, in italics."""
    rows = []
    for label, numbers in PAPER.items():
        if any(name in numbers for name in columns):
            cells = [f"*{numbers[name]}*" if name in numbers else "" for name in columns]
            rows.append((f"*paper: {label}*", cells))
    return rows


def change_rows(runs, found, base):
    """A row of changes for every run with the seed of the run `base` and videos in common with it."""
    rows = []
    for label, folder in runs.items():
        if label == base or found[label]["seed"] != found[base]["seed"]:
            continue
        change = changes(runs[base], folder)
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}] ({:.0%})".format(*change[name]) if name in change else ""
                 for name in CHANGES]
        if change:
            rows.append((label, cells))
    return rows


def table(runs):
    """Markdown in the paper's layout, the paper's own rows marked as such. runs: {label: results folder}.

    Runs on the first one's prompts and seed are also compared with it video by video.
    """
    found = {}
    for label, folder in runs.items():
        file = Path(folder) / "summary.json"
        if not file.exists():
            raise ValueError(f"{folder} holds no summary.json; make it: python eval.py metrics --out ...")
        found[label] = read_json(file)
    parts = []

    # means of every run
    for title, columns in TABLES.items():
        rows = []
        for label, about in found.items():
            cells = []
            for name in columns:
                known = name in about["summary"]
                cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*about["summary"][name]) if known else "")
            rows.append((label, cells))
        parts.append(markdown(title, columns, rows + paper_rows(columns)))

    # differences from the first, over the videos that both have
    base = next(iter(runs))
    rows = change_rows(runs, found, base)
    if rows:
        title = f"Change from {base}, same prompts and seeds (share of videos that rose)"
        parts.append(markdown(title, CHANGES, rows))

    # VBench
    rows = []
    for label, about in found.items():
        scores = about["summary"].get("vbench", "")
        if isinstance(scores, dict):
            rows.append((label, [f"{scores[name]:.3f}" for name in VBENCH]))
        else:
            rows.append((label, [str(scores), "", "", "", ""]))
    parts.append(markdown("VBench", VBENCH, rows + paper_rows(VBENCH)))

    # what was measured
    sources = [f"{label}: {about['videos']} videos of {', '.join(about['sizes'])}, seed {about['seed']}, "
               f"LPIPS {about['lpips']}" for label, about in found.items()]
    parts.append(f"Mean and bootstrap 95 % interval over videos. {'; '.join(sources)}. The paper's rows are "
                 "its own numbers, on its own models and videos: not comparable in value.")
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------- the command line

def parse_arguments(argv=None):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", required=True)

    metrics_parser = commands.add_parser("metrics", help="score a folder of mp4s, or a model's samples")
    add = metrics_parser.add_argument
    add("--videos", help="folder of mp4s; else the model is sampled")
    add("--prompts", help="file: one prompt a line, or jsonl (default: prompts.jsonl; the tiny model's own)")
    add("--model", default=str(TINY / "wan"), help="folder (either layout) or hub id")
    add("--lora", help="LoRA file or run folder")
    add("--split", default="test", choices=SPLITS)
    add("--num", type=int, default=100, help="prompts of the split")
    add("--seed", type=int, default=0)
    add("--frames", type=int, help="4k+1; default: the model's")
    add("--no-transport", dest="transport", action="store_false", help="noise that follows no camera path")
    add("--out", type=Path, default=Path("results"), help="the results folder")
    add_reward_options(metrics_parser, views=9)

    table_parser = commands.add_parser("table", help="the paper's tables from results folders")
    table_parser.add_argument("--runs", nargs="+", required=True, metavar="LABEL=FOLDER")

    return parser.parse_args(argv)


def main(argv=None):
    a = parse_arguments(argv)
    try:
        if a.command == "metrics":
            if a.videos and not a.prompts:
                raise ValueError("--videos needs --prompts FILE: one prompt a line in the order of the "
                                 "videos, or jsonl with ids")
            return metrics(a)
        if not all("=" in run for run in a.runs):
            raise ValueError("--runs takes LABEL=FOLDER, such as base=results/base")
        print(table(dict(run.split("=", 1) for run in a.runs)))
    except (ValueError, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
