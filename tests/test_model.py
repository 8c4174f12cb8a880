import json
import shutil

import pytest
import torch
from conftest import DIT, VAE_, randomise
from safetensors.torch import load_file, save_file

import model
from model import DIT_SIZES, VAE, DiT, DiTConfig, VAEConfig, load_dit, load_vae, load_wan, trim_text


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------------------ VAE

@pytest.mark.parametrize("frames, piece", [(1, 1), (5, 1), (9, 2), (17, 3), (33, 1)])
def test_vae_in_pieces_equals_whole(frames, piece, monkeypatch):
    vae = randomise(VAE(VAEConfig(**VAE_)))
    video = torch.rand(2, frames, 3, 16, 24)
    mean, std = vae._statistics("cpu")
    with torch.no_grad():
        whole = (vae.moments(video)[0] - mean) / std
        decoded = vae.decode_raw(whole * std + mean).clamp(0, 1)
        monkeypatch.setattr(VAE, "_pieces", lambda self, T, B, pixels: [min(piece, T - i) for i in range(0, T, piece)])
        assert whole.shape == (2, 4, 1 + (frames - 1) // 4, 2, 3) and decoded.shape == video.shape
        assert relative(vae.encode(video), whole) < 1e-5
        assert relative(vae.decode(whole), decoded) < 1e-5


def test_vae_is_causal():
    vae = randomise(VAE(VAEConfig(**VAE_)))
    video = torch.rand(1, 17, 3, 16, 16)
    later = video.clone()
    later[:, 9:] = torch.rand(1, 8, 3, 16, 16)
    with torch.no_grad():
        a, b = vae.encode(video), vae.encode(later)
        assert torch.allclose(a[:, :, :3], b[:, :, :3], atol=1e-5) and not torch.allclose(a[:, :, 3:], b[:, :, 3:], atol=1e-2)
        b[:, :, :3] = a[:, :, :3]
        x, y = vae.decode(a), vae.decode(b)
        assert torch.allclose(x[:, :9], y[:, :9], atol=1e-5) and not torch.allclose(x[:, 9:], y[:, 9:], atol=1e-3)


def test_a_lone_clip_is_as_in_a_batch():  # a batch of one takes another convolution on the CPU
    vae = randomise(VAE(VAEConfig(**VAE_)))
    z = torch.randn(2, 4, 3, 2, 3)
    both, alone = z.clone().requires_grad_(), z[:1].clone().requires_grad_()
    a, b = vae.decode_raw(both), vae.decode_raw(alone)
    assert relative(b[0], a[0]) < 1e-5
    a[0].square().sum().backward()
    weights = [p.grad.clone() for p in vae.decoder.parameters()]
    vae.zero_grad()
    b.square().sum().backward()
    assert relative(alone.grad[0], both.grad[0]) < 1e-5
    assert all(relative(p.grad, w) < 1e-4 for p, w in zip(vae.decoder.parameters(), weights) if w.norm() > 1e-3)


def test_vae_refuses_wrong_shapes():
    vae = VAE(VAEConfig(**VAE_))
    for shape in ((1, 4, 3, 16, 16), (1, 5, 3, 16, 20)):
        with pytest.raises(ValueError, match="4k\\+1 frames and sides that are multiples of 8"):
            vae.encode(torch.rand(shape))


def test_channel_norm_gradient():
    x = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def slow(x, gamma):
        return torch.nn.functional.normalize(x, dim=1) * 5 ** .5 * gamma.view(5, 1, 1, 1)

    out, slow_out = model._RMSNorm.apply(x, gamma), slow(x, gamma)
    weights = torch.randn_like(out)
    fast_grads = torch.autograd.grad((out * weights).sum(), (x, gamma))
    slow_grads = torch.autograd.grad((slow_out * weights).sum(), (x, gamma))
    assert torch.allclose(out, slow_out, atol=1e-9)
    for a, b in zip(fast_grads, slow_grads):
        assert torch.allclose(a, b, atol=1e-9)
    assert torch.equal(model._RMSNorm.apply(torch.zeros(1, 5, 1, 1, 1), torch.ones(5)), torch.zeros(1, 5, 1, 1, 1))


# ------------------------------------------------------------------------------------------------------------ DiT

def inputs(B=2, L=20, real=7):
    g = torch.Generator().manual_seed(1)
    text = torch.randn(B, L, DIT["text_dim"], generator=g)
    text[:, real:] = 0
    return torch.randn(B, DIT["in_channels"], 3, 4, 6, generator=g), torch.tensor([900.0, 40.0])[:B], text


def test_collapsed_text_padding_is_exact():
    dit = randomise(DiT(DiTConfig(**DIT)))
    x, t, text = inputs()
    short, n = trim_text(text)
    assert short.shape[1] == 8 and n == 13
    with torch.no_grad():
        assert relative(dit(x, t, short, n), dit(x, t, text)) < 1e-5
        assert relative(dit(x, t, short[:, :7]), dit(x, t, text)) > 1e-3  # dropping the padding is not the same
    assert trim_text(torch.ones(2, 5, 3))[1] == 0


def test_samples_of_a_batch_do_not_mix():
    dit = randomise(DiT(DiTConfig(**DIT)))
    x, t, text = inputs()
    with torch.no_grad():
        both = dit(x, t, text)
        for i in range(2):
            assert relative(dit(x[i:i + 1], t[i:i + 1], text[i:i + 1]), both[i:i + 1]) < 1e-5


def test_checkpointing_gives_the_same_gradients():
    dit = randomise(DiT(DiTConfig(**DIT))).train()
    gradients = []
    for dit.checkpointing in (False, True):
        dit.zero_grad()
        dit(*inputs()).square().mean().backward()
        gradients.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_bfloat16_keeps_a_float32_residual_stream():
    dit = randomise(DiT(DiTConfig(**DIT)))
    x, t, text = inputs()
    with torch.no_grad():
        exact, rounded = dit(x, t, text), dit.to(torch.bfloat16)(x, t, text)
    assert rounded.dtype == torch.float32 and relative(rounded, exact) < .02


def test_latents_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match="do not divide into patches"):
        DiT(DiTConfig(**DIT))(torch.zeros(1, 4, 3, 5, 6), torch.ones(1), torch.zeros(1, 4, 32))


