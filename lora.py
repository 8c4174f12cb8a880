"""LoRA (arXiv 2106.09685) of the DiT's attention projections, W + (alpha / r) B A, and adapter files.

    trained = add_lora(wan.dit, rank=32, alpha=64)     # in place; the model starts unchanged
    with lora_off(wan.dit): ...                        # the reference model
    save_file(lora_weights(wan.dit), "lora.safetensors")
    merge_lora(load_wan("tiny/wan").dit, "lora.safetensors")

`merge_lora` also reads what other tools write for Wan2.1, on any linear layer and the patch embedding:
PREFIXES and ENDINGS list the forms. Left out: dropout, training adapters on other layers, DoRA and its like.
"""

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from model import original_dit_key
from weights import Size, config_from, from_json, open_tensors, read_json


class LinearApart(nn.Linear):
    """A frozen linear layer beside whose weight `merge_lora` keeps an adapter's pair: W x + b + B (A x)."""

    def __init__(self, linear, A, B):
        """A: (r, in), B: (out, r), the scale in it; both are rounded to the weight's dtype."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.register_buffer("A", A.to(linear.weight))
        self.register_buffer("B", B.to(linear.weight))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.A), self.B)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank one; .scale = 0 turns it off (the reference model).

    The low-rank weights are float32 and are multiplied in the frozen layer's dtype: a float32 copy of every
    input would double what a bfloat16 block keeps for its backward pass.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        self.scale = self.full_scale = alpha / rank

    def forward(self, x):
        y = self.linear(x)
        # Not added at all rather than added times zero: the reference is the frozen model to the bit.
        if self.scale == 0:
            return y
        low_rank = F.linear(x, self.lora_A.to(x.dtype))  # (B, L, rank)
        return y + F.linear(low_rank, self.lora_B.to(x.dtype)) * self.scale


@torch.no_grad()
def add_lora(dit, rank=32, alpha=64, generator=None):
    """Wraps every attention projection (to_q, to_k, to_v, to_out.0) in place. -> trainable {name: parameter}

    A is uniform in +-1/sqrt(in) (PEFT's initialisation), B zero: the model starts unchanged. All else is
    frozen. ValueError if `merge_lora` added whole differences before: no LoRA file could hold them.
    """
    if dit.merged_differences:
        raise ValueError(f"{dit.merged_differences} holds whole differences, which no exported LoRA could; "
                         "start from an adapter of LoRA pairs alone, or train all weights (--full)")
    dit.requires_grad_(False)
    for block in dit.blocks:
        for attention in (block.attn1, block.attn2):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                linear = attention.get_submodule(name)
                layer = LoRALinear(linear, rank, alpha)
                bound = linear.in_features ** -.5
                # Drawn on the CPU, where a generator gives the same numbers on every machine.
                A = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
                layer.lora_A.copy_(A)
                attention.set_submodule(name, layer)
    return {name: p for name, p in dit.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def lora_off(dit):
    """with lora_off(dit): the model as it was before add_lora."""
    layers = [m for m in dit.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.scale = 0
    try:
        yield
    finally:
        for layer in layers:
            layer.scale = layer.full_scale


# ---------------------------------------------------------------------------------------------- adapter files

def file_key(name, layout):
    """A layer's name in an adapter file, without .lora_A.weight or .lora_B.weight."""
    if layout == "diffusers":
        return f"transformer.{name}"
    return f"diffusion_model.{original_dit_key(name)}"


def lora_weights(dit, values=None, layout="diffusers", base=None):
    """An adapter file's {key: tensor}, alpha / r folded into B so that no reader needs to know alpha.

    layout: diffusers (transformer. prefix, PEFT's lora_A / lora_B; WanPipeline.load_lora_weights reads it) or
    original (diffusion_model. prefix and the original release's names; ComfyUI reads it).
    values: {parameter name: tensor} instead of the model's own, e.g. an average.
    base: what `merge_lora` returned for an adapter merged before; the file then holds the sum, of rank
    r + r_base: B A + B' A' = [B B'] [A; A'].
    """
    values = values or {}
    pairs = dict(base or {})
    for name, layer in dit.named_modules():
        if isinstance(layer, LoRALinear):
            # The trained rows of A and columns of B, then those of the adapter merged before.
            A = values.get(f"{name}.lora_A", layer.lora_A).detach().cpu()  # (r, in)
            B = values.get(f"{name}.lora_B", layer.lora_B).detach().cpu() * layer.full_scale  # (out, r)
            base_A, base_B = pairs.get(name, (A[:0], B[:, :0]))  # nothing merged before: rank 0
            pairs[name] = torch.cat([A, base_A]), torch.cat([B, base_B], 1)
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"{file_key(name, layout)}.lora_A.weight"] = A.contiguous()
        tensors[f"{file_key(name, layout)}.lora_B.weight"] = B.contiguous()
    return tensors


