"""The policy: Wan2.1 with what is trained of it, its reference, its optimiser and its averaged weights.

    policy = Policy(c, processes)                  # c: train.Config
    policy.velocity(prompt)(x, sigma)              # v of the model in training
    policy.reference_velocity(prompt)(x, sigma)    # of the model before training, for the KL
    loss.backward(); policy.collect_gradients()    # after each batch
    norm = policy.sum_gradients()                  # over processes; then clips them. norm: before clipping
    taken = policy.step(lr, norm)                  # False: the gradient is not finite, and left out
    policy.update_average(step)

Processes: gradients of replicated weights are summed in float64, in one all-reduce per optimiser step. This
is what DDP does, but a process that has no batch in an update needs no backward pass, and the order of the
sum, which depends on the number of processes, stays in float64's last bits. With --parallel fsdp, FSDP2
shards the frozen weights block by block and LoRA stays replicated; with --full the trained weights are
sharded as well. --shard-size 8 shards among 8 processes, a node's, and replicates over nodes. Left out:
pipeline and sequence parallelism.
"""

import contextlib
import copy
import functools
import hashlib
import math
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lora import add_lora, lora_file, lora_off, lora_weights, merge_lora
from model import load_wan, write_wan_beside
from run import digest
from sample import generator, guided_velocity
from texts import WAN, WAN_FILES, TextCache
from weights import model_folder, write_safetensors


