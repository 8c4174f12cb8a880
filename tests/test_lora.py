import json
import shutil

import peft
import pytest
import torch
import torch.nn as nn
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from lora import LinearApart, LoRALinear, add_lora, lora_off, lora_weights, merge_lora
from model import load_dit
from sample import generator


@pytest.fixture
def adapted(checkpoint):
    """A model with a random adapter, its plain twin, and the adapter's parameters."""
    dit = load_dit(checkpoint)
    plain = load_dit(checkpoint)
    trained = add_lora(dit, 4, 8.0, generator("lora"))
    with torch.no_grad():
        for name, p in trained.items():
            if name.endswith("lora_B"):
                p.normal_(std=.1, generator=generator(name))
    return dit, plain, trained


def inputs(seed=0):
    """Arguments of a DiT: latents, time steps, text."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 2, 2, 4, generator=g)
    return x, torch.tensor([500.0, 20]), torch.randn(2, 5, 32, generator=g)


def difference(a, b):
    return (a - b).abs().max()


def test_it_starts_as_the_identity_turns_off_and_trains_alone(checkpoint, adapted):
    dit, plain, trained = adapted
    fresh = load_dit(checkpoint)
    add_lora(fresh)
    assert torch.equal(fresh(*inputs()), plain(*inputs()))
    moved = dit(*inputs())
    assert difference(moved, plain(*inputs())) > 1e-3
    with lora_off(dit):
        assert torch.equal(dit(*inputs()), plain(*inputs()))
    assert torch.equal(dit(*inputs()), moved)
    assert len(trained) == 2 * 8 * len(dit.blocks)
    assert all("lora" in name and p.dtype == torch.float32 for name, p in trained.items())


def test_an_error_with_the_adapter_off_turns_it_on_again(adapted):
    dit, *_ = adapted
    with pytest.raises(KeyboardInterrupt):
        with lora_off(dit):
            raise KeyboardInterrupt
    assert all(m.scale == 2.0 for m in dit.modules() if isinstance(m, LoRALinear))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_files_merge_back_to_the_same_model(adapted, tmp_path, layout):
    dit, plain, _ = adapted
    save_file(lora_weights(dit, layout=layout), tmp_path / "lora.safetensors")
    merge_lora(plain, tmp_path)
    assert difference(plain(*inputs()), dit(*inputs())) < 1e-5


def test_a_small_adapter_is_not_rounded_away_in_bfloat16(checkpoint, tmp_path):
    """Sampling and evaluation see what was trained, to the bit; merged into bfloat16, most of it is lost."""
    plain, trained, read, merged = (load_dit(checkpoint, dtype=torch.bfloat16) for _ in range(4))
    with torch.no_grad():
        for name, p in add_lora(trained, 4, 8.0, generator("lora")).items():
            if name.endswith("lora_B"):
                p.normal_(std=1e-4, generator=generator(name))
    save_file(lora_weights(trained), tmp_path / "lora.safetensors")
    pairs = merge_lora(read, tmp_path, apart=True)
    assert pairs.keys() == merge_lora(merged, tmp_path).keys()
    assert torch.equal(read(*inputs()), trained(*inputs()))
    assert not torch.equal(read(*inputs()), plain(*inputs()))
    weights = [dit.blocks[0].attn1.to_q.weight for dit in (plain, read, merged)]
    assert torch.equal(weights[0], weights[1])
    assert .5 < (weights[0] == weights[2]).float().mean() < 1

    # a training that starts from it starts from the same model, which is also its reference
    start = load_dit(checkpoint, dtype=torch.bfloat16)
    base = merge_lora(start, tmp_path, apart=True)
    again = add_lora(start, 2, 4.0, generator("second"))
    assert again.keys() == {name for name, p in start.named_parameters() if p.requires_grad}
    assert torch.equal(start(*inputs()), read(*inputs()))
    with torch.no_grad():
        for name, p in again.items():
            p.normal_(std=.01, generator=generator(name, "second"))
    moved = start(*inputs())
    assert not torch.equal(moved, read(*inputs()))
    with lora_off(start):
        assert torch.equal(start(*inputs()), read(*inputs()))
    save_file(lora_weights(start, base=base), tmp_path / "lora.safetensors")
    both = load_dit(checkpoint, dtype=torch.bfloat16)
    merge_lora(both, tmp_path, apart=True)
    assert difference(both(*inputs()), moved) < .02 * moved.abs().max()  # sums of rank 6, or of 4 and 2

    # in float32 nothing is lost, and one product is faster than two
    whole = load_dit(checkpoint)
    merge_lora(whole, tmp_path, apart=True)
    assert not any(isinstance(module, LinearApart) for module in whole.modules())


@pytest.mark.parametrize("layer", ["condition_embedder.time_embedder.linear_1", "condition_embedder.time_proj",
                                   "condition_embedder.text_embedder.linear_1", "blocks.1.ffn.net.2",
                                   "blocks.0.attn2.to_out.0", "patch_embedding"])
def test_an_adapter_of_any_layer_shows_in_bfloat16(checkpoint, tmp_path, layer):
    merged, apart = (load_dit(checkpoint, dtype=torch.bfloat16) for _ in range(2))
    out, *into = merged.get_parameter(f"{layer}.weight").shape
    g = generator(layer)
    save_file({f"transformer.{layer}.lora_A.weight": torch.randn(2, *into, generator=g),
               f"transformer.{layer}.lora_B.weight": torch.randn(out, 2, *[1] * (len(into) - 1), generator=g)},
              tmp_path / "lora.safetensors")
    before = merged(*inputs())
    merge_lora(merged, tmp_path)
    merge_lora(apart, tmp_path, apart=True)
    change = difference(merged(*inputs()), before)
    assert change > .05
    assert difference(apart(*inputs()), merged(*inputs())) < .2 * change


def test_alpha_and_strength_scale_what_is_merged(adapted, checkpoint, tmp_path):
    """A file that keeps alpha apart, at half strength: the folded file's change, halved, times alpha / r."""
    dit, *_ = adapted
    folded = lora_weights(dit)
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(12.0) for key in folded if "lora_A" in key}
    save_file(folded, tmp_path / "folded.safetensors")
    save_file({**folded, **alphas}, tmp_path / "apart.safetensors")
    once = merge_lora(load_dit(checkpoint), tmp_path / "folded.safetensors")
    scaled = merge_lora(load_dit(checkpoint), tmp_path / "apart.safetensors", strength=.5)
    assert once.keys() == scaled.keys()
    for name in once:
        assert torch.allclose(scaled[name][1], once[name][1] * .5 * 12 / 4)