# ----------------------------------------------------------------------------------------- both published layouts

def original_dit_names(c):
    """The release's parameter names and shapes, written out from its module tree."""
    D, hidden = c.num_attention_heads * c.attention_head_dim, c.ffn_dim
    names = {"patch_embedding.weight": (D, 16, 1, 2, 2), "patch_embedding.bias": (D,), "head.modulation": (1, 2, D),
             "head.head.weight": (64, D), "head.head.bias": (64,)}

    def linear(name, out, into):
        names.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    linear("text_embedding.0", D, 4096), linear("text_embedding.2", D, D), linear("time_embedding.0", D, 256)
    linear("time_embedding.2", D, D), linear("time_projection.1", 6 * D, D)
    for i in range(c.num_layers):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{i}.{attention}.{part}", D, D)
            names.update({f"blocks.{i}.{attention}.norm_{part}.weight": (D,) for part in "qk"})
        linear(f"blocks.{i}.ffn.0", hidden, D), linear(f"blocks.{i}.ffn.2", D, hidden)
        names.update({f"blocks.{i}.norm3.weight": (D,), f"blocks.{i}.norm3.bias": (D,), f"blocks.{i}.modulation": (1, 6, D)})
    return names


@pytest.mark.parametrize("size, billions", [("1.3B", 1.419), ("14B", 14.288)])
def test_original_dit_layout_is_accounted_for(size, billions):
    with torch.device("meta"):
        dit = DiT(DIT_SIZES[size])
    ours = {model.original_dit_key(k): tuple(v.shape) for k, v in dit.state_dict().items()}
    assert ours == original_dit_names(DIT_SIZES[size])
    assert sum(p.numel() for p in dit.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_original_vae_layout_is_accounted_for():
    """The release's names are those of a flat Sequential: blocks in running order, layers by their index."""
    names = {}

    def conv(name, out, into, *kernel):
        names.update({f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)})

    def residual(name, into, out):
        names.update({f"{name}.residual.0.gamma": (into, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)})
        conv(f"{name}.residual.2", out, into, 3, 3, 3), conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", out, into, 1, 1, 1)

    def ends(name, first, last, wide):
        conv(f"{name}.conv1", *first, 3, 3, 3), conv(f"{name}.head.2", *last, 3, 3, 3)
        names[f"{name}.head.0.gamma"] = (last[1], 1, 1, 1)
        residual(f"{name}.middle.0", wide, wide), residual(f"{name}.middle.2", wide, wide)
        names[f"{name}.middle.1.norm.gamma"] = (wide, 1, 1)
        conv(f"{name}.middle.1.to_qkv", 3 * wide, wide, 1, 1), conv(f"{name}.middle.1.proj", wide, wide, 1, 1)

    conv("conv1", 32, 32, 1, 1, 1), conv("conv2", 16, 16, 1, 1, 1)
    ends("encoder", (96, 3), (32, 384), 384), ends("decoder", (384, 16), (3, 96), 384)
    index = 0
    for level, (into, out) in enumerate(((96, 96), (96, 192), (192, 384), (384, 384))):
        residual(f"encoder.downsamples.{index}", into, out), residual(f"encoder.downsamples.{index + 1}", out, out)
        if level < 3:
            conv(f"encoder.downsamples.{index + 2}.resample.1", out, out, 3, 3)
        if level in (1, 2):
            conv(f"encoder.downsamples.{index + 2}.time_conv", out, out, 3, 1, 1)
        index += 3
    index = 0
    for level, (into, out) in enumerate(((384, 384), (192, 384), (192, 192), (96, 96))):
        for j in range(3):
            residual(f"decoder.upsamples.{index + j}", out if j else into, out)
        if level < 3:
            conv(f"decoder.upsamples.{index + 3}.resample.1", out // 2, out, 3, 3)
        if level in (0, 1):
            conv(f"decoder.upsamples.{index + 3}.time_conv", 2 * out, out, 3, 1, 1)
        index += 4
    with torch.device("meta"):
        vae = VAE()
    assert {model.original_vae_key(k): tuple(v.shape) for k, v in vae.state_dict().items()} == names


def test_original_text_layout_is_accounted_for():
    import transformers
    with torch.device("meta"):
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(**model.UMT5_XXL))
    names = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for i in range(24):
        names.update({f"blocks.{i}.attn.{p}.weight": (4096, 4096) for p in "qkvo"})
        names.update({f"blocks.{i}.norm{p}.weight": (4096,) for p in "12"})
        names.update({f"blocks.{i}.pos_embedding.embedding.weight": (32, 64), f"blocks.{i}.ffn.gate.0.weight": (10240, 4096),
                      f"blocks.{i}.ffn.fc1.weight": (10240, 4096), f"blocks.{i}.ffn.fc2.weight": (4096, 10240)})
    state = {k: v for k, v in text.state_dict().items() if k != "encoder.embed_tokens.weight"}
    assert {model.original_text_key(k): tuple(v.shape) for k, v in state.items()} == names


