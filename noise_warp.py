"""Noise transport: the prompt's camera moves the noise (World-R1, arXiv 2604.24764).

    words -> motions -> camera path E_f -> optical flow of a plane -> noise carried along the flow

    noise = latent_noise(camera_path(parse_motion(prompt), 81), 81, 60, 104, generator=g)    # for the DiT
    python noise_warp.py "push_in" --show     path, flow and noise frames as a picture

A video model keeps much of its initial noise's layout, so noise that already moves like the camera nudges the
video to do the same. Each frame of it by itself must stay white N(0, 1), or the model sees something it was
never trained on: so what merges is scaled to unit variance, and what is split gets zero-sum noise. The
density tracker only chooses the weights of a merge (Go-with-the-Flow, arXiv 2501.08331).

Conventions: camera-to-world 4x4, OpenCV axes (x right, y down, z forward), frame 0 = identity, angles in
radians, distances in units of the assumed scene depth (the plane the camera looks at sits at z = 1).
Left out: flow estimated from videos, per-object motion; the flow here is a camera's over a plane, exact.
"""

import math
import re
import sys
import unicodedata
import warnings

import torch
import torch.nn.functional as F

from prompts import usable_prompt
from weights import as_command, command_line, written_whole

PUSH = 0.35  # push_in / pull_out travel along z, in scene depths
MOVE = 0.35  # move_left / move_right travel along x
PAN = math.radians(20)  # pan_left / pan_right turn about y
ORBIT = math.radians(30)  # orbit_left / orbit_right turn about the point at depth 1
FOV = math.radians(60)  # assumed horizontal field of view, of every frame: no motion zooms

# A further word also needs a pattern in _MOTION, whose two groups make its name (verb, direction), a line in
# _TRAVEL, and a branch in _segment if it is more than a move along x and z and a turn about y
# (docs/exercises.md, 9). The shipped prompts and twins know these eleven.
MOTIONS = ("push_in", "pull_out", "move_left", "move_right", "orbit_left", "orbit_right",
           "pan_left", "pan_right", "pull_left", "pull_right", "fixed")


# -------------------------------------------------------------------------------------------------- the words

# The prompt says how the camera moves, in eleven words and their everyday forms. What only sounds like one of
# them would silently be a camera that stands still, so it is warned of.

_GAP = r"[\s_\u2010-\u2015-]+"  # a space, an underscore, any hyphen or dash
_MOTION = re.compile(rf"""\b(?:
    (push)(?:es|ing)?{_GAP}(in) |
    (pull)(?:s|ing)?{_GAP}(out|left|right) |
    (move|orbit|pan)(?:s|ing|ning)?{_GAP}(left|right) |
    (moving){_GAP}(left|right))\b""", re.IGNORECASE | re.VERBOSE)
_LOOKALIKE = re.compile(rf"""\b(?:
    doll(?:y|ies|ying){_GAP}\w+ |
    (?:(?:push|pull|mov|orbit|zoom|tilt|roll|rotat)(?:e?s?|ed|ing) | pan(?:s|ned|ning)?){_GAP}
    (?:(?:[a-z]+ly|around|to|the){_GAP})*
    (?:left|right|in|out|(?:up|down|back)(?:wards?)?|forwards?))\b""", re.IGNORECASE | re.VERBOSE)