def test_files_that_fit_no_layer_or_are_missing_are_named(adapted, tmp_path):
    dit, plain, _ = adapted
    broken = lora_weights(dit)
    broken["transformer.blocks.9.attn1.to_q.lora_A.weight"] = torch.zeros(4, 48)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="fits no layer of this model"):
        merge_lora(plain, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="no LoRA file"):
        merge_lora(plain, tmp_path / "none.safetensors")


def test_a_file_over_a_merged_base_holds_their_sum(adapted, checkpoint, tmp_path):
    dit, *_ = adapted
    save_file(lora_weights(dit), tmp_path / "base.safetensors")
    both = load_dit(checkpoint)
    base = merge_lora(both, tmp_path / "base.safetensors")
    trained = add_lora(both, 2, 4.0, generator("second"))
    with torch.no_grad():
        for name, p in trained.items():
            p.normal_(std=.1, generator=generator(name, "second"))
    save_file(lora_weights(both, base=base), tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    assert tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape[0] == 2 + 4
    fresh = load_dit(checkpoint)
    merge_lora(fresh, tmp_path)
    assert difference(fresh(*inputs()), both(*inputs())) < 1e-5


def test_key_names(adapted):
    """ComfyUI's and PEFT's names, by list."""
    dit, *_ = adapted
    expected, original = set(), set()
    for i in range(2):
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for x, y in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                for matrix in "AB":
                    expected.add(f"transformer.blocks.{i}.{ours}.{x}.lora_{matrix}.weight")
                    original.add(f"diffusion_model.blocks.{i}.{theirs}.{y}.lora_{matrix}.weight")
    assert set(lora_weights(dit)) == expected
    assert set(lora_weights(dit, layout="original")) == original
    assert sum(isinstance(m, LoRALinear) for m in dit.modules()) == 16


# ---------------------------------------------------------------------------- adapter files that others write

# Layers of every sort, and their names in the original release.
LAYERS = {"blocks.0.attn1.to_q": "blocks.0.self_attn.q",
          "blocks.1.attn2.to_out.0": "blocks.1.cross_attn.o",
          "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
          "blocks.1.ffn.net.2": "blocks.1.ffn.2",
          "condition_embedder.time_embedder.linear_1": "time_embedding.0",
          "condition_embedder.time_proj": "time_projection.1",
          "condition_embedder.text_embedder.linear_2": "text_embedding.2",
          "proj_out": "head.head",
          "patch_embedding": "patch_embedding"}
RANK = 4
ALPHA = 6.0


@pytest.fixture
def dit(checkpoint):
    return load_dit(checkpoint)


def random_pairs(dit):
    """{our layer name: (A, B)}, in the shapes of PEFT and kohya."""
    pairs = {}
    for name in LAYERS:
        weight = dit.get_submodule(name).weight
        g = generator(name)
        A = torch.randn(RANK, *weight.shape[1:], generator=g)
        B = torch.randn(weight.shape[0], RANK, *[1] * (weight.dim() - 2), generator=g)
        pairs[name] = A, B
    return pairs


def assert_merged(dit, checkpoint, changes):
    """dit is the checkpoint's plus changes {our parameter name: what was added}, and nothing else."""
    for name, before in load_dit(checkpoint).named_parameters():
        expected = before + changes.get(name, 0)
        assert torch.allclose(dit.get_parameter(name), expected, atol=1e-5), name


def assert_pairs_merged(dit, checkpoint, pairs, scale):
    """scale: a number, or {our layer name: its own}."""
    changes = {}
    for name, (A, B) in pairs.items():
        weight = dit.get_submodule(name).weight
        own = scale[name] if isinstance(scale, dict) else scale
        changes[f"{name}.weight"] = own * (B.flatten(1) @ A.flatten(1)).view(weight.shape)
    assert_merged(dit, checkpoint, changes)


def put(tensors, stem, pair, matrices, alpha=None):
    """Adds a layer's pair to an adapter file's tensors, under the matrices' endings."""
    for ending, value in zip(matrices, pair):
        tensors[f"{stem}.{ending}.weight"] = value
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)