ADAPTER_FILES = ("lora.safetensors",  # a training run here
                 "adapter_model.safetensors",  # PEFT
                 "pytorch_lora_weights.safetensors")  # Diffusers


def lora_file(path):
    """-> the adapter file that path, a file or a folder, stands for. ValueError if there is none."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [path / name for name in ADAPTER_FILES]
    for file in files:
        if file.is_file():
            return file
    raise ValueError(f"no LoRA file '{path}'; "
                     f"give a .safetensors file, or a folder that holds {' or '.join(ADAPTER_FILES)}")


# A key in an adapter file is a prefix, a layer's name (ours or the original release's) and an ending.
PREFIXES = ("base_model.model.",  # PEFT's save_pretrained: flow_grpo, World-R1
            "transformer.",  # Diffusers
            "diffusion_model.",  # ComfyUI, lightx2v
            "lora_unet_",  # kohya, musubi; a layer's dots are underscores
            "pipe.dit.",  # DiffSynth, which also writes names without a prefix
            "")
# Ending: what the tensor is, and the layer's parameter that it changes.
ENDINGS = {
    ".lora_A.weight": ("A", "weight"),  # PEFT, Diffusers, ComfyUI
    ".lora_B.weight": ("B", "weight"),
    ".lora_A.default.weight": ("A", "weight"),  # DiffSynth
    ".lora_B.default.weight": ("B", "weight"),
    ".lora_down.weight": ("A", "weight"),  # kohya, musubi, ComfyUI, lightx2v
    ".lora_up.weight": ("B", "weight"),
    ".alpha": ("alpha", "weight"),
    ".diff": ("difference", "weight"),  # lightx2v
    ".diff_b": ("difference", "bias"),
    ".diff_m": ("difference", "modulation"),
}


def split_key(key):
    """-> the layer's name in the file, kind (A, B, alpha, difference), parameter; None if no ending fits."""
    prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
    for ending, (kind, parameter) in ENDINGS.items():
        if key.endswith(ending):
            return key.removeprefix(prefix).removesuffix(ending), kind, parameter
    return None


def parameter_names(dit):
    """{a parameter's name in an adapter file: our name}."""
    names = {}
    for ours, _ in dit.named_parameters():
        original = original_dit_key(ours)
        layer, _, parameter = original.rpartition(".")
        # Underscores cannot be turned back into dots (self_attn), so the model's names get underscores.
        kohya = f"{layer.replace('.', '_')}.{parameter}"
        names |= {ours: ours, original: ours, kohya: ours}
    return names


