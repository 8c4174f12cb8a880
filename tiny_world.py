"""The tiny world: procedural 3D rooms with exact depth and cameras, on which every tiny twin is trained and measured.

A room with plain walls and a checkered floor, one or two large objects, eleven camera motions. Simple on purpose:
camera motion, geometry errors and the words of the prompt must be plain to see at 64x64. Everything is known exactly.

    python tiny_world.py show                    a contact sheet of clips and captions, whole and corrupted
    python tiny_world.py probe --num 200         what of 200 unseen prompts the shipped model gets right (probe.py)
    python tiny_world.py compare --num 12        an animated picture: unseen scenes as rendered, and as sampled
    python tiny_world.py score-vae --num 64      the VAE against a linear codec; score-depth: Depth Anything's twin
    python tiny_world.py vae | data | dit | web | depth | critic | preference | train-probe | export    make the twins
                                                 (tiny_train.py, tiny_judges.py, probe.py)

Left out on purpose: shadows, reflections, textures other than tiles. They cost capacity and teach nothing here.
"""

import argparse
import dataclasses
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from noise_warp import FOV, MOTIONS, camera_path
from sample import contact_sheet, initial_noise, sample

COLOURS = {"red": (.86, .10, .12), "orange": (1.0, .52, .08), "yellow": (.96, .88, .15),
           "green": (.13, .62, .20), "blue": (.13, .30, .90), "purple": (.58, .18, .78)}
SHAPES = ("sphere", "box", "cylinder")
BEHAVIOURS = ("bounces", "spins", "slides", "grows", "shrinks")

# The room in the axes of a level camera at height .5, looking along +z, y down; units of scene depth.
LOW, HIGH = (-1.0, -0.8, -1.3), (1.0, 0.5, 2.0)  # corners: x, y (ceiling, floor), z
PITCH = math.radians(12)  # frame 0 looks down a little, so that the floor fills the lower half
TILE = 0.5
LIGHT = (-0.37, -0.78, -0.50)  # towards the light
SIDE_SHADE = ((.78, .92), (1.0, .95), (.7, 1.0))  # a constant per wall makes the corners visible


# ------------------------------------------------------------------------------------------------- scenes, captions

@dataclasses.dataclass
class Object:
    shape: str
    colour: str
    x: float
    z: float
    size: float  # radius, or half the edge
    yaw: float = 0.0
    behaviour: str = ""  # empty in the static split
    phase: float = 0.0


@dataclasses.dataclass
class Scene:
    wall: str
    floor: str
    objects: list
    motions: list
    caption: str = ""


def random_scene(seed, split="static", index=0):
    """One scene with its caption, the same for the same (seed, split, index). split: static | dynamic."""
    if split not in ("static", "dynamic"):
        raise ValueError(f"split must be static or dynamic, got '{split}'")
    rng = random.Random(f"{seed}/{split}/{index}")
    wall, floor, *colours = rng.sample(list(COLOURS), 4)
    count = rng.choice((1, 2))
    centres = [rng.uniform(-.25, .25)] if count == 1 else [rng.uniform(-.42, -.3), rng.uniform(.3, .42)]
    objects = [Object(rng.choice(SHAPES), colours[i], x, rng.uniform(1.0, 1.3), rng.uniform(.20, .24), rng.uniform(-.6, .6))
               for i, x in enumerate(centres)]
    if split == "dynamic":
        for o in objects[:rng.choice((1, count))]:
            o.behaviour = rng.choice([b for b in BEHAVIOURS if b != "spins" or o.shape == "box"])
            o.phase = rng.random()
    motions = [rng.choice(MOTIONS)] if split == "dynamic" or rng.random() < .75 else rng.sample(MOTIONS[:-1], 2)
    scene = Scene(wall, floor, objects, motions)
    scene.caption = caption(scene, rng)
    return scene


def caption(scene, rng=random.Random(0), camera=True):
    """A sentence the prompt parser reads back: camera words (sometimes last), objects, floor, walls."""
    things = [f"{'an' if o.colour[0] in 'aeiou' else 'a'} {o.colour} {o.shape}" + (f" that {o.behaviour}" if o.behaviour else "")
              for o in scene.objects]
    things = " and ".join(things)
    pattern = rng.choice(("{things} on a checkered {floor} floor, {wall} walls",
                          "{things} in a room with {wall} walls and a checkered {floor} floor",
                          "{wall} walls, a checkered {floor} floor and {things}",
                          "{things}, {floor} checkered floor, {wall} walls"))
    body = pattern.format(things=things, floor=scene.floor, wall=scene.wall)
    words = [m.replace("_", " ") for m in scene.motions]
    form = rng.choice(("Camera {a}. {B}.", "Camera {a}. {B}.", "{tag} {b}", "{B}. Camera {a}.")) if camera else "{B}."
    return form.format(a=", then ".join(words), tag=" ".join(scene.motions), b=body, B=body[0].upper() + body[1:])