def parse_motion(prompt):
    """The camera motions of a prompt, in order: "Camera push in, then pan left." -> ["push_in", "pan_left"].

    Spaces, hyphens, underscores, capitals and -s / -ing forms are read. A prompt with none is ["fixed"]. A
    phrase that looks like a motion but is not one of the eleven ("zoom in") raises a warning that lists them.
    """
    prompt = unicodedata.normalize("NFKC", prompt)  # full-width letters are letters
    motions = []
    for match in _MOTION.finditer(prompt):
        verb, direction = (word.lower() for word in match.groups() if word)
        if verb == "moving":
            verb = "move"
        motions.append(f"{verb}_{direction}")

    # A motion is the camera's even in a sentence that does not name it ("dancers move left"); warn if another
    # sentence does.
    sentences = prompt.split(".")
    of_camera = [sentence for sentence in sentences if "camera" in sentence.lower()]
    others = [sentence for sentence in sentences if sentence not in of_camera]
    elsewhere = _MOTION.search(". ".join(others))  # the first one: no motion reaches over a full stop
    if of_camera and elsewhere:
        words = " ".join(word for word in elsewhere.groups() if word)
        warnings.warn(f"'{words}' is taken for a camera motion, though its sentence does not name the "
                      "camera; say it otherwise if the scene moves", stacklevel=2)
    # Near misses ("zoom in") are looked for only where the camera is spoken of, else in the first sentence: a
    # scene's blind may well tilt down. The motions that were read are taken out before.
    spoken = ". ".join(of_camera or sentences[:1])
    stray = _LOOKALIKE.search(_MOTION.sub(",", spoken))
    if stray:
        warnings.warn(f"'{stray.group()}' is not a camera motion here; the motions are {', '.join(MOTIONS)}",
                      stacklevel=2)
    return motions or ["fixed"]


# --------------------------------------------------------------------------------------------------- the path

# Each word is a rigid motion of the camera, and each motion starts in the frame the one before it ended in.
# The path is the product of their small steps (paper, eq. 5), E_f camera-to-world:
#     E_0 = I,    E_f = E_{f-1} T_action
# Written in closed form here: E_f = S_1 S_2 ..., where S_i is motion i as far as it has come by frame f: the
# identity before it begins, its whole travel once it is over.

# A motion's whole travel: x, z and the angle about y (positive looks right). Left mirrors right. Of an orbit
# the angle alone: x and z follow from it.
_TRAVEL = {
    "push_in": (0, PUSH, 0),
    "pull_out": (0, -PUSH, 0),
    "move_right": (MOVE, 0, 0),
    "orbit_right": (0, 0, -ORBIT),  # the camera goes right, so it turns left to keep the centre in view
    "pan_right": (0, 0, PAN),
    "pull_right": (MOVE / 2, -PUSH, PAN / 2),  # all three at once, so half of move and pan
    "fixed": (0, 0, 0),
}


def _segment(motion, amount):
    """Poses (F, 4, 4) of one motion, at amounts (F,) of its whole travel; 0 is the identity."""
    if motion not in MOTIONS:
        raise ValueError(f"unknown camera motion '{motion}'; the motions are {', '.join(MOTIONS)}")
    x, z, angle = (whole * amount for whole in _TRAVEL[motion.replace("left", "right")])
    if motion.endswith("left"):
        x = -x
        angle = -angle
    cos, sin = angle.cos(), angle.sin()
    if motion.startswith("orbit"):  # (x, 0, z) = p - R p with p = (0, 0, 1), the point it turns about
        x = -sin
        z = 1 - cos
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    poses = torch.stack([
        cos, zero, sin, x,
        zero, one, zero, zero,
        -sin, zero, cos, z,
        zero, zero, zero, one], -1)
    return poses.view(-1, 4, 4)


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
    time = torch.linspace(0, len(motions), frames, dtype=torch.float64)  # in motions
    path = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    for i, motion in enumerate(motions):
        u = (time - i).clamp(0, 1)
        eased = (1 - torch.cos(math.pi * u)) / 2
        path = path @ _segment(motion, eased * strength / len(motions))
    return path


def relative_to_first(path):
    """Camera-to-world poses (F, 4, 4) in any world axes -> in their first camera's; float64, on the CPU."""
    path = path.double().cpu()
    return torch.linalg.inv(path[:1]) @ path


def rotation_angle(A, B):
    """The angle in radians, in [0, pi], between rotation matrices A and B (..., 3, 3).

    By the chord |A - B| = sqrt(8) sin(angle / 2): unlike the trace's arc cosine, exact for small angles too.
    """
    chord = (A - B).flatten(-2).norm(dim=-1) / math.sqrt(8)
    return 2 * chord.clamp(max=1).asin()


# --------------------------------------------------------------------------------------------------- the flow

# The scene is not known before it is made, so it is one plane at depth 1; by its homography the cameras tell
# each pixel's way (paper, eq. 6; the release sets it anew at depth 1 of every camera: push and orbit differ):
#     flow(p) = project(E_{f+1}^-1 X) - p,    X the point where pixel p's ray from camera E_f meets the plane

