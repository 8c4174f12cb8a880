"""Evaluation: the metrics of any folder of videos, and the paper's tables.

    python eval.py metrics --num 100 --out runs/scores/base                   the tiny model's samples, scored
    python eval.py metrics --num 100 --lora runs/first --out runs/scores/rl   same prompts and seeds, trained
    python eval.py metrics --videos DIR --prompts FILE --out runs/scores/x    anybody's mp4s
    OMP_NUM_THREADS=8 torchrun --nproc-per-node 8 -- eval.py metrics ...      the same on 8 GPUs (without --
                                                                              torchrun takes --num itself)
    python eval.py table --runs base=runs/scores/base rl=runs/scores/rl       the paper's tables

A results folder holds metrics.jsonl (a row a video), summary.json (means with intervals) and, of a sampled
model, videos/. It is whole or not there: a call works in .NAME.part beside it, which it renames at its end,
and what is there already is never replaced. What failed is null, counted, and exit status 1; what is not
defined for a video (epipolar, some relative errors) is null alone.

Each video is reconstructed once, from `views` frames, evenly spread from the first to the last; all 3D
metrics use that. *Held-out* frames are those midway between two of these, compared with a render from a
camera interpolated between the two; the paper's tables have no such metric. Recovered positions are divided
by the video's median depth.
Definitions and sources are in each function's docstring. Left out: FVD and what needs reference videos.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib.util
import json
import math
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from tqdm import tqdm

import splat
from lora import merge_lora
from critics import lpips_distance
from model import load_wan, released_config
from noise_warp import camera_path, parse_motion, relative_to_first, rotation_angle
from prompts import SPLITS, read_prompts, read_rows
from rewards import (MASKED, TERMS, add_reward_options, is_fault, motion_magnitude, native_intrinsics,
                     paths_in_depths, rewards_of, tiny_twins)
from run import Processes
from sample import (as_bytes, check_device, check_name, check_size, check_writable, psnr, read_video,
                    sample_videos, sampling_of, write_video)
from weights import TINY, as_command, command_line, from_json, read_bytes, read_json, write_json, write_text


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
    """RotErr, TransErr and CamMC; the last two also without scale (CamI2V, arXiv 2410.15957, after
    MotionCtrl, 2312.03641).

    path, recovered: camera-to-world (F, 4, 4), both taken relative to their frame 0.
        rot_err      sum over frames of the angle between the rotations, in radians
        trans_err    sum of the distances of positions
        cam_mc       sum of the Frobenius norms of [R|t] - [R'|t']
        trans_err_rel, cam_mc_rel    the same after dividing each path by its largest distance from frame 0;
                                     NaN where no travel is asked for (fixed, pan): noise would be scaled up
                                     to a whole path
    Sums grow with the number of frames, so report that number beside them. trans_err and cam_mc take both
    paths to be in one unit: `measure` gives the requested one in depths of the assumed plane, the recovered
    one in median depths of the scene, so that a camera which does just as asked is not at 0.
    """
    requested, found = relative_to_first(path), relative_to_first(recovered)
    errors = {"rot_err": float(rotation_angle(requested[:, :3, :3], found[:, :3, :3]).sum())}
    for tag, asked, got in (("", requested, found), ("_rel", unit_reach(requested), unit_reach(found))):
        errors["trans_err" + tag] = float((asked[:, :3, 3] - got[:, :3, 3]).norm(dim=1).sum())
        errors["cam_mc" + tag] = float((asked[:, :3] - got[:, :3]).flatten(1).norm(dim=1).sum())
    if requested[:, :3, 3].norm(dim=1).max() <= 1e-8:  # no travel is asked for
        errors["trans_err_rel"] = errors["cam_mc_rel"] = math.nan
    return errors


def unit_reach(path):
    """A path (F, 4, 4), relative to frame 0, divided by its largest distance from there unless it is 0."""
    path = path.clone()
    reach = path[:, :3, 3].norm(dim=1).max()
    if reach > 1e-8:
        path[:, :3, 3] /= reach
    return path


def mvcs(depth, camera_to_world, intrinsics):
    """Multi-view consistency score (GeoVideo, arXiv 2512.03453; mvcs in VideoGPA, 2601.23286), a float in
    (0, 1].

    exp(-mean over consecutive frames of the squared difference between frame i's depth seen from camera i+1
    and frame i+1's own depth there). It depends on the scale of depth, so depths and positions are divided by
    the video's median depth. depth (F, h, w), poses (F, 4, 4), intrinsics (F, 3, 3) in pixels of the depth.
    NaN if no frames overlap.
    """
    depth = depth.double().cpu()
    unit = depth.median()
    depth = depth / unit
    poses = camera_to_world.double().cpu().clone()
    poses[:, :3, 3] /= unit
    K = intrinsics.double().cpu()

    h, w = depth.shape[1:]
    v, u = torch.meshgrid(torch.arange(h) + .5, torch.arange(w) + .5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).flatten(1).double()  # (3, h w), homogeneous
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
            seen = F.grid_sample(depth[None, i + 1:i + 2], grid, padding_mode="border", align_corners=False)
            seen = seen[0, 0, 0]  # (h w,)
            errors.append((z - seen)[inside].square().mean())
    if not errors:
        return math.nan
    return float(torch.exp(-torch.stack(errors).mean()))


def between(poses, place):
    """One camera between each two neighbours, (F, 4, 4) -> (F-1, 4, 4). place (F-1,): 0 is at the first, 1 at
    the second. The position is interpolated, and so is the rotation matrix, then made a rotation again."""
    place = place.to(poses)[:, None, None]
    mean = poses[:-1] + (poses[1:] - poses[:-1]) * place
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
    reconstructed = shown.cpu(), video[rec.index]

    # the frames in the middle between them, where there is room for one; each with the intrinsics before it
    gaps, place, middle = held_out(rec.index)
    if not len(gaps):
        return reconstructed, None
    cameras = between(rec.camera_to_world, place)[gaps]
    rendered = splat.render(rec.gaussians, cameras, K[gaps], H, W)[0].clamp(0, 1)
    return reconstructed, (rendered.cpu(), video[middle])


def held_out(index):
    """Numbers of the reconstructed frames (V,) -> where and which the held-out frames are.

    [0, 4, 5, 8] -> gaps [0, 2], place [.5, 0, .33], middle [2, 6]. gaps (n,): the views after which frames
    were skipped. middle (n,): the number of the middle frame of each gap, the earlier of two. place (V-1,),
    as `between` takes it, for *every* view but the last: where the middle frame is on the way to the next.
    """
    steps = index.diff()
    gaps = (steps > 1).nonzero().flatten()
    place = (steps // 2) / steps
    middle = index[gaps] + steps[gaps] // 2
    return gaps, place, middle


# ------------------------------------------------------------------ rigidity, by a judge of no reward's kind

def epipolar_error(video, gap=4, size=256, reach=8.0):
    """How far points move off the epipolar lines of one rigid world; video (F, 3, H, W) in [0, 1] -> float.

    In pixels of a video `size` high, 0 to `reach`. Needs no prompt, no path and no model, and shares nothing
    with the rewards. Corners p of every second frame t are tracked to q in frame t + gap and back (OpenCV's
    pyramidal Lucas-Kanade), RANSAC fits a fundamental matrix M to the tracks, and each costs its Sampson
    distance, at most `reach`:
        |q^T M p| / sqrt((M p)_x^2 + (M p)_y^2 + (M^T q)_x^2 + (M^T q)_y^2)
    A track that is lost, or that does not come back to within a pixel, costs `reach`, as what vanishes or
    dissolves cannot be tracked; unless it ends near the border, where it may have left the picture: then it
    does not count. A pair of frames with fewer than 12 corners is left out; one with fewer than 12 good
    tracks, or to which no M fits, costs `reach`. Mean over the pairs, NaN with fewer than two. A still camera
    makes the error small, so compare videos of the same camera motion. ImportError without OpenCV.
    """
    import cv2  # only here: nothing else needs it
    scale = size / video.shape[2]
    pictures = []
    for frame in as_bytes(video):  # (H, W, 3)
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        pictures.append(cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))

    errors = []
    for t in range(0, len(pictures) - gap, 2):
        here, there = pictures[t], pictures[t + gap]
        corners = cv2.goodFeaturesToTrack(here, 400, qualityLevel=.005, minDistance=3)  # (N, 1, 2)
        if corners is None or len(corners) < 12:
            continue
        # there and back: a corner that does not return was not tracked but swapped for another
        window = dict(winSize=(15, 15), maxLevel=3)
        moved, found, _ = cv2.calcOpticalFlowPyrLK(here, there, corners, None, **window)
        back, found_again, _ = cv2.calcOpticalFlowPyrLK(there, here, moved, None, **window)
        returned = np.linalg.norm(back - corners, axis=2)[:, 0] < 1
        kept = found[:, 0].astype(bool) & found_again[:, 0].astype(bool) & returned
        # what ends within half a tracking window of the border may have left the picture
        low, high = 8, np.array(there.shape[::-1]) - 8
        inside = ((moved[:, 0] > low) & (moved[:, 0] < high)).all(1)
        lost = (inside & ~kept).sum()
        if kept.sum() < 12:  # too few for a matrix
            errors.append(reach)
            continue
        p, q = corners[kept, 0], moved[kept, 0]  # (n, 2)

        # one rigid world, whatever its shape and the camera's way, leaves every track on its epipolar line
        cv2.setRNGSeed(0)  # of RANSAC: the same video has the same error
        matrix, _ = cv2.findFundamentalMat(p, q, cv2.FM_RANSAC, 1.0, .999, 1000)
        if matrix is None:  # no world explains the tracks
            errors.append(reach)
            continue
        p, q = (np.concatenate([points, np.ones((len(points), 1))], 1) for points in (p, q))
        line_there, line_here = p @ matrix.T, q @ matrix  # (n, 3)
        # the Sampson distance; what was lost costs the most
        slopes = np.concatenate([line_there[:, :2], line_here[:, :2]], 1)
        distance = np.abs((q * line_there).sum(1)) / np.linalg.norm(slopes, axis=1).clip(1e-12)
        errors.append((distance.clip(max=reach).sum() + reach * lost) / (len(distance) + lost))
    return float(np.mean(errors)) if len(errors) > 1 else math.nan


def unrewarded(video):
    """What no reward of R_3D knows of a video: how much moves, and with OpenCV the epipolar error."""
    row = dict(motion=motion_magnitude(video))
    with contextlib.suppress(ImportError):
        row["epipolar"] = epipolar_error(video)
    return row


def alarms(evaluations, margin=.1):
    """Sentences on evaluations whose total is above the first one's although the epipolar error rose, or
    motion fell, by more than the share `margin` of its first value; one sentence for each of the two. The
    reward may then be gamed: it rises while the videos get no more rigid, or merely stiller.

    evaluations: rows of a run's eval.jsonl; one that lacks a value raises no alarm.
    """
    found = []
    for row in evaluations[1:]:
        for name, sign, words in (("epipolar", 1, "the epipolar error rose"),
                                  ("motion", -1, "motion fell")):
            total, total_now = evaluations[0].get("total"), row.get("total")
            before, now = evaluations[0].get(name), row.get(name)
            if None in (total, total_now, before, now):
                continue
            if total_now > total and sign * (now - before) > margin * before:
                found.append(f"After {row['step']} steps the total has risen from {total:.3f} to "
                             f"{total_now:.3f}, but {words} from {before:.2f} to {now:.2f}: "
                             "look at the videos.")
    return found


# When `decided_alone` speaks: a share of the advantages' variance, main steps in a row.
ALONE_SHARE, ALONE_STEPS = .7, 20


def decided_alone(rows):
    """-> [(term, main steps)], each time that one term decided more than ALONE_SHARE of the advantages'
    variance in at least ALONE_STEPS main steps in a row: the other terms were then hardly trained on.

    rows: of a run's metrics.jsonl. HPSv3's raw score, about 0 to 10, would drown terms of 0 to 1 in this way.
    """
    main_rows = [row for row in rows if row.get("phase") == "main"]
    found = []
    for name in TERMS:
        steps = []
        for row in [*main_rows, {}]:  # the last one ends what has not ended
            if (row.get(f"share_{name}") or 0) > ALONE_SHARE:
                steps.append(row["step"])
                continue
            if len(steps) >= ALONE_STEPS:
                found.append((name, steps))
            steps = []
    return found


# ---------------------------------------------------------------------------------------- all of one video

@torch.no_grad()
def measure(clip, rewards):
    """Every metric of a scored Clip with a `rerender`, beside its rewards. -> {name: float}, NaN where a
    failed term is needed."""
    video, rec = clip.video, clip.reconstruction
    row = {}

    # 3D consistency: what the reconstruction gives back of the frames it has seen, and of those it has not
    seen, unseen = rerender(rec, video, clip.rerender)
    row["psnr"] = psnr(*seen)
    row["ssim"] = ssim(*seen)
    row["lpips"] = 1 - clip.scores["recon"]  # S_recon's own distance, of the same pictures
    if unseen:
        row["psnr_held_out"] = psnr(*unseen)
        row["ssim_held_out"] = ssim(*unseen)
        pictures = [frames.to(rewards.device) for frames in unseen]
        row["lpips_held_out"] = lpips_distance(rewards.lpips, *pictures)
    row["mvcs"] = mvcs(rec.depth, rec.camera_to_world, rec.intrinsics)

    # camera control, in units of the median depth
    row |= camera_errors(*paths_in_depths(clip.path, rec))

    # the plain sum of the 3D terms, and how much moves by itself: a frozen scene is easy to reconstruct
    row["three_d"] = sum(clip.scores[name] for name, term in TERMS.items() if term.three_d)
    row |= unrewarded(video)
    row["views"] = len(rec.index)
    return row


def interval(values):
    """-> (mean, low, high): the mean with its 95 % interval, percentiles of 2,000 bootstrap samples.

    NaN and None are left out; NaNs if nothing is left. One value is its own interval.
    """
    known = np.array(values, dtype=float)
    known = known[np.isfinite(known)]
    mean = float(known.mean()) if len(known) else math.nan
    if len(known) < 2:
        return mean, mean, mean
    found = scipy.stats.bootstrap((known,), np.mean, n_resamples=2000, method="percentile",
                                  rng=np.random.default_rng(0))
    return mean, *map(float, found.confidence_interval)


# ------------------------------------------------------------------------------------------------ many videos

def videos_in(folder):
    """-> a folder's mp4s in order of name, or of number where all names are numbers. Hidden ones are left
    out: a Mac's, or what a killed call left."""
    files = sorted(folder.glob("[!.]*.mp4"))
    for file in files:
        check_name(file)
    if all(file.stem.isdecimal() for file in files):
        files.sort(key=lambda file: int(file.stem))  # 2 before 10
    return files


def folder_videos(folder, prompt_file):
    """A folder's mp4s, as `videos_in` orders them -> {name: prompt or None}, load(name).

    The file's rows belong to the videos by id; in order, and one for each, where no row has an id.
    """
    names = [file.stem for file in videos_in(folder)]
    if not names:
        raise ValueError(f"{folder} holds no mp4; give a folder of videos")
    rows = read_rows(prompt_file)
    matched = {str(row["id"]).removesuffix(".mp4"): row["prompt"] for row in rows if row["id"] is not None}
    if not matched:
        if len(rows) != len(names):
            raise ValueError(f"{prompt_file} has {len(rows)} prompts and {folder} {len(names)} videos, so "
                             "which is whose is not known; give one for each video, or jsonl with ids")
        matched = {name: row["prompt"] for name, row in zip(names, rows)}
    elif not matched.keys() & set(names):
        raise ValueError(f"no id in {prompt_file} is the name of a video in {folder}; "
                         "name the videos by the ids, or leave all ids out")

    def load(name):
        return read_video(folder / f"{name}.mp4")[0]

    return {name: matched.get(name) for name in names}, load


BATCH = 10  # small videos that are sampled at once


def sampled_videos(a, folder):
    """A model's samples for the prompts of a split -> {name: prompt}, load(name), how many are sampled at
    once.

    A batch is sampled when its first video is asked for, and written to the folder. Prompt k takes the seed's
    k-th noise: the same in every batch, and before and after training.
    """
    # which prompts
    file = a.prompts
    if not file:
        is_tiny = Path(a.model).resolve() == (TINY / "wan").resolve()
        file = (TINY if is_tiny else TINY.parent) / "prompts.jsonl"
    prompts = read_prompts(file, a.split)[a.split][:a.num]

    # which model, at what size
    sampling = sampling_of(a.model, frames=a.frames, height=a.height, width=a.width)
    wan = load_wan(a.model, a.device, torch.bfloat16 if a.device.startswith("cuda") else torch.float32)
    if a.lora:
        merge_lora(wan.dit, a.lora, apart=True)

    # large videos one by one: ten at once would take tens of gigabytes (`estimate.forward_bytes`)
    batch = BATCH if sampling.frames * sampling.height * sampling.width < 10 ** 6 else 1

    @functools.lru_cache(maxsize=1)
    def sampled_batch(start):
        noise_ids = range(start, min(start + batch, len(prompts)))
        videos, _ = sample_videos(wan, prompts[start:start + batch], sampling, a.seed, noise_ids=noise_ids,
                                  transport=a.transport)
        for k, video in zip(noise_ids, videos):
            write_video(folder / f"{k:04d}.mp4", video, sampling.fps)
        return videos

    def load(name):
        number, place = divmod(int(name), batch)
        return sampled_batch(number * batch)[place]

    return {f"{k:04d}": prompt for k, prompt in enumerate(prompts)}, load, batch


def measured_row(name, prompt, load, rewards):
    """A video's row; if it cannot be scored, a row that says why: a bad file must not lose the rest."""
    row = dict(video=name, prompt=prompt)
    try:
        if not prompt:
            raise ValueError("no prompt for this video")
        video = load(name)  # (F, 3, H, W)
        frames, _, height, width = video.shape
        row["size"] = f"{frames}x{height}x{width}"
        clip = rewards.score(video, prompt, camera_path(parse_motion(prompt), frames))
        row |= {f"reward_{term}": score for term, score in clip.scores.items()}
        if clip.errors:
            row["failed_terms"] = clip.errors
        # the metrics read the reconstruction that the rewards have made
        if clip.rerender is None:  # no reconstruction, or none that can be rendered
            row["error"] = clip.errors["recon"]
        else:
            with rewards.on_device({"lpips"}):
                clip.to(rewards.device)
                row |= measure(clip, rewards)
    except (*MASKED, OSError) as e:
        if is_fault(e):
            raise
        row["error"] = f"{type(e).__name__}: {e}".splitlines()[0]
    if "error" in row:
        tqdm.write(f"{name}: {row['error']}")
    # JSON has no NaN
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()}


