"""World-R1's training loop: roll out groups of videos, score them, update the model, on 1 to many processes.

    python train.py --preset tiny --name first                      tiny twins, one process
    OMP_NUM_THREADS=8 torchrun --nproc-per-node 8 train.py --preset node --name n1
                                                                    Wan2.1-1.3B, LoRA, one node of H200s

One step of `train`, top to bottom:

    prompts -> roll out (transported noise, a short stochastic window) -> score (four rewards, one
    reconstruction) -> gather -> advantages inside each group -> gradients of the clipped surrogate plus KL ->
    optimiser step

Every main_steps steps a dynamic phase trains dynamic_steps steps on moving scenes by the terms outside R_3D,
which is R_gen alone (periodic decoupling). Processes share a step by batches of a group's members, and every
random draw is keyed by (seed, step, phase, prompt, member, purpose): the same run on 1, 2 or 8 processes
makes the same videos. The method's parts are in noise_warp.py, sample.py, rewards.py and grpo.py; policy.py
holds model and optimiser, run.py processes, checkpoints and the log.

Letters in shapes: F frames of H x W pixels, V of them reconstructed; T = 1 + (F - 1) / 4 latent frames of C
channels and h x w = H/8 x W/8; G members of a group, B of them in a batch; N = groups x G, a step's videos.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import math
import os
import signal
import sys
import traceback
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from estimate import estimate_line
from eval import ALONE_SHARE, ALONE_STEPS, alarms, decided_alone, unrewarded
from grpo import (Batch, advantages, deal, draw_window, kl, normalise_log_ratio, possible_windows,
                  rectification, rollout, rollout_passes, standardise, surrogate, update_of,
                  variance_shares)
from lora import lora_file
from model import released_config
from noise_warp import camera_path, parse_motion, released_push
from policy import Policy
from prompts import read_prompts
from rewards import TERMS, Rewards, combine, motion_magnitude, tiny_twins
from run import (Clock, Processes, append_line, drop_lines, mean_of, metrics_row, open_run,
                 read_log, resume, save_checkpoint, wandb_log)
from sample import (SDE_KINDS, check_device, check_size, check_writable, contact_sheet, decode_videos, euler,
                    evenly_spaced, generator, initial_noise, log_prob, noise_levels, sample_latents,
                    sampling_of, transition, unchanged, write_video)
from weights import TINY, command_line, end_alone, ending, write_text

ROOT = Path(__file__).parent


# ---------------------------------------------------------------------------------------------------- options

def option(section, default, text="", least=None, most=10 ** 6, choices=None):
    """A field of Config that is an option of the command line, in a section of its help, with its range."""
    return field(default=default, metadata=dict(section=section, help=text, least=least, most=most,
                                                choices=choices))


@dataclass
class Config:
    """Every option, with its default. PRESETS lie over these, and the options given over both."""
    name: str = option("what", "first", "of the run: everything goes to runs/NAME")
    runs: str = option("what", "runs", "folder of runs")
    model: str = option("what", str(TINY / "wan"), "folder in either layout, or hub id")
    lora: str | None = option("what", None, "an adapter to start from; exports hold both")
    prompts: str = option("what", str(TINY / "prompts.jsonl"), "text or jsonl file, or a folder of splits")
    train_prompts: int | None = option("what", None, "train on the first so many (default: on all)", least=1)
    frames: int | None = option("what", None, "of a video, 4k+1 (default: the model's)")
    height: int | None = option("what", None, "of a video, a multiple of 16 (default: the model's)")
    width: int | None = option("what", None, "of a video, a multiple of 16 (default: the model's)")
    seed: int = option("what", 0, "of all draws: prompts, noises, LoRA's start", most=math.inf)

    groups: int = option("rollout", 6, "prompts a step, over all processes", least=1)
    members: int = option("rollout", 8, "videos a prompt (G); advantages compare them", least=2)
    steps: int = option("rollout", 10, "denoising steps of a rollout", least=2)
    guidance: float = option("rollout", 1.0, "of a rollout; 1 = off", least=0)
    eta: float = option("rollout", .7, "noise level of the stochastic steps", least=0, most=100)
    sde: str = option("rollout", "flow", "kind of stochastic step", choices=SDE_KINDS)
    window: int = option("rollout", 2, "consecutive stochastic steps, the ones that are trained", least=1)
    noisy_steps: int = option("rollout", 5, "the window lies within the first so many steps", least=1)
    shared: bool = option("rollout", False, "members share the steps before the window")
    common_window: bool = option("rollout", False, "one window for all groups of a step: no process waits")
    strength: float = option("rollout", 1.0, "scales the camera path that the noise follows and S_traj asks "
                             "for", least=0, most=10)
    degradation: float | None = option("rollout", None, "fresh noise mixed in (default: the model's)",
                                       least=0, most=1)
    released: bool = option("rollout", False, "transport as the release does: pushed in step by step")

    depth_anything: str = option("rewards", str(TINY / "depth_anything"), "folder or hub id")
    critic: str = option("rewards", str(TINY / "qwen3_vl"), "folder or hub id")
    preference: str = option("rewards", str(TINY / "hpsv3"), "folder or hub id")
    lpips: str = option("rewards", "random", "trunk; random is a stand-in", choices=("alex", "random"))
    views: int = option("rewards", 5, "frames that are reconstructed", least=2)
    frames_seen: int = option("rewards", 2, "frames the preference model sees, from the first on", least=1)
    traj_alpha: float = option("rewards", 5.0, "weight of the translation error in S_traj", least=0)
    traj_beta: float = option("rewards", 5.0, "weight of the rotation error in S_traj", least=0)
    general_center: float | None = option("rewards", None, "R_gen = tanh((score - center) / spread) "
                                          "(default: the judge's own)", least=-10 ** 6)
    general_spread: float | None = option("rewards", None, "see --general-center", least=1e-6)
    # of the terms: --meta, --recon, ...
    weights: dict = field(default_factory=lambda: dict.fromkeys(TERMS, 1.0))
    standardise: bool = option("rewards", True, "divide each term by its std in the group before the sum")
    pooled: bool = option("rewards", False, "one std for all of the step's groups, not each its own")
    shuffled: bool = option("rewards", False, "a control: each group's advantages are dealt out at random")
    max_masked: float = option("rewards", .5, "a step with a larger share of failed rewards stops the run",
                               least=0, most=1)

    lr: float = option("update", 3e-4, "AdamW's learning rate", least=0)
    decay: float = option("update", 0.0, "the last share of the run, over which the rate falls to 0",
                          least=0, most=1)
    beta1: float = option("update", .9, "AdamW's", least=0, most=.999999)
    beta2: float = option("update", .999, "AdamW's", least=0, most=.999999)
    weight_decay: float = option("update", 1e-4, "AdamW's", least=0)
    clip: float = option("update", 1e-3, "epsilon: the ratio is clipped to 1 +- this", least=0)
    kl: float = option("update", .004, "weight of the KL to the model before training", least=0)
    adv_clip: float = option("update", 5.0, "advantages are clipped to +- this", least=1e-6)
    grad_clip: float = option("update", 1.0, "longer gradients are scaled down to this norm", least=1e-6)
    max_skipped: int = option("update", 3, "so many gradients in a row that are not finite are left out; "
                              "one more stops the run", least=0)
    updates: int = option("update", 1, "optimiser steps a rollout: its groups are split among them", least=1)
    ratio_norm: bool = option("update", False, "GRPO-Guard's normalised ratio")
    rectify: bool = option("update", False, "Flash-GRPO's weights: every step's gradient of one size")
    full: bool = option("update", False, "train all weights instead of LoRA, in float32, and export a model "
                        "instead of an adapter")
    lora_rank: int = option("update", 32, "of LoRA's matrices", least=1)
    lora_alpha: float = option("update", 64.0, "LoRA counts alpha / rank times", least=1e-6)
    ema_decay: float = option("update", .9, "of the averaged weights, which are evaluated and exported",
                              least=0, most=1)
    ema_every: int = option("update", 8, "steps between updates of the averaged weights", least=1)

    total_steps: int = option("schedule", 200, "of the run", least=1, most=999_999)  # six digits in a name
    main_steps: int = option("schedule", 100, "with all rewards, before each dynamic phase", least=1)
    dynamic_steps: int = option("schedule", 50, "of a dynamic phase; 0 = none", least=0)
    eval_every: int = option("schedule", 50, "steps between evaluations; 0 = none", least=0)
    eval_prompts: int = option("schedule", 16, "the last so many of the test prompts", least=1)
    save_every: int = option("schedule", 1, "steps between checkpoints", least=1)
    keep: int = option("schedule", 2, "how many checkpoints are kept", least=1)

    device: str | None = option("machine", None, "default: cuda when there is one")
    dtype: str | None = option("machine", None, "of the frozen weights (bfloat16 on CUDA, else float32)",
                               choices=("float32", "bfloat16"))
    batch: int | None = option("machine", None, "videos that are run at once; processes share a step by "
                               "batches of a group's members (default: a whole group)", least=1)
    parallel: str = option("machine", "ddp", "every process holds the model, or a shard of it",
                           choices=("ddp", "fsdp"))
    shard_size: int | None = option("machine", None, "processes that share one copy of the weights under "
                                    "fsdp, such as a node's 8 (default: all)", least=1)
    timeout: float = option("machine", 60.0, "minutes a process waits for the slowest", least=.1)
    checkpointing: bool = option("machine", False, "recompute activations in the backward pass")
    compile: bool = option("machine", False, "torch.compile the DiT's blocks")
    offload: bool = option("machine", False, "keep reward models on the CPU, and move one at a time")
    wandb: bool = option("machine", False, "log to Weights & Biases, too")


# Where a value comes from: the paper; the release, World-R1's published configuration; Flow-GRPO (arXiv
# 2505.05470) and its Fast variant; Flash-GRPO (arXiv 2605.15980); or ours.
REAL = dict(
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", prompts=str(ROOT / "prompts.jsonl"),  # paper; prompts: ours
    groups=48, members=8,  # paper
    steps=10,  # Flow-GRPO: the paper too samples with fewer steps in training, how many is not stated
    guidance=5.0,  # release
    window=1,  # Flash-GRPO
    noisy_steps=5,  # release: the first half, where noise is high and the members still differ
    shared=True,  # Flow-GRPO-Fast: one deterministic path, on which members branch
    common_window=True,  # ours: else some process has a window at the first step, and all wait for it
    depth_anything="depth-anything/DA3-GIANT", critic="Qwen/Qwen3-VL-4B-Instruct",  # release
    preference="MizzenAI/HPSv3", lpips="alex",  # paper; the trunk: release
    views=21, frames_seen=8,  # ours: every fourth of 81 frames; K of Eq. 10 is not stated
    standardise=False,  # paper: the plain sum
    lr=1e-4, clip=1e-3, kl=.004, updates=1,  # release, like Config's AdamW, LoRA, adv_clip and EMA
    total_steps=600, eval_every=50, eval_prompts=32,  # ours; 100 main and 50 dynamic steps: release
    save_every=1,  # ours: a checkpoint takes seconds, a step minutes
    batch=1, checkpointing=True)  # ours: a group of 8 at once would not fit
PRESETS = {  # what was compared of "ours" in the tiny one: docs/learning_proof.md
    "tiny": dict(
        lora=str(TINY / "web"),  # ours: a base with the faults of web videos
        groups=4, shared=True, noisy_steps=3,  # ours
        standardise=True, pooled=True, weights=dict(recon=2.0),  # ours: the paper sums plainly
        lr=5e-4, decay=.5, ema_decay=.95, ema_every=1,  # ours
        total_steps=96, main_steps=20, dynamic_steps=4, eval_every=24),  # ours
    "small": REAL,
    "large": dict(REAL, model="Wan-AI/Wan2.1-T2V-14B-Diffusers",  # paper
                  parallel="fsdp", shard_size=8),  # ours: a copy of the weights a node
    "release": dict(  # its sampling and update; rewards, paths, SDE noise and 48 groups are not the release's
        REAL, members=2, steps=50, window=24, noisy_steps=24, shared=False, released=True),
    "node": dict(  # one node of 8 GPUs, in a day or two
        REAL, frames=49,  # paper: of its re-render tables
        groups=16,  # ours: what a node samples in minutes
        steps=20, guidance=4.5, rectify=True, pooled=True, kl=0.0,  # Flash-GRPO
        noisy_steps=10),  # the first half, as above
    "gpu": dict(  # one card of 24 GB
        REAL, frames=33, height=240, width=416,  # flow_grpo's size of Wan videos
        groups=4, eval_prompts=16,  # ours
        batch=4, offload=True),  # ours: what fits
}


def parse_arguments(argv=None):
    """-> Config: a preset's values, over them the options given. "none" stands for None where that is
    allowed."""
    parser = command_line(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    # An option for each field of Config, and for each term's weight. SUPPRESS: what is not given is absent,
    # so that it cannot hide the preset's value.
    sections = {}
    for f in dataclasses.fields(Config):
        if f.name == "weights":
            continue
        section = f.metadata["section"]
        if section not in sections:
            sections[section] = parser.add_argument_group(section)
        if f.type is bool:
            reading = dict(action=argparse.BooleanOptionalAction)
        else:
            reading = dict(type=option_type(f.type), choices=f.metadata["choices"])
        sections[section].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                                       help=f.metadata["help"], **reading)
    for term in TERMS.values():
        sections["rewards"].add_argument("--" + term.name, type=float, default=argparse.SUPPRESS,
                                         help=f"weight of {term.label}; 0 leaves it out")

    # what is given lies over the preset, and that over Config's defaults
    given = vars(parser.parse_args(argv))
    preset = dict(PRESETS[given.pop("preset")])
    if "model" in given:
        preset.pop("lora", None)  # a preset's adapter is for its own model
    weights = dict.fromkeys(TERMS, 1.0) | preset.pop("weights", {})
    weights |= {name: given.pop(name) for name in TERMS if name in given}
    c = Config(**preset | given, weights=weights)

    # what the model and the machine decide
    sampling = sampling_for(c)
    for name in ("frames", "height", "width", "degradation"):
        setattr(c, name, getattr(sampling, name))
    if c.device is None:
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    c.dtype = c.dtype or ("bfloat16" if c.device.startswith("cuda") else "float32")
    return c


def sampling_for(c):
    """-> the Sampling of the model, at the run's size."""
    return sampling_of(c.model, frames=c.frames, height=c.height, width=c.width, degradation=c.degradation)


