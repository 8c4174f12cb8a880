"""The tiny world: procedural 3D rooms with exact depth and cameras, on which every tiny twin is trained and
measured.

    python -m tiny show                  a contact sheet of clips and captions, whole and corrupted

    scene = random_scene(0, "static", 7)       # the same for the same seed, split and index
    scene.caption                              # "Camera fixed. A red cylinder and an orange cylinder, ..."
    render(scene, depth=True)                  # video, poses, depth, mask

A room with plain walls and a checkered floor, one or two large objects, eleven camera motions. Simple on
purpose: camera motion, geometry errors and the words of the prompt must be plain to see at 64x64. The last
two sections of the file break clips, reconstructions and pictures by a known amount: the faults that judges
must notice.

Left out on purpose: shadows, reflections, textures other than tiles. They cost capacity and teach nothing
here. And collisions: an object that slides or grows may go into a wall or through its neighbour.
"""

import dataclasses
import math
import random

import torch
import torch.nn.functional as F

from noise_warp import FOV, MOTIONS, camera_path

COLOURS = {
    "red": (.86, .10, .12),
    "orange": (1.0, .52, .08),
    "yellow": (.96, .88, .15),
    "green": (.13, .62, .20),
    "blue": (.13, .30, .90),
    "purple": (.58, .18, .78),
}
SHAPES = ("sphere", "box", "cylinder")
BEHAVIOURS = ("bounces", "spins", "slides", "grows", "shrinks")

# The room in the axes of a level camera at height .5, looking along +z, y down; units of scene depth.
LOW = (-1.0, -0.8, -1.3)  # x, y of the ceiling, z
HIGH = (1.0, 0.5, 2.0)  # x, y of the floor, z
PITCH = math.radians(12)  # frame 0 looks down a little, so that the floor fills the lower half
TILE = 0.5
LIGHT = (-0.37, -0.78, -0.50)  # towards the light
WALL_SHADES = (.78, .92, .7, 1.0)  # left, right, back, front: a constant per wall makes the corners visible
CEILING = .93
LIGHT_TILE = 6  # in the palette of `cast_rays`, after the room's six faces


# ------------------------------------------------------------------------------------------- scenes, captions

@dataclasses.dataclass
class Object:
    shape: str
    colour: str
    x: float
    z: float
    size: float  # radius, or half the edge
    yaw: float = 0.0
    behaviour: str = ""  # empty in the static split
    phase: float = 0.0  # of the behaviour, in [0, 1)


@dataclasses.dataclass
class Scene:
    wall: str
    floor: str
    objects: list
    motions: list  # of the camera, one or two of noise_warp.MOTIONS
    caption: str = ""


def random_scene(seed, split="static", index=0):
    """One scene with its caption, the same for the same (seed, split, index). split: static | dynamic."""
    if split not in ("static", "dynamic"):
        raise ValueError(f"split must be static or dynamic, got '{split}'")
    dynamic = split == "dynamic"
    rng = random.Random(f"{seed}/{split}/{index}")

    # No colour appears twice, so that the words tell everything apart; two objects stand side by side.
    wall, floor, *colours = rng.sample(list(COLOURS), 4)
    count = rng.choice((1, 2))
    places = [(-.25, .25)] if count == 1 else [(-.42, -.3), (.3, .42)]
    centres = [rng.uniform(low, high) for low, high in places]
    objects = []
    for x, colour in zip(centres, colours):
        shape = rng.choice(SHAPES)
        z = rng.uniform(1.0, 1.3)
        size = rng.uniform(.20, .24)
        objects.append(Object(shape, colour, x, z, size, yaw=rng.uniform(-.6, .6)))

    # In the dynamic split the first object, or both, move by themselves.
    if dynamic:
        for thing in objects[:rng.choice((1, count))]:
            # of a sphere or a cylinder nobody would see that it spins
            visible = [b for b in BEHAVIOURS if b != "spins" or thing.shape == "box"]
            thing.behaviour = rng.choice(visible)
            thing.phase = rng.random()
    motions = [rng.choice(MOTIONS)] if dynamic else random_motions(rng)
    scene = Scene(wall, floor, objects, motions)
    scene.caption = caption(scene, rng)
    return scene


def random_scenes(seed, split, count):
    return [random_scene(seed, split, i) for i in range(count)]


def random_motions(rng):
    """One camera motion, or, once in four times, two after each other."""
    if rng.random() < .75:
        return [rng.choice(MOTIONS)]
    return rng.sample([motion for motion in MOTIONS if motion != "fixed"], 2)


