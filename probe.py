"""The tiny world's judges, none of them a reward: does a clip show what its prompt asks, and could a rigid room look so?

    python tiny_world.py probe --num 200                     the shipped model on 200 unseen prompts
    python tiny_world.py probe --num 200 --rendered          the renderer's own clips: how far the readings can be trusted
    python tiny_world.py probe --guidance 1 2 3 --steps 10 20    one row for every combination
    python tiny_world.py train-probe --minutes 20            how the classifier was made -> RUN/probe

The probe is a small 3D convolutional classifier, trained on fresh renders (some blurred or noisy, for samples are not
renders), with a softmax for each of: the wall's colour, the floor's colour, each palette colour's object (none, sphere,
box, cylinder), and the camera motion of the first and of the second half of the clip. `reprojection` needs no training:
it asks how well one rigid scene, seen from the cameras the prompt asks for, explains the clip. Training a policy on the
rewards must not make these readings worse.
"""

import itertools
import math
import random
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from lora import merge_lora
from model import load_vae, load_wan
from noise_warp import MOTIONS, camera_path, parse_motion
from sample import contact_sheet, model_defaults
from tiny_world import COLOURS, SHAPES, degrade, intrinsics, random_scene, render, sample_prompts, unseen_scenes

NAMES, FORMS = list(COLOURS), ("none", *SHAPES)
HEADS = {"wall": len(NAMES), "floor": len(NAMES), **{f"{c} object": len(FORMS) for c in NAMES}, "first motion": len(MOTIONS), "second motion": len(MOTIONS)}


class Probe(nn.Module):
    """Videos (B, F, 3, 64, 64) in [0, 1] -> {head: logits (B, classes)}.

    Two branches: 3D convolutions over the clip at half resolution and below, which see motion (48 linear channels keep the
    file small); and 2D convolutions over five frames from full resolution on, whose spatial maxima tell a box from a cylinder wherever it stands.
    """

    def __init__(self, width=24):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv3d(3, w, (1, 5, 5), (1, 2, 2), (0, 2, 2)), nn.ReLU(), nn.Conv3d(w, 2 * w, 3, (2, 2, 2), 1), nn.GroupNorm(4, 2 * w), nn.ReLU(),
            nn.Conv3d(2 * w, 3 * w, 3, (2, 2, 2), 1), nn.GroupNorm(4, 3 * w), nn.ReLU(), nn.Conv3d(3 * w, 4 * w, 3, 1, 1), nn.GroupNorm(4, 4 * w), nn.ReLU(),
            nn.AdaptiveAvgPool3d((4, 4, 4)), nn.Flatten(), nn.Linear(4 * w * 64, 48, bias=False), nn.Linear(48, 192), nn.ReLU())
        self.frames = nn.Sequential(
            nn.Conv2d(3, w, 3, 1, 1), nn.ReLU(), nn.Conv2d(w, 2 * w, 3, 2, 1), nn.GroupNorm(4, 2 * w), nn.ReLU(),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.GroupNorm(4, 4 * w), nn.ReLU(), nn.Conv2d(4 * w, 6 * w, 3, 1, 1), nn.GroupNorm(4, 6 * w), nn.ReLU(),
            nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.out = nn.Linear(192 + 6 * w, sum(HEADS.values()))
        self.body.to(memory_format=torch.channels_last_3d), self.frames.to(memory_format=torch.channels_last)

    def forward(self, video):
        x = (video - .5) * 2
        clip = self.body(x.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d))
        five = x[:, torch.linspace(0, x.shape[1] - 1, 5).round().long()]
        seen = self.frames(five.flatten(0, 1).contiguous(memory_format=torch.channels_last)).unflatten(0, five.shape[:2]).mean(1)
        return dict(zip(HEADS, self.out(torch.cat([clip, seen], 1)).split(list(HEADS.values()), -1)))


def labels(wall, floor, objects, motions):
    """What a clip should read as: {head: class index}. objects: {colour: shape}."""
    out = {"wall": NAMES.index(wall), "floor": NAMES.index(floor), "first motion": MOTIONS.index(motions[0]), "second motion": MOTIONS.index(motions[-1])}
    return out | {f"{c} object": FORMS.index(objects.get(c, "none")) for c in NAMES}


