"""The tiny world: procedural 3D rooms with exact depth and cameras, and the commands that train the tiny twins.

A room with plain walls and a checkered floor, one or two large objects, eleven camera motions. Simple on purpose:
camera motion, geometry errors and the words of the prompt must be plain to see at 64x64. Everything is known
exactly, so each pre-trained model of World-R1 gets a *tiny twin*, the same class at a small size:

    python tiny_world.py show                    a contact sheet of clips and captions
    python tiny_world.py vae  --minutes 60       train the causal 3D VAE         -> RUN/vae
    python tiny_world.py data --clips 8192       render clips and encode them    -> RUN/data
    python tiny_world.py dit  --minutes 90       train the DiT and text encoder  -> RUN/dit
    python tiny_world.py depth --minutes 120     train Depth Anything 3            -> RUN/depth
    python tiny_world.py export                  write RUN's models              -> tiny/wan
    python tiny_world.py check                   count right colours and directions over 20 samples

All commands resume from RUN (--run, default runs/tiny) and write a log and a picture every few minutes.
Left out on purpose: shadows, reflections, textures other than tiles. They cost capacity and teach nothing here.
"""

import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import splat
from depth_anything import MEAN, STD, DA3Config, DepthAnything3
from model import TEXT_LENGTH, VAE, CausalConv3d, DiT, DiTConfig, Downsample, Upsample, VAEConfig, Wan, load_wan
from noise_warp import FOV, MOTIONS, camera_path
from sample import contact_sheet, generator, initial_noise, model_defaults, sample

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


def render(scene, frames=17, height=64, width=64, supersample=2, depth=False, at=None):
    """Ray casts a scene. -> dict

    video (F, 3, H, W) in [0, 1]; poses (F, 4, 4) camera-to-world; and with depth=True also
    depth (F, H, W) z-depth and mask (F, H, W) (0 room, 1.. objects), both exact at pixel centres.
    at: indices of the frames to render, all by default. Supersampling is supersample x supersample rays a pixel.
    """
    poses = camera_path(scene.motions, frames).float()
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


# ------------------------------------------------------------------------------------------- training, what is common

def stack(clips):
    return torch.stack([c["video"] for c in clips])  # (B, F, 3, H, W)


def psnr(a, b):
    """Peak signal-to-noise ratio of two videos in [0, 1], in dB, one value over everything given."""
    return -10 * math.log10((a.float() - b.float()).square().mean().item())