def as_original(checkpoint, folder, monkeypatch):
    """Rewrites a Diffusers folder in the original layout."""
    wan = load_wan(checkpoint)
    folder.mkdir()
    c = wan.dit.config
    config = dict(dim=c.num_attention_heads * c.attention_head_dim, num_heads=c.num_attention_heads, ffn_dim=c.ffn_dim, freq_dim=c.freq_dim,
                  num_layers=c.num_layers, in_dim=c.in_channels, out_dim=c.out_channels, eps=c.eps, text_dim=c.text_dim, text_len=512)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({model.original_dit_key(k): v for k, v in wan.dit.state_dict().items()}, folder / "diffusion_pytorch_model.safetensors")
    torch.save({model.original_vae_key(k): v for k, v in wan.vae.state_dict().items()}, folder / "Wan2.1_VAE.pth")
    state = {model.original_text_key(k): v for k, v in wan.text_encoder.state_dict().items() if "embed_tokens" not in k}
    torch.save(state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(checkpoint / "tokenizer", folder / "google" / "umt5-xxl")
    monkeypatch.setattr(model, "UMT5_XXL", {k: v for k, v in wan.text_encoder.config.to_dict().items() if k in model.UMT5_XXL})
    monkeypatch.setattr(model.VAEConfig, "__init__", lambda self, make=VAEConfig.__init__, **k: make(self, **{**VAE_, **k}))
    return wan


def test_both_layouts_load_the_same_model(checkpoint, tmp_path, monkeypatch):
    a = as_original(checkpoint, tmp_path / "original", monkeypatch)
    b = load_wan(tmp_path / "original")
    for part in ("dit", "vae", "text_encoder"):
        x, y = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert torch.equal(a.encode_text(["a red box"]), b.encode_text(["a red box"]))
    assert (a.shift, b.shift) == (3.0, None)


def test_sharded_index_and_dtype(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint / "transformer", tmp_path / "transformer")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(state)
    halves = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2], "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({k: state[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in halves.items() for k in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    dit = load_dit(folder, dtype=torch.bfloat16)
    assert all(torch.equal(dit.state_dict()[k], state[k].bfloat16()) for k in state)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks diffusion_pytorch_model-00002-of-00002.safetensors; download"):
        load_dit(folder)


