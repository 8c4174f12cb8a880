"""A dress rehearsal: one step of train.py itself, on models of the released sizes with random weights.

    python bench.py --dress small                                   on a GPU, at full size
    python bench.py --dress small --with --frames 5 --height 64 --width 96 --members 2 --views 2      on a CPU

Writes Wan's DiT and VAE and Depth Anything 3 GIANT as folders like the published ones (6 GB), trains a step
from them in a process of its own, and prints seconds and memory beside what `rehearse.py` traces. So loading,
sampling, decoding, reconstruction, update and checkpoint have run before anything is downloaded.

Stand-ins: the text encoder has one layer (of the true width), the critic and the preference model are the
tiny twins, LPIPS has a random trunk.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from depth_anything import SIZES, DepthAnything3
from grpo import deal
from model import VAE, DiT, VAEConfig, released_config
from rehearse import rehearse, rehearse_depth
from tiny.judges import write_depth
from tiny.train import write_wan
from train import check, parse_arguments
from weights import TINY


def write_models(rank, folder, model, dit, vae, depth):
    """Random weights of these configurations, as folders that train.py loads. rank: spawn's, unused."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "wan" / "tokenizer")
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=dit.text_dim, d_kv=64, d_ff=256,
                                       num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"))
    transformer = DiT(dit)
    torch.nn.init.normal_(transformer.proj_out.weight, std=.02)  # at zero nothing has a gradient
    write_wan(folder / model, transformer, VAE(vae), text, tokenizer, shift=5.0, sampling={})
    write_depth(folder / "depth_anything", DepthAnything3(depth))
    (folder / "prompts.txt").write_text("push_in a lighthouse\n")


def dress(preset, options=(), models=None):
    """One step of one group. -> its line of metrics.jsonl; the trace, {phase: (bytes, FLOPs)}, of the whole
    group's rollout and of one batch in the other phases; and (bytes, FLOPs) of Depth Anything 3 on one video.
    models: (DiT, VAE, Depth Anything 3) configurations in place of the released ones."""
    c = parse_arguments(["--preset", preset, *options])
    check(dataclasses.replace(c, groups=1), 1)  # before gigabytes are written
    model = Path(c.model).name + "-random"
    models = models or (released_config(model), VAEConfig(), SIZES["da3-giant"])
    with tempfile.TemporaryDirectory(prefix="dress_", dir=".") as scratch:
        folder = Path(scratch)
        # in a process of its own, whose memory is free again when the step is made
        torch.multiprocessing.spawn(write_models, (folder, model, *models))
        arguments = [
            "--preset", preset, *options, "--model", str(folder / model),
            "--depth-anything", str(folder / "depth_anything"), "--critic", str(TINY / "qwen3_vl"),
            "--preference", str(TINY / "hpsv3"), "--lpips", "random",
            "--prompts", str(folder / "prompts.txt"), "--runs", str(folder / "runs"), "--name", "dress",
            "--groups", "1", "--total-steps", "1", "--main-steps", "1", "--dynamic-steps", "0",
            "--eval-every", "0"]
        trained = subprocess.run([sys.executable, Path(__file__).parent / "train.py", *arguments])
        if trained.returncode:
            raise ValueError(f"train.py ended with status {trained.returncode}, for the reason above")
        row = json.loads((folder / "runs" / "dress" / "metrics.jsonl").read_text())
        c = parse_arguments(arguments)
        dit, vae, depth = models
        batches = len(deal(c, 1)[0])
        return row, rehearse(c, 1, dit, vae, rolled_out=batches), rehearse_depth(c, depth)
