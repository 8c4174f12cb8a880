"""Noise transport: the prompt's camera words become a camera path (World-R1, arXiv 2604.24764).

    words -> motions -> camera path E_f

    python -c "from noise_warp import *; print(camera_path(parse_motion('Camera push in, then pan left.'), 17)[-1])"

Conventions: camera-to-world 4x4, OpenCV axes (x right, y down, z forward), frame 0 = identity, angles in
radians, distances in units of the assumed scene depth (the plane the camera looks at sits at z = 1).
"""

import math
import re
import warnings

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
    stray = _LOOKALIKE.search(prompt)
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