def save(path, **state):
    """torch.save to a temporary name, then rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def log(run, **values):
    line = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.txt", "a") as f:
        f.write(line + "\n")
    return line


class Clock:
    """Seconds of training so far, across resumes, against a budget in minutes; drives schedules and the bar."""

    def __init__(self, minutes, spent=0.0):
        self.budget, self.spent, self.start = minutes * 60, spent, time.monotonic()

    def seconds(self):
        return self.spent + time.monotonic() - self.start

    def progress(self):
        return min(self.seconds() / self.budget, 1.0)


# --------------------------------------------------------------------------------------------------------------- VAE

TINY_VAE = dict(base_dim=16, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1, temperal_downsample=(False, True, True))


def inflate(vae):
    """Turns a VAE trained on single frames into one for clips: past slices 0, time convolutions take / repeat a frame."""
    for m in vae.modules():
        if isinstance(m, CausalConv3d) and m.kernel_size[0] == 3:
            m.weight.data[:, :, :2] = 0
        if isinstance(m, (Downsample, Upsample)) and m.time_conv is not None:
            w = m.time_conv.weight.data
            w.zero_(), m.time_conv.bias.data.zero_()
            w[:, :, 2, 0, 0] = torch.eye(w.shape[1]).repeat(w.shape[0] // w.shape[1], 1)


def train_vae(run, minutes, seed=0):
    """Single frames first (40 % of the time), then inflated to clips of 9 and 17 frames. Loss: L1 + 10 MSE + 1e-4 KL."""
    torch.manual_seed(seed)
    vae = VAE(VAEConfig(**TINY_VAE))
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(.9, .95), weight_decay=1e-4)
    step, spent, clips = 0, 0.0, False
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", weights_only=True)
        vae.load_state_dict(state["model"]), optimiser.load_state_dict(state["optimiser"])
        step, spent, clips = state["step"], state["spent"], state["clips"]
    clock = Clock(minutes, spent)
    held_out = stack([render(random_scene("held-out", s, i)) for s in ("static", "dynamic") for i in range(8)])
    last_log = clock.seconds()
    bar = tqdm(total=minutes * 60, initial=int(spent), unit="s", desc="vae")
    while clock.progress() < 1:
        if not clips and clock.progress() > .4:
            inflate(vae)
            clips = True
        long = clips and clock.progress() > .5
        frames, scenes = (17, 4) if long else (9, 8) if clips else (1, 16)
        rng = random.Random(f"vae/{seed}/{step}")
        batch = []
        for i in range(scenes):
            scene = random_scene(f"vae/{seed}", rng.choice(("static", "dynamic")), step * 16 + i)
            if clips:
                start = rng.randint(0, 17 - frames)
                batch.append(render(scene, at=range(start, start + frames))["video"])
            else:
                batch.extend(render(scene, at=rng.sample(range(17), 2))["video"][:, None])
        video = torch.stack(batch)
        lr = (3e-3 if not clips else 1.5e-3) * min(1, (step + 1) / 100) * (1 - .95 * max(0, clock.progress() - .5) / .5)
        for group in optimiser.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = vae.moments(video)
            logvar = logvar.float().clamp(-20, 10)
            z = mean.float() + torch.randn_like(logvar) * (logvar / 2).exp()
            error = vae.decode_raw(z).float() - video
        kl = .5 * (mean.float().square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 10 * error.square().mean() + 1e-4 * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        bar.update(int(clock.seconds()) - bar.n)
        if clock.seconds() - last_log > 120 or clock.progress() >= 1:
            last_log = clock.seconds()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                if clips:
                    out = torch.cat([vae.decode_raw(vae.moments(v)[0]) for v in held_out.split(4)]).float().clamp(0, 1)
                else:
                    out = vae.decode_raw(vae.moments(held_out[:, ::4].flatten(0, 1)[:, None])[0]).float().clamp(0, 1)
            true = held_out if clips else held_out[:, ::4].flatten(0, 1)[:, None]
            half = len(true) // 2
            bar.write(log(run, step=step, seconds=int(clock.seconds()), frames=frames, loss=loss.item(), kl=kl.item(),
                          grad=norm.item(), static_db=psnr(out[:half], true[:half]), dynamic_db=psnr(out[half:], true[half:])))
            if clips:
                contact_sheet(run / "sheet.png", [v for i in (0, 1, 2, 8, 9, 10) for v in (true[i], out[i])])
            save(run / "state.pt", model=vae.state_dict(), optimiser=optimiser.state_dict(), step=step,
                 spent=clock.seconds(), clips=clips)


def load_trained_vae(run):
    """The VAE of RUN/vae with the latent statistics of RUN/data, once measured."""
    state = torch.load(run / "vae" / "state.pt", weights_only=True)
    statistics = run / "data" / "statistics.json"
    statistics = json.loads(statistics.read_text()) if statistics.exists() else dict(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    vae = VAE(VAEConfig(**TINY_VAE, **{k: tuple(v) for k, v in statistics.items()}))
    vae.load_state_dict(state["model"])
    return vae.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------- DiT and text encoder

TINY_DIT = dict(num_attention_heads=8, attention_head_dim=32, ffn_dim=768, num_layers=6, text_dim=128)
TINY_TEXT = dict(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, relative_attention_num_buckets=32,
                 relative_attention_max_distance=128, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                 layer_norm_epsilon=1e-6, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
SHARD = 512  # clips a data shard


def clip_key(index):
    """Training clip `index` -> (seed, split, index) of its scene: every fourth is dynamic."""
    return "dit", "dynamic" if index % 4 == 3 else "static", index


def make_data(run, clips, seed=0):
    """Renders clips and encodes them. Writes RUN/data/statistics.json and shards of normalised float16 latents."""
    folder = run / "data"
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_trained_vae(run)
    if not (folder / "statistics.json").exists():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mu = torch.cat([vae.moments(render(random_scene(*clip_key(i)))["video"][None])[0].float() for i in range(256)])
        per_channel = mu.transpose(0, 1).flatten(1)
        (folder / "statistics.json").write_text(json.dumps(dict(latents_mean=per_channel.mean(1).tolist(),
                                                                latents_std=per_channel.std(1).tolist())))
        vae = load_trained_vae(run)
    mean, std = vae._statistics("cpu")
    for start in tqdm(range(0, clips, SHARD), desc="data", unit="shard"):
        path = folder / f"shard_{start // SHARD:04d}.safetensors"
        if path.exists():
            continue
        parts = []
        for first in range(start, start + SHARD, 4):
            video = stack([render(random_scene(*clip_key(i))) for i in range(first, first + 4)])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                parts.append(((vae.moments(video)[0].float() - mean) / std).half().contiguous())
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


def make_tokenizer():
    """Word-level tokenizer of the captions' vocabulary: lower case, spaces / underscores / punctuation separate words."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = sorted({w for s in ("static", "dynamic") for i in range(2000)
                    for w in caption(random_scene("words", s, i), random.Random(i)).lower().replace("_", " ").replace(".", " ").replace(",", " ").split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>"] + words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[^a-z0-9<>/]+"), "removed")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=TEXT_LENGTH)


