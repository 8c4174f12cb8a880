"""The tiny world's examiners, none of them a reward: does a clip show what its prompt asks, could a rigid
room look so?

    python -m tiny probe --num 200               the shipped model on 200 unseen prompts
    python -m tiny probe --num 200 --rendered    the renderer's own clips: how far to trust the readings
    python -m tiny probe --guidance 1 2 3 --steps 10 20    one row for every combination
    python -m tiny compare --num 12              an animated picture: unseen scenes, rendered and sampled
    python -m tiny score-vae --num 64            the VAE against a linear codec
    python -m tiny train-probe --minutes 25      how the classifier was made -> RUN/probe

The probe is a small 3D convolutional classifier, trained on fresh renders (some blurred or noisy, for samples
are not renders), with a softmax for each of: the wall's colour, the floor's colour, each palette colour's
object (none, sphere, box, cylinder), and the camera motion of the first and of the second half of the clip.
`reprojection` needs no training: it asks how well one rigid scene, seen from the cameras the prompt asks for,
explains the clip. Training a policy on the rewards must not make these readings worse.
"""

import dataclasses
import itertools
import math
import random
import re

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import binomtest
from tqdm import tqdm

from eval import epipolar_error
from fast import cpu_autocast
from lora import lora_file, merge_lora
from model import load_vae, load_wan
from noise_warp import MOTIONS, camera_path, parse_motion
from prompts import read_prompts
from sample import as_bytes, check_size, contact_sheet, evenly_spaced, psnr, sample_videos, sampling_of
from tiny.train import fit, trained, write_tensors
from tiny.world import (COLOURS, SHAPES, degrade, intrinsics, pixel_rays, random_scene, random_scenes, render,
                        render_all, unseen_scenes)
from weights import written_whole

# --------------------------------------------------------------------------------------------- the classifier

# What is read: a softmax over each head's classes.
NAMES = list(COLOURS)
FORMS = ("none", *SHAPES)
OBJECTS = [f"{colour} object" for colour in NAMES]
HEADS = {"wall": len(NAMES), "floor": len(NAMES)}  # name -> classes
HEADS |= dict.fromkeys(OBJECTS, len(FORMS))
HEADS |= {"first motion": len(MOTIONS), "second motion": len(MOTIONS)}


class Probe(nn.Module):
    """Videos (B, F, 3, 64, 64) in [0, 1] -> {head: logits (B, classes)}.

    Two branches: 3D convolutions over the clip at half resolution and below, which see motion (48 linear
    channels keep the file small); and 2D convolutions over five frames from full resolution on, whose spatial
    maxima tell a box from a cylinder wherever it stands.
    """

    def __init__(self):
        super().__init__()

        def layer(convolution, width, out, stride):
            return convolution(width, out, 3, stride, 1), nn.GroupNorm(4, out), nn.ReLU()

        self.body = nn.Sequential(
            nn.Conv3d(3, 24, (1, 5, 5), (1, 2, 2), (0, 2, 2)), nn.ReLU(),
            *layer(nn.Conv3d, 24, 48, 2),
            *layer(nn.Conv3d, 48, 72, 2),
            *layer(nn.Conv3d, 72, 96, 1),
            nn.AdaptiveAvgPool3d(4), nn.Flatten(),
            nn.Linear(96 * 64, 48, bias=False), nn.Linear(48, 192), nn.ReLU())
        self.frames = nn.Sequential(
            nn.Conv2d(3, 24, 3, 1, 1), nn.ReLU(),
            *layer(nn.Conv2d, 24, 48, 2),
            *layer(nn.Conv2d, 48, 96, 2),
            *layer(nn.Conv2d, 96, 144, 1),
            nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.out = nn.Linear(192 + 144, sum(HEADS.values()))
        self.body.to(memory_format=torch.channels_last_3d)
        self.frames.to(memory_format=torch.channels_last)

    def forward(self, video):
        x = (video - .5) * 2
        # Motion, from the whole clip.
        clip = x.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)  # (B, 3, F, 64, 64)
        moving = self.body(clip)  # (B, 192)
        # Shapes and colours, from five frames: their mean.
        five = x[:, evenly_spaced(x.shape[1], 5)]
        pictures = five.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (B * 5, 3, 64, 64)
        still = self.frames(pictures).unflatten(0, five.shape[:2]).mean(1)  # (B, 144)
        logits = self.out(torch.cat([moving, still], 1)).split(list(HEADS.values()), -1)
        return dict(zip(HEADS, logits))


