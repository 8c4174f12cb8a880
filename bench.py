"""Speed and memory against the peers, in one run on this machine; and what the real presets would need.

    python bench.py [wan] [transport] [splat] [tiny]  all four parts by default; medians, ratios ours / theirs
    python bench.py --estimate node --gpus 8          memory per GPU, seconds by phase: arithmetic, no run
    python bench.py --estimate node --with --kl .004  the same with other options of train.py
    python bench.py --rehearse node --gpus 8          the step's own code at that size, without data
    python bench.py --dress small                     a true step at that size, on random weights
    python bench.py --check-memory                    the estimate's activations against allocated ones

Both sides get the same weights, inputs, threads and dtype, and take turns. Needs the "test" extra
(diffusers); the slow oracles are those of tests/. Peak memory is the growth of a fresh process's peak
resident set during the call, the median of three (Linux). Left out: timings on GPUs,
but for --dress.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import splat
from dress import dress
from estimate import (DEPTH, JUDGES, MACHINES, UTILISATION, activations, allocated_peak, estimate,
                      forward_bytes)
from lora import add_lora
from model import VAE, DiT, DiTConfig, VAEConfig, load_wan
from noise_warp import MOTIONS, camera_path, latent_noise, path_flow
from rehearse import rehearse, rehearse_depth, rehearse_devices, rehearse_judges
from rewards import TERMS, load_rewards
from sample import generator, sample_videos, sampling_of
from tiny.world import random_scene, random_scenes, render, render_all
from train import check as check_training
from train import parse_arguments as training_arguments
from weights import TINY, as_command, command_line

sys.path.append(str(Path(__file__).parent / "tests"))  # the oracles

PROMPT = "orbit_left a red sphere and a blue box on a checkered green floor, yellow walls"


# ------------------------------------------------------------------------------------------------- measuring

def elapsed(call):
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_time(call, repeat):
    """Seconds, the median of `repeat` calls, after one to warm up."""
    call()
    return statistics.median(elapsed(call) for _ in range(repeat))


def compare(name, ours, theirs, repeat):
    """Times two callables in turns, so that a slow moment falls on both; prints their row."""
    ours()
    theirs()
    turns = [(elapsed(ours), elapsed(theirs)) for _ in range(repeat)]
    our_time, their_time = (statistics.median(times) for times in zip(*turns))
    print_row(name, f"{our_time * 1e3:.0f} ms", f"{their_time * 1e3:.0f} ms", f"{our_time / their_time:.2f}")


def print_head(*columns):
    print()
    print_row(*columns)
    print("|" + "---|" * len(columns))


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


@torch.no_grad()
def peak_growth(side, frames):
    """MiB by which this process's resident set peaks above its start (Linux); it should be a fresh process.

    side: "ours" or "diffusers" decode `frames` frames of 256x256; "transport" carries noise through as many
    of 480x832, at a multiple of 16.
    """
    if side == "transport":
        path = camera_path(["push_in"], frames)

        def call(frames):
            latent_noise(path[:frames], frames, 60, 104, multiple=16)

        small, large = 1, frames
    else:
        ours, theirs = vae_pair()
        call = ours.decode if side == "ours" else theirs.decode
        large = torch.randn(1, 16, (frames - 1) // 4 + 1, 32, 32)
        small = large[:, :, :2, :2, :2]

    call(small)  # loads what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    call(large)
    return resident("VmHWM") - before


def resident(field):
    """MiB of this process's resident set: now (VmRSS) or at its peak (VmHWM)."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measured_peak(side, frames):
    """`peak_growth` in three fresh processes, the median."""
    command = [sys.executable, __file__, "--peak", side, str(frames)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
    return statistics.median(float(run.stdout) for run in runs)


# ------------------------------------------------------------------------------------ wan: against diffusers

def dit_pair():
    """Our DiT and diffusers', of a medium size, with the same random weights."""
    import diffusers
    size = dict(num_attention_heads=6, attention_head_dim=64, ffn_dim=1536, num_layers=6, text_dim=256)
    ours, theirs = DiT(DiTConfig(**size)), diffusers.WanTransformer3DModel(**size)
    torch.nn.init.normal_(ours.proj_out.weight, std=.02)  # zero at its start, and so would be the output
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def vae_pair():
    """Our VAE and diffusers', of a small size, with the same random weights."""
    import diffusers
    size = dict(base_dim=16, num_res_blocks=1)
    ours, theirs = VAE(VAEConfig(**size)), diffusers.AutoencoderKLWan(**size)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def wan_part(repeat):
    """DiT and VAE against diffusers'."""
    print_head("stage", "ours", "diffusers", "ratio")
    our_dit, their_dit = dit_pair()
    our_vae, their_vae = vae_pair()
    x, t, text = torch.randn(2, 16, 5, 16, 16), torch.full((2,), 900.0), torch.randn(2, 128, 256)
    z, video = torch.randn(2, 16, 5, 8, 8), torch.rand(2, 17, 3, 64, 64)

    def train_ours():
        our_vae.zero_grad()
        mean, _ = our_vae.moments(video)
        (our_vae.decode_raw(mean) - video).square().mean().backward()

    def train_theirs():
        their_vae.zero_grad()
        pixels = video.transpose(1, 2) * 2 - 1  # (B, 3, F, H, W) in [-1, 1]
        mean = their_vae.encode(pixels).latent_dist.mode()
        (their_vae.decode(mean).sample - pixels).square().mean().backward()

    with torch.no_grad():
        compare("DiT forward, 2 x 320 tokens", lambda: our_dit(x, t, text), lambda: their_dit(x, t, text),
                repeat)
        compare("VAE decode, 2 clips 17x64x64", lambda: our_vae.decode(z), lambda: their_vae.decode(z),
                repeat)
    compare("VAE training step, 2 clips 17x64x64", train_ours, train_theirs, repeat)

    # Memory must not grow with the length: a decoder goes through a long video in pieces.
    print_head("peak memory of VAE decode at 256x256", "21 frames", "81 frames", "ratio")
    for side in ("ours", "diffusers"):
        few, many = measured_peak(side, 21), measured_peak(side, 81)
        print_row(side, f"{few:.0f} MiB", f"{many:.0f} MiB", f"{many / few:.2f}")


# ---------------------------------------------------------------------- transport: noise along a camera path

@torch.no_grad()
def transport_part(repeat):
    """Noise transport against the published algorithm (tests/), and the choice of the multiple."""
    from test_noise_warp import go_with_the_flow
    path = camera_path(["push_in"], 81)

    # The oracle is timed on one frame of one sample, less its draws for frame 0.
    flow = path_flow(path[::4], 60 * 16, 104 * 16)
    draws = elapsed(lambda: go_with_the_flow(flow[:0], 16, generator(0)))
    literal = elapsed(lambda: go_with_the_flow(flow[9:10], 16, generator(0))) - draws
    print("\nNoise transport at 480x832, 81 frames (21 latent frames), 16 channels, multiple 16; "
          f"the literal oracle's one frame took {literal:.1f} s")
    print_head("samples", "whole call", "a frame and sample", "literal / ours")
    for samples in (1, 8):
        total = elapsed(lambda: latent_noise(path, 81, 60, 104, samples, multiple=16))
        each = total / 20 / samples  # 21 latent frames; the first is drawn, not transported
        print_row(samples, f"{total:.1f} s", f"{each:.3f} s", f"{literal / each:.0f}")
    peak = measured_peak("transport", 81)
    print(f"\nPeak memory of one sample: {peak:.0f} MiB (median of three processes)")

    tiny = camera_path(["orbit_left"], 17)
    group = median_time(lambda: latent_noise(tiny, 17, 8, 8, 8), 4 * repeat)
    print(f"Tiny size (17 frames, 8x8 latents), a group of 8 at the default multiple: {group * 1e3:.1f} ms")

    # A finer grid carries more of the noise along, at its price.
    print_head("multiple", "81-frame call at 480x832", "correlation kept, mean of 10 motions", "worst",
               "kurtosis, mean")
    for multiple in (1, 2, 3, 4, 6, 8):
        took = elapsed(lambda: latent_noise(path, 81, 60, 104, multiple=multiple))
        kept, kurtosis = zip(*[kept_correlation(motion, multiple) for motion in MOTIONS if motion != "fixed"])
        print_row(multiple, f"{took:.2f} s", f"{statistics.mean(kept):.3f}", f"{min(kept):.3f}",
                  f"{statistics.mean(kurtosis):.3f}")


def kept_correlation(motion, multiple):
    """How much of frame 0's noise is found again in the last of 81 frames of 480x832, one sample.

    -> (correlation, kurtosis of the last frame). The correlation is the mean over cells of the last latent
    frame's noise times frame 0's, looked up at the nearest cell along the composed flow; cells that were out
    of the picture are left out.
    """
    h, w = 60, 104
    path = camera_path([motion], 81)
    noise = latent_noise(path, 81, h, w, generator=generator(0, motion), multiple=multiple)[0]  # (C, T, h, w)
    last = noise[:, -1]
    back = path_flow(path[[-1, 0]], h, w)[0]  # (2, h, w), last frame -> frame 0
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    from_x, from_y = (x + back[0]).round().long(), (y + back[1]).round().long()
    seen = (from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h)
    first = noise[:, 0, from_y.clamp(0, h - 1), from_x.clamp(0, w - 1)]
    correlation = (first[:, seen] * last[:, seen]).mean()
    return float(correlation), float(last.pow(4).mean() / last.square().mean() ** 2)


# ------------------------------------------------------------------------------------- splat: the rasteriser

@torch.no_grad()
def splat_part(repeat):
    """The rasteriser on a CPU: time at four sizes, and against the brute-force oracle (tests/)."""
    from test_splat import cameras, oracle, scene
    clip = render(random_scene("bench", "static", 0))["video"]
    rec = load_rewards().depth_anything(clip, 9)
    views = [*range(9), *range(8)]  # 9 are reconstructed; 17 is a video's length
    poses, K = rec.camera_to_world[views], rec.intrinsics[views]

    print_head("Gaussians, 17 views of 64x64", "pixel-Gaussian pairs", "seconds", "ns a pair")
    for step in (8, 4, 2, 1):
        gaussians = splat.Gaussians(**{name: values[::step] for name, values in vars(rec.gaussians).items()})
        pairs = sum(pixel_pairs(gaussians, *view) for view in zip(poses, K))
        took = median_time(lambda: splat.render(gaussians, poses, K, 64, 64), repeat)
        print_row(f"{len(gaussians.means):,}", f"{pairs:,}", f"{took:.2f}", f"{took / pairs * 1e9:.0f}")

    gaussians, (poses, K) = scene(200), cameras(1, 24, 24)
    ours = median_time(lambda: splat.render(gaussians, poses, K, 24, 24), repeat)
    theirs = elapsed(lambda: oracle(gaussians, poses[0], K[0], 24, 24))
    print(f"\n200 Gaussians, one view of 24x24: {ours * 1e3:.1f} ms, the brute-force oracle {theirs:.1f} s: "
          f"{theirs / ours:.0f} times")


def pixel_pairs(g, pose, K):
    """How many pixels the Gaussians' boxes hold in a view of 64x64."""
    centre, z, covariance, _ = splat.project(g.means, g.scales, g.rotations, pose, K, 64, 64)
    _, low, high = splat.boxes(centre, z, covariance, g.opacities, 64, 64)
    return int((high - low).prod(1).sum())


# ---------------------------------------------------------------------------------- tiny: the shipped models

@torch.no_grad()
def tiny_part(repeat):
    """A video from text to pixels, a batch of 16 and the clips: medians of three; the reward terms: once."""
    wan, sampling = load_wan(TINY / "wan"), sampling_of(TINY / "wan")
    print_head(f"tiny/wan, {sampling.frames} frames, {sampling.steps} steps, guidance {sampling.guidance}",
               "seconds")
    for count in (1, 16):
        took = median_time(lambda: sample_videos(wan, [PROMPT] * count, sampling), 3)
        print_row(f"text to pixels, videos: {count}", f"{took:.2f}")
    scenes = random_scenes("bench", "static", 32) + random_scenes("bench", "dynamic", 32)
    took = median_time(lambda: render_all(scenes), 3)
    print_row("64 clips rendered", f"{took:.2f}")

    videos, paths = sample_videos(wan, [PROMPT] * 16, sampling)
    # Each term of the rewards alone, then all of them, which share one reconstruction.
    rewards = load_rewards().load()
    rewards.terms(videos[:1], [PROMPT], paths[:1])  # the first call compiles
    print_head("16 videos, rewards; a term of R_3D with its reconstruction", "seconds a video")
    for names in [[name] for name in TERMS] + [list(TERMS)]:
        rewards.weights = {name: float(name in names) for name in TERMS}
        took = elapsed(lambda: rewards.terms(videos, [PROMPT] * 16, paths))
        print_row(", ".join(TERMS[name].label for name in names), f"{took / 16:.3f}")


PARTS = {"wan": wan_part, "transport": transport_part, "splat": splat_part, "tiny": tiny_part}


# ------------------------------------------------------------------------- memory of a pass, and real size

MEMORY_SIZES = {  # config, videos, (T, h, w) of their latents
    "tiny": (DiTConfig(8, 32, 768, 6, text_dim=128), 8, (5, 8, 8)),
    "medium": (DiTConfig(6, 64, 1536, 6, text_dim=256), 2, (5, 16, 16)),
    "wide": (DiTConfig(12, 64, 4480, 3, text_dim=256), 1, (5, 32, 32)),
}


def check_memory(sizes=MEMORY_SIZES, rank=32):
    """-> rows (size, dtype, pass, predicted bytes, allocated bytes); prints them."""
    rows = []
    print_head("model", "dtype", "pass", "predicted", "allocated", "ratio")
    for name, (config, videos, (T, h, w)) in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            dit = DiT(config).to(dtype)
            torch.nn.init.normal_(dit.proj_out.weight, std=.02)
            add_lora(dit, rank, 2 * rank)
            x, t = torch.randn(videos, 16, T, h, w), torch.full((videos,), 900.0)
            text = torch.randn(videos, 32, config.text_dim, dtype=dtype)
            tokens = videos * T * h * w // 4  # patches of 1 x 2 x 2

            @torch.no_grad()
            def forward(x=x):
                dit(x, t[:len(x)], text[:len(x)])

            def backward(x=x):
                dit.zero_grad()
                dit(x, t[:len(x)], text[:len(x)]).square().mean().backward()

            # what the estimate says of each kind of pass
            L, size = config.num_layers, dtype.itemsize
            passes = {"forward": forward_bytes(config, tokens, size),
                      "checkpointed": activations(config, tokens, rank, size, (1, L)),
                      "backward": activations(config, tokens, rank, size, (L, 0))}
            # what the allocator hands out when the pass is made
            for kind, predicted in passes.items():
                dit.checkpointing = kind == "checkpointed"
                call = forward if kind == "forward" else backward
                call(x[:1, :, :1, :2, :2])  # one patch warms up
                dit.zero_grad()
                allocated = allocated_peak(call)
                rows.append((name, dtype, kind, predicted, allocated))
                print_row(name, str(dtype).removeprefix("torch."), kind, f"{predicted / 1e6:.1f} MB",
                          f"{allocated / 1e6:.1f} MB", f"{predicted / allocated:.2f}")
    return rows


def preset_config(preset, gpus=None, options=()):
    """A preset with further options of train.py -> its Config, the number of GPUs and their card."""
    card, usual = MACHINES[preset]
    gpus = usual if gpus is None else gpus
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    c = training_arguments(["--preset", preset, *options])
    check_training(c, gpus)
    batches = c.groups * c.members // (c.batch or c.members)
    if gpus > batches:  # it would count idle GPUs, for hours where there are millions
        raise ValueError(f"--gpus must be at most {batches}, the batches of a step, got {gpus}")
    return c, gpus, card


def print_estimate(preset, gpus=None, options=()):
    c, gpus, card = preset_config(preset, gpus, options)
    memory, phases = estimate(c, gpus, card)
    print(f"ESTIMATE, not a measurement: preset {' '.join([preset, *options])}, {c.frames} frames of "
          f"{c.height}x{c.width}, on {gpus} {card['name']} of {card['memory'] / 1e9:.0f} GB, "
          f"at {UTILISATION:.0%} of {card['flops'] / 1e12:.0f} TFLOP/s")
    print_head("memory per GPU (peak: all parts and the largest work)", "GB")
    for part, size in memory.items():
        print_row(part, f"{size / 1e9:.1f}")
    print_head("phase of a step; an evaluation; the run", "seconds")
    for phase, took in phases.items():
        print_row(phase, f"{took:,.1f}")
    hours = phases["run"] / 3600
    print(f"\n{c.total_steps} steps and their evaluations: {hours:,.0f} hours, {hours * gpus:,.0f} GPU hours")
    fits = "fits" if memory["peak"] <= card["memory"] else "does NOT fit"
    print(f"{memory['peak'] / 1e9:.1f} GB of {card['memory'] / 1e9:.0f}: it {fits}")


def print_rehearsal(preset, gpus=None, options=()):
    """The same from a step without data (rehearse.py). ValueError if it would not fit."""
    c, gpus, card = preset_config(preset, gpus, ["--dtype", "bfloat16", *options])
    memory, _ = estimate(c, gpus, card)

    def check_fits(size, what):
        if size > card["memory"]:
            raise ValueError(f"{what} take {size / 1e9:.1f} GB, and a {card['name']} has "
                             f"{card['memory'] / 1e9:.0f}; give --offload, --checkpointing, "
                             "a smaller --batch, or --parallel fsdp on more GPUs")

    check_fits(sum(size for part, size in memory.items() if "work" not in part and part != "peak"),
               f"the weights of {preset} alone")
    start = time.perf_counter()
    rehearse_devices(c)
    rehearse_judges()
    phases = rehearse(c, gpus)
    depth, depth_flops = rehearse_depth(c)
    print(f"TRACE of the step's own code, without data: preset {' '.join([preset, *options])}, one batch of "
          f"rank 0 of {gpus}; {time.perf_counter() - start:.0f} s")
    print_head("phase", "GB of the policy", "PFLOP")
    for phase, (peak, flops) in phases.items():
        print_row(phase, f"{peak / 1e9:.1f}", f"{flops / 1e15:.2f}")
    print_row("Depth Anything 3, its own", f"{depth / 1e9:.1f}", f"{depth_flops / 1e15:.2f}")

    # What is beside the policy: the judges, but for those that are offloaded; a gather in flight.
    held = {name: memory.get(name, 0) for name in JUDGES}
    beside = sum(held.values()) + memory["gathered blocks"] / 2
    working = {name: memory.get(f"work: {name}", 0) for name in JUDGES}
    if working[DEPTH]:  # traced, with its weights: those that are in `beside` already are taken off
        working[DEPTH] = depth - held[DEPTH]
    # The policy is at work, or only its weights are there and a judge is.
    weights, _ = phases["weights, optimiser"]
    policy_at_work = max(size for size, _ in phases.values())
    peak = beside + max(policy_at_work, weights + max(working.values()))
    print(f"\n{peak / 1e9:.1f} GB with the judges and a gather in flight (by the estimate: "
          f"{memory['peak'] / 1e9:.1f})")
    check_fits(peak, f"weights and work of {preset}")


def print_dress(preset, options=()):
    """A true step of one group on random weights, beside its trace (dress.py)."""
    c = training_arguments(["--preset", preset, *options])
    row, phases, depth = dress(preset, options)
    batches = c.members // (c.batch or c.members)
    flops = {phase: found for phase, (_, found) in phases.items()}
    traced = {"rollout": flops["rollout, decoding"], "reward": c.members * depth[1],
              "update": batches * flops["update"] + flops["optimiser step"]}
    on_gpu = c.device.startswith("cuda")
    where = torch.cuda.get_device_name(c.device) if on_gpu else f"a CPU, {torch.get_num_threads()} threads"
    print(f"DRESS REHEARSAL on {where}, {c.dtype}: preset {' '.join([preset, *options])}, one step of one "
          f"group of {c.members}, random weights; stand-ins: text encoder, critic, preference model, LPIPS")
    print_head("phase", "seconds", "TFLOP traced (reward: Depth Anything 3)", "TFLOP/s")
    for phase, seconds in row["machine"]["seconds"].items():
        found = traced.get(phase, 0) / 1e12
        print_row(phase, f"{seconds:.1f}", f"{found:.2f}", f"{found / max(seconds, .001):.3f}")
    peak, policy = row["machine"]["peak_bytes"] / 1e9, max(size for size, _ in phases.values()) / 1e9
    print(f"\npeak of the {'GPU' if on_gpu else 'process'}: {peak:.1f} GB; traced: {policy:.1f} GB of the "
          f"policy, {depth[0] / 1e9:.1f} of Depth Anything 3; {row['masked']} of {c.members} videos masked")


@as_command("bench.py")
def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, "all"), default="all", help="what to time")
    parser.add_argument("--repeat", type=int, default=7, help="timed turns; the median is shown")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--estimate", choices=MACHINES, help="a preset")
    instead.add_argument("--rehearse", choices=MACHINES, help="a preset's step at its size, without data")
    instead.add_argument("--dress", choices=MACHINES, help="a preset's step on random weights of its size")
    parser.add_argument("--gpus", type=int, help="--estimate, --rehearse: how many (default: "
                        + ", ".join(f"{name} {gpus}" for name, (_, gpus) in MACHINES.items()) + ")")
    parser.add_argument("--with", dest="options", nargs=argparse.REMAINDER, default=[],
                        help="--estimate, --rehearse, --dress: further options of train.py; the last of all")
    instead.add_argument("--check-memory", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "FRAMES"), help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    torch.manual_seed(0)
    if a.repeat < 1:
        raise ValueError(f"--repeat must be at least 1, got {a.repeat}")
    if a.peak:
        print(peak_growth(a.peak[0], int(a.peak[1])))
    elif a.estimate:
        print_estimate(a.estimate, a.gpus, a.options)
    elif a.rehearse:
        print_rehearsal(a.rehearse, a.gpus, a.options)
    elif a.dress:
        print_dress(a.dress, a.options)
    elif a.check_memory:
        check_memory()
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        for name in PARTS if "all" in a.parts else a.parts:
            PARTS[name](a.repeat)


if __name__ == "__main__":
    sys.exit(main())
