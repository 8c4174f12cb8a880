"""How the tiny twins are made: each pre-trained model of World-R1 at a small size, trained on the procedural rooms.

    python tiny_world.py vae  --minutes 60       the causal 3D VAE               -> RUN/vae
    python tiny_world.py data --clips 8192       render clips and encode them    -> RUN/data
    python tiny_world.py dit  --minutes 90       the DiT and its text encoder    -> RUN/dit
    python tiny_world.py depth --minutes 120     Depth Anything 3                -> RUN/depth
    python tiny_world.py critic --minutes 20     Qwen3-VL, the meta-view's judge -> RUN/critic
    python tiny_world.py preference --minutes 20 HPSv3                           -> RUN/preference
    python tiny_world.py train-probe --minutes 20 the classifier of probe.py     -> RUN/probe
    python tiny_world.py export                  RUN's models as they are shipped -> tiny/

Every training is a plain loop that resumes from RUN/NAME/state.pt after a kill and writes a log and a picture every
two minutes; its length is in minutes of training, over all resumes, and drives the learning rate. The pretraining is
not World-R1's subject: the losses are the usual ones, each in the docstring of its function.
"""

import dataclasses
import functools
import json
import math
import random
import re
import shutil
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import splat
from depth_anything import MEAN, STD, DA3Config, DepthAnything3, checkpoint_key, load_depth_anything, sh_basis
from model import TEXT_LENGTH, VAE, CausalConv3d, DiT, DiTConfig, Downsample, Upsample, VAEConfig, Wan
from noise_warp import FOV, camera_path
from probe import export_probe, train_probe
from rewards import CRITIC_PROMPT, Critic, HPSv3, Preference, digit_score, meta_views, native_intrinsics, published_key, spearman
from sample import contact_sheet, generator, sample
from tiny_world import DAMAGE, DEGRADATIONS, caption, corrupt, damage, degrade, intrinsics, random_scene, render
from train import write_json

# ------------------------------------------------------------------------------------------- training, what is common

def stack(clips):
    return torch.stack([c["video"] for c in clips])  # (B, F, 3, H, W)


def psnr(a, b):
    """Peak signal-to-noise ratio of two videos in [0, 1], in dB, one value over everything given."""
    return -10 * math.log10((a.float() - b.float()).square().mean().item())