def match_adapter(dit, path, shapes):
    """Finds the parameter of every tensor in an adapter file. -> {our parameter name: {kind: key}}

    shapes: {key: shape}. ValueError for a key that fits nowhere, comes twice or lacks its partner.
    """
    if not shapes:
        raise ValueError(f"{path} holds no tensor; give the file of a trained LoRA")
    # whose parameter each tensor is, and which part of it
    names = parameter_names(dit)
    matched = {}
    for key in sorted(shapes):
        if split_key(key) is None:
            raise ValueError(f"{path}: '{key}' is neither a LoRA matrix, an alpha nor a difference; "
                             "other adapters (DoRA, LoKr) are not read: give a plain LoRA")
        layer, kind, parameter = split_key(key)
        name = names.get(f"{layer}.{parameter}")
        if name is None:
            raise ValueError(f"{path}: '{key}' fits no layer of this model; "
                             "the LoRA is another model's, or not a LoRA file")
        keys = matched.setdefault(name, {})
        if kind in keys:
            raise ValueError(f"{path}: '{key}' and '{keys[kind]}' are both {kind} of one layer; delete one")
        keys[kind] = key

    for name, keys in matched.items():
        # A and B come together; alpha comes only with them.
        pair = sorted(keys.keys() & {"A", "B", "alpha"})
        if pair and not keys.keys() >= {"A", "B"}:
            missing = "lora_B (lora_up)" if "A" in keys else "lora_A (lora_down)"
            raise ValueError(f"{path}: '{keys[pair[0]]}' lacks its partner {missing}; the file is incomplete")
        # A convolution's A has its kernel, its B a kernel of one.
        shape = tuple(dit.get_parameter(name).shape)  # (out, in, ...)
        rank = shapes[keys["A"]][:1] if pair else ()  # (r,), a part of the shapes below
        if rank == (0,):
            raise ValueError(f"{path}: '{keys['A']}' has rank 0; give a LoRA of at least rank 1")
        expected = {"A": rank + shape[1:], "B": shape[:1] + rank + (1,) * len(shape[2:]), "difference": shape}
        for kind, key in keys.items():
            if kind == "alpha" and shapes[key] in ((), (1,)):
                continue
            of_vector = pair and len(shape) == 1  # a bias or a norm's weight, which has no A and B
            if shapes[key] != expected.get(kind) or of_vector:
                raise ValueError(f"{path}: '{key}' of shape {shapes[key]} fits no layer of this model; "
                                 f"{name} has shape {shape}")
    return matched


# Options of PEFT that change what A and B mean, so that B A would be the wrong thing to add.
OTHER_MATHS = ("lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters", "kasa_config",
               "alora_invocation_tokens", "monteclora_config", "arrow_config")
# Ways to draw the first A and B that leave the model's own weights as they are; others (pissa) change them.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass
class PEFTScale:
    """What PEFT's configuration says of the scale alpha / r; a pattern that fits a layer's name wins over r
    and lora_alpha."""
    r: Size | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[str, Size] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False


def peft_scale(path, keys):
    """-> PEFTScale from the adapter_config.json beside a file, or from a header that Diffusers wrote; empty
    without one. ValueError for options that change what A and B mean."""
    config = {}
    if path.stem == "adapter_model" or any(key.startswith("base_model.model.") for key in keys):
        config = dict(lora_alpha=8) | read_json(path.parent / "adapter_config.json")  # PEFT's default
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        config = from_json(header.get("lora_adapter_metadata", "{}"), dict, path)
    # A pipeline of Diffusers writes the part's name before each option.
    config = {option.removeprefix("transformer."): value for option, value in config.items()}

    def refuse(option):
        raise ValueError(f"{path}: its configuration has {option} = {config[option]}, which is not read "
                         "here; merge it with PEFT, or train a plain LoRA")

    for option, value in config.items():
        # use_dora, use_qalora and the like; of those rsLoRA alone is read
        other_maths = option in OTHER_MATHS or (option.startswith("use_") and option != "use_rslora")
        if other_maths and value:
            refuse(option)
    if config.get("peft_type") not in (None, "LORA"):
        refuse("peft_type")
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        refuse("init_lora_weights")
    return config_from(PEFTScale, config, f"the configuration of {path}")


def by_pattern(patterns, layer, default):
    """The value of the first pattern that the end of the layer's name matches, as PEFT does it."""
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", layer, timeout=1):
                return value
        except (regex.error, TimeoutError, RecursionError) as e:
            raise ValueError(f"the LoRA's configuration holds the pattern '{pattern[:80]}', which is no "
                             f"regular expression, or takes too long ({e}); correct it") from None
    return default