def rewards_for(c, device="cpu"):
    """-> the run's Rewards; nothing is loaded yet."""
    return Rewards(depth_anything=c.depth_anything, critic=c.critic, preference=c.preference, lpips=c.lpips,
                   views=c.views, frames_seen=c.frames_seen, alpha=c.traj_alpha, beta=c.traj_beta,
                   weights=c.weights, device=device, center=c.general_center, spread=c.general_spread,
                   offload=c.offload)


def option_type(annotation):
    """float -> float; float | None -> a reader of floats and of the word none."""
    if isinstance(annotation, type):
        return annotation
    kind, _ = typing.get_args(annotation)

    def read(text):
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its error
    return read


def check(c, world):
    """Raises ValueError with one sentence for the first setting that cannot work."""
    # every number by itself
    ranges = {f.name: (f.metadata["least"], f.metadata["most"]) for f in dataclasses.fields(c) if f.metadata}
    for name, value in (dataclasses.asdict(c) | c.weights).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        option_name = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option_name} must be a finite number, got {value}")
        least, most = ranges.get(name, (0, 10 ** 6))  # of a term's weight
        if least is not None and value < least:
            raise ValueError(f"{option_name} must be at least {least}, got {value}")
        if value > most:
            raise ValueError(f"{option_name} must be at most {most}, got {value}")
    if c.eta < .001:
        raise ValueError("--eta must be at least 0.001: without noise there is nothing to compare")
    if c.sde == "cps" and c.eta > 1:  # an angle of a quarter turn; the others' noise has no bound
        raise ValueError(f"--eta must be at most 1 with --sde cps, got {c.eta}")
    if not c.name.isprintable() or not c.name or c.name.startswith(".") or Path(c.name).name != c.name:
        raise ValueError(f"--name must name a folder in --runs, without '/' and not beginning with '.', "
                         f"got '{c.name}'")
    if len(os.fsencode(c.name)) > 255:  # file systems know no longer one
        raise ValueError(f"--name must be at most 255 bytes long, got {len(os.fsencode(c.name))}; shorten it")

    # what must fit together
    check_size(c.frames, c.height, c.width)
    batch = c.batch or c.members
    if c.members % batch:
        raise ValueError(f"--members must be a multiple of --batch, got {c.members} and {batch}")
    if c.groups % c.updates:
        raise ValueError(f"--groups must be a multiple of --updates, got {c.groups} and {c.updates}")
    if c.parallel == "fsdp":
        batches = c.groups // c.updates * (c.members // batch)
        if batches % world:
            raise ValueError(f"--parallel fsdp needs batches an update ({batches}: groups / updates x "
                             f"members / batch) to be a multiple of the {world} processes")
        if world % min(c.shard_size or world, world):
            raise ValueError(f"--shard-size must divide the {world} processes, got {c.shard_size}")
    if c.dynamic_steps and not any(c.weights[name] for name, term in TERMS.items() if not term.three_d):
        outside = " or ".join(f"--{name}" for name, term in TERMS.items() if not term.three_d)
        raise ValueError(f"the dynamic phase has no reward left: give {outside} a weight, or leave the phase "
                         "out with --dynamic-steps 0")
    # these raise for what cannot work; what they return is not needed yet
    check_device(c.device)
    check_writable(Path(c.runs) / c.name / "config.json", "--runs or --name")
    rewards_for(c)
    possible_windows(c.steps, c.window, c.noisy_steps)
    if c.lora:
        lora_file(c.lora)
    if c.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the wandb package: pip install wandb")


