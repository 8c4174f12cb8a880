"""Sampling: a prompt and noise become a video by integrating dx/dsigma = v(x, sigma) from sigma = 1 to 0.

    python sample.py "push_in a red sphere on a checkered green floor, yellow walls"
    python sample.py "push_in a red sphere ..." --lora tiny/web tiny/world_r1      base beside trained
    python sample.py "Camera orbit left. A hill ..." --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --device cuda

Rectified flow: x = (1 - sigma) x0 + sigma eps, the model predicts v = eps - x0. ODE solvers: Euler, and UniPC
(order 2, B2; arXiv 2302.04867), Wan's default. `transition` is the one place where a stochastic step's mean
and standard deviation are computed: sampling, log-probabilities and KL all read it.

Left out: schedulers other than these, image or video input, tiling.
"""

import dataclasses
import hashlib
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fast import trim_text
from lora import lora_file, merge_lora, read_lora
from model import load_wan
from noise_warp import camera_path, latent_noise, parse_motion, relative_to_first, released_push
from prompts import usable_prompt
from weights import TINY, as_command, command_line, config_from, read_json, written_whole


def generator(*key):
    """A CPU torch.Generator seeded by a key such as (seed, step, phase, prompt, member, purpose): no draw
    depends on another."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass
class Sampling:
    """How a model is sampled. The defaults are Wan2.1's at 480p; a model's folder may hold its own in
    sampling.json."""
    frames: int = 81  # 4k + 1
    height: int = 480  # multiples of 16
    width: int = 832
    steps: int = 50
    guidance: float = 5.0  # classifier-free guidance; 1 turns it off
    shift: float | None = None  # of the noise schedule; None: the model's scheduler_config
    fps: int = 16
    degradation: float = .35  # fresh noise mixed into the transported; World-R1's released value


# The range of an entry of Sampling, or of another option of the same name.
LIMITS = {"frames": (1, 10_000), "height": (16, 10_000), "width": (16, 10_000), "num": (1, 1000),
          "steps": (1, 1000), "guidance": (0, 100), "shift": (.01, 100), "fps": (1, 240),
          "degradation": (0, 1), "strength": (0, 10)}


def check_limits(values, where="--"):
    """ValueError for the first of {name: value} outside of its LIMITS, NaN too. None: the model's own."""
    for name, (low, high) in LIMITS.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{where}{name} must be between {low} and {high}, got {value}")


def check_size(frames, height, width, where="--"):
    """ValueError with one sentence if a video of this size cannot be made; None stands for the model's own
    value. where: what says so."""
    check_limits(dict(frames=frames, height=height, width=width), where)
    if frames is not None and frames % 4 != 1:
        raise ValueError(f"{where}frames must be 4k+1, got {frames}; try {frames // 4 * 4 + 1}")
    for name, value in (("height", height), ("width", width)):
        if value is not None and value % 16:
            nearest = max(16, round(value / 16) * 16)
            raise ValueError(f"{where}{name} must be a multiple of 16, got {value}; try {nearest}")


def sampling_of(model, **given):
    """-> the Sampling of a model (folder or hub id): its own values, over them those given that are not
    None. ValueError if one is out of range."""
    file = Path(model) / "sampling.json"
    own = config_from(Sampling, read_json(file) if file.exists() else {}, file)
    check_limits(vars(own), f"{file}: ")
    check_size(own.frames, own.height, own.width, f"{file}: ")
    check_limits(given)
    given = {name: value for name, value in given.items() if value is not None}
    sampling = dataclasses.replace(own, **given)
    check_size(sampling.frames, sampling.height, sampling.width)
    return sampling


# ----------------------------------------------------------------------------------------- the noise schedule

