"""LoRA (arXiv 2106.09685) of the DiT's attention projections, W + (alpha / r) B A, and its files.

    trained = add_lora(wan.dit, rank=32, alpha=64)     # in place; the model starts unchanged
    with lora_off(wan.dit): ...                        # the reference model
    save_file(lora_weights(wan.dit), "lora.safetensors")
    merge_lora(load_wan("tiny/wan").dit, "lora.safetensors")

Left out: dropout, adapters on other layers.
"""

import contextlib
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import original_dit_key
from weights import open_tensors


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank one; .scale = 0 turns it off (the reference model).

    The low-rank weights are float32 and are multiplied in the frozen layer's dtype: a float32 copy of every
    input would double what a bfloat16 block keeps for its backward pass.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        self.scale = self.full_scale = alpha / rank

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        # Not added at all rather than added times zero: the reference is the frozen model to the bit.
        if self.scale == 0:
            return y
        low_rank = F.linear(x, self.lora_A.to(x.dtype))  # (B, L, rank)
        return y + F.linear(low_rank, self.lora_B.to(x.dtype)) * self.scale


@torch.no_grad()
def add_lora(dit, rank=32, alpha=64, generator=None):
    """Wraps every attention projection (to_q, to_k, to_v, to_out.0) in place. -> trainable {name: parameter}

    A is uniform in +-1/sqrt(in) (PEFT's initialisation), B zero: the model starts unchanged. All else is
    frozen.
    """
    dit.requires_grad_(False)
    for block in dit.blocks:
        for attention in (block.attn1, block.attn2):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                layer = LoRALinear(attention.get_submodule(name), rank, alpha)
                bound = layer.weight.shape[1] ** -.5
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
    base: of `merge_lora`, an adapter merged before; the file then holds the sum, of rank r + r_base:
    B A + B' A' = [B B'] [A; A'].
    """
    values = values or {}
    pairs = dict(base or {})
    for name, layer in dit.named_modules():
        if isinstance(layer, LoRALinear):
            # What was trained, then as more rows of A and columns of B what was merged before.
            A = values.get(f"{name}.lora_A", layer.lora_A).detach().cpu()  # (r, in)
            B = values.get(f"{name}.lora_B", layer.lora_B).detach().cpu() * layer.full_scale  # (out, r)
            base_A, base_B = pairs.get(name, (A[:0], B[:, :0]))  # nothing merged before: rank 0
            pairs[name] = torch.cat([A, base_A]), torch.cat([B, base_B], 1)
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"{file_key(name, layout)}.lora_A.weight"] = A.contiguous()
        tensors[f"{file_key(name, layout)}.lora_B.weight"] = B.contiguous()
    return tensors


def lora_file(path):
    """-> the adapter file that path, a file or a folder of a run, stands for. ValueError if there is none."""
    path = Path(path)
    if path.is_dir():
        path = path / "lora.safetensors"
    if not path.exists():
        raise ValueError(f"no LoRA file '{path}'; "
                         "give a .safetensors file, or a run's folder that holds lora.safetensors")
    return path


@torch.no_grad()
def merge_lora(dit, path, strength=1.0):
    """Adds a LoRA file of either layout into the weights, W += strength (alpha / r) B A; every key must fit.

    -> what was added, {layer name: (A, B)}, float32 on the CPU, with the scale in B.
    """
    path = lora_file(path)
    tensors = {key: read() for key, (_, read) in open_tensors([path]).items()}

    # Every linear layer under the names that a file of either layout may have for it.
    layers = {}
    for name, layer in dit.named_modules():
        if isinstance(layer, nn.Linear):
            for layout in ("diffusers", "original"):
                layers[file_key(name, layout)] = name, layer

    # A layer's tensors share a stem: its matrices A and B, and alpha where it is not folded into B.
    pairs = {}
    for stem in sorted({re.sub(r"\.(lora_[AB]\.weight|alpha)$", "", key) for key in tensors}):
        A = tensors.get(f"{stem}.lora_A.weight")
        B = tensors.get(f"{stem}.lora_B.weight")
        name, layer = layers.get(stem, (None, None))
        if layer is None or A is None or B is None or (B.shape[0], A.shape[1]) != tuple(layer.weight.shape):
            raise ValueError(f"{path}: '{stem}' fits no layer of this model; "
                             "the LoRA is another model's, or not a LoRA file")
        rank = A.shape[0]
        scale = strength * float(tensors.get(f"{stem}.alpha", rank)) / rank
        pairs[name] = A.float(), scale * B.float()
        layer.weight.add_((pairs[name][1] @ pairs[name][0]).to(layer.weight))
    return pairs
