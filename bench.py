"""Speed and memory against the peers, in one run on this machine: medians, and ratios ours / theirs.

    python bench.py [--repeat 7]

Both sides get the same weights, inputs, threads and dtype, and take turns. Needs the "test" extra (diffusers).
Peak memory is the growth of a fresh process's peak resident set during the call, the median of three (Linux).
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from model import VAE, DiT, DiTConfig, VAEConfig

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
    """MiB by which the resident set peaks above its start while decoding `frames` frames (in a fresh process; Linux)."""
    def resident(field):
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    ours, theirs = pair("vae")
    z = torch.randn(1, 16, (frames - 1) // 4 + 1, size // 8, size // 8)
    decode = ours.decode if side == "ours" else lambda z: theirs.decode(z).sample
    with torch.no_grad():
        decode(z[:, :, :2, :2, :2])
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        decode(z)
    return resident("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="timed turns; the median is shown")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "FRAMES"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.manual_seed(0)
    if a.peak:
        print(peak_growth(a.peak[0], int(a.peak[1])))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n| stage | ours | diffusers | ratio |\n|---|---|---|---|")
    ours, theirs = pair("dit")
    x, t, text = torch.randn(2, 16, 5, 16, 16), torch.tensor([900.0, 900.0]), torch.randn(2, 128, MEDIUM_DIT["text_dim"])
    with torch.no_grad():
        compare("DiT forward, 2 x 320 tokens", lambda: ours(x, t, text), lambda: theirs(x, t, text, return_dict=False), a.repeat)
    ours, theirs = pair("vae")
    z = torch.randn(2, 16, 5, 8, 8)
    with torch.no_grad():
        compare("VAE decode, 2 clips 17x64x64", lambda: ours.decode(z), lambda: theirs.decode(z), a.repeat)
    video = torch.rand(2, 17, 3, 64, 64)

    def train_ours():
        ours.zero_grad()
        (ours.decode_raw(ours.moments(video)[0]) - video).square().mean().backward()

    def train_theirs():
        theirs.zero_grad()
        x = video.transpose(1, 2) * 2 - 1
        (theirs.decode(theirs.encode(x).latent_dist.mode()).sample - x).square().mean().backward()

    compare("VAE training step, 2 clips 17x64x64", train_ours, train_theirs, a.repeat)
    print("\n| peak memory of VAE decode at 256x256 | 21 frames | 81 frames | ratio |\n|---|---|---|---|")
    for side in ("ours", "diffusers"):
        def measured(n):
            run = [sys.executable, __file__, "--peak", side, str(n)]
            return statistics.median(float(subprocess.run(run, check=True, capture_output=True, text=True).stdout) for _ in range(3))
        few, many = measured(21), measured(81)
        print(f"| {side} | {few:.0f} MiB | {many:.0f} MiB | {many / few:.2f} |", flush=True)


if __name__ == "__main__":
    main()