def asked(prompt):
    """The labels that a tiny-world caption asks for; ValueError where it names no wall, floor or object."""
    text, palette, shape = prompt.lower(), "|".join(NAMES), "|".join(SHAPES)
    wall = re.search(rf"({palette}) walls?", text)
    floor = re.search(rf"({palette}) (?:checkered )?floor", text)
    objects = dict(re.findall(rf"({palette}) ({shape})", text))
    if not (wall and floor and objects):
        raise ValueError(f"the probe cannot read what this prompt asks for: '{prompt}'; it needs wall and floor colours and an object")
    return labels(wall[1], floor[1], objects, parse_motion(prompt))


@torch.no_grad()
def read(probe, videos):
    """Videos (F, 3, 64, 64) -> [{head: class index}], one a video; of a longer one, 17 frames evenly spread, as the probe was trained."""
    logits = [probe(v[torch.linspace(0, len(v) - 1, 17).round().long()][None]) for v in videos]
    return [{head: int(x[head].argmax()) for head in HEADS} for x in logits]


def scores(readings, prompts):
    """-> {wall, floor, objects, motion, all: list of bools}. objects: every object asked for has its colour and shape, and
    no other is seen. motion: both halves."""
    rows = []
    for found, want in zip(readings, map(asked, prompts), strict=True):
        right = {h: found[h] == want[h] for h in HEADS}
        row = dict(wall=right["wall"], floor=right["floor"], objects=all(right[f"{c} object"] for c in NAMES),
                   motion=right["first motion"] and right["second motion"])
        rows.append(row | dict(all=all(row.values())))
    return {name: [row[name] for row in rows] for name in rows[0]}


def load_probe(folder):
    file = folder / "probe.safetensors"
    if not file.exists():
        raise ValueError(f"no probe in {folder}; train it: python tiny_world.py train-probe")
    probe = Probe()
    probe.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return probe.eval()


def example(rng, split, seed, index):
    """A clip and its labels: a third as rendered, the rest blurred or noisy a little."""
    scene = random_scene(seed, split, index)
    video = render(scene)["video"]
    draw = rng.random()
    if draw < .67:
        generator = torch.Generator().manual_seed(index)
        kind, strength = ("blur", .35 * rng.random()) if draw < .4 else ("noise", .4 * rng.random())
        video = torch.stack([degrade(f, kind, strength, generator) for f in video])
    return video, labels(scene.wall, scene.floor, {o.colour: o.shape for o in scene.objects}, scene.motions)


def train_probe(run, minutes, seed=0, batch=24):
    """Cross-entropy of all heads, on clips of the static split (three in four) and the dynamic one."""
    from tiny_train import fit
    torch.manual_seed(seed)
    probe = Probe()

    def losses(step, progress):
        rng = random.Random(f"probe/{seed}/{step}")
        clips, want = zip(*[example(rng, rng.choice(("static", "static", "static", "dynamic")), f"probe/{seed}", step * batch + i) for i in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            logits = probe(torch.stack(clips))
        parts = {h: F.cross_entropy(x.float(), torch.tensor([w[h] for w in want])) for h, x in logits.items()}
        yield sum(parts.values()), {f"{h.replace(' ', '_')}_loss": v.item() for h, v in parts.items() if "object" not in h}

    def report():
        return {k: sum(v) / len(v) for k, v in on_renders(probe, 128).items()}

    fit(run / "probe", minutes, probe, losses, report, lr=1e-3)


def on_renders(probe, num):
    """Scores of held-out renders of the static split."""
    probe.eval()
    scenes = [random_scene("held-out/probe", "static", i) for i in range(num)]
    found = read(probe, [render(s)["video"] for s in scenes])
    probe.train()
    return scores(found, [s.caption for s in scenes])


def export_probe(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "probe" / "state.pt", weights_only=True)["ema"]
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}, folder / "probe.safetensors")


