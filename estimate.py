"""What a step of training takes at real size, by arithmetic: memory of a GPU, seconds by phase.

    memory, seconds = estimate(c, gpus=8, card=H200)     # of a train.Config
    python bench.py --estimate node --gpus 8             prints them; train.py begins with them in a line

`rehearse.py` traces the same memory from the step's own code. Left out: noise transport and motion on the
CPU, Gaussians' rendering, checkpoints, loading; CUDA's own memory and gaps in it.
"""

import dataclasses
import functools
import math
import os
import statistics
from itertools import accumulate

import torch
from torch.utils.flop_counter import FlopCounterMode

from depth_anything import SIZES, memory_estimate, processed_size
from grpo import deal, draw_window, possible_windows, rollout_passes
from lora import add_lora
from model import DIT_SIZES, VAE, DiT, DiTConfig, VAEConfig, released_config
from rewards import TERMS
from sample import generator, sampling_of


# ------------------------------------------------------------------ the DiT's work and memory, by arithmetic

def dit_flops(config, tokens, text=128, attention=1.0):
    """Multiply-adds x 2 of one video's forward pass: projections, feed-forward, attention.

    text: tokens of a prompt, and of the repeated padding. attention: how often its products are made. The
    backward pass through frozen weights costs what a forward does, but attention twice, and 2.5 times where
    it makes its scores again (flash kernels).
    """
    D = config.num_attention_heads * config.attention_head_dim
    per_token = 2 * tokens * (6 * D * D + 2 * D * config.ffn_dim)
    products = 4 * tokens * tokens * D + 4 * tokens * text * D
    return config.num_layers * (per_token + 4 * text * D * D + attention * products)


def activations(config, tokens, rank, bytes_a_number, layers):
    """Bytes of a forward and backward pass over the tokens of all videos, with one block's LoRA gradient.

    For its backward pass a block keeps, a token and channel, 5.6 numbers in float32, and 8.7 + F + 8 r/D in
    the model's dtype: F = ffn_dim / D is the feed-forward's hidden layer, 8 r/D LoRA's inner vectors. That
    pass itself holds 2 F more in the dtype and .5 in float32. 5.6, 8.7 and .5 are fitted, to what
    `bench.py --check-memory` finds allocated. layers: (whole, inputs): of how many blocks all is kept, of how
    many the input alone (checkpointing keeps 1 and num_layers).
    """
    D, s = config.num_attention_heads * config.attention_head_dim, bytes_a_number / 4
    F = config.ffn_dim / D
    block = 5.6 + s * (8.7 + F + 8 * rank / D)
    whole, inputs = layers
    return 4 * (tokens * D * (whole * block + inputs + 2 * s * F + .5) + 16 * rank * D)


def forward_bytes(config, tokens, bytes_a_number):
    """Bytes of a forward pass without gradients: the larger working set, attention's or feed-forward's.

    3.3 and 2 are numbers a token and channel in float32, 6 and 1.3 in the model's dtype. `bench.py
    --check-memory` compares them, too, with what is allocated.
    """
    D, s = config.num_attention_heads * config.attention_head_dim, bytes_a_number / 4
    return 4 * tokens * D * max(3.3 + 6 * s, 2 + 1.3 * s + 2 * s * config.ffn_dim / D)


def allocated_peak(call):
    """Peak bytes that PyTorch's CPU allocator hands out during a call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs a GPU that is not there as an error
    cpu = [torch.profiler.ProfilerActivity.CPU]  # alone, or it would take memory of the GPU, too
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


# -------------------------------------------------------------------------- what the real presets would need

# Bytes; dense bfloat16 FLOP/s; bytes/s of a GPU's link inside a node, between nodes, and to the CPU: NVIDIA's
# figures, of the RTX 4090 those of the Ada whitepaper with float32 sums; its links are PCIe.
H200 = dict(name="H200", memory=141e9, flops=989e12, link=450e9, network=50e9, host=50e9)
RTX_4090 = dict(name="RTX 4090", memory=24e9, flops=165e12, link=25e9, network=25e9, host=25e9)
MACHINES = {"small": (H200, 48), "large": (H200, 96), "release": (H200, 48), "node": (H200, 8),
            "gpu": (RTX_4090, 1)}
DEPTH, CRITIC, PREFERENCE = "Depth Anything 3, float32", "critic, bfloat16", "preference model, bfloat16"
JUDGES = {DEPTH: 1.23e9 * 4, CRITIC: 4.44e9 * 2, PREFERENCE: 7.75e9 * 2}  # bytes: parameters x bytes of one
MODELS = dict(depth_anything=DEPTH, critic=CRITIC, preference=PREFERENCE)  # as a rewards.Term names them
UTILISATION = .4  # of the FLOP/s; a plain assumption


@functools.cache
def decoding():
    """What the VAE's decoding takes a pixel of height x width, by 64x64 of them: FLOPs of the first latent
    frame and of each further one, bytes of its working set. It goes frame by frame, as for large videos.
    """
    with torch.device("meta"):
        vae = VAE(VAEConfig()).eval()

    @torch.no_grad()
    def pieces(device):
        memory, flops = {}, []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                vae.decode_raw(torch.zeros(1, 16, 1, 8, 8, device=device), memory)
            flops.append(counter.get_total_flops() / 64 ** 2)
        return flops

    flops = pieces("meta")
    vae.to_empty(device="cpu")
    return *flops, allocated_peak(lambda: pieces("cpu")) / 64 ** 2


def rollout_counts(c, windows, share):
    """-> forward passes that a process's rollout makes, and velocities: one for each video of a pass."""
    singles = [(group, [member]) for group, members in share for member in members]
    return rollout_passes(c, windows, share), rollout_passes(c, windows, singles)


