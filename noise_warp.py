"""Noise transport: the prompt's camera moves the noise (World-R1, arXiv 2604.24764).

    words -> motions -> camera path E_f -> optical flow of a plane -> noise carried along the flow

    noise = latent_noise(camera_path(parse_motion(prompt), 81), 81, 60, 104, generator=g)    # for the DiT
    python noise_warp.py "push_in" --show     path, flow and noise frames as a picture

A video model keeps much of its initial noise's layout, so noise that already moves like the camera makes the video
do so. Every frame of it alone must stay white N(0, 1), or the model sees something it was never trained on; that is
what the density tracker is for (Go-with-the-Flow, arXiv 2501.08331).

Conventions: camera-to-world 4x4, OpenCV axes (x right, y down, z forward), frame 0 = identity, angles in
radians, distances in units of the assumed scene depth (the plane the camera looks at sits at z = 1).
Left out: flow estimated from videos, per-object motion; the flow here is a camera's over a plane, exact.
"""

import argparse
import math
import re
import sys
import warnings
from pathlib import Path

import torch

PUSH = 0.35  # push_in / pull_out travel along z, in scene depths
MOVE = 0.35  # move_left / move_right travel along x
PAN = math.radians(20)  # pan_left / pan_right turn about y
ORBIT = math.radians(30)  # orbit_left / orbit_right turn about the point at depth 1
FOV = math.radians(60)  # assumed horizontal field of view

MOTIONS = ("push_in", "pull_out", "move_left", "move_right", "orbit_left", "orbit_right",
           "pan_left", "pan_right", "pull_left", "pull_right", "fixed")

_MOTION = re.compile(r"\b(?:(push)(?:es|ing)?[\s_-]+(in)|(pull)(?:s|ing)?[\s_-]+(out|left|right)"
                     r"|(move|orbit|pan)(?:s|ing|ning)?[\s_-]+(left|right)|(moving)[\s_-]+(left|right))\b", re.I)
_LOOKALIKE = re.compile(r"\b(zoom(?:s|ing)?[\s_-]+(?:in|out)|dolly[\s_-]+\w+|tilt(?:s|ing)?[\s_-]+(?:up|down)"
                        r"|(?:pan|move|orbit|push|pull)[\s_-]+(?:up|down|forward|backward|back)"
                        r"|push[\s_-]+(?:out|left|right)|pull[\s_-]+in|roll[\s_-]+(?:left|right))\b", re.I)


def parse_motion(prompt):
    """The camera motions a prompt asks for, in order: "Camera push in, then pan left." -> ["push_in", "pan_left"].

    Spaces, hyphens, underscores, capitals and -s / -ing forms are read. A prompt with none is ["fixed"].
    A phrase that looks like a motion but is not one of the eleven ("zoom in") raises a warning that lists them.
    """
    motions = []
    for match in _MOTION.finditer(prompt):
        verb, direction = (g.lower() for g in match.groups() if g)
        motions.append(f"{'move' if verb == 'moving' else verb}_{direction}")
    sentences = prompt.split(".")  # only where the camera is spoken of: a scene's blind may well tilt down
    stray = _LOOKALIKE.search(". ".join([t for t in sentences if "camera" in t.lower()] or sentences[:1]))
    if stray:
        warnings.warn(f"'{stray.group()}' is not a camera motion here; the motions are {', '.join(MOTIONS)}", stacklevel=2)
    return motions or ["fixed"]


def _turn(angle):
    """(F,) angles about y (down) -> (F, 3, 3); a positive angle looks right."""
    c, s, o, l = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, o, s, o, l, o, -s, o, c], -1).view(-1, 3, 3)


def _segment(motion, s):
    """Pose of one motion at progress s (F,) in [0, amount] -> (F, 4, 4), identity at s = 0."""
    side = -1.0 if motion.endswith("left") else 1.0
    angle, x, z = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(s)
    if motion in ("push_in", "pull_out"):
        z = PUSH * s * (1 if motion == "push_in" else -1)
    elif motion.startswith("move"):
        x = MOVE * s * side
    elif motion.startswith("pan"):
        angle = PAN * s * side
    elif motion.startswith("orbit"):  # the camera goes left, so it turns right to keep the centre in view
        angle = -ORBIT * s * side
        x, z = -angle.sin(), 1 - angle.cos()  # c = p - R p with p = (0, 0, 1)
    elif motion.startswith("pull"):  # pull_left / pull_right: move + pull out + pan together, so half of move and pan
        x, z, angle = MOVE / 2 * s * side, -PUSH * s, PAN / 2 * s * side
    elif motion != "fixed":
        raise ValueError(f"unknown camera motion '{motion}'; the motions are {', '.join(MOTIONS)}")
    pose = torch.eye(4, dtype=s.dtype).repeat(len(s), 1, 1)
    pose[:, :3, :3] = _turn(angle)
    pose[:, 0, 3], pose[:, 2, 3] = x, z
    return pose


