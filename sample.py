"""Sampling: a prompt and noise become a video by integrating dx/dsigma = v(x, sigma) from sigma = 1 to 0.

    python sample.py "push_in a red sphere on a checkered green floor, yellow walls"
    python sample.py "Camera orbit left. A lighthouse ..." --model Wan-AI/Wan2.1-T2V-1.3B --device cuda

Rectified flow: x = (1 - sigma) x0 + sigma eps, the model predicts v = eps - x0. ODE solvers: Euler, and UniPC
(order 2, B2; arXiv 2302.04867), Wan's default. `transition` is the one place where a stochastic step's mean and
standard deviation are computed: sampling, log-probabilities and KL all read it.

Left out: schedulers other than these, image or video input, tiling.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from lora import merge_lora
from model import load_wan, trim_text
from noise_warp import camera_path, latent_noise, parse_motion, released_push

WAN_DEFAULTS = dict(frames=81, height=480, width=832, steps=50, guidance=5.0, fps=16,  # the release's, at 480p
                    degradation=.35)  # World-R1's released value


def generator(*key):
    """A CPU torch.Generator seeded by a key such as (seed, step, prompt, member, purpose): no draw depends on any other."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# -------------------------------------------------------------------------------------------------- the noise schedule

def sigmas(steps, shift):
    """Noise levels (steps + 1,), float32, from 1 to 0: sigma = shift u / (1 + (shift - 1) u).

    u runs evenly from 1 to .001, as in Diffusers, then 0. shift > 1 spends more steps at high noise.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a positive number, got {shift}")
    u = torch.linspace(1, .001, steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1, dtype=torch.float64)]).float()


# ----------------------------------------------------------------------------------------------------------- one step

def transition(x, v, sigma, sigma_next, eta=0.0, kind="flow"):
    """One step sigma -> sigma_next < sigma as a Gaussian. -> mean (like x), std (a 0-dim tensor), float32.

    ODE (eta 0)  mean = x - v D,  D = sigma - sigma_next
    flow         s = eta sqrt(sigma/(1-sigma)); mean = x - [v + s^2/(2 sigma) (x + (1-sigma) v)] D; std = s sqrt(D)
                 (Flow-GRPO, arXiv 2505.05470; at sigma = 1 the denominator takes sigma_next)
    dance        the same with s = eta (DanceGRPO, arXiv 2505.07818)
    cps          std = sigma_next sin(eta pi/2); mean = (1-sigma_next) x0 + sigma_next cos(eta pi/2) eps
                 with x0 = x - sigma v, eps = x + (1-sigma) v (Flow-CPS, arXiv 2509.05952)

    sigma, sigma_next: floats or 0-dim tensors. eta = 0 is the ODE in every kind, bit for bit.
    """
    if kind not in ("flow", "dance", "cps"):
        raise ValueError(f"kind must be flow, dance or cps, got '{kind}'")
    x, v = x.float(), v.float()
    sigma, sigma_next = (torch.as_tensor(s, dtype=torch.float32, device=x.device) for s in (sigma, sigma_next))
    step = sigma - sigma_next
    if eta == 0:
        return x - v * step, torch.zeros((), device=x.device)
    if kind == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        return (1 - sigma_next) * (x - sigma * v) + sigma_next * math.cos(eta * math.pi / 2) * (x + (1 - sigma) * v), std
    s = torch.full_like(sigma, eta)
    if kind == "flow":
        s = eta * (sigma / (1 - (sigma_next if sigma == 1 else sigma))).sqrt()
    mean = x - (v + s * s / (2 * sigma) * (x + (1 - sigma) * v)) * step
    return mean, s * step.sqrt()


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over all but the batch dimension. -> (B,), float32.

    The mean instead of the sum keeps ratios usable at any latent size (as in Flow-GRPO).
    """
    x_next, mean, std = x_next.float(), mean.float(), torch.as_tensor(std).float()
    logp = -(x_next - mean).square() / (2 * std * std) - std.log() - .5 * math.log(2 * math.pi)
    return logp.flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------- ODE solvers

def euler(velocity, x, levels, after_step=lambda x, i: x):
    """x at levels[0] -> x at levels[-1]. velocity(x, sigma) -> v. after_step(x, i) may change x after step i."""
    for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:])):
        x, _ = transition(x, velocity(x, sigma), sigma, sigma_next)
        x = after_step(x, i)
    return x