# --------------------------------------------------------------------------------------------------- the loop

def train(c, processes):
    """Runs to c.total_steps, from the newest checkpoint if there is one. -> False if it was asked to stop
    (SIGTERM)."""
    # Whatever can be wrong is found before anything but the lock is written.
    prompts = read_prompts(c.prompts)
    prompts["train"] = prompts["train"][:c.train_prompts]
    if c.dynamic_steps and not prompts["dynamic"]:
        raise ValueError(f"{c.prompts} holds no dynamic prompts for the dynamic phase; "
                         "add some (split dynamic), or leave the phase out: --dynamic-steps 0")
    if processes.rank == 0:  # a near miss ("zoom in") is warned of now, not when its prompt's turn comes
        still = sum(parse_motion(prompt) == ["fixed"] for prompt in prompts["train"])
        tqdm.write(f"{still} of {len(prompts['train'])} training prompts ask for a camera that stands still")
    folder = open_run(c, processes)
    rewards = rewards_for(c, processes.device).load()
    policy = Policy(c, processes)

    # A run goes on from its newest whole checkpoint. skipped: updates in a row that were left out.
    steps_done, skipped = resume(c, folder, policy)
    # `evaluate` watches training on the last test prompts; eval.py scores the first of them. Where the split
    # has fewer than both ask for, some are in both.
    validation = prompts["test"][-c.eval_prompts:] if c.eval_every else []
    policy.encode_prompts([*prompts_of_run(c, prompts, steps_done), *validation])
    stop_asked = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(True))
    log = wandb_log(c, folder) if c.wandb and processes.rank == 0 else None
    if steps_done == 0 and c.eval_every:
        evaluate(policy, rewards, validation, folder, 0, log)

    # Processes share a step by batches of a group's members. All of its videos stand in a row, group by
    # group; group_ids says which group each is of.
    everyones_work = deal(c, processes.world)
    mine = everyones_work[processes.rank]  # [(group, members)]
    group_ids = torch.arange(c.groups).repeat_interleave(c.members)  # (groups x G,)
    bar = tqdm(total=c.total_steps, initial=steps_done, desc=c.name, unit="step",
               disable=processes.rank > 0)
    stopping = False
    for step in range(steps_done, c.total_steps):
        clock = Clock()

        # Prompts. Periodic decoupling: after main_steps steps a phase on moving scenes, without R_3D, which
        # is best served by worlds that stand still.
        dynamic, chosen = step_prompts(c, prompts, step)

        # Roll out: G videos of each prompt, from noise that was transported along the prompt's camera path.
        # Score: Depth Anything 3 lifts each video to Gaussians and cameras, and the terms look at it. Then
        # the video is dropped: the update needs the window's latents alone.
        windows = [step_window(c, step, dynamic, key) for key in keys_of(chosen)]
        batches = []
        reasons = {}  # term -> why it was masked
        for batch, videos, path in roll_out_groups(policy, step, dynamic, chosen, windows, mine):
            clock.lap("rollout")
            bar.set_postfix_str(f"rewards {len(batches) + 1}/{len(mine)}")
            B = len(videos)
            batch.terms = rewards.terms(videos, [batch.prompt] * B, [path] * B, dynamic)  # {term: (B,)}
            batch.motion = [motion_magnitude(video) for video in videos]
            batches.append(batch)
            reasons |= rewards.reasons
            clock.lap("reward")
            left = len(batches) < len(mine)
            bar.set_postfix_str(f"rollout {len(batches) + 1}/{len(mine)}" if left else "wait")
        # every process must take part in each forward pass of sharded weights: one with fewer makes idle ones
        passes = [rollout_passes(c, windows, work) for work in everyones_work]
        policy.keep_pace(max(passes) - passes[processes.rank])
        clock.lap("rollout")

        # Gather: a group's members may be on several processes (--batch), and stds may be pooled over groups,
        # so every process needs all terms: a few numbers a video.
        terms, motion = gather_scores(processes, batches)  # {term: (groups x G,)}, (groups x G,)
        stop_if_masked(c, processes, reasons, terms["total"], step)

        # Advantages: how much better than its group each video is. A masked video's is 0: only the KL still
        # holds it.
        A, shares = step_advantages(c, terms, group_ids, dynamic)  # (groups x G,); {term: its share in A}
        if c.shuffled:
            A = dealt_at_random(c, A, terms["total"].isnan(), step, dynamic)
        for batch in batches:
            batch.advantages = A[group_ids == batch.group][list(batch.members)]  # (B,)
        clock.lap("wait")

        # Update: the clipped surrogate and the KL, of each batch at each of its stochastic steps.
        bar.set_postfix_str("update")
        notes, norms, skipped = update(policy, batches, step, skipped)
        policy.update_average(step)
        clock.lap("update")

        # Log, evaluate, save.
        indices = [index for index, _ in chosen]
        row = metrics_row(c, step, dynamic, indices, terms, motion, shares, A, notes, norms, processes, clock)
        if processes.rank == 0:
            append_line(folder / "metrics.jsonl", row)
            warn_of_one_term(folder / "metrics.jsonl")
            if log:
                log(row)
        done = step + 1
        if c.eval_every and done % c.eval_every == 0:
            bar.set_postfix_str("evaluate")
            evaluate(policy, rewards, validation, folder, done, log)
        # the signal may reach one process a step before another: all must stop after the same step
        stopping = any(processes.gather(bool(stop_asked)))
        if done % c.save_every == 0 or done == c.total_steps or stopping:
            bar.set_postfix_str("save")
            save_checkpoint(policy, folder / "checkpoints", done)
        bar.update()
        bar.set_postfix_str(f"R {row['total']:.3f}" if row["total"] is not None else "")
        if stopping:
            break
    policy.export(folder)  # also where it was asked to stop: what has been learnt so far
    return not stopping