def camera_path(motions, frames, strength=1.0):
    """Camera-to-world path (F, 4, 4), float64, frame 0 = identity.

    | motion      | camera                              | the scene on screen    |
    |-------------|-------------------------------------|------------------------|
    | push_in     | forward along z                     | grows                  |
    | pull_out    | backward along z                    | shrinks                |
    | move_left   | left along x                        | moves right            |
    | pan_left    | turns left about y                  | moves right            |
    | orbit_left  | left around the point at depth 1    | centre stays, far moves left |
    | pull_left   | half move_left + pull_out + half pan_left, at once | shrinks, moves right |
    | fixed       | still                               | still                  |

    A sequence of n motions shares the frames and the travel: each runs for 1/n of the time with 1/n of its
    amount, in the frame the one before ended in. Every segment eases in and out (s = (1 - cos pi u)/2), so
    positions and velocities join without a jump.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    n = len(motions)
    time = torch.linspace(0, n, frames, dtype=torch.float64) if frames > 1 else torch.zeros(1, dtype=torch.float64)
    path = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    for i, motion in enumerate(motions):
        u = (time - i).clamp(0, 1)
        path = path @ _segment(motion, (1 - torch.cos(math.pi * u)) / 2 * strength / n)
    return path


# ----------------------------------------------------------------------------------------------------------- the flow

def path_flow(path, height, width, depth=1.0, fov=FOV):
    """Forward optical flow (F-1, 2, H, W) of a camera path (F, 4, 4), in pixels (dx, dy), previous -> next frame.

    The scene is one plane, z = depth in frame 0's axes, seen by a pinhole camera of horizontal field of view `fov`
    (radians); pixel centres at +.5. Exact for every pixel; a pixel that cannot be followed (its ray misses the
    plane, or the point falls behind the next camera) gets a flow that leaves the picture.
    """
    path = torch.as_tensor(path, dtype=torch.float64)
    focal = width / 2 / math.tan(fov / 2)
    x = (torch.arange(width, dtype=torch.float64) + .5 - width / 2) / focal
    y = (torch.arange(height, dtype=torch.float64) + .5 - height / 2) / focal
    rays = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.ones(height, width, dtype=torch.float64)])
    flows = []
    for here, there in zip(path, path[1:]):  # a frame at a time: in float64 all at once would take gigabytes
        world = torch.einsum("ij,jhw->ihw", here[:3, :3], rays)  # ray directions
        t = (depth - here[2, 3]) / world[2]
        point = here[:3, 3, None, None] + t * world - there[:3, 3, None, None]
        seen = torch.einsum("ji,jhw->ihw", there[:3, :3], point)  # in the next camera
        flow = (seen[:2] / seen[2:] - rays[:2]) * focal
        lost = (t <= 0) | (seen[2] <= 0) | ~flow.isfinite().all(0)
        flows.append(torch.where(lost, 4.0 * (height + width), flow).float())
    return torch.stack(flows) if flows else torch.empty(0, 2, height, width)


# ------------------------------------------------------------------------------------------------------ the transport

def draw(rows, samples, channels, generator, device):
    """White noise (rows, samples * channels). generator: one for all, or a list with one a sample: then no sample's
    noise depends on which others are drawn beside it."""
    if not isinstance(generator, (list, tuple)):
        return torch.randn(rows, samples * channels, generator=generator, device=device)
    return torch.cat([torch.randn(rows, channels, generator=g, device=device) for g in generator], 1)


def _frames(flow, samples, channels, generator):
    """Yields F noise frames (H*W, samples * channels), each the one before carried along `flow` (F-1, 2, H, W). See
    transport_noise."""
    _, _, H, W = flow.shape
    N, K = H * W, samples * channels
    device = flow.device
    if isinstance(generator, (list, tuple)) and len(generator) != samples:
        raise ValueError(f"{samples} samples need as many generators, got {len(generator)}")
    noise = draw(N, samples, channels, generator, device)
    yield noise
    grid = torch.stack(torch.meshgrid(torch.arange(W, device=device), torch.arange(H, device=device), indexing="xy")).flatten(1).float()
    offset, density = torch.zeros(2, N, device=device), torch.ones(N, device=device)

    def cells(position):  # (2, n) -> cell index, whether it lies inside
        x, y = position.round()
        inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
        return (y.clamp(0, H - 1) * W + x.clamp(0, W - 1)).long(), inside

    for step in flow.flatten(2).float():
        # Who goes where: every source cell forward; cells that receive nothing look back along the flow.
        position = grid + offset + step
        target, inside = cells(position)
        source = inside.nonzero().squeeze(1)
        target = target[source]
        residue = position[:, source] - grid[:, target]  # carried on, so that slow flow is not rounded away
        received = torch.zeros(N, dtype=torch.bool, device=device)
        received[target] = True
        hole = (~received).nonzero().squeeze(1)
        back, _ = cells(grid[:, hole] - step[:, hole])
        back, inside = cells(grid[:, hole] - step[:, hole] - offset[:, back])
        source, target = torch.cat([source, back[inside]]), torch.cat([target, hole[inside]])
        residue = torch.cat([residue, offset.new_zeros(2, int(inside.sum()))], 1)
        fresh = hole[~inside]

        copies = torch.bincount(source, minlength=N)
        share = density[source] / copies[source]  # one source's density is split among its copies
        total = torch.zeros(N, device=device).index_add_(0, target, share)
        square = torch.zeros(N, device=device).index_add_(0, target, share * share)
        crowd = torch.bincount(target, minlength=N)

        # Copies of one source become independent: value/sqrt(n) + zero-sum noise.
        split = (copies[source] > 1).nonzero().squeeze(1)
        values = noise.index_select(0, source)
        if len(split):
            owner = source[split]
            extra = draw(len(split), samples, channels, generator, device)
            mean = torch.zeros(N, K, device=device).index_add_(0, owner, extra)
            n = copies[owner].unsqueeze(1)
            values[split] = values[split] / n.sqrt() + extra - mean[owner] / n
        # Several values in one cell: their density-weighted sum, at unit variance.
        merge = (crowd[target] > 1).nonzero().squeeze(1)
        values[merge] *= (share[merge] / square[target[merge]].sqrt()).unsqueeze(1)
        noise = torch.zeros(N, K, device=device).index_add_(0, target, values)
        noise[fresh] = draw(len(fresh), samples, channels, generator, device)

        offset = torch.zeros(2, N, device=device).index_add_(1, target, residue * share) / total.clamp_min(1e-20)
        density = torch.where(crowd > 0, total, 1.0)
        density = (density / density.mean()).clamp(1e-3, 1e3)
        yield noise


def transport_noise(flow, channels, samples=1, generator=None):
    """Noise that moves with the picture: (samples, channels, F, H, W), every frame white N(0, 1).

    flow (F-1, 2, H, W): pixels (dx, dy), previous -> next. Go-with-the-Flow's transport (arXiv 2501.08331): values
    that meet in a cell are summed with weights w / sqrt(sum w^2), w their density (a cell that was stretched counts
    less); a value that is stretched over n cells becomes value/sqrt(n) + zero-sum noise in each; cells nothing
    reaches get fresh noise. Cells are followed by their index, so one index map a frame serves all channels and
    samples; sub-cell remainders are carried along. Zero flow returns the same noise, to the bit.
    """
    flow = torch.as_tensor(flow)
    if flow.dim() != 4 or flow.shape[1] != 2 or not flow.is_floating_point():
        raise ValueError(f"flow must be float (F-1, 2, H, W), got {str(flow.dtype)[6:]} {tuple(flow.shape)}")
    if not flow.isfinite().all():
        raise ValueError("flow has NaN or infinite values")
    H, W = flow.shape[2:]
    frames = [f.view(H, W, samples, channels) for f in _frames(flow, samples, channels, generator)]
    return torch.stack(frames).permute(3, 4, 0, 1, 2).contiguous()


def latent_noise(path, frames, height, width, samples=1, generator=None, channels=16, degradation=0.0, multiple=4):
    """Initial noise (samples, C, T, h, w) for the DiT, transported along a camera path (F, 4, 4) of `frames` frames.

    height, width: the latents'. The noise moves at `multiple` times that size along the flow between the frames that
    the latent frames end on (0, 4, 8, ...), then each multiple x multiple patch is averaged and rescaled to unit
    variance. degradation d in [0, 1] mixes in fresh noise, ((1-d) transported + d fresh) / sqrt((1-d)^2 + d^2), as in
    Go-with-the-Flow. generator: one, or a list with one a sample.
    """
    if len(path) != frames or frames % 4 != 1:
        raise ValueError(f"the path must have as many frames as the video, 4k+1; got {len(path)} poses for {frames} frames")
    if not 0 <= degradation <= 1:
        raise ValueError(f"degradation must be in [0, 1], got {degradation}")
    m = multiple
    flow = path_flow(path[::4], height * m, width * m)
    out = torch.empty(samples, channels, len(path[::4]), height, width)
    for f, noise in enumerate(_frames(flow, samples, channels, generator)):
        coarse = noise.view(height, m, width, m, samples, channels).mean((1, 3)) * m
        out[:, :, f] = coarse.permute(2, 3, 0, 1)
    if degradation:
        fresh = draw(out[0, 0].numel(), samples, channels, generator, "cpu").view(*out.shape[2:], samples, channels)
        out = ((1 - degradation) * out + degradation * fresh.permute(3, 4, 0, 1, 2)) / math.hypot(1 - degradation, degradation)
    return out


def released_push(base, transported, strength=.35, steps=8, kernel=9):
    """The way World-R1's released code uses the transported noise: sampling starts from the white `base`, and after
    each of the first steps the low-passed difference is pushed in. -> push(x, step) for `sample(..., after_step=)`.

    delta = blur_kernel(transported - base) / its std;  x <- x + strength w_i std(x) delta, then back to the mean and
    std that x had; w falls linearly from 1 to .1 and sums to 1. All statistics are per sample.
    """
    if base.shape != transported.shape or base.dim() != 5:
        raise ValueError(f"base and transported noise must both be (B, C, T, h, w), got {tuple(base.shape)} and {tuple(transported.shape)}")
    delta = torch.nn.functional.avg_pool2d((transported - base).flatten(0, 2)[:, None], kernel, 1, kernel // 2).view_as(base)
    weights = torch.linspace(1, .1, steps)

    def statistics(x):
        return x.mean((1, 2, 3, 4), keepdim=True), x.std((1, 2, 3, 4), keepdim=True)

    delta, weights = delta / (statistics(delta)[1] + 1e-6), weights / weights.sum()

    def push(x, step):
        if step >= steps:
            return x
        mean, std = statistics(x)
        y = x + strength * float(weights[step]) * std * delta.to(x)
        new_mean, new_std = statistics(y)
        return (y - new_mean) / (new_std + 1e-6) * std + mean

    return push


# ----------------------------------------------------------------------------------------------------------- a picture

def show(motions, path, frames=17, size=256):
    """Writes a PNG: the path from above, flow arrows of the first, middle and last step (each
    scaled to its longest), and noise frames in a row."""
    import imageio.v3 as iio
    poses = camera_path(motions, frames)
    flow = path_flow(poses, size, size)

    def canvas():
        return torch.ones(size, size, 3)

    def line(image, a, b, colour, width=1.5):
        """Paints pixels within `width` of the segment a-b (x, y)."""
        y, x = torch.meshgrid(torch.arange(size) + .5, torch.arange(size) + .5, indexing="ij")
        (ax, ay), (bx, by) = a, b
        length = max((bx - ax) ** 2 + (by - ay) ** 2, 1e-9)
        u = (((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length).clamp(0, 1)
        near = (x - ax - u * (bx - ax)) ** 2 + (y - ay - u * (by - ay)) ** 2 < width ** 2
        image[near] = torch.tensor(colour)

    top = canvas()  # x to the right, z up; the plane at z = 1 as a grey line; the camera's gaze every fourth frame
    place = lambda x, z: (float(size * (.5 + x * .45)), float(size * (.8 - z * .6)))  # noqa: E731
    line(top, place(-1, 1), place(1, 1), (.7, .7, .7))
    for f, pose in enumerate(poses):
        here = place(pose[0, 3], pose[2, 3])
        line(top, here, here, (.1, .3, .9), 3.0)
        if f % 4 == 0:
            line(top, here, place(pose[0, 3] + .2 * pose[0, 2], pose[2, 3] + .2 * pose[2, 2]), (.9, .3, .1), 1.0)
    panels = [top]
    for f in (0, (frames - 1) // 2, frames - 2):
        arrows, longest = canvas(), max(float(flow[f].abs().max()), 1e-9)
        for y in range(size // 16, size, size // 8):
            for x in range(size // 16, size, size // 8):
                dx, dy = flow[f, :, y, x].tolist()
                line(arrows, (x, y), (x, y), (.1, .1, .1), 2.5)
                line(arrows, (x, y), (x + 24 * dx / longest, y + 24 * dy / longest), (.1, .5, .2))
        panels.append(arrows)
    noise = transport_noise(path_flow(poses, 64, 64), 3, generator=torch.Generator().manual_seed(0))[0]  # (3, F, H, W)
    for f in torch.linspace(0, frames - 1, 4).round().long():
        panels.append((noise[:, f].permute(1, 2, 0) / 5 + .5).clamp(0, 1).repeat_interleave(4, 0).repeat_interleave(4, 1))
    sheet = torch.cat([torch.cat(panels[:4], 1), torch.cat(panels[4:], 1)])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, (sheet * 255).round().byte().numpy())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="a prompt, or motions such as push_in")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--show", nargs="?", const="out/noise_warp.png", metavar="PNG", help="write the picture")
    a = parser.parse_args(argv)
    motions = parse_motion(a.prompt)
    print("motions:", ", ".join(motions))
    print("last pose:", *camera_path(motions, a.frames)[-1].tolist(), sep="\n")
    if a.show:
        show(motions, a.show, a.frames)
        print(a.show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
