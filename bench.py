"""Speed and memory against the peers, in one run on this machine; and what the large presets will need, estimated.

    python bench.py [wan] [transport] [splat] [tiny]     all four parts by default; medians, and ratios ours / theirs
    python bench.py --estimate small --gpus 8            memory per GPU by part, seconds by phase: arithmetic, no run
    python bench.py --check-memory                       the estimate's activations against measured ones, three sizes

Both sides get the same weights, inputs, threads and dtype, and take turns. Needs the "test" extra (diffusers); the slow
oracles are those of tests/. Peak memory is the growth of a fresh process's peak resident set during the call, the
median of three (Linux).
"""

import argparse
import dataclasses
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import splat
from depth_anything import SIZES, memory_estimate
from lora import add_lora
from model import DIT_SIZES, VAE, DiT, DiTConfig, VAEConfig, load_wan
from noise_warp import MOTIONS, camera_path, latent_noise, parse_motion, path_flow
from rewards import load_rewards
from sample import generator, initial_noise, model_defaults, sample
from tiny_world import random_scene, render
from train import PRESETS, ROOT, Config

sys.path.append(str(ROOT / "tests"))  # the oracles

MEDIUM_DIT = dict(num_attention_heads=6, attention_head_dim=64, ffn_dim=1536, num_layers=6, text_dim=256)
SMALL_VAE = dict(base_dim=16, num_res_blocks=1)


def compare(name, ours, theirs, repeat):
    """Times two callables in turn; prints their medians and the ratio."""
    times = [[], []]
    for turn in range(repeat + 1):
        for kept, call in zip(times, (ours, theirs)):
            start = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                kept.append(time.perf_counter() - start)
    a, b = map(statistics.median, times)
    print(f"| {name} | {a * 1e3:.0f} ms | {b * 1e3:.0f} ms | {a / b:.2f} |", flush=True)