def labels(wall, floor, objects, motions):
    """What a clip should read as: {head: class index}. objects: {colour: shape}."""
    found = {"wall": NAMES.index(wall), "floor": NAMES.index(floor)}
    found |= {f"{colour} object": FORMS.index(objects.get(colour, "none")) for colour in NAMES}
    return found | {"first motion": MOTIONS.index(motions[0]), "second motion": MOTIONS.index(motions[-1])}


def labels_of(scene):
    objects = {thing.colour: thing.shape for thing in scene.objects}
    return labels(scene.wall, scene.floor, objects, scene.motions)


def asked(prompt):
    """The labels that a tiny-world caption asks for; ValueError where it names no wall, floor or object."""
    text = prompt.lower()
    palette = "|".join(NAMES)
    wall = re.search(rf"({palette}) walls?", text)
    floor = re.search(rf"({palette}) (?:checkered )?floor", text)
    objects = dict(re.findall(rf"({palette}) ({'|'.join(SHAPES)})", text))
    if not (wall and floor and objects):
        raise ValueError(f"the probe cannot read what this prompt asks for: '{prompt}'; "
                         "it needs wall and floor colours and an object")
    return labels(wall[1], floor[1], objects, parse_motion(prompt))


@torch.no_grad()
def read(probe, videos):
    """Videos (F, 3, 64, 64) -> [{head: class index}], one a video; of a longer one, the 17 frames it was
    trained with."""
    readings = []
    for video in videos:
        logits = probe(video[evenly_spaced(len(video), 17)][None])
        readings.append({head: int(logits[head].argmax()) for head in HEADS})
    return readings


def scores(readings, prompts):
    """-> {wall, floor, objects, motion, all: list of bools}. objects: every object asked for has its colour
    and shape, and no other is seen. motion: both halves."""
    rows = []
    for found, prompt in zip(readings, prompts, strict=True):
        wanted = asked(prompt)
        right = {head: found[head] == wanted[head] for head in HEADS}
        row = dict(wall=right["wall"], floor=right["floor"],
                   objects=all(right[name] for name in OBJECTS),
                   motion=right["first motion"] and right["second motion"])
        row["all"] = all(row.values())
        rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


def load_probe(folder):
    file = folder / "probe.safetensors"
    if not file.exists():
        raise ValueError(f"no probe in {folder}; train it: python -m tiny train-probe")
    probe = Probe()
    try:
        probe.load_state_dict(load_file(file))
    except RuntimeError:
        raise ValueError(f"{file} reads other words than the tiny world has now; train it again: "
                         "python -m tiny train-probe") from None
    return probe.eval()


def example(rng, seed, index):
    """A clip (17, 3, 64, 64), one in four dynamic, and its labels: a third as rendered, the rest blurred or
    noisy a little."""
    split = rng.choice(("static", "static", "static", "dynamic"))
    scene = random_scene(seed, split, index)
    video = render(scene)["video"]
    # Samples of a video model are not renders.
    draw = rng.random()
    if draw < .67:
        kind, most = ("blur", .35) if draw < .4 else ("noise", .4)
        strength = most * rng.random()
        generator = torch.Generator().manual_seed(index)
        video = torch.stack([degrade(frame, kind, strength, generator) for frame in video])
    return video, labels_of(scene)


def train_probe(run, minutes, seed=0):
    """Cross-entropy of all heads, on 24 clips a step."""
    torch.manual_seed(seed)
    probe = Probe()
    held_out = random_scenes("held-out/probe", "static", 128)

    def losses(step, progress):
        rng = random.Random(f"probe/{seed}/{step}")
        clips, wanted = zip(*[example(rng, f"probe/{seed}", step * 24 + i) for i in range(24)])
        with cpu_autocast():
            logits = probe(torch.stack(clips))
        # A loss a head; the log shows those that are not one colour's.
        parts = {}
        for head, values in logits.items():
            classes = torch.tensor([right[head] for right in wanted])
            parts[head] = F.cross_entropy(values.float(), classes)
        shown = {f"{head.replace(' ', '_')}_loss": parts[head] for head in HEADS if head not in OBJECTS}
        yield sum(parts.values()), shown

    def report():
        readings = read(probe, render_all(held_out))
        right = scores(readings, [scene.caption for scene in held_out])
        return {name: sum(values) / len(values) for name, values in right.items()}

    fit(run / "probe", minutes, probe, losses, report, lr=1e-3, seed=seed)


