"""One prompt followed through the whole method, as a page: words, noise, videos, rewards, gradient.

    python walkthrough.py "orbit_left a red sphere and a blue box on a checkered green floor, yellow walls"
    python walkthrough.py PROMPT --markdown docs      docs/walkthrough.md, its pictures in docs/walkthrough/

Writes out/walkthrough.html, one file that needs no network. Options of train.py work here too, such as
--model, --lora, --seed or --members. `walk` runs one step of training with a single group; each function in
STAGES makes one stage of the page from it, and pages.py writes the page. All numbers, shapes, sources and
pictures come from that run, except the video of an adapter that is trained already.

Left out: several groups, several processes; of the dynamic phase there is the schedule alone.
"""

import dataclasses
import inspect
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm

import splat
from depth_anything import DepthAnything3, colour_depth, gaussians_of
from grpo import Batch, advantages, kl, rollout, standardise, surrogate
from lora import LoRALinear, lora_file
from model import VAE, Block, DiT
from noise_warp import (camera_path, draw_paths, latent_noise, parse_motion, path_flow, rotation_angle,
                        transport_noise)
from pages import Picture, Stage, write_html, write_markdown
from policy import Policy
from prompts import usable_prompt
from report import GREY, inline_svg
from rewards import TERMS, Clip, combine, paths_in_depths
from run import Processes
from sample import (as_bytes, check_writable, decode_videos, euler, evenly_spaced, log_prob, noise_levels,
                    sigmas, transition)
from texts import clean_prompt, encode_text, load_text
from train import (Config, check, learning_rate, members_noise, parse_arguments, policy_loss,
                   rewards_for, roll_out_groups, sampling_for, step_advantages, step_prompts, step_window,
                   without_masked)
from weights import TINY, as_command, command_line, open_tensors


# ---------------------------------------------------------------------------------------------------- the run

FIRST_GROUP = (0, False, 0)  # the key of its random draws: step, dynamic phase, prompt


@dataclass
class Walk:
    """What one training step made of a prompt. B members, all of one group."""
    c: Config
    prompt: str
    policy: Policy
    path: torch.Tensor  # camera-to-world (F, 4, 4)
    noise: torch.Tensor  # (1, C, T, h, w), of the group's first member
    levels: torch.Tensor  # (steps + 1,)
    predictions: list  # x0 of the model at each level, (1, C, T, h, w) each
    batch: Batch
    clips: list  # B scored Clips
    shares: dict  # term -> its share of the advantages' variance
    notes: list  # policy_loss's statistics of each stochastic step, before the update
    norm: float  # of the gradient, before it is clipped
    gradients: dict  # parameter -> norm of its gradient
    log_ratios: torch.Tensor  # (window, B), after the update
    notes_after: list
    looks: dict  # label -> Clip of the ODE from `noise`: before, after the step, after a whole training


def walk(c, prompt, trained=None):
    """One step of train.train with a single group, and what is looked at on the way. -> Walk

    trained: an adapter, for the last stage.
    """
    policy = Policy(c, Processes(c.device))
    if trained:  # one that does not fit is found before any work
        other = Policy(dataclasses.replace(c, lora=trained), policy.processes)
    policy.encode_prompts([prompt, ""])
    rewards = rewards_for(c, c.device).load()

    # Words -> path -> noise, and the ODE from there: what the model makes of it now.
    path = camera_path(parse_motion(prompt), c.frames, c.strength)
    noise = members_noise(policy, path, FIRST_GROUP, [0])  # of its first member
    levels = noise_levels(policy.wan, c.steps, sampling_for(c).shift)

    def look(policy):
        predictions, latents = solve(policy.velocity(prompt), noise, levels)
        if not latents.isfinite().all():
            raise ValueError(f"'{policy.c.lora or c.model}' made latents that are not finite; "
                             "give another adapter, or a smaller --lr")
        video, = decode_videos(policy.wan, latents)
        return predictions, rewards.score(video, prompt, path)

    predictions, before = look(policy)
    looks = {"before": before}
    if trained:
        _, after_all = look(other)

    # Roll out the group, and score it.
    window = step_window(c, 0, False, 0)
    (batch, videos, _), = roll_out_groups(policy, 0, False, [(0, prompt)], [window], [(0, range(c.members))])
    clips = rewards.score_clips([Clip(video, prompt, path) for video in videos])
    batch.terms = {name: torch.tensor([clip.scores[name] for clip in clips]) for name in TERMS}
    batch.terms["three_d"], batch.terms["total"] = combine(batch.terms, c.weights)
    if batch.terms["total"].isnan().all():
        name, reason = next(iter(clips[0].errors.items()))
        raise ValueError(f"{TERMS[name].label} failed on every video ({reason}); "
                         "choose another --model, or judges that can look at its videos")

    # Advantages inside the group.
    batch.advantages, shares = step_advantages(c, batch.terms, torch.zeros(c.members))

    # Gradients of the window's steps, and one step of the optimiser.
    notes = []
    for sde_step in batch.sde_steps:
        loss, note = policy_loss(policy, batch, sde_step)
        (loss / len(batch.sde_steps)).backward()
        policy.collect_gradients()
        notes.append(note)
    norm = policy.sum_gradients()
    gradients = {name: float(p.grad.norm()) for name, p in policy.trained.items()}
    policy.step(learning_rate(c, 0), norm)

    # After: the same steps' probabilities, and the same noise's video.
    with torch.no_grad():
        notes_after = [policy_loss(policy, batch, step)[1] for step in batch.sde_steps]
        log_ratios = torch.stack([log_ratio(policy, batch, step) for step in batch.sde_steps]).cpu()
    _, looks["after one step"] = look(policy)
    if trained:
        looks["after a whole training"] = after_all
    return Walk(c, prompt, policy, path, noise.cpu(), levels, predictions, batch, clips, shares, notes, norm,
                gradients, log_ratios, notes_after, looks)


