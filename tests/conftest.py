import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402
from model import VAE, DiT, DiTConfig, VAEConfig  # noqa: E402
from tiny.judges import build_critic, build_depth, build_preference, write_depth  # noqa: E402
from tiny.train import make_tokenizer, write_wan  # noqa: E402

DIT = dict(num_attention_heads=2, attention_head_dim=24, ffn_dim=56, num_layers=2, text_dim=32, in_channels=4,
           out_channels=4)
VAE_ = dict(base_dim=4, z_dim=4, num_res_blocks=2, dim_mult=(1, 2, 2, 2), latents_mean=(.1, -.2, .3, 0.),
            latents_std=(1.1, .9, 1.3, .7))
TEXT = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            dropout_rate=0.0)


@pytest.fixture(autouse=True, scope="module")
def same_numbers_for_a_file():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def loaded_once():
    """The judges of a file's tests are loaded once: they look, and change nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_depth_anything", "Critic", "Preference", "load_lpips"):
            patch.setattr(rewards, name, functools.cache(getattr(rewards, name)))
        yield


@torch.no_grad()
def randomise(model, seed=0):
    """Weights at a scale that keeps activations near 1, so that an error anywhere shows in the output."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.dim() < 2 or "table" in name or "gamma" in name:
            p.copy_(noise * .1 + (1 if "norm" in name and "bias" not in name else 0))
        else:
            p.copy_(noise / p[0].numel() ** .5)
    return model.eval()


def random_parts():
    """-> DiT, VAE, text encoder, tokenizer, all small and random."""
    tokenizer = make_tokenizer()
    text = randomise(transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(tokenizer), **TEXT)))
    return randomise(DiT(DiTConfig(**DIT))), randomise(VAE(VAEConfig(**VAE_))), text, tokenizer


def train_twice(train, file):
    """Calls train(minutes) for a moment, then again to go on from its state in `file`. -> both states

    Asks for a budget of time that the first leg has not used, so each leg takes at least one step at any speed.
    """
    train(.001)
    first = torch.load(file, weights_only=True)
    train(first["spent"] / 60 + .001)
    return first, torch.load(file, weights_only=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder in the Diffusers layout with small random models, float32."""
    folder = tmp_path_factory.mktemp("checkpoint") / "wan"
    write_wan(folder, *random_parts(), shift=3.0, dtype=torch.float32,
              sampling=dict(frames=5, height=16, width=32, steps=2, guidance=2.0, fps=8))
    # beside it a few of the tiny world's prompts, of each split: short runs need not read all 3,800
    rows = [json.loads(line) for line in (ROOT / "tiny" / "prompts.jsonl").read_text().splitlines()]
    few = []
    for split in ("train", "dynamic", "test"):
        few += [row for row in rows if row["split"] == split][-16:]
    (folder.parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    return folder


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Folders of the three critics at random weights: depth_anything, qwen3_vl, hpsv3."""
    root = tmp_path_factory.mktemp("twins")
    torch.manual_seed(0)
    write_depth(root / "depth_anything", build_depth(), torch.float32)
    build_critic(root / "qwen3_vl")
    build_preference(root / "hpsv3")
    return root
