import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DIT, ROOT, VAE_, randomise
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

import model
import texts
from model import DIT_SIZES, VAE, DiT, DiTConfig, VAEConfig, load_wan


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------------------ VAE

@pytest.mark.parametrize("frames, size", [(1, 1), (5, 1), (9, 2), (17, 3), (33, 1)])
def test_vae_in_pieces_equals_whole(frames, size, monkeypatch):
    def pieces(self, T, pixels):
        return [(start, min(start + size, T)) for start in range(0, T, size)]

    vae = randomise(VAE(VAEConfig(**VAE_)))
    video = torch.rand(2, frames, 3, 16, 24)
    with torch.no_grad():
        whole = vae.normalise(vae.moments(video)[0])
        decoded = vae.decode_raw(vae.denormalise(whole)).clamp(0, 1)
        assert whole.shape == (2, 4, 1 + (frames - 1) // 4, 2, 3)
        assert decoded.shape == video.shape
        monkeypatch.setattr(VAE, "pieces", pieces)
        assert relative(vae.encode(video), whole) < 1e-5
        assert relative(vae.decode(whole), decoded) < 1e-5


def test_pieces_cover_the_clip_and_shrink_with_the_picture():
    vae = VAE(VAEConfig(**VAE_))
    assert vae.pieces(6, 64 * 64) == [(0, 4), (4, 6)]
    assert vae.pieces(3, 480 * 832) == [(0, 1), (1, 2), (2, 3)]
    assert [model.frames_of(*piece) for piece in vae.pieces(6, 64 * 64)] == [slice(0, 13), slice(13, 21)]


def test_vae_is_causal():
    """Changing the frames after the ninth changes no latent and no frame before."""
    vae = randomise(VAE(VAEConfig(**VAE_)))
    video = torch.rand(1, 17, 3, 16, 16)
    later = video.clone()
    later[:, 9:] = torch.rand(1, 8, 3, 16, 16)
    with torch.no_grad():
        a = vae.encode(video)
        b = vae.encode(later)
        assert torch.allclose(a[:, :, :3], b[:, :, :3], atol=1e-5)
        assert not torch.allclose(a[:, :, 3:], b[:, :, 3:], atol=1e-2)
        b[:, :, :3] = a[:, :, :3]
        x = vae.decode(a)
        y = vae.decode(b)
        assert torch.allclose(x[:, :9], y[:, :9], atol=1e-5)
        assert not torch.allclose(x[:, 9:], y[:, 9:], atol=1e-3)


def test_vae_refuses_wrong_shapes():
    vae = VAE(VAEConfig(**VAE_))
    for shape in ((1, 4, 3, 16, 16), (1, 5, 3, 16, 20)):
        with pytest.raises(ValueError, match="4k\\+1 frames and sides that are multiples of 8"):
            vae.encode(torch.rand(shape))


# ------------------------------------------------------------------------------------------------------------ DiT

def inputs():
    """Latents, time steps and a text of 7 real tokens, for two samples."""
    g = torch.Generator().manual_seed(1)
    text = torch.randn(2, 20, DIT["text_dim"], generator=g)
    text[:, 7:] = 0
    x = torch.randn(2, DIT["in_channels"], 3, 4, 6, generator=g)
    return x, torch.tensor([900.0, 40.0]), text


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
        exact = dit(x, t, text)
        rounded = dit.to(torch.bfloat16)(x, t, text)
    assert rounded.dtype == torch.float32
    assert relative(rounded, exact) < .02


def test_modulation_and_gates_are_what_they_say():
    x, y = torch.randn(2, 2, 5, 8)
    shift, scale, gate = torch.randn(3, 2, 1, 8)
    assert relative(model.modulate(x, shift, scale), x * (1 + scale) + shift) < 1e-6
    assert relative(model.add_gated(x, y, gate), x + gate * y) < 1e-6


def test_positions_are_made_on_the_device_that_needs_them():
    """A copy from the CPU at every pass would make the device wait."""
    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            devices.add(out.device.type)
            return out

    devices = set()
    with Made():
        model.rope((2, 4, 4), 24, torch.device("meta"))
    assert devices == {"meta"}


def test_latents_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match="do not divide into patches"):
        DiT(DiTConfig(**DIT))(torch.zeros(1, 4, 3, 5, 6), torch.ones(1), torch.zeros(1, 4, 32))


