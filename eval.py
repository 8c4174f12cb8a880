"""Evaluation: metrics of any folder of videos, the paper's tables, the ablations.

    python eval.py metrics --num 100 --out results/base                        sample the tiny model, score it
    python eval.py metrics --num 100 --lora runs/tiny --out results/rl         the same prompts and seeds after training
    python eval.py metrics --videos DIR --prompts prompts.txt --out results/x  score anybody's mp4s
    python eval.py table --runs base=results/base rl=results/rl                the paper's tables
    python eval.py sweep --out runs/sweep                                      the ablations, one run each
    python eval.py report runs/tiny | study --a DIR --b DIR                    pages to look at (pages.py)

One reconstruction a video serves every metric. It takes `views` frames, evenly spread; *held-out* frames lie midway
between them and are rendered from cameras halfway between their neighbours'. Distances are in units of the video's
median depth. Definitions and sources stand in each function. Left out: FVD and metrics that need reference videos.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import splat
from noise_warp import camera_path, parse_motion
from rewards import TERMS, TINY, Rewards, bootstrap, lpips_distance, motion_magnitude, native_intrinsics
from sample import initial_noise, model_defaults, read_video, sample, write_video
from train import load_prompts, parse_arguments

# ------------------------------------------------------------------------------------------------------------- pictures


def psnr(a, b):
    """Mean over frames of the PSNR in dB of videos (F, 3, H, W) in [0, 1]; identical frames count as 100 dB."""
    mse = (a.float() - b.float()).square().mean((1, 2, 3))
    return float((-10 * mse.clamp_min(1e-10).log10()).mean())


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of videos (F, 3, H, W) in [0, 1], mean over frames and channels.

    Gaussian window of deviation 1.5 over 11 x 11 pixels, population statistics, borders of 5 pixels left out: equal to
    scikit-image's structural_similarity(gaussian_weights=True, use_sample_covariance=False, data_range=1).
    """
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11x11 pixels, got {a.shape[2]}x{a.shape[3]}")
    x = torch.arange(-5, 6, dtype=torch.float64)
    g = torch.exp(-x * x / (2 * 1.5 ** 2))
    window = ((g / g.sum())[:, None] * (g / g.sum())).expand(1, 1, 11, 11)
    a, b = (v.double().cpu().flatten(0, 1)[:, None] for v in (a, b))
    blur = lambda v: F.conv2d(v, window)  # noqa: E731
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    c1, c2 = .01 ** 2, .03 ** 2
    return float(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean())


# -------------------------------------------------------------------------------------------------------------- cameras

def camera_errors(path, recovered):
    """RotErr, TransErr, CamMC and their relative forms (CamI2V's evaluation, after MotionCtrl and CameraCtrl).

    Camera-to-world (F, 4, 4), both taken relative to their frame 0. RotErr: sum over frames of the angle between the
    rotations, in radians. TransErr: sum of the distances of positions. CamMC: sum of the Frobenius norms of [R|t] - [R'|t'].
    Relative (_rel): each path is first divided by its own largest distance from frame 0, so that scale drops out.
    Sums grow with the number of frames: report it.
    """
    E, R = (torch.linalg.inv(p[:1]) @ p for p in (path.double().cpu(), recovered.double().cpu()))
    cosine = ((E[:, :3, :3] * R[:, :3, :3]).sum((1, 2)) - 1) / 2
    out = {"rot_err": float(cosine.clamp(-1, 1).acos().sum())}

    def of(E, R, tag):
        out["trans_err" + tag] = float((E[:, :3, 3] - R[:, :3, 3]).norm(dim=1).sum())
        out["cam_mc" + tag] = float((E[:, :3] - R[:, :3]).flatten(1).norm(dim=1).sum())

    of(E, R, "")
    for p in (E, R):
        far = p[:, :3, 3].norm(dim=1).max()
        p[:, :3, 3] /= far if far > 1e-8 else 1.0
    of(E, R, "_rel")
    return out