def pair(kind):
    """Our model and diffusers' with the same random weights."""
    import diffusers
    if kind == "dit":
        ours, theirs = DiT(DiTConfig(**MEDIUM_DIT)), diffusers.WanTransformer3DModel(**MEDIUM_DIT)
        torch.nn.init.normal_(ours.proj_out.weight, std=.02)
    else:
        ours, theirs = VAE(VAEConfig(**SMALL_VAE)), diffusers.AutoencoderKLWan(**SMALL_VAE)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def peak_growth(side, frames, size=256):
    """MiB by which the resident set peaks above its start in a fresh process (Linux), while decoding `frames` frames
    (side: ours | diffusers), or transporting their noise at 480x832 and a multiple of 16 (side: transport)."""
    def resident(field):
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    if side == "transport":
        path = camera_path(["push_in"], frames)
        calls = [lambda n=n: latent_noise(path[:4 * n + 1], 4 * n + 1, 60, 104, multiple=16) for n in (0, (frames - 1) // 4)]
    else:
        ours, theirs = pair("vae")
        z = torch.randn(1, 16, (frames - 1) // 4 + 1, size // 8, size // 8)
        decode = ours.decode if side == "ours" else lambda z: theirs.decode(z).sample
        calls = [lambda: decode(z[:, :, :2, :2, :2]), lambda: decode(z)]
    with torch.no_grad():
        calls[0]()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        calls[1]()
    return resident("VmHWM") - before


def measured_peak(*arguments):
    run = [sys.executable, __file__, "--peak", *map(str, arguments)]
    return statistics.median(float(subprocess.run(run, check=True, capture_output=True, text=True).stdout) for _ in range(3))


def seconds(call, repeat=1):
    """Median time of `repeat` calls, after one to warm up where there are several."""
    times = []
    for turn in range(repeat + (repeat > 1)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[repeat > 1:])


def wan_part(repeat):
    """DiT and VAE against diffusers'."""
    print("\n| stage | ours | diffusers | ratio |\n|---|---|---|---|")
    ours, theirs = pair("dit")
    x, t, text = torch.randn(2, 16, 5, 16, 16), torch.tensor([900.0, 900.0]), torch.randn(2, 128, MEDIUM_DIT["text_dim"])
    with torch.no_grad():
        compare("DiT forward, 2 x 320 tokens", lambda: ours(x, t, text), lambda: theirs(x, t, text, return_dict=False), repeat)
    ours, theirs = pair("vae")
    z = torch.randn(2, 16, 5, 8, 8)
    with torch.no_grad():
        compare("VAE decode, 2 clips 17x64x64", lambda: ours.decode(z), lambda: theirs.decode(z), repeat)
    video = torch.rand(2, 17, 3, 64, 64)

    def train_ours():
        ours.zero_grad()
        (ours.decode_raw(ours.moments(video)[0]) - video).square().mean().backward()

    def train_theirs():
        theirs.zero_grad()
        x = video.transpose(1, 2) * 2 - 1
        (theirs.decode(theirs.encode(x).latent_dist.mode()).sample - x).square().mean().backward()

    compare("VAE training step, 2 clips 17x64x64", train_ours, train_theirs, repeat)
    print("\n| peak memory of VAE decode at 256x256 | 21 frames | 81 frames | ratio |\n|---|---|---|---|")
    for side in ("ours", "diffusers"):
        few, many = measured_peak(side, 21), measured_peak(side, 81)
        print(f"| {side} | {few:.0f} MiB | {many:.0f} MiB | {many / few:.2f} |", flush=True)


def kept_correlation(motion, multiple):
    """Mean correlation of the last latent frame's noise with frame 0's, looked up at the nearest cell along the composed
    flow; and the kurtosis of the last frame. 81 frames of 480x832, one sample."""
    path = camera_path([motion], 81)
    noise = latent_noise(path, 81, 60, 104, generator=generator(0, motion), multiple=multiple)[0]
    back = path_flow(path[[-1, 0]], 60, 104)[0]
    y, x = torch.meshgrid(torch.arange(60), torch.arange(104), indexing="ij")
    sx, sy = (x + back[0]).round().long(), (y + back[1]).round().long()
    seen = (sx >= 0) & (sx < 104) & (sy >= 0) & (sy < 60)
    first, last = noise[:, 0, sy.clamp(0, 59), sx.clamp(0, 103)][:, seen], noise[:, -1][:, seen]
    z = noise[:, -1]
    return float((first * last).mean()), float(z.pow(4).mean() / z.square().mean() ** 2)


def transport_part(repeat):
    """Noise transport against the published algorithm, literally (tests/test_noise_warp.py), and the choice of the multiple."""
    from test_noise_warp import go_with_the_flow
    path = camera_path(["push_in"], 81)
    flow = path_flow(path[::4], 60 * 16, 104 * 16)
    start = seconds(lambda: go_with_the_flow(flow[:0], 16, generator(0)))  # frame 0 alone: its draws
    literal = seconds(lambda: go_with_the_flow(flow[9:10], 16, generator(0))) - start
    print(f"\nNoise transport at 480x832, 81 frames (21 latent frames), 16 channels, multiple 16; the literal oracle's one frame took {literal:.1f} s"
          "\n\n| samples | whole call | a frame and sample | literal / ours |\n|---|---|---|---|")
    for samples in (1, 8):
        total = seconds(lambda: latent_noise(path, 81, 60, 104, samples, multiple=16))
        each = total / 20 / samples
        print(f"| {samples} | {total:.1f} s | {each:.3f} s | {literal / each:.0f} |", flush=True)
    print(f"\nPeak memory of one sample: {measured_peak('transport', 81):.0f} MiB (median of three processes)")
    tiny = camera_path(["orbit_left"], 17)
    print(f"Tiny size (17 frames, 8x8 latents), a group of 8 at the default multiple: {seconds(lambda: latent_noise(tiny, 17, 8, 8, 8), 4 * repeat) * 1e3:.1f} ms")
    print("\n| multiple | 81-frame call at 480x832 | correlation kept, mean of 10 motions | worst | kurtosis, mean |\n|---|---|---|---|---|")
    for m in (1, 2, 3, 4, 6, 8):
        took = seconds(lambda: latent_noise(path, 81, 60, 104, multiple=m))
        kept, kurtosis = zip(*[kept_correlation(motion, m) for motion in MOTIONS if motion != "fixed"])
        print(f"| {m} | {took:.2f} s | {statistics.mean(kept):.3f} | {min(kept):.3f} | {statistics.mean(kurtosis):.3f} |", flush=True)


def splat_part(repeat):
    """The PyTorch rasteriser: time at four sizes, and against the brute-force oracle (tests/test_splat.py)."""
    from test_splat import cameras, oracle, scene
    print("\n| Gaussians, 17 views of 64x64 | pixel-Gaussian pairs | seconds | ns a pair |\n|---|---|---|---|")
    rec = load_rewards().depth_anything(render(random_scene("bench", "static", 0))["video"], 9)
    poses, K = (x[[*range(9), *range(8)]] for x in (rec.camera_to_world, rec.intrinsics))
    for part in (8, 4, 2, 1):
        g = dataclasses.replace(rec.gaussians, **{f.name: getattr(rec.gaussians, f.name)[::part] for f in dataclasses.fields(rec.gaussians)})
        n = len(g.means)
        pairs = sum(int(splat.boxes(*splat.project(g.means, g.scales, g.rotations, p, k, 64, 64), g.opacities, 64, 64)[2].prod(1).sum()) for p, k in zip(poses, K))
        took = seconds(lambda: splat.render(g, poses, K, 64, 64), repeat)
        print(f"| {n:,} | {pairs:,} | {took:.2f} | {took / pairs * 1e9:.0f} |", flush=True)
    g, (poses, K) = scene(200), cameras(1, 24, 24)
    ours, theirs = seconds(lambda: splat.render(g, poses, K, 24, 24), repeat), seconds(lambda: oracle(g, poses[0], K[0], 24, 24))
    print(f"\n200 Gaussians, one view of 24x24: {ours * 1e3:.1f} ms, the brute-force oracle {theirs:.1f} s: {theirs / ours:.0f} times")


def tiny_part(repeat):
    """The shipped models: a video, a batch of 16, and the four rewards by term."""
    folder = ROOT / "tiny" / "wan"
    wan, d = load_wan(folder), model_defaults(folder)
    prompt = "orbit_left a red sphere and a blue box on a checkered green floor, yellow walls"

    def videos(count):
        noise, _ = initial_noise(wan, prompt, d["frames"], d["height"], d["width"], range(count), 0)
        latents = sample(wan, [prompt] * count, noise, d["steps"], d["guidance"])
        return [wan.vae.decode(x[None])[0] for x in latents]

    print(f"\n| tiny/wan, {d['frames']} frames, {d['steps']} steps, guidance {d['guidance']} | seconds |\n|---|---|")
    for count in (1, 16):
        print(f"| {count} video{'s' * (count > 1)}, text to pixels | {seconds(lambda: videos(count), 3):.2f} |", flush=True)
    scenes = [random_scene("bench", s, i) for s in ("static", "dynamic") for i in range(32)]
    print(f"| 64 clips rendered | {seconds(lambda: [render(s) for s in scenes], 3):.2f} |", flush=True)
    rewards, batch, path = load_rewards().load(), videos(16), camera_path(parse_motion(prompt), d["frames"])
    print("\n| 16 videos, rewards | seconds a video |\n|---|---|")
    every = dict(rewards.weights)
    for name, on in (("reconstruction and S_traj", ["traj"]), ("with S_recon", ["traj", "recon"]), ("with S_meta", ["traj", "recon", "meta"]), ("R_gen alone", ["general"]), ("all four", list(every))):
        rewards.weights = {t: float(t in on) for t in every}
        print(f"| {name} | {seconds(lambda: rewards.terms(batch, [prompt] * 16, [path] * 16)) / 16:.3f} |", flush=True)


# -------------------------------------------------------------------------------------- what the large presets will need

H200 = dict(memory=141e9, flops=989e12, link=450e9, network=50e9)  # bytes, dense bfloat16 FLOP/s, bytes/s in a node and between nodes (a GPU)
UTILISATION = .4  # of the FLOP/s; a plain assumption
TEXT = 128  # tokens of a prompt, and of the repeated padding


def dit_flops(config, tokens, text=TEXT):
    """Multiply-adds x 2 of one video's forward pass: projections, feed-forward, attention."""
    D = config.num_attention_heads * config.attention_head_dim
    layer = 2 * tokens * (6 * D * D + 2 * D * config.ffn_dim) + 4 * text * D * D + 4 * tokens * tokens * D + 4 * tokens * text * D
    return config.num_layers * layer


def activations(config, tokens, rank, bytes_, layers):
    """Bytes of a forward and backward pass over `tokens` (of all videos at once), LoRA's gradient of one block included.

    Counted per token and channel, in units of 4 bytes, with s = bytes_ / 4 for what is in the model's dtype: a block keeps
    5.6 + s (8.7 + F/D + 8 r/D) for its backward pass, which works on 2 s F/D + 0.5 more. layers: (whole, inputs): of how
    many blocks all is kept, of how many the input alone (checkpointing keeps 1 and num_layers).
    """
    D, s = config.num_attention_heads * config.attention_head_dim, bytes_ / 4
    F = config.ffn_dim / D
    block = 5.6 + s * (8.7 + F + 8 * rank / D)
    whole, inputs = layers
    return 4 * (tokens * D * (whole * block + inputs + 2 * s * F + .5) + 16 * rank * D)


def forward_bytes(config, tokens, bytes_):
    """Bytes of a forward pass without gradients: the attention's or the feed-forward's working set, whichever is larger."""
    D, s = config.num_attention_heads * config.attention_head_dim, bytes_ / 4
    return 4 * tokens * D * max(3.3 + 6 * s, 2 + 1.3 * s + 2 * s * config.ffn_dim / D)


def allocated_peak(call):
    """Peak bytes that PyTorch's CPU allocator hands out during a call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    now = top = 0
    for _, change in events:
        now += change
        top = max(top, now)
    return top


MEMORY_SIZES = {"tiny": (DiTConfig(8, 32, 768, 6, text_dim=128), 8, (5, 8, 8)), "medium": (DiTConfig(6, 64, 1536, 6, text_dim=256), 2, (5, 16, 16)),
                "wide": (DiTConfig(12, 64, 4480, 3, text_dim=256), 1, (5, 32, 32))}


def check_memory(sizes=MEMORY_SIZES, rank=32):
    """-> rows (size, dtype, pass, predicted bytes, measured bytes); prints them."""
    rows = []
    print("| model | dtype | pass | predicted | measured | ratio |\n|---|---|---|---|---|---|")
    for name, (config, videos, grid) in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            dit = DiT(config).to(dtype)
            torch.nn.init.normal_(dit.proj_out.weight, std=.02)
            add_lora(dit, rank, 2 * rank)
            x, t, text = torch.randn(videos, 16, *grid), torch.full((videos,), 900.0), torch.randn(videos, 32, config.text_dim, dtype=dtype)
            tokens, L = videos * grid[0] * grid[1] * grid[2] // 4, config.num_layers

            def backward():
                dit.zero_grad()
                dit(x, t, text).square().mean().backward()

            for kind, layers in (("forward", None), ("checkpointed", (1, L)), ("backward", (L, 0))):
                dit.checkpointing = kind == "checkpointed"
                call = torch.no_grad()(lambda: dit(x, t, text)) if kind == "forward" else backward
                call()
                dit.zero_grad()
                expected = activations(config, tokens, rank, dtype.itemsize, layers) if layers else forward_bytes(config, tokens, dtype.itemsize)
                rows.append((name, dtype, kind, expected, allocated_peak(call)))
                print(f"| {name} | {str(dtype)[6:]} | {kind} | {expected / 1e6:.1f} MB | {rows[-1][-1] / 1e6:.1f} MB | {expected / rows[-1][-1]:.2f} |", flush=True)
    return rows


def estimate(preset, gpus):
    """Memory per GPU by part and seconds by phase of one step of a preset, 81 frames of 480x832. -> (memory, seconds)

    Memory: weights by count, activations by `activations`, the VAE's by a small decode scaled by pixels. Time: FLOPs over
    UTILISATION of the peak, and FSDP's gathers of the weights over the link, one after the other (in truth they overlap).
    """
    c = Config(**PRESETS[preset] | dict(frames=81, height=480, width=832))
    config = DIT_SIZES["14B" if "14B" in c.model else "1.3B"]
    with torch.device("meta"):
        dit, vae = DiT(config), VAE(VAEConfig())
        frozen = sum(p.numel() for p in dit.parameters())
        trained = sum(p.numel() for p in add_lora(dit, c.rank, c.alpha).values())
        codec = sum(p.numel() for p in vae.parameters())
    tokens = (c.frames // 4 + 1) * (c.height // 16) * (c.width // 16)
    guided = 2 if c.guidance != 1 else 1
    at_once = tokens * (c.batch or c.members) * guided
    sharded = gpus if c.parallel == "fsdp" else 1
    small = VAE(VAEConfig()).eval()
    with torch.no_grad():
        decode = allocated_peak(lambda: small.decode(torch.randn(1, 16, 3, 8, 8))) * (c.height * c.width / 64 ** 2)
    views = memory_estimate(SIZES["da3-giant"], c.views, 504 * c.height // c.width // 14 * 14, 504)
    reward = dict(depth_anything=5.4e9 + views, critic=9e9, preference=17e9)
    memory = {"DiT, bfloat16": frozen * 2 / sharded, "gathered blocks": 2 * 2 * frozen / config.num_layers if sharded > 1 else 0,
              "LoRA, its gradient, Adam, average, float64 sums": trained * 28, "text encoder, bfloat16": 5.68e9 * 2, "VAE, float32": codec * 4,
              "update: activations": activations(config, at_once, c.rank, 2, (1, config.num_layers)), "rollout: working set": forward_bytes(config, at_once, 2),
              "decoding: working set": decode, "reward models and their work" + (" (offloaded while the policy works)" if c.offload else ""): sum(reward.values())}
    names = list(memory)
    resident = sum(memory[k] for k in names[:5])
    working, critics = max(memory[k] for k in names[5:8]), memory[names[8]]
    memory["peak"] = resident + (max(working, critics) if c.offload else working + critics)

    videos = max(1.0, c.groups / gpus) * c.members
    one = guided * dit_flops(config, tokens)
    passes = videos / (c.batch or c.members)  # each gathers all weights once
    link = H200["link"] if gpus <= 8 else H200["network"]
    gather = 2 * frozen * (sharded - 1) / sharded / link
    rate = H200["flops"] * UTILISATION
    update = c.window * (3 + bool(c.kl))  # forward, its recomputation, the backward through frozen weights, the reference's forward
    scoring = 2 * 1.36e9 * c.views * 756 + 2 * 2 * 4e9 * 600 + c.first * 2 * 7.6e9 * 600
    seconds_ = {"rollout": c.steps * (videos * one / rate + passes * gather), "reward": videos * scoring / rate,
                "update": update * (videos * one / rate + passes * gather)}
    return memory, seconds_ | {"step": sum(seconds_.values())}


def print_estimate(preset, gpus):
    memory, took = estimate(preset, gpus)
    print(f"ESTIMATE, not a measurement: preset {preset} on {gpus} H200 of {H200['memory'] / 1e9:.0f} GB, at {UTILISATION:.0%} of {H200['flops'] / 1e12:.0f} TFLOP/s\n")
    print("| memory per GPU | GB |\n|---|---|\n" + "\n".join(f"| {k} | {v / 1e9:.1f} |" for k, v in memory.items()))
    print("\n| phase of a step | seconds |\n|---|---|\n" + "\n".join(f"| {k} | {v:.0f} |" for k, v in took.items()))
    if memory["peak"] > H200["memory"]:
        print(f"\nThis does not fit: {memory['peak'] / 1e9:.0f} GB of {H200['memory'] / 1e9:.0f}. More GPUs, --parallel fsdp or --offload.")


PARTS = {"wan": wan_part, "transport": transport_part, "splat": splat_part, "tiny": tiny_part}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to time (default: all)")
    parser.add_argument("--repeat", type=int, default=7, help="timed turns; the median is shown")
    parser.add_argument("--estimate", choices=("small", "large"), help="a preset")
    parser.add_argument("--gpus", type=int, default=8, help="--estimate: how many H200")
    parser.add_argument("--check-memory", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "FRAMES"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.manual_seed(0)
    if a.peak:
        print(peak_growth(a.peak[0], int(a.peak[1])))
    elif a.estimate:
        print_estimate(a.estimate, a.gpus)
    elif a.check_memory:
        check_memory()
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        for name in a.parts or PARTS:
            try:
                with torch.no_grad() if name != "wan" else torch.enable_grad():
                    PARTS[name](a.repeat)
            except ValueError as e:  # a model that is not shipped
                print(f"bench.py: {name}: {e}", file=sys.stderr)


if __name__ == "__main__":
    main()
