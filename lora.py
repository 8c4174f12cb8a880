"""LoRA (arXiv 2106.09685) for the DiT's attention projections: W + (alpha / r) B A, and the files other tools read.

    trained = add_lora(wan.dit, rank=32, alpha=64)     # in place; the model starts unchanged
    with lora_off(wan.dit): ...                        # the reference model
    save_file(lora_weights(wan.dit), "lora.safetensors")
    merge_lora(load_wan("tiny/wan").dit, "lora.safetensors")

Left out: dropout, adapters on other layers.
"""

import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import _open_tensors, original_dit_key


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank one; .scale = 0 turns it off (the reference model).

    The low-rank weights are float32 and are multiplied in the frozen layer's dtype: a float32 copy of every input would
    double what a bfloat16 block keeps for its backward pass.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        self.scale = self.full_scale = alpha / rank

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.scale:
            y = y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale
        return y


def add_lora(dit, rank=32, alpha=64, generator=None):
    """Wraps every attention projection (to_q, to_k, to_v, to_out.0) in place; only the new matrices require gradients.

    A is uniform in +-1/sqrt(in) (PEFT's initialisation), B zero: the model starts unchanged. -> trainable {name: parameter}
    """
    dit.requires_grad_(False)
    for block in dit.blocks:
        for attention in (block.attn1, block.attn2):
            for owner, name in ((attention, "to_q"), (attention, "to_k"), (attention, "to_v"), (attention.to_out, "0")):
                layer = LoRALinear(owner.get_submodule(name), rank, alpha)
                bound = layer.weight.shape[1] ** -.5
                with torch.no_grad():
                    layer.lora_A.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))
                setattr(owner, name, layer) if owner is attention else owner.__setitem__(0, layer)
    return {name: p for name, p in dit.named_parameters() if p.requires_grad}


class lora_off:
    """with lora_off(dit): the model as it was before add_lora."""

    def __init__(self, dit):
        self.layers = [m for m in dit.modules() if isinstance(m, LoRALinear)]

    def __enter__(self):
        for m in self.layers:
            m.scale = 0

    def __exit__(self, *_):
        for m in self.layers:
            m.scale = m.full_scale


def lora_weights(dit, values=None, layout="diffusers", base=None):
    """Adapter weights for a file: {key: tensor}, alpha / r folded into B so that no reader needs to know alpha.

    layout: diffusers (transformer. prefix, PEFT's lora_A / lora_B; WanPipeline.load_lora_weights reads it) or original
    (diffusion_model. prefix and the original release's names; ComfyUI reads it). values: {parameter name: tensor}
    instead of the model's own, e.g. an average. base: of `merge_lora`, an adapter merged before; the file then holds
    the sum, of rank r + r_base: B A + B' A' = [B B'] [A; A'].
    """
    pairs = dict(base or {})
    for name, m in dit.named_modules():
        if isinstance(m, LoRALinear):
            A, B = ((values or {}).get(f"{name}.lora_{x}", getattr(m, f"lora_{x}")).detach().cpu() for x in "AB")
            A0, B0 = pairs.get(name, (A[:0], B[:, :0]))
            pairs[name] = torch.cat([A, A0]), torch.cat([B * m.full_scale, B0], 1)
    out = {}
    for name, (A, B) in pairs.items():
        key = f"transformer.{name}" if layout == "diffusers" else f"diffusion_model.{original_dit_key(name)}"
        out |= {f"{key}.lora_A.weight": A.contiguous(), f"{key}.lora_B.weight": B.contiguous()}
    return out


def lora_file(path):
    """-> the adapter file that path, a file or a folder of a run, stands for. ValueError if there is none."""
    path = Path(path) / "lora.safetensors" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise ValueError(f"no LoRA file '{path}'; give a .safetensors file, or a run's folder that holds lora.safetensors")
    return path


@torch.no_grad()
def merge_lora(dit, path, strength=1.0):
    """Adds a LoRA file of either layout into the weights: W += strength (alpha / r) B A. Every key must find its layer.

    -> what was added, {layer name: (A, B)}, float32 on the CPU, with the scale in B.
    """
    path = lora_file(path)
    tensors = {name: read() for name, (_, read) in _open_tensors([path]).items()}
    layers, pairs = {}, {}
    for name, m in dit.named_modules():
        if isinstance(m, nn.Linear):
            layers |= {f"transformer.{name}": (name, m), f"diffusion_model.{original_dit_key(name)}": (name, m)}
    stems = {re.sub(r"\.(lora_[AB]\.weight|alpha)$", "", key) for key in tensors}
    for stem in sorted(stems):
        A, B = (tensors.get(f"{stem}.lora_{x}.weight") for x in "AB")
        name, layer = layers.get(stem, (None, None))
        if layer is None or A is None or B is None or (B.shape[0], A.shape[1]) != tuple(layer.weight.shape):
            raise ValueError(f"{path}: '{stem}' fits no layer of this model; the LoRA is another model's, or not a LoRA file")
        scale = strength * float(tensors.get(f"{stem}.alpha", A.shape[0])) / A.shape[0]
        pairs[name] = A.float(), scale * B.float()
        layer.weight.add_((pairs[name][1] @ pairs[name][0]).to(layer.weight))
    return pairs