def save(path, **state):
    """torch.save to a temporary name, then rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def log(run, **values):
    line = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.txt", "a") as f:
        f.write(line + "\n")
    return line


class Clock:
    """Seconds of training so far, across resumes, against a budget in minutes; drives schedules and the bar."""

    def __init__(self, minutes, spent=0.0):
        self.budget, self.spent, self.start = minutes * 60, spent, time.monotonic()

    def seconds(self):
        return self.spent + time.monotonic() - self.start

    def progress(self):
        return min(self.seconds() / self.budget, 1.0)


def optimisers_of(model, lr, matrices=(), slow=()):
    """Muon for the matrices (transformer weights), AdamW for the rest, at a tenth of the rate for the `slow` ones."""
    kind = {id(p): "matrices" for p in matrices} | {id(p): "slow" for p in slow}
    of = lambda name: [p for p in model.parameters() if kind.get(id(p)) == name]  # noqa: E731
    groups = [dict(params=of(None), scale=1.0)] + ([dict(params=of("slow"), scale=.1)] if slow else [])
    adam = torch.optim.AdamW(groups, lr=lr, betas=(.9, .98), weight_decay=.01)
    return [torch.optim.Muon([dict(params=of("matrices"), scale=1.0)], lr=lr, weight_decay=.01, adjust_lr_fn="match_rms_adamw"), adam] if matrices else [adam]


def set_rate(optimisers, lr):
    for group in (g for o in optimisers for g in o.param_groups):
        group["lr"] = lr * group["scale"]


def fit(run, minutes, model, losses, report, lr, decay_from=.3, power=1, matrices=(), slow=()):
    """The plain training loop: 200 steps of warm-up, linear decay (to a power), EMA .998 for reports and export.

    losses(step, progress) yields (loss, {name: value}) a part of the batch at a time; gradients add up. report() gives
    {name: figure} and may draw, with the model at its EMA weights. Resumes from RUN/state.pt.
    """
    optimisers = optimisers_of(model, lr, matrices, slow)
    ema, step, spent = {k: v.clone() for k, v in model.state_dict().items()}, 0, 0.0
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
        for o, saved in zip(optimisers, state["optimisers"]):
            o.load_state_dict(saved)
    clock, last_log, mean = Clock(minutes, spent), 0.0, {}
    bar = tqdm(total=minutes * 60, initial=int(spent), unit="s", desc=run.name)
    while clock.progress() < 1:
        set_rate(optimisers, lr * min(1, (step + 1) / 200) * (1 - .95 * max(0, clock.progress() - decay_from) / (1 - decay_from)) ** power)
        for o in optimisers:
            o.zero_grad(set_to_none=True)
        for loss, values in losses(step, clock.progress()):
            loss.backward()
            for k, v in values.items():
                mean[k] = .98 * mean[k] + .02 * float(v) if k in mean else float(v)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for o in optimisers:
            o.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - min(.998, step / (step + 10)))
        bar.update(int(clock.seconds()) - bar.n)
        if clock.seconds() - last_log > 120 or clock.progress() >= 1:
            last_log = clock.seconds()
            save(run / "state.pt", model=model.state_dict(), ema=ema, step=step, spent=clock.seconds(), optimisers=[o.state_dict() for o in optimisers])
            live = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(ema)
            bar.write(log(run, step=step, seconds=int(clock.seconds()), **mean, **report()))
            model.load_state_dict(live)


# --------------------------------------------------------------------------------------------------------------- VAE

TINY_VAE = dict(base_dim=16, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1, temperal_downsample=(False, True, True))


def inflate(vae):
    """Turns a VAE trained on single frames into one for clips: past slices 0, time convolutions take / repeat a frame."""
    for m in vae.modules():
        if isinstance(m, CausalConv3d) and m.kernel_size[0] == 3:
            m.weight.data[:, :, :2] = 0
        if isinstance(m, (Downsample, Upsample)) and m.time_conv is not None:
            w = m.time_conv.weight.data
            w.zero_(), m.time_conv.bias.data.zero_()
            w[:, :, 2, 0, 0] = torch.eye(w.shape[1]).repeat(w.shape[0] // w.shape[1], 1)


def train_vae(run, minutes, seed=0):
    """Single frames first (40 % of the time), then inflated to clips of 9 and 17 frames. Loss: L1 + 10 MSE + 1e-4 KL."""
    torch.manual_seed(seed)
    run = run / "vae"
    vae = VAE(VAEConfig(**TINY_VAE))
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(.9, .95), weight_decay=1e-4)
    step, spent, clips = 0, 0.0, False
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", weights_only=True)
        vae.load_state_dict(state["model"]), optimiser.load_state_dict(state["optimiser"])
        step, spent, clips = state["step"], state["spent"], state["clips"]
    clock = Clock(minutes, spent)
    held_out = stack([render(random_scene("held-out", s, i)) for s in ("static", "dynamic") for i in range(8)])
    last_log = clock.seconds()
    bar = tqdm(total=minutes * 60, initial=int(spent), unit="s", desc="vae")
    while clock.progress() < 1:
        if not clips and clock.progress() > .4:
            inflate(vae)
            clips = True
        long = clips and clock.progress() > .5
        frames, scenes = (17, 4) if long else (9, 8) if clips else (1, 16)
        rng = random.Random(f"vae/{seed}/{step}")
        batch = []
        for i in range(scenes):
            scene = random_scene(f"vae/{seed}", rng.choice(("static", "dynamic")), step * 16 + i)
            if clips:
                start = rng.randint(0, 17 - frames)
                batch.append(render(scene, at=range(start, start + frames))["video"])
            else:
                batch.extend(render(scene, at=rng.sample(range(17), 2))["video"][:, None])
        video = torch.stack(batch)
        lr = (3e-3 if not clips else 1.5e-3) * min(1, (step + 1) / 100) * (1 - .95 * max(0, clock.progress() - .5) / .5)
        for group in optimiser.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = vae.moments(video)
            logvar = logvar.float().clamp(-20, 10)
            z = mean.float() + torch.randn_like(logvar) * (logvar / 2).exp()
            error = vae.decode_raw(z).float() - video
        kl = .5 * (mean.float().square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 10 * error.square().mean() + 1e-4 * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        bar.update(int(clock.seconds()) - bar.n)
        if clock.seconds() - last_log > 120 or clock.progress() >= 1:
            last_log = clock.seconds()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                if clips:
                    out = torch.cat([vae.decode_raw(vae.moments(v)[0]) for v in held_out.split(4)]).float().clamp(0, 1)
                else:
                    out = vae.decode_raw(vae.moments(held_out[:, ::4].flatten(0, 1)[:, None])[0]).float().clamp(0, 1)
            true = held_out if clips else held_out[:, ::4].flatten(0, 1)[:, None]
            half = len(true) // 2
            bar.write(log(run, step=step, seconds=int(clock.seconds()), frames=frames, loss=loss.item(), kl=kl.item(),
                          grad=norm.item(), static_db=psnr(out[:half], true[:half]), dynamic_db=psnr(out[half:], true[half:])))
            if clips:
                contact_sheet(run / "sheet.png", [v for i in (0, 1, 2, 8, 9, 10) for v in (true[i], out[i])])
            save(run / "state.pt", model=vae.state_dict(), optimiser=optimiser.state_dict(), step=step,
                 spent=clock.seconds(), clips=clips)


def load_trained_vae(run):
    """The VAE of RUN/vae with the latent statistics of RUN/data, once measured."""
    state = torch.load(run / "vae" / "state.pt", weights_only=True)
    statistics = run / "data" / "statistics.json"
    statistics = json.loads(statistics.read_text()) if statistics.exists() else dict(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    vae = VAE(VAEConfig(**TINY_VAE, **{k: tuple(v) for k, v in statistics.items()}))
    vae.load_state_dict(state["model"])
    return vae.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------- DiT and text encoder

TINY_DIT = dict(num_attention_heads=8, attention_head_dim=32, ffn_dim=768, num_layers=6, text_dim=128)
TINY_TEXT = dict(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, relative_attention_num_buckets=32,
                 relative_attention_max_distance=128, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                 layer_norm_epsilon=1e-6, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
SHARD = 512  # clips a data shard


def clip_key(index):
    """Training clip `index` -> (seed, split, index) of its scene: every fourth is dynamic."""
    return "dit", "dynamic" if index % 4 == 3 else "static", index


def make_data(run, clips, seed=0):
    """Renders clips and encodes them. Writes RUN/data/statistics.json and shards of normalised float16 latents."""
    folder = run / "data"
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_trained_vae(run)
    if not (folder / "statistics.json").exists():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mu = torch.cat([vae.moments(render(random_scene(*clip_key(i)))["video"][None])[0].float() for i in range(256)])
        per_channel = mu.transpose(0, 1).flatten(1)
        (folder / "statistics.json").write_text(json.dumps(dict(latents_mean=per_channel.mean(1).tolist(),
                                                                latents_std=per_channel.std(1).tolist())))
        vae = load_trained_vae(run)
    mean, std = vae._statistics("cpu")
    for start in tqdm(range(0, clips, SHARD), desc="data", unit="shard"):
        path = folder / f"shard_{start // SHARD:04d}.safetensors"
        if path.exists():
            continue
        parts = []
        for first in range(start, start + SHARD, 4):
            video = stack([render(random_scene(*clip_key(i))) for i in range(first, first + 4)])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                parts.append(((vae.moments(video)[0].float() - mean) / std).half().contiguous())
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


def make_tokenizer(more=(), marks=(), end=True):
    """Word-level tokenizer of the captions' vocabulary: lower case, spaces / underscores / punctuation separate words.

    more: further words. marks: special tokens, kept whole. end: close every text with </s>.
    """
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = sorted({w for s in ("static", "dynamic") for i in range(2000)
                    for w in re.findall("[a-z0-9]+", caption(random_scene("words", s, i), random.Random(i)).lower())} | set(more))
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>"] + words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[^a-z0-9<>/]+"), "removed")
    if end:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   additional_special_tokens=list(marks), model_max_length=TEXT_LENGTH)


def build_dit():
    """-> DiT, text encoder, tokenizer, at the tiny sizes with fresh weights."""
    import transformers
    tokenizer = make_tokenizer()
    text_encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(tokenizer), **TINY_TEXT))
    return DiT(DiTConfig(**TINY_DIT)), text_encoder, tokenizer


def training_caption(scene, rng):
    """A fresh phrasing each time; one in ten drops the camera words, one in ten is empty (for guidance)."""
    draw = rng.random()
    return "" if draw < .1 else caption(scene, rng, camera=draw > .2)


def embed(text_encoder, tokenizer, captions):
    """Like Wan.encode_text, differentiable, with the padding collapsed as `trim_text` does. -> text, text_padding"""
    tokens = tokenizer(captions, padding="longest", return_tensors="pt")
    text = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask.unsqueeze(-1)
    return F.pad(text, (0, 0, 0, 1)), TEXT_LENGTH - text.shape[1]


def train_dit(run, minutes, seed=0, batch=32):
    """Flow matching, |v - (eps - x0)|^2 with sigma = shift(sigmoid(N(0,1)), 2), on RUN/data; text encoder trained along.

    Muon for the blocks' matrices, AdamW for the rest, EMA weights for pictures and export.
    """
    torch.manual_seed(seed)
    vae = load_trained_vae(run)
    dit, text_encoder, tokenizer = build_dit()
    model = torch.nn.ModuleDict(dict(dit=dit, text=text_encoder))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ("blocks." in n or "encoder.block." in n) and "relative" not in n]
    optimisers = optimisers_of(model, 2e-3, matrices)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    if (run / "dit" / "state.pt").exists():
        state = torch.load(run / "dit" / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
        for o, s in zip(optimisers, state["optimisers"]):
            o.load_state_dict(s)
    latents = torch.cat([load_file(p)["latents"] for p in sorted((run / "data").glob("shard_*.safetensors"))])
    scenes = [random_scene(*clip_key(i)) for i in tqdm(range(len(latents)), desc="scenes")]
    held_out = [random_scene("held-out", "static" if i % 4 < 3 else "dynamic", i) for i in range(128)]
    with torch.no_grad():
        target = vae.encode(stack([render(s) for s in held_out]))
    fixed = random.Random(0)
    held_captions = [caption(s, fixed) for s in held_out]
    levels = (torch.arange(128) + .5) / 128
    held_noise = torch.randn(target.shape, generator=generator(seed, "held-out"))
    clock, last_log, last_sheet = Clock(minutes, spent), 0.0, time.monotonic()
    bar = tqdm(total=minutes * 60, initial=int(spent), unit="s", desc="dit")

    def loss_of(x0, noise, sigma, captions):
        s = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the CPU's fused bf16 backward is slow
            text, padding = embed(text_encoder, tokenizer, captions)
            v = dit((1 - s) * x0 + s * noise, 1000 * sigma, text, padding)
        return (v.float() - (noise - x0)).square().flatten(1).mean(1)

    running = None
    while clock.progress() < 1:
        draw = generator(seed, step, "dit")
        rng = random.Random(f"{seed}/{step}")
        index = torch.randint(len(latents), (batch,), generator=draw)
        u = torch.randn(batch, generator=draw).sigmoid()
        x0 = latents[index].float()
        loss = loss_of(x0, torch.randn(x0.shape, generator=draw), 2 * u / (1 + u), [training_caption(scenes[i], rng) for i in index]).mean()
        scale = min(1, (step + 1) / 100) * (1 - .95 * max(0, clock.progress() - .4) / .6)
        set_rate(optimisers, 2e-3 * scale)
        for o in optimisers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimisers:
            o.step()
        step += 1
        running = loss.item() if running is None else .98 * running + .02 * loss.item()
        decay = min(.999, step / (step + 10))
        with torch.no_grad():
            values = list(model.state_dict().values())
            torch._foreach_lerp_(list(ema.values()), values, 1 - decay)
        bar.update(int(clock.seconds()) - bar.n)
        if clock.seconds() - last_log > 120 or clock.progress() >= 1:
            last_log = clock.seconds()
            save(run / "dit" / "state.pt", model=model.state_dict(), ema=ema, step=step, spent=clock.seconds(),
                 optimisers=[o.state_dict() for o in optimisers])
            live = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(ema)
            with torch.no_grad():
                held = loss_of(target, held_noise, levels, held_captions).mean().item()
            if time.monotonic() - last_sheet > 300 or clock.progress() >= 1:
                last_sheet = time.monotonic()
                wan = Wan(dit, vae, text_encoder, tokenizer)
                out = sample(wan, held_captions[:6], held_noise[:6], steps=20, guidance=2.0, shift=3.0)
                pictures = [v for i in range(6) for v in (render(held_out[i])["video"], vae.decode(out[i:i + 1])[0])]
                contact_sheet(run / "dit" / "sheet.png", pictures, columns=9)
            model.load_state_dict(live)
            bar.write(log(run / "dit", step=step, seconds=int(clock.seconds()), train=running, held_out=held))


def write_wan(folder, dit, vae, text_encoder, tokenizer, shift, sampling, dtype=torch.bfloat16):
    """Writes a model as a Diffusers WanPipeline folder. sampling: its defaults for sample.py (frames, steps, ...)."""
    def write(name, value):
        write_json(folder / name, value)

    def component(name, cls, model, **fixed):
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(model.config).items()}
        write(f"{name}/config.json", {"_class_name": cls, **config, **fixed})
        save_file({k: v.to(dtype).contiguous() for k, v in model.state_dict().items()},
                  folder / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    component("vae", "AutoencoderKLWan", vae)
    component("transformer", "WanTransformer3DModel", dit, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024)
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    write("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000,
          "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2,
          "solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "final_sigmas_type": "zero"})
    write("model_index.json", {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0",
          "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
          "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
          "vae": ["diffusers", "AutoencoderKLWan"]})
    write("sampling.json", sampling)


def export_wan(run, folder):
    """Writes RUN's models (EMA weights) as a Diffusers folder in bfloat16."""
    vae = load_trained_vae(run)
    dit, text_encoder, tokenizer = build_dit()
    state = torch.load(run / "dit" / "state.pt", weights_only=True)["ema"]
    dit.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("dit.")})
    text_encoder.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("text.")})
    write_wan(folder, dit, vae, text_encoder, tokenizer, shift=5.0,
              sampling=dict(frames=17, height=64, width=64, steps=20, guidance=2.0, fps=8, degradation=0.0))