@torch.no_grad()
def solve(velocity, noise, levels):
    """The ODE from noise (1, C, T, h, w). -> what the model takes for x0 at each level, and the latents."""
    predictions = []

    def recorded(x, sigma):
        v = velocity(x, sigma)
        predictions.append(x - sigma * v)
        return v

    latents = euler(recorded, noise, levels)
    return predictions, latents


def log_ratio(policy, batch, sde_step):
    """log p(x'|x) of the model as it is now, less that at rollout, (B,)."""
    sigma, sigma_next = batch.levels[sde_step.index], batch.levels[sde_step.index + 1]
    v = policy.velocity(batch.prompt)(sde_step.x, sigma)
    mean, std = transition(sde_step.x, v, sigma, sigma_next, policy.c.eta, policy.c.sde)
    return log_prob(sde_step.x_next, mean, std) - sde_step.logp


# ---------------------------------------------------------------------------------- what the stages draw with

def chart(caption, draw, *arguments, size=(4.0, 2.6)):
    """draw(axes, *arguments) as a Picture whose text can be read on light and dark pages alike."""
    with matplotlib.rc_context({"text.color": GREY, "axes.labelcolor": GREY}):
        return Picture(caption, inline_svg(size, caption, draw, *arguments))


def draw_bars(axes, values, x, y, most=None):
    """values {name: number}; x, y: what the axes show; most: the end of the y axis."""
    axes.bar([str(name) for name in values], list(values.values()))
    axes.axhline(0, color=GREY, linewidth=.6)
    axes.set(xlabel=x, ylabel=y)
    if most:
        axes.set_ylim(0, most)


def strip(images):
    """Images (N, 3, H, W) -> one row of them, a white pixel apart: (3, H, N (W + 1) - 1)."""
    return torch.cat(list(F.pad(images, (0, 1), value=1.0)), -1)[..., :-1]


def grey(channels):
    """Values (N, h, w) of about N(0, 1) -> images (N, 3, h, w), -3 black and 3 white."""
    return (channels / 6 + .5).clamp(0, 1)[:, None].expand(-1, 3, -1, -1)


def scores(clip):
    return ", ".join(f"{term.label} {clip.scores[name]:.3f}" for name, term in TERMS.items())


def best_and_worst(w):
    """The members of the highest and of the lowest advantage, by number."""
    A, masked = w.batch.advantages, w.batch.terms["total"].isnan()
    best = A.masked_fill(masked, -torch.inf).argmax()
    worst = A.masked_fill(masked, torch.inf).argmin()
    return int(best), int(worst)


# ------------------------------------------------------------------------------------------------- the stages

# A Stage's arguments in order: title, text, equation, its letters, their source, functions, shapes, pictures.

def words_to_path(w):
    motions = ", ".join(parse_motion(w.prompt))
    last = w.path[-1]
    return Stage(
        "Words become a camera path",
        f"The prompt says in words how the camera moves; here it says {motions}. Each word is a rigid "
        "motion that eases in and out and begins where the one before it ended. Their product is a path: "
        "one camera-to-world matrix a frame, the first of them the identity. The path is used twice: it "
        "moves the noise that the video is made from, and at the end it is what the camera in the video is "
        "compared with.",
        "E<sub>0</sub> = I, &ensp; E<sub>f</sub> = E<sub>f−1</sub> T<sub>action</sub>(f)",
        "E_f: camera to world of frame f; T_action(f): the word's motion from frame f − 1 to f. Lengths are "
        "in distances of the plane of stage 2.",
        "World-R1 (arXiv 2604.24764), eq. 5",
        [parse_motion, camera_path],
        {"motions": motions, "path": w.path,
         "last camera: x, z, in distances of the plane": f"{last[0, 3]:.3f}, {last[2, 3]:.3f}",
         "last camera: turned by, in degrees": rotation_angle(torch.eye(3), last[:3, :3]).rad2deg().item()},
        [chart("the path from above, with the view of its first, middle and last camera", draw_paths,
               {"asked": w.path}, size=(4.0, 3.0))])