# Options of sampling, idle where videos are given.
OF_SAMPLING = ("model", "lora", "split", "num", "seed", "frames", "height", "width", "transport")


def check(a, default):
    """Raises ValueError with one sentence for the first argument that cannot work. default(name): an option's
    value where the command line gives none."""
    idle = [name for name in OF_SAMPLING if getattr(a, name) != default(name)]
    if a.videos and idle:
        option = "no-transport" if idle[0] == "transport" else idle[0]
        raise ValueError(f"--{option} changes how videos are sampled, and --videos gives them; leave one out")
    if a.num < 1:
        raise ValueError(f"--num must be at least 1, got {a.num}")
    check_size(a.frames, a.height, a.width)
    check_device(a.device)
    twins = tiny_twins(a)
    if twins and released_config(a.model):
        raise ValueError(f"--{twins[0].replace('_', '-')} is a tiny twin, which knows rooms of 64x64 alone; "
                         f"for {a.model} give the released judges (docs/real_size.md, Training)")
    if a.frames == 1:
        raise ValueError("--frames must be at least 5: one frame shows no camera path")
    if a.videos and not a.prompts:
        raise ValueError("--videos needs --prompts FILE: one prompt a line in the order of the videos, "
                         "or jsonl with ids")


def part_of(out):
    """-> .NAME.part beside the folder `out`, where it is made. ValueError if `out` is there, or cannot be."""
    whole = out.resolve()
    if whole.is_file() or whole.is_dir() and any(whole.iterdir()):
        raise ValueError(f"{out} is there already and is never replaced; choose another --out, or remove it")
    check_writable(whole / "summary.json")
    return whole.with_name(f".{whole.name}.part")


