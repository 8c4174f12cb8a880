import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import LoRALinear, add_lora, lora_off, lora_weights, merge_lora
from model import load_wan
from sample import generator


@pytest.fixture
def adapted(checkpoint):
    """A model with a random adapter, its plain twin, and the adapter's parameters."""
    wan = load_wan(checkpoint)
    plain = load_wan(checkpoint)
    trained = add_lora(wan.dit, 4, 8.0, generator("lora"))
    with torch.no_grad():
        for name, p in trained.items():
            if name.endswith("lora_B"):
                p.normal_(std=.1, generator=generator(name))
    return wan, plain, trained


def inputs(seed=0):
    """Arguments of a DiT: latents, time steps, text."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 2, 2, 4, generator=g)
    return x, torch.tensor([500.0, 20]), torch.randn(2, 5, 32, generator=g)


def difference(a, b):
    return (a - b).abs().max()


def test_it_starts_as_the_identity_turns_off_and_trains_alone(checkpoint, adapted):
    wan, plain, trained = adapted
    fresh = load_wan(checkpoint)
    add_lora(fresh.dit)
    assert torch.equal(fresh.dit(*inputs()), plain.dit(*inputs()))
    moved = wan.dit(*inputs())
    assert difference(moved, plain.dit(*inputs())) > 1e-3
    with lora_off(wan.dit):
        assert torch.equal(wan.dit(*inputs()), plain.dit(*inputs()))
    assert torch.equal(wan.dit(*inputs()), moved)
    assert len(trained) == 2 * 8 * len(wan.dit.blocks)
    assert all("lora" in name and p.dtype == torch.float32 for name, p in trained.items())


def test_an_error_with_the_adapter_off_turns_it_on_again(adapted):
    wan, *_ = adapted
    with pytest.raises(KeyboardInterrupt):
        with lora_off(wan.dit):
            raise KeyboardInterrupt
    assert all(m.scale == 2.0 for m in wan.dit.modules() if isinstance(m, LoRALinear))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_files_merge_back_to_the_same_model(adapted, tmp_path, layout):
    wan, plain, _ = adapted
    save_file(lora_weights(wan.dit, layout=layout), tmp_path / "lora.safetensors")
    merge_lora(plain.dit, tmp_path)
    assert difference(plain.dit(*inputs()), wan.dit(*inputs())) < 1e-5


def test_alpha_and_strength_scale_what_is_merged(adapted, checkpoint, tmp_path):
    """A file that keeps alpha apart, at half strength: the folded file's change, halved and times alpha / r."""
    wan, *_ = adapted
    folded = lora_weights(wan.dit)
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(12.0) for key in folded if "lora_A" in key}
    save_file(folded, tmp_path / "folded.safetensors")
    save_file({**folded, **alphas}, tmp_path / "apart.safetensors")
    once = merge_lora(load_wan(checkpoint).dit, tmp_path / "folded.safetensors")
    scaled = merge_lora(load_wan(checkpoint).dit, tmp_path / "apart.safetensors", strength=.5)
    assert once.keys() == scaled.keys()
    for name in once:
        assert torch.allclose(scaled[name][1], once[name][1] * .5 * 12 / 4)


def test_files_that_fit_no_layer_or_are_missing_are_named(adapted, tmp_path):
    wan, plain, _ = adapted
    broken = lora_weights(wan.dit)
    broken["transformer.blocks.9.attn1.to_q.lora_A.weight"] = torch.zeros(4, 48)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="fits no layer of this model"):
        merge_lora(plain.dit, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="no LoRA file"):
        merge_lora(plain.dit, tmp_path / "none.safetensors")


def test_a_file_over_a_merged_base_holds_their_sum(adapted, checkpoint, tmp_path):
    wan, *_ = adapted
    save_file(lora_weights(wan.dit), tmp_path / "base.safetensors")
    both = load_wan(checkpoint)
    base = merge_lora(both.dit, tmp_path / "base.safetensors")
    trained = add_lora(both.dit, 2, 4.0, generator("second"))
    with torch.no_grad():
        for name, p in trained.items():
            p.normal_(std=.1, generator=generator(name, "second"))
    save_file(lora_weights(both.dit, base=base), tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    assert tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape[0] == 2 + 4
    fresh = load_wan(checkpoint)
    merge_lora(fresh.dit, tmp_path)
    assert difference(fresh.dit(*inputs()), both.dit(*inputs())) < 1e-5


def test_key_names(adapted):
    """ComfyUI's and PEFT's names, by list."""
    wan, *_ = adapted
    expected, original = set(), set()
    for i in range(2):
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for x, y in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                for matrix in "AB":
                    expected.add(f"transformer.blocks.{i}.{ours}.{x}.lora_{matrix}.weight")
                    original.add(f"diffusion_model.blocks.{i}.{theirs}.{y}.lora_{matrix}.weight")
    assert set(lora_weights(wan.dit)) == expected
    assert set(lora_weights(wan.dit, layout="original")) == original
    assert sum(isinstance(m, LoRALinear) for m in wan.dit.modules()) == 16