def test_text_embedding_is_padded_with_zeros_and_cleaned(checkpoint):
    wan = load_wan(checkpoint)
    text = wan.encode_text(["a red &amp;amp; box ", "a  blue sphere on a green floor"])
    assert text.shape == (2, 512, 32)
    lengths = text.abs().sum(-1).ne(0).sum(-1).tolist()
    assert lengths == [4, 8]  # words and </s>; the unknown '&' vanishes at the tokenizer's split
    assert torch.allclose(wan.encode_text(["a red & box"])[0], text[0], atol=1e-5)
    assert model.clean_prompt("a &amp;lt;b \n  c ") == "a <b c"


# ----------------------------------------------------------------------------------------------- broken checkpoints

def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def relabel(file):
    torch.save({"a": torch.zeros(2)}, file)


def drop_tensor(file):
    state = load_file(file)
    state.pop(sorted(state)[0])
    save_file(state, file)


def add_tensor(file):
    save_file({**load_file(file), "stranger": torch.zeros(2)}, file)


def reshape_tensor(file):
    state = load_file(file)
    key = next(k for k in sorted(state) if state[k].dim() > 1)
    save_file({**state, key: state[key][1:].contiguous()}, file)


@pytest.mark.parametrize("damage, message", [
    (truncate, "not a whole safetensors file"), (relabel, "not a whole safetensors file"), (drop_tensor, "lacks tensor"),
    (add_tensor, "has the unknown tensor stranger"), (reshape_tensor, "has shape .* the config asks for"),
    (lambda f: f.unlink(), "download the checkpoint again")])
@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_damaged_safetensors_are_named(checkpoint, tmp_path, damage, message, part):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    damage(folder / f"{part}.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_wan(folder)
    assert part.split("/")[0] in str(error.value) and "\n" not in str(error.value)


class Payload:
    pass


@pytest.mark.parametrize("content", [Payload(), [torch.zeros(2)], {"a": {"b": torch.zeros(2)}}, {}])
def test_pth_that_is_not_plain_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="vae.pth is not a .pth of plain tensors"):
        load_vae(tmp_path / "vae.pth")


def test_missing_and_broken_configs_are_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="vae/config.json is not valid JSON"):
        load_wan(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="vae/config.json is missing"):
        load_wan(folder)
    with pytest.raises(ValueError, match="no model folder 'nowhere'"):
        load_wan("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither transformer/"):
        load_wan(tmp_path / "empty")