def unipc(velocity, x, levels, after_step=lambda x, i: x):
    """UniPC of order 2 in data prediction with B(h) = e^h - 1: each new x0 first corrects the step that led to it.

    With lambda = log((1-sigma)/sigma), h = lambda_next - lambda, k = expm1(-h), both parts take the form
        x_next = sigma_next/sigma x - (1-sigma_next) k [m0 + r_1 D_1 + r_2 D_2]
    with D_1 = (m_-1 - m0)/rho, rho = (lambda_-1 - lambda)/h, and in the corrector D_2 = m_next - m0.
    First and last steps are of order 1. sigma = 1 is taken as 1 - 1e-6, where lambda is finite.
    """
    levels = levels.float().clamp(max=1 - 1e-6)
    s = levels.double().cpu()
    lam = ((1 - s) / s).log()
    n = len(s) - 1

    def step(x, i, m0, m_prev=None, m_next=None):  # from level i to i + 1
        h = float(lam[i + 1] - lam[i])
        k = math.expm1(-h)
        change = m0
        rho = float(lam[i - 1] - lam[i]) / h if m_prev is not None else None
        if m_next is None:
            if m_prev is not None:
                change = m0 + .5 / rho * (m_prev - m0)
        elif m_prev is None:
            change = m0 + .5 * (m_next - m0)
        else:  # solve [[1, 1], [rho, 1]] r = b
            b1 = (k / -h - 1) / k
            b2 = 2 * ((k / -h - 1) / -h - .5) / k
            r1 = (b1 - b2) / (1 - rho)
            change = m0 + r1 / rho * (m_prev - m0) + (b1 - r1) * (m_next - m0)
        return float(s[i + 1] / s[i]) * x - float(1 - s[i + 1]) * k * change

    m_prev = m0 = last = None
    second_order = False
    for i in range(n):
        m = x - levels[i] * velocity(x, levels[i])  # the data prediction x0
        if i > 0:
            x = step(last, i - 1, m0, m_prev if second_order else None, m)
        m_prev, m0, last = m0, m, x
        second_order = 0 < i < n - 1
        x = after_step(step(x, i, m0, m_prev if second_order else None), i)
    return x


SOLVERS = {"unipc": unipc, "euler": euler}


# -------------------------------------------------------------------------------------------------------- the sampler

def guided_velocity(wan, text, negative=None, guidance=1.0):
    """-> velocity(x, sigma) with classifier-free guidance u + g (c - u), as one batched forward, combined in float32.

    text, negative: (B, L, D) from wan.encode_text. Without guidance (g = 1) the model runs once per sample.
    """
    double = guidance != 1
    text, padding = trim_text(torch.cat([text, negative]) if double else text)

    def velocity(x, sigma):
        x = torch.cat([x, x]) if double else x
        v = wan.dit(x, (1000 * sigma).to(x.device).expand(len(x)), text, text_padding=padding).float()
        if double:
            c, u = v.chunk(2)
            v = u + guidance * (c - u)
        return v

    return velocity