# ----------------------------------------------------------------------------------------------------- the renderer

def intrinsics(height, width):
    """(3, 3) pinhole matrix, square pixels, horizontal field of view FOV, principal point at the image centre."""
    f = width / 2 / math.tan(FOV / 2)
    return torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]])


def render(scene, frames=17, height=64, width=64, supersample=2, depth=False, at=None, poses=None):
    """Ray casts a scene. -> dict

    video (F, 3, H, W) in [0, 1]; poses (F, 4, 4) camera-to-world; and with depth=True also
    depth (F, H, W) z-depth and mask (F, H, W) (0 room, 1.. objects), both exact at pixel centres.
    at: indices of the frames to render, all by default. Supersampling is supersample x supersample rays a pixel.
    poses: camera-to-world (F, 4, 4) in frame 0's axes instead of the scene's own path.
    """
    poses, frames = (camera_path(scene.motions, frames).float(), frames) if poses is None else (poses.float().cpu(), len(poses))
    when = torch.arange(frames) if at is None else torch.as_tensor(at)
    poses, clock = poses[when], when / max(frames - 1, 1)
    colour, _, _ = _cast(scene, poses, clock, height, width, supersample)
    s = supersample
    video = colour.view(len(when), height, s, width, s, 3).mean((2, 4)).permute(0, 3, 1, 2).contiguous()
    out = dict(video=video, poses=poses)
    if depth:
        _, z, owner = _cast(scene, poses, clock, height, width, 1)
        out.update(depth=z.view(-1, height, width), mask=owner.view(-1, height, width))
    return out


def _cast(scene, poses, clock, height, width, s):
    """One ray per sample. -> colour (F, N, 3), z-depth (F, N), owner (F, N); N = height*s * width*s."""
    K = intrinsics(height, width)
    u = (torch.arange(width * s) + .5) / s
    v = (torch.arange(height * s) + .5) / s
    x = ((u - K[0, 2]) / K[0, 0]).expand(height * s, -1).reshape(-1)
    y = ((v - K[1, 2]) / K[1, 1])[:, None].expand(-1, width * s).reshape(-1)
    c, sn = math.cos(PITCH), math.sin(PITCH)
    room = torch.tensor([[1, 0, 0], [0, c, sn], [0, -sn, c]])  # camera-0 axes -> level room axes
    R, o = room @ poses[:, :3, :3], poses[:, :3, 3] @ room.T  # (F,3,3), (F,3)
    rays = torch.stack([x, y, torch.ones_like(x)])  # camera z = 1, so a ray's parameter t is its z-depth
    d = (R @ rays).unbind(1)  # 3 x (F, N)
    o = [o[:, i, None] for i in range(3)]

    # the room, from inside: the nearest exit among three axes
    ts, faces = [], []
    for i in range(3):
        ahead = d[i] > 0
        ts.append((torch.where(ahead, HIGH[i], LOW[i]) - o[i]) / d[i])
        faces.append(ahead.to(torch.uint8) + 2 * i)  # 0,1: x walls; 2 ceiling, 3 floor; 4,5: z walls
    t, face = ts[0], faces[0]
    for i in (1, 2):
        nearer = ts[i] < t
        t, face = torch.where(nearer, ts[i], t), torch.where(nearer, faces[i], face)
    px, pz = o[0] + t * d[0], o[2] + t * d[2]
    odd = (((px / TILE).floor() + (pz / TILE).floor()).to(torch.int32) & 1).bool()
    index = torch.where((face == 3) & odd, 6, face)
    wall, floor = torch.tensor(COLOURS[scene.wall]), torch.tensor(COLOURS[scene.floor])
    palette = [wall * SIDE_SHADE[0][0], wall * SIDE_SHADE[0][1], torch.full((3,), .93), floor,
               wall * SIDE_SHADE[2][0], wall * SIDE_SHADE[2][1], floor * .4 + .6]
    owner = torch.zeros_like(index)
    shade = torch.ones_like(t)
    for k, obj in enumerate(scene.objects):
        hit, n_dot_l = _hit(obj, o, d, clock[:, None])
        nearer = hit < t
        t = torch.where(nearer, hit, t)
        shade = torch.where(nearer, .5 + .5 * n_dot_l.clamp_min(0), shade)
        index, owner = index.masked_fill(nearer, 7 + k), owner.masked_fill(nearer, k + 1)
        palette.append(torch.tensor(COLOURS[obj.colour]))
    colour = torch.stack(palette)[index.int()] * shade[..., None]
    return colour, t, owner