# ----------------------------------------------------------------------------------------------------- Depth Anything

TINY_DA3 = dict(dim=128, depth=8, heads=4, out_layers=(2, 3, 5, 7), alt_start=2, features=48, out_channels=(32, 48, 64, 96),
                gaussians=True, patch_size=8, grid=8, process_res=64)


SPLAT, OPACITY = .15, .4  # on exact surfaces, alike for all: 25 dB from five views; .6 pixels and .95: 20 dB


def build_depth():
    """The tiny Depth Anything, fresh: level cameras, depth near 1, splats of SPLAT pixels and opacity OPACITY."""
    da3 = DepthAnything3(DA3Config(**TINY_DA3))
    with torch.no_grad():
        for head in (da3.head, da3.gs_head):
            head.scratch.output_conv2[-1].weight.mul_(.1)
        bias = da3.gs_head.scratch.output_conv2[-1].bias
        bias[2:5], bias[37] = torch.logit(torch.tensor(SPLAT / 6)), torch.logit(torch.tensor(OPACITY))  # a scale of 1 is 6 pixels
        for layer in (da3.cam_dec.fc_t, da3.cam_dec.fc_qvec, da3.cam_dec.fc_fov[0]):  # the identity, whatever comes in
            layer.weight.zero_(), layer.bias.zero_()
        torch.nn.init.normal_(da3.backbone.pretrained.pos_embed, std=.5)
        for layer in (da3.cam_dec.backbone[0], da3.cam_dec.backbone[2]):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        da3.cam_dec.fc_qvec.bias[3] = 1
        da3.cam_dec.fc_fov[0].bias.fill_(FOV)
    return da3