AB = ("lora_A", "lora_B")
DOWN_UP = ("lora_down", "lora_up")
DEFAULT = ("lora_A.default", "lora_B.default")


@pytest.mark.parametrize("prefix, original, matrices, alpha", [
    ("transformer.", False, AB, None),  # Diffusers
    ("diffusion_model.", True, AB, None),  # ComfyUI
    ("diffusion_model.", True, AB, ALPHA),
    ("diffusion_model.", True, DOWN_UP, None),
    ("diffusion_model.", True, DOWN_UP, ALPHA),
    ("", True, DEFAULT, None),  # DiffSynth
    ("pipe.dit.", True, DEFAULT, None),
    ("diffusion_model.", True, DEFAULT, None),
])
def test_published_key_names(dit, checkpoint, tmp_path, prefix, original, matrices, alpha):
    pairs = random_pairs(dit)
    tensors = {}
    for name, pair in pairs.items():
        put(tensors, prefix + (LAYERS[name] if original else name), pair, matrices, alpha)
    save_file(tensors, tmp_path / "any.safetensors")
    merged = merge_lora(dit, tmp_path / "any.safetensors", strength=.5)
    scale = .5 if alpha is None else .5 * alpha / RANK
    assert_pairs_merged(dit, checkpoint, pairs, scale)
    # What comes back is what was added: exports of a training that starts here hold it.
    assert merged.keys() == pairs.keys()
    assert_pairs_merged(dit, checkpoint, merged, 1)