def build_dit():
    """-> DiT, text encoder, tokenizer, at the tiny sizes with fresh weights."""
    import transformers
    tokenizer = make_tokenizer()
    text_encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(tokenizer), **TINY_TEXT))
    return DiT(DiTConfig(**TINY_DIT)), text_encoder, tokenizer


def training_caption(scene, rng):
    """A fresh phrasing each time; one in ten drops the camera words, one in ten is empty (for guidance)."""
    draw = rng.random()
    return "" if draw < .1 else caption(scene, rng, camera=draw > .2)


def embed(text_encoder, tokenizer, captions):
    """Like Wan.encode_text, differentiable, with the padding collapsed as `trim_text` does. -> text, text_padding"""
    tokens = tokenizer(captions, padding="longest", return_tensors="pt")
    text = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask.unsqueeze(-1)
    return F.pad(text, (0, 0, 0, 1)), TEXT_LENGTH - text.shape[1]


def train_dit(run, minutes, seed=0, batch=32):
    """Flow matching, |v - (eps - x0)|^2 with sigma = shift(sigmoid(N(0,1)), 2), on RUN/data; text encoder trained along.

    Muon for the blocks' matrices, AdamW for the rest, EMA weights for pictures and export.
    """
    torch.manual_seed(seed)
    vae = load_trained_vae(run)
    dit, text_encoder, tokenizer = build_dit()
    model = torch.nn.ModuleDict(dict(dit=dit, text=text_encoder))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ("blocks." in n or "encoder.block." in n) and "relative" not in n]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimisers = [torch.optim.Muon(matrices, lr=2e-3, weight_decay=.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=2e-3, betas=(.9, .98), weight_decay=.01)]
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    if (run / "dit" / "state.pt").exists():
        state = torch.load(run / "dit" / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
        for o, s in zip(optimisers, state["optimisers"]):
            o.load_state_dict(s)
    latents = torch.cat([load_file(p)["latents"] for p in sorted((run / "data").glob("shard_*.safetensors"))])
    scenes = [random_scene(*clip_key(i)) for i in tqdm(range(len(latents)), desc="scenes")]
    held_out = [random_scene("held-out", "static" if i % 4 < 3 else "dynamic", i) for i in range(128)]
    with torch.no_grad():
        target = vae.encode(stack([render(s) for s in held_out]))
    fixed = random.Random(0)
    held_captions = [caption(s, fixed) for s in held_out]
    levels = (torch.arange(128) + .5) / 128
    held_noise = torch.randn(target.shape, generator=generator(seed, "held-out"))
    clock, last_log, last_sheet = Clock(minutes, spent), 0.0, time.monotonic()
    bar = tqdm(total=minutes * 60, initial=int(spent), unit="s", desc="dit")

    def loss_of(x0, noise, sigma, captions):
        s = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the CPU's fused bf16 backward is slow
            text, padding = embed(text_encoder, tokenizer, captions)
            v = dit((1 - s) * x0 + s * noise, 1000 * sigma, text, padding)
        return (v.float() - (noise - x0)).square().flatten(1).mean(1)

    running = None
    while clock.progress() < 1:
        draw = generator(seed, step, "dit")
        rng = random.Random(f"{seed}/{step}")
        index = torch.randint(len(latents), (batch,), generator=draw)
        u = torch.randn(batch, generator=draw).sigmoid()
        x0 = latents[index].float()
        loss = loss_of(x0, torch.randn(x0.shape, generator=draw), 2 * u / (1 + u), [training_caption(scenes[i], rng) for i in index]).mean()
        scale = min(1, (step + 1) / 100) * (1 - .95 * max(0, clock.progress() - .4) / .6)
        for o in optimisers:
            o.zero_grad(set_to_none=True)
            o.param_groups[0]["lr"] = 2e-3 * scale
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimisers:
            o.step()
        step += 1
        running = loss.item() if running is None else .98 * running + .02 * loss.item()
        decay = min(.999, step / (step + 10))
        with torch.no_grad():
            values = list(model.state_dict().values())
            torch._foreach_lerp_(list(ema.values()), values, 1 - decay)
        bar.update(int(clock.seconds()) - bar.n)
        if clock.seconds() - last_log > 120 or clock.progress() >= 1:
            last_log = clock.seconds()
            save(run / "dit" / "state.pt", model=model.state_dict(), ema=ema, step=step, spent=clock.seconds(),
                 optimisers=[o.state_dict() for o in optimisers])
            live = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(ema)
            with torch.no_grad():
                held = loss_of(target, held_noise, levels, held_captions).mean().item()
            if time.monotonic() - last_sheet > 300 or clock.progress() >= 1:
                last_sheet = time.monotonic()
                wan = Wan(dit, vae, text_encoder, tokenizer)
                out = sample(wan, held_captions[:6], held_noise[:6], steps=20, guidance=2.0, shift=3.0)
                pictures = [v for i in range(6) for v in (render(held_out[i])["video"], vae.decode(out[i:i + 1])[0])]
                contact_sheet(run / "dit" / "sheet.png", pictures, columns=9)
            model.load_state_dict(live)
            bar.write(log(run / "dit", step=step, seconds=int(clock.seconds()), train=running, held_out=held))


def write_wan(folder, dit, vae, text_encoder, tokenizer, shift, sampling, dtype=torch.bfloat16):
    """Writes a model as a Diffusers WanPipeline folder. sampling: its defaults for sample.py (frames, steps, ...)."""
    def write(name, value):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")

    def component(name, cls, model, **fixed):
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(model.config).items()}
        write(f"{name}/config.json", {"_class_name": cls, **config, **fixed})
        save_file({k: v.to(dtype).contiguous() for k, v in model.state_dict().items()},
                  folder / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    component("vae", "AutoencoderKLWan", vae)
    component("transformer", "WanTransformer3DModel", dit, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024)
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    write("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000,
          "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2,
          "solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "final_sigmas_type": "zero"})
    write("model_index.json", {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0",
          "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
          "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
          "vae": ["diffusers", "AutoencoderKLWan"]})
    write("sampling.json", sampling)


def export(run, folder):
    """Writes RUN's models (EMA weights) as a Diffusers folder in bfloat16."""
    vae = load_trained_vae(run)
    dit, text_encoder, tokenizer = build_dit()
    state = torch.load(run / "dit" / "state.pt", weights_only=True)["ema"]
    dit.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("dit.")})
    text_encoder.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("text.")})
    write_wan(folder, dit, vae, text_encoder, tokenizer, shift=3.0,
              sampling=dict(frames=17, height=64, width=64, steps=20, guidance=2.0, fps=8, degradation=0.0))