def reprojection(video, poses, gap=1, depths=48, window=5):
    """How far a clip (F, 3, H, W) is from any rigid scene filmed from `poses` (F, 4, 4): 0 is perfect, in colour units.

    Plane sweep: every pixel of every second frame t is looked up in frame t + gap at each of `depths` inverse depths (.3
    to 6 scene units), the colour differences are averaged over a window x window square, and the best depth counts. Mean
    over pixels and pairs; pixels no depth keeps in view are left out. Even a render is above 0: edges, what is hidden.
    """
    F_, _, H, W = video.shape
    K = intrinsics(H, W)
    v, u = torch.meshgrid(torch.arange(H) + .5, torch.arange(W) + .5, indexing="ij")
    rays = torch.linalg.inv(K) @ torch.stack([u, v, torch.ones_like(u)]).flatten(1)  # (3, N)
    z = 1 / torch.linspace(1 / 6, 1 / .3, depths)
    total = count = 0.0
    for t in range(0, F_ - gap, 2):
        move = (torch.linalg.inv(poses[t + gap].double()) @ poses[t].double()).float()  # camera t -> camera t + gap
        x = K @ (z.view(-1, 1, 1) * (move[:3, :3] @ rays) + move[:3, 3:])  # (D, 3, N)
        ndc = (x[:, :2] / x[:, 2:].clamp_min(1e-6) * torch.tensor([2 / W, 2 / H]).view(2, 1) - 1).mT.view(depths, H, W, 2)
        seen = ((ndc.abs() <= 1).all(-1) & (x[:, 2] > 1e-6).view(depths, H, W)).float()
        there = F.grid_sample(video[t + gap].expand(depths, -1, -1, -1), ndc, align_corners=False, padding_mode="border")
        difference = (there - video[t]).abs().mean(1) * seen
        cost, share = (F.avg_pool2d(a[:, None], window, 1, window // 2)[:, 0] for a in (difference, seen))
        best = torch.where((seen > 0) & (share > .5), cost / share.clamp_min(1e-6), torch.inf).amin(0)
        total, count = total + float(best[best.isfinite()].sum()), count + int(best.isfinite().sum())
    return total / count


def wilson(right, z=1.96):
    """Share of True and its 95 % interval -> "p [low, high]"."""
    n, p = len(right), sum(right) / len(right)
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** .5 / (1 + z * z / n)
    return f"{p:.3f} [{middle - half:.3f}, {middle + half:.3f}]"


def row(name, videos, prompts, judge):
    """Prints one line of the table: the probe's shares, and the mean re-projection error of neighbours and at 4 frames' gap."""
    found = scores(read(judge, videos), prompts)
    paths = [camera_path(parse_motion(p), len(v)) for p, v in zip(prompts, videos)]
    errors = [sum(reprojection(v, path, gap) for v, path in zip(videos, paths)) / len(videos) for gap in (1, 4)]
    print(f"| {name} | " + " | ".join(wilson(x) for x in found.values()) + f" | {errors[0]:.4f} | {errors[1]:.4f} |", flush=True)


HEADER = "| | wall | floor | objects | motion | all | re-projection, 1 frame | 4 frames |\n|---|---|---|---|---|---|---|---|"


def command(a):
    """`tiny_world.py probe`: samples a model for every combination of the given settings, and prints a row each."""
    judge = load_probe(Path(__file__).parent / "tiny" / "probe" if a.probe is None else a.probe)
    if a.prompts:
        from train import load_prompts
        prompts = load_prompts(a.prompts)["test"][:a.num]
    else:
        scenes = unseen_scenes(a.num, a.seed)
        prompts = [s.caption for s in scenes]
    for p in prompts:
        asked(p)  # an unreadable prompt is an error before any sampling
    if a.rendered:
        if a.prompts:
            raise ValueError("--rendered scores the unseen scenes' own clips; drop --prompts")
        print(HEADER)
        return row("rendered", [render(s, a.frames or 17)["video"] for s in tqdm(scenes, desc="render", unit="clip")], prompts, judge)
    defaults = model_defaults(a.model)
    defaults["frames"] = a.frames or defaults["frames"]
    settings = {k: v for k, v in dict(lora=a.lora, steps=a.steps, guidance=a.guidance, shift=a.shift, strength=a.strength, degradation=a.degradation).items() if v}
    print(HEADER)
    for values in itertools.product(*settings.values()):
        given = dict(zip(settings, values))
        wan = adapted(a.model, given.get("lora"))
        noise = dict(transport=a.transport, strength=given.get("strength", 1.0), degradation=given.get("degradation", defaults["degradation"]))
        videos = sample_prompts(wan, defaults | given, prompts, a.seed, **noise)
        row(", ".join(f"{k} {v}" if k == "lora" else f"{k} {v:g}" for k, v in given.items()) or ("defaults" if a.transport else "plain noise"), videos, prompts, judge)
    contact_sheet(a.run / "probe.png", videos[:20])
    print("", *prompts[:20], a.run / "probe.png", sep="\n")


def adapted(model, lora=None):
    """-> the model, with a LoRA merged if one is given."""
    wan = load_wan(model)
    if lora:
        merge_lora(wan.dit, lora)
    return wan


def compare(a, scale=2):
    """`tiny_world.py compare`: an animated picture of unseen scenes, each clip as rendered beside its prompt's sample, or, with
    --lora, beside a sample of each of those adapters from the same noise; of the model alone too where one is given.

    The first --num unseen scenes and the seed's first noise, nothing picked; the prompts are printed in reading order.
    """
    import imageio.v3 as iio
    defaults = model_defaults(a.model)
    defaults["frames"] = a.frames or defaults["frames"]
    scenes, loras = unseen_scenes(a.num, a.seed), a.lora or []
    shown = [[render(s, defaults["frames"])["video"] for s in scenes]]
    for lora in loras if len(loras) > 1 else [None, *loras]:
        shown.append(sample_prompts(adapted(a.model, lora), defaults, [s.caption for s in scenes], a.seed, degradation=defaults["degradation"]))
    rows, columns = [torch.cat([F.pad(x, (0, 2), value=1.0) for x in clips], 3) for clips in zip(*shown)], 3 if len(shown) == 2 else 2
    rows += [torch.ones_like(rows[0])] * (-len(rows) % columns)
    sheet = torch.cat([torch.cat([F.pad(x, (0, 6, 0, 6), value=1.0) for x in rows[i:i + columns]], 3) for i in range(0, len(rows), columns)], 2)
    frames = (sheet.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    file = a.run / "compare.webp"
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, frames.numpy(), duration=1000 // defaults["fps"], loop=0, quality=80)
    print(*[f"{i}. {s.caption}" for i, s in enumerate(scenes, 1)], file, sep="\n")


# ------------------------------------------------------------------------------------------------------- the VAE, scored

def blocks(video):
    """A clip as the VAE's latents cut it: frame 0, then every four frames, in 8x8 squares. -> (N, 192), (M, 768)"""
    cut = lambda x, t: x.unfold(0, t, t).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5, 6).flatten(3).flatten(0, 2)  # noqa: E731
    return cut(video[:1], 1), cut(video[1:], 4)


def pca_codec(clips, components):
    """Fits the best linear codec of the latents' shape. -> error(video): the sum of squared errors of its round trip."""
    bases = []
    for part in zip(*[blocks(c) for c in clips]):
        x = torch.cat(part).double()
        mean = x.mean(0)
        bases.append((mean, torch.linalg.eigh((x - mean).T @ (x - mean))[1][:, -components:]))

    def error(video):
        return sum(float(((x - mean) - (x - mean) @ V @ V.T).square().sum()) for x, (mean, V) in zip([b.double() for b in blocks(video)], bases))

    return error


@torch.no_grad()
def score_vae(a):
    """`tiny_world.py score-vae`: PSNR of held-out clips through the VAE and through a PCA codec of the same latent shape,
    fitted to 128 other clips of that split and length."""
    from tiny_train import psnr
    vae = load_vae(Path(a.model) / "vae")
    print("| split | frames | clips | VAE, dB | PCA of the same shape, dB |\n|---|---|---|---|---|")
    for split, frames in itertools.product(("static", "dynamic"), (17, 33)):
        codec = pca_codec([render(random_scene("pca", split, i), frames)["video"] for i in range(128)], vae.config.z_dim)
        true = [render(random_scene("held-out/score-vae", split, i), frames)["video"] for i in range(a.num)]
        found = [vae.decode(vae.encode(v[None]))[0] for v in tqdm(true, desc=f"{split} {frames}", unit="clip")]
        linear = -10 * math.log10(sum(codec(v) for v in true) / sum(v.numel() for v in true))
        print(f"| {split} | {frames} | {len(true)} | {psnr(torch.stack(found), torch.stack(true)):.2f} | {linear:.2f} |", flush=True)