class Policy:
    """The model in training, and all that an update of it needs.

    .wan            the model, on this process's device
    .base           the adapter that training starts from, as `lora_weights` adds it to what is exported
    .fingerprint    of the model before training; a resumed run must have the same
    .folder         that model's files, to which a full export links
    .reference_dit  with --full and --kl, a frozen copy from before training
    .trained        {name: parameter}; checkpoints use these names. .sharded: do processes hold parts of them?
    .average        {name: averaged weights}, which are evaluated and exported
    .sums           {name: float64 gradients of the batches so far}
    .in_lockstep    must every process make the same forward passes (FSDP)?
    """

    def __init__(self, c, processes, wan=None):
        """wan: another than c.model's, with its own embeddings (rehearse.py)."""
        self.c, self.processes = c, processes
        dtype = getattr(torch, c.dtype)
        if wan is None:
            wan = load_wan(c.model, processes.device, dtype, text=False)
            wan.text_cache = TextCache(c.model, Path(c.runs) / ".texts", processes.device, dtype)
            # rank 0's for all: it holds the files' times, which differ between nodes, and names what is kept
            wan.text_cache.fingerprint = processes.gather(wan.text_cache.fingerprint)[0]
            self.fingerprint = fingerprint(wan.dit, c.lora)
            self.folder = model_folder(c.model, WAN_FILES, WAN)  # the hub is not asked again at each export
        self.wan = wan
        dit = wan.dit
        # the adapter that training starts from: beside the frozen weights, so that bfloat16 does not round it
        # away; with --full, which trains the weights in float32, added into them
        self.base = merge_lora(dit, c.lora, apart=not c.full) if c.lora else {}

        # what is trained, and the reference that the KL compares with: the model without LoRA, or a frozen
        # copy
        self.reference_dit = None
        if c.full:
            dit.float()
            if c.kl:
                self.reference_dit = copy.deepcopy(dit).requires_grad_(False)
            dit.requires_grad_(True)
        else:
            add_lora(dit, c.lora_rank, c.lora_alpha, generator(c.seed, "lora"))

        # what makes it fit and fast
        dit.checkpointing = c.checkpointing
        self.in_lockstep = c.parallel == "fsdp" and processes.world > 1
        if self.in_lockstep:
            shard(dit, processes, c.shard_size)
            if self.reference_dit is not None:
                shard(self.reference_dit, processes, c.shard_size)
        if c.compile:
            for block in dit.blocks:
                block.compile()

        self.trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
        self.sharded = any(isinstance(p, DTensor) for p in self.trained.values())
        self.optimiser = torch.optim.AdamW(self.trained.values(), lr=c.lr, betas=(c.beta1, c.beta2),
                                           weight_decay=c.weight_decay, eps=1e-8)
        for p in self.trained.values():  # from the start, so that a checkpoint always has the same tensors
            self.optimiser.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p),
                                           exp_avg_sq=torch.zeros_like(p))
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.sums = {}
        if not self.sharded:
            self.sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.trained.items()}
        # each prompt of a step is asked for many times; + 1: the empty prompt of guidance
        self.embedding = functools.lru_cache(c.groups + 1)(lambda prompt: self.wan.encode_text([prompt]))

    # ---------------------------------------------------------------------------------------------- the model

    def encode_prompts(self, prompts):
        """Their embeddings on disk, each encoded by one of the processes; the text encoder is gone after."""
        rank, world = self.processes.rank, self.processes.world
        self.wan.text_cache.encode_missing(list(dict.fromkeys(prompts))[rank::world], progress=rank == 0)
        self.processes.wait()

    def velocity(self, prompt, wan=None):
        """-> velocity(x, sigma) for videos of one prompt. wan: another model than the one in training."""
        wan = wan or self.wan
        guidance = self.c.guidance
        text = self.embedding(prompt)
        negative = self.embedding("") if guidance != 1 else None

        # Repeating and trimming the text takes time, and a rollout asks at every step with the same number of
        # videos, so the velocity made for that number is kept.
        @functools.cache
        def velocity_of_batch(count):
            repeated = None if negative is None else negative.expand(count, -1, -1)
            return guided_velocity(wan, text.expand(count, -1, -1), repeated, guidance)

        return lambda x, sigma: velocity_of_batch(len(x))(x, sigma)

    def reference_velocity(self, prompt):
        """-> velocity(x, sigma), without gradients, of the model before training (Wan with --lora's adapter):
        LoRA is off for it, or with --full it is the frozen copy's."""
        wan = self.wan
        if self.c.full:
            wan = copy.copy(wan)  # shallow: the same texts and VAE, but the frozen DiT
            wan.dit = self.reference_dit
        velocity = self.velocity(prompt, wan)

        @torch.no_grad()
        def reference(x, sigma):
            without_lora = contextlib.nullcontext() if self.c.full else lora_off(wan.dit)
            with without_lora:
                return velocity(x, sigma)

        return reference

    @torch.no_grad()
    def keep_pace(self, passes):
        """Makes forward passes of a single patch. FSDP gathers each block's weights in the same pass of all
        processes, so one that has fewer videos than the others must make up for it."""
        if not self.in_lockstep:
            return
        dit, device = self.wan.dit, self.processes.device
        x = torch.zeros(1, dit.config.in_channels, 1, 2, 2, device=device)
        text = torch.zeros(1, 1, dit.config.text_dim, device=device, dtype=getattr(torch, self.c.dtype))
        for _ in range(passes):
            dit(x, torch.zeros(1, device=device), text)

    # ------------------------------------------------------------------------------------------------ updates

    def collect_gradients(self):
        """Moves a batch's gradients into float64 sums: then the order of the batches and the processes they
        ran on hardly ever show in the float32 gradient, whose last bits Adam would magnify. (Sharded
        gradients are summed by FSDP, in float32.)"""
        if self.sharded:
            return
        for name, p in self.trained.items():
            if p.grad is not None:
                self.sums[name] += p.grad
                p.grad = None

    def sum_gradients(self):
        """Sums gradients over processes, then clips them. -> their norm before clipping. RuntimeError if the
        processes do not agree on it."""
        if self.sharded:  # FSDP has summed them
            for p in self.trained.values():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        else:
            self.processes.add(list(self.sums.values()))
            for name, p in self.trained.items():
                p.grad = self.sums[name].to(p.dtype)
                self.sums[name].zero_()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.c.grad_clip)
        norm = float(norm.full_tensor() if self.sharded else norm)
        if len({repr(n) for n in self.processes.gather(norm)}) > 1:  # repr: NaN is not equal to itself
            raise RuntimeError("gradients differ between processes; a collective was skipped or reordered")
        return norm

    def step(self, lr, norm):
        """An optimiser step, left out where the gradient is not finite. -> whether it was taken."""
        finite = math.isfinite(norm)
        if finite:
            self.optimiser.param_groups[0]["lr"] = lr
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return finite

    def check_finite(self):
        """RuntimeError names a tensor that is not finite: such weights are not saved, exported or trained on.
        All processes call, and all of them raise."""
        bad = None
        for name, values in self.state().items():
            local = values.to_local() if isinstance(values, DTensor) else values
            if not local.isfinite().all():
                bad = name
        for name in self.processes.gather(bad):
            if name is not None:
                raise RuntimeError(f"{name} holds NaN or infinite values; begin another run (--name) with a "
                                   "smaller --lr, from what this one exported (--lora, with --full --model)")

    @torch.no_grad()
    def update_average(self, step):
        """Every ema_every steps the averaged weights move towards the trained ones."""
        if (step + 1) % self.c.ema_every == 0:
            for name, p in self.trained.items():
                self.average[name].lerp_(p, 1 - self.c.ema_decay)

    # -------------------------------------------------------------------------------- averaged weights, files

    @torch.no_grad()
    def set_weights(self, values):
        for name, p in self.trained.items():
            p.copy_(values[name])
        if self.sharded:  # after a forward pass alone FSDP keeps the root's weights gathered: the old ones
            self.wan.dit.reshard()

    @contextlib.contextmanager
    def averaged(self):
        """with policy.averaged(): the model at its averaged weights."""
        live = {name: p.detach().clone() for name, p in self.trained.items()}
        self.set_weights(self.average)
        try:
            yield
        finally:
            self.set_weights(live)

    def state(self):
        """The whole training state as {name: tensor}, for torch.distributed.checkpoint."""
        out = {}
        for name, p in self.trained.items():
            out[f"model.{name}"] = p.detach()
            out[f"average.{name}"] = self.average[name]
            out |= {f"adam.{key}.{name}": value for key, value in self.optimiser.state[p].items()}
        return out

    def export(self, folder):
        """Writes the averaged weights: LoRA for Diffusers (lora.safetensors) and ComfyUI
        (lora_comfyui.safetensors); with --full a whole model, model/, as `load_wan` reads it. All processes
        call, rank 0 writes."""
        self.check_finite()
        rank = self.processes.rank
        if self.c.full:
            tensors = {}
            for name, values in self.average.items():
                whole = values.full_tensor() if self.sharded else values  # which all processes gather
                if rank == 0:
                    tensors[name] = whole.cpu()
            if rank == 0:
                write_wan_beside(self.folder, folder / "model", self.wan.dit.config, tensors)
            return
        if rank:
            return
        for name, layout in (("lora", "diffusers"), ("lora_comfyui", "original")):
            tensors = lora_weights(self.wan.dit, self.average, layout, self.base)
            write_safetensors(folder / f"{name}.safetensors", tensors)


def fingerprint(dit, lora):
    """-> SHA-256 (hex) of the first numbers of every weight, and of an adapter's file: another model, or one
    that was trained further, differs nearly everywhere."""
    sha256 = hashlib.sha256()
    if lora:
        sha256.update(digest(lora_file(lora)).encode())
    for p in dit.parameters():
        sha256.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return sha256.hexdigest()


def shard(dit, processes, size=None):
    """FSDP2, one unit a block: frozen or fully trained weights are sharded, LoRA matrices stay whole on every
    process. size: of the processes that share one copy (default: all); each such set holds the model once."""
    shape, names = (processes.world,), ("shards",)
    if size and size < processes.world:
        shape, names = (processes.world // size, size), ("copies", "shards")
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=names)
    if processes.timeout:  # the mesh's own groups start with torch's
        for name in mesh.mesh_dim_names:
            mesh.get_group(name).set_timeout(processes.timeout)
    lora = {p for name, p in dit.named_parameters() if "lora_" in name}
    for block in dit.blocks:
        fully_shard(block, mesh=mesh, ignored_params=lora)
    fully_shard(dit, mesh=mesh, ignored_params=lora)