def path_flow(path, height, width, depth=1.0, fov=FOV):
    """Optical flow (F-1, 2, H, W) of a camera path (F, 4, 4), in pixels (dx, dy), previous -> next frame.

    The scene is one plane, z = depth in frame 0's axes, seen by a pinhole camera of horizontal field of view
    `fov` (radians); pixel centres at +.5. Exact for every pixel; a pixel that cannot be followed (its ray
    misses the plane, or the point falls behind the next camera) gets a flow that leaves the picture.
    """
    path = torch.as_tensor(path, dtype=torch.float64)
    focal = width / 2 / math.tan(fov / 2)
    x = (torch.arange(width, dtype=torch.float64) + .5 - width / 2) / focal
    y = (torch.arange(height, dtype=torch.float64) + .5 - height / 2) / focal
    x, y = torch.meshgrid(x, y, indexing="xy")
    rays = torch.stack([x, y, torch.ones_like(x)])  # (3, H, W), each pixel's direction in its camera

    flow = torch.empty(len(path) - 1, 2, height, width)
    for f in range(len(path) - 1):  # a frame at a time: in float64 all at once would take gigabytes
        R, t = path[f, :3, :3], path[f, :3, 3, None, None]
        next_R, next_t = path[f + 1, :3, :3], path[f + 1, :3, 3, None, None]
        # Each pixel's ray in world axes (R r), the point X where it meets the plane, that point in the next
        # camera's axes (R^T (X - t)), and how far it is seen to move there.
        direction = torch.einsum("ij,jhw->ihw", R, rays)
        distance = (depth - t[2]) / direction[2]
        point = t + distance * direction
        seen = torch.einsum("ji,jhw->ihw", next_R, point - next_t)
        moved = (seen[:2] / seen[2:] - rays[:2]) * focal
        lost = (distance <= 0) | (seen[2] <= 0) | ~moved.isfinite().all(0)
        flow[f] = torch.where(lost, 4.0 * (height + width), moved)
    return flow


# ---------------------------------------------------------------------------------------------- the transport

# Frame 0's noise is carried along the flow as pairs p = (cell v -> cell v'). Where the picture shrinks,
# several pairs reach one v': their weighted sum is scaled to unit variance (`_merge`). Where it grows, holes
# are left, and each copies the v that its flow comes from (`_pairs`); so one v has n pairs. n equal copies
# would be correlated, so they get noise that sums to zero (`_split`). A hole whose flow comes from outside
# the picture gets fresh noise. So every frame is white, whatever the weights s_p are:
#     z'(v') = sum_p s_p z_p / sqrt(sum_p s_p^2)      over the pairs that reach v'
#     z_p = z(v) / sqrt(n) + e_k - mean(e)             e_k ~ N(0, 1), the k-th of v's n pairs
#     s_p = rho(v) / n                                 rho: density, how much of frame 0 a cell holds

def white_noise(rows, samples, channels, generator, device="cpu"):
    """N(0, 1) of (rows, samples * channels). generator: one for all, or a list with one per sample: then no
    sample's noise depends on which others are made beside it."""
    if not isinstance(generator, (list, tuple)):
        return torch.randn(rows, samples * channels, generator=generator, device=device)
    return torch.cat([torch.randn(rows, channels, generator=g, device=device) for g in generator], 1)


def _nearest_cell(position, height, width):
    """Positions (2, n) = x, y -> index (n,) of the nearest cell, and whether it lies in the picture (n,)."""
    x, y = position.round()
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long()
    return index, inside