# ---------------------------------------------------------------------------- the steps of the loop, in order

def step_prompts(c, prompts, step):
    """-> is this a dynamic step, and its prompts [(index, prompt)], one a group.

    Each phase goes through its own list, in a new random order each time around. The step and the seed alone
    decide, so every process finds the same, and so does a run that is resumed.
    """
    cycle, within = divmod(step, c.main_steps + c.dynamic_steps)
    dynamic = within >= c.main_steps
    split = prompts["dynamic" if dynamic else "train"]
    # steps of the same phase before this one
    if dynamic:
        before = cycle * c.dynamic_steps + within - c.main_steps
    else:
        before = cycle * c.main_steps + within
    chosen = []
    for k in range(before * c.groups, (before + 1) * c.groups):  # the phase's k-th prompt
        epoch, place = divmod(k, len(split))
        order = torch.randperm(len(split), generator=generator((c.seed, dynamic), epoch, "order"))
        index = int(order[place])
        chosen.append((index, split[index]))
    return dynamic, chosen


def prompts_of_run(c, prompts, steps_done):
    """All that the rest of a run's rollouts ask the model for."""
    used = [""]  # of guidance
    for step in range(steps_done, c.total_steps):
        used += [prompt for _, prompt in step_prompts(c, prompts, step)[1]]
    return used