def sigmas(steps, shift):
    """Noise levels (steps + 1,), float32, from 1 to 0: sigma = shift u / (1 + (shift - 1) u).

    u falls evenly from 1 towards .001, as in Diffusers; where .001 would come, the last level is 0 instead.
    shift > 1 spends more steps at high noise.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a positive number, got {shift}")
    u = torch.linspace(1, .001, steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1, dtype=torch.float64)]).float()


def noise_levels(wan, steps, shift=None):
    """`sigmas` for a model. shift None takes its scheduler_config's, else 5.0 (Wan's for text-to-video)."""
    if shift is None:
        shift = wan.shift or 5.0
    return sigmas(steps, shift)


# --------------------------------------------------------------------------------------------------- one step

SDE_KINDS = ("flow", "dance", "cps")


def transition(x, v, sigma, sigma_next, eta=0.0, kind="flow"):
    """One step sigma -> sigma_next < sigma as a Gaussian. -> mean (like x), std (a 0-dim tensor), float32.

    ODE (eta 0)  mean = x - v D,  D = sigma - sigma_next
    flow         s = eta sqrt(sigma/(1-sigma)); std = s sqrt(D);
                 mean = x - [v + s^2/(2 sigma) (x + (1-sigma) v)] D
                 (Flow-GRPO, arXiv 2505.05470; at sigma = 1 the denominator takes sigma_next)
    dance        the same with s = eta (DanceGRPO, arXiv 2505.07818)
    cps          std = sigma_next sin(eta pi/2); mean = (1-sigma_next) x0 + sigma_next cos(eta pi/2) eps
                 with x0 = x - sigma v, eps = x + (1-sigma) v (Flow-CPS, arXiv 2509.05952)

    sigma, sigma_next: floats or 0-dim tensors. eta = 0 is the ODE in every kind, bit for bit. Other code
    relies on three things that hold in every kind: mean is a multiple of x plus a multiple of v
    (`grpo.rectification`); std does not depend on v (`grpo.kl`); and std > 0 where eta > 0, except that cps
    has std 0 in the step to sigma_next = 0 (`grpo.possible_windows`).
    """
    if kind not in SDE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(SDE_KINDS)}, got '{kind}'")
    x, v = x.float(), v.float()
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    sigma_next = torch.as_tensor(sigma_next, dtype=torch.float32, device=x.device)
    D = sigma - sigma_next
    if eta == 0:  # the ODE: an Euler step
        return x - v * D, torch.zeros((), device=x.device)

    x0, eps = x - sigma * v, x + (1 - sigma) * v  # what the model takes for latents and noise
    if kind == "cps":
        angle = eta * math.pi / 2
        mean = (1 - sigma_next) * x0 + sigma_next * math.cos(angle) * eps
        return mean, sigma_next * math.sin(angle)
    if kind == "dance":
        s = torch.full_like(sigma, eta)
    else:
        below_one = sigma_next if sigma == 1 else sigma  # the first step would divide by zero
        s = eta * (sigma / (1 - below_one)).sqrt()
    mean = x - (v + s * s / (2 * sigma) * eps) * D
    return mean, s * D.sqrt()


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over all but the batch dimension. -> (B,), float32.

    The mean instead of the sum keeps ratios usable at any latent size (as in Flow-GRPO).
    """
    x_next, mean, std = x_next.float(), mean.float(), torch.as_tensor(std).float()
    logp = -(x_next - mean).square() / (2 * std * std) - std.log() - .5 * math.log(2 * math.pi)
    return logp.flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------ ODE solvers

def unchanged(x, step):
    return x


def euler(velocity, x, levels, after_step=unchanged):
    """x at levels[0] -> x at levels[-1]. velocity(x, sigma) -> v. after_step(x, i) may change x after step
    i."""
    for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:])):
        x, _ = transition(x, velocity(x, sigma), sigma, sigma_next)
        x = after_step(x, i)
    return x