def _pairs(step, offset):
    """A step of flow (2, H, W) -> its P pairs of cells: source (P,), target (P,), remainder (2, P); and fresh
    (n,), the cells that no pair reaches.

    offset (2, H*W): how far from its cell's centre each value really sits. remainder: the same for each pair
    after the step. Without it, flow of less than half a cell a frame would never move anything.
    """
    H, W = step.shape[1:]
    step = step.flatten(1)
    grid = torch.cartesian_prod(torch.arange(H), torch.arange(W)).T.flip(0)  # (2, H*W): x, y
    grid = grid.to(step)

    # Forward: each value goes to the cell nearest to where the flow takes it; some leave the picture.
    landed = grid + offset + step
    nearest, inside = _nearest_cell(landed, H, W)
    source = inside.nonzero().squeeze(1)
    target = nearest[source]
    remainder = landed[:, source] - grid[:, target]

    # Backward: where the picture grows, some cells receive nothing. Such a hole copies from the cell that
    # lies one step of its own flow back. A value there may sit off the centre, so a first guess tells the
    # offset, and the second try takes it off. The copy starts at the hole's centre (remainder 0).
    received = torch.zeros(H * W, dtype=torch.bool, device=step.device)
    received[target] = True
    hole = (~received).nonzero().squeeze(1)
    behind = grid[:, hole] - step[:, hole]
    guess, _ = _nearest_cell(behind, H, W)
    back, filled = _nearest_cell(behind - offset[:, guess], H, W)

    source = torch.cat([source, back[filled]])
    target = torch.cat([target, hole[filled]])
    remainder = torch.cat([remainder, offset.new_zeros(2, int(filled.sum()))], 1)
    return source, target, remainder, hole[~filled]


def _split(noise, source, copies, samples, channels, generator):
    """-> the pairs' values (P, K), K = samples * channels. The n > 1 copies of a value z become z/sqrt(n) +
    e_k - mean(e): variance 1/n + (1 - 1/n), covariance 1/n - 1/n, so they are independent N(0, 1)."""
    values = noise.index_select(0, source)
    split = (copies[source] > 1).nonzero().squeeze(1)  # the pairs whose source has several
    owner = source[split]
    n = copies[owner].unsqueeze(1)
    extra = white_noise(len(split), samples, channels, generator, noise.device)  # e
    summed = torch.zeros_like(noise).index_add_(0, owner, extra)  # n mean(e), at each source
    values[split] = values[split] / n.sqrt() + extra - summed[owner] / n
    return values


def _merge(values, target, share, cells):
    """Noise (cells, K): sum(s z) / sqrt(sum(s^2)) over the values reaching a cell, s their share; 0 where
    none does."""
    crowd = torch.bincount(target, minlength=cells)
    square = torch.zeros(cells, device=values.device).index_add_(0, target, share * share)
    # one value alone has weight 1 exactly, not to rounding: zero flow must return the same noise
    weight = torch.where(crowd[target] > 1, share / square[target].sqrt(), 1.0)
    merged = torch.zeros(cells, values.shape[1], device=values.device)
    return merged.index_add_(0, target, values * weight.unsqueeze(1))


def _transported_frames(flow, samples, channels, generator):
    """Yields F noise frames (H*W, samples * channels): the first is white, each other one is the frame before
    it, carried along flow (F-1, 2, H, W)."""
    if isinstance(generator, (list, tuple)) and len(generator) != samples:
        raise ValueError(f"{samples} samples need as many generators, got {len(generator)}")
    device = flow.device
    cells = flow.shape[2] * flow.shape[3]
    noise = white_noise(cells, samples, channels, generator, device)
    offset = torch.zeros(2, cells, device=device)
    density = torch.ones(cells, device=device)
    yield noise

    for step in flow.float():
        # Who goes where; the copies of one source share its density.
        source, target, remainder, fresh = _pairs(step, offset)
        copies = torch.bincount(source, minlength=cells)  # (cells,), the n above
        share = density[source] / copies[source]  # (P,), the s_p above

        # The noise: split, merged, and fresh where nothing arrives.
        values = _split(noise, source, copies, samples, channels, generator)
        noise = _merge(values, target, share, cells)
        noise[fresh] = white_noise(len(fresh), samples, channels, generator, device)

        # The density tracker: how much each cell holds now (1 if fresh), and where in the cell it sits.
        total = torch.zeros(cells, device=device).index_add_(0, target, share)
        offset = torch.zeros_like(offset).index_add_(1, target, remainder * share) / total.clamp_min(1e-20)
        density = torch.where(total > 0, total, 1.0)
        # only ratios of densities count in a merge: with mean 1, a fresh cell's 1 stays an average one
        density = (density / density.mean()).clamp(1e-3, 1e3)
        yield noise