def path_to_flow(w):
    flow = path_flow(w.path, w.c.height, w.c.width)
    overall = path_flow(w.path[[0, -1]], w.c.height, w.c.width)[0]
    return Stage(
        "The path becomes optical flow",
        "Nothing is known of the scene before it is made, so it is taken for a single plane at depth 1 "
        "that faces the first camera. Then the cameras alone say where each pixel goes from frame to "
        "frame. The arrows lead from the first to the last frame; they are drawn over a first frame that "
        "does not exist yet: its video is sampled in stage 5. This is the flow of all frames, in pixels; the "
        "noise needs it for latent frames alone, one in four, on a finer grid than its own.",
        "flow(p) = project(E<sub>f+1</sub><sup>−1</sup> X) − p, &ensp; "
        "X: where the ray of p from E<sub>f</sub> meets the plane",
        "p: a pixel; project: to where the next camera sees a point.",
        "World-R1, eq. 6 (in the release the plane faces each frame's camera anew)",
        [path_flow],
        {"path": w.path, "flow, in pixels": flow,
         "longest step from frame to frame, in pixels": flow.norm(dim=1).max().item()},
        [chart("flow from the first to the last frame", draw_flow, w.looks["before"].video[0], overall,
               size=(4.0, 3.6))])


def draw_flow(axes, frame, flow):
    """Arrows of flow (2, H, W) over a picture (3, H, W)."""
    H, W = flow.shape[1:]
    y, x = torch.meshgrid(torch.arange(H // 16, H, H // 8), torch.arange(W // 16, W, W // 8), indexing="ij")
    axes.imshow(as_bytes(frame))
    axes.quiver(x, y, *flow[:, y, x], color="white", angles="xy", scale_units="xy", scale=1)
    axes.set(xlim=(-.5, W - .5), ylim=(H - .5, -.5), xlabel="x, pixels", ylabel="y, pixels")


def flow_to_noise(w):
    fine = inspect.signature(latent_noise).parameters["multiple"].default
    white = members_noise(w.policy, w.path, FIRST_GROUP, [0], transport=False).cpu()
    flow = path_flow(w.path[::4], *w.noise.shape[3:])
    fresh, moved = noise_statistics(white[0], flow), noise_statistics(w.noise[0], flow)
    return Stage(
        "The noise moves along the flow",
        "A video model keeps much of its first noise's layout, so noise that moves like the camera hints at "
        "the motion: a hint that the model need not follow. Values that meet in a cell are added and brought "
        "back to unit variance; a value that is stretched over several cells is split, with noise added that "
        "sums to zero, for equal copies would be correlated; what nothing reaches is drawn anew. Each frame "
        "by itself stays white N(0, 1), as the model was trained; between frames the noise is correlated, as "
        "it was not, so the published models get fresh noise mixed in (its share here: "
        f"{w.c.degradation:g}). All this on a grid {fine} times as fine as the latents' {w.noise.shape[3]} × "
        f"{w.noise.shape[4]} cells (stage 7): each patch of {fine} × {fine} is then averaged and multiplied "
        f"by {fine}, which keeps the variance. In the table stand noise drawn anew for every frame → "
        "transported noise; only the correlation along the flow should differ.",
        "z'(v') = Σ<sub>v</sub> w(v) z(v) / √(Σ<sub>v</sub> w(v)<sup>2</sup>), &ensp; "
        "z'(v'<sub>k</sub>) = z(v) / √n + e<sub>k</sub> − mean(e)",
        "z(v): a value of the frame before; v': a cell where v arrives; w(v): how much of a cell of frame 0 "
        "v holds, so that stretched values count less (any weights leave white noise: no value reaches two "
        "cells unsplit); v'_k: the n cells that v is stretched over; e_k ~ N(0, 1): variance "
        "1/n + (1 − 1/n), covariance 1/n − 1/n.",
        "Go-with-the-Flow (arXiv 2501.08331); noise_warp.py",
        [latent_noise, transport_noise],
        {"noise": w.noise} | {name: f"{fresh[name]:.3f} → {moved[name]:.3f}" for name in moved},
        [Picture("before transport: a channel's latent frames, from the first to the last, a line apart",
                 strip(grey(white[0, 0]))),
         Picture("after transport: the same channel; its pattern drifts with the flow",
                 strip(grey(w.noise[0, 0])))])


def noise_statistics(noise, flow):
    """Of latent noise (C, T, h, w) with its flow (T-1, 2, h, w), in latent cells. -> {name: value}"""
    last = noise[:, -1]
    centred = last - last.mean()
    # every frame but the first, read where the flow leads
    h, w = last.shape[1:]
    grid = F.affine_grid(torch.eye(2, 3)[None], (1, 1, h, w), align_corners=False)
    grid = grid + flow.movedim(1, -1) * 2 / torch.tensor([w, h])  # (T-1, h, w, 2), in [-1, 1]
    frames = noise.transpose(0, 1)  # (T, C, h, w)
    followed = F.grid_sample(frames[1:], grid, padding_mode="border", align_corners=False)

    def correlation(a, b):
        return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]

    return {"last frame: mean": last.mean(),
            "last frame: standard deviation": last.std(),
            "last frame: kurtosis (of a Gaussian: 3)": centred.pow(4).mean() / centred.square().mean() ** 2,
            "in space: correlation with the right neighbour": correlation(noise[..., :-1], noise[..., 1:]),
            "in time: correlation along the flow": correlation(frames[:-1], followed)}


def text_and_transformer(w):
    c, dit = w.c, w.policy.wan.dit
    encoder, tokenizer = load_text(c.model, w.policy.wan.device, getattr(torch, c.dtype))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(clean_prompt(w.prompt)).input_ids)
    x, grid = dit.patchify(w.noise.to(w.policy.wan.device))
    parts = {"text encoder": encoder, "transformer": dit, "VAE": w.policy.wan.vae}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in parts.items()}
    counts["trained"] = sum(p.numel() for p in w.policy.trained.values())
    return Stage(
        "Text and noise enter the transformer",
        f"A frozen text encoder turns the prompt's {len(tokens)} tokens into vectors. The latent noise is "
        f"cut into patches of {' × '.join(map(str, dit.config.patch_size))} latent cells, {x.shape[1]:,} "
        f"tokens. Each of {len(dit.blocks)} blocks attends to the whole video, then to the text, then works "
        "on every token by itself; the noise level σ scales and shifts what enters. The result is a "
        "velocity for every latent value. By default what is trained are two thin matrices beside each "
        "attention projection (LoRA, counted in the transformer too); the second of them begins at zero, "
        "so training begins at the model as it is.",
        "v<sub>θ</sub>(x, σ, text) ≈ ε − x<sub>0</sub>, &ensp; W' = W + (α / r) B A",
        "x: latents at noise level σ; x_0: those of a video; ε: noise. W: a frozen matrix; A, B: the thin "
        f"ones, of rank r = {w.c.lora_rank}; α = {w.c.lora_alpha:g}.",
        "Wan2.1 (arXiv 2503.20314); LoRA (arXiv 2106.09685)",
        [DiT.forward, Block.forward, LoRALinear.forward],
        {"tokens": " ".join(tokens), "text": encode_text(encoder, tokenizer, [w.prompt]), "latents": w.noise,
         "tokens of the video": x, "their grid": " × ".join(map(str, grid))}
        | {f"parameters: {name}": count for name, count in counts.items()},
        [chart("parameters", draw_bars, counts, "part", "parameters")])