def busiest_rollout(c, gpus, trials=300):
    """`rollout_counts` of the process that all others wait for: a mean, for the counts depend on the windows
    (the sooner a group's begins, the fewer steps its members share). It is over all windows that can be
    drawn, or, where each group draws its own, over `trials` draws of all groups' windows."""
    if c.common_window:
        draws = [[window] * c.groups for window in possible_windows(c.steps, c.window, c.noisy_steps)]
    else:
        draw = generator(0)
        draws = [[draw_window(draw, c.steps, c.window, c.noisy_steps) for _ in range(c.groups)]
                 for _ in range(trials)]
    work = deal(c, gpus)
    most = [max(rollout_counts(c, windows, share) for share in work) for windows in draws]
    return [statistics.mean(counts) for counts in zip(*most)]


def judges_work(c):
    """-> {judge: (bytes of its working set, FLOPs a video)} of the reward models that the total's terms use.

    Bytes: `memory_estimate` of the views for Depth Anything, .1 GB a picture for the others. FLOPs a
    parameter and token: 4 for Depth Anything, whose views all attend to each other and whose heads are
    float32; 2 for the critic (two pictures) and the preference model, at 600 tokens a picture.
    """
    height, width = processed_size(c.height, c.width, SIZES["da3-giant"])
    views = memory_estimate(SIZES["da3-giant"], c.views, height, width)
    working = {DEPTH: views, CRITIC: 2 * .1e9, PREFERENCE: c.frames_seen * .1e9}
    looking = {DEPTH: 4 * 1.23e9 * c.views * height * width / 14 ** 2,
               CRITIC: 2 * 4.44e9 * 2 * 600,
               PREFERENCE: 2 * 7.75e9 * c.frames_seen * 600}
    asked = {model for name, term in TERMS.items() if c.weights[name] for model in term.models}
    return {judge: (working[judge], looking[judge]) for model, judge in MODELS.items() if model in asked}


@functools.cache
def numbers_in(config, rank):
    """-> how many numbers a DiT (config: a DiTConfig's values), LoRA of that rank and the VAE have."""
    with torch.device("meta"):
        dit, vae = DiT(DiTConfig(*config)), VAE(VAEConfig())
    frozen, of_vae = (sum(p.numel() for p in part.parameters()) for part in (dit, vae))
    return frozen, sum(p.numel() for p in add_lora(dit, rank, rank).values()), of_vae


