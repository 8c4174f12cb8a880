import pytest
import torch

import bench
from model import DiT, DiTConfig
from train import PRESETS


def test_estimated_activations_are_what_is_allocated():
    sizes = {k: bench.MEMORY_SIZES[k] for k in ("tiny", "medium")}
    for name, dtype, kind, expected, found in bench.check_memory(sizes):
        assert expected == pytest.approx(found, rel=.1), (name, dtype, kind)


def test_estimated_flops_are_what_is_computed():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config = DiTConfig(4, 32, 512, 3, text_dim=64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        DiT(config)(torch.randn(1, 16, 5, 16, 16), torch.tensor([500.0]), torch.randn(1, 96, 64))
    # what is left out is small: patches, time and text embeddings, the last projection
    assert bench.dit_flops(config, 320, 96) == pytest.approx(counter.get_total_flops(), rel=.05)


def test_estimates_share_the_work_and_the_weights():
    few, many = bench.estimate("large", 8), bench.estimate("large", 48)
    assert many[0]["DiT, bfloat16"] == pytest.approx(few[0]["DiT, bfloat16"] / 6) and many[0]["update: activations"] == few[0]["update: activations"]
    assert many[1]["reward"] == pytest.approx(few[1]["reward"] / 6) and many[1]["step"] < few[1]["step"] / 4
    small = bench.estimate("small", 8)
    assert small[0]["DiT, bfloat16"] == pytest.approx(2 * 1.42e9, rel=.01) and small[1]["update"] < small[1]["rollout"]
    assert PRESETS["small"]["batch"] == 1 and small[0]["peak"] < bench.H200["memory"]