# ----------------------------------------------------------------------------------------------------- Depth Anything

TINY_DA3 = dict(dim=128, depth=8, heads=4, out_layers=(2, 3, 5, 7), alt_start=2, features=48, out_channels=(32, 48, 64, 96),
                gaussians=True, patch_size=8, grid=8, process_res=64)


def build_depth():
    """The tiny Depth Anything, fresh: level cameras, depth near 1, splats of .6 pixels."""
    da3 = DepthAnything3(DA3Config(**TINY_DA3))
    with torch.no_grad():
        for head in (da3.head, da3.gs_head):
            head.scratch.output_conv2[-1].weight.mul_(.1)
        da3.gs_head.scratch.output_conv2[-1].bias[2:5] = -2.2
        da3.cam_dec.fc_qvec.bias.copy_(torch.tensor([0.0, 0, 0, 1]))
        da3.cam_dec.fc_fov[0].bias.fill_(FOV)
    return da3


def depth_sample(rng, vae, index, seed):
    """A static clip as the model will meet it -> input video, true video (17, 3, 64, 64), depth, poses.

    A third is round-tripped through the VAE and a sixth blurred or noisy: samples of a video model are not renders.
    """
    clip = render(random_scene(f"depth/{seed}", "static", index), depth=True)
    seen, draw = clip["video"], rng.random()
    if draw < .33:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen = vae.decode_raw(vae.moments(seen[None])[0])[0].float().clamp(0, 1)
    elif draw < .42:
        seen = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    elif draw < .5:
        seen = (seen + .05 * torch.randn(seen.shape)).clamp(0, 1)
    return seen, clip["video"], clip["depth"], clip["poses"]