def keys_of(chosen):
    """-> what keys each group's random draws: its prompt's index, and where earlier groups of the step have
    that prompt too, also their number, so that no two groups draw alike."""
    indices = [index for index, _ in chosen]
    keys = []
    for g, index in enumerate(indices):
        earlier = indices[:g].count(index)
        keys.append((index, earlier) if earlier else index)
    return keys


def generator_of(c, step, dynamic, key, purpose, *member):
    """-> the generator of one random draw of a group: no other draw depends on it, nor it on another.
    member: none where the draw is the whole group's (its window)."""
    phase = "dynamic" if dynamic else "train"
    return generator(c.seed, step, phase, key, *member, purpose)


def step_window(c, step, dynamic, key):
    """-> the stochastic steps of a group's rollouts (a range). key: the group's, one of `keys_of`."""
    if c.common_window:
        key = None  # every group of the step makes the same draw
    return draw_window(generator_of(c, step, dynamic, key, "window"), c.steps, c.window, c.noisy_steps)


@torch.no_grad()
def roll_out_groups(policy, step, dynamic, chosen, windows, work):
    """Rolls out one process's work [(group, members)], batch by batch, by `grpo.rollout`. Yields of each its
    Batch, its B videos (F, 3, H, W), and the camera path that was asked for (F, 4, 4)."""
    c, wan = policy.c, policy.wan
    levels = noise_levels(wan, c.steps, sampling_for(c).shift)
    keys = keys_of(chosen)
    # a group's parts are neighbours in `work`: what its members share is made once
    for g, parts in itertools.groupby(work, key=lambda part: part[0]):
        _, prompt = chosen[g]
        group_key = step, dynamic, keys[g]  # keys all random draws of the group
        velocity, window = policy.velocity(prompt), windows[g]
        path = camera_path(parse_motion(prompt), c.frames, c.strength)  # (F, 4, 4)

        # With c.shared all members have one noise. Before the window there is only the ODE, so up to there
        # they are all alike: the ODE is solved once, and each member goes on from a copy.
        first = 0
        if c.shared:
            first = window[0]
            noise, after_step = first_noise(policy, path, group_key, [0])  # member 0's, for all
            at_window = euler(velocity, noise, levels[:first + 1], after_step)  # (1, C, T, h, w)
        for _, members in parts:
            if c.shared:
                x = at_window.repeat_interleave(len(members), 0)
            else:
                x, after_step = first_noise(policy, path, group_key, members)
            generators = [generator_of(c, *group_key, "sde", member) for member in members]
            latents, sde_steps = rollout(velocity, x, levels, window, c.eta, c.sde, generators, first,
                                         after_step)
            yield Batch(g, members, prompt, levels, sde_steps), decode_videos(wan, latents), path