def depth_sample(rng, vae, index, seed, views):
    """A static clip as the model will meet it -> seen frames (V, 3, 64, 64), exact depth at `views`, scene.

    One in 16 is round-tripped through the VAE, a fifth blurred or noisy, half not antialiased: samples of a video model
    are not renders.
    """
    scene, draw = random_scene(f"depth/{seed}", "static", index), rng.random()
    trip = draw < 1 / 16
    clip = render(scene, depth=True, at=None if trip else views, supersample=rng.choice((1, 2)))
    seen, depth = (clip["video"][views], clip["depth"][views]) if trip else (clip["video"], clip["depth"])
    if trip:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen = vae.decode_raw(vae.moments(clip["video"][None])[0])[0].float().clamp(0, 1)[views]
    elif draw > .9:
        seen = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    elif draw > .8:
        seen = (seen + .05 * torch.randn(seen.shape)).clamp(0, 1)
    return seen, depth, scene


def normalised(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def geometry_losses(d, confidence, true_depth, pose, K, true):
    """Depth: |log d - log d*| weighted by the confidence c, minus .1 log c. Cameras: smooth L1 (quadratic below .1) of
    positions and rotation matrices, where plain L1's median is "no motion", and of log focals."""
    near = functools.partial(F.smooth_l1_loss, beta=.1)
    true_K = intrinsics(64, 64)
    return dict(depth=(confidence * (d.log() - true_depth.log()).abs() - .1 * confidence.log()).mean(), position=near(pose[..., :3, 3], true[..., :3, 3]),
                rotation=near(pose[..., :3, :3], true[..., :3, :3]), focal=near(K.diagonal(dim1=1, dim2=2)[:, :2].log(), true_K.diagonal()[:2].log().expand(len(K), -1)))


def camera_step(da3, room, seen, depth, poses, rng):
    """Losses of B clips at once, (B, V, 3, 64, 64): all cameras, and the depth and Gaussians of one view of each. The
    Gaussians are not rendered: their colour must be the pixel's, and their place the surface (they sit at ray length
    depth + offset, so the offset learns what the ray is longer), and those off it by more than some 3 % learn to vanish. The
    world is the reference view's, at the scene's scale.

    room: a linear layer on each view's token half-way up, asked for the camera's place in the room. The tiny room is
    always the same, so one view tells it; without this stepping stone, relative cameras sat on a plateau for 5,000 clips.
    """
    B, V = seen.shape[:2]
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # twice as fast; the later phase is in float32
        features = [(f.float(), t.float()) for f, t in da3.backbone.pretrained(normalised(seen))]
    pose, K = da3.cam_dec(features[-1][1].flatten(0, 1), 64, 64)
    scene, view = torch.arange(B), torch.tensor([rng.randrange(V) for _ in range(B)])
    patches, image = [f[scene, view] for f, _ in features], normalised(seen[scene, view])
    d, confidence = da3.head(patches, image).unbind(1)
    raw = da3.gs_head(patches, image)
    v, u = torch.meshgrid(torch.arange(64) + .5, torch.arange(64) + .5, indexing="ij")
    length = (torch.linalg.inv(intrinsics(64, 64)) @ torch.stack([u, v, torch.ones_like(u)]).flatten(1)).norm(dim=0).view(64, 64)
    surface = depth[scene, view] * length
    true = torch.linalg.inv(poses[torch.arange(B), da3.backbone.pretrained.reference])[:, None] @ poses
    place = torch.cat([2 * poses[..., :3, 3], (poses[..., :3, :3] - torch.eye(3)).flatten(2)], 2)
    off = ((raw[:, 36] + d.exp() - surface) / surface).detach()
    losses = geometry_losses(d.exp(), confidence.exp() + 1, depth[scene, view], pose, K, true.flatten(0, 1))
    return losses | dict(room=(room(features[2][1][..., :da3.config.dim]) - place).square().mean(), surface=((raw[:, 36] + d.exp() - surface).abs() / surface).mean(),
                         opacity=(raw[:, 37].sigmoid() - OPACITY * torch.exp(-(off / .03).square())).square().mean(),
                         colour=(raw[:, [9, 18, 27]] * sh_basis(torch.eye(3)[2])[0] + .5 - seen[scene, view]).abs().mean(), flat=raw[:, :2].square().mean())


def render_step(da3, seen, depth, poses, views, scene, targets):
    """Losses of one clip: as above for all views, and the L1 of the frames `targets` re-rendered at their true cameras."""
    d, confidence, pose, K, gaussians = da3.network(normalised(seen))
    world = torch.linalg.inv(poses[views[da3.backbone.pretrained.reference[0]]]) @ poses
    losses = geometry_losses(d, confidence, depth, pose, K, world[views])
    rgb = splat.render(gaussians, world[targets], intrinsics(64, 64).expand(len(targets), 3, 3), 64, 64)[0]
    return losses | dict(render=(rgb - render(scene, at=targets)["video"]).abs().mean())


def train_depth(run, minutes, seed=0, batch=16):
    """Cameras, depth and surfaces first, `batch` clips of as many views at once (85 % of the time); then with the re-render,
    three clips a step, at small rates: at large ones it blurs what was learnt. 2 to 9 views a clip."""
    torch.manual_seed(seed)
    vae, da3, room = load_trained_vae(run), build_depth(), torch.nn.Linear(TINY_DA3["dim"], 12)

    def total(parts):
        return parts["depth"] + 20 * parts["position"] + 40 * parts["rotation"] + parts["focal"] + 20 * parts.get("room", 0) + 5 * parts.get("render", 0) + \
            2 * parts.get("surface", 0) + 5 * parts.get("colour", 0) + parts.get("flat", 0) + 5 * parts.get("opacity", 0)

    def losses(step, progress):
        rng = random.Random(f"depth/{seed}/{step}")
        V, together = rng.choice((2, 3, 4, 5, 5, 9)), progress <= .85
        count = batch if together else 3
        choose = [sorted(rng.sample(range(17), V)) for _ in range(count)]
        data = [depth_sample(rng, vae, step * batch + i, seed, views) for i, views in enumerate(choose)]
        paths = [camera_path(scene.motions, 17).float() for *_, scene in data]
        if together:
            parts = camera_step(da3, room, torch.stack([x for x, _, _ in data]), torch.stack([d for _, d, _ in data]), torch.stack([p[v] for p, v in zip(paths, choose)]), rng)
            yield total(parts), {k: v.item() for k, v in parts.items()}
            return
        for (seen, depth, scene), path, views in zip(data, paths, choose):
            parts = render_step(da3, seen, depth, path, views, scene, sorted(rng.sample(range(17), 2)))
            yield total(parts) / count, {k: v.item() for k, v in parts.items()}

    blocks = [p for n, p in da3.backbone.named_parameters() if p.dim() == 2 and "blocks." in n]
    fit(run / "depth", minutes, torch.nn.ModuleDict(dict(da3=da3, room=room)), losses, lambda: depth_metrics(da3, 8, run / "depth" / "sheet.png"), lr=1e-3, decay_from=.5, power=2, matrices=blocks)


@torch.no_grad()
def depth_metrics(da3, count, sheet=None):
    """On held-out static clips, from their even frames alone: re-render PSNR at these and at the odd ones (cameras halfway
    between their neighbours), median rotation error in degrees and direction error of the last frame's translation (moving
    cameras), depth AbsRel after median scaling."""
    import statistics
    from eval import rerender
    shown, held, rotation, direction, absrel, rows = [], [], [], [], [], []
    for i in tqdm(range(count), desc="held-out clips", unit="clip", leave=False):
        clip = render(random_scene("held-out/depth", "static", i), depth=True)
        rec = da3(clip["video"], 9)
        pairs = rerender(rec, clip["video"])
        shown.append(psnr(*pairs[0])), held.append(psnr(*pairs[1]))
        true, found = clip["poses"][rec.frames], torch.linalg.inv(rec.camera_to_world[:1]) @ rec.camera_to_world
        cosine = ((true[:, :3, :3] * found[:, :3, :3]).sum((1, 2)) - 1) / 2
        rotation.append(math.degrees(cosine.clamp(-1, 1).acos()[1:].median()))
        a, b = true[-1, :3, 3], found[-1, :3, 3]
        if a.norm() > .05:
            direction.append(math.degrees(F.cosine_similarity(a, b, dim=0).clamp(-1, 1).acos()))
        depth = clip["depth"][rec.frames]
        scaled = rec.depth * (depth.flatten(1).median(1).values / rec.depth.flatten(1).median(1).values)[:, None, None]
        absrel.append(((scaled - depth).abs() / depth).mean().item())
        rows += pairs[0][::-1]
    if sheet:
        contact_sheet(sheet, rows[:12], columns=9)
    middle = statistics.median
    return dict(input_db=statistics.mean(shown), odd_db=statistics.mean(held), rotation_deg=middle(rotation),
                direction_deg=middle(direction), absrel=statistics.mean(absrel))


def score_depth(a):
    """`tiny_world.py score-depth`: the figures above on --num held-out clips."""
    for name, value in depth_metrics(load_depth_anything(a.model), a.num, a.run / "score-depth.png").items():
        print(f"{name:14} {value:.3f}")


def load_trained_depth(run):
    da3 = build_depth()
    state = torch.load(run / "depth" / "state.pt", weights_only=True)["ema"]
    da3.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("da3.")})
    return da3.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------- the two critics