def test_musubis_underscores(dit, checkpoint, tmp_path):
    pairs = random_pairs(dit)
    tensors = {}
    for name, pair in pairs.items():
        put(tensors, "lora_unet_" + LAYERS[name].replace(".", "_"), pair, DOWN_UP, ALPHA)
    assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in tensors
    save_file(tensors, tmp_path / "musubi.safetensors")
    merge_lora(dit, tmp_path / "musubi.safetensors")
    assert_pairs_merged(dit, checkpoint, pairs, ALPHA / RANK)


def test_an_adapter_on_all_layers_goes_on_in_exports(dit, checkpoint, tmp_path):
    """Training that starts from another tool's file writes that file's layers too, in both layouts."""
    tensors = {}
    for name, pair in random_pairs(dit).items():
        put(tensors, f"diffusion_model.{LAYERS[name]}", pair, DOWN_UP, ALPHA)
    save_file(tensors, tmp_path / "base.safetensors")
    base = merge_lora(dit, tmp_path / "base.safetensors")
    merged = {name: p.clone() for name, p in dit.named_parameters()}
    add_lora(dit, 2, 2.0)
    for layout in ("diffusers", "original"):
        save_file(lora_weights(dit, layout=layout, base=base), tmp_path / "lora.safetensors")
        again = load_dit(checkpoint)
        merge_lora(again, tmp_path)
        for name, p in again.named_parameters():
            assert torch.allclose(p, merged[name], atol=1e-5), name


# ---- lightx2v's whole differences

# Names in the file, and the parameters that they change: a norm, biases, a small weight, modulations.
DIFFERENCES = {"blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
               "blocks.0.norm3.diff": "blocks.0.norm2.weight",
               "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
               "blocks.1.ffn.0.diff_b": "blocks.1.ffn.net.0.proj.bias",
               "blocks.1.cross_attn.k.diff": "blocks.1.attn2.to_k.weight",
               "patch_embedding.diff": "patch_embedding.weight",
               "patch_embedding.diff_b": "patch_embedding.bias",
               "blocks.1.diff_m": "blocks.1.scale_shift_table",
               "head.diff_m": "scale_shift_table"}


@pytest.fixture
def distilled(dit, tmp_path):
    """A file of lightx2v's extractor: one LoRA pair, differences; and what it adds at strength 1."""
    A, B = random_pairs(dit)["blocks.0.attn1.to_q"]
    changes = {"blocks.0.attn1.to_q.weight": B @ A}
    tensors = {}
    put(tensors, "diffusion_model.blocks.0.self_attn.q", (A, B), DOWN_UP)
    for key, name in DIFFERENCES.items():
        changes[name] = torch.randn(dit.get_parameter(name).shape, generator=generator(name))
        tensors[f"diffusion_model.{key}"] = changes[name]
    save_file(tensors, tmp_path / "distilled.safetensors")
    return tmp_path / "distilled.safetensors", changes


def test_lightx2vs_differences(dit, checkpoint, distilled):
    file, changes = distilled
    pairs = merge_lora(dit, file, strength=.5)
    assert pairs.keys() == {"blocks.0.attn1.to_q"}
    assert_merged(dit, checkpoint, {name: .5 * change for name, change in changes.items()})


def test_no_lora_is_trained_over_differences(dit, distilled):
    """Its exports could not hold them."""
    merge_lora(dit, distilled[0])
    with pytest.raises(ValueError, match="distilled.safetensors holds whole differences"):
        add_lora(dit)


