"""World-R1's training loop: roll out groups of videos, score them, update the model, on 1 to many processes.

    python train.py --preset tiny --name first                       tiny twins, one process
    torchrun --nproc-per-node 8 train.py --preset small --name s1    Wan2.1-1.3B, LoRA, one node of H200s

One step:  groups of prompts -> transported noise -> rollouts with a short SDE window (grpo.rollout) -> videos -> rewards
-> advantages inside each group -> `updates` optimiser steps on the window's transitions. Every main_steps steps, a
dynamic phase trains on moving scenes with the preference reward alone (periodic decoupling).

Processes share the work by groups, and every random draw is keyed by (seed, step, prompt, member, purpose): the same
run on 1, 2 or 8 processes makes the same videos. Gradients of replicated parameters are summed in float64, in one
all-reduce per optimiser step: what DDP does, without hooks that need a backward pass from a rank whose groups may all be
masked, and without the order of the sum showing in the weights.
With --parallel fsdp, FSDP2 shards the frozen weights block by block, and LoRA stays replicated; with --full the
trained weights are sharded as well.

runs/NAME/ holds config.json, metrics.jsonl (one line a step; what a clock or the machine decides is under "machine"),
eval/, checkpoints/ and, at the end and at every evaluation, lora.safetensors. A run goes on from its newest whole
checkpoint when it is started again, on any number of processes. Left out: pipeline and sequence parallelism, servers.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor
from safetensors.torch import save_file
from tqdm import tqdm

from grpo import advantages, draw_window, kl, normalise_log_ratio, rollout, standardise, surrogate
from lora import add_lora, lora_file, lora_off, lora_weights, merge_lora
from model import load_wan
from noise_warp import camera_path, latent_noise, parse_motion
from rewards import TERMS, TINY, Rewards, combine, motion_magnitude
from sample import contact_sheet, generator, guided_velocity, initial_noise, log_prob, model_defaults, sample, sigmas, transition, write_video

ROOT = Path(__file__).parent


@dataclass
class Config:
    # what
    name: str = "tiny"  # of the run: everything goes to runs/NAME
    runs: str = "runs"  # folder of runs
    model: str = str(TINY / "wan")  # folder in either layout, or hub id
    lora: str = ""  # a LoRA merged into the model first: what is trained starts from there, and exports hold both
    prompts: str = "tiny"  # "tiny": the procedural captions; else a file: prompts.jsonl's schema, or one prompt a line
    train_prompts: int = 0  # train on the first so many of them; 0: on all
    frames: int = 0  # 0: the model's default, as for height, width and sampling_steps
    height: int = 0
    width: int = 0
    seed: int = 0
    # rollouts
    groups: int = 6  # prompts a step, over all processes
    members: int = 8  # videos a prompt (G)
    steps: int = 10  # denoising steps of a rollout
    guidance: float = 1.0  # of a rollout; 1 = off
    eta: float = .7  # noise level of the SDE
    sde: str = "flow"  # flow | dance | cps
    window: int = 2  # consecutive SDE steps, the ones that are trained
    high: int = 5  # the window lies within the first `high` steps
    shared: bool = False  # one ODE prefix a prompt, branching at the window, instead of independent initial noises
    strength: float = 1.0  # of the camera path that is asked for, and that transports the noise
    degradation: float = -1.0  # fresh noise mixed into the transported; -1: the model's default
    # rewards
    depth_anything: str = str(TINY / "depth_anything")
    critic: str = str(TINY / "qwen3_vl")
    preference: str = str(TINY / "hpsv3")
    lpips: str = "random"  # alex | random (a stand-in)
    views: int = 5  # frames that are reconstructed
    first: int = 2  # frames the preference model sees
    meta: float = 1.0  # weights of the terms; 0 leaves one out
    recon: float = 1.0
    traj: float = 1.0
    general: float = 1.0
    standardise: bool = True  # each term by its group's spread before the sum; the paper sums plainly
    pooled: bool = False  # spreads are those of all the step's groups together, instead of each group's own
    max_masked: float = .5  # a step with a larger share of failed rewards stops the run
    # the update
    lr: float = 3e-4
    decay: float = 0.0  # share of the run, at its end, over which the learning rate falls to 0 along a line
    beta1: float = .9
    beta2: float = .999
    weight_decay: float = 1e-4
    clip: float = 1e-3  # of the ratio
    kl: float = .004  # weight of the KL to the untouched model
    adv_clip: float = 5.0
    grad_clip: float = 1.0
    updates: int = 1  # optimiser steps a rollout
    ratio_norm: bool = False  # GRPO-Guard's normalised ratio
    full: bool = False  # train all weights instead of LoRA
    rank: int = 32
    alpha: float = 64.0
    ema_decay: float = .9
    ema_every: int = 8
    # the schedule
    total_steps: int = 200
    main_steps: int = 100
    dynamic_steps: int = 50
    eval_every: int = 50  # 0: never
    eval_prompts: int = 16
    save_every: int = 1
    keep: int = 2  # checkpoints
    # the machine
    device: str = ""  # cuda when there is one
    dtype: str = ""  # of the frozen weights: bfloat16 on CUDA, else float32
    parallel: str = "ddp"  # ddp | fsdp
    batch: int = 0  # videos of a group that go through the model at once; 0: all
    checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool = False
    offload: bool = False  # keep the reward models on the CPU while the policy works
    wandb: bool = False


REAL = dict(prompts=str(ROOT / "prompts.jsonl"), groups=48, members=8, steps=50, guidance=5.0, high=25, critic="Qwen/Qwen3-VL-4B-Instruct",
            depth_anything="depth-anything/DA3-GIANT", preference="MizzenAI/HPSv3", lpips="alex", views=21, first=8, standardise=False,
            lr=1e-4, clip=1e-3, kl=.004, updates=2, total_steps=600, eval_every=50, eval_prompts=32, batch=1, checkpointing=True)
PRESETS = {  # groups, members, 832x480x81 from the paper; LoRA, AdamW, clip, KL, EMA, steps, phases from the released configuration
    "tiny": dict(lora=str(TINY / "web"), groups=4, shared=True, high=3, pooled=True, recon=2.0, lr=5e-4, ema_decay=.95, ema_every=1,
                 total_steps=96, main_steps=20, dynamic_steps=4, eval_every=24),
    "small": dict(REAL, model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "large": dict(REAL, model="Wan-AI/Wan2.1-T2V-14B-Diffusers", groups=96, parallel="fsdp", offload=True),
}


def parse_arguments(argv=None):
    """-> Config: a preset's values, over them the options given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(), re.M))
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=comments.get(f.name, "").replace("%", "%%") or None, **kind)
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    given = {k: v for k, v in given.items() if v is not None}
    c = Config(**PRESETS[preset] | ({"lora": ""} if "model" in given else {}) | given)  # a preset's LoRA is for its own model
    defaults = model_defaults(c.model)
    for name in ("frames", "height", "width"):
        setattr(c, name, getattr(c, name) or defaults[name])
    c.degradation = defaults["degradation"] if c.degradation < 0 else c.degradation
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    c.dtype = c.dtype or ("bfloat16" if c.device.startswith("cuda") else "float32")
    return c