def caption(scene, rng, camera=True):
    """A sentence the prompt parser reads back: camera words (sometimes last), objects, floor, walls."""
    # The scene, in one of four orders.
    things = []
    for thing in scene.objects:
        article = "an" if thing.colour[0] in "aeiou" else "a"
        behaviour = f" that {thing.behaviour}" if thing.behaviour else ""
        things.append(f"{article} {thing.colour} {thing.shape}{behaviour}")
    pattern = rng.choice(("{things} on a checkered {floor} floor, {wall} walls",
                          "{things} in a room with {wall} walls and a checkered {floor} floor",
                          "{wall} walls, a checkered {floor} floor and {things}",
                          "{things}, {floor} checkered floor, {wall} walls"))
    body = pattern.format(things=" and ".join(things), floor=scene.floor, wall=scene.wall)
    sentence = f"{body[0].upper()}{body[1:]}."
    if not camera:
        return sentence

    # The camera, in words or as tags.
    words = ", then ".join(motion.replace("_", " ") for motion in scene.motions)
    tag = " ".join(scene.motions)
    camera_first = f"Camera {words}. {sentence}"  # half of the captions
    return rng.choice((camera_first, camera_first, f"{tag} {body}", f"{sentence} Camera {words}."))


def unseen_scenes(num, seed=0):
    """Static scenes that no training renders; their captions always name the camera. With so few words, some
    captions also occur in the trainings, but for rooms in which things stand elsewhere."""
    return random_scenes(f"unseen/{seed}", "static", num)


def prompt_rows():
    """Yields the lines of tiny/prompts.jsonl, {"id", "split", "prompt"}: captions of scenes that are never
    rendered.

    The dynamic and the test split leave out captions that an earlier split holds; train may hold one twice.
    """
    seen = set()
    for split, count in (("train", 3000), ("dynamic", 500), ("test", 300)):
        kind = "dynamic" if split == "dynamic" else "static"
        prompts = []
        index = 0
        while len(prompts) < count:
            prompt = random_scene(f"rl/{split}", kind, index).caption
            index += 1
            if split == "train" or prompt not in seen:
                yield {"id": f"{split}-{len(prompts):04d}", "split": split, "prompt": prompt}
                prompts.append(prompt)
        seen.update(prompts)


# ----------------------------------------------------------------------------------------------- the renderer

def intrinsics(height, width):
    """(3, 3) pinhole matrix, square pixels, horizontal field of view FOV, principal point at the image
    centre."""
    focal = width / 2 / math.tan(FOV / 2)
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def render(scene, frames=17, height=64, width=64, supersample=2, depth=False, at=slice(None), poses=None):
    """Ray casts a scene. -> a dict of the F frames that are rendered

    video (F, 3, H, W) in [0, 1]; poses (F, 4, 4) camera-to-world; and with depth=True also depth (F, H, W)
    z-depth and mask (F, H, W) (0 room, 1.. objects), both exact at pixel centres.

    at: which of the clip's frames to render, all by default. supersample: so many by so many rays a pixel.
    poses: cameras in place of the scene's own path, one for each of the clip's frames, in the axes of that
    path's frame 0.
    """
    if poses is None:
        poses = camera_path(scene.motions, frames)
    frames = len(poses)
    when = torch.arange(frames)[at]
    poses = poses.float().cpu()[when]
    clock = when / max(frames - 1, 1)  # 0 at the first frame, 1 at the last

    # Pixels are means over their rays.
    colour, _, _ = cast_rays(scene, poses, clock, height, width, supersample)
    colour = colour.view(len(when), height, supersample, width, supersample, 3)
    video = colour.mean((2, 4)).permute(0, 3, 1, 2).contiguous()  # (F, 3, H, W)

    # Depth and owner are not averaged: one ray through the pixel's centre.
    out = dict(video=video, poses=poses)
    if depth:
        _, distance, owner = cast_rays(scene, poses, clock, height, width, 1)
        out["depth"] = distance.view(-1, height, width)
        out["mask"] = owner.view(-1, height, width)
    return out


def render_all(scenes, frames=17):
    """-> videos (B, F, 3, 64, 64) of B scenes."""
    return torch.stack([render(scene, frames)["video"] for scene in scenes])