# ---- PEFT, DiffSynth and Diffusers write the file themselves

def random_adapter(model):
    """Fills PEFT's matrices in a model. -> {layer name: (A, B)}"""
    pairs = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, generator=generator(name))
            layer, _, matrix = name.removeprefix("base_model.model.").rpartition(".lora_")
            pairs.setdefault(layer, {})[matrix[0]] = p.detach().clone()
    return {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}


def peft_folder(dit, folder, **options):
    """PEFT's own folder for the LAYERS. -> {layer name: (A, B)}"""
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": list(LAYERS), **options})
    model = peft.get_peft_model(dit, config)
    pairs = random_adapter(model)
    model.save_pretrained(folder)
    return pairs


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_folders(dit, checkpoint, tmp_path, rslora):
    pairs = peft_folder(load_dit(checkpoint), tmp_path, use_rslora=rslora)
    merge_lora(dit, tmp_path)
    assert pairs.keys() == LAYERS.keys()
    assert_pairs_merged(dit, checkpoint, pairs, ALPHA / (RANK ** .5 if rslora else RANK))
    # The file in the folder, by its own name.
    again = load_dit(checkpoint)
    merge_lora(again, tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in dit.named_parameters())


def test_pefts_patterns(dit, checkpoint, tmp_path):
    """Ranks and alphas of their own for some layers, by names and by expressions."""
    pairs = peft_folder(load_dit(checkpoint), tmp_path, rank_pattern={r"blocks\.\d+\.ffn\.net\.2": 2},
                        alpha_pattern={"to_q": 1.0, "proj_out": 12.0})
    merge_lora(dit, tmp_path)
    scale = dict.fromkeys(LAYERS, ALPHA / RANK)
    scale |= {"blocks.1.ffn.net.2": ALPHA / 2, "blocks.0.attn1.to_q": 1 / RANK, "proj_out": 12 / RANK}
    assert_pairs_merged(dit, checkpoint, pairs, scale)


def test_diffsynths_injected_layers(dit, checkpoint, tmp_path):
    """DiffSynth injects PEFT's layers into the original model and saves what has gradients, by its name."""
    tree = nn.Module()
    for ours, theirs in LAYERS.items():
        owner = tree
        *parents, last = theirs.split(".")
        for part in parents:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(last, load_dit(checkpoint).get_submodule(ours))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS.values()))
    peft.inject_adapter_in_model(config, tree)
    pairs = random_adapter(tree)
    trained = {name: p for name, p in tree.named_parameters() if p.requires_grad}
    assert "blocks.0.self_attn.q.lora_A.default.weight" in trained
    save_file(trained, tmp_path / "step.safetensors")
    merge_lora(dit, tmp_path / "step.safetensors")
    assert_pairs_merged(dit, checkpoint, {ours: pairs[theirs] for ours, theirs in LAYERS.items()}, 1)


@pytest.mark.parametrize("of", ["pipeline", "pipeline without header", "transformer"])
def test_diffusers_files(dit, checkpoint, tmp_path, of):
    """Diffusers keeps alpha in the file's header; without one nothing is scaled, as in its own reader."""
    transformer = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    transformer.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS)))
    pairs = random_adapter(transformer)
    if of == "transformer":
        transformer.save_lora_adapter(tmp_path)
    else:
        header = transformer.peft_config["default"].to_dict() if of == "pipeline" else None
        WanPipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(transformer),
                                      transformer_lora_adapter_metadata=header)
    merge_lora(dit, tmp_path)
    assert_pairs_merged(dit, checkpoint, pairs, 1 if "without" in of else ALPHA / RANK)


# ---- what is refused, by name, before any weight is changed

def refused(dit, file, match):
    before = {name: p.clone() for name, p in dit.named_parameters()}
    with pytest.raises(ValueError, match=match):
        merge_lora(dit, file)
    assert all(torch.equal(p, before[name]) for name, p in dit.named_parameters())


