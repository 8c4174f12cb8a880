"""The four rewards of World-R1 (arXiv 2604.24764): what makes a video good, as numbers.

    python rewards.py video.mp4 "Camera push in. A red sphere ..."    the terms, and a picture of them

    R = S_meta + S_recon + S_traj + lambda R_gen      (Eq. 8, 9; lambda is the weight of `general`)

One Depth Anything 3 reconstruction of a video (3D Gaussians and cameras) serves the first three:
    S_meta    the Gaussians from beside the path, scored 0-9 by a vision-language model  `meta_reward`
    S_recon   1 - LPIPS between frames and Gaussians rendered at the recovered cameras   `recon_reward`
    S_traj    exp(-(alpha |translation error| + beta |rotation error|)), path asked against
              path recovered                                                             `trajectory_reward`
    R_gen     HPSv3, a human-preference score, averaged over the first frames            `preference_reward`
              (`general` in options, logs and files)

`TERMS` is the one table of them: sums, options, logs, tables and pages read it. To add a reward, write a
function (judges, clip) -> float and a line of the table: the judges are a `Rewards`, whose attributes are the
loaded models (.depth_anything, .critic, ...), the clip is one video with what was asked of it, on the CPU.
The term's name becomes an option of train.py, so it must not be one already (a CLIP score cannot be "clip").
With three_d=False it also counts in the dynamic phase, beside R_gen. Keep it near [0, 1]: where terms are
summed plainly (--no-standardise, the paper's way), one of a wider range would decide alone.
A model of its own is named in the table's line, and takes
    in `Rewards`    a path (__init__, .sources), and a cached_property of its name that loads it to self.home:
                    an nn.Module, or what holds one as .model, so that --offload can move it; its input goes
                    to self.device
    in train.py     an option of Config with the path, which `rewards_for` hands on
    for eval.py     the same in `add_reward_options` and `rewards_of`: it asks every term, whatever its weight
    in estimate.py  an entry of MODELS, JUDGES, `working` and `looking`, or the estimate leaves it out

A video is scored alone: no score depends on the batch it came in. What fails is NaN, counted, and never a
number. What the paper does not state (alpha, beta, the meta-view's offset, the number of frames) is a named
argument here; alpha = beta = 5 are ours (plain: 1). Left out: reward servers, and rewards of single latents.
"""

import contextlib
import functools
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

import splat
from critics import Critic, Preference, digit_score, load_lpips, lpips_distance
from depth_anything import Reconstruction, load_depth_anything
from noise_warp import camera_path, draw_paths, parse_motion, relative_to_first, rotation_angle
from prompts import usable_prompt
from sample import as_bytes, check_device, check_writable, evenly_spaced, read_video
from weights import TINY, as_command, command_line, is_out_of_memory, written_whole


# --------------------------------------------------------------------------------------------- what is scored

@dataclass
class Clip:
    """One video with what was asked of it, and what its judging left to look at."""
    video: torch.Tensor  # (F, 3, H, W) in [0, 1]
    prompt: str
    path: torch.Tensor  # the requested camera-to-world (F, 4, 4)
    reconstruction: Reconstruction | None = None
    rerender: torch.Tensor | None = None  # (V, 3, H, W), the Gaussians at the recovered cameras
    meta_views: torch.Tensor | None = None  # (2, 3, H, W), the Gaussians from beside the path
    digits: torch.Tensor | None = None  # (2, 10), the critic's probabilities
    # term -> float; NaN where it failed or was not asked for
    scores: dict = field(default_factory=lambda: dict.fromkeys(TERMS, math.nan))
    errors: dict = field(default_factory=dict)  # term -> why it failed

    def render(self, cameras):
        """The reconstruction seen from camera-to-world (V, 4, 4), at the video's size -> (V, 3, H, W)."""
        rec, (H, W) = self.reconstruction, self.video.shape[2:]
        # cameras without intrinsics of their own, the meta-views, take those of the first frames
        K = native_intrinsics(rec, H, W)[:len(cameras)]
        return splat.render(rec.gaussians, cameras, K, H, W)[0]

    def to(self, device):
        """Moves the reconstruction to a device, but for its `index`, which picks frames of the video."""
        rec = self.reconstruction
        if rec is None:
            return
        parts = [rec] if rec.gaussians is None else [rec, rec.gaussians]  # not every model makes Gaussians
        for part in parts:
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor) and name != "index":
                    setattr(part, name, value.to(device))