@torch.no_grad()
def sample(wan, prompts, noise, steps=50, guidance=5.0, shift=None, solver="unipc", negative="", progress=False, after_step=None):
    """Noise (B, C, T, h, w), N(0, 1) per element -> latents of the same shape, float32, for B prompts.

    shift: of the schedule; None takes the model's scheduler_config, else 5.0 (Wan's for text-to-video). after_step(x, i)
    may change the latents after step i (`noise_warp.released_push`).
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got '{solver}'")
    if len(prompts) != len(noise):
        raise ValueError(f"{len(prompts)} prompts need as many noise samples, got {len(noise)}")
    levels = sigmas(steps, shift if shift is not None else wan.shift or 5.0)
    negative = wan.encode_text([negative]).expand(len(prompts), -1, -1) if guidance != 1 else None
    velocity = guided_velocity(wan, wan.encode_text(prompts), negative, guidance)
    with tqdm(total=steps, desc="sample", unit="step", disable=not progress) as bar:
        def counted(x, sigma):
            if solver == "unipc":  # the release and Diffusers cut UniPC's time steps 1000 sigma to whole numbers
                sigma = (1000 * sigma).floor() / 1000
            v = velocity(x, sigma)
            bar.update()
            return v
        return SOLVERS[solver](counted, noise.float().to(wan.device), levels, *([after_step] if after_step else []))


def initial_noise(wan, prompt, frames, height, width, members, seed, transport=True, strength=1.0, degradation=0.0, path=None):
    """Noise (len(members), C, T, h, w) for a prompt, each member from its own generator. Also returns the path (F, 4, 4).

    transport: carry it along `path`, by default the prompt's camera path times strength (World-R1); else it is white
    in time too. degradation: share of fresh noise mixed in (`latent_noise`).
    """
    C, h, w = wan.dit.config.in_channels, height // 8, width // 8
    if path is None:
        path = camera_path(parse_motion(prompt), frames, strength)
    draws = [generator(seed, 0, 0, member, "noise") for member in members]
    if not transport:
        return torch.stack([torch.randn(C, (frames - 1) // 4 + 1, h, w, generator=g) for g in draws]), path
    return latent_noise(path, frames, h, w, len(draws), draws, C, degradation), path


# -------------------------------------------------------------------------------------------------------- video files

def write_video(path, video, fps=16):
    """Video (F, 3, H, W) in [0, 1] -> H.264 mp4 (yuv420p, plays in browsers), written to a temporary name and renamed."""
    import imageio.v2 as iio
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    part = Path(path).with_name(f".{Path(path).stem}.part.mp4")
    part.parent.mkdir(parents=True, exist_ok=True)
    iio.mimwrite(part, frames, fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=1,
                 output_params=["-crf", "12", "-preset", "medium"])
    part.rename(path)


def read_video(path):
    """A video file -> (F, 3, H, W) in [0, 1], frames a second."""
    import imageio.v2 as iio
    try:
        with iio.get_reader(path, format="FFMPEG") as reader:
            fps = reader.get_meta_data()["fps"]
            frames = [torch.from_numpy(f.copy()) for f in reader]
    except Exception as e:
        raise ValueError(f"'{path}' cannot be read as a video ({str(e).strip().splitlines()[0][:120] if str(e) else type(e).__name__})") from None
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255, fps


def contact_sheet(path, videos, columns=6, width=1152):
    """PNG with one row per video (F, 3, H, W) in [0, 1], `columns` frames evenly spread, small frames enlarged."""
    import imageio.v3 as iio
    rows = []
    for video in videos:
        pick = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
        rows.append(torch.cat(list(video[pick].float().cpu()), -1))
    sheet = (torch.cat(rows, 1).clamp(0, 1).permute(1, 2, 0) * 255).round().byte()
    scale = max(1, width // sheet.shape[1])
    part = Path(path).with_name(f".{Path(path).stem}.part.png")
    part.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(part, sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())
    part.rename(path)


# ----------------------------------------------------------------------------------------------------- the command line

def check(a):
    """Raises ValueError with one sentence for the first argument that cannot work; loads and writes nothing."""
    if not a.prompt.strip():
        raise ValueError('the prompt is empty; say what to show, e.g. "push_in a red sphere on a checkered green floor, yellow walls"')
    for name in ("frames", "height", "width"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be positive, got {value}")
    if a.frames is not None and a.frames % 4 != 1:
        raise ValueError(f"--frames must be 4k+1, got {a.frames}; try {a.frames // 4 * 4 + 1}")
    for name in ("height", "width"):
        value = getattr(a, name)
        if value is not None and value % 16:
            raise ValueError(f"--{name} must be a multiple of 16, got {value}; try {max(16, round(value / 16) * 16)}")
    for name in ("steps", "num"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if a.guidance is not None and not math.isfinite(a.guidance):
        raise ValueError(f"--guidance must be a finite number, got {a.guidance}; 1 turns guidance off")
    if a.released and not a.transport:
        raise ValueError("--released pushes transported noise in, and --no-transport asks for none; give one of them")
    if a.shift is not None and not (math.isfinite(a.shift) and a.shift > 0):
        raise ValueError(f"--shift must be a positive number, got {a.shift}")
    if not math.isfinite(a.strength):
        raise ValueError(f"--strength must be a finite number, got {a.strength}")
    if a.degradation is not None and not 0 <= a.degradation <= 1:
        raise ValueError(f"--degradation must be between 0 and 1, got {a.degradation}")
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU, and none is available; use --device cpu")
    if a.out.suffix != ".mp4":
        raise ValueError(f"--out must end in .mp4, got '{a.out}'")
    folder = a.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        if a.out.is_dir():
            raise IsADirectoryError(f"{a.out} is a folder")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f"cannot write '{a.out}' ({e.strerror or e}); choose another --out") from None


def read_path(file, frames):
    """A camera path from a JSON list of 4x4 camera-to-world matrices, made relative to the first."""
    try:
        path = torch.tensor(json.loads(Path(file).read_text()), dtype=torch.float64)
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"--path {file} is not a JSON list of 4x4 matrices ({str(e).splitlines()[0]})") from None
    if path.shape != (frames, 4, 4) or not path.isfinite().all():
        raise ValueError(f"--path {file} must hold {frames} finite 4x4 camera-to-world matrices, one a frame; it has shape {tuple(path.shape)}")
    return torch.linalg.inv(path[:1]) @ path


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny" / "wan"), help="folder (either layout) or hub id")
    parser.add_argument("--lora", help="LoRA file of either layout, or a training run's folder; merged into the model")
    parser.add_argument("--out", type=Path, help="the mp4; a contact sheet goes beside it (default out/PROMPT_SEED.mp4)")
    parser.add_argument("--num", type=int, default=1, help="videos of the prompt, sampled as one batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, help="4k+1; default: the model's")
    parser.add_argument("--height", type=int, help="multiple of 16; default: the model's")
    parser.add_argument("--width", type=int, help="multiple of 16; default: the model's")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 = off; default: the model's")
    parser.add_argument("--shift", type=float, help="of the noise schedule; default: the model's scheduler_config")
    parser.add_argument("--solver", choices=list(SOLVERS), default="unipc")
    parser.add_argument("--negative", default="", help="negative prompt")
    parser.add_argument("--no-transport", dest="transport", action="store_false", help="plain noise, not carried along the camera path")
    parser.add_argument("--released", action="store_true", help="as World-R1's released code: white noise, the transported pushed in over 8 steps")
    parser.add_argument("--strength", type=float, default=1.0, help="scales the camera path of the noise")
    parser.add_argument("--degradation", type=float, help="fresh noise mixed into the transported, 0 to 1; default: the model's")
    parser.add_argument("--path", help="JSON list of 4x4 camera-to-world matrices, one a frame, instead of the prompt's path")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the DiT and text encoder; default bfloat16 on CUDA")
    parser.add_argument("--compile", action="store_true", help="torch.compile the DiT")
    a = parser.parse_args(argv)
    if a.out is None:
        slug = re.sub(r"[^a-z0-9]+", "_", a.prompt.lower()).strip("_")[:60].strip("_") or "video"
        a.out = Path("out") / f"{slug}_{a.seed}.mp4"
    a.dtype = getattr(torch, a.dtype or ("bfloat16" if a.device.startswith("cuda") else "float32"))
    return a


def model_defaults(model):
    """A model's sampling defaults: Wan's, and over them those of a sampling.json in its folder (the tiny model's own)."""
    file = Path(model) / "sampling.json"
    return {**WAN_DEFAULTS, **(json.loads(file.read_text()) if file.exists() else {})}


def main(argv=None):
    a = parse_arguments(argv)
    try:
        check(a)
        path = read_path(a.path, a.frames or model_defaults(a.model)["frames"]) if a.path else None
        wan = load_wan(a.model, a.device, a.dtype)
        if a.lora:
            merge_lora(wan.dit, a.lora)
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    for name, value in model_defaults(a.model).items():
        if getattr(a, name, None) is None:
            setattr(a, name, value)
    if a.compile:
        wan.dit = torch.compile(wan.dit)
    size = (a.frames, a.height, a.width, range(a.num), a.seed)
    noise, _ = initial_noise(wan, a.prompt, *size, a.transport, a.strength, a.degradation, path)
    push = None
    if a.released:
        base, _ = initial_noise(wan, a.prompt, *size, transport=False)
        noise, push = base, released_push(base, noise)
    latents = sample(wan, [a.prompt] * a.num, noise, a.steps, a.guidance, a.shift, a.solver, a.negative, progress=True, after_step=push)
    videos = [wan.vae.decode(latent[None])[0] for latent in latents]
    for i, video in enumerate(videos):
        path = a.out if a.num == 1 else a.out.with_stem(f"{a.out.stem}_{i}")
        write_video(path, video, a.fps)
        print(path)
    contact_sheet(a.out.with_suffix(".png"), videos)
    print(a.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