STEM = "diffusion_model.blocks.0.self_attn.q"
FFN = "diffusion_model.blocks.0.ffn.0"
FITS = {f"{STEM}.lora_down.weight": torch.ones(2, 48), f"{STEM}.lora_up.weight": torch.ones(48, 2)}


@pytest.mark.parametrize("more, message", [
    # layers of an image-to-video model, of a text encoder, and endings that are not read
    ({"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": (2, 48)}, "k_img.* fits no layer"),
    ({"lora_te_blocks_0.lora_down.weight": (2, 48)}, "lora_te_blocks_0.* fits no layer"),
    ({f"{STEM}.dora_scale": (48, 1)}, "dora_scale' is neither"),
    ({f"{STEM}.lora_B.bias": (48,)}, "lora_B.bias' is neither"),
    ({f"{STEM}.weight": (48, 48)}, "q.weight' is neither"),
    # shapes
    ({f"{STEM}.lora_down.weight": (2, 47)}, r"q.lora_down.weight' of shape \(2, 47\) fits no layer"),
    ({f"{STEM}.lora_up.weight": (48, 3)}, r"q.lora_up.weight' of shape \(48, 3\) fits no layer"),
    ({f"{STEM}.alpha": (2,)}, r"q.alpha' of shape \(2,\) fits no layer"),
    ({f"{STEM}.diff_b": (47,)}, r"q.diff_b' of shape \(47,\) fits no layer"),
    ({"blocks.0.norm3.lora_A.weight": (2,),
      "blocks.0.norm3.lora_B.weight": (48, 2)}, "norm3.* fits no layer"),
    # partners, and a layer that comes twice
    ({f"{FFN}.lora_up.weight": (56, 2)}, "ffn.0.lora_up.weight' lacks its partner lora_A"),
    ({f"{FFN}.lora_down.weight": (2, 48)}, "ffn.0.lora_down.weight' lacks its partner lora_B"),
    ({f"{FFN}.alpha": ()}, "ffn.0.alpha' lacks its partner"),
    ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (2, 48)}, "to_q.lora_A.weight' and .* are both A"),
])
def test_keys_that_do_not_fit_are_named(dit, tmp_path, more, message):
    tensors = FITS | {key: torch.ones(shape) for key, shape in more.items()}
    save_file(tensors, tmp_path / "bad.safetensors")
    refused(dit, tmp_path / "bad.safetensors", message)


def test_configurations_that_are_not_read_are_named(dit, checkpoint, tmp_path):
    peft_folder(load_dit(checkpoint), tmp_path, target_modules=["to_q"], use_dora=True)
    refused(dit, tmp_path, "its configuration has use_dora = True")
    # Options that leave no trace in the keys.
    shutil.rmtree(tmp_path)
    peft_folder(load_dit(checkpoint), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for option, value in dict(use_dora=True, use_unheard_of=True, lora_bias=True, peft_type="LOKR",
                              init_lora_weights="pissa", layer_replication=[[0, 1]]).items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {option: value}))
        refused(dit, tmp_path, f"its configuration has {option} = ")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    refused(dit, tmp_path, "has rank 4, its configuration says 8")
    # Without it PEFT's alpha is unknown, whatever the file is called.
    (tmp_path / "adapter_config.json").unlink()
    refused(dit, tmp_path, "adapter_config.json is missing")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "lora.safetensors")
    refused(dit, tmp_path, "adapter_config.json is missing")