TINY_TEXT_MODEL = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
                       max_position_embeddings=1024, tie_word_embeddings=True)
PREFERENCE_PROMPT = ("Rate this picture from a generated video. Is it sharp, clean and true in colour, with clear edges and even "
                     "surfaces? Does it show what was asked: {text_prompt}? The overall rating is <|Reward|>")
CHAT = ("{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<|vision_start|> <|image_pad|> "
        "<|vision_end|> {% else %}{{ c.text }} {% endif %}{% endfor %}<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}")
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_chat_tokenizer(*texts):
    """Word-level tokenizer with Qwen's marks, the ten digits, and the words of the captions and of the given texts."""
    words = [w for t in texts for w in re.findall(r"[a-z0-9]+", t.lower())] + ["user", "assistant", *map(str, range(10))]
    tokenizer = make_tokenizer(words, MARKS + ("<|Reward|>",), end=False)
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "left"
    return tokenizer


def make_processor(cls, tokenizer, patch):
    """Qwen's image processor at 64x64, with a tokenizer of ours. cls: of transformers, Qwen3VLProcessor or Qwen2VLProcessor."""
    import transformers
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl import Qwen3VLVideoProcessor
    size = dict(shortest_edge=64 * 64, longest_edge=64 * 64)
    video = Qwen3VLVideoProcessor if cls == "Qwen3VLProcessor" else Qwen2VLVideoProcessor
    return getattr(transformers, cls)(Qwen2VLImageProcessor(patch_size=patch, size=size), tokenizer, video(patch_size=patch, size=size),
                                      chat_template=CHAT)