def mvcs(depth, camera_to_world, intrinsics):
    """Multi-view consistency score (GeoVideo; VideoGPA's mvcs): exp(-mean over consecutive frames of the squared difference
    between frame i's depth seen from camera i+1 and frame i+1's depth there). Depth-scale dependent, so depths and positions
    are divided by the video's median depth. depth (F, h, w), poses (F, 4, 4), K (F, 3, 3) in pixels of the depth."""
    depth, poses, K = depth.double().cpu(), camera_to_world.double().cpu().clone(), intrinsics.double().cpu()
    unit = depth.median()
    depth, poses[:, :3, 3] = depth / unit, poses[:, :3, 3] / unit
    h, w = depth.shape[1:]
    v, u = torch.meshgrid(torch.arange(h, dtype=torch.float64) + .5, torch.arange(w, dtype=torch.float64) + .5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).flatten(1)
    errors = []
    for i in range(len(depth) - 1):
        points = torch.linalg.inv(K[i]) @ pixels * depth[i].flatten()
        step = torch.linalg.inv(poses[i + 1]) @ poses[i]
        points = step[:3, :3] @ points + step[:3, 3:]
        z = points[2]
        p = K[i + 1] @ points
        x, y = p[0] / z.clamp_min(1e-9), p[1] / z.clamp_min(1e-9)
        inside = (z > 0) & (x >= 0) & (x < w) & (y >= 0) & (y < h)
        if inside.any():
            grid = torch.stack([2 * x / w - 1, 2 * y / h - 1], -1)[None, None]
            seen = F.grid_sample(depth[None, i + 1:i + 2], grid, mode="bilinear", padding_mode="border", align_corners=False)[0, 0, 0]
            errors.append((z - seen)[inside].square().mean())
    return float(torch.exp(-torch.stack(errors).mean())) if errors else math.nan


def halfway(poses):
    """Cameras midway between consecutive ones: mean position, and the rotation nearest to the mean of the two."""
    mean = (poses[:-1] + poses[1:]) / 2
    U, _, Vt = torch.linalg.svd(mean[:, :3, :3])
    mean[:, :3, :3] = U @ Vt  # a mean of two rotations less than half a turn apart has a positive determinant
    return mean


# ------------------------------------------------------------------------------------------------------------ one video