@pytest.mark.parametrize("tensors, message", [
    ({}, "bad.safetensors holds no tensor"),
    ({f"{STEM}.lora_down.weight": torch.ones(0, 48), f"{STEM}.lora_up.weight": torch.ones(48, 0)}, "has rank 0"),
    (FITS | {f"{STEM}.lora_up.weight": torch.ones(48, 2).long()}, "q.lora_up.weight is int64"),
    (FITS | {f"{STEM}.lora_up.weight": torch.full((48, 2), torch.nan)}, "q.lora_up.weight holds NaN or infinity"),
    (FITS | {f"{STEM}.alpha": torch.tensor(torch.inf)}, "q.alpha holds NaN or infinity"),
    (FITS | {f"{STEM}.alpha": torch.tensor(0.)}, "the alpha of blocks.0.attn1.to_q.weight is 0.0; it must be above 0"),
    (FITS | {f"{STEM}.alpha": torch.tensor(-1.)}, "it must be above 0"),
    (FITS | {f"{STEM}.alpha": torch.tensor(3e38), f"{STEM}.lora_up.weight": torch.full((48, 2), 9.)},
     "overflows torch.float32"),
    (FITS | {f"{STEM}.diff_b": torch.full((48,), -torch.inf)}, "q.diff_b holds NaN or infinity")])
def test_tensors_that_cannot_be_merged_are_named(dit, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    refused(dit, tmp_path / "bad.safetensors", message)


def test_an_alpha_may_be_a_whole_number(dit, checkpoint, tmp_path):
    """kohya writes the number that it was given."""
    pairs = random_pairs(dit)
    tensors = {}
    for name, pair in pairs.items():
        put(tensors, f"diffusion_model.{LAYERS[name]}", pair, DOWN_UP, 2)
    save_file(tensors, tmp_path / "whole.safetensors")
    merge_lora(dit, tmp_path / "whole.safetensors")
    assert_pairs_merged(dit, checkpoint, pairs, 2 / RANK)


def test_an_alpha_that_is_not_given_is_pefts_default(dit, checkpoint, tmp_path):
    pairs = peft_folder(load_dit(checkpoint), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=RANK)))
    merge_lora(dit, tmp_path)
    assert_pairs_merged(dit, checkpoint, pairs, peft.LoraConfig().lora_alpha / RANK)


@pytest.mark.parametrize("config, message", [
    ([1], "adapter_config.json: Expected object, got array"),
    ({"r": "4"}, "adapter_model.safetensors, entry r: Expected int . null, got str"),
    ({"r": 0}, "entry r: Expected int >= 1"),
    ({"lora_alpha": [6]}, "entry lora_alpha: Expected float . null, got array"),
    ({"rank_pattern": ["to_q"]}, "entry rank_pattern: Expected object, got array"),
    ({"alpha_pattern": {"to_q": None}}, "entry alpha_pattern.*: Expected float, got null"),
    ({"alpha_pattern": {r"(.|\w)+(?<=!)": 1}}, "or takes too long"),
    ({"alpha_pattern": {"(": 1}}, r"the pattern '\(', which is no regular expression"),
    ({"alpha_pattern": {5000 * "(" + 5000 * ")": 1}}, r"the pattern '\({80}', which is no regular expression")])
def test_configurations_of_another_form_are_named(dit, checkpoint, tmp_path, config, message):
    peft_folder(load_dit(checkpoint), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(dit, tmp_path, message)


def test_a_header_of_another_form_is_named(dit, tmp_path):
    for header, message in (("[]", "Expected object, got array"), ("{", "is not valid JSON")):
        save_file(FITS, tmp_path / "bad.safetensors", {"lora_adapter_metadata": header})
        refused(dit, tmp_path / "bad.safetensors", f"bad.safetensors.*{message}")


def test_pickled_files_are_read_only_as_plain_tensors(dit, tmp_path):
    torch.save(FITS, tmp_path / "plain.pth")
    assert merge_lora(dit, tmp_path / "plain.pth").keys() == {"blocks.0.attn1.to_q"}
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "adapter_model.bin")
    refused(dit, tmp_path / "adapter_model.bin", "not a .pth of plain tensors")


def test_A_is_uniform_within_one_over_the_root_of_its_inputs(checkpoint):
    for name, p in add_lora(load_dit(checkpoint)).items():
        if name.endswith("lora_A"):
            assert .9 < p.abs().max() * p.shape[1] ** .5 <= 1
