"""The probe: reads off a tiny-world clip what a prompt asks for, and so scores a video model against its prompts.

    python tiny_world.py probe --num 200                     the shipped model on 200 unseen prompts
    python tiny_world.py probe --num 200 --rendered          the renderer's own clips: how far the readings can be trusted
    python tiny_world.py train-probe --minutes 20            how it was made -> RUN/probe

A small 3D convolutional classifier, trained on fresh renders (some blurred or noisy, for samples are not renders), with
a softmax for each of: the wall's colour, the floor's colour, each palette colour's object (none, sphere, box, cylinder),
and the camera motion of the first and of the second half of the clip. It is a judge outside the rewards: training a
policy on the rewards must not make these readings worse.
"""

import random
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from noise_warp import MOTIONS, parse_motion
from tiny_world import COLOURS, SHAPES, degrade, random_scene, render

NAMES, FORMS = list(COLOURS), ("none", *SHAPES)
HEADS = {"wall": len(NAMES), "floor": len(NAMES), **{f"{c} object": len(FORMS) for c in NAMES}, "first motion": len(MOTIONS), "second motion": len(MOTIONS)}


class Probe(nn.Module):
    """Videos (B, F, 3, 64, 64) in [0, 1] -> {head: logits (B, classes)}."""

    def __init__(self, width=24):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv3d(3, w, (1, 5, 5), (1, 2, 2), (0, 2, 2)), nn.ReLU(), nn.Conv3d(w, 2 * w, 3, (2, 2, 2), 1), nn.GroupNorm(4, 2 * w), nn.ReLU(),
            nn.Conv3d(2 * w, 3 * w, 3, (2, 2, 2), 1), nn.GroupNorm(4, 3 * w), nn.ReLU(), nn.Conv3d(3 * w, 4 * w, 3, 1, 1), nn.GroupNorm(4, 4 * w), nn.ReLU(),
            nn.AdaptiveAvgPool3d((4, 4, 4)), nn.Flatten(), nn.Linear(4 * w * 64, 192), nn.ReLU())
        self.out = nn.Linear(192, sum(HEADS.values()))

    def forward(self, video):
        x = (video.transpose(1, 2) - .5) * 2
        parts = self.out(self.body(x.contiguous(memory_format=torch.channels_last_3d))).split(list(HEADS.values()), -1)
        return dict(zip(HEADS, parts))


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
    """Videos -> [{head: class index}], one a video."""
    logits = [probe(v[None]) for v in videos]
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
    probe = Probe().to(memory_format=torch.channels_last_3d)

    def losses(step, progress):
        rng = random.Random(f"probe/{seed}/{step}")
        clips, want = zip(*[example(rng, rng.choice(("static", "static", "static", "dynamic")), f"probe/{seed}", step * batch + i) for i in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            logits = probe(torch.stack(clips))
        parts = {h: F.cross_entropy(x.float(), torch.tensor([w[h] for w in want])) for h, x in logits.items()}
        yield sum(parts.values()), {h.replace(" ", "_"): v.item() for h, v in parts.items() if "object" not in h}

    def report():
        return {k: sum(v) / len(v) for k, v in on_renders(probe, 128).items()}

    fit(run / "probe", minutes, probe, losses, report, lr=1e-3)


def on_renders(probe, num, seed=0, progress=False):
    """Scores of held-out renders of the static split."""
    probe.eval()
    scenes = [random_scene(f"held-out/probe/{seed}", "static", i) for i in range(num)]
    found = [read(probe, [render(s)["video"]])[0] for s in tqdm(scenes, disable=not progress, desc="probe", unit="clip")]
    probe.train()
    return scores(found, [s.caption for s in scenes])


def export_probe(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "probe" / "state.pt", weights_only=True)["ema"]
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}, folder / "probe.safetensors")


def table(result):
    """Prints one line a reading: right of all, share and its 95 % Wilson interval."""
    for name, right in result.items():
        n, p, z = len(right), sum(right) / len(right), 1.96
        middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** .5 / (1 + z * z / n)
        print(f"{name:8} {sum(right):4} of {n}  {p:.3f} [{middle - half:.3f}, {middle + half:.3f}]")