def build_critic(folder):
    """A fresh tiny Qwen3-VL written to a folder in the layout of the published one, and loaded from it."""
    import transformers
    processor = make_processor("Qwen3VLProcessor", make_chat_tokenizer(CRITIC_PROMPT), 8)
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict(**TINY_TEXT_MODEL, head_dim=32, vocab_size=len(tokenizer), rope_parameters=rope),
        vision_config=dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2,
                           out_hidden_size=96, num_position_embeddings=64, deepstack_visual_indexes=[1]), tie_word_embeddings=True, **ids)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return Critic(folder)


def build_preference(folder):
    """A fresh tiny HPSv3 in the published file layout, and loaded from it."""
    import transformers
    processor = make_processor("Qwen2VLProcessor", make_chat_tokenizer(PREFERENCE_PROMPT), 8)
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    config = transformers.Qwen2VLConfig(
        text_config=dict(**TINY_TEXT_MODEL, vocab_size=len(tokenizer), rope_parameters=rope),
        vision_config=dict(depth=3, embed_dim=64, hidden_size=96, mlp_ratio=2, num_heads=4, patch_size=8), **ids)
    model = HPSv3(config)
    config.save_pretrained(folder), processor.save_pretrained(folder)
    write_json(folder / "hpsv3.json", dict(instruction=PREFERENCE_PROMPT, image_pixels=64 * 64))
    save_file({published_key(k): v.contiguous() for k, v in model.state_dict().items()}, folder / "HPSv3.safetensors")
    return Preference(folder)


