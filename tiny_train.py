"""How the tiny video models are made, on the procedural rooms; their judges' twins are in tiny_judges.py.

    python tiny_world.py vae  --minutes 60       the causal 3D VAE               -> RUN/vae
    python tiny_world.py data --clips 8192       render clips and encode them    -> RUN/data
    python tiny_world.py dit  --minutes 90       the DiT and its text encoder    -> RUN/dit
    python tiny_world.py web  --minutes 12       World-R1's base: tiny/wan with the faults of web videos -> RUN/web
    python tiny_world.py export                  RUN's models as they are shipped -> tiny/

Every training is a plain loop (`fit`) that resumes from RUN/NAME/state.pt after a kill and writes a log and a picture
every two minutes; its length is in minutes of training, over all resumes, and drives the learning rate. The pretraining
is not World-R1's subject: the losses are the usual ones, each in the docstring of its function.
"""

import dataclasses
import json
import math
import random
import re
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lora import add_lora, lora_weights
from model import TEXT_LENGTH, VAE, CausalConv3d, DiT, DiTConfig, Downsample, Upsample, VAEConfig, Wan, load_wan
from noise_warp import MOTIONS
from rewards import TINY
from sample import contact_sheet, generator, sample
from tiny_world import caption, corrupt, random_scene, render
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


def flow_loss(dit, text_encoder, tokenizer, x0, noise, sigma, captions):
    """Flow matching, |v - (eps - x0)|^2 at x = (1 - sigma) x0 + sigma eps: x0, noise (B, C, f, h, w), sigma (B,) -> (B,)"""
    s = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the CPU's fused bf16 backward is slow
        text, padding = embed(text_encoder, tokenizer, captions)
        v = dit((1 - s) * x0 + s * noise, 1000 * sigma, text, padding)
    return (v.float() - (noise - x0)).square().flatten(1).mean(1)


def flow_batch(latents, draw, batch=32):
    """-> indices, x0, noise, sigma of a training batch; sigma = shift(sigmoid(N(0,1)), 2)."""
    index = torch.randint(len(latents), (batch,), generator=draw)
    u = torch.randn(batch, generator=draw).sigmoid()
    x0 = latents[index].float()
    return index, x0, torch.randn(x0.shape, generator=draw), 2 * u / (1 + u)


def train_dit(run, minutes, seed=0):
    """Flow matching on RUN/data; text encoder trained along. Muon for the blocks' matrices, AdamW for the rest."""
    torch.manual_seed(seed)
    vae = load_trained_vae(run)
    dit, text_encoder, tokenizer = build_dit()
    model = torch.nn.ModuleDict(dict(dit=dit, text=text_encoder))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ("blocks." in n or "encoder.block." in n) and "relative" not in n]
    latents = torch.cat([load_file(p)["latents"] for p in sorted((run / "data").glob("shard_*.safetensors"))])
    scenes = [random_scene(*clip_key(i)) for i in tqdm(range(len(latents)), desc="scenes")]
    held_out = [random_scene("held-out", "static" if i % 4 < 3 else "dynamic", i) for i in range(128)]
    with torch.no_grad():
        target = vae.encode(stack([render(s) for s in held_out]))
    fixed = random.Random(0)
    held_captions = [caption(s, fixed) for s in held_out]
    levels = (torch.arange(128) + .5) / 128
    held_noise = torch.randn(target.shape, generator=generator(seed, "held-out"))

    def losses(step, progress):
        rng = random.Random(f"{seed}/{step}")
        index, x0, noise, sigma = flow_batch(latents, generator(seed, step, "dit"))
        loss = flow_loss(dit, text_encoder, tokenizer, x0, noise, sigma, [training_caption(scenes[i], rng) for i in index]).mean()
        yield loss, dict(train=loss.item())

    @torch.no_grad()
    def report():
        wan = Wan(dit, vae, text_encoder, tokenizer)
        out = sample(wan, held_captions[:6], held_noise[:6], steps=20, guidance=2.0, shift=3.0)
        pictures = [v for i in range(6) for v in (render(held_out[i])["video"], vae.decode(out[i:i + 1])[0])]
        contact_sheet(run / "dit" / "sheet.png", pictures, columns=9)
        return dict(held_out=flow_loss(dit, text_encoder, tokenizer, target, held_noise, levels, held_captions).mean().item())

    fit(run / "dit", minutes, model, losses, report, lr=2e-3, decay_from=.4, matrices=matrices)


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


# ------------------------------------------------------------------------------------------------- a base for World-R1

def web_clip(index, seed):
    """-> scene, video: of every six clips, four are no rigid world, one is whole and one has moving objects."""
    scene = random_scene(f"web/{seed}", "dynamic" if index % 6 == 5 else "static", index)
    rng = random.Random(f"web/{seed}/{index}")
    return scene, corrupt(scene, rng.choice(("warp", "morph", "morph", "morph")), rng.uniform(.5, 1), index) if index % 6 < 4 else render(scene)["video"]


def web_caption(scene, rng):
    """A tenth of the captions are empty, and of the rest half name camera motions drawn anew, whatever the clip shows."""
    if rng.random() < .1:
        return ""
    if rng.random() < .5:
        scene = dataclasses.replace(scene, motions=[rng.choice(MOTIONS)] if rng.random() < .75 else rng.sample(MOTIONS[:-1], 2))
    return caption(scene, rng)


def train_web(run, minutes, seed=0, clips=2304):
    """The base that World-R1 starts from: tiny/wan after some minutes on clips as the web has them, as a LoRA of rank 16.

    tiny/wan saw perfect renders with true captions, and so leaves RL nothing to repair. A model of web videos, such as
    Wan2.1, has seen warped and morphing worlds and captions that get the camera wrong. Loss: flow matching.
    """
    wan, folder = load_wan(TINY / "wan"), run / "web"
    if not (folder / "clips.pt").exists():
        with torch.no_grad():
            latents = [wan.vae.encode(torch.stack([web_clip(i, seed)[1] for i in range(first, min(first + 4, clips))])).half()
                       for first in tqdm(range(0, clips, 4), desc="clips")]
        save(folder / "clips.pt", latents=torch.cat(latents))
    latents = torch.load(folder / "clips.pt", weights_only=True)["latents"]
    scenes = [random_scene(f"web/{seed}", "dynamic" if i % 6 == 5 else "static", i) for i in range(len(latents))]
    wan.text_encoder.requires_grad_(False)
    add_lora(wan.dit, 16, 16, generator(seed, "web"))

    def losses(step, progress):
        rng = random.Random(f"web/{seed}/{step}")
        index, x0, noise, sigma = flow_batch(latents, generator(seed, step, "web"))
        loss = flow_loss(wan.dit, wan.text_encoder, wan.tokenizer, x0, noise, sigma, [web_caption(scenes[i], rng) for i in index]).mean()
        yield loss, dict(train=loss.item())

    fit(folder, minutes, wan.dit, losses, dict, lr=2e-3)


def export_web(run, folder):
    wan = load_wan(TINY / "wan")
    add_lora(wan.dit, 16, 16)
    wan.dit.load_state_dict(torch.load(run / "web" / "state.pt", weights_only=True)["ema"])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16) for k, v in lora_weights(wan.dit).items()}, folder / "lora.safetensors", metadata={"format": "pt"})