def export_probe(run, folder):
    write_tensors(folder / "probe.safetensors", trained(run, "probe", into=Probe()))


# --------------------------------------------------------------------------------------------------- rigidity

def reprojection(video, poses, gap=1, depths=48, window=5):
    """How far a clip (F, 3, H, W) is from any rigid scene filmed from `poses` (F, 4, 4): 0 is perfect, in
    colour units.

    Plane sweep: every pixel of every second frame t is looked up in frame t + gap at each of `depths` inverse
    depths (.3 to 6 scene units), the colour differences are averaged over a window x window square, and the
    best depth counts. Mean over pixels and pairs; pixels no depth keeps in view are left out. Even a render
    is above 0: edges, what is hidden.
    """
    frames, _, H, W = video.shape
    K, rays = intrinsics(H, W), pixel_rays(H, W)  # (3, 3), (3, N)
    z = 1 / torch.linspace(1 / 6, 1 / .3, depths)

    def averaged(maps):  # (D, H, W), over the window
        return F.avg_pool2d(maps[:, None], window, 1, window // 2)[:, 0]

    total, count = 0.0, 0
    for t in range(0, frames - gap, 2):
        # Frame t's pixels at every depth, in the other frame's picture.
        here, there = poses[t].double(), poses[t + gap].double()
        move = (torch.linalg.inv(there) @ here).float()  # camera t -> camera t + gap
        points = K @ (z.view(-1, 1, 1) * (move[:3, :3] @ rays) + move[:3, 3:])  # (D, 3, N)
        place = points[:, :2] / points[:, 2:].clamp_min(1e-6)  # (D, 2, N), pixels
        grid = (place * torch.tensor([2 / W, 2 / H]).view(2, 1) - 1).mT.view(depths, H, W, 2)
        seen = (grid.abs() <= 1).all(-1) & (points[:, 2] > 1e-6).view(depths, H, W)
        other = video[t + gap].expand(depths, -1, -1, -1)
        found = F.grid_sample(other, grid, align_corners=False, padding_mode="border")

        # The depth with the least difference; a depth counts where most of its window is in view.
        difference = (found - video[t]).abs().mean(1) * seen
        share = averaged(seen.float())
        cost = averaged(difference) / share.clamp_min(1e-6)
        best = torch.where(seen & (share > .5), cost, torch.inf).amin(0)  # (H, W)
        best = best[best.isfinite()]
        total += float(best.sum())
        count += len(best)
    return total / count if count else math.nan  # of a single frame, or where no pixel stays in view


# ------------------------------------------------------------------------------------------- models, examined

def sample_in_batches(wan, prompts, sampling, seed=0, noise_path="own", strength=1.0, transport=True,
                      batch=20):
    """One video (F, 3, H, W) a prompt, the i-th from the seed's i-th noise, which is transported along the
    camera path that noise_path (one of NOISE_PATHS) stands for."""
    videos = []
    for first in range(0, len(prompts), batch):
        part = prompts[first:first + batch]
        motions = [noise_motions(prompt, noise_path) for prompt in part]
        paths = [camera_path(words, sampling.frames, strength) for words in motions]
        noise_ids = range(first, first + len(part))
        videos += sample_videos(wan, part, sampling, seed, noise_ids=noise_ids, paths=paths,
                                transport=transport, progress=True)[0]
    return videos


NOISE_PATHS = ("own", "still", "opposite")


def noise_motions(prompt, kind):
    """The camera motions that a prompt's noise is carried along: its own, none, or each turned round. A model
    that follows its noise then films another path than its words say."""
    motions = parse_motion(prompt)
    if kind == "still":
        return ["fixed"]
    if kind == "opposite":
        turned = {"left": "right", "right": "left", "push_in": "pull_out", "pull_out": "push_in"}
        opposite = [re.sub("|".join(turned), lambda word: turned[word[0]], motion) for motion in motions]
        for motion, other in zip(motions, opposite):
            if motion == other and motion != "fixed":
                raise ValueError(f"no motion is known to be the opposite of {motion}: see noise_motions")
        return opposite
    return motions


def checked(model, frames, lora):
    """-> the model's Sampling. ValueError for what would fail late: a wrong length, a missing file."""
    check_size(frames, None, None)
    for file in lora:
        lora_file(file)
    return sampling_of(model, frames=frames)


def load_adapted(model, lora=None):
    """-> the model, with a LoRA merged if one is given."""
    wan = load_wan(model)
    if lora is not None:
        merge_lora(wan.dit, lora, apart=True)
    return wan


def proportion(right):
    """Share of True and its 95 % interval (Wilson's) -> "p [low, high]"."""
    found = binomtest(sum(right), len(right))
    low, high = found.proportion_ci(method="wilson")
    return f"{found.statistic:.3f} [{low:.3f}, {high:.3f}]"


HEADER = ("| | wall | floor | objects | motion | all | re-projection, 1 frame | 4 frames | epipolar |\n"
          "|---|---|---|---|---|---|---|---|---|")


def table_row(name, videos, prompts, probe):
    """One line of the table: the probe's shares, the mean re-projection error of neighbours and at 4 frames'
    gap, and the mean epipolar error."""
    cells = [name]
    cells += [proportion(right) for right in scores(read(probe, videos), prompts).values()]
    paths = [camera_path(parse_motion(prompt), len(video)) for prompt, video in zip(prompts, videos)]
    for gap in (1, 4):
        errors = [reprojection(video, path, gap) for video, path in zip(videos, paths)]
        cells.append(f"{sum(errors) / len(errors):.4f}")
    try:
        cells.append(f"{np.nanmean([epipolar_error(video) for video in videos]):.2f}")
    except ImportError:
        cells.append("needs OpenCV")
    return f"| {' | '.join(cells)} |"


def examine(run, model, probe, prompts, num, seed, frames, rendered, transport, lora, **settings):
    """Samples a model for every combination of the settings, and prints a row each; the last row's clips ->
    RUN/probe.png.

    lora: a list of adapters. settings: {name: list of values or None} of strength, noise_path, steps,
    guidance, shift and degradation.
    """
    sampling = checked(model, frames, lora)
    # an option that would do nothing is refused before any work
    settings = {name: values for name, values in dict(lora=lora, **settings).items() if values}
    others = dict(prompts=prompts, **settings, no_transport=not transport)
    idle = [name.replace("_", "-") for name, value in others.items() if value]
    if rendered and idle:
        raise ValueError(f"--rendered scores the unseen scenes' own clips; drop --{idle[0]}")
    of_path = [name for name in ("strength", "degradation", "noise_path") if name in settings]
    if not transport and of_path:
        option = of_path[0].replace("_", "-")
        raise ValueError(f"--{option} is of the noise's camera path, and --no-transport leaves that out; "
                         "drop one")
    scenes = unseen_scenes(num, seed)
    texts = [scene.caption for scene in scenes]
    if prompts:
        texts = read_prompts(prompts, "test")["test"][:num]
    for text in texts:
        asked(text)  # an unreadable prompt is an error before any sampling
    probe = load_probe(probe)
    print(HEADER)

    # What the readings are worth: clips whose content is known.
    if rendered:
        videos = render_all(tqdm(scenes, desc="render", unit="clip"), frames or 17)
        print(table_row("rendered", videos, texts, probe))
        return

    # Samples, for every combination of the settings.
    for values in itertools.product(*settings.values()):
        given = dict(zip(settings, values))
        words = [f"{name} {value}".removesuffix(".0") for name, value in given.items()]
        if not transport:
            words.insert(0, "plain noise")
        name = ", ".join(words) or "defaults"
        wan = load_adapted(model, given.pop("lora", None))
        noise = {name: given.pop(name) for name in ("strength", "noise_path") if name in given}
        chosen = dataclasses.replace(sampling, **given)
        videos = sample_in_batches(wan, texts, chosen, seed, transport=transport, **noise)
        print(table_row(name, videos, texts, probe), flush=True)
    contact_sheet(run / "probe.png", videos[:20])
    print("", *texts[:20], run / "probe.png", sep="\n")


def compare(run, model, lora, num, seed, frames, scale=2):
    """RUN/compare.webp, an animated picture of unseen scenes: each clip as rendered beside its prompt's
    sample.

    lora: a list of adapters. Empty: the model's sample. One: the model's, and the adapter's from the same
    noise. Several: each adapter's, without the model's own. Scene i is the seed's i-th unseen one and has the
    i-th noise, nothing picked; the prompts are printed in reading order.
    """
    sampling = checked(model, frames, lora)
    scenes = unseen_scenes(num, seed)
    prompts = [scene.caption for scene in scenes]
    shown = [render_all(scenes, sampling.frames)]
    for adapter in lora if len(lora) > 1 else [None, *lora]:
        videos = sample_in_batches(load_adapted(model, adapter), prompts, sampling, seed)
        shown.append(torch.stack(videos))

    # A scene's clips side by side, two white pixels after each.
    cells = torch.cat([F.pad(clips, (0, 2), value=1.0) for clips in shown], -1)  # (N, F, 3, H, W)
    # The scenes in a grid: six more to the right and below, and white scenes that fill the last row.
    columns = 3 if len(shown) == 2 else 2
    cells = F.pad(cells, (0, 6, 0, 6, 0, 0, 0, 0, 0, -num % columns), value=1.0)
    grid = cells.unflatten(0, (-1, columns)).permute(2, 3, 0, 4, 1, 5)  # (F, 3, rows, H, columns, W)
    picture = grid.flatten(4).flatten(2, 3)  # (F, 3, rows * H, columns * W)
    pixels = as_bytes(picture).repeat(scale, 1).repeat(scale, 2)
    with written_whole(run / "compare.webp") as part:
        iio.imwrite(part, pixels, duration=1000 // sampling.fps, loop=0, quality=80)
    for number, prompt in enumerate(prompts, 1):
        print(f"{number}. {prompt}")
    print(run / "compare.webp")


# -------------------------------------------------------------------------------------------- the VAE, scored

def blocks(video):
    """A clip as the VAE's latents cut it: frame 0, then every four frames, in 8x8 squares. -> (N, 192), (M,
    768)"""
    def cut(part, frames):
        squares = part.unfold(0, frames, frames).unfold(2, 8, 8).unfold(3, 8, 8)  # (f, 3, h, w, frames, 8, 8)
        return squares.permute(0, 2, 3, 1, 4, 5, 6).flatten(3).flatten(0, 2)

    return cut(video[:1], 1), cut(video[1:], 4)


def pca_codec(clips, components):
    """Fits the best linear codec of the latents' shape. -> error(video): the sum of squared errors of its
    round trip."""
    bases = []
    for part in zip(*[blocks(clip) for clip in clips]):
        x = torch.cat(part).double()
        mean = x.mean(0)
        _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
        bases.append((mean, vectors[:, -components:]))

    def error(video):
        total = 0.0
        for part, (mean, V) in zip(blocks(video), bases):
            centred = part.double() - mean
            total += float((centred - centred @ V @ V.T).square().sum())
        return total

    return error


@torch.no_grad()
def score_vae(model, num):
    """PSNR of held-out clips through the VAE and through a PCA codec of the same latent shape, fitted to 128
    other clips of that split and length; prints a table."""
    vae = load_vae(model / "vae")
    print("| split | frames | clips | VAE, dB | PCA of the same shape, dB |\n|---|---|---|---|---|")
    for split, frames in itertools.product(("static", "dynamic"), (17, 33)):
        others = render_all(random_scenes("pca", split, 128), frames)
        true = render_all(random_scenes("held-out/score-vae", split, num), frames)
        bar = tqdm(true.split(1), desc=f"{split} {frames}", unit="clip")
        found = torch.cat([vae.decode(vae.encode(video)) for video in bar])
        codec = pca_codec(others, vae.config.z_dim)
        linear = sum(codec(video) for video in true) / true.numel()
        decibels = psnr(found, true, per_frame=False)
        print(f"| {split} | {frames} | {num} | {decibels:.2f} | {-10 * math.log10(linear):.2f} |", flush=True)