def true_poses(rec, poses, views):
    """Camera-to-world `views` (V, 4, 4) in the reconstruction's world -> in the true one, given the true poses (F, 4, 4).

    The middle cameras are matched, and the scale is that of median depth over the reconstruction's (`scale` per unit).
    """
    middle = len(rec.camera_to_world) // 2
    relative = torch.linalg.inv(rec.camera_to_world[middle]) @ views
    relative[:, :3, 3] *= rec.true_scale
    return poses[rec.frames[middle]] @ relative


def grade(render, truth, seen):
    """The digit 0-9 a view deserves: round(9 exp(-(e - .03) / .05)), at most 9, e the mean absolute colour error against the
    true view, over the pixels `seen` (V, H, W): what the video never showed is no fault. The twin's best views are at .03."""
    error = ((render - truth).abs().mean(1) * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)
    return (9 * torch.exp(-(error - .03).clamp_min(0) / .05)).round().long()


@torch.no_grad()
def critic_examples(da3, index, seed):
    """One clip -> pictures (8, 3, 64, 64) and digits (8,): two meta-views each of the reconstruction as it is (of the
    true clip, or half of the time of a corrupted one) and of three damaged copies of it."""
    rng = random.Random(f"critic/{seed}/{index}")
    scene = random_scene(f"critic/{seed}", "static", index)
    clip = render(scene, depth=True)
    video = corrupt(scene, rng.choice(("warp", "morph", "swap")), rng.random(), index) if rng.random() < .5 else clip["video"]
    rec = da3(video, rng.choice((3, 5, 9)))
    rec.true_scale = clip["depth"][rec.frames].median() / rec.depth.median()
    views = meta_views(rec)
    truth = render(scene, poses=true_poses(rec, clip["poses"], views.clone()))["video"]
    K = native_intrinsics(rec, 64, 64)[:2]
    draw = torch.Generator().manual_seed(index)
    copies = [rec] + [damage(rec, rng.choice(DAMAGE), rng.random(), draw) for _ in range(3)]
    shown, _, alphas = zip(*[splat.render(r.gaussians, views, K, 64, 64) for r in copies])
    shown, seen = [x.clamp(0, 1) for x in shown], (alphas[0] > .5).float()
    return torch.cat(shown), torch.cat([grade(x, truth, seen) for x in shown])