def pixel_rays(height, width, per_side=1):
    """Directions (3, N) of a camera's rays in its own axes, row by row: K^-1 (u, v, 1), so z is 1.

    per_side x per_side rays a pixel, through the centres of its parts, make N = H W per_side^2.
    """
    K = intrinsics(height, width)
    rows = (torch.arange(height * per_side) + .5) / per_side
    columns = (torch.arange(width * per_side) + .5) / per_side
    v, u = torch.cartesian_prod(rows, columns).T
    return torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], torch.ones_like(u)])


def cast_rays(scene, poses, clock, height, width, per_side):
    """What `pixel_rays` of cameras (F, 4, 4) see at times clock (F,). -> colour (F, N, 3), z-depth (F, N),
    owner (F, N).

    A ray advances by 1 along its camera's z, so that its parameter t (the point is origin + t direction) is
    the z-depth.
    """
    # The path starts at the identity, where the camera looks PITCH below the room's horizon.
    cosine, sine = math.cos(PITCH), math.sin(PITCH)
    to_room = torch.tensor([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    direction = (to_room @ poses[:, :3, :3]) @ pixel_rays(height, width, per_side)  # (F, 3, N)
    direction = direction.transpose(0, 1)
    origin = (poses[:, :3, 3] @ to_room.T).T[:, :, None]  # (3, F, 1)

    # The colours of surfaces, by number; the objects' follow.
    wall = torch.tensor(COLOURS[scene.wall])
    floor = torch.tensor(COLOURS[scene.floor])
    left, right, back, front = (wall * shade for shade in WALL_SHADES)
    palette = [left, right, torch.full((3,), CEILING), floor, back, front, floor * .4 + .6]

    # The room, seen from inside: the nearest exit among three pairs of walls. Faces are numbered as in the
    # palette.
    depth = torch.full_like(direction[0], math.inf)
    surface = torch.zeros(depth.shape, dtype=torch.uint8)
    for axis in range(3):
        ahead = direction[axis] > 0
        exit_depth = (torch.where(ahead, HIGH[axis], LOW[axis]) - origin[axis]) / direction[axis]
        exit_depth = exit_depth.where(direction[axis] != 0, math.inf)  # along the walls: none is met
        nearer = exit_depth < depth
        depth = torch.where(nearer, exit_depth, depth)
        surface = torch.where(nearer, ahead.to(torch.uint8) + 2 * axis, surface)

    # The checkered floor, face 3: every other tile is pale.
    x, _, z = origin + depth * direction
    odd = ((x / TILE).floor() + (z / TILE).floor()) % 2 == 1
    surface = torch.where((surface == 3) & odd, LIGHT_TILE, surface)

    # The objects, in front of the room and of each other.
    owner = torch.zeros_like(surface)
    brightness = torch.ones_like(depth)  # the walls have theirs in the palette
    for number, thing in enumerate(scene.objects, 1):
        distance, facing = hit_object(thing, origin, direction, clock[:, None])
        nearer = distance < depth
        depth = torch.where(nearer, distance, depth)
        brightness = torch.where(nearer, .5 + .5 * facing.clamp_min(0), brightness)
        surface = surface.masked_fill(nearer, LIGHT_TILE + number)
        owner = owner.masked_fill(nearer, number)
        palette.append(torch.tensor(COLOURS[thing.colour]))
    colour = torch.stack(palette)[surface.int()] * brightness[..., None]
    return colour, depth, owner


def hit_object(thing, origin, direction, clock):
    """Where rays first hit an object at times clock (F, 1). -> z-depth (F, N), inf where missed; and how much
    the surface faces the light there, normal . LIGHT (F, N)."""
    # Where its behaviour has taken it.
    x, size, lift = thing.x, thing.size, 0.0
    yaw = torch.tensor(thing.yaw, dtype=torch.float64)
    wave = 2 * math.pi * (clock + thing.phase)
    if thing.behaviour == "bounces":
        lift = .3 * torch.sin(wave).abs()
    elif thing.behaviour == "spins":
        yaw = thing.yaw + 1.5 * math.pi * clock
    elif thing.behaviour == "slides":
        x = x + .3 * (torch.sin(wave) - math.sin(2 * math.pi * thing.phase))
    elif thing.behaviour == "grows":
        size = size * (.6 + .8 * clock)
    elif thing.behaviour == "shrinks":
        size = size * (1.4 - .8 * clock)

    # From here on the object's centre is the origin; it stands on the floor.
    origin = torch.stack([origin[0] - x, origin[1] - (HIGH[1] - size - lift), origin[2] - thing.z])
    if thing.shape == "sphere":
        depth, facing = hit_round(origin, direction, LIGHT, size)
    elif thing.shape == "cylinder":
        depth, facing = hit_cylinder(origin, direction, size)
    elif thing.shape == "box":
        depth, facing = hit_box(origin, direction, size, yaw)
    else:
        raise ValueError(f"no ray is known to hit a {thing.shape}; add it to hit_object")
    return depth, facing.nan_to_num(0.0)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def hit_round(origin, direction, light, radius):
    """A sphere, |origin + t direction| = radius; given only x and z, an endless upright cylinder."""
    # The nearer root of a t^2 + 2 b t + c = 0, where it is real and in front of the camera.
    a = dot(direction, direction)
    b = dot(direction, origin)
    discriminant = b * b - a * (dot(origin, origin) - radius * radius)
    t = (-b - discriminant.clamp_min(0).sqrt()) / a
    facing = dot(origin + t * direction, light) / radius
    return torch.where((discriminant > 0) & (t > 0), t, math.inf), facing


def hit_cylinder(origin, direction, radius):
    """An upright cylinder, as high as it is wide."""
    # The side: the endless cylinder, kept only between bottom and top.
    (x, y, z), (dx, dy, dz) = origin, direction
    depth, facing = hit_round(origin[::2], direction[::2], LIGHT[::2], radius)
    depth = torch.where((y + depth * dy).abs() < radius, depth, math.inf)

    # The top, seen from above (y points down).
    top = (-radius - y) / dy
    within = (x + top * dx) ** 2 + (z + top * dz) ** 2 < radius * radius
    on_top = (dy > 0) & (top > 0) & within & (top < depth)
    return torch.where(on_top, top, depth), facing.masked_fill(on_top, -LIGHT[1])


def hit_box(origin, direction, half, yaw):
    """A cube turned by yaw about y: a ray is inside it while it is inside all three slabs."""
    cosine, sine = yaw.cos(), yaw.sin()

    def turned_back(x, y, z):  # into the cube's axes
        return cosine * x - sine * z, y, sine * x + cosine * z

    near, far, facing = torch.tensor(-math.inf), torch.tensor(math.inf), 0.0
    for position, step, light in zip(turned_back(*origin), turned_back(*direction), turned_back(*LIGHT)):
        side = step.sign()
        enter = (-half * side - position) / step
        leave = (half * side - position) / step
        last = enter > near  # the face that the ray enters last is the one that is seen
        near = torch.where(last, enter, near)
        far = torch.minimum(far, leave)
        facing = torch.where(last, -side * light, facing)
    return torch.where((near < far) & (near > 0), near, math.inf), facing


# ------------------------------------------------------------ what goes wrong, by strength: clips

CORRUPTIONS = ("warp", "morph", "swap", "freeze")


def corrupt(scene, kind, strength=1.0, seed=0):
    """A faulty clip (17, 3, 64, 64) of the scene: no rigid world, filmed along the requested path, could look
    like it. strength in [0, 1].

    warp    the walls swim: a smooth field that changes over time moves pixels by up to 6 strength an axis
    morph   the first object swells, shrinks and slides; above a strength of .5 it also has a different shape
            in the clip's second half
    swap    from some frame on, another room filmed by the same camera is mixed in, by strength
    freeze  the camera makes only 1 - strength of the motion that the caption asks for: at 1 it stands still
    """
    rng = random.Random(f"{seed}/{kind}/{scene.caption}")
    if kind == "warp":
        return warped(render(scene)["video"], strength, rng)
    if kind == "morph":
        return morphing(scene, strength, rng)
    if kind == "swap":
        elsewhere = random_scene(f"{seed}/swap", "static", rng.randrange(10 ** 6))
        elsewhere.motions = scene.motions
        return swapped(render(scene)["video"], render(elsewhere)["video"], strength, rng)
    if kind == "freeze":
        return render(scene, poses=camera_path(scene.motions, 17, 1 - strength))["video"]
    raise ValueError(f"kind must be one of {', '.join(CORRUPTIONS)}, got '{kind}'")


def warped(video, strength, rng):
    """video (F, 3, H, W) with every pixel looked up where a smooth random field of space and time says."""
    # 4x4x4 random arrows, smoothed to one for every pixel, their largest component 1.
    generator = torch.Generator().manual_seed(rng.randrange(2 ** 31))
    frames, _, height, width = video.shape
    coarse = torch.randn(1, 2, 4, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(frames, height, width), mode="trilinear", align_corners=True)[0]
    unit = (smooth / smooth.abs().amax()).permute(1, 2, 3, 0)  # (F, H, W, 2)

    field = strength * 12 / width * unit  # in half widths, as grid_sample counts
    grid = F.affine_grid(torch.eye(2, 3).expand(frames, 2, 3), video.shape, align_corners=False)
    return F.grid_sample(video, grid + field, mode="bilinear", padding_mode="reflection", align_corners=False)


def morphing(scene, strength, rng, frames=17):
    """The scene with a first object that does not keep its size, place and shape."""
    first, *others = scene.objects
    other_shape = rng.choice([shape for shape in SHAPES if shape != first.shape])
    phase = rng.uniform(0, 2 * math.pi)
    pictures = []
    for f in range(frames):
        wave = strength * math.sin(2 * math.pi * f / (frames - 1) + phase)
        changed = f > frames / 2 and strength > .5
        thing = dataclasses.replace(first, size=first.size * (1 + .4 * wave), x=first.x + .15 * wave,
                                    shape=other_shape if changed else first.shape)
        here = dataclasses.replace(scene, objects=[thing, *others])
        pictures.append(render(here, frames, at=[f])["video"])
    return torch.cat(pictures)


def swapped(video, other, strength, rng):
    """One video (F, 3, H, W) with a second mixed in, by strength, from a frame in the middle third on."""
    frames = len(video)
    start = rng.randint(frames // 3, 2 * frames // 3)
    share = strength * (torch.arange(frames) >= start).float().view(-1, 1, 1, 1)
    return (1 - share) * video + share * other


# ------------------------------------------------- what goes wrong, by strength: reconstructions and pictures

# A new one needs a branch in `damage`: `tiny validate` takes them in turn, the critic's examples at random.
DAMAGE = ("floaters", "billboard", "stretch", "holes")


def damage(reconstruction, kind, strength, generator):
    """A copy of a reconstruction with broken Gaussians. strength in [0, 1].

    floaters   points leave their surface along the ray to the middle camera
    billboard  everything slides to one distance from the middle camera (the median depth)
    stretch    splats grow along one axis
    holes      splats vanish
    """
    gaussians = reconstruction.gaussians
    poses = reconstruction.camera_to_world
    eye = poses[len(poses) // 2, :3, 3]
    ray = gaussians.means - eye
    chance = torch.rand(len(ray), generator=generator).to(ray)
    if kind == "floaters":
        leaves = (chance < .5 * strength).float()
        way = leaves * torch.rand(len(ray), generator=generator).to(ray) * .7
        changed = dict(means=eye + ray * (1 - way)[:, None])
    elif kind == "billboard":
        flat = reconstruction.depth.median() / ray.norm(dim=1)
        changed = dict(means=eye + ray * (1 + strength * (flat - 1))[:, None])
    elif kind == "stretch":
        changed = dict(scales=gaussians.scales * torch.tensor([1 + 12 * strength, 1, 1]).to(ray))
    elif kind == "holes":
        changed = dict(opacities=gaussians.opacities * (chance > .9 * strength))
    else:
        raise ValueError(f"kind must be one of {', '.join(DAMAGE)}, got '{kind}'")
    return dataclasses.replace(reconstruction, gaussians=dataclasses.replace(gaussians, **changed))


DEGRADATIONS = ("blur", "noise", "colour", "fade")


def degrade(image, kind, strength, generator):
    """An uglier copy of an image (3, H, W): blurred, noisy, colour-shifted or washed out. strength in [0,
    1]."""
    if kind == "blur":
        x = torch.arange(-6, 7.0)
        kernel = torch.exp(-x * x / (2 * (.3 + 2.5 * strength) ** 2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        padded = F.pad(image[None], (6, 6, 6, 6), mode="replicate")
        blurred = F.conv2d(padded, kernel, groups=3)
        return F.conv2d(blurred, kernel.mT, groups=3)[0]
    if kind == "noise":
        noise = torch.randn(image.shape, generator=generator)
        return (image + .2 * strength * noise).clamp(0, 1)
    if kind == "colour":
        shift = torch.randn(3, 1, 1, generator=generator)
        return (image + .35 * strength * (shift - shift.mean()) / shift.norm()).clamp(0, 1)
    if kind == "fade":
        return image + .8 * strength * (image.mean() - image)
    raise ValueError(f"kind must be one of {', '.join(DEGRADATIONS)}, got '{kind}'")