def first_noise(policy, path, group_key, members):
    """-> the noise (B, C, T, h, w) that members of a group begin with, carried along the camera path; and
    what changes the latents after each step: nothing, but with --released the noise is white, and the carried
    one is pushed in step by step.

    group_key: (step, dynamic, key) of the group.
    """
    carried = members_noise(policy, path, group_key, members)
    if not policy.c.released:
        return carried, unchanged
    white = members_noise(policy, path, group_key, members, "white", transport=False)
    return white, released_push(white, carried)


def members_noise(policy, path, group_key, members, purpose="noise", transport=True):
    """-> members' noise (B, C, T, h, w), each from its own generator; carried along the camera path, or
    white."""
    c, wan = policy.c, policy.wan
    generators = [generator_of(c, *group_key, purpose, member) for member in members]
    noise = initial_noise(wan, path, c.height, c.width, generators, transport, c.degradation)
    return noise.to(wan.device)


def gather_scores(processes, batches):
    """-> {term: (groups x G,)} and a list of groups x G motion magnitudes: all the step's videos, in order of
    group and member, the same on every process."""
    mine = [(batch.group, batch.members[0], batch.terms, batch.motion) for batch in batches]
    # a row a batch; its group and first member say where it stands
    rows = sorted(itertools.chain(*processes.gather(mine)), key=lambda row: row[:2])
    terms_of = [terms for _, _, terms, _ in rows]  # {term: (B,)} of each batch
    motion_of = [motion for _, _, _, motion in rows]  # B floats of each batch
    terms = {name: torch.cat([of_batch[name] for of_batch in terms_of]) for name in terms_of[0]}
    return terms, list(itertools.chain(*motion_of))


def stop_if_masked(c, processes, reasons, total, step):
    """A failed reward is masked, never a number; too many of them are a fault that training must not hide."""
    masked = int(total.isnan().sum())
    # `total` is the same on every process, so all of them come to this gather, or none
    if masked > c.max_masked * len(total):
        everyones = {name: why for part in processes.gather(reasons) for name, why in part.items()}
        said = "; ".join(f"{name}: {why}" for name, why in everyones.items())
        raise RuntimeError(f"step {step}: {masked} of {len(total)} rewards failed, more than --max-masked "
                           f"{c.max_masked} allows ({said})")


def step_advantages(c, terms, group_ids, dynamic=False):
    """-> advantages (N,) of terms {name: (N,)} with their total, and each term's share in deciding them.

    The paper standardises the plain sum of the terms, which is what the log calls total; with --standardise
    each term is first divided by its own std, so that none drowns the others. A masked video is left out of
    every term's statistics.
    """
    compared = without_masked(terms)
    if c.standardise:
        compared = {name: standardise(values, group_ids, c.pooled) for name, values in compared.items()}
    _, summed = combine(compared, c.weights, dynamic)  # the log's total only without --standardise
    A = advantages(summed, group_ids, c.adv_clip, c.pooled)
    return A, variance_shares(compared, c.weights, group_ids)


def without_masked(terms):
    """Terms {name: (N,)} with their sums -> those of TERMS alone, where a sample without a total has no term
    either (NaN)."""
    masked = terms["total"].isnan()
    return {name: terms[name].masked_fill(masked, torch.nan) for name in TERMS}


def dealt_at_random(c, A, masked, step, dynamic):
    """Advantages and masks (groups x G,) -> each group's advantages dealt out at random to those of its
    members that are not masked: the control of a training. What is learned all the same was not learned from
    who earned what (random rewards too have improved language models: arXiv 2506.10947)."""
    dealt = A.clone()
    for g in range(c.groups):
        members = torch.arange(g * c.members, (g + 1) * c.members)
        members = members[~masked[members]]
        order = torch.randperm(len(members), generator=generator_of(c, step, dynamic, g, "shuffled"))
        dealt[members] = A[members[order]]
    return dealt