def unipc(velocity, x, levels, after_step=unchanged):
    """UniPC of order 2 in data prediction with B(h) = e^h - 1: each new x0 first corrects the step that led
    to it.

    With lambda = log((1-sigma)/sigma), h = lambda_next - lambda, k = expm1(-h), both parts take the form
        x_next = sigma_next/sigma x - (1-sigma_next) k [m0 + r_1 D_1 + r_2 D_2]
    with D_1 = (m_-1 - m0)/rho, rho = (lambda_-1 - lambda)/h, and in the corrector D_2 = m_next - m0.
    First and last steps are of order 1. sigma = 1 is taken as 1 - 1e-6, where lambda is finite.
    """
    levels = levels.float().clamp(max=1 - 1e-6)
    # in lambda, half the log signal-to-noise ratio, the ODE is nearly linear
    sigma = levels.double().cpu()  # the same levels, for the coefficients
    lam = ((1 - sigma) / sigma).log()  # infinite at the last: there k = -1, and a step of order 1 ends at m0
    steps = len(sigma) - 1

    def step(x, i, m0, m_prev=None, m_next=None):
        """From level i to i + 1. m_prev: the x0 before (order 2); m_next: the x0 found there (the
        corrector)."""
        h = float(lam[i + 1] - lam[i])
        k = math.expm1(-h)
        if m_prev is not None:
            rho = float(lam[i - 1] - lam[i]) / h
        if m_prev is None and m_next is None:
            change = m0
        elif m_next is None:
            change = m0 + .5 / rho * (m_prev - m0)  # r_1 = 1/2: what UniPC takes for a single difference
        elif m_prev is None:
            change = m0 + .5 * (m_next - m0)  # r_2 = 1/2, likewise
        else:
            # solve [[1, 1], [rho, 1]] r = b with b = (phi_2, 2 phi_3) / phi_1 at z = -h, where
            # phi_1 = (e^z - 1) / z, phi_2 = (phi_1 - 1) / z and phi_3 = (phi_2 - 1/2) / z
            b1 = (k / -h - 1) / k
            b2 = 2 * ((k / -h - 1) / -h - .5) / k
            r1 = (b1 - b2) / (1 - rho)
            change = m0 + r1 / rho * (m_prev - m0) + (b1 - r1) * (m_next - m0)
        return float(sigma[i + 1] / sigma[i]) * x - float(1 - sigma[i + 1]) * k * change

    # predict, then correct with what the model says at the point that was reached
    m0 = m_prev = x_before = None  # of the step before: the x0 it used, the x0 before that, where it started
    for i in range(steps):
        m = x - levels[i] * velocity(x, levels[i])  # the data prediction x0
        if i > 0:  # correct the step that led here, at its own order
            x = step(x_before, i - 1, m0, m_prev, m)
        # order 1 at the first step, which has no x0 before, and at the last, whose lambda_next is infinite
        m_prev = m0 if 0 < i < steps - 1 else None
        m0, x_before = m, x
        x = after_step(step(x, i, m0, m_prev), i)
    return x


SOLVERS = {"unipc": unipc, "euler": euler}


# ------------------------------------------------------------------------------------------------ the sampler