def transport_noise(flow, channels, samples=1, generator=None):
    """Noise that moves with the picture: (samples, channels, F, H, W), every frame white N(0, 1).

    flow (F-1, 2, H, W): pixels (dx, dy), previous -> next. Go-with-the-Flow's transport (arXiv 2501.08331),
    by the formulas above; cells nothing reaches get fresh noise. Cells are followed by their index, so one
    index map per frame serves all channels and samples; sub-cell remainders are carried along. Zero flow
    returns the same noise, to the bit.
    """
    flow = torch.as_tensor(flow)
    if flow.dim() != 4 or flow.shape[1] != 2 or not flow.is_floating_point():
        raise ValueError(f"flow must be float (F-1, 2, H, W), got {str(flow.dtype)[6:]} {tuple(flow.shape)}")
    if not flow.isfinite().all():
        raise ValueError("flow has NaN or infinite values")
    H, W = flow.shape[2:]
    frames = torch.stack(list(_transported_frames(flow, samples, channels, generator)))  # (F, H*W, K)
    return frames.view(-1, H, W, samples, channels).permute(3, 4, 0, 1, 2).contiguous()


def latent_noise(path, frames, height, width, samples=1, generator=None, channels=16, degradation=0.0,
                 multiple=4):
    """Initial noise (samples, C, T, h, w) for the DiT, transported along a camera path (frames, 4, 4).

    height, width: the latents'. The noise moves at `multiple` times that size along the flow between the
    frames that the latent frames end on (0, 4, 8, ...), then each multiple x multiple patch is averaged and
    rescaled to unit variance. degradation d in [0, 1] mixes in fresh noise, ((1-d) transported + d fresh) /
    sqrt((1-d)^2 + d^2), as in Go-with-the-Flow. generator: one, or a list with one per sample.
    """
    if len(path) != frames or frames % 4 != 1:
        raise ValueError("the path must have as many frames as the video, 4k+1; "
                         f"got {len(path)} poses for {frames} frames")
    if not 0 <= degradation <= 1:
        raise ValueError(f"degradation must be in [0, 1], got {degradation}")

    flow = path_flow(path[::4], height * multiple, width * multiple)
    noise = torch.empty(samples, channels, len(flow) + 1, height, width)
    for f, fine in enumerate(_transported_frames(flow, samples, channels, generator)):
        patches = fine.view(height, multiple, width, multiple, samples, channels)
        # the mean of multiple^2 values has std 1 / multiple
        noise[:, :, f] = (patches.mean((1, 3)) * multiple).permute(2, 3, 0, 1)
    if degradation:
        fresh = white_noise(noise[0, 0].numel(), samples, channels, generator)
        fresh = fresh.view(-1, height, width, samples, channels).permute(3, 4, 0, 1, 2)
        noise = (1 - degradation) * noise + degradation * fresh
        noise = noise / math.hypot(1 - degradation, degradation)
    return noise