def estimate(c, gpus, card):
    """What a train.Config takes, on so many GPUs. -> ({part: bytes per GPU}, {phase: seconds}), the whole
    step, an evaluation and the run among the phases. ValueError if it trains all weights, or not a released
    Wan.

    Memory: weights by count, the policy's in bfloat16, activations by `activations`, decoding by `decoding`.
    Judges of terms of weight 0 are left out, the others counted as the released ones. Time: FLOPs over
    UTILISATION of the peak, then FSDP's gathers of all weights (in truth they overlap).
    """
    if c.full:
        raise ValueError("the estimate counts LoRA training alone; leave out --full")
    config = released_config(c.model)
    if config is None:
        raise ValueError(f"the estimate knows Wan2.1 {' and '.join(DIT_SIZES)} by their names, "
                         f"and --model is {c.model}")
    frozen, trained, vae_size = numbers_in(dataclasses.astuple(config), c.lora_rank)
    shards = 1
    if c.parallel == "fsdp":
        shards = min(c.shard_size or gpus, gpus)
    pixels = c.height * c.width
    tokens = (c.frames // 4 + 1) * pixels // 16 ** 2  # of a video: the VAE's 8 x 8, then patches of 2 x 2
    batch = c.batch or c.members
    guided = 2 if c.guidance != 1 else 1  # velocities a video
    at_once = tokens * batch * guided
    kept = (1, config.num_layers) if c.checkpointing else (config.num_layers, 0)
    first, further, working_set = decoding()

    # Memory that is always taken, and the largest of jobs that are done one after the other.
    memory = {
        "DiT, bfloat16": frozen * 2 / shards,
        "gathered blocks": 2 * 2 * frozen / config.num_layers if shards > 1 else 0,  # in use, and the next
        "LoRA, its gradient, Adam, average, float64 sums": trained * (4 + 4 + 8 + 4 + 8),
        "VAE, float32": vae_size * 4,
    }
    work = {
        "text encoder, before training": 5.68e9 * 2,
        "update": activations(config, at_once, c.lora_rank, 2, kept),
        "rollout": forward_bytes(config, at_once, 2),
        "decoding": (working_set + c.frames * 3 * 4) * pixels,  # and the video
    }

    # An offloaded reward model counts only while it works.
    judges = judges_work(c)
    for judge, (size, _) in judges.items():
        work[judge] = size
        if c.offload:
            work[judge] += JUDGES[judge]
        else:
            memory[judge] = JUDGES[judge]
    peak = sum(memory.values()) + max(work.values())
    memory |= {f"work: {name}": size for name, size in work.items()} | {"peak": peak}

    # Seconds of one video. For a velocity, and for its backward pass through frozen weights:
    rate = card["flops"] * UTILISATION
    velocity = guided * dit_flops(config, tokens) / rate
    backward = guided * dit_flops(config, tokens, attention=2.5) / rate
    # For its pixels: the VAE's convolutions run in TF32, at half the rate.
    decode = (first + c.frames // 4 * further) * pixels / (rate / 2)
    # For its rewards:
    judging = sum(flops for _, flops in judges.values()) / rate
    # Seconds of one pass: gathers of all weights. Of one batch: the judges' moves.
    gather = 0
    if shards > 1:
        link = card["link"] if shards <= 8 else card["network"]  # a node has 8 GPUs
        gather = 2 * frozen * (shards - 1) / shards / link
    moving = 0
    if c.offload:
        moving = sum(JUDGES[judge] for judge in judges) / card["host"]  # to the GPU; they are not copied back

    # One training step, a dynamic one counted like a main one; all processes wait for the busiest. A step of
    # the window is trained by a forward pass, its recomputation (checkpointing) and the backward pass; the KL
    # adds a forward pass of the untouched model.
    batches = max(len(share) for share in deal(c, gpus))
    passes, velocities = busiest_rollout(c, gpus)
    forwards = 1 + int(c.checkpointing) + int(c.kl != 0)
    phases = {
        "rollout": velocities * velocity + passes * gather,
        "decoding": batches * batch * decode,
        "reward": batches * (batch * judging + moving),
        "update": c.window * batches * (batch * (forwards * velocity + backward) + (forwards + 1) * gather),
    }
    phases["step"] = sum(phases.values())

    # Evaluations, one before the first step: the model's own guided steps, by rounds of batches.
    own = sampling_of(c.model)
    rounds = math.ceil(c.eval_prompts / (batch * gpus))
    videos = min(rounds * batch, c.eval_prompts)
    own_velocity = velocity / guided * (2 if own.guidance != 1 else 1)
    phases["evaluation"] = (videos * (own.steps * own_velocity + decode + judging)
                            + rounds * (own.steps * gather + moving))
    evaluations = (1 + c.total_steps // c.eval_every) if c.eval_every else 0
    phases["run"] = c.total_steps * phases["step"] + evaluations * phases["evaluation"]
    return memory, phases


def estimate_line(c, world):
    """-> the estimate in a sentence, before anything is loaded; None where there is none."""
    if c.full or released_config(c.model) is None:
        return None
    card, where = H200, "no GPU here; "
    if c.device.startswith("cuda"):
        where = ""
        properties = torch.cuda.get_device_properties(c.device)
        like = RTX_4090 if "4090" in properties.name else H200  # its speed
        card = like | dict(name=properties.name, memory=properties.total_memory)
        if like is H200 and "H200" not in properties.name:
            card["name"] += ", taken for as fast as an H200"
    memory, seconds = estimate(c, world, card)
    peak, room = memory["peak"] / 1e9, card["memory"] / 1e9
    fits = "" if peak <= room else ": it does NOT fit; give --offload, --checkpointing or a smaller --batch"
    return (f"{where}estimate on {world} {card['name']} (python bench.py --estimate prints its parts): "
            f"{peak:.1f} GB of {room:.0f} each{fits}; {seconds['step']:,.0f} s a step, "
            f"{seconds['run'] / 3600:,.0f} hours in all")