# ----------------------------------------------------------------------------------------- both published layouts

def original_dit_names(config):
    """The release's parameter names and shapes, written out from its module tree."""
    D = config.num_attention_heads * config.attention_head_dim
    hidden = config.ffn_dim
    names = {"patch_embedding.weight": (D, 16, 1, 2, 2),
             "patch_embedding.bias": (D,),
             "head.modulation": (1, 2, D)}

    def linear(name, out, into):
        names[f"{name}.weight"] = (out, into)
        names[f"{name}.bias"] = (out,)

    linear("head.head", 64, D)
    linear("text_embedding.0", D, 4096)
    linear("text_embedding.2", D, D)
    linear("time_embedding.0", D, 256)
    linear("time_embedding.2", D, D)
    linear("time_projection.1", 6 * D, D)
    for i in range(config.num_layers):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{i}.{attention}.{part}", D, D)
            for part in "qk":
                names[f"blocks.{i}.{attention}.norm_{part}.weight"] = (D,)
        linear(f"blocks.{i}.ffn.0", hidden, D)
        linear(f"blocks.{i}.ffn.2", D, hidden)
        names[f"blocks.{i}.norm3.weight"] = (D,)
        names[f"blocks.{i}.norm3.bias"] = (D,)
        names[f"blocks.{i}.modulation"] = (1, 6, D)
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
        names[f"{name}.weight"] = (out, into, *kernel)
        names[f"{name}.bias"] = (out,)

    def residual(name, into, out):
        names[f"{name}.residual.0.gamma"] = (into, 1, 1, 1)
        names[f"{name}.residual.3.gamma"] = (out, 1, 1, 1)
        conv(f"{name}.residual.2", out, into, 3, 3, 3)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", out, into, 1, 1, 1)

    def ends(name, first, last, wide):
        conv(f"{name}.conv1", *first, 3, 3, 3)
        conv(f"{name}.head.2", *last, 3, 3, 3)
        names[f"{name}.head.0.gamma"] = (last[1], 1, 1, 1)
        residual(f"{name}.middle.0", wide, wide)
        residual(f"{name}.middle.2", wide, wide)
        names[f"{name}.middle.1.norm.gamma"] = (wide, 1, 1)
        conv(f"{name}.middle.1.to_qkv", 3 * wide, wide, 1, 1)
        conv(f"{name}.middle.1.proj", wide, wide, 1, 1)

    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    ends("encoder", (96, 3), (32, 384), 384)
    ends("decoder", (384, 16), (3, 96), 384)
    index = 0
    for level, (into, out) in enumerate(((96, 96), (96, 192), (192, 384), (384, 384))):
        residual(f"encoder.downsamples.{index}", into, out)
        residual(f"encoder.downsamples.{index + 1}", out, out)
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
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(**texts.UMT5_XXL))
    names = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for i in range(24):
        for part in "qkvo":
            names[f"blocks.{i}.attn.{part}.weight"] = (4096, 4096)
        for part in "12":
            names[f"blocks.{i}.norm{part}.weight"] = (4096,)
        names[f"blocks.{i}.pos_embedding.embedding.weight"] = (32, 64)
        names[f"blocks.{i}.ffn.gate.0.weight"] = (10240, 4096)
        names[f"blocks.{i}.ffn.fc1.weight"] = (10240, 4096)
        names[f"blocks.{i}.ffn.fc2.weight"] = (4096, 10240)
    state = {k: v for k, v in text.state_dict().items() if k != "encoder.embed_tokens.weight"}
    assert {texts.original_text_key(k): tuple(v.shape) for k, v in state.items()} == names