def native_intrinsics(rec, height, width):
    """The reconstruction's intrinsics (V, 3, 3) in pixels of height x width."""
    h, w = rec.depth.shape[1:]
    return rec.intrinsics * torch.tensor([width / w, height / h, 1.0], device=rec.intrinsics.device)[:, None]


def reconstruct(judges, clip):
    """Depth Anything 3's Reconstruction of a clip. ValueError if it is not finite or shows nothing: no term
    may make a number of it."""
    if len(clip.video) < 2:
        raise ValueError("one frame shows no camera path")
    rec = judges.depth_anything(clip.video, judges.views)
    parts = {name: getattr(rec, name) for name in ("depth", "camera_to_world", "intrinsics")}
    if rec.gaussians is not None:
        parts |= {f"Gaussians' {name}": values for name, values in vars(rec.gaussians).items()}
    for name, values in parts.items():
        if not values.isfinite().all():
            raise ValueError(f"the reconstruction's {name} holds NaN or infinite values")
    invisible = rec.gaussians is not None and not (rec.gaussians.opacities > 0).any()
    if (rec.depth <= 0).all() or invisible:
        raise ValueError("the reconstruction is empty")
    return rec


def paths_in_depths(path, rec):
    """Requested and recovered camera-to-world at the reconstructed frames, (V, 4, 4) each, float64, relative
    to their first pose; the recovered one in units of the scene's median depth."""
    requested, found = relative_to_first(path[rec.index]), relative_to_first(rec.camera_to_world)
    found[:, :3, 3] /= float(rec.depth.median())
    return requested, found


# ----------------------------------------------------------------------------------------------------- S_meta

def meta_reward(judges, clip):
    """S_meta in [0, 1]: how solid the scene looks from where the camera never was, by the vision-language
    critic.

    A video can look right along its own path and be a set of flat cards; a view from beside the path shows
    it.
    """
    cameras = meta_views(clip.reconstruction)  # (2, 4, 4)
    clip.meta_views = clip.render(cameras).cpu()  # (2, 3, H, W), what they see
    clip.digits = judges.critic(clip.meta_views)  # (2, 10)
    return digit_score(clip.digits).mean()