def update(policy, batches, step, skipped):
    """Takes c.updates optimiser steps, among which the groups are split. -> statistics of every loss, norm of
    every gradient, and how many updates in a row have been left out by now (`skipped`: before this step)."""
    c = policy.c
    notes, norms = [], []
    for number in range(c.updates):
        for batch in batches:
            if update_of(c, batch.group) != number:
                continue
            for sde_step in batch.sde_steps:
                loss, note = policy_loss(policy, batch, sde_step)

                # The objective is a mean over groups, the window's steps and members. `loss` is a mean over
                # this batch's members at one step, so it enters with this weight:
                per_group = c.updates / c.groups  # 1 / the groups of this update
                per_step = 1 / len(batch.sde_steps)
                part_of_group = len(batch.members) / c.members
                # gradients are summed over processes, but FSDP averages sharded ones (--full): undo that
                undo_average = policy.processes.world if policy.sharded else 1
                (loss * (per_group * per_step * part_of_group * undo_average)).backward()
                notes.append(note)
            policy.collect_gradients()
        # before a step's first update nothing has changed since its rollout
        if number == 0:
            stop_if_drifted(c, notes)
        # a step whose gradient is not finite is left out and counted; too many in a row stop the run
        norms.append(policy.sum_gradients())
        taken = policy.step(learning_rate(c, step), norms[-1])
        skipped = 0 if taken else skipped + 1
        if skipped > c.max_skipped:
            raise RuntimeError(f"step {step}: {skipped} gradients in a row were not finite, more than "
                               f"--max-skipped {c.max_skipped}; begin another run (--name) with a smaller "
                               "--lr, from what this one exported (--lora, with --full --model)")
    return notes, norms, skipped


def policy_loss(policy, batch, sde_step):
    """Clipped surrogate plus KL of one stochastic step of a batch.

    -> the mean over its members, a scalar to minimise; and statistics of the ratio for the log.
    """
    c = policy.c
    x, x_next = sde_step.x, sde_step.x_next  # (B, C, T, h, w)
    A = batch.advantages.to(x.device)  # (B,)
    sigma, sigma_next = batch.levels[sde_step.index], batch.levels[sde_step.index + 1]

    # the ratio of the drawn step's probabilities, now and at rollout
    v = policy.velocity(batch.prompt)(x, sigma)
    mean, std = transition(x, v, sigma, sigma_next, c.eta, c.sde)
    log_ratio = log_prob(x_next, mean, std) - sde_step.logp  # (B,)
    # how far each member's mean has moved since the rollout: RMS, in stds (`kl` is half the square of it)
    drift = (2 * kl(mean.detach(), sde_step.mean, std)).sqrt().max().item()
    if c.ratio_norm:
        log_ratio = normalise_log_ratio(log_ratio, mean, sde_step.mean, std)
    loss = surrogate(log_ratio, A, c.clip)
    if c.rectify:
        # of mean 1 over every step that some window can hold: over this window's steps alone, the weight of a
        # window of one step would always be 1
        last_window = possible_windows(c.steps, c.window, c.noisy_steps)[-1]
        weights = rectification(batch.levels, last_window.stop, c.eta, c.sde)
        loss = loss * weights[sde_step.index].to(loss.device)

    # KL to the model before training, whose step from x has the same std
    kl_to_reference = torch.tensor(math.nan)  # without --kl it is not known
    if c.kl:
        v_reference = policy.reference_velocity(batch.prompt)(x, sigma)
        mean_reference, _ = transition(x, v_reference, sigma, sigma_next, c.eta, c.sde)
        kl_to_reference = kl(mean, mean_reference, std).mean()
        loss = loss + c.kl * kl_to_reference

    ratio = log_ratio.detach().exp()
    clipped = ((ratio - 1).abs() > c.clip).float().mean().item()
    return loss, dict(ratio=ratio.mean().item(), ratio_max=ratio.max().item(), drift=drift, clipped=clipped,
                      kl=kl_to_reference.item(), loss=loss.item())


def stop_if_drifted(c, notes):
    """Before the first update nothing has changed since the rollout, so every ratio must be 1, and every
    step's mean where it was. Means are compared: a log-ratio, averaged over all elements, hardly moves."""
    drift = max((note["drift"] for note in notes), default=0.0)
    rounding = 1e-4 if c.dtype == "float32" else 1e-2  # in standard deviations, as the drift
    if drift > rounding * max(1, c.guidance):  # guidance magnifies it
        raise RuntimeError(f"before the first update means have moved by {drift:.1e} standard deviations: "
                           "rollout and update run the model differently")


def learning_rate(c, step):
    """lr; over the last `decay` share of the run it falls in a line, which would be at 0 one step after the
    last. max: without decay the line spans that one step alone."""
    return c.lr * min(1.0, (c.total_steps - step) / max(c.decay * c.total_steps, 1))