def guided_velocity(wan, text, negative=None, guidance=1.0):
    """-> velocity(x, sigma) with classifier-free guidance u + g (c - u), as one batched forward, combined in
    float32.

    text, negative: (B, L, D) from wan.encode_text. Without guidance (g = 1) the model runs once per sample.
    """
    guided = guidance != 1
    # of the zero tokens behind the text the last one kept counts `padding` times: the same result, faster
    text, padding = trim_text(torch.cat([text, negative]) if guided else text)

    def velocity(x, sigma):
        if guided:
            x = torch.cat([x, x])
        t = (1000 * sigma).to(x.device).expand(len(x))
        v = wan.dit(x, t, text, text_padding=padding).float()
        if not guided:
            return v
        conditional, unconditional = v.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample(wan, prompts, noise, steps=50, guidance=5.0, shift=None, solver="unipc", negative="",
           progress=False, after_step=unchanged):
    """Noise (B, C, T, h, w), N(0, 1) per element -> latents of the same shape, float32, for B prompts.

    shift: of the schedule (`noise_levels`). after_step(x, i) may change the latents after step
    i (`noise_warp.released_push`).
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got '{solver}'")
    if len(prompts) != len(noise):
        raise ValueError(f"{len(prompts)} prompts need as many noise samples, got {len(noise)}")
    # the schedule, and the velocity that the solver integrates
    levels = noise_levels(wan, steps, shift)
    unconditional = None
    if guidance != 1:
        unconditional = wan.encode_text([negative]).expand(len(prompts), -1, -1)
    velocity = guided_velocity(wan, wan.encode_text(prompts), unconditional, guidance)

    with tqdm(total=steps, desc="sample", unit="step", disable=not progress) as bar:
        def solver_velocity(x, sigma):
            if solver == "unipc":  # Diffusers' UniPC, and so the release, tells the model whole time steps
                sigma = (1000 * sigma).floor() / 1000
            v = velocity(x, sigma)
            bar.update()
            return v

        x = noise.float().to(wan.device)
        return SOLVERS[solver](solver_velocity, x, levels, after_step)


# --------------------------------------------------------------------------------- noise -> latents -> videos

def initial_noise(wan, path, height, width, generators, transport=True, degradation=0.0):
    """Noise (len(generators), C, T, h, w) for videos of height x width along a camera path (F, 4, 4), one a
    generator.

    transport: carry it along the path (World-R1); else it is white in time too. degradation: share of fresh
    noise mixed in (`noise_warp.latent_noise`).
    """
    channels, frames = wan.dit.config.in_channels, len(path)
    h, w = height // 8, width // 8
    if not transport:
        shape = (channels, (frames - 1) // 4 + 1, h, w)
        return torch.stack([torch.randn(shape, generator=g) for g in generators])
    return latent_noise(path, frames, h, w, len(generators), generators, channels, degradation)


def sample_latents(wan, prompts, sampling, seed=0, noise_ids=None, paths=None, strength=1.0,
                   transport=True, released=False, solver="unipc", negative="", progress=False):
    """One sample a prompt. -> latents (B, C, T, h, w), and the camera paths [(F, 4, 4)] that were asked for.

    noise_ids: a number for each prompt, which keys its noise beside the seed (default: its place in the
    batch; so give numbers where a sample must not depend on its batch). paths: instead of the prompts' own
    camera paths, which alone are scaled by strength.
    released: as World-R1's released code uses transport, white noise with the transported pushed in over the
    first steps.
    """
    # camera words -> path
    if paths is None:
        paths = [camera_path(parse_motion(prompt), sampling.frames, strength) for prompt in prompts]
    # path -> flow -> noise, each sample's from its own generator
    noise_ids = range(len(prompts)) if noise_ids is None else noise_ids

    def noise_of(purpose, carried):
        parts = []
        for path, number in zip(paths, noise_ids, strict=True):
            generators = [generator(seed, 0, 0, number, purpose)]  # 0, 0: no training step, no phase
            parts.append(initial_noise(wan, path, sampling.height, sampling.width, generators, carried,
                                       sampling.degradation))
        return torch.cat(parts)

    # noise -> latents
    if released:
        noise = noise_of("white", carried=False)
        after_step = released_push(noise, noise_of("noise", carried=True))
    else:
        noise, after_step = noise_of("noise", transport), unchanged
    latents = sample(wan, prompts, noise, sampling.steps, sampling.guidance, sampling.shift, solver, negative,
                     progress, after_step)
    return latents, paths


@torch.no_grad()
def decode_videos(wan, latents):
    """Latents (B, C, T, h, w) -> B videos (F, 3, H, W) in [0, 1] on the CPU. One at a time: pixels do not
    depend on the batch, and memory does not grow with it."""
    return [wan.vae.decode(x[None])[0].cpu() for x in latents]


def sample_videos(wan, prompts, sampling, seed=0, **options):
    """Noise, latents, pixels. -> videos [(F, 3, H, W)], camera paths [(F, 4, 4)]. options: of
    `sample_latents`."""
    latents, paths = sample_latents(wan, prompts, sampling, seed, **options)
    return decode_videos(wan, latents), paths


# ------------------------------------------------------------------------------------------------ video files

def as_bytes(images):
    """Images (..., 3, H, W) in [0, 1] -> uint8 array (..., H, W, 3)."""
    return (images.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def write_video(path, video, fps=16):
    """Video (F, 3, H, W) in [0, 1] -> H.264 mp4 (yuv420p, plays in browsers), written whole."""
    import imageio.v2 as iio
    from imageio_ffmpeg import count_frames_and_secs
    with written_whole(path) as part:
        iio.mimwrite(part, as_bytes(video), fps=fps, codec="libx264", pixelformat="yuv420p",
                     macro_block_size=1, output_params=["-crf", "12", "-preset", "medium"])
        # Nobody hears of it when ffmpeg fails, on a full disk for one.
        try:
            whole = count_frames_and_secs(part)[0] == len(video)
        except RuntimeError:
            whole = False
        if not whole:
            raise OSError("ffmpeg could not write all frames")


def read_video(path):
    """A video file, mp4 or mov -> (F, 3, H, W) in [0, 1], frames a second. ValueError if it is damaged or
    cut."""
    import imageio.v2 as iio
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("there is no such file")  # a pipe would hang
        # one container, as a playlist could name other files; a frame that is damaged ends the reading
        strict = ["-f", "mov", "-xerror", "-err_detect", "explode"]
        with iio.get_reader(path, format="FFMPEG", input_params=strict) as reader:
            meta = reader.get_meta_data()
            fps = meta["fps"]
            width, height = meta["size"]
            promised = meta["duration"] * fps
            check_limits(dict(frames=promised, height=height, width=width), "its ")
            frames = [torch.from_numpy(f.copy()) for f in reader]
        # sound may go on for longer than the pictures
        missing = promised - len(frames)
        if missing > (fps / 2 if "audio_codec" in meta else 1):
            raise ValueError(f"it holds {len(frames)} of its {promised:.0f} frames")
    except Exception as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(f"'{path}' cannot be read as a video ({lines[0][:120]}); give an mp4") from None
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255, fps


def evenly_spaced(frames, count=6):
    """-> the indices (count,) of evenly spaced frames, from the first to the last of `frames`; of fewer than
    count, all."""
    return torch.linspace(0, frames - 1, min(count, frames)).round().long()


def contact_sheet(path, videos, columns=6):
    """PNG with one row per video (F, 3, H, W) in [0, 1], `columns` frames each, small frames
    enlarged."""
    import imageio.v3 as iio
    rows = []
    for video in videos:
        pick = evenly_spaced(len(video), columns)
        rows.append(torch.cat(list(video[pick].float().cpu()), -1))  # (3, H, columns * W)
    sheet = as_bytes(torch.cat(rows, 1))
    scale = max(1, 1152 // sheet.shape[1])
    with written_whole(path) as part:
        part.write_bytes(iio.imwrite("<bytes>", sheet.repeat(scale, 0).repeat(scale, 1), extension=".png"))


def psnr(a, b, per_frame=True):
    """PSNR in dB of videos (F, 3, H, W) in [0, 1]: the mean over frames, identical frames counting as 100 dB,
    or (per_frame=False) one value over everything given."""
    error = (a.float() - b.float()).square()
    if not per_frame:
        return -10 * math.log10(max(error.mean().item(), 1e-10))
    return float((-10 * error.mean((1, 2, 3)).clamp_min(1e-10).log10()).mean())


# ------------------------------------------------------------------------------------------- the command line

def check(a):
    """Raises ValueError with one sentence for the first argument that cannot work; loads and writes
    nothing."""
    usable_prompt(a.prompt)
    if a.negative:
        usable_prompt(a.negative)
    check_limits(vars(a))
    check_size(a.frames, a.height, a.width)
    if a.released and not a.transport:
        raise ValueError("--released pushes transported noise in, and --no-transport asks for none; "
                         "give one of them")
    if a.path is not None and (a.strength != 1 or not a.transport):
        raise ValueError("--path is the noise's camera path, which --strength does not scale and "
                         "--no-transport leaves unused; leave one out")
    check_device(a.device)
    for lora in a.lora:
        if lora != "none":
            lora_file(lora)
    if a.out.suffix != ".mp4":
        raise ValueError(f"--out must end in .mp4, got '{a.out}'")
    for file in [*video_files(a), a.out.with_suffix(".png")]:
        check_writable(file)


def check_device(device):
    """ValueError if there is no such device."""
    try:
        known = torch.device(device)
    except RuntimeError:  # no device's name
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got '{device}'")
    gpus = torch.cuda.device_count()
    if known.type == "cuda" and (known.index or 0) >= gpus:
        raise ValueError(f"--device {device} needs a CUDA GPU, and {gpus or 'none'} is available; "
                         "use --device cpu")


def check_name(file):
    """ValueError if a file's name is not UTF-8: it could be neither printed nor read again from JSON."""
    if str(file).encode(errors="replace").decode() != str(file):
        raise ValueError(f"the name {ascii(str(file))} is not UTF-8; give another name")