def rerender(rec, video, shown=None):
    """(rendered, true) frames at the reconstructed views, and at the held-out ones (None if there are none between).
    shown: the reconstructed views' renders, where S_recon has made them already."""
    K, (H, W) = native_intrinsics(rec, *video.shape[2:]), video.shape[2:]
    if shown is None:
        shown = splat.render(rec.gaussians, rec.camera_to_world, K, H, W)[0].clamp(0, 1)
    between = [(int(a) + int(b)) // 2 for a, b in zip(rec.frames, rec.frames[1:]) if b - a > 1]
    held = None
    if between:
        gaps = [i for i, (a, b) in enumerate(zip(rec.frames, rec.frames[1:])) if b - a > 1]
        held = splat.render(rec.gaussians, halfway(rec.camera_to_world)[gaps], K[:-1][gaps], H, W)[0].clamp(0, 1).cpu(), video[between]
    return (shown.cpu(), video[rec.frames]), held


@torch.no_grad()
def measure(video, prompt, path, rewards):
    """Every metric of one video (F, 3, H, W) with its prompt and requested path -> {name: float}."""
    scores, seen = rewards.score(video, prompt, path)
    if "rec" not in seen:
        raise ValueError(rewards.reasons.get("recon") or rewards.reasons.get("meta") or rewards.reasons.get("traj") or "no reconstruction")
    rec, row = seen["rec"], {f"reward_{name}": scores[name] for name in TERMS}
    for tag, pair in zip(("", "_held_out"), rerender(rec, video, seen.get("render"))):
        if pair is not None:
            distance = 1 - scores["recon"] if not tag and "render" in seen else lpips_distance(rewards.lpips, *(x.to(rewards.device) for x in pair))
            row |= {"psnr" + tag: psnr(*pair), "ssim" + tag: ssim(*pair), "lpips" + tag: distance}
    found = rec.camera_to_world.cpu().clone()
    found[:, :3, 3] /= float(rec.depth.median())
    row |= {"mvcs": mvcs(rec.depth, rec.camera_to_world, rec.intrinsics)} | camera_errors(path[rec.frames], found)
    row["three_d"] = sum(scores[name] for name in ("meta", "recon", "traj"))
    row["motion"], row["frames"] = motion_magnitude(video), len(rec.frames)
    return row


def interval(values):
    """Mean and its bootstrap 95 % interval, NaN left out -> (mean, low, high)."""
    x = torch.tensor([v for v in values if v is not None and math.isfinite(v)], dtype=torch.float64)
    return bootstrap(lambda w: w @ x / len(x), len(x)) if len(x) else (math.nan,) * 3


# --------------------------------------------------------------------------------------------------------- many videos

def folder_videos(folder, prompts):
    """-> [(name, load, prompt or None)] of a folder's mp4s in order of name. prompts: a file of one prompt a line or
    jsonl; rows with an id (or video) that is a file's stem are matched by it, the rest in order."""
    files = sorted(Path(folder).glob("*.mp4"))
    if not files:
        raise ValueError(f"{folder} holds no mp4")
    rows, named = [], {}
    for number, line in enumerate(Path(prompts).read_text(encoding="utf-8").splitlines(), 1):
        if str(prompts).endswith(".jsonl") and line.strip():
            try:
                row = json.loads(line)
                rows.append(row["prompt"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{prompts}, line {number}: not a JSON object with a prompt") from None
            named |= {str(row[key]).removesuffix(".mp4"): row["prompt"] for key in ("id", "video") if key in row}
        elif line.strip():
            rows.append(line.strip())
    by_name = any(f.stem in named for f in files)
    return [(f.stem, lambda f=f: read_video(f)[0], named.get(f.stem) if by_name else rows[i] if i < len(rows) else None) for i, f in enumerate(files)]


def sampled_videos(a):
    """-> [(name, load, prompt)] of videos sampled from a model, each batch of 10 when its first video is asked for. They
    are written to OUT/videos as well."""
    from lora import merge_lora
    from model import load_wan
    prompts = load_prompts(a.prompts or ("tiny" if Path(a.model).resolve() == (TINY / "wan").resolve() else Path(__file__).parent / "prompts.jsonl"))
    prompts = prompts[a.split][:a.num]
    wan, d = load_wan(a.model, a.device, torch.bfloat16 if a.device.startswith("cuda") else torch.float32), model_defaults(a.model)
    if a.lora:
        merge_lora(wan.dit, a.lora)
    frames, cache = a.frames or d["frames"], {}

    def load(i):
        if i not in cache:
            cache.clear()
            part = list(range(i, min(i + 10, len(prompts))))
            noise = torch.cat([initial_noise(wan, prompts[k], frames, d["height"], d["width"], [k], a.seed, a.transport, degradation=d["degradation"])[0] for k in part])
            latents = sample(wan, [prompts[k] for k in part], noise, d["steps"], d["guidance"])
            for k, x in zip(part, latents):
                cache[k] = wan.vae.decode(x[None])[0].cpu()
                write_video(a.out / "videos" / f"{k:04d}.mp4", cache[k], d["fps"])
        return cache[i]

    return [(f"{i:04d}", lambda i=i: load(i), p) for i, p in enumerate(prompts)]


def metrics(a):
    """Scores every video; a video that cannot be scored gets a row that says why. -> exit status."""
    rewards = Rewards(a.depth_anything, a.critic, a.preference, a.lpips, a.views, device=a.device).load()
    a.out.mkdir(parents=True, exist_ok=True)
    items = folder_videos(a.videos, a.prompts) if a.videos else sampled_videos(a)
    rows, shape = [], None
    for name, load, prompt in tqdm(items, desc="metrics", unit="video"):
        row = dict(video=name, prompt=prompt)
        try:
            if not prompt:
                raise ValueError("no prompt for this video")
            video = load()
            row |= dict(size="x".join(map(str, (len(video), *video.shape[2:]))))
            shape = shape or row["size"]
            row |= measure(video, prompt, camera_path(parse_motion(prompt), len(video)), rewards)
        except Exception as e:  # one bad file must not lose the rest
            row["error"] = f"{type(e).__name__}: {e}".splitlines()[0]
            tqdm.write(f"{name}: {row['error']}")
        rows.append(row)
        with open(a.out / "metrics.jsonl", "w" if len(rows) == 1 else "a") as f:
            f.write(json.dumps(row) + "\n")
    good = [r for r in rows if "error" not in r]
    sizes = sorted({r["size"] for r in good})
    names = list(dict.fromkeys(k for r in good for k in r if k not in ("video", "prompt", "size")))
    with open(a.out / "metrics.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["video", "prompt", "size", *names, "error"], restval="")
        writer.writeheader(), writer.writerows(rows)
    summary = {name: interval([r.get(name) for r in good]) for name in names}
    summary["vbench"] = vbench(a.out / "videos" if not a.videos else Path(a.videos), a.out)
    about = dict(videos=len(good), failed=len(rows) - len(good), sizes=sizes, seed=a.seed, model=str(a.videos or a.model), lora=a.lora and str(a.lora),
                 lpips="AlexNet" if a.lpips == "alex" else "random trunk (a stand-in)", summary=summary)
    (a.out / "summary.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{len(good)} videos ({', '.join(sizes)}), {len(rows) - len(good)} failed; mean [bootstrap 95 % interval]; LPIPS: {about['lpips']}")
    for name in names:
        print(f"{name:20} {summary[name][0]:10.4f}  [{summary[name][1]:.4f}, {summary[name][2]:.4f}]")
    print(f"{'vbench':20} {summary['vbench']}")
    return 1 if len(good) < len(rows) else 0


VBENCH = ("aesthetic_quality", "imaging_quality", "motion_smoothness", "subject_consistency", "background_consistency")


def vbench(videos, out):
    """The five dimensions by the real vbench package -> {dimension: score}, or what to install. Never re-implemented."""
    try:
        from vbench import VBench
    except ImportError:
        return "not measured: pip install vbench (it downloads its own models), then run this again"
    judge = VBench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), str(Path(sys.modules["vbench"].__file__).parent / "VBench_full_info.json"), str(out))
    judge.evaluate(videos_path=str(videos), name="vbench", dimension_list=list(VBENCH), mode="custom_input")
    results = json.loads((out / "vbench_eval_results.json").read_text())
    return {name: results[name][0] for name in VBENCH}


# --------------------------------------------------------------------------------------------------------------- tables

PAPER = {  # World-R1 (arXiv 2604.24764), as published
    "Wan2.1-1.3B": dict(psnr=17.40, ssim=.550, lpips=.467, mvcs=.974, rot_err=9.29, trans_err=62.94, cam_mc=66.21, vbench=(62.43, 66.51, 97.44, 96.34, 97.29)),
    "Wan2.1-14B": dict(psnr=19.76, ssim=.629, lpips=.405, mvcs=.963, rot_err=17.01, trans_err=60.90, cam_mc=70.55),
    "World-R1-Small": dict(psnr=27.63, ssim=.858, lpips=.201, mvcs=.989, rot_err=1.50, trans_err=2.76, cam_mc=3.39, vbench=(65.74, 67.53, 98.55, 97.58, 96.67)),
    "World-R1-Large": dict(psnr=27.67, ssim=.865, lpips=.162, mvcs=.993, rot_err=1.21, trans_err=1.30, cam_mc=2.95),
}
TABLES = {
    "3D consistency (re-render of the reconstruction)": ("psnr", "ssim", "lpips", "mvcs", "psnr_held_out", "ssim_held_out", "lpips_held_out"),
    "Camera control": ("rot_err", "trans_err", "cam_mc", "trans_err_rel", "cam_mc_rel"),
    "Rewards and motion": ("reward_meta", "reward_recon", "reward_traj", "reward_general", "three_d", "motion"),
}

CHANGES = ("psnr", "psnr_held_out", "reward_meta", "reward_recon", "reward_traj", "three_d", "reward_general", "motion")


def changes(before, after):
    """Videos of two results folders that share name, prompt and size -> {metric: (mean change, low, high, share that rose)},
    the interval over videos; a metric that no shared video has is left out."""
    one, two = ({(r["video"], r["prompt"], r["size"]): r for r in map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines()) if "error" not in r}
                for folder in (before, after))
    out = {}
    for name in CHANGES:
        d = [two[k].get(name, math.nan) - one[k].get(name, math.nan) for k in one.keys() & two.keys()]
        d = sorted(x for x in d if math.isfinite(x))
        if d:
            out[name] = *interval(d), sum(x > 0 for x in d) / len(d)
    return out


def table(runs):
    """Markdown in the paper's layout. runs: {label: results folder}. The paper's own rows are marked as such. Runs on the
    first one's prompts and seed are also compared with it video by video."""
    found = {}
    for label, folder in runs.items():
        file = Path(folder) / "summary.json"
        if not file.exists():
            raise ValueError(f"{folder} holds no summary.json; make it with: python eval.py metrics --out {folder} ...")
        found[label] = json.loads(file.read_text())
    lines = []
    for title, columns in TABLES.items():
        lines += [f"**{title}**", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for label, about in found.items():
            cells = [about["summary"].get(c) for c in columns]
            lines.append(f"| {label} | " + " | ".join(f"{c[0]:.3f} [{c[1]:.3f}, {c[2]:.3f}]" if c else "" for c in cells) + " |")
        for label, numbers in PAPER.items():
            if any(c in numbers for c in columns):
                lines.append(f"| *paper: {label}* | " + " | ".join(f"*{numbers[c]}*" if c in numbers else "" for c in columns) + " |")
        lines.append("")
    base, *others = runs
    rows = {label: changes(runs[base], runs[label]) for label in others if found[label]["seed"] == found[base]["seed"]}
    if any(rows.values()):
        lines += [f"**Change from {base}, same prompts and seeds (share of videos that rose)**", "", "| | " + " | ".join(CHANGES) + " |", "|---" * (len(CHANGES) + 1) + "|"]
        lines += [f"| {label} | " + " | ".join("{:+.3f} [{:+.3f}, {:+.3f}] ({:.0%})".format(*row[c]) if c in row else "" for c in CHANGES) + " |" for label, row in rows.items() if row] + [""]
    lines += ["**VBench**", "", "| | " + " | ".join(VBENCH) + " |", "|---" * 6 + "|"]
    for label, about in found.items():
        v = about["summary"].get("vbench")
        lines.append(f"| {label} | " + (" | ".join(f"{v[d]:.3f}" for d in VBENCH) if isinstance(v, dict) else f"{v}" + " |" * 4) + " |")
    lines += [f"| *paper: {label}* | " + " | ".join(f"*{x}*" for x in numbers["vbench"]) + " |" for label, numbers in PAPER.items() if "vbench" in numbers]
    lines += ["", "Mean and bootstrap 95 % interval over videos. " + "; ".join(
        f"{label}: {about['videos']} videos of {', '.join(about['sizes'])}, seed {about['seed']}, LPIPS {about['lpips']}" for label, about in found.items())
        + ". The paper's rows are its own numbers, on its own models and videos: not comparable in value."]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- sweeps

SWEEP = {  # cell -> (arguments of train.py, arguments of metrics)
    "full": ([], []),
    "no_meta": (["--meta", "0"], []),
    "no_recon": (["--recon", "0"], []),
    "no_traj": (["--traj", "0"], []),
    "no_transport": (["--degradation", "1"], ["--no-transport"]),
    "no_decoupling": (["--dynamic-steps", "0"], []),
    "no_3d": (["--meta", "0", "--recon", "0", "--traj", "0"], []),
    "no_general": (["--general", "0", "--dynamic-steps", "0"], []),
    "third_of_prompts": (["--train-prompts", "1000"], []),
    "two_thirds_of_prompts": (["--train-prompts", "2000"], []),
}


def sweep(a, rest):
    """Trains every cell (rest: further arguments for train.py) and scores it on the test and the dynamic prompts at the length
    it was trained with, the base and the full cell at `a.also` frames too; what is done is not done again."""
    cells = a.cells or list(SWEEP)
    unknown = [c for c in cells if c not in SWEEP]
    if unknown:
        raise ValueError(f"unknown cell '{unknown[0]}'; the cells are {', '.join(SWEEP)}")
    here, c = Path(__file__).parent, parse_arguments(rest)
    launch = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(a.processes)] if a.processes > 1 else [])]
    ways = {"results": ["--num", str(a.num)], "dynamic": ["--split", "dynamic", "--num", str(a.num // 2)], f"{a.also}_frames": ["--num", str(a.num), "--frames", str(a.also)]}
    done = {way: {} for way in ways}
    for cell in tqdm(["base", *cells], desc="sweep", unit="cell"):
        training, scoring = SWEEP.get(cell, ([], []))
        if cell == "base":
            scoring = ["--lora", c.lora] if c.lora else []
        else:
            subprocess.run([*launch, here / "train.py", "--runs", a.out, "--name", cell, *rest, *training], check=True)
            scoring = [*scoring, "--lora", a.out / cell]
        for way, how in ways.items():
            if cell in ("base", "full") or way in ("results", "dynamic"):
                folder = done[way][cell] = a.out / cell / way
                if not (folder / "summary.json").exists():
                    subprocess.run([sys.executable, here / "eval.py", "metrics", "--model", c.model, "--frames", str(c.frames), *how, "--out", folder, *scoring], check=True)
    text = "\n\n".join(f"# {title}\n\n{table(done[way])}" for way, title in zip(ways, ("Test prompts", "Dynamic prompts", f"Test prompts, {a.also} frames"), strict=True) if done[way])
    (a.out / "table.md").write_text(text + "\n")
    print(text)


# ----------------------------------------------------------------------------------------------------- the command line

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    m = commands.add_parser("metrics", help="score a folder of mp4s, or a model's samples")
    m.add_argument("--videos", help="folder of mp4s; else the model is sampled")
    m.add_argument("--prompts", help="file: one prompt a line, or jsonl (default: the model's test prompts)")
    m.add_argument("--model", default=str(TINY / "wan"))
    m.add_argument("--lora", help="LoRA file or run folder")
    m.add_argument("--split", default="test", choices=("train", "dynamic", "test"))
    m.add_argument("--num", type=int, default=100)
    m.add_argument("--seed", type=int, default=0)
    m.add_argument("--frames", type=int, help="4k+1; default: the model's")
    m.add_argument("--no-transport", dest="transport", action="store_false")
    m.add_argument("--out", type=Path, default=Path("results"))
    m.add_argument("--depth-anything", default=TINY / "depth_anything")
    m.add_argument("--critic", default=TINY / "qwen3_vl")
    m.add_argument("--preference", default=TINY / "hpsv3")
    m.add_argument("--lpips", choices=("alex", "random"), default="random", help="trunk; random is a stand-in")
    m.add_argument("--views", type=int, default=9, help="frames that are reconstructed; those midway between are held out")
    m.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    t = commands.add_parser("table", help="the paper's tables from results folders")
    t.add_argument("--runs", nargs="+", required=True, metavar="LABEL=FOLDER")
    s = commands.add_parser("sweep", help="ablations; unknown arguments go to train.py")
    s.add_argument("--out", type=Path, default=Path("runs/sweep"))
    s.add_argument("--cells", nargs="+", help=", ".join(SWEEP))
    s.add_argument("--num", type=int, default=100)
    s.add_argument("--processes", type=int, default=1, help="of a training, by torchrun (on CPU: set OMP_NUM_THREADS=1)")
    s.add_argument("--also", type=int, default=33, help="frames at which the base and the full cell are scored too (81-frame models: 121)")
    r = commands.add_parser("report", help="one self-contained HTML page of a run")
    r.add_argument("run", type=Path)
    y = commands.add_parser("study", help="a blind pairwise study page, or its scores")
    y.add_argument("--a", type=Path), y.add_argument("--b", type=Path), y.add_argument("--out", type=Path, default=Path("study"))
    y.add_argument("--score", nargs="+", type=Path, help="answers downloaded from the page")
    y.add_argument("--seed", type=int, default=0)
    a, rest = parser.parse_known_args(argv)
    if rest and a.command != "sweep":
        parser.error(f"unknown argument {rest[0]}")
    try:
        if a.command == "metrics":
            if a.videos and not a.prompts:
                raise ValueError("--videos needs --prompts FILE: one prompt a line in the order of the file names, or jsonl with ids")
            return metrics(a)
        if a.command == "table":
            print(table(dict(item.split("=", 1) for item in a.runs)))
        elif a.command == "sweep":
            sweep(a, rest)
        else:
            import pages
            return pages.report(a.run) if a.command == "report" else pages.study(a)
    except (ValueError, OSError, subprocess.CalledProcessError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