def warn_of_one_term(file):
    """Says so each time one term has decided alone for ALONE_STEPS further main steps in a row."""
    rows = read_log(file)
    for name, steps in decided_alone(rows):
        if steps[-1] == rows[-1]["step"] and len(steps) % ALONE_STEPS == 0:
            tqdm.write(f"{TERMS[name].label} alone has decided more than {ALONE_SHARE:.0%} of the advantages "
                       f"for {len(steps)} steps; lower --{name}, or use --standardise")


# ------------------------------------------------------------------------------------------------- evaluation

def evaluate(policy, rewards, prompts, folder, step, log=None):
    """Scores the averaged weights into eval.jsonl, writes videos to eval/STEP, and exports them as they are
    now (`Policy.export`), an adapter to eval/STEP, too. step: how many are done; metrics.jsonl counts from 0,
    so its row is step - 1."""
    videos = folder / "eval" / f"{step:06d}"
    with policy.averaged():
        rows = evaluation_rows(policy, rewards, prompts, videos)
    if policy.processes.rank == 0:
        row = dict(step=step) | {name: mean_of([r[name] for r in rows]) for name in rows[0]}
        # their means leave out what failed, so a model whose worst videos fail must not look better for it
        row["masked"] = sum(math.isnan(r["total"]) for r in rows)
        evaluations = drop_lines(folder / "eval.jsonl", step)
        append_line(folder / "eval.jsonl", row)
        tqdm.write("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        # the alarms that this evaluation adds; the others have been said
        for sentence in alarms([*evaluations, row])[len(alarms(evaluations)):]:
            tqdm.write(sentence)
        if "epipolar" not in row:
            tqdm.write("no epipolar error: it needs OpenCV, pip install opencv-python-headless")
        if log:
            log(row | dict(step=max(step - 1, 0)), "eval/")  # a resumed wandb run refuses its last step
    policy.export(folder)
    if not policy.c.full:
        policy.export(videos)  # stays there: the last adapter need not be the best


@torch.no_grad()
def evaluation_rows(policy, rewards, prompts, folder, shown=8):
    """Samples the prompts by the ODE at the model's own settings, from transported noise that the run's seed
    keys. -> of each prompt a row: the terms, and what is measured beside them (`eval.unrewarded`).

    Processes share the prompts by batches; the first `shown` are written as videos.
    """
    c, processes = policy.c, policy.processes
    sampling = sampling_for(c)
    size = c.batch or c.members
    rows, sheet = [], {}
    for first in range(0, len(prompts), size * processes.world):
        start = first + size * processes.rank
        part = prompts[start:start + size]
        if not part:
            policy.keep_pace(sampling.steps)
            continue
        # a prompt's number alone keys its noise: the same at every evaluation, on any number of processes
        numbers = range(start, start + len(part))
        latents, paths = sample_latents(policy.wan, part, sampling, c.seed, numbers, strength=c.strength)
        videos = decode_videos(policy.wan, latents)
        terms = rewards.terms(videos, part, paths)
        for i, (k, video) in enumerate(zip(numbers, videos)):
            row = {name: float(values[i]) for name, values in terms.items()}
            rows.append((k, row | unrewarded(video)))
            if k < shown:
                write_video(folder / f"{k:02d}.mp4", video, sampling.fps)
                sheet[k] = video[evenly_spaced(len(video))].half()  # every process gathers it

    # all processes' rows, in the order of the prompts
    sheet = {k: frames for part in processes.gather(sheet) for k, frames in part.items()}
    if processes.rank == 0:
        contact_sheet(folder / "sheet.png", [sheet[k] for k in sorted(sheet)])
        write_text(folder / "prompts.txt", "\n".join(prompts[:shown]) + "\n")
    numbered = sorted(itertools.chain(*processes.gather(rows)), key=lambda pair: pair[0])
    return [row for _, row in numbered]


def main(argv=None):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    processes = None
    try:
        c = parse_arguments(argv)
        check(c, world)
        if world > 1 and released_config(c.model) and not torch.cuda.is_available():
            raise ValueError(f"{world} processes would train Wan on CPUs, for PyTorch finds no GPU; it was "
                             f"made for CUDA {torch.version.cuda} (None: without), and nvidia-smi must show "
                             "that or a newer one")
        needs = estimate_line(c, world) if rank == 0 else None
        if needs:
            print(needs)
            twins = tiny_twins(c)
            if twins:
                print(f"{', '.join(twins)}: tiny twins, which know rooms of 64x64 alone; give a --preset of "
                      "the real size, or the released judges (docs/real_size.md)")
        processes = Processes(c.device, c.timeout)
        finished = train(c, processes)
    except (ValueError, RuntimeError, OSError, MemoryError, KeyboardInterrupt) as e:
        status, line = ending(e, "train.py", again="start it again to go on from its newest checkpoint",
                              memory="run fewer videos at once with a smaller --batch, or add "
                                     "--checkpointing or --offload")
        if line:
            tqdm.write(line, file=sys.stderr)  # print would be glued to the progress bar
        if world > 1:
            end_alone(status, silent=not line)
        return status
    except Exception:  # a fault of the program: its traceback, and the others must not wait for this process
        if world > 1:
            traceback.print_exc()
            end_alone(1)
        raise
    finally:
        if processes is not None:
            processes.close()
    if rank == 0:
        what = f"{c.total_steps} steps done" if finished else "stopped; start it again to go on"
        print(f"{Path(c.runs) / c.name}: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
