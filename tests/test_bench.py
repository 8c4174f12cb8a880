"""bench.py's estimates against what is computed and allocated."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from model import DiT, DiTConfig
from train import PRESETS


def test_estimated_activations_are_what_is_allocated():
    sizes = {name: bench.MEMORY_SIZES[name] for name in ("tiny", "medium")}
    for name, dtype, kind, predicted, allocated in bench.check_memory(sizes):
        assert predicted == pytest.approx(allocated, rel=.1), (name, dtype, kind)


def test_estimated_flops_are_what_is_computed():
    config = DiTConfig(4, 32, 512, 3, text_dim=64)
    x, t, text = torch.randn(1, 16, 5, 16, 16), torch.tensor([500.0]), torch.randn(1, 96, 64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        DiT(config)(x, t, text)
    # what is left out is small: patches, time and text embeddings, the last projection
    assert bench.dit_flops(config, 320, 96) == pytest.approx(counter.get_total_flops(), rel=.05)


def test_estimates_share_the_work_and_the_weights():
    few_memory, few_seconds = bench.estimate("large", 8)
    many_memory, many_seconds = bench.estimate("large", 48)
    assert many_memory["DiT, bfloat16"] == pytest.approx(few_memory["DiT, bfloat16"] / 6)
    assert many_memory["update: activations"] == few_memory["update: activations"]
    assert many_seconds["reward"] == pytest.approx(few_seconds["reward"] / 6)
    assert many_seconds["step"] < few_seconds["step"] / 4


def test_the_small_preset_fits_an_h200():
    memory, seconds = bench.estimate("small", 8)
    assert memory["DiT, bfloat16"] == pytest.approx(2 * 1.42e9, rel=.01)
    assert PRESETS["small"]["batch"] == 1
    assert memory["peak"] < bench.H200["memory"]
    assert seconds["update"] < seconds["rollout"]


def test_an_estimate_says_what_the_whole_run_takes(capsys):
    _, seconds = bench.estimate("small", 8)
    bench.print_estimate("small", 8)
    hours = 600 * seconds["step"] / 3600
    assert f"600 steps: {hours:,.0f} hours, {8 * hours:,.0f} GPU hours" in capsys.readouterr().out