def check(c, world):
    """Raises ValueError with one sentence for the first setting that cannot work."""
    for name in ("groups", "members", "steps", "window", "updates", "total_steps", "main_steps", "save_every", "keep", "rank", "views", "first", "ema_every"):
        if getattr(c, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(c, name)}")
    for name, values in (("parallel", ("ddp", "fsdp")), ("sde", ("flow", "dance", "cps")), ("dtype", ("float32", "bfloat16")), ("lpips", ("alex", "random"))):
        if getattr(c, name) not in values:
            raise ValueError(f"--{name} must be one of {', '.join(values)}, got '{getattr(c, name)}'")
    if c.members < 2:
        raise ValueError("--members must be at least 2: advantages compare the members of a group")
    if c.frames % 4 != 1 or c.height % 16 or c.width % 16:
        raise ValueError(f"videos need 4k+1 frames and sides that are multiples of 16, got {c.frames} frames of {c.height}x{c.width}")
    if not 0 < c.eta <= 1:
        raise ValueError(f"--eta must be above 0 and at most 1, got {c.eta}: without noise there is nothing to compare")
    if c.parallel == "fsdp" and c.groups % (world * c.updates):
        raise ValueError(f"--parallel fsdp needs --groups to be a multiple of processes x updates = {world * c.updates}, got {c.groups}")
    if c.groups % c.updates:
        raise ValueError(f"--groups must be a multiple of --updates, got {c.groups} and {c.updates}")
    if c.batch < 0 or c.batch and c.members % c.batch:
        raise ValueError(f"--members must be a multiple of --batch, got {c.members} and {c.batch}")
    if c.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU, and none is available; use --device cpu")
    draw_window(generator(0), c.steps, c.window, c.high)
    if c.lora:
        lora_file(c.lora)