@contextlib.contextmanager
def new_folder(out):
    """with new_folder("runs/x") as part: the folder `part` that the block fills is at `out` when it ends.

    What is at `out` before is never replaced: ValueError, as where nothing can be written, or another process
    is at it. A stopped block leaves `part`, .NAME.part beside `out`, to look at: the next call for this `out`
    deletes it and begins anew.
    """
    part = part_of(out)
    part.mkdir(parents=True, exist_ok=True)
    owner = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process does not keep it
        for left in part.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        yield part
        part.rename(out.resolve())
    except BlockingIOError:
        raise ValueError(f"another process is making {out}; wait for it, or choose another --out") from None
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"cannot write '{out}' ({e.strerror}); free some space, or choose another --out") from e
    finally:
        os.close(owner)


def metrics(a, processes):
    """Scores every video and writes the results folder -> exit status, 1 if a video or a term failed.

    Processes share the videos by what is sampled at once; the first one writes the folder.
    """
    rewards = rewards_of(a)
    # videos and models: what is wrong with their files is found here
    part = processes.on_rank_0(lambda: part_of(a.out))  # it tries a file there, which others would find
    if a.videos:
        prompts, load = folder_videos(a.videos, a.prompts)
        at_once = 1
    else:
        prompts, load, at_once = sampled_videos(a, part / "videos")
    rewards.load()
    first = processes.rank == 0
    # whole batches go to the processes in turn; `prompts` is {name: prompt}, in the videos' order
    mine = [name for k, name in enumerate(prompts) if k // at_once % processes.world == processes.rank]

    with new_folder(a.out) if first else contextlib.nullcontext():
        processes.wait()  # the folder is there, and empty
        # one row a video; written at once, so that what a stopped call has done can be looked at
        rows = {}
        with open(part / "metrics.jsonl", "a") as log:
            whose = "metrics" if processes.world == 1 else f"metrics, process 0 of {processes.world}"
            for name in tqdm(mine, desc=whose, unit="video", disable=not first):
                rows[name] = measured_row(name, prompts[name], load, rewards)
                print(json.dumps(rows[name]), file=log, flush=True)

        # all processes' rows, in the order of the videos
        rows = {name: row for share in processes.gather(rows) for name, row in share.items()}
        processes.close()  # VBench would share its videos with the others, who are done
        if not first:
            return 0
        rows = [rows[name] for name in prompts]
        write_text(part / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        about = summarise(a, rows, part)
        write_json(part / "summary.json", dataclasses.asdict(about))

    # what is known of every metric, and what failed
    print(f"{about.videos} videos ({', '.join(about.sizes)}), {failures(about)}; LPIPS: {about.lpips}; "
          "mean [bootstrap 95 % interval]")
    for name, value in about.summary.items():
        if name == "vbench":
            print(f"{name:20} {value}")
        else:
            print(f"{name:20} {value[0]:10.4f}  [{value[1]:.4f}, {value[2]:.4f}]")
    if importlib.util.find_spec("cv2") is None:
        print("epipolar             not measured: it needs OpenCV, pip install opencv-python-headless")
    return 1 if about.failed or about.failed_terms else 0


@dataclass
class Summary:
    """summary.json of a results folder."""
    videos: int  # that could be scored
    failed: int  # that could not
    sizes: list[str]
    seed: int | None  # None: the videos were given, whose noise is not known
    lpips: str
    summary: dict[str, tuple[float, float, float] | dict[str, float] | str]  # mean, low, high; and vbench
    failed_terms: dict[str, int] = field(default_factory=dict)  # on how many videos a term failed
    model: str = ""
    lora: str | None = None
    transport: bool = True  # of the noise that was sampled from
    settings: dict[str, str | int] = field(default_factory=dict)  # what judged the videos


def summarise(a, rows, folder):
    """Means over the videos of rows that could be scored; a metric that none of them has is left out."""
    good = [row for row in rows if "error" not in row]
    known = dict.fromkeys(name for row in good for name in row)
    names = [name for name in known if any(isinstance(row.get(name), int | float) for row in good)]
    means = {name: interval([row.get(name) for row in good]) for name in names}
    means["vbench"] = vbench(a.videos or folder / "videos", folder)
    failed_terms = Counter(term for row in rows for term in row.get("failed_terms", ()))
    lpips = "AlexNet" if a.lpips == "alex" else "random trunk (a stand-in)"
    settings = judges_of(a) | dict(views=a.views, frames_seen=a.frames_seen)
    sizes = sorted({row["size"] for row in good})
    seed = None if a.videos else a.seed
    return Summary(videos=len(good), failed=len(rows) - len(good), sizes=sizes, seed=seed, lpips=lpips,
                   summary=means, failed_terms=dict(failed_terms), model=str(a.videos or a.model),
                   lora=a.lora, transport=a.transport, settings=settings)


def judges_of(options):
    """-> {judge: what a Summary calls it}: a shipped twin by its folder's name, another by its whole path or
    hub id, for `python -m tiny export` gives retrained twins the shipped ones' names."""
    names = {}
    for judge in ("depth_anything", "critic", "preference"):
        path = getattr(options, judge)
        folder = Path(path).resolve()
        names[judge] = str(folder) if folder.is_dir() else str(path)
        if folder.parent == TINY.resolve():
            names[judge] = folder.name
    return names | dict(lpips=options.lpips)


def failures(about):
    """What a Summary says of failures, in words."""
    terms = [f"{term} failed on {n}" for term, n in about.failed_terms.items()]
    return ", ".join([f"{about.failed} failed", *terms])


VBENCH = ("aesthetic_quality", "imaging_quality", "motion_smoothness", "subject_consistency",
          "background_consistency")
VBENCH_COLUMNS = (*VBENCH, "AVG", "dynamic_degree")


def vbench(videos, out):
    """The real vbench package's scores, in percent -> {one of VBENCH_COLUMNS: score}, or why there are none.

    AVG: the paper's, a mean of its five dimensions. The dynamic degree stands beside it: still videos score
    high in the others.
    """
    try:
        import vbench as package
    except ImportError:
        return "not measured: no vbench package, which needs an environment of its own (docs/real_size.md)"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dimensions = [*VBENCH, "dynamic_degree"]
    try:
        judge = package.VBench(device, str(Path(package.__file__).parent / "VBench_full_info.json"), str(out))
        judge.evaluate(videos_path=str(videos), name="vbench", dimension_list=dimensions, mode="custom_input")
        results = read_json(out / "vbench_eval_results.json")  # {dimension: [score, a list of the videos']}
        scores = {name: 100 * results[name][0] for name in dimensions}
    except Exception as e:  # it downloads, and is not ours: what is scored already must not be lost with it
        return f"not measured: {type(e).__name__}: {e}".splitlines()[0]
    if scores["imaging_quality"] > 100:
        scores["imaging_quality"] /= 100  # older versions of the package give this one in percent
    return scores | dict(AVG=sum(scores[name] for name in VBENCH) / len(VBENCH))


# ----------------------------------------------------------------------------------------------------- tables

# World-R1 (arXiv 2604.24764), as published; VBench in percent, of the small models alone, AVG the five's mean
PAPER_COLUMNS = ("psnr", "ssim", "lpips", "mvcs", "rot_err", "trans_err", "cam_mc", *VBENCH, "AVG")
PAPER = {
    "Wan2.1-1.3B": (17.40, .550, .467, .974, 9.29, 62.94, 66.21, 62.43, 66.51, 97.44, 96.34, 97.29,
                    84.00),
    "Wan2.1-14B": (19.76, .629, .405, .963, 17.01, 60.90, 70.55),
    "World-R1-Small": (27.63, .858, .201, .989, 1.50, 2.76, 3.39, 65.74, 67.53, 98.55, 97.58, 96.67,
                       85.21),
    "World-R1-Large": (27.67, .865, .162, .993, 1.21, 1.30, 2.95),
}
REWARDS = (*(f"reward_{name}" for name in TERMS), "three_d", "motion")
TABLES = {  # title -> columns
    "3D consistency (re-render of the reconstruction)":
        ("psnr", "ssim", "lpips", "mvcs", "psnr_held_out", "ssim_held_out", "lpips_held_out"),
    "Camera control (sums over the reconstructed views)":
        ("rot_err", "trans_err", "cam_mc", "trans_err_rel", "cam_mc_rel"),
    "Rewards, motion, epipolar error": (*REWARDS, "epipolar"),
}
COMPARED = ("psnr", "psnr_held_out", "epipolar", *REWARDS)
MEAN = "{0[0]:.3f} [{0[1]:.3f}, {0[2]:.3f}]"  # mean, low, high
CHANGE = "{0[0]:+.3f} [{0[1]:+.3f}, {0[2]:+.3f}] ({0[3]:.0%} of {0[4]})"  # the share that rose, of how many


def read_lines(file, kind, growing=False):
    """The rows of a .jsonl file, each checked to be of that kind; ValueError names the line. growing: a last
    line without its end is still being written, and no row yet."""
    text = read_bytes(file)
    whole, end, last = text.rpartition(b"\n")
    if growing and end and not last.rstrip().endswith(b"}"):
        text = whole
    lines = text.splitlines()
    return [from_json(line, kind, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


# A line of a results folder's metrics.jsonl, as far as it is read again.
VideoRow = TypedDict("VideoRow", dict(video=str, prompt=str | None, size=str, error=str)
                     | dict.fromkeys(COMPARED, float | None), total=False)


def good_rows(folder):
    """The scored videos of a results folder -> {(name, prompt, size): row}."""
    rows = read_lines(Path(folder) / "metrics.jsonl", VideoRow)
    return {(row.get("video"), row.get("prompt"), row.get("size")): row for row in rows if "error" not in row}


def changes(before, after):
    """Videos of two results folders that share name, prompt and size -> {metric: (mean change, low, high,
    share that rose, of how many videos)}, the interval over videos; a metric that no shared video has is left
    out."""
    rows_before, rows_after = good_rows(before), good_rows(after)
    shared = [key for key in rows_before if key in rows_after]
    found = {}
    for name in COMPARED:
        # (videos,) each; None becomes NaN
        old = np.array([rows_before[key].get(name) for key in shared], dtype=float)
        new = np.array([rows_after[key].get(name) for key in shared], dtype=float)
        change = new - old
        change = change[np.isfinite(change)]
        if len(change):
            found[name] = *interval(change), float((change > 0).mean()), len(change)
    return found


def markdown(title, columns, rows):
    """A titled Markdown table. rows: lists of text, a label and a cell for every column."""
    lines = ["", *columns], ["---"] * (len(columns) + 1), *rows
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_row(label, values, columns, form):
    """values: {column: what `form` shows}; a column without one stays empty."""
    return [label, *(form.format(values[name]) if name in values else "" for name in columns)]


def paper_rows(columns):
    """The paper's rows that have any of these columns, in italics."""
    rows = [table_row(f"*paper: {label}*", dict(zip(PAPER_COLUMNS, numbers)), columns, "*{}*")
            for label, numbers in PAPER.items()]
    return [row for row in rows if any(row[1:])]


def read_summary(file):
    if not file.exists():
        raise ValueError(f"{file.parent} holds no summary.json; make it: python eval.py metrics --out ...")
    about = read_json(file, Summary)
    for name, value in about.summary.items():
        if isinstance(value, tuple) == (name == "vbench"):
            raise ValueError(f"{file}: {name} is not what eval.py writes; score the videos again")
    return about


def unlike(about, base):
    """Why the videos of two Summaries cannot be compared one by one, in words: which settings of the judges,
    or seed, differ. "" if none does. An older Summary does not say frames_seen, which was 4."""
    mine, theirs = (dict(frames_seen=4) | one.settings | dict(seed=one.seed) for one in (about, base))
    names = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {mine.get(name)} instead of {theirs.get(name)}" for name in names)


def table(runs):
    """Markdown in the paper's layout, the paper's own rows marked as such. runs: {label: results folder}.

    Runs on the first one's prompts and seed, judged alike, are also compared with it video by video, and so
    are given videos of the same names and prompts.
    """
    found = {label: read_summary(Path(folder) / "summary.json") for label, folder in runs.items()}
    parts = []

    # means of every run
    for title, columns in TABLES.items():
        rows = [table_row(label, about.summary, columns, MEAN) for label, about in found.items()]
        parts.append(markdown(title, columns, rows + paper_rows(columns)))

    # differences from the first, over the videos that both have
    base, *others = runs
    rows, notes = [], []
    for label in others:
        change = changes(runs[base], runs[label])
        difference = unlike(found[label], found[base])
        if difference:
            notes.append(f"Not compared with {base}: {label}, made with {difference}.")
        elif not change:
            notes.append(f"Not compared with {base}: {label}, which shares no scored video of one name, "
                         "prompt and size.")
        else:
            rows.append(table_row(label, change, COMPARED, CHANGE))
    if rows:
        title = f"Change from {base}, video by video (share that rose, of how many)"
        parts.append(markdown(title, COMPARED, rows))
    parts += notes

    # VBench, or why it was not measured
    rows = []
    for label, about in found.items():
        scores = about.summary.get("vbench", "not measured")
        if isinstance(scores, str):
            rows.append([label, scores])
        else:
            rows.append(table_row(label, scores, VBENCH_COLUMNS, "{:.2f}"))
    parts.append(markdown("VBench (%)", VBENCH_COLUMNS, rows + paper_rows(VBENCH_COLUMNS)))

    # what was measured
    sources = []
    for label, about in found.items():
        origin = "given as files" if about.seed is None else f"seed {about.seed}"
        noise = "" if about.transport else ", noise not transported"
        sources.append(f"{label}: {about.videos} videos of {', '.join(about.sizes)}, {failures(about)}, "
                       f"{origin}, LPIPS {about.lpips}{noise}")
    parts.append(f"Mean and bootstrap 95 % interval over videos. {'; '.join(sources)}. The paper's rows are "
                 "its own numbers, on its own models and videos: not comparable in value.")
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------- the command line

@as_command("eval.py", shared=True)
def main(argv=None):
    parser = command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    metrics_parser = commands.add_parser("metrics", help="score a folder of mp4s, or a model's samples")
    add = metrics_parser.add_argument
    add("--videos", type=Path, help="folder of mp4s; else the model is sampled")
    add("--prompts", help="text or jsonl file, or a folder of splits (default: prompts.jsonl; of the tiny "
                          "model its own)")
    add("--model", default=str(TINY / "wan"), help="folder (either layout) or hub id")
    add("--lora", help="adapter file or folder (forms: docs/real_size.md)")
    add("--split", default="test", choices=SPLITS)
    add("--num", type=int, default=100, help="prompts of the split")
    add("--seed", type=int, default=0)
    add("--frames", type=int, help="4k+1; default: the model's")
    add("--height", type=int, help="multiple of 16; default: the model's")
    add("--width", type=int, help="multiple of 16; default: the model's")
    add("--no-transport", dest="transport", action="store_false", help="noise that follows no camera path")
    add("--out", type=Path, default=Path("runs/metrics"), help="the results folder, which must be new")
    add_reward_options(metrics_parser)

    table_parser = commands.add_parser("table", help="the paper's tables from results folders")
    table_parser.add_argument("--runs", nargs="+", required=True, metavar="LABEL=FOLDER")

    a = parser.parse_args(argv)
    if a.command == "metrics":
        check(a, metrics_parser.get_default)
        processes = Processes(a.device)
        a.device = str(processes.device)  # of several processes each has its own
        return metrics(a, processes)
    if not all("=" in run for run in a.runs):
        raise ValueError("--runs takes LABEL=FOLDER, such as base=runs/scores/base")
    runs = dict(run.split("=", 1) for run in a.runs)
    if len(runs) < len(a.runs):
        raise ValueError("--runs holds a label twice; give each folder its own")
    print(table(runs))


if __name__ == "__main__":
    sys.exit(main())