def sampling(w):
    some = evenly_spaced(len(w.predictions), 4).tolist()
    return Stage(
        "Sampling turns noise into a video",
        "The model was trained on straight lines between videos and noise, so its velocity leads from one "
        f"to the other: {w.c.steps} steps of an ODE, from σ = 1 to 0. At every step, state and velocity "
        "tell what the model takes the finished video for. The layout, and with it the camera, is decided "
        "at high noise; later steps add detail. That the first picture is sharp already is the tiny world's "
        "doing: it holds few scenes, and the prompt names one.",
        "x<sub>σ</sub> = (1 − σ) x<sub>0</sub> + σ ε, &ensp; dx/dσ = v, &ensp; x̂<sub>0</sub> = x − σ v",
        "x_σ: the point of the line at noise level σ; x̂_0: the video's latents, as the model takes them.",
        "Rectified flow (arXiv 2209.03003); sample.py",
        [sigmas, transition, euler],
        {"noise levels": ", ".join(f"{level:.3f}" for level in w.levels.tolist()), "state": w.noise,
         "change of x̂₀ from the first to the last step (RMS)":
             float((w.predictions[0] - w.predictions[-1]).square().mean().sqrt())},
        [Picture(f"x̂₀ at σ = {w.levels[i]:.3f}", decode_videos(w.policy.wan, w.predictions[i])[0])
         for i in some])


def stochastic_window(w):
    c = w.c
    stds, spreads = {}, {}
    for t in w.batch.sde_steps:
        # no velocity is at hand, and none is needed: std does not depend on it
        _, std = transition(t.x, t.x, w.levels[t.index], w.levels[t.index + 1], c.eta, c.sde)
        stds[t.index] = float(std)
        spreads[f"step {t.index}: std of the members after it"] = float(t.x_next.std(0).mean())
    start, made_once = "have each their own noise", 0
    if c.shared:
        start = "share their noise and all steps before it, and part in it"
        made_once = w.batch.sde_steps[0].index
    return Stage(
        "A group of videos branches in a stochastic window",
        f"An ODE has nothing to choose, and a policy gradient needs choices. So in a window of {c.window} "
        f"of the first {c.noisy_steps} steps (here {', '.join(map(str, stds))}, counted from 0) the ODE is "
        "replaced by an SDE of the same marginals: a Gaussian around a mean that the model decides. The "
        f"{c.members} members {start}. Flow-GRPO makes every step stochastic and trains on all {c.steps}; "
        f"its Fast variant trains on the window: {c.window} forward and backward passes a video instead of "
        f"{c.steps}, and {c.window} states kept instead of {c.steps}; steps before it that members share are "
        f"made once (here {made_once} of them). The steps after the window are still "
        "made for each.",
        "x' ~ N(x − [v + s<sup>2</sup>/2σ (x + (1 − σ) v)] Δ, s<sup>2</sup> Δ), &ensp; s = η √(σ / (1 − σ))",
        "x, x': the state before and after a step; Δ: how far σ falls in it; v: the model's velocity. "
        "At σ = 1, s has the next level's 1 − σ below.",
        "Flow-GRPO (arXiv 2505.05470); sample.py",
        [step_window, rollout, transition],
        {"state before the window": w.batch.sde_steps[0].x, "η": c.eta, "kind of step": c.sde} | spreads,
        [Picture(f"member {i}", clip.video) for i, clip in enumerate(w.clips)]
        + [chart("noise levels, and the noise s√Δ that each step of the window adds", draw_levels, w.levels,
                 stds)])