def check_writable(file, option="--out"):
    """ValueError if a file could not be written there, where the option says; makes no folder."""
    check_name(file)
    folder = file.absolute().parent
    try:
        while not (folder.exists() or folder.is_symlink()):  # a link to nowhere is in a folder's way
            folder = folder.parent
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder")
        # Named as written_whole names its own, for a name that is too long.
        tempfile.NamedTemporaryFile(dir=folder, prefix=f".{file.stem}.part-", suffix=file.suffix).close()
    except OSError as e:
        raise ValueError(f"cannot write '{file}' ({e.strerror or e}); choose another {option}") from None


def check_memory(wan, sampling, num):
    """ValueError if so many videos would not fit in the memory of wan's device: a low estimate."""
    frames, height, width = sampling.frames, sampling.height, sampling.width
    dit = wan.dit.config
    dim = dit.num_attention_heads * dit.attention_head_dim
    # The largest of a block's activations, for every token of a batch; guidance doubles the batch.
    batch = num if sampling.guidance == 1 else 2 * num
    tokens = batch * ((frames + 3) // 4) * (height // 16) * (width // 16)
    of_dit = tokens * wan.dit.proj_out.weight.element_size() * (4 * dim + 2 * dit.ffn_dim)
    # The VAE's last level: at least six activations of four frames. The videos: all of them, float32.
    of_vae = 6 * 4 * 4 * wan.vae.config.base_dim * height * width
    needed = max(of_dit, of_vae) + num * frames * 3 * height * width * 4
    if wan.device.type == "cuda":
        # what is free beside the weights, and what PyTorch holds without using it
        memory = torch.cuda.mem_get_info(wan.device)[0]
        memory += torch.cuda.memory_reserved(wan.device) - torch.cuda.memory_allocated(wan.device)
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(f"{num} x {frames} frames of {height}x{width} need about {needed / 1e9:.1f} GB of "
                         f"memory, and there are {memory / 1e9:.1f}; "
                         "lower --num, --frames, --height or --width")


Row = tuple[float, float, float, float]


def read_path(file, frames):
    """A camera path from a JSON list of 4x4 camera-to-world matrices, made relative to the first."""
    matrices = read_json(file, list[tuple[Row, Row, Row, Row]])
    if len(matrices) != frames:
        raise ValueError(f"--path {file} must hold a matrix for each of {frames} frames, "
                         f"it has {len(matrices)}")
    path = torch.tensor(matrices, dtype=torch.float64)
    R = path[:, :3, :3]
    skew = (R @ R.mT - torch.eye(3)).abs().amax((1, 2))
    last = (path[:, 3] - torch.tensor([0, 0, 0, 1])).abs().amax(1)
    wrong = (skew > 1e-3) | (last > 1e-6) | (R.det() < 0) | (path.abs().amax((1, 2)) > 1e6)
    if wrong.any():
        raise ValueError(f"--path {file}: matrix {int(wrong.nonzero()[0])} is no camera-to-world pose: "
                         "it needs a rotation, a translation of at most 1e6, and the last row 0 0 0 1")
    return relative_to_first(path)


def parse_arguments(argv=None):
    parser = command_line(__doc__)
    add = parser.add_argument
    add("prompt")
    add("--model", default=str(TINY / "wan"), help="folder (either layout) or hub id")
    add("--lora", nargs="+", default=["none"], metavar="LORA",
        help="adapter file or folder, merged into the model (forms: docs/real_size.md); of several, 'none' "
             "for the model alone, the videos from one noise stand side by side")
    add("--out", type=Path, help="the mp4; a contact sheet goes beside it (default out/PROMPT_SEED.mp4)")
    add("--num", type=int, default=1, help="videos of the prompt, sampled as one batch")
    add("--seed", type=int, default=0)
    add("--frames", type=int, help="4k+1; default: the model's")
    add("--height", type=int, help="multiple of 16; default: the model's")
    add("--width", type=int, help="multiple of 16; default: the model's")
    add("--steps", type=int, help="default: the model's")
    add("--guidance", type=float, help="classifier-free guidance, 1 = off; default: the model's")
    add("--shift", type=float, help="of the noise schedule; default: the model's scheduler_config")
    add("--solver", choices=list(SOLVERS), default="unipc")
    add("--negative", default="", help="negative prompt")
    add("--no-transport", dest="transport", action="store_false",
        help="plain noise, not carried along the camera path")
    add("--released", action="store_true",
        help="as World-R1's released code: white noise, the transported pushed in over 8 steps")
    add("--strength", type=float, default=1.0, help="scales the camera path of the noise")
    add("--degradation", type=float, help="fresh noise mixed in, 0 to 1; default: the model's")
    add("--path", help="JSON list of 4x4 camera-to-world matrices, one a frame, instead of the prompt's path")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of DiT and text encoder; default bfloat16 on CUDA")
    add("--compile", action="store_true", help="torch.compile the DiT")
    a = parser.parse_args(argv)
    if a.out is None:
        slug = re.sub(r"[^a-z0-9]+", "_", a.prompt.lower()).strip("_")[:60].strip("_") or "video"
        a.out = Path("out") / f"{slug}_{a.seed}.mp4"
    if a.dtype is None:
        a.dtype = "bfloat16" if a.device.startswith("cuda") else "float32"
    return a


def video_files(a):
    """-> the command line's mp4s, one a video."""
    if a.num == 1:
        return [a.out]
    return [a.out.with_stem(f"{a.out.stem}_{i}") for i in range(a.num)]


def make_videos(a):
    """Writes the videos and their contact sheet, and prints their files."""
    # Whatever can be wrong is found before the weights are read, or at least before the first step.
    check(a)
    given = {field.name: getattr(a, field.name, None) for field in dataclasses.fields(Sampling)}
    sampling = sampling_of(a.model, **given)
    paths = [read_path(a.path, sampling.frames)] * a.num if a.path is not None else None
    columns = [videos_of_column(a, lora, sampling, paths) for lora in a.lora]

    if len(columns) > 1:
        print("left to right, and in the picture from top to bottom:", ", ".join(a.lora))
    for i, file in enumerate(video_files(a)):
        write_video(file, side_by_side([videos[i] for videos in columns]), sampling.fps)
        print(file)
    sheet = a.out.with_suffix(".png")
    contact_sheet(sheet, [videos[i] for i in range(a.num) for videos in columns])
    print(sheet)


def videos_of_column(a, lora, sampling, paths):
    """-> the command line's videos [(F, 3, H, W)] with one adapter."""
    wan = load_wan(a.model, a.device, getattr(torch, a.dtype))
    # what is wrong with the next columns' adapters is found before this one's first step
    for later in a.lora[a.lora.index(lora) + 1:]:
        if later != "none":
            read_lora(wan.dit, later)
    if lora != "none":
        merge_lora(wan.dit, lora, apart=True)
    # the text encoder is not needed any more: 11 GB of the released one
    texts = {prompt: wan.encode_text([prompt]) for prompt in (a.prompt, a.negative)}
    wan.text_encoder, wan.text_cache = None, texts.__getitem__
    check_memory(wan, sampling, a.num)
    if a.compile:
        wan.dit = torch.compile(wan.dit)
    latents, _ = sample_latents(wan, [a.prompt] * a.num, sampling, a.seed, paths=paths, strength=a.strength,
                                transport=a.transport, released=a.released, solver=a.solver,
                                negative=a.negative, progress=True)
    if not latents.isfinite().all():
        raise ValueError(f"'{a.model}' made latents that are not finite; lower --guidance, "
                         "or leave the --lora out")
    return decode_videos(wan, latents)


def side_by_side(videos, gap=4):
    """Videos of one size -> one, with white between."""
    *others, last = videos
    return torch.cat([*(F.pad(video, (0, gap), value=1.0) for video in others), last], -1)


@as_command("sample.py")
def main(argv=None):
    make_videos(parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