def _hit(obj, o, d, clock):
    """First hit of rays o + t d with an object at times clock (F, 1). -> t (inf where missed), normal . light."""
    cx, size, lift, yaw = obj.x, obj.size, 0.0, obj.yaw
    wave = 2 * math.pi * (clock + obj.phase)
    if obj.behaviour == "bounces":
        lift = .3 * torch.sin(wave).abs()
    elif obj.behaviour == "spins":
        yaw = yaw + 1.5 * math.pi * clock
    elif obj.behaviour == "slides":
        cx = cx + .3 * (torch.sin(wave) - math.sin(2 * math.pi * obj.phase))
    elif obj.behaviour == "grows":
        size = size * (.6 + .8 * clock)
    elif obj.behaviour == "shrinks":
        size = size * (1.4 - .8 * clock)
    ox, oy, oz = o[0] - cx, o[1] - (HIGH[1] - size - lift), o[2] - obj.z
    dx, dy, dz = d
    lx, ly, lz = LIGHT
    inf = torch.tensor(math.inf)
    if obj.shape == "sphere":
        a, b = dx * dx + dy * dy + dz * dz, dx * ox + dy * oy + dz * oz
        disc = b * b - a * (ox * ox + oy * oy + oz * oz - size * size)
        t = (-b - disc.clamp_min(0).sqrt()) / a
        t = torch.where((disc > 0) & (t > 0), t, inf)
        shade = ((ox + t * dx) * lx + (oy + t * dy) * ly + (oz + t * dz) * lz) / size
    elif obj.shape == "cylinder":
        a, b = dx * dx + dz * dz, dx * ox + dz * oz
        disc = b * b - a * (ox * ox + oz * oz - size * size)
        side = (-b - disc.clamp_min(0).sqrt()) / a
        ok = (disc > 0) & (side > 0) & ((oy + side * dy).abs() < size)
        cap = (-size - oy) / dy  # the top, seen from above
        top = (dy > 0) & (cap > 0) & ((ox + cap * dx) ** 2 + (oz + cap * dz) ** 2 < size * size)
        t = torch.where(ok, side, inf)
        shade = ((ox + side * dx) * lx + (oz + side * dz) * lz) / size
        on_top = top & (cap < t)
        t, shade = torch.where(on_top, cap, t), shade.masked_fill(on_top, -ly)
    else:
        cos, sin = (math.cos(yaw), math.sin(yaw)) if isinstance(yaw, float) else (yaw.cos(), yaw.sin())
        qx, qz = cos * ox - sin * oz, sin * ox + cos * oz
        ex, ez = cos * dx - sin * dz, sin * dx + cos * dz
        near, far, shade = -inf, inf, 0.0
        for p, e, light in ((qx, ex, cos * lx - sin * lz), (oy, dy, ly), (qz, ez, sin * lx + cos * lz)):
            enter, leave = (-size * e.sign() - p) / e, (size * e.sign() - p) / e
            last = enter > near
            near, far = torch.where(last, enter, near), torch.minimum(far, leave)
            shade = torch.where(last, -e.sign() * light, shade)
        t = torch.where((near < far) & (near > 0), near, inf)
    return t, shade.nan_to_num(0.0)


# ------------------------------------------------------- what goes wrong: clips, reconstructions and pictures, by strength

CORRUPTIONS = ("warp", "morph", "swap", "freeze")