def released_push(base, transported, strength=.35, steps=8, kernel=9):
    """The way World-R1's released code uses the transported noise: sampling starts from the white `base`, and
    after each of the first steps the low-passed difference is pushed in. -> push(x, step) for `sample(...,
    after_step=)`. strength: the release's of the 1.3B; its 14B has .40, for which there is no option here.

    delta = blur_kernel(transported - base) / its std;  x <- x + strength w_i std(x) delta, then back to the
    mean and std that x had; w falls linearly to a tenth of its first value, and sums to 1. All statistics
    are per sample. After an Euler step, and so in a rollout, sampling goes on from the pushed state. UniPC's
    corrector goes back to the state before the step: there, as in the release, a push acts only through what
    the model predicts at the pushed state.
    """
    if base.shape != transported.shape or base.dim() != 5:
        raise ValueError("base and transported noise must both be (B, C, T, h, w), "
                         f"got {tuple(base.shape)} and {tuple(transported.shape)}")

    def statistics(x):
        return x.mean((1, 2, 3, 4), keepdim=True), x.std((1, 2, 3, 4), keepdim=True)

    # the coarse part of the difference, at unit size: what the flow has moved, without the noise's grain
    frames = (transported - base).flatten(0, 2)[:, None]  # (B*C*T, 1, h, w)
    delta = F.avg_pool2d(frames, kernel, 1, kernel // 2).view_as(base)
    delta = delta / (statistics(delta)[1] + 1e-6)
    weights = torch.linspace(1, .1, steps)
    weights /= weights.sum()

    def push(x, step):
        if step >= steps:
            return x
        # mean and std stay x's own: the model expects as much noise as the step's sigma says
        mean, std = statistics(x)
        y = x + strength * float(weights[step]) * std * delta.to(x)
        new_mean, new_std = statistics(y)
        return (y - new_mean) / (new_std + 1e-6) * std + mean

    return push


# --------------------------------------------------------------------------------------------------- pictures

def draw_paths(axes, paths):
    """Camera paths from above on a matplotlib Axes: x to the right, z (forward) up, equal scales, a legend.

    paths: {label: camera-to-world (F, 4, 4)}, all in the same axes and scale. Arrows show where the first,
    middle and last camera of each look.
    """
    for label, path in paths.items():
        path = path.double().cpu()
        x, z = path[:, 0, 3], path[:, 2, 3]  # where the camera is, (F,) each
        dx, dz = path[:, 0, 2], path[:, 2, 2]  # where it looks: its own z axis
        line, = axes.plot(x, z, label=label)
        some = [0, len(path) // 2, -1]
        axes.quiver(x[some], z[some], dx[some], dz[some], color=line.get_color(), width=.008)
        # A camera that stands still is not magnified: a tenth of the depth fits in at least.
        start = torch.stack([x[0], z[0]])
        axes.update_datalim([(start - .05).tolist(), (start + .05).tolist()])
    axes.set(xlabel="x", ylabel="z (forward)")
    axes.axis("equal")
    axes.margins(.25)
    axes.legend(fontsize="small")


def show(motions, file, frames=17, size=64):
    """Writes a PNG: the path from above, the flow of the first, middle and last step (arrows scaled to the
    longest of each), and below them four frames of noise carried along it, the first to the last."""
    from matplotlib.figure import Figure  # slow to import
    if frames < 2:
        raise ValueError(f"a picture of the flow needs at least 2 frames, got {frames}")
    path = camera_path(motions, frames)
    flow = path_flow(path, size, size)
    noise = transport_noise(flow, 3, generator=torch.Generator().manual_seed(0))[0]  # (3, F, H, W)
    figure = Figure(figsize=(12, 6), layout="constrained")
    top, bottom = figure.subplots(2, 4)

    draw_paths(top[0], {", ".join(motions): path})
    every = torch.arange(size // 16, size, size // 8)
    for axes, f in zip(top[1:], (0, (frames - 1) // 2, frames - 2)):
        dx, dy = flow[f][:, every][:, :, every]
        longest = max(float(torch.hypot(dx, dy).max()), 1e-9)
        axes.quiver(every, every, dx, dy, angles="xy", scale_units="xy", scale=longest / (size / 8))
        axes.set(title=f"flow {f} -> {f + 1}", xlim=(0, size), ylim=(size, 0), aspect="equal")
    for axes, f in zip(bottom, torch.linspace(0, frames - 1, 4).round().long()):
        axes.imshow((noise[:, f].permute(1, 2, 0) / 5 + .5).clamp(0, 1))
        axes.set(title=f"noise {f}")
    with written_whole(file) as part:
        figure.savefig(part)


@as_command("noise_warp.py")
def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("prompt", help="a prompt, or motions such as push_in")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--show", nargs="?", const="out/noise_warp.png", metavar="PNG",
                        help="write the picture")
    a = parser.parse_args(argv)
    if not 1 <= a.frames <= 1000:
        raise ValueError(f"--frames must be between 1 and 1000, got {a.frames}")
    if a.show is not None and not a.show.endswith(".png"):
        raise ValueError(f"--show must end in .png, got '{a.show}'")
    motions = parse_motion(usable_prompt(a.prompt))
    path = camera_path(motions, a.frames)
    print("motions:", ", ".join(motions))
    print("last pose:", *path[-1].tolist(), sep="\n")
    if a.show:
        show(motions, a.show, a.frames)
        print(a.show)


if __name__ == "__main__":
    sys.exit(main())