def as_original(checkpoint, folder, monkeypatch):
    """Rewrites a Diffusers folder in the original layout. -> the model it holds"""
    wan = load_wan(checkpoint)
    folder.mkdir()
    c = wan.dit.config
    config = dict(model_type="t2v", dim=c.num_attention_heads * c.attention_head_dim, num_heads=c.num_attention_heads,
                  ffn_dim=c.ffn_dim, freq_dim=c.freq_dim, num_layers=c.num_layers, in_dim=c.in_channels,
                  out_dim=c.out_channels, eps=c.eps, text_dim=c.text_dim, text_len=512)
    (folder / "config.json").write_text(json.dumps(config))

    def state(part, rename):
        return {rename(k): v for k, v in part.state_dict().items() if "embed_tokens" not in k}

    save_file(state(wan.dit, model.original_dit_key), folder / "diffusion_pytorch_model.safetensors")
    torch.save(state(wan.vae, model.original_vae_key), folder / "Wan2.1_VAE.pth")
    torch.save(state(wan.text_encoder, texts.original_text_key), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(checkpoint / "tokenizer", folder / "google" / "umt5-xxl")

    # The original layout has no config of its VAE and text encoder: they are the released ones, here small.
    small = wan.text_encoder.config.to_dict()
    make = VAEConfig.__init__
    monkeypatch.setattr(texts, "UMT5_XXL", {k: small[k] for k in texts.UMT5_XXL})
    monkeypatch.setattr(model.VAEConfig, "__init__", lambda self, **k: make(self, **{**VAE_, **k}))
    return wan


def test_both_layouts_load_the_same_model(checkpoint, tmp_path, monkeypatch):
    a = as_original(checkpoint, tmp_path / "original", monkeypatch)
    b = load_wan(tmp_path / "original")
    for part in ("dit", "vae", "text_encoder"):
        x = getattr(a, part).state_dict()
        y = getattr(b, part).state_dict()
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert torch.equal(a.encode_text(["a red box"]), b.encode_text(["a red box"]))
    assert (a.shift, b.shift) == (3.0, None)


def test_a_transformer_takes_the_place_of_an_originals(checkpoint, tmp_path, monkeypatch):
    """As after a full training that began from the original layout; written twice, a link being dead by then."""
    as_original(checkpoint, tmp_path / "original", monkeypatch)
    b = load_wan(tmp_path / "original")
    tensors = {name: values + 1 for name, values in b.dit.state_dict().items()}
    for _ in range(2):
        model.write_wan_beside(tmp_path / "original", tmp_path / "new", b.dit.config, tensors)
        link = tmp_path / "new" / "google"
        link.unlink()
        link.symlink_to("nowhere")
    model.write_wan_beside(tmp_path / "original", tmp_path / "new", b.dit.config, tensors)
    a = load_wan(tmp_path / "new")
    assert all(torch.equal(values, tensors[name]) for name, values in a.dit.state_dict().items())
    for part in ("vae", "text_encoder"):
        new, old = (getattr(wan, part).state_dict() for wan in (a, b))
        assert all(torch.equal(new[name], old[name]) for name in old)


def test_an_original_wan_that_takes_pictures_is_named(checkpoint, tmp_path, monkeypatch):
    as_original(checkpoint, tmp_path / "original", monkeypatch)
    file = tmp_path / "original" / "config.json"
    file.write_text(file.read_text().replace("t2v", "i2v"))
    with pytest.raises(ValueError, match="takes pictures; give a text-to-video model"):
        load_wan(tmp_path / "original")


def test_the_original_layout_in_shards_loads(checkpoint, tmp_path, monkeypatch):
    """Wan-AI/Wan2.1-T2V-14B holds its transformer in six files with an index; written by the hub's own function."""
    folder = tmp_path / "original"
    wan = as_original(checkpoint, folder, monkeypatch)
    whole = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.unlink()
    size = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    for tenths in range(50, 90):
        for file in folder.glob("diffusion_pytorch_model*"):
            file.unlink()
        save_torch_state_dict(state, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
                              max_shard_size=10 * size // tenths)
        files = sorted(file.name for file in folder.glob("*-of-*.safetensors"))
        if len(files) == 6:
            break
    assert files == [f"diffusion_pytorch_model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    loaded = load_wan(folder).dit.state_dict()
    assert all(torch.equal(loaded[name], values) for name, values in wan.dit.state_dict().items())


def test_text_embedding_is_padded_with_zeros_and_cleaned(checkpoint):
    wan = load_wan(checkpoint)
    text = wan.encode_text(["a red &amp;amp; box ", "a  blue sphere on a green floor"])
    assert text.shape == (2, 512, 32)
    lengths = text.abs().sum(-1).ne(0).sum(-1).tolist()
    assert lengths == [4, 8]  # words and </s>; the unknown '&' vanishes at the tokenizer's split
    assert torch.allclose(wan.encode_text(["a red & box"])[0], text[0], atol=1e-5)
    assert texts.clean_prompt("a &amp;lt;b \n  c ") == "a <b c"


@pytest.mark.parametrize("special, spelled", [
    ("</s>", "< /s>"), ("</S>", "< /S>"), ("<pad>", "< pad>"), ("<<pad>", "<< pad>"), ("<box>", "<box>")])
def test_special_tokens_in_a_prompt_are_text(checkpoint, special, spelled):
    """A prompt cannot end itself early, nor be padded from within."""
    wan = load_wan(checkpoint)
    text = texts.spelled_out(wan.tokenizer, f"a red {special} box")
    assert text == f"a red {spelled} box"
    ids = wan.tokenizer(text).input_ids
    assert wan.tokenizer.pad_token_id not in ids
    assert ids.index(wan.tokenizer.eos_token_id) == len(ids) - 1  # the end of every prompt
    assert torch.equal(wan.encode_text([f"a red {special} box"]), wan.encode_text([text]))


def edit_json(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_no_code_of_a_folder_is_run(checkpoint, tmp_path):
    """A tokenizer with code of its own: an error, without a question on stdin that `echo y` could answer."""
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    (folder / "tokenizer" / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="Own",
              auto_map=dict(AutoTokenizer=["own.Own", "own.Own"]))
    command = [sys.executable, ROOT / "sample.py", "a box", "--model", folder, "--out", tmp_path / "a.mp4"]
    done = subprocess.run(command, input="y\n", capture_output=True, text=True)
    assert done.returncode == 2
    assert f"the tokenizer in {folder / 'tokenizer'} cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_another_models_is_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    file = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["more"] = len(tokenizer["model"]["vocab"])
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="they are not of one checkpoint"):
        load_wan(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be read"):
        load_wan(folder)


def test_a_folder_that_is_no_checkpoint_is_named(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither transformer/"):
        load_wan(tmp_path / "empty")
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="lacks the tokenizer folder tokenizer"):
        load_wan(folder)


def test_a_model_of_two_transformers_is_refused(checkpoint, tmp_path):
    """Wan2.2 has one for the noisy steps and one for the rest: either alone would make other videos."""
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    with pytest.raises(ValueError, match="holds two transformers, as Wan2.2 does; give a Wan2.1"):
        load_wan(folder)


# ------------------------------------------------------------------------------------------------ what is promised

def test_bfloat16_rounds_neither_the_stream_nor_the_conditions():
    dit, kept = randomise(DiT(DiTConfig(**DIT))).to(torch.bfloat16), []
    for part in (*dit.blocks, dit.condition_embedder):
        part.register_forward_hook(lambda part, given, out: kept.extend(out[:2] if isinstance(out, tuple) else [out]))
    with torch.no_grad():
        dit(*inputs())
    assert len(kept) == 2 + len(dit.blocks)
    for x in kept:
        assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())


def test_checkpointing_runs_every_block_again():
    dit, calls = randomise(DiT(DiTConfig(**DIT))).train(), []
    for block in dit.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(True))
    for dit.checkpointing, times in ((False, 1), (True, 2)):
        calls.clear()
        dit(*inputs()).square().mean().backward()
        assert len(calls) == times * len(dit.blocks)


def test_pieces_are_asked_for_by_all_pixels_of_the_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(VAE, "pieces", lambda vae, T, pixels: asked.append(pixels) or [(0, T)])
    vae = randomise(VAE(VAEConfig(**VAE_)))
    with torch.no_grad():
        vae.decode(vae.encode(torch.rand(2, 5, 3, 16, 24)))
    assert asked == [2 * 16 * 24] * 2


def test_the_vae_stays_float32_and_flow_matchings_shift_is_read(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 7.0}')
    wan = load_wan(folder, dtype=torch.bfloat16)
    assert wan.shift == 7
    assert {p.dtype for p in wan.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in wan.dit.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_long_prompt_is_cut_and_still_ends(checkpoint):
    wan = load_wan(checkpoint)
    ids = wan.tokenizer("box " * 600).input_ids
    ids = torch.tensor([[*ids[:511], wan.tokenizer.eos_token_id]])
    assert torch.allclose(wan.encode_text(["box " * 600]), wan.text_encoder(ids).last_hidden_state, atol=1e-4)


def test_broken_characters_are_mended():
    assert texts.clean_prompt("a cafÃ©\u2019s door") == "a café's door"