def corrupt(scene, kind, strength=1.0, seed=0, frames=17):
    """A clip (F, 3, 64, 64) of the scene, every frame of it clean, that no rigid world and requested path could show.

    warp    the walls swim: a smooth field that changes over time moves pixels by up to 6 strength
    morph   the first object swells, shrinks and slides as the clip goes on, and is another shape in its second half
    swap    from some frame on, another room filmed by the same camera is mixed in, by strength
    freeze  the camera does strength less of its motion than the caption asks for: 1 stands still
    """
    rng = random.Random(f"{seed}/{kind}/{scene.caption}")
    if kind == "warp":
        video = render(scene, frames)["video"]
        g = torch.Generator().manual_seed(rng.randrange(2 ** 31))
        coarse = F.interpolate(torch.randn(1, 2, 4, 4, 4, generator=g), size=(frames, *video.shape[2:]), mode="trilinear", align_corners=True)[0]
        field = strength * 12 / video.shape[-1] * (coarse / coarse.abs().amax()).permute(1, 2, 3, 0)  # (F, H, W, 2), in half widths
        grid = F.affine_grid(torch.eye(2, 3).expand(frames, 2, 3), video.shape, align_corners=False)
        return F.grid_sample(video, grid + field, mode="bilinear", padding_mode="reflection", align_corners=False)
    if kind == "morph":
        other = rng.choice([s for s in SHAPES if s != scene.objects[0].shape])
        phase, parts = rng.uniform(0, 2 * math.pi), []
        for f in range(frames):
            wave = strength * math.sin(2 * math.pi * f / (frames - 1) + phase)
            o = dataclasses.replace(scene.objects[0])
            o.size, o.x = o.size * (1 + .4 * wave), o.x + .15 * wave
            o.shape = other if f > frames / 2 and strength > .5 else o.shape
            parts.append(render(dataclasses.replace(scene, objects=[o, *scene.objects[1:]]), frames, at=[f])["video"])
        return torch.cat(parts)
    if kind == "swap":
        elsewhere = random_scene(f"{seed}/swap", "static", rng.randrange(10 ** 6))
        elsewhere.motions = scene.motions
        a, b = render(scene, frames)["video"], render(elsewhere, frames)["video"]
        start = rng.randint(frames // 3, 2 * frames // 3)
        share = strength * (torch.arange(frames) >= start).float().view(-1, 1, 1, 1)
        return (1 - share) * a + share * b
    if kind == "freeze":
        return render(scene, poses=camera_path(scene.motions, frames, 1 - strength))["video"]
    raise ValueError(f"kind must be one of {', '.join(CORRUPTIONS)}, got '{kind}'")


DAMAGE = ("floaters", "billboard", "stretch", "holes")


def damage(rec, kind, strength, generator):
    """Breaks a reconstruction's Gaussians: floaters (points leave their surface along the ray), billboard (everything
    slides to one depth), stretch (splats grow along one axis), holes (splats vanish). strength in [0, 1]."""
    g, eye = rec.gaussians, rec.camera_to_world[len(rec.camera_to_world) // 2, :3, 3]
    ray, rand = g.means - eye, torch.rand(len(g.means), generator=generator)
    means, scales, opacities = g.means, g.scales, g.opacities
    if kind == "floaters":
        means = eye + ray * (1 - (rand < .5 * strength).float() * torch.rand(len(rand), generator=generator) * .7)[:, None]
    elif kind == "billboard":
        means = eye + ray * (1 + strength * (rec.depth.median() / ray.norm(dim=1) - 1))[:, None]
    elif kind == "stretch":
        scales = scales * torch.tensor([1 + 12 * strength, 1, 1])
    elif kind == "holes":
        opacities = opacities * (rand > .9 * strength)
    else:
        raise ValueError(f"unknown damage '{kind}'")
    return dataclasses.replace(rec, gaussians=dataclasses.replace(g, means=means, scales=scales, opacities=opacities))


DEGRADATIONS = ("blur", "noise", "colour", "fade")


def degrade(image, kind, strength, generator):
    """An uglier copy of an image (3, H, W): blurred, noisy, colour-shifted or washed out. strength in [0, 1]."""
    if kind == "blur":
        x = torch.arange(-6, 7.0)
        kernel = torch.exp(-x * x / (2 * (.3 + 2.5 * strength) ** 2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        out = F.conv2d(F.pad(image[None], (6, 6, 6, 6), mode="replicate"), kernel, groups=3)
        return F.conv2d(out, kernel.mT, groups=3)[0]
    if kind == "noise":
        return (image + .2 * strength * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    if kind == "colour":
        shift = torch.randn(3, 1, 1, generator=generator)
        return (image + .35 * strength * (shift - shift.mean()) / shift.norm()).clamp(0, 1)
    if kind == "fade":
        return image + .8 * strength * (image.mean() - image)
    raise ValueError(f"unknown degradation '{kind}'")


# ------------------------------------------------------------------------------------------------------ samples, scored

def unseen_scenes(num, seed=0):
    """Static scenes no training saw; their captions always name the camera."""
    return [random_scene(f"unseen/{seed}", "static", i) for i in range(num)]


def sample_prompts(wan, defaults, prompts, seed=0, batch=20, **noise):
    """One video (F, 3, H, W) a prompt, from the seed's i-th noise. noise: of `initial_noise`."""
    d, videos = defaults, []
    for first in range(0, len(prompts), batch):
        part = prompts[first:first + batch]
        start = torch.cat([initial_noise(wan, p, d["frames"], d["height"], d["width"], [first + i], seed, **noise)[0] for i, p in enumerate(part)])
        latents = sample(wan, part, start, d["steps"], d["guidance"], d.get("shift"), progress=True)
        videos += [wan.vae.decode(x[None])[0] for x in latents]
    return videos


SCORED = ("probe", "compare", "score-vae", "score-depth")
MADE = ("vae", "data", "dit", "web", "depth", "critic", "preference", "train-probe", "export")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("show", *SCORED, *MADE))
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of states, logs and pictures")
    parser.add_argument("--minutes", type=float, default=60, help="of training, over all resumes")
    parser.add_argument("--clips", type=int, default=8192, help="data: clips in all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny", help="export: the folder written")
    parser.add_argument("--model", help="the model scored (default: the shipped one)")
    parser.add_argument("--lora", nargs="+", help="probe, compare: LoRA file or run folder merged into the model; several: a row or column each")
    parser.add_argument("--probe", type=Path, help="probe: its folder (default tiny/probe)")
    parser.add_argument("--prompts", help="probe: file of prompts (default: captions of unseen scenes)")
    parser.add_argument("--num", type=int, help="videos scored (default: probe 200, compare 12, score-vae and score-depth 64)")
    parser.add_argument("--frames", type=int, help="probe, compare: of a video, 4k+1 (default: the model's)")
    parser.add_argument("--steps", type=int, nargs="+", help="probe: sampling steps; several values of an option make a row each (default: the model's)")
    parser.add_argument("--guidance", type=float, nargs="+", help="probe: classifier-free guidance")
    parser.add_argument("--shift", type=float, nargs="+", help="probe: shift of the noise schedule")
    parser.add_argument("--no-transport", dest="transport", action="store_false", help="probe: plain noise")
    parser.add_argument("--degradation", type=float, nargs="+", help="probe: fresh noise mixed in")
    parser.add_argument("--strength", type=float, nargs="+", help="probe: of the noise's camera path")
    parser.add_argument("--rendered", action="store_true", help="probe: score the renderer's own clips instead")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(argv)
    if a.command == "show":
        scenes = [random_scene(a.seed, s, i) for s in ("static", "dynamic") for i in range(6)]
        contact_sheet(a.run / "show.png", [render(s)["video"] for s in scenes] + [corrupt(s, kind) for s, kind in zip(scenes, CORRUPTIONS)])
        print("\n".join(s.caption for s in scenes), *CORRUPTIONS, a.run / "show.png", sep="\n")
    elif a.command in SCORED:
        import probe
        import tiny_judges
        from lora import lora_file
        run, num = {"probe": (probe.command, 200), "compare": (probe.compare, 12), "score-vae": (probe.score_vae, 64), "score-depth": (tiny_judges.score_depth, 64)}[a.command]
        a.num = a.num or num
        a.model = a.model or Path(__file__).parent / "tiny" / ("depth_anything" if a.command == "score-depth" else "wan")
        try:
            for file in a.lora or []:
                lora_file(file)
            run(a)
        except (ValueError, OSError) as e:
            print(f"tiny_world.py: {e}", file=sys.stderr)
            return 2
    else:
        import probe
        import tiny_judges
        import tiny_train
        if a.command == "data":
            tiny_train.make_data(a.run, a.clips, a.seed)
        elif a.command == "export":  # whatever RUN has trained, in bfloat16
            for name, write, folder in (("dit", tiny_train.export_wan, "wan"), ("web", tiny_train.export_web, "web"),
                                        ("depth", tiny_judges.export_depth, "depth_anything"), ("critic", tiny_judges.export_critic, "qwen3_vl"),
                                        ("preference", tiny_judges.export_preference, "hpsv3"), ("probe", probe.export_probe, "probe")):
                if (a.run / name / "state.pt").exists():
                    write(a.run, a.out / folder)
                    print(a.out / folder)
        else:
            {"vae": tiny_train.train_vae, "dit": tiny_train.train_dit, "web": tiny_train.train_web, "depth": tiny_judges.train_depth,
             "critic": tiny_judges.train_critic, "preference": tiny_judges.train_preference, "train-probe": probe.train_probe}[a.command](a.run, a.minutes, a.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