def draw_levels(axes, levels, stds):
    """stds {step: standard deviation of its noise}."""
    axes.plot(levels, marker=".", label="σ before the step")
    axes.bar(list(stds), list(stds.values()), color="#d0663f", alpha=.7, label="s√Δ")
    axes.set_xlabel("step")
    axes.legend()


def latents_to_pixels(w):
    latents, video = w.predictions[-1], w.looks["before"].video
    middle = latents[0, :, latents.shape[2] // 2].cpu()
    return Stage(
        "The VAE decodes latents to pixels",
        f"The model works on latents, {video.numel() / latents.numel():.0f} times fewer numbers than "
        "pixels. A causal 3D VAE makes the first frame of the first latent frame alone, and four more of "
        "every further one, seeing only the past. Channels are normalised by their own mean and standard "
        "deviation, so that latents have the scale of the noise. Shown is the video of stage 5.",
        "T = 1 + (F − 1) / 4, &ensp; z = (μ − mean<sub>c</sub>) / std<sub>c</sub>",
        "T, F: latent and video frames; μ: what the encoder makes of a video; mean_c, std_c: of channel c.",
        "Wan2.1; model.py",
        [VAE.decode, VAE.encode],
        {"latents": latents, "video": video},
        [Picture("the middle latent frame: its first channels", strip(grey(middle[:8]))),
         Picture("frames decoded from the latents", strip(video[evenly_spaced(len(video))]))])


def reconstruction(w):
    best, _ = best_and_worst(w)
    rec = w.clips[best].reconstruction
    return Stage(
        "Depth Anything 3 lifts a video to three dimensions",
        f"A transformer looks at {len(rec.index)} frames of a video together and gives depth, one camera a "
        "frame, and a 3D Gaussian for each pixel: no optimisation, one forward pass. Whether the video "
        "shows one solid world is then a matter of rendering these Gaussians and looking. Nothing here "
        f"knows which camera was asked for. Shown is member {best}, of the highest advantage (stage 10).",
        "X = R<sub>v</sub> d K<sub>v</sub><sup>−1</sup> (p, 1) + t<sub>v</sub>",
        "X: the point that pixel p of frame v shows; d: its depth; K_v, R_v, t_v: the frame's intrinsics, "
        "and where its camera looks and stands. A Gaussian's centre lies d + δ along the ray of p + o; δ and "
        "o are two of its head's outputs.",
        "Depth Anything 3 (arXiv 2511.10647); depth_anything.py",
        [DepthAnything3.network, gaussians_of],
        {"frames": rec.images, "depth": rec.depth, "cameras": rec.camera_to_world,
         "intrinsics": rec.intrinsics, "Gaussians: means": rec.gaussians.means,
         "Gaussians: colours, as spherical harmonics": rec.gaussians.harmonics},
        [Picture("the frames that it looks at", strip(rec.images.cpu())),
         Picture("depth: near is light", strip(colour_depth(rec.depth))),
         Picture("the Gaussians' centres: drag them, or press the arrow keys", w.clips[best]),
         Picture("the Gaussians, rendered while the camera swings to both sides", swing(rec))])


@torch.no_grad()
def swing(rec, frames=25):
    """Video (frames, 3, h, w) of a reconstruction's Gaussians from an orbit to both sides of its middle
    camera."""
    middle = len(rec.camera_to_world) // 2
    path = camera_path(["orbit_left", "orbit_right", "orbit_right", "orbit_left"], frames, strength=4.0)
    path[:, :3, 3] *= float(rec.depth[middle].median())  # the point it turns about
    cameras = rec.camera_to_world[middle] @ path.to(rec.camera_to_world)
    K = rec.intrinsics[middle].expand(frames, 3, 3)
    return splat.render(rec.gaussians, cameras, K, *rec.depth.shape[1:])[0].clamp(0, 1).cpu()


def four_rewards(w):
    # a row of pictures for each reward: the best member's beside the worst's
    meta, digits, recon, traj, general = [], [], [], [], []
    for which, i in zip(("best", "worst"), best_and_worst(w)):
        clip, name = w.clips[i], f"{which}, member {i}"
        said = {term: f"{name}: {TERMS[term].label} {score:.3f}" for term, score in clip.scores.items()}
        requested, found = paths_in_depths(clip.path, clip.reconstruction)
        meta.append(Picture(f"{said['meta']}, seen from the left and the right of the path",
                            strip(clip.meta_views)))
        digits.append(chart(f"{name}: probability of each of the critic's digits", draw_bars,
                            dict(enumerate(clip.digits.mean(0).tolist())), "digit", "probability", 1.0))
        recon += [Picture(f"{name}: the video", clip.video),
                  Picture(f"{said['recon']}, its Gaussians where its cameras were", clip.rerender)]
        traj.append(chart(f"{said['traj']}, the path asked for and the one found", draw_paths,
                          {"asked": requested, "found": found}))
        general.append(Picture(f"{said['general']}, the first frames", strip(clip.video[:w.c.frames_seen])))
    return Stage(
        "Four judges make it a number",
        "S_meta: a vision-language model looks at the Gaussians from beside the path, where a flat card or a "
        "floating bit shows, and is asked for a digit; the score is the digit it expects, / 9. S_recon: the "
        "Gaussians are rendered where the video's own cameras stood; a world that changes comes back "
        "blurred, the less so the slower it does. S_traj: the path recovered against the path asked for. "
        "R_gen: a model of human preference looks at the first frames, so that beauty is not given up for "
        "geometry. A judge that fails gives no number: its video is masked.",
        "R = S<sub>meta</sub> + S<sub>recon</sub> + S<sub>traj</sub> + λ R<sub>gen</sub>, &ensp; "
        "S<sub>traj</sub> = exp(−(α |t − s t̂| + β ∠(Q, Q̂)))",
        "S_meta and S_traj lie in [0, 1], S_recon = 1 − LPIPS(frames, renders) about there, R_gen in "
        "[−1, 1]; λ: its weight. The errors are means over frames. t, Q: where the cameras asked for stand "
        f"and look; t̂, Q̂: those found; s: the scale that fits best; α = {w.c.traj_alpha:g}, "
        f"β = {w.c.traj_beta:g}. The paper adds the terms with weight 1; the weights of this run: stage 10.",
        "World-R1, eq. 8 to 10 (the scale s, α and β are ours); rewards.py",
        [term.function for term in TERMS.values()],
        {"S_meta sees": "2 renders; not the prompt, the path or the video",
         "S_recon sees": f"{w.c.views} frames and their renders; not the prompt or the path; a still video "
                         "scores well",
         "S_traj sees": f"the path and {w.c.views} found cameras; no pixel; the length of a move is scaled "
                        "away, the angle of a turn counts",
         "R_gen sees": f"the prompt and {w.c.frames_seen} frames; no motion and no geometry"}
        | {f"member {i}": scores(clip) for i, clip in enumerate(w.clips)},
        [*meta, *digits, *recon, *traj, *general])


def group_advantages(w):
    values = without_masked(w.batch.terms)
    how = "summed as they are"
    if w.c.standardise:
        how = "first divided by their own std, so that none drowns the others, then weighted and summed"
        values = {name: standardise(v, torch.zeros(len(v)), w.c.pooled) for name, v in values.items()}
    counted = {}  # what each member's advantage is made of
    for i, A in enumerate(w.batch.advantages.tolist()):
        parts = [f"{term.label} {w.c.weights[name] * values[name][i]:+.2f}" for name, term in TERMS.items()]
        counted[f"member {i}: terms as they count"] = f"{', '.join(parts)}; A {A:+.2f}"
    # the term that decided most, and how little its raw values may differ
    most = max(TERMS, key=w.shares.get)
    raw = w.batch.terms[most][~w.batch.terms[most].isnan()]
    return Stage(
        "The group's mean is the baseline",
        "A reward by itself says little; how much better a video is than others of the same prompt says "
        f"which choice of noise to make more likely. The terms are {how}, and the sum is standardised in "
        "the group, which replaces a learned value function (pooled, as in tiny's training, a std is of all "
        "groups of a step; here there is one). Listed is the share of the advantages' variance "
        "that each term decided: one that decides nearly all is the only one that is trained on. Here "
        f"{TERMS[most].label} decided most, {w.shares[most]:.0%}, though it differs by only "
        f"{float(raw.max() - raw.min()):.3f} between members. So one group may reward what looks worse; "
        "training goes by the mean over many.",
        "A<sub>i</sub> = clip((R<sub>i</sub> − mean R) / (std R + 10<sup>−4</sup>))",
        f"R_i: the sum of member i's terms as they count (below); clip: to ± {w.c.adv_clip:g}.",
        "GRPO (arXiv 2402.03300); grpo.py",
        [standardise, combine, advantages],
        {f"{term.label}: weight, share": f"{w.c.weights[name]:g}, {w.shares[name]:.1%}"
         for name, term in TERMS.items()} | counted,
        [chart("total reward of each member: the weighted sum of the terms as they are", draw_bars,
               dict(enumerate(w.batch.terms["total"].tolist())), "member", "total reward"),
         chart("advantage of each member", draw_bars, dict(enumerate(w.batch.advantages.tolist())),
               "member", "A")])


def loss_and_gradient(w):
    numbers = {}
    for t, before, after in zip(w.batch.sde_steps, w.notes, w.notes_after):
        for name in ("clipped", "kl", "loss"):
            if name != "kl" or w.c.kl:  # without --kl it is not known
                numbers[f"step {t.index}: {name}"] = f"{before[name]:.6g} → {after[name]:.6g}"
    unmasked = w.batch.advantages != 0  # a masked video's advantage is 0: it has no say
    agrees = w.log_ratios * w.batch.advantages > 0  # (window, B)
    followed = agrees[:, unmasked].float().mean().item()
    squares = dict.fromkeys(range(len(w.policy.wan.dit.blocks)), 0.0)
    for name, norm in w.gradients.items():
        if name.startswith("blocks."):
            squares[int(name.split(".")[1])] += norm ** 2
    return Stage(
        "A clipped ratio becomes a gradient",
        "The loss asks how much likelier each drawn step is now than at rollout, and pushes that up or "
        "down by the advantage. At the first update after a rollout nothing has changed: every ratio is 1, "
        "clipping does nothing, and the gradient is REINFORCE's with a baseline; all presets make one update "
        "a rollout, so clipping never acts there. The first chart shows where one step of the optimiser took "
        "the ratios: with the advantages, where the step did what it is for. A KL term holds the model near "
        "what it was before training, weakly. Numbers are those before → after the step.",
        "L = mean max(−A ρ, −A clip(ρ, 1 ± ε)) + β |μ<sub>θ</sub> − μ<sub>ref</sub>|<sup>2</sup> / "
        "2 std<sup>2</sup>, &ensp; ρ = p<sub>θ</sub>(x'|x) / p<sub>old</sub>(x'|x)",
        "A: the advantage; p: of a drawn step, now and at rollout; log p is a mean over the latent's "
        "numbers, not a sum, so ratios stay near 1 and ε is small; μ, std: of the step's Gaussian, ref: of "
        "the untouched model.",
        "PPO (arXiv 1707.06347); Flow-GRPO",
        [policy_loss, surrogate, kl, log_prob],
        {"drawn states": w.batch.sde_steps[0].x_next, "ε": w.c.clip, "β": w.c.kl} | numbers
        | {"largest |ρ − 1| after the step": w.log_ratios.expm1().abs().max().item(),
           "ratios that went with their advantage": f"{followed:.0%}", "norm of the gradient": w.norm,
           "it is clipped to": w.c.grad_clip},
        [chart("ratio and advantage of each member after the step; grey: nothing is clipped", draw_ratios, w),
         chart("norm of each block's gradient", draw_bars, {i: x ** .5 for i, x in squares.items()},
               "block", "norm")])


def draw_ratios(axes, w):
    change = w.log_ratios.expm1()  # rho - 1, (window, B)
    for t, values in zip(w.batch.sde_steps, change):
        axes.scatter(w.batch.advantages, values, s=14, label=f"step {t.index}")
    bounds = axes.get_ylim()
    axes.axhspan(-w.c.clip, w.c.clip, color=GREY, alpha=.15, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=.6)
    axes.set(xlabel="A", ylabel="ρ − 1", ylim=bounds)
    axes.ticklabel_format(axis="y", scilimits=(-3, 3))
    axes.legend()


def before_and_after(w):
    before, after = (w.looks[label].video for label in ("before", "after one step"))
    change = (after - before).abs()
    last = "The last video is that of an adapter from a whole training."
    if "after a whole training" not in w.looks:
        last = "For that of a whole training, train one (make train-tiny) and give it: --trained runs/full-0."
    return Stage(
        "One optimiser step, and many",
        "The same prompt and the same noise, sampled as in stage 5 by the model before and after the step "
        "that was just taken. One step of one prompt changes little, and not surely for the better; the "
        f"change is also shown by itself, eightfold. {last}",
        "θ ← AdamW(θ, ∇L)",
        "θ: what is trained; ∇L: the loss's gradient.",
        "AdamW (arXiv 1711.05101); policy.py",
        [Policy.collect_gradients, Policy.sum_gradients, Policy.step],
        {"learning rate": w.c.lr, "mean change of a pixel": change.mean().item()}
        | {label: scores(clip) for label, clip in w.looks.items()},
        [Picture("before", before), Picture("after one step", after),
         Picture("change after one step, × 8", (8 * change).clamp(0, 1))]
        + [Picture(label, clip.video) for label, clip in list(w.looks.items())[2:]])


def dynamic_phase(w):
    c = w.c
    prompts = {"train": [""] * c.groups, "dynamic": [""] * c.groups}
    steps = range(2 * (c.main_steps + c.dynamic_steps))
    dynamic = [step_prompts(c, prompts, step)[0] for step in steps]
    counted = [term.label for term in TERMS.values() if not term.three_d]
    return Stage(
        "Every so often a dynamic phase",
        "The 3D rewards, together R_3D = S_meta + S_recon + S_traj, are served best by a world in which "
        f"nothing moves: trained on them alone, a model gives up motion. So after every {c.main_steps} steps "
        f"like the one above come {c.dynamic_steps} on prompts of moving things, in which "
        f"{' and '.join(counted)} alone counts and nothing is reconstructed; paths, noise, rollout and loss "
        "are the same. R_gen sees first frames: the phase does not reward motion, it stops punishing it. "
        "None of these steps was made for this page.",
        "R = R<sub>gen</sub> in a dynamic step",
        "In the paper a dynamic phase follows every 100 main steps; in the release it lasts 50 steps.",
        "World-R1, periodic decoupled training; train.py",
        [step_prompts, combine],
        {"main steps, then dynamic steps": f"{c.main_steps}, {c.dynamic_steps}",
         "terms that count in a dynamic step": ", ".join(counted)},
        [chart("the phases of the first steps", draw_phases, dynamic)])


def draw_phases(axes, dynamic):
    axes.step(range(len(dynamic)), dynamic, where="post")
    axes.set(xlabel="step", yticks=[0, 1], yticklabels=["main", "dynamic"])


STAGES = (words_to_path, path_to_flow, flow_to_noise, text_and_transformer, sampling, stochastic_window,
          latents_to_pixels, reconstruction, four_rewards, group_advantages, loss_and_gradient,
          before_and_after, dynamic_phase)


# ------------------------------------------------------------------------------------------- the command line

def options_of(argv):
    """-> this file's own options, and training's Config."""
    parser = command_line(__doc__, allow_abbrev=False)
    parser.add_argument("prompt")
    parser.add_argument("--out", type=Path, default=Path("out") / "walkthrough.html", help="the page")
    parser.add_argument("--markdown", type=Path, metavar="FOLDER", help="write walkthrough.md there instead")
    parser.add_argument("--trained", help="adapter of a whole training (default: tiny/world_r1 if there)")
    a, others = parser.parse_known_args(argv)
    given = {option.partition("=")[0] for option in others}
    for option in ("--groups", "--updates", "--batch", "--released"):
        if option in given:
            raise ValueError("the page follows one group, all members at once, through one update, and noise "
                             f"transported at the start; leave out {option}")
    a.prompt = usable_prompt(a.prompt)
    c = parse_arguments(["--preset", "tiny", *others])
    shipped = TINY / "world_r1"
    if a.trained is None and c.model == Config.model and shipped.exists():
        a.trained = str(shipped)
    return a, dataclasses.replace(c, groups=1, updates=1, batch=None)


def check_options(a, c):
    """Raises ValueError with one sentence for the first setting that cannot work; writes nothing."""
    check(c, 1)
    if not all(c.weights.values()):
        raise ValueError("the page shows every reward; give none of them weight 0")
    if a.trained:
        open_tensors([lora_file(a.trained)])
    if a.markdown:
        check_writable(a.markdown / "walkthrough.md", "--markdown")
        check_writable(a.markdown / "walkthrough" / "01_0.svg", "--markdown")
        return
    if a.out.suffix != ".html":
        raise ValueError(f"--out must end in .html, got '{a.out}'")
    check_writable(a.out)


def who_is_who(c):
    """-> what models made the page, as sentences."""
    tiny = [name for name in ("model", "depth_anything", "critic", "preference")
            if Path(getattr(c, name)).parent == TINY]
    said = ""
    if len(tiny) == 4:
        said = ("All models are tiny twins: of the classes of Wan2.1, Depth Anything 3, Qwen3-VL and HPSv3, "
                "but trained on procedural rooms; they judge more coarsely than those, and than your eye. ")
    if c.lpips == "random":
        said += "LPIPS, in S_recon, has a random trunk (a stand-in). "
    if c.lora and Path(c.lora) == TINY / "web":
        said += ("The model begins with tiny/web, an adapter that was trained to have faults (objects that "
                 "change shape, captions that name a wrong camera), so that there is something to learn.")
    return said.strip()


@as_command("walkthrough.py")
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    start = time.time()
    a, c = options_of(argv)
    check_options(a, c)
    w = walk(c, a.prompt, a.trained)
    stages = [stage(w) for stage in tqdm(STAGES, desc="walkthrough", unit="stage")]

    made = (f"Made in {time.time() - start:.0f} s by python walkthrough.py {shlex.join(argv)}: every number, "
            "shape, source and picture comes from that run, but for the video of an adapter from another. "
            + who_is_who(c))
    page = a.prompt, stages, made, c.frames / sampling_for(c).fps
    if a.markdown:
        write_markdown(a.markdown, *page)
        print(a.markdown / "walkthrough.md")
    else:
        write_html(a.out, *page)
        print(a.out)


if __name__ == "__main__":
    sys.exit(main())