def meta_views(rec, side=.35, up=.2):
    """Camera-to-world (2, 4, 4): left and right of the path's middle camera, above it, looking at the scene.

    Offsets are fractions of the median depth d: position = p_mid +- side d x_mid - up d y_mid; the target is
    the median of the Gaussians' means, coordinate by coordinate. Far enough aside that a flat card is seen to
    be flat, near enough that the scene still fills the view; the paper's is "far off" the path, stepped back.
    """
    middle = rec.camera_to_world[len(rec.camera_to_world) // 2]
    d = rec.depth.median()
    target = rec.gaussians.means.median(0).values
    x, y, _, p = middle[:3].unbind(1)
    views = []
    for sign in (-1, 1):
        # beside the path and above it, turned to the scene (y points down)
        position = p + d * (sign * side * x - up * y)
        forward = F.normalize(target - position, dim=0)
        right = F.normalize(torch.linalg.cross(y, forward), dim=0)
        view = torch.eye(4, device=p.device)
        view[:3] = torch.stack([right, torch.linalg.cross(forward, right), forward, position], 1)
        views.append(view)
    return torch.stack(views)


# ---------------------------------------------------------------------------------------------------- S_recon

def recon_reward(judges, clip):
    """S_recon, 1 - LPIPS in about [0, 1]: are the frames views of one scene? The Gaussians hold what all
    frames agree on; rendered at the recovered cameras they give back a consistent video, and blur one that is
    not."""
    rec = clip.reconstruction
    rerender = clip.render(rec.camera_to_world).clamp(0, 1)
    clip.rerender = rerender.cpu()
    return 1 - lpips_distance(judges.lpips, rerender, clip.video[rec.index].to(judges.device))


# ----------------------------------------------------------------------------------------------------- S_traj

def trajectory_reward(path, recovered, alpha=5.0, beta=5.0, depth=1.0):
    """S_traj in (0, 1]: exp(-(alpha mean_f |t_f - s t^_f| + beta mean_f angle(R_f, R^_f))), a float.

    path, recovered: camera-to-world (F, 4, 4), requested (scene units) and recovered (any scale and any world
    axes: both are taken relative to their frame 0). Angles in radians. All in float64. The scale is least
    squares' in size,
        s = |sum t . t^| / sum |t^|^2,
    and positive: a path that goes the wrong way is not mirrored, and costs more than one that stands still.
    Straight, planar and tiny paths need no special case. A target that stands still (fixed, pan) says nothing
    about scale: there s = 1 / depth, with depth the recovered scene's median depth, the length that is 1 in
    scene units.

    For a push_in of 0.35 / a pan of 20 degrees / an orbit of 30 degrees about a point at depth 1, recovered
    as:
        the same, at any scale     1.00 / 1.00 / 1.00
        double                     1.00 /  .42 /  .21
        half                       1.00 /  .65 /  .46
        a camera that stands still  .42 /  .42 /  .07
        the opposite way            .17 /  .17 /  .01
    """
    requested, found = relative_to_first(path), relative_to_first(recovered)
    if requested.shape != found.shape or requested.shape[1:] != (4, 4):
        raise ValueError("paths must both be (F, 4, 4), "
                         f"got {tuple(path.shape)} and {tuple(recovered.shape)}")
    # translations, at the scale that brings the recovered path to the requested one's size
    t, t_found = requested[:, :3, 3], found[:, :3, 3]  # (F, 3)
    if t.square().sum() > 1e-8 * len(t):
        scale = (t * t_found).sum().abs() / t_found.square().sum().clamp_min(1e-12)
    else:
        scale = 1 / depth
    translation = (t - scale * t_found).norm(dim=1).mean()
    # rotations have no scale
    rotation = rotation_angle(requested[:, :3, :3], found[:, :3, :3]).mean()
    return float(torch.exp(-(alpha * translation + beta * rotation)))


def trajectory_term(judges, clip):
    """S_traj of a clip as the table of terms takes it: `trajectory_reward` at the reconstructed frames."""
    rec = clip.reconstruction
    if len(clip.path) != len(clip.video):
        raise ValueError(f"the path has {len(clip.path)} cameras, the video {len(clip.video)} frames")
    return trajectory_reward(clip.path[rec.index], rec.camera_to_world, judges.alpha, judges.beta,
                             float(rec.depth.median()))


# ------------------------------------------------------------------------------------------------------ R_gen

def preference_reward(judges, clip):
    """R_gen in [-1, 1]: HPSv3's score of the first frames against the prompt, their mean (Eq. 10). Alone in
    the dynamic phase.

    The paper has R_gen on that scale and does not state the map: ours is tanh((score - center) / spread),
    monotone, with a center and spread of the judge's own unless options give others. Raw, HPSv3 spans some
    ten units, and the plain sum would be its alone.
    """
    if not clip.video.isfinite().all():
        raise ValueError("frames have NaN or infinite pixels")
    frames = clip.video[:judges.frames_seen]
    score = judges.preference(frames, [clip.prompt] * len(frames)).mean()
    center = judges.preference.center if judges.center is None else judges.center
    spread = judges.preference.spread if judges.spread is None else judges.spread
    return torch.tanh((score - center) / spread)


# ----------------------------------------------------------------------------------------- the table of terms

@dataclass(frozen=True)
class Term:
    name: str  # in code, options, logs and files
    label: str  # the paper's symbol, in tables and pages
    models: tuple  # which of the Rewards' models it looks through
    function: Callable  # (judges, clip) -> float
    three_d: bool  # part of R_3D: not asked for in the dynamic phase


# The public names of the terms. R_gen is `general`; the model it asks is the preference model, HPSv3.
TERMS = {term.name: term for term in (
    Term("meta", "S_meta", ("depth_anything", "critic"), meta_reward, three_d=True),
    Term("recon", "S_recon", ("depth_anything", "lpips"), recon_reward, three_d=True),
    Term("traj", "S_traj", ("depth_anything",), trajectory_term, three_d=True),
    Term("general", "R_gen", ("preference",), preference_reward, three_d=False),
)}


def combine(terms, weights, dynamic=False):
    """The weighted sums of terms {name: (B,)} -> R_3D and the total, (B,) each. A dynamic phase has no R_3D
    (NaN), and its total is the rest: periodic decoupling. A masked term (NaN) masks the sums that it belongs
    to. This weighted R_3D is `three_d` in a run's logs; eval.py's is the plain sum, whatever the weights."""
    def weighted_sum(three_d):
        names = [name for name, term in TERMS.items() if term.three_d == three_d and weights[name]]
        parts = [weights[name] * terms[name] for name in names]
        return sum(parts) if parts else torch.zeros_like(next(iter(terms.values())))

    if dynamic:
        total = weighted_sum(three_d=False)
        return torch.full_like(total, math.nan), total
    R_3D = weighted_sum(three_d=True)
    return R_3D, R_3D + weighted_sum(three_d=False)


# --------------------------------------------------------------------------------------- all terms of a video

# What a video, or a judge that looks at it, can do wrong: a value it cannot have, arithmetic that breaks
# down, an operation that torch refuses. Any other error is the program's or the machine's: it would mask
# sample after sample, so it stops the run. Full memory, a lost card and what the GPU's libraries could not do
# stop it too, though torch calls them RuntimeErrors: OF_THE_GPU is what such an error says. A wrong shape in
# a new reward is masked; `reasons` says what it was.
MASKED = (ValueError, ArithmeticError, RuntimeError)
OF_THE_GPU = ("CUDA error", "CUDA driver error", "cuDNN error", "cusolver error", "unable to find an engine")


def is_fault(error):
    """Is an error, though of a class in MASKED, the machine's or the program's fault?"""
    faults = (torch.AcceleratorError, NotImplementedError, RecursionError)
    of_the_gpu = any(words in str(error) for words in OF_THE_GPU)
    return isinstance(error, faults) or of_the_gpu or is_out_of_memory(error)


class Rewards:
    """The terms with their models, each loaded on first use.

    views: frames that are reconstructed, evenly spread, at least 2. frames_seen: how many the preference
    model sees, from the first on (K of Eq. 10). alpha, beta: of S_traj. center, spread: of R_gen; None takes
    the judge's own. weights: {term: weight}, 1 where none is given; 0 leaves a term out. offload: the models
    wait on the CPU, and one at a time is on the device, while it looks at all clips of a call.

    failures: how many times each term was masked in the latest call of `terms`. reasons: the last error of
    each, for the messages of `__call__` and of training.
    """

    def __init__(self, depth_anything=TINY / "depth_anything", critic=TINY / "qwen3_vl",
                 preference=TINY / "hpsv3", lpips="random", views=9, frames_seen=4, alpha=5.0, beta=5.0,
                 weights=None, device="cpu", dtype=None, center=None, spread=None, offload=False):
        self.sources = dict(depth_anything=depth_anything, critic=critic, preference=preference, lpips=lpips)
        self.views, self.frames_seen = views, frames_seen
        self.alpha, self.beta = alpha, beta
        self.center, self.spread = center, spread
        self.weights = {name: 1.0 for name in TERMS} | (weights or {})
        self.check()
        self.device, self.offload = torch.device(device), offload
        self.home = torch.device("cpu") if offload else self.device
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.failures, self.reasons = Counter(), {}

    def check(self):
        """ValueError for an option out of its range."""
        unknown = sorted(set(self.weights) - set(TERMS))
        if unknown:
            raise ValueError(f"unknown reward term '{unknown[0]}'; the terms are {', '.join(TERMS)}")
        limits = {"views": (self.views, 2),  # one view shows no path: S_traj would be 1
                  "frames-seen": (self.frames_seen, 1),
                  "traj-alpha": (self.alpha, 0),
                  "traj-beta": (self.beta, 0)}
        limits |= {name: (weight, 0) for name, weight in self.weights.items()}
        for option, (value, least) in limits.items():
            if not least <= value < math.inf:
                raise ValueError(f"--{option} must be a number of at least {least}, got {value}")
        if not any(self.weights.values()):
            raise ValueError(f"every reward has weight 0; give one a weight: --{', --'.join(TERMS)}")
        if self.center is not None and not math.isfinite(self.center):
            raise ValueError(f"--general-center must be a finite number, got {self.center}")
        if self.spread is not None and not 0 < self.spread < math.inf:
            raise ValueError(f"--general-spread must be a positive number, got {self.spread}")

    @functools.cached_property
    def depth_anything(self):
        model = load_depth_anything(self.sources["depth_anything"], self.home)
        if not model.config.gaussians and (self.weights["meta"] or self.weights["recon"]):
            raise ValueError(f"'{self.sources['depth_anything']}' makes no Gaussians for S_meta and S_recon; "
                             "give a model that does, such as depth-anything/DA3-GIANT")
        return model

    @functools.cached_property
    def critic(self):
        return Critic(self.sources["critic"], self.home, self.dtype)

    @functools.cached_property
    def preference(self):
        return Preference(self.sources["preference"], self.home, self.dtype)

    @functools.cached_property
    def lpips(self):
        return load_lpips(self.sources["lpips"], self.home)

    def asked(self, dynamic=False):
        """The terms with a weight; in a dynamic phase without those of R_3D."""
        return [term for name, term in TERMS.items() if self.weights[name] and not (dynamic and term.three_d)]

    def load(self, dynamic=False):
        """Loads what is needed now instead of on first use, so that a wrong path, or a gsplat that does not
        compile, is an error before any long work."""
        asked = self.asked(dynamic)
        renders = {"meta", "recon"} & {term.name for term in asked}
        if renders and self.device.type == "cuda":
            splat.compile_gsplat()
        for name in sorted({model for term in asked for model in term.models}):
            getattr(self, name)  # a cached_property: to read it is to load the model
        return self

    @contextlib.contextmanager
    def on_device(self, names):
        """With offload, these models are on the device inside the block, and the others on the CPU."""
        models = [getattr(self, name) for name in names] if self.offload else []
        modules = [model if isinstance(model, nn.Module) else model.model for model in models]
        # judges are frozen: their weights on the CPU stay there, and need not be copied back
        at_home = [(p, p.data) for module in modules for p in module.parameters()]
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            for p, data in at_home:
                p.data = data
            for module in modules:
                module.to(self.home)  # what else they hold

    @contextlib.contextmanager
    def masking(self, clip, terms):
        """A failure inside the block becomes the terms' NaN with its reason, never a number, and does not
        stop the others. With offload the clip's reconstruction is on the device inside the block alone, and
        only for terms that look at it."""
        moves = self.offload and any("depth_anything" in term.models for term in terms)
        try:
            if moves:
                clip.to(self.device)
            yield
        except MASKED as error:
            if is_fault(error):
                raise
            for term in terms:
                self.failures[term.name] += 1
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                self.reasons[term.name] = clip.errors[term.name] = reason
        finally:
            if moves:
                clip.to(self.home)

    @torch.no_grad()
    def score_clips(self, clips, dynamic=False):
        """Fills in the clips' scores and errors, one model after the other. -> the clips"""
        asked = self.load(dynamic).asked(dynamic)

        # one reconstruction serves every term that looks at geometry; where it fails, all of them are masked
        geometric = [term for term in asked if "depth_anything" in term.models]
        if geometric:
            with self.on_device({"depth_anything"}):
                for clip in clips:
                    with self.masking(clip, geometric):
                        clip.reconstruction = reconstruct(self, clip)

        # each term by itself: a judge that fails costs its own term alone
        for term in asked:
            with self.on_device(set(term.models) - {"depth_anything"}):
                for clip in clips:
                    if term.name in clip.errors:
                        continue
                    with self.masking(clip, [term]):
                        value = float(term.function(self, clip))
                        if not math.isfinite(value):
                            raise ValueError(f"the score is {value}")
                        clip.scores[term.name] = value
        return clips

    def score(self, video, prompt, path, dynamic=False):
        """One video (F, 3, H, W) with its prompt and requested path (F, 4, 4) -> Clip with its scores."""
        return self.score_clips([Clip(video, prompt, path)], dynamic)[0]

    def terms(self, videos, prompts, paths, dynamic=False):
        """B videos (F, 3, H, W), prompts, requested paths (F, 4, 4) -> {every term, three_d, total: (B,)}.

        float32; NaN = masked, or not asked for (weight 0, or 3D terms with dynamic=True). A term that is
        asked for and failed masks the total. dynamic: the terms outside R_3D (R_gen) alone, no 3D work. It is
        not an error when every sample fails: training counts and masks them.
        """
        self.failures.clear()
        self.reasons.clear()
        items = list(zip(videos, prompts, paths, strict=True))
        # One clip after the other, so that only one reconstruction is held; with offload all in one call, so
        # that each model moves to the device and back once.
        parts = [items] if self.offload else [[item] for item in items]
        scores = []
        for part in parts:
            scores += [clip.scores for clip in self.score_clips([Clip(*item) for item in part], dynamic)]
        out = {name: torch.tensor([row[name] for row in scores]) for name in TERMS}
        out["three_d"], out["total"] = combine(out, self.weights, dynamic)
        return out

    def __call__(self, videos, prompts, paths, dynamic=False):
        """As `terms`, but RuntimeError says why when no sample has a total."""
        out = self.terms(videos, prompts, paths, dynamic)
        if out["total"].isnan().all():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            raise RuntimeError(f"every sample's reward failed; {reasons}")
        return out


def load_rewards(**options):
    """A `Rewards`; without options, the tiny twins. Models are loaded on first use, or at once by
    `.load()`."""
    return Rewards(**options)


# ------------------------------------------------------ motion: watched beside the rewards, never one of them

def motion_magnitude(video, size=32):
    """How much a video (F, 3, H, W) moves, less what a smooth field explains of it: a float, in percent of
    its width a frame.

    Optical flow between neighbours (Lucas-Kanade on two pyramid levels, at `size` pixels wide), less the
    best-fitting quadratic field (what panning, zooming and turning do to a distant scene), mean length over
    pixels and frames. Parallax stays, and most of the camera's flow where walls are plain: still rooms of the
    trained tiny model read 1.5 under a pan, .4 under a fixed camera. So compare videos of the same camera
    motion.
    """
    # flow between neighbours, on small grey pictures
    _, _, H, W = video.shape
    small = (max(8, round(H * size / W)), size)
    grey = F.interpolate(video.float().mean(1, keepdim=True), size=small, mode="area")
    flow = lucas_kanade(grey[:-1], grey[1:])  # (F-1, 2, h, w)

    # the camera's share of it: a quadratic field, fitted to each pair of frames
    h, w = flow.shape[2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1).view(-1, 6)
    field = flow.flatten(2).mT  # (F-1, hw, 2)
    weight = torch.ones_like(field[..., :1])
    for _ in range(4):  # iteratively reweighted: objects that move must not bend the camera's field
        B = basis * weight.sqrt()
        normal = B.mT @ B + 1e-4 * torch.eye(6)
        fit = basis @ torch.linalg.solve(normal, B.mT @ (weight.sqrt() * field))
        weight = 1 / (1 + ((field - fit).norm(dim=-1, keepdim=True) / .1).square())
    return float((field - fit).norm(dim=-1).mean() * 100 / w)


def lucas_kanade(a, b, levels=2, window=5, rounds=3):
    """Dense flow (N, 2, H, W) in pixels from pictures a to b (N, 1, H, W): coarse to fine, least squares in a
    window."""
    def box(x):
        return F.avg_pool2d(x, window, 1, window // 2)

    flow = None
    for level in reversed(range(levels)):
        A, B = a, b
        if level:
            A, B = F.avg_pool2d(a, 2 ** level), F.avg_pool2d(b, 2 ** level)
        N, _, H, W = A.shape
        if flow is None:
            flow = torch.zeros(N, 2, H, W)
        else:  # the coarser level's flow, in this one's pixels
            flow = 2 * F.interpolate(flow, size=(H, W), mode="bilinear", align_corners=False)
        # the normal equations of a window: its gradients' second moments, the same in every round
        gy, gx = torch.gradient(A, dim=(2, 3))
        v, u = torch.meshgrid(torch.arange(H) + .5, torch.arange(W) + .5, indexing="ij")
        xx, xy, yy = box(gx * gx) + 1e-4, box(gx * gy), box(gy * gy) + 1e-4
        for _ in range(rounds):
            # how far b, moved back by the flow so far, is from a; and the step that closes the gap
            grid = torch.stack([(u + flow[:, 0]) * 2 / W - 1, (v + flow[:, 1]) * 2 / H - 1], -1)
            moved = F.grid_sample(B, grid, mode="bilinear", padding_mode="border", align_corners=False)
            error = moved - A
            ex, ey = box(error * gx), box(error * gy)
            step = torch.cat([xy * ey - yy * ex, xy * ex - xx * ey], 1) / (xx * yy - xy * xy)
            flow = flow + step.clamp(-2, 2)
    return flow


# -------------------------------------------------------------------------------------------------- a picture

def draw_clip(file, clip, columns=6):
    """One PNG: the terms; input frames over their re-render; the meta-views with their digits; asked and
    found path."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, columns, figsize=(2 * columns, 7.5), layout="constrained")
    scores = "   ".join(f"{term.label} {clip.scores[name]:.3f}" for name, term in TERMS.items())
    figure.suptitle(f"{clip.prompt[:110]}\n{scores}", fontsize=10, parse_math=False)
    for ax in axes.flat:
        ax.set_axis_off()

    def pictures(row, title, images):
        if images is None:
            return
        axes[row, 0].set_title(title, loc="left", fontsize=9)
        for ax, image in zip(axes[row], images[evenly_spaced(len(images), columns)]):
            ax.imshow(as_bytes(image))

    # three rows of pictures; a failed judge leaves its row empty
    rec = clip.reconstruction
    pictures(0, "input", clip.video if rec is None else clip.video[rec.index])
    pictures(1, "re-render at the recovered cameras", clip.rerender)
    pictures(2, "meta-views, the critic's digits", clip.meta_views)
    # beside the two meta-views: the critic's probabilities of each, and the path asked for and found
    if clip.digits is not None:
        for ax, digits in zip(axes[2, 2:], clip.digits):
            ax.set_axis_on()
            ax.bar(range(10), digits)
            ax.set_xticks(range(10))
    if rec is not None and len(clip.path) == len(clip.video):
        requested, found = paths_in_depths(clip.path, rec)
        axes[2, 4].set_axis_on()
        draw_paths(axes[2, 4], {"asked": requested, "found": found})
    with written_whole(file) as part:
        figure.savefig(part, dpi=100)
    plt.close(figure)


# ------------------------------------------------------------------------------------------- the command line

def add_reward_options(parser):
    """The options of every command that scores videos; `rewards_of` makes a Rewards of them."""
    add = parser.add_argument
    add("--depth-anything", default=TINY / "depth_anything",
        help="folder or hub id, e.g. depth-anything/DA3-GIANT")
    add("--critic", default=TINY / "qwen3_vl", help="folder or hub id, e.g. Qwen/Qwen3-VL-4B-Instruct")
    add("--preference", default=TINY / "hpsv3", help="folder or hub id, e.g. MizzenAI/HPSv3")
    add("--lpips", choices=("alex", "random"), default="random",
        help="trunk; random is a stand-in without downloads")
    add("--views", type=int, default=9, help="frames that are reconstructed, evenly spread")
    add("--frames-seen", type=int, default=4, help="frames the preference model sees, from the first on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--offload", action="store_true", help="judges wait on the CPU; one at a time is on the device")


def tiny_twins(options):
    """-> those of the options for judges that name a tiny twin, which knows rooms of 64x64 alone."""
    judges = ("depth_anything", "critic", "preference")
    return [judge for judge in judges if Path(getattr(options, judge)).resolve().parent == TINY.resolve()]


def rewards_of(a):
    check_device(a.device)
    return Rewards(a.depth_anything, a.critic, a.preference, a.lpips, a.views, a.frames_seen,
                   device=a.device, offload=a.offload)


@as_command("rewards.py")
def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("video", help="an mp4")
    parser.add_argument("prompt", help="what the video was asked to show, camera words included")
    parser.add_argument("--out", type=Path, help="the picture, a PNG (default: beside the video)")
    add_reward_options(parser)
    a = parser.parse_args(argv)
    prompt = usable_prompt(a.prompt)
    video, _ = read_video(a.video)
    out = a.out or Path(a.video).with_suffix(".rewards.png")
    if out.suffix != ".png":
        raise ValueError(f"--out must end in .png, got '{out}'")
    check_writable(out)
    rewards = rewards_of(a).load()
    clip = rewards.score(video, prompt, camera_path(parse_motion(prompt), len(video)))
    for name, score in clip.scores.items():
        print(f"{name:8} failed: {clip.errors[name]}" if name in clip.errors else f"{name:8} {score:.4f}")
    stand_in = "   (recon: random LPIPS trunk, a stand-in)" if a.lpips == "random" else ""
    print(f"{'total':8} {sum(clip.scores.values()):.4f}{stand_in}")
    draw_clip(out, clip)
    print(out)
    return 1 if clip.errors else 0


if __name__ == "__main__":
    sys.exit(main())