def configured_alpha(scale, path, key, rank):
    """The alpha that PEFT's configuration gives the layer of an A of this rank, for a scale of alpha / rank.

    With an empty configuration it is the rank: nothing is scaled.
    """
    layer, *_ = split_key(key)
    own_rank = by_pattern(scale.rank_pattern, layer, rank if scale.r is None else scale.r)
    alpha = by_pattern(scale.alpha_pattern, layer, rank if scale.lora_alpha is None else scale.lora_alpha)
    if own_rank != rank:
        raise ValueError(f"{path}: '{key}' has rank {rank}, its configuration says {own_rank}; "
                         "they are not of one adapter")
    if scale.use_rslora:
        return alpha * rank ** .5  # rsLoRA's scale is alpha / sqrt(rank), and `merge_lora` divides by rank
    return alpha


def read_lora(dit, path):
    """Reads an adapter file of any form above, and finds what can be wrong with it; nothing is changed.

    -> the file, {key: tensor}, {our parameter name: {kind: key}}, {our parameter name: alpha}
    """
    path = lora_file(path)
    found = open_tensors([path])
    scale = peft_scale(path, found)
    matched = match_adapter(dit, path, {key: shape for key, (shape, _) in found.items()})
    tensors = {key: read() for key, (_, read) in found.items()}
    alphas = {}
    for name, keys in matched.items():
        if "alpha" in keys:
            alphas[name] = tensors[keys["alpha"]]
        elif "A" in keys:
            alphas[name] = configured_alpha(scale, path, keys["A"], len(tensors[keys["A"]]))
        if "A" in keys and not 0 < float(alphas[name]) < math.inf:
            raise ValueError(f"{path}: the alpha of {name} is {float(alphas[name])}; it must be above 0")
    return path, tensors, matched, alphas


@torch.no_grad()
def merge_lora(dit, path, strength=1.0, apart=False):
    """Adds an adapter file of any form above into the weights, W += strength (alpha / r) B A.
    -> the pairs that were added, {layer name: (A, B)}, float32 on the CPU, with the scale in B.

    path: a file, or a folder that holds one. Every key must fit, else ValueError and nothing is changed. A
    sum that overflows the weights' dtype is found half way, and the model must then be loaded anew.
    apart: below float32, linear layers keep W and B A apart, as in training: in bfloat16 their sum would be
    rounded to 8 bits, which takes a good part of a small B A away. (Not those of the time embedding, which
    are computed in float32 from the weights alone.)
    lightx2v's files also hold whole differences of weights, biases, norms and modulations. They are added
    too, but an exported LoRA could not hold them: dit.merged_differences is set to the file's path, and
    `add_lora` then refuses to train.
    """
    path, tensors, matched, alphas = read_lora(dit, path)
    pairs = {}
    for name, keys in matched.items():
        weight = dit.get_parameter(name)
        # a LoRA pair, with the scale in B: beside the weight or in it
        if "A" in keys:
            A = tensors[keys["A"]].float()  # (r, in, ...)
            B = strength * float(alphas[name]) / len(A) * tensors[keys["B"]].float()  # (out, r, ...)
            layer = name.removesuffix(".weight")
            # summed in float32, of which the weights' dtype then takes what it can hold
            merged = weight.float() + (B.flatten(1) @ A.flatten(1)).view(weight.shape).to(weight.device)
            if not merged.to(weight.dtype).isfinite().all():
                raise ValueError(f"{path}: '{keys['B']}' times '{keys['A']}' overflows {weight.dtype}; "
                                 "give another LoRA")
            can_be_apart = (type(dit.get_submodule(layer)) is nn.Linear
                            and not layer.startswith("condition_embedder.time_"))
            if apart and weight.dtype != torch.float32 and can_be_apart:
                dit.set_submodule(layer, LinearApart(dit.get_submodule(layer), A, B))
            else:
                weight.copy_(merged)
            pairs[layer] = A, B
        # a whole difference, which may come beside a pair
        if "difference" in keys:
            merged = weight + (strength * tensors[keys["difference"]].float()).to(weight)
            if not merged.isfinite().all():
                raise ValueError(f"{path}: '{keys['difference']}' overflows {weight.dtype}; "
                                 "give another LoRA")
            weight.copy_(merged)
            dit.merged_differences = path
    return pairs