# -------------------------------------------------------------------------------------------------------------- prompts

def load_prompts(source):
    """-> {"train": [...], "dynamic": [...], "test": [...]} of prompt strings.

    source: "tiny" for the procedural captions; else a .jsonl file with prompt and split (prompts.jsonl's schema), or a
    text file with one prompt a line (all train; the last tenth, at least one, test). A bad line is named.
    """
    if source == "tiny":
        from tiny_world import random_scene
        out, seen = {}, set()
        for name, count in (("train", 3000), ("dynamic", 500), ("test", 300)):
            captions = (random_scene(f"rl/{name}", "dynamic" if name == "dynamic" else "static", i).caption for i in itertools.count())
            out[name] = list(itertools.islice((c for c in captions if name == "train" or c not in seen), count))
            seen |= set(out[name])
        return out
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"the prompt file '{source}' cannot be read ({e})") from None
    out = {"train": [], "dynamic": [], "test": []}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if str(source).endswith(".jsonl"):
            try:
                row = json.loads(line)
                prompt, split = row["prompt"], row.get("split", "train")
                if not isinstance(prompt, str) or not prompt.strip() or split not in out:
                    raise ValueError("it needs a non-empty prompt, and a split of train, dynamic or test")
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{source}, line {number}: {e if not isinstance(e, KeyError) else f'no {e}'}") from None
        else:
            prompt, split = line.strip(), "train"
        out[split].append(prompt)
    if not out["train"]:
        raise ValueError(f"{source} holds no training prompt")
    if not out["test"]:
        cut = max(1, len(out["train"]) // 10)
        out["test"] = out["train"][-cut:]
        out["train"] = out["train"][:-cut] or out["train"]
    return out


def prompt_order(count, seed, epoch):
    return torch.randperm(count, generator=generator(seed, epoch, "order")).tolist()


def step_prompts(c, prompts, step):
    """-> is this a dynamic step, and its [(index, prompt)] * groups: each phase walks through its own list, shuffled anew
    every time around."""
    cycle = c.main_steps + c.dynamic_steps
    dynamic = step % cycle >= c.main_steps and bool(prompts["dynamic"])
    rows = prompts["dynamic" if dynamic else "train"]
    done = step // cycle * (c.dynamic_steps if dynamic else c.main_steps) + step % cycle - (c.main_steps if dynamic else 0)
    out = []
    for k in range(done * c.groups, (done + 1) * c.groups):
        index = prompt_order(len(rows), (c.seed, dynamic), k // len(rows))[k % len(rows)]
        out.append((index, rows[index]))
    return dynamic, out


# ------------------------------------------------------------------------------------------------------------ processes

class Processes:
    """The process group, or a single process: rank, world, device."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = device.startswith("cuda")
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            store, *_ = next(dist.rendezvous("env://"))  # torchrun's own, which outlives a restart: addresses of the dead are in it
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.world)

    def gather(self, value):
        """[value of rank 0, of rank 1, ...] on every rank."""
        if self.world == 1:
            return [value]
        out = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def add(self, tensors):
        """Sums tensors over the ranks in place, in one flat all-reduce."""
        if self.world > 1 and tensors:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- policy

class Policy:
    """The model with what is trained of it, its reference, optimiser and averaged weights."""

    def __init__(self, c, processes):
        self.c, self.processes = c, processes
        self.wan = load_wan(c.model, processes.device, getattr(torch, c.dtype))
        dit, self.frozen = self.wan.dit, None
        self.base = merge_lora(dit, c.lora) if c.lora else {}
        self.embedding = functools.lru_cache(c.groups + 1)(lambda prompt: self.wan.encode_text([prompt]))  # once a prompt and step
        if c.full:
            dit.float()
            self.frozen = copy.deepcopy(dit).requires_grad_(False) if c.kl else None
            dit.requires_grad_(True)
        else:
            add_lora(dit, c.rank, c.alpha, generator(c.seed, "lora"))
        dit.checkpointing = c.checkpointing
        if c.parallel == "fsdp" and processes.world > 1:
            shard(dit), self.frozen and shard(self.frozen)
        if c.compile:
            for block in dit.blocks:
                block.compile()
        self.trained = {n: p for n, p in dit.named_parameters() if p.requires_grad}
        self.sharded = any(isinstance(p, torch.distributed.tensor.DTensor) for p in self.trained.values())
        self.optimiser = torch.optim.AdamW(self.trained.values(), lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, eps=1e-8)
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.sums = {} if self.sharded else {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self.trained.items()}
        for p in self.trained.values():  # Adam's state from the start, so that a checkpoint always has the same tensors
            self.optimiser.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def velocity(self, prompt, count, reference=False):
        """-> velocity(x, sigma) of `count` videos of one prompt, c.batch at a time. reference: of the untouched model."""
        wan, size = self.wan, min(count, self.c.batch or count)
        text = self.embedding(prompt).expand(size, -1, -1)
        negative = self.embedding("").expand(size, -1, -1) if self.c.guidance != 1 else None
        if reference and self.frozen is not None:
            wan = copy.copy(wan)
            wan.dit = self.frozen
        once = guided_velocity(wan, text, negative, self.c.guidance)
        return lambda x, sigma: torch.cat([once(part, sigma) for part in x.split(size)])

    def untouched(self):
        return contextlib.nullcontext() if self.c.full else lora_off(self.wan.dit)

    def collect(self):
        """Moves a group's gradients into float64 sums: then neither the order of the groups nor the processes they ran on
        shows in the float32 gradient, which Adam would magnify. (Sharded gradients are summed by FSDP, in float32.)"""
        if not self.sharded:
            for n, p in self.trained.items():
                if p.grad is not None:
                    self.sums[n] += p.grad
                    p.grad = None

    def gradients(self):
        """Sums gradients over processes and clips them. -> their norm, the same on every rank or an error."""
        if not self.sharded:
            self.processes.add(list(self.sums.values()))
        for n, p in self.trained.items():
            if not self.sharded:
                p.grad = self.sums[n].to(p.dtype)
                self.sums[n].zero_()
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.c.grad_clip)
        norm = float(norm.full_tensor() if self.sharded else norm)
        if len(set(self.processes.gather(norm))) > 1:
            raise RuntimeError("gradients differ between processes; a collective was skipped or reordered")
        return norm

    def follow(self, step):
        if (step + 1) % self.c.ema_every == 0:
            with torch.no_grad():
                for n, p in self.trained.items():
                    self.average[n].lerp_(p, 1 - self.c.ema_decay)

    @contextlib.contextmanager
    def averaged(self):
        """with policy.averaged(): the model at its averaged weights."""
        live = {n: p.detach().clone() for n, p in self.trained.items()}
        with torch.no_grad():
            for n, p in self.trained.items():
                p.copy_(self.average[n])
        yield
        with torch.no_grad():
            for n, p in self.trained.items():
                p.copy_(live[n])

    def state(self):
        """The whole training state as {name: tensor}, for torch.distributed.checkpoint."""
        out = {}
        for n, p in self.trained.items():
            out |= {f"model.{n}": p.detach(), f"average.{n}": self.average[n]} | {f"adam.{k}.{n}": v for k, v in self.optimiser.state[p].items()}
        return out

    def export(self, folder):
        """Writes the averaged LoRA for Diffusers (lora.safetensors) and ComfyUI (lora_comfyui.safetensors), rank 0 alone."""
        if self.c.full or self.processes.rank:
            return
        for name, layout in (("lora", "diffusers"), ("lora_comfyui", "original")):
            part = folder / f".{name}.part"
            save_file(lora_weights(self.wan.dit, self.average, layout, self.base), part, metadata={"format": "pt"})
            part.rename(folder / f"{name}.safetensors")


def shard(dit):
    """FSDP2, one unit a block: frozen or fully trained weights are sharded, LoRA matrices stay whole on every rank."""
    from torch.distributed.fsdp import fully_shard
    lora = {p for n, p in dit.named_parameters() if "lora_" in n}
    for block in dit.blocks:
        fully_shard(block, ignored_params=lora)
    fully_shard(dit, ignored_params=lora)


# -------------------------------------------------------------------------------------------------- the three phases

@torch.no_grad()
def roll_out(policy, step, index, prompt):
    """One group: G videos of a prompt. -> dict with videos, path, and the window's transitions."""
    c, wan = policy.c, policy.wan
    G, purpose = c.members, ("dynamic" if step % (c.main_steps + c.dynamic_steps) >= c.main_steps else "train")
    path = camera_path(parse_motion(prompt), c.frames, c.strength)
    draws = [generator(c.seed, step, purpose, index, member, "noise") for member in range(1 if c.shared else G)]
    noise = latent_noise(path, c.frames, c.height // 8, c.width // 8, len(draws), draws, wan.dit.config.in_channels, c.degradation)
    window = draw_window(generator(c.seed, step, purpose, index, "window"), c.steps, c.window, c.high)
    levels = sigmas(c.steps, wan.shift or 5.0)
    one, many = policy.velocity(prompt, len(noise)), policy.velocity(prompt, G)
    latents, transitions = rollout(lambda x, s: (one if len(x) < G else many)(x, s), noise.to(wan.device), levels, window, c.eta, c.sde,
                                   [generator(c.seed, step, purpose, index, member, "sde") for member in range(G)], c.shared, G)
    videos = [wan.vae.decode(x[None])[0].cpu() for x in latents]
    return dict(index=index, prompt=prompt, path=path, levels=levels, videos=videos, transitions=transitions)


def reward(rewards, group, dynamic):
    """Adds the terms (G,) and the motion magnitudes to a group."""
    G = len(group["videos"])
    group.update(terms=rewards.terms(group["videos"], [group["prompt"]] * G, [group["path"]] * G, dynamic),
                 motion=[motion_magnitude(v) for v in group["videos"]])


def judge(c, weights, terms, dynamic):
    """All groups' terms {name: (groups x G,)} -> the advantages (groups x G,) of their (standardised) weighted sum."""
    ids = torch.arange(c.groups).repeat_interleave(c.members)
    if c.standardise:
        terms = {name: standardise(terms[name], ids, c.pooled) for name in TERMS}
    return advantages(combine(terms, weights, dynamic)[1], ids, c.adv_clip, c.pooled)


def update(policy, groups, share):
    """Adds the gradients of some groups' window transitions, each group weighing `share`. -> statistics per transition."""
    c, notes = policy.c, []
    G, size = c.members, min(c.members, c.batch or c.members)
    for group in groups:
        for t, first in itertools.product(group["transitions"], range(0, G, size)):
            part = slice(first, first + size)
            x, A = t["x"][part], group["advantages"][part].to(t["x"].device)
            sigma, sigma_next = group["levels"][t["index"]], group["levels"][t["index"] + 1]
            mean, std = transition(x, policy.velocity(group["prompt"], size)(x, sigma), sigma, sigma_next, c.eta, c.sde)
            logp = log_prob(t["x_next"][part], mean, std)
            log_ratio = logp - t["logp"][part]
            drift = log_ratio.detach().abs().max().item()
            if c.ratio_norm:
                log_ratio = normalise_log_ratio(log_ratio, mean, t["mean"][part], std)
            loss, distance = surrogate(log_ratio, torch.zeros_like(log_ratio), A, c.clip), torch.zeros(())
            if c.kl:
                with torch.no_grad(), policy.untouched():
                    reference, _ = transition(x, policy.velocity(group["prompt"], size, reference=True)(x, sigma), sigma, sigma_next, c.eta, c.sde)
                distance = kl(mean, reference, std).mean()
                loss = loss + c.kl * distance
            (loss * share * size / G / len(group["transitions"])).backward()
            ratio = log_ratio.detach().exp()
            notes.append(dict(ratio=ratio.mean().item(), ratio_max=ratio.max().item(), drift=drift,
                              clipped=((ratio - 1).abs() > c.clip).float().mean().item(), kl=distance.item(), loss=loss.item()))
        policy.collect()
    return notes


@torch.no_grad()
def evaluate(policy, rewards, prompts, folder, batch=8):
    """ODE samples with the model's own defaults and transported noise, one fixed seed, for fixed test prompts: mean terms.

    Processes share the prompts in batches of `batch`; rank 0's first batch is written as videos.
    """
    c, processes, rows = policy.c, policy.processes, []
    defaults, wan = model_defaults(c.model), policy.wan
    for k, start in enumerate(range(0, len(prompts), batch)):
        if k % processes.world != processes.rank and not policy.sharded and c.parallel != "fsdp":
            continue
        part = prompts[start:start + batch]
        noise, paths = zip(*[initial_noise(wan, p, c.frames, c.height, c.width, [start + i], c.seed, strength=c.strength, degradation=c.degradation)
                              for i, p in enumerate(part)])
        latents = sample(wan, part, torch.cat(noise), defaults["steps"], defaults["guidance"])
        if k % processes.world != processes.rank:
            continue  # under FSDP every rank runs the model, and one scores
        videos = [wan.vae.decode(x[None])[0].cpu() for x in latents]
        scores = rewards(videos, part, paths)
        rows += [{name: float(scores[name][i]) for name in scores} | dict(motion=motion_magnitude(videos[i])) for i in range(len(part))]
        if start == 0:
            for i, video in enumerate(videos):
                write_video(folder / f"{i:02d}.mp4", video, defaults["fps"])
            contact_sheet(folder / "sheet.png", videos)
    rows = [row for part in processes.gather(rows) for row in part]
    return {name: mean_of([row[name] for row in rows]) for name in rows[0]}


def mean_of(values):
    """Mean of the finite values, None without any (JSON has no NaN)."""
    values = [v for v in values if math.isfinite(v)]
    return sum(values) / len(values) if values else None


def spread_of(groups, name):
    """Mean over groups of a term's standard deviation inside the group."""
    return mean_of([float(g["terms"][name][~g["terms"][name].isnan()].std(correction=0)) for g in groups if (~g["terms"][name].isnan()).any()])


# ---------------------------------------------------------------------------------------------------------- checkpoints

def digest(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.rename(file)


def save_checkpoint(policy, folder, step):
    """folder/step_N, N steps done: written under another name, checksummed, then renamed; only then are old ones deleted."""
    c, processes = policy.c, policy.processes
    final = folder / f"step_{step:06d}"
    part = folder / f".part_{step:06d}"
    if processes.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    processes.gather(None)  # the folder is there for all
    try:
        dcp.save(policy.state(), checkpoint_id=part, no_dist=processes.world == 1)
    except (OSError, dcp.CheckpointException) as e:
        reason = next((str(x) for x in (*getattr(e, "failures", {}).values(), e) if str(x)), type(e).__name__).splitlines()[0]
        raise RuntimeError(f"the checkpoint after step {step} could not be written to {folder} ({reason}); older ones are untouched") from None
    processes.gather(None)  # all files are written
    if processes.rank == 0:
        write_json(part / "manifest.json", dict(step=step, files={f.name: digest(f) for f in sorted(part.iterdir())}))
        for f in part.iterdir():
            with open(f, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in sorted(folder.glob("step_*"))[:-c.keep]:
            shutil.rmtree(old)


def whole(checkpoint):
    """Whether every file of a checkpoint is as it was written; says which is not."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            if digest(checkpoint / name) != expected:
                raise ValueError(f"{name} is damaged")
        return True
    except (OSError, ValueError, KeyError) as e:
        print(f"train.py: checkpoint {checkpoint} is refused ({e}); going back to the one before", file=sys.stderr)
        return False


def load_checkpoint(policy, folder):
    """Loads the newest whole checkpoint in place. -> steps done, 0 if there is none."""
    found = None
    if policy.processes.rank == 0:
        found = next((str(p) for p in sorted(folder.glob("step_*"), reverse=True) if whole(p)), None)
    found = policy.processes.gather(found)[0]
    if found is None:
        return 0
    state = policy.state()
    dcp.load(state, checkpoint_id=found, no_dist=policy.processes.world == 1)
    return int(found.rsplit("_", 1)[1])


def open_run(c, processes):
    """Makes runs/NAME, or finds it with the same configuration. -> its folder."""
    folder = Path(c.runs) / c.name
    movable = {"runs", "name", *([] if c.decay else ["total_steps"]), "save_every", "keep", "wandb", "device", "eval_every"}  # may change on resuming
    now = dataclasses.asdict(c)
    if (folder / "config.json").exists():
        before = json.loads((folder / "config.json").read_text())
        changed = [k for k in now if k not in movable and before.get(k) != now[k]]
        if changed:
            k = changed[0]
            raise ValueError(f"{folder} was started with --{k.replace('_', '-')} {before.get(k)}, not {now[k]}; choose another --name, or keep its settings")
    processes.gather(None)
    if processes.rank == 0:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", now)
    return folder


def cut_metrics(file, steps):
    """Drops the lines of steps that are to be done again, and a half-written last line."""
    if file.exists():
        lines = []
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines += [line] if json.loads(line)["step"] < steps else []
        part = file.with_name(".metrics.part")
        part.write_text("".join(line + "\n" for line in lines))
        part.rename(file)


# ----------------------------------------------------------------------------------------------------------------- main

def train(c, processes):
    """Runs to c.total_steps, from the newest checkpoint if there is one. -> False if it was asked to stop (SIGTERM)."""
    check(c, processes.world)
    prompts = load_prompts(c.prompts)
    prompts["train"] = prompts["train"][:c.train_prompts or None]
    rewards = Rewards(c.depth_anything, c.critic, c.preference, c.lpips, c.views, c.first,
                      weights={name: getattr(c, name) for name in TERMS}, device=processes.device).load()
    folder = open_run(c, processes)
    policy = Policy(c, processes)
    start = load_checkpoint(policy, folder / "checkpoints")
    if processes.rank == 0:
        cut_metrics(folder / "metrics.jsonl", start)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    log = wandb_log(c, folder) if c.wandb and processes.rank == 0 else lambda row: None
    if start == 0 and c.eval_every:
        evaluation(policy, rewards, prompts, folder, 0)

    bar = tqdm(total=c.total_steps, initial=start, desc=c.name, unit="step", disable=processes.rank > 0)
    for step in range(start, c.total_steps):
        row = one_step(policy, rewards, prompts, step, bar)
        if processes.rank == 0:
            with open(folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
                f.flush()
                os.fsync(f.fileno())
            log(row)
        if c.eval_every and (step + 1) % c.eval_every == 0:
            bar.set_postfix_str("evaluate")
            evaluation(policy, rewards, prompts, folder, step + 1)
        stopping = any(processes.gather(bool(stop)))
        if (step + 1) % c.save_every == 0 or step + 1 == c.total_steps or stopping:
            bar.set_postfix_str("save")
            save_checkpoint(policy, folder / "checkpoints", step + 1)
        bar.update()
        bar.set_postfix_str(f"R {row['total']:.3f}" if row["total"] is not None else "")
        if stopping:
            return False
    policy.export(folder)
    return True


def learning_rate(c, step):
    """lr, and over the last `decay` share of total_steps a line down to 0, which would be the step after the last."""
    return c.lr * min(1.0, (c.total_steps - step) / max(c.decay * c.total_steps, 1))


def one_step(policy, rewards, prompts, step, bar):
    """Rollouts, rewards and updates of one step. -> its line of metrics.jsonl, the same on every rank."""
    c, processes, seconds = policy.c, policy.processes, {}
    dynamic, chosen = step_prompts(c, prompts, step)
    mine = [g for g in range(c.groups) if g % processes.world == processes.rank]
    groups, begun = {}, time.monotonic()

    def mark(phase):
        nonlocal begun
        seconds[phase] = round(seconds.get(phase, 0) + time.monotonic() - begun, 3)
        begun = time.monotonic()

    for g in mine:
        bar.set_postfix_str(f"rollout {len(groups) + 1}/{len(mine)}")
        groups[g] = roll_out(policy, step, *chosen[g])
    mark("rollout")
    if c.offload:
        rewards.to(processes.device)
    for k, group in enumerate(groups.values()):
        bar.set_postfix_str(f"rewards {k + 1}/{len(mine)}")
        reward(rewards, group, dynamic)
    if c.offload:
        rewards.to("cpu")
    mark("reward")
    light = {g: {k: group[k] for k in ("index", "terms", "motion")} for g, group in groups.items()}
    gathered = processes.gather((light, dict(rewards.reasons)))
    everyone = dict(sorted((pair for part in gathered for pair in part[0].items()), key=lambda pair: pair[0]))
    terms = {name: torch.cat([g["terms"][name] for g in everyone.values()]) for name in everyone[0]["terms"]}
    masked = int(terms["total"].isnan().sum())
    if masked > c.max_masked * c.groups * c.members:
        reasons = "; ".join(f"{k}: {v}" for part in gathered for k, v in part[1].items())
        raise RuntimeError(f"step {step}: {masked} of {c.groups * c.members} rewards failed, more than --max-masked {c.max_masked} allows ({reasons})")
    A = judge(c, rewards.weights, terms, dynamic)
    for g in mine:
        groups[g]["advantages"] = A[g * c.members:(g + 1) * c.members]
    mark("wait")

    notes, norms = [], []
    for u in range(c.updates):
        bar.set_postfix_str(f"update {u + 1}/{c.updates}")
        part = [groups[g] for g in mine if g * c.updates // c.groups == u]
        share = c.updates / c.groups * (processes.world if policy.sharded else 1)  # FSDP averages, the rest is summed
        found = update(policy, part, share)
        if u == 0:  # nothing has changed since the rollout: the ratio must be 1
            drift = max((n["drift"] for n in found), default=0.0)
            if drift > (1e-5 if c.dtype == "float32" else 1e-3):
                raise RuntimeError(f"before the first update log-ratios reach {drift:.1e}: rollout and update run the model differently")
        notes += found
        norms.append(policy.gradients())
        policy.optimiser.param_groups[0]["lr"] = learning_rate(c, step)
        policy.optimiser.step()
        policy.optimiser.zero_grad(set_to_none=True)
    policy.follow(step)
    mark("update")

    gathered = processes.gather((notes, seconds))
    all_notes = [n for part in gathered for n in part[0]]
    peak = torch.cuda.max_memory_allocated() if processes.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(step=step, phase="dynamic" if dynamic else "main", prompts=[g["index"] for g in everyone.values()],
                **{name: mean_of(v.tolist()) for name, v in terms.items()},
                **{f"{name}_std": spread_of(everyone.values(), name) for name in terms},
                advantage_abs=A.abs().mean().item(), advantage_max=A.max().item(), flat_groups=int((A.view(c.groups, -1) == 0).all(1).sum()), masked=masked,
                motion=mean_of([m for g in everyone.values() for m in g["motion"]]),
                ratio=mean_of([n["ratio"] for n in all_notes]), ratio_max=max(n["ratio_max"] for n in all_notes),
                clipped=mean_of([n["clipped"] for n in all_notes]), kl=mean_of([n["kl"] for n in all_notes]),
                loss=mean_of([n["loss"] for n in all_notes]), grad=norms,
                machine=dict(seconds={k: max(part[1][k] for part in gathered) for k in seconds}, peak_bytes=peak, processes=processes.world))


def evaluation(policy, rewards, prompts, folder, step):
    """Evaluates the averaged weights into eval.jsonl and eval/STEP, and exports the LoRA as it is now."""
    with policy.averaged():
        row = dict(step=step, **evaluate(policy, rewards, prompts["test"][:policy.c.eval_prompts], folder / "eval" / f"{step:06d}"))
    if policy.processes.rank == 0:
        cut_metrics(folder / "eval.jsonl", step)
        with open(folder / "eval.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        tqdm.write("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    policy.export(folder)


def wandb_log(c, folder):
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb") from None
    run = wandb.init(project="nanoworld-r1", name=c.name, dir=folder, config=dataclasses.asdict(c), resume="allow", id=c.name)
    return lambda row: run.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=row["step"])


def main(argv=None):
    c = parse_arguments(argv)
    processes = Processes(c.device)
    try:
        finished = train(c, processes)
    except (ValueError, RuntimeError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    finally:
        processes.close()
    if processes.rank == 0:
        print(f"{Path(c.runs) / c.name}: " + (f"{c.total_steps} steps done" if finished else "stopped; start it again to go on"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