def depth_losses(da3, seen, video, depth, poses, views, targets):
    """Losses of one clip from the frames `views`: depth, camera, and the re-render of the frames `targets`.

    The world is the reference view's, at the scene's own scale. Depth: |log d - log d*| weighted by the confidence c,
    minus .1 log c. Camera: L1 of positions, rotation matrices and log focals. Re-render: L1 at the true cameras.
    """
    x = (seen[views] - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    d, confidence, pose, K, gaussians = da3.network(x)
    true = torch.linalg.inv(poses[views[da3.backbone.pretrained.reference]]) @ poses
    true_K = intrinsics(*video.shape[2:])
    error = (d.log() - depth[views].log()).abs()
    losses = dict(depth=(confidence * error - .1 * confidence.log()).mean(), position=(pose - true[views])[:, :3, 3].abs().mean(),
                  rotation=(pose - true[views])[:, :3, :3].abs().mean(), focal=(K[:, 0, 0].log() - true_K[0, 0].log()).abs().mean()
                  + (K[:, 1, 1].log() - true_K[1, 1].log()).abs().mean())
    if len(targets):
        rgb, _, alpha = splat.render(gaussians, true[targets], true_K.expand(len(targets), -1, -1), *video.shape[2:])
        losses["render"] = (rgb - video[targets]).abs().mean()
    return losses


def train_depth(run, minutes, seed=0, clips=3):
    """Depth and cameras first (30 % of the time), then the Gaussians' re-render as well. 2 to 9 views a clip."""
    torch.manual_seed(seed)
    vae = load_trained_vae(run)
    da3 = build_depth()
    optimiser = torch.optim.AdamW(da3.parameters(), lr=1e-3, betas=(.9, .98), weight_decay=.01)
    ema, step, spent = {k: v.clone() for k, v in da3.state_dict().items()}, 0, 0.0
    if (run / "depth" / "state.pt").exists():
        state = torch.load(run / "depth" / "state.pt", weights_only=True)
        da3.load_state_dict(state["model"]), optimiser.load_state_dict(state["optimiser"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
    clock, last_log, mean = Clock(minutes, spent), 0.0, {}
    bar = tqdm(total=minutes * 60, initial=int(spent), unit="s", desc="depth")
    while clock.progress() < 1:
        rng = random.Random(f"depth/{seed}/{step}")
        rate = 1e-3 * min(1, (step + 1) / 200) * (1 - .95 * max(0, clock.progress() - .3) / .7)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        for i in range(clips):
            data = depth_sample(rng, vae, step * clips + i, seed)
            views = sorted(rng.sample(range(17), rng.choice((2, 3, 4, 5, 9) if clock.progress() < .3 else (2, 3, 5, 6))))
            losses = depth_losses(da3, *data, views, rng.sample(range(17), 2) if clock.progress() > .3 else [])
            total = losses["depth"] + 2 * losses["position"] + 4 * losses["rotation"] + losses["focal"] + 5 * losses.get("render", 0)
            (total / clips).backward()
            for k, v in losses.items():
                mean[k] = .98 * mean[k] + .02 * v.item() if k in mean else v.item()
        torch.nn.utils.clip_grad_norm_([p for p in da3.parameters() if p.grad is not None], 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(da3.state_dict().values()), 1 - min(.998, step / (step + 10)))
        bar.update(int(clock.seconds()) - bar.n)
        if clock.seconds() - last_log > 120 or clock.progress() >= 1:
            last_log = clock.seconds()
            save(run / "depth" / "state.pt", model=da3.state_dict(), ema=ema, step=step, spent=clock.seconds(), optimiser=optimiser.state_dict())
            live = {k: v.clone() for k, v in da3.state_dict().items()}
            da3.load_state_dict(ema)
            bar.write(log(run / "depth", step=step, seconds=int(clock.seconds()), **mean, **depth_metrics(da3, 8, run / "depth" / "sheet.png")))
            da3.load_state_dict(live)


@torch.no_grad()
def depth_metrics(da3, count, sheet=None):
    """On held-out static clips, from frames alone: re-render PSNR at the input views and at odd frames given the even
    ones (cameras halfway between their neighbours), median rotation error in degrees and direction error of the last
    frame's translation (moving cameras), depth AbsRel after median scaling."""
    import statistics
    inputs, odd, rotation, direction, absrel, rows = [], [], [], [], [], []
    for i in range(count):
        clip = render(random_scene("held-out/depth", "static", i), depth=True)
        video, (H, W) = clip["video"], clip["video"].shape[2:]
        rec = da3(video)
        seen = splat.render(rec.gaussians, rec.camera_to_world, rec.intrinsics, H, W)[0]
        inputs.append(psnr(seen, video))
        even = da3(video[::2])
        halfway = torch.stack([even.camera_to_world[:-1], even.camera_to_world[1:]]).mean(0)
        U, _, Vt = torch.linalg.svd(halfway[:, :3, :3])  # the nearest rotation to the mean
        halfway[:, :3, :3] = U @ Vt
        between = splat.render(even.gaussians, halfway, even.intrinsics[:-1], H, W)[0]
        odd.append(psnr(between, video[1::2]))
        found = torch.linalg.inv(rec.camera_to_world[:1]) @ rec.camera_to_world
        cosine = ((clip["poses"][:, :3, :3] * found[:, :3, :3]).sum((1, 2)) - 1) / 2
        rotation.append(math.degrees(cosine.clamp(-1, 1).acos()[1:].median()))
        a, b = clip["poses"][-1, :3, 3], found[-1, :3, 3]
        if a.norm() > .05:
            direction.append(math.degrees(F.cosine_similarity(a, b, dim=0).clamp(-1, 1).acos()))
        scaled = rec.depth * (clip["depth"].flatten(1).median(1).values / rec.depth.flatten(1).median(1).values)[:, None, None]
        absrel.append(((scaled - clip["depth"]).abs() / clip["depth"]).mean().item())
        rows += [video, seen]
    if sheet:
        contact_sheet(sheet, rows[:12], columns=9)
    middle = statistics.median
    return dict(input_db=statistics.mean(inputs), odd_db=statistics.mean(odd), rotation_deg=middle(rotation),
                direction_deg=middle(direction), absrel=statistics.mean(absrel))


# ----------------------------------------------------------------------------------------------------------- a check

def region_colour(region):
    """The palette colour nearest in hue to the mean of pixels (..., 3, h, w)."""
    mean = region.movedim(-3, -1).reshape(-1, 3).mean(0)
    chroma = {name: torch.tensor(c) - sum(c) / 3 for name, c in COLOURS.items()}
    own = mean - mean.mean()
    return max(chroma, key=lambda name: F.cosine_similarity(own, chroma[name], dim=0).item())


def sideways(video, reach=20):
    """Pixels the scene moves to the right from the first to the middle frame: the shift that matches them best."""
    a, b = video[0], video[len(video) // 2]
    W = a.shape[-1]

    def mismatch(s):
        return (a[..., max(0, -s):W - max(0, s)] - b[..., max(0, s):W + min(0, s)]).square().mean().item()

    return min(range(-reach, reach + 1), key=mismatch)


def check(wan, defaults, count, seed=0, rendered=False, **noise):
    """Samples unseen static captions and counts: wall colour, floor colour, left/right direction. Prints a line each.

    The colours are read off the top and bottom rows, the direction off the best sideways shift; `rendered` scores the
    renderer's own clips instead, which shows how far such crude readings can be trusted. noise: of `initial_noise`.
    """
    scenes = [random_scene(f"check/{seed}", "static", i) for i in range(count)]
    for i, scene in enumerate(scenes):  # half of them move sideways, so that the direction is counted often enough
        if i % 2:
            scene.motions = [("move_left", "move_right", "pan_left", "pan_right")[i // 2 % 4]]
            scene.caption = caption(scene, random.Random(i))
    if rendered:
        videos = [render(s)["video"] for s in scenes]
    else:
        d = defaults
        start = torch.cat([initial_noise(wan, s.caption, d["frames"], d["height"], d["width"], [i], seed, **noise)[0] for i, s in enumerate(scenes)])
        latents = [sample(wan, [s.caption for s in scenes[i:i + 20]], start[i:i + 20], d["steps"], d["guidance"], progress=True)
                   for i in range(0, count, 20)]
        videos = [wan.vae.decode(x[None])[0] for x in torch.cat(latents)]
    wall = [region_colour(v[..., :10, :]) == s.wall for v, s in zip(videos, scenes)]
    floor = [region_colour(v[..., -8:, :]) == s.floor for v, s in zip(videos, scenes)]
    moves = [(sideways(v) > 0) == s.motions[0].endswith("left") for v, s in zip(videos, scenes) if s.motions[0][:4] in ("move", "pan_") and len(s.motions) == 1]
    for name, right in (("wall colour", wall), ("floor colour", floor), ("left/right", moves)):
        print(f"{name}: {sum(right)} of {len(right)} right")
    return scenes, videos


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("show", "vae", "data", "dit", "depth", "export", "check"))
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of states, logs and pictures")
    parser.add_argument("--minutes", type=float, default=60, help="training time, over all resumes")
    parser.add_argument("--clips", type=int, default=8192, help="data: clips in all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny" / "wan", help="export: the folder written")
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny" / "wan"), help="check: the model sampled")
    parser.add_argument("--num", type=int, default=20, help="check: videos")
    parser.add_argument("--no-transport", dest="transport", action="store_false", help="check: plain noise")
    parser.add_argument("--degradation", type=float, default=0.0, help="check: fresh noise mixed in")
    parser.add_argument("--strength", type=float, default=1.0, help="check: of the noise's camera path")
    parser.add_argument("--rendered", action="store_true", help="check: score the renderer's own clips instead")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.command == "show":
        scenes = [random_scene(a.seed, s, i) for s in ("static", "dynamic") for i in range(6)]
        contact_sheet(a.run / "show.png", [render(s)["video"] for s in scenes])
        print("\n".join(s.caption for s in scenes), a.run / "show.png", sep="\n")
    elif a.command == "vae":
        train_vae(a.run / "vae", a.minutes, a.seed)
    elif a.command == "data":
        make_data(a.run, a.clips, a.seed)
    elif a.command == "dit":
        train_dit(a.run, a.minutes, a.seed)
    elif a.command == "depth":
        train_depth(a.run, a.minutes, a.seed)
    elif a.command == "export":
        export(a.run, a.out)
    elif a.command == "check":
        noise = dict(transport=a.transport, degradation=a.degradation, strength=a.strength)
        scenes, videos = check(None if a.rendered else load_wan(a.model), model_defaults(a.model), a.num, a.seed, a.rendered, **noise)
        contact_sheet(a.run / "check.png", videos)
        print("\n".join(s.caption for s in scenes), a.run / "check.png", sep="\n")


if __name__ == "__main__":
    main()