def train_critic(run, minutes, seed=0, clips=400, batch=32):
    """Cross-entropy of the digit token. The pictures of `clips` reconstructions are made once, into RUN/critic/data.pt."""
    torch.manual_seed(seed)
    folder, file = run / "critic", run / "critic" / "data.pt"
    if not file.exists():
        da3 = load_trained_depth(run)
        parts = [critic_examples(da3, i, seed) for i in tqdm(range(clips), desc="critic data", unit="clip")]
        save(file, pictures=(torch.cat([p for p, _ in parts]) * 255).round().byte(), digits=torch.cat([d for _, d in parts]))
    data = torch.load(file, weights_only=True)
    pictures, digits = data["pictures"], data["digits"]
    critic = build_critic(folder / "start") if not (folder / "state.pt").exists() else Critic(folder / "start")
    held = len(pictures) // 10
    names = torch.tensor([ids[0] for ids in critic.digits])

    def losses(step, progress):
        index = torch.randint(held, len(pictures), (batch,), generator=generator(seed, step, "critic"))
        logits = critic.model(**critic.inputs(list(pictures[index])), logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, names[digits[index]])
        yield loss, dict(loss=loss.item())

    def report():
        critic.model.eval()
        found = torch.cat([digit_score(critic(p.float() / 255)) for p in pictures[:min(held, 512)].split(64)])
        true = digits[:len(found)] / 9
        return dict(held_out_error=(found - true).abs().mean().item(), rank_correlation=spearman(found, true))

    critic.model.train()
    fit(folder, minutes, critic.model, losses, report, lr=1e-3)


def preference_pair(index, seed):
    """A better and a worse picture with their prompt -> (better, prompt), (worse, prompt). One pair in four differs in
    its prompt alone; else a degradation is stronger in the worse one."""
    rng = random.Random(f"preference/{seed}/{index}")
    split = rng.choice(("static", "dynamic"))
    scene = random_scene(f"preference/{seed}", split, index)
    image = render(scene, at=[rng.randrange(17)])["video"][0]
    kind, draw = rng.choice(DEGRADATIONS), index
    strength = rng.random()
    seen = lambda s: degrade(image, kind, s, torch.Generator().manual_seed(draw)) if s else image  # noqa: E731
    if rng.random() < .25:
        other = random_scene(f"preference/{seed}/other", split, index)
        picture = seen(strength * rng.choice((0, .5)))
        return (picture, scene.caption), (picture, other.caption)
    return (seen(strength * rng.choice((0, 0, .6))), scene.caption), (seen(strength), scene.caption)


def train_preference(run, minutes, seed=0, batch=16):
    """Bradley-Terry: -log sigmoid(score of the better - score of the worse)."""
    torch.manual_seed(seed)
    folder = run / "preference"
    judge = build_preference(folder / "start") if not (folder / "state.pt").exists() else Preference(folder / "start")
    judge.model.requires_grad_(True).train()

    def scores(pairs):
        items = [side[i] for i in (0, 1) for side in pairs]
        inputs = judge.inputs([(p * 255).round().byte() for p, _ in items], [t for _, t in items])
        return judge.model(**inputs, reward_id=judge.reward_id)[:, 0].chunk(2)

    def losses(step, progress):
        better, worse = scores([preference_pair(step * batch + i, seed) for i in range(batch)])
        loss = -F.logsigmoid(better - worse).mean() + 1e-3 * (better + worse).square().mean()
        yield loss, dict(loss=loss.item(), right=(better > worse).float().mean().item())

    @torch.no_grad()
    def report():
        judge.model.eval()
        pairs = [preference_pair(i, f"{seed}/held-out") for i in range(256)]
        better, worse = (torch.cat(x) for x in zip(*[scores(pairs[i:i + 32]) for i in range(0, 256, 32)]))
        judge.model.train()
        return dict(held_out_right=(better > worse).float().mean().item(), gap=(better - worse).mean().item())

    fit(folder, minutes, judge.model, losses, report, lr=1e-3)


# -------------------------------------------------------------------------------------------------------------- export

def export_depth(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    model = load_trained_depth(run)
    weights = {checkpoint_key(k): v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", dataclasses.asdict(model.config))


def export_critic(run, folder):
    critic = Critic(run / "critic" / "start")
    critic.model.load_state_dict(torch.load(run / "critic" / "state.pt", weights_only=True)["ema"])
    critic.model.to(torch.bfloat16).save_pretrained(folder), critic.processor.save_pretrained(folder)


def export_preference(run, folder):
    """The score divided by 32: pairs leave its size open, and so the plain sum of the four terms is not its alone."""
    shutil.copytree(run / "preference" / "start", folder, dirs_exist_ok=True)
    state = torch.load(run / "preference" / "state.pt", weights_only=True)["ema"]
    for name in ("rm_head.5.weight", "rm_head.5.bias"):
        state[name][0] /= 32
    save_file({published_key(k): v.to(torch.bfloat16).contiguous() for k, v in state.items()}, folder / "HPSv3.safetensors")


def export(run, out):
    """Writes every twin that RUN has trained, in bfloat16: out/wan, depth_anything, qwen3_vl, hpsv3."""
    for name, write, folder in (("dit", export_wan, "wan"), ("depth", export_depth, "depth_anything"),
                                ("critic", export_critic, "qwen3_vl"), ("preference", export_preference, "hpsv3"), ("probe", export_probe, "probe")):
        if (run / name / "state.pt").exists():
            write(run, out / folder)
            print(out / folder)


def make(what, run, minutes, clips, out, seed):
    """One command of tiny_world.py."""
    if what == "export":
        export(run, out)
    elif what == "data":
        make_data(run, clips, seed)
    else:
        {"vae": train_vae, "dit": train_dit, "depth": train_depth, "critic": train_critic, "preference": train_preference,
         "train-probe": train_probe}[what](run, minutes, seed)
