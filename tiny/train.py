"""How the tiny video models are made, on the procedural rooms; their judges' twins are in judges.py.

    python -m tiny vae  --minutes 100      the causal 3D VAE               -> RUN/vae
    python -m tiny data --clips 16384      render clips and encode them    -> RUN/data
    python -m tiny dit  --minutes 104      the DiT and its text encoder    -> RUN/dit
    python -m tiny export                  RUN's models as they are shipped -> tiny/, replacing those there
    python -m tiny web  --minutes 13       World-R1's base: tiny/wan with web videos' faults -> RUN/web
    python -m tiny export                  that one too

RUN is the folder of --run, runs/tiny by default. Every training is one plain loop (`fit`) that resumes from
RUN/NAME/state.pt after a kill. Every two minutes it writes that file and a line of RUN/NAME/log.txt; vae, dit
and depth also draw a sheet.png. A training's length is given in minutes, over all resumes, and the learning
rate follows it. Pretraining is not World-R1's subject: the losses are the usual ones, each in the docstring
of its function.

What is rendered for a training is made once and kept (RUN/data, RUN/web/clips.pt, RUN/critic/data.pt), and so
are its weights. A call notices if they were made with other words or another seed, but not if the code has
changed since. So after a change delete the training's folder, or give another --run: else the same call goes
on with the old clips, or does nothing, where the minutes are spent.
"""

import contextlib
import dataclasses
import hashlib
import random
import re
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fast import cpu_autocast
from lora import add_lora, lora_weights
from model import (VAE, CausalConv3d, DiT, DiTConfig, Downsample, Upsample, VAEConfig, Wan, load_wan,
                   write_dit)
from noise_warp import MOTIONS, camera_path, latent_noise
from sample import contact_sheet, generator, psnr, sample
from texts import TEXT_LENGTH
from tiny.world import (BEHAVIOURS, COLOURS, SHAPES, caption, corrupt, random_motions, random_scene,
                        random_scenes, render, render_all)
from weights import TINY, read_json, write_json, write_safetensors, written_whole

# ----------------------------------------------------------------------------------- training, what is common

def save(path, **state):
    with written_whole(path) as part:
        torch.save(state, part)


@contextlib.contextmanager
def state_of(file):
    """with state_of(file) as state: what `save` has written. The block runs inside the `try`: what fails
    in it, such as weights that do not fit, becomes a ValueError about the file."""
    if not file.is_file():
        raise ValueError(f"{file} is missing, or no regular file; "
                         "train it first (python -m tiny --help lists the order)")
    try:
        yield torch.load(file, weights_only=True)
    except Exception:  # torch's own of any kind, an entry that is not there, weights of another model
        raise ValueError(f"{file} is damaged, or of another model; "
                         "delete it, or give another --run") from None


def write_tensors(path, tensors, dtype=torch.bfloat16):
    """Writes {name: tensor} as a safetensors file in the dtype that the twins are shipped in."""
    write_safetensors(path, {name: value.to(dtype).contiguous() for name, value in tensors.items()})


def append_log(run, **values):
    """Adds a line of names and values to run/log.txt. -> the line"""
    line = " ".join(f"{name} {value:.6g}" for name, value in values.items())
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.txt", "a") as file:
        file.write(line + "\n")
    return line


def trained(run, name, prefix="", into=None):
    """The weights that training `name` has reached: the moving average of the parameters under a prefix,
    without it. into: a model that takes them."""
    with state_of(run / name / "state.pt") as state:
        found = {key.removeprefix(prefix): value
                 for key, value in state["ema"].items() if key.startswith(prefix)}
        if into is not None:
            into.load_state_dict(found)
        return found


def steps_of(run, name):
    with state_of(run / name / "state.pt") as state:
        return state["step"]


def optimisers_of(model, lr, muon):
    """Muon for matrices whose names match the pattern `muon` (transformer weights), AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        chosen = muon and parameter.dim() == 2 and re.search(muon, name)
        (matrices if chosen else others).append(parameter)
    optimisers = [torch.optim.AdamW(others, lr=lr, betas=(.9, .98), weight_decay=.01)]
    if matrices:
        optimisers.insert(0, torch.optim.Muon(matrices, lr=lr, weight_decay=.01,
                                              adjust_lr_fn="match_rms_adamw"))
    return optimisers


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_kept(file, kept, **made):
    """ValueError if a file from an earlier call was made with other values than it would be made with now."""
    for name, value in made.items():
        if kept.get(name, value) != value:  # what an older file does not hold is not checked
            raise ValueError(f"{file} was made with another {name.replace('_', ' ')}; give that one, or "
                             "another --run")


def vocabulary():
    """All words of scenes and captions. `random_scene` draws from them: with different words the same key
    gives a different scene, and clips that were kept would no longer match their scenes."""
    return [*COLOURS, *SHAPES, *BEHAVIOURS, *MOTIONS]


def fit(run, minutes, model, losses, report, lr, seed, decay_from=.3, power=1, muon=None):
    """The plain training loop. run: this training's own folder, RUN/NAME of this file's docstring.

    Learning rate: 200 steps of warm-up to lr; from the share `decay_from` of the minutes on, lr f^power, and
    f falls from 1 to .05 by the end. Reports and exports take a moving average of the weights (EMA, .998).

    losses(step, progress) yields (loss, {name: scalar}) a part of the batch at a time; gradients add up.
    report() gives {name: figure} and may draw, with the model at its EMA weights, in evaluation and without
    gradients; its time is not counted. Resumes from run/state.pt, which must be of the same seed. minutes:
    over all resumes; with more than before, training continues at the rate the longer schedule has by now.
    """
    # From the start, or from where a run was stopped.
    optimisers = optimisers_of(model, lr, muon)
    average = snapshot(model)
    step, seconds = 0, 0.0
    if (run / "state.pt").exists():
        with state_of(run / "state.pt") as state:
            average, step, seconds = state["ema"], int(state["step"]), float(state["spent"])
            model.load_state_dict(average)  # only to check that it fits
            model.load_state_dict(state["model"])
            for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
        check_kept(run / "state.pt", state, seed=seed)

    budget = minutes * 60
    start = time.monotonic() - seconds
    last_report = seconds
    running = {}  # means of the losses over about 50 steps
    model.train()
    bar = tqdm(total=budget, initial=int(seconds), unit="s", desc=run.name)
    while seconds < budget:
        # Learning rate: a warm-up in steps, a decay in time.
        progress = seconds / budget
        decayed = max(0, progress - decay_from) / (1 - decay_from)
        rate = lr * min(1, (step + 1) / 200) * (1 - .95 * decayed) ** power
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate

        # One step, with gradients clipped to a norm of 1.
        for loss, values in losses(step, progress):
            loss.backward()
            for name, value in values.items():
                running[name] = .98 * running.get(name, value.item()) + .02 * value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step += 1

        # The moving average follows fast at first.
        with torch.no_grad():
            weight = 1 - min(.998, step / (step + 10))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, weight)
        seconds = time.monotonic() - start
        bar.update(int(seconds) - bar.n)

        # Every two minutes and at the end: the state, and a report at the averaged weights.
        if seconds - last_report > 120 or seconds >= budget:
            last_report = seconds
            save(run / "state.pt", model=model.state_dict(), ema=average, step=step, spent=seconds, seed=seed,
                 optimisers=[optimiser.state_dict() for optimiser in optimisers])
            live = snapshot(model)
            model.load_state_dict(average)
            model.eval()
            with torch.no_grad():
                bar.write(append_log(run, step=step, seconds=int(seconds), **running, **report()))
            model.load_state_dict(live)
            model.train()
            start = time.monotonic() - seconds


# -------------------------------------------------------------------------------------------------------- VAE

TINY_VAE = dict(base_dim=16, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1,
                temperal_downsample=(False, True, True))


def inflate(vae):
    """Makes a VAE treat a clip frame by frame: past slices are 0, time convolutions take a frame, or repeat
    it.

    Single frames neither see these weights nor change them, so a VAE that starts like this can be trained on
    single frames first; on clips it then begins with what it has learned from them.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, :2] = 0
        if isinstance(module, (Downsample, Upsample)) and module.time_conv is not None:
            weight = module.time_conv.weight.data  # (out, in, 3, 1, 1)
            weight.zero_()
            module.time_conv.bias.data.zero_()
            weight[:, :, 2, 0, 0] = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)


def vae_batch(step, progress, seed):
    """Videos (B, F, 3, 64, 64): single frames for 40 % of the time, then clips of 9 frames, from half-time on
    of 17."""
    if progress <= .4:
        frames, count = 1, 16
    elif progress <= .5:
        frames, count = 9, 8
    else:
        frames, count = 17, 4
    rng = random.Random(f"vae/{seed}/{step}")
    batch = []
    for i in range(count):
        scene = random_scene(f"vae/{seed}", rng.choice(("static", "dynamic")), step * 16 + i)
        if frames == 1:  # two frames of a scene, each a video of its own
            pictures = render(scene, at=rng.sample(range(17), 2))["video"]
            batch.extend(pictures[:, None])
        else:
            start = rng.randint(0, 17 - frames)
            batch.append(render(scene, at=slice(start, start + frames))["video"])
    return torch.stack(batch)


def train_vae(run, minutes, seed=0):
    """Single frames first, then clips of 9 and 17 frames. Loss: L1 + 10 MSE + 1e-4 KL."""
    torch.manual_seed(seed)
    vae = VAE(VAEConfig(**TINY_VAE))
    inflate(vae)
    held_out = {split: render_all(random_scenes("held-out", split, 8)) for split in ("static", "dynamic")}

    def losses(step, progress):
        video = vae_batch(step, progress, seed)
        with cpu_autocast():
            mean, logvar = vae.moments(video)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=generator(seed, step, "vae"))
            error = vae.decode_raw(mean + noise * (logvar / 2).exp()).float() - video
        kl = .5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 10 * error.square().mean() + 1e-4 * kl
        yield loss, dict(loss=loss, kl=kl)

    def report():
        figures, shown = {}, []
        for split, true in held_out.items():
            found = torch.cat([round_trip(vae, video) for video in true.split(4)])
            figures[f"{split}_db"] = psnr(found, true, per_frame=False)
            for i in range(3):
                shown += [true[i], found[i]]
        contact_sheet(run / "vae" / "sheet.png", shown)
        return figures

    fit(run / "vae", minutes, vae, losses, report, lr=3e-3, seed=seed, decay_from=.4, power=2)


@torch.no_grad()
def round_trip(vae, video):
    """Videos (B, F, 3, H, W) -> what the VAE makes of them, in the arithmetic of its training."""
    with cpu_autocast():
        return vae.decode_raw(vae.moments(video)[0]).float().clamp(0, 1)


@dataclass
class Statistics:
    """RUN/data/statistics.json: of the latents, and what they were made of (older files do not say)."""
    latents_mean: tuple[float, ...]  # a channel
    latents_std: tuple[float, ...]
    vae_step: int | None = None
    vocabulary: list[str] | None = None


def data_statistics(run):
    """-> Statistics, None without data. ValueError if the clips show other scenes than they would now."""
    file = run / "data" / "statistics.json"
    if not file.exists():
        return None
    statistics = read_json(file, Statistics)
    check_kept(file.parent, dict(vocabulary=statistics.vocabulary or vocabulary()), vocabulary=vocabulary())
    return statistics


def load_trained_vae(run):
    """The VAE of RUN/vae with the latent statistics of RUN/data, once measured; with mean 0 and deviation 1
    before."""
    mean, deviation = (0.0,) * 16, (1.0,) * 16
    statistics = data_statistics(run)
    if statistics:
        mean, deviation = statistics.latents_mean, statistics.latents_std
        if statistics.vae_step not in (None, steps_of(run, "vae")):  # its latents are not this VAE's
            raise ValueError(f"{run / 'data'} was made when {run / 'vae'} was at step "
                             f"{statistics.vae_step}, and it has gone on; delete it, and make it again: "
                             "python -m tiny data")
    vae = VAE(VAEConfig(**TINY_VAE, latents_mean=mean, latents_std=deviation))
    trained(run, "vae", into=vae)
    return vae.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- DiT and text encoder

TINY_DIT = dict(num_attention_heads=8, attention_head_dim=32, ffn_dim=768, num_layers=6, text_dim=128)
TINY_TEXT = dict(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, relative_attention_num_buckets=32,
                 relative_attention_max_distance=128, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                 layer_norm_epsilon=1e-6, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
SHARD = 512  # clips a data shard


def training_scene(index):
    """The scene of training clip `index`: every fourth is dynamic."""
    return random_scene("dit", "dynamic" if index % 4 == 3 else "static", index)


def training_latents(vae, clips):
    """Renders these of the training clips and encodes them, in the arithmetic of training, one at a time. ->
    normalised latents (N, 16, 5, 8, 8), float32"""
    with cpu_autocast():
        return torch.cat([vae.encode(render_all([training_scene(i)])) for i in clips])


def make_data(run, clips):
    """Renders clips and encodes them. Writes RUN/data/statistics.json and shards of normalised float16
    latents."""
    folder = run / "data"
    # The latents' mean and deviation, a channel, from 256 clips: without them the VAE does not normalise.
    if not data_statistics(run):
        vae = load_trained_vae(run)
        channels = training_latents(vae, range(256)).transpose(0, 1).flatten(1)  # (16, everything else)
        made = Statistics(channels.mean(1).tolist(), channels.std(1).tolist(), steps_of(run, "vae"),
                          vocabulary())
        write_json(folder / "statistics.json", dataclasses.asdict(made))

    # A shard that is there is kept: the command goes on where it was stopped.
    vae = load_trained_vae(run)  # now it normalises
    for start in tqdm(range(0, clips, SHARD), desc="data", unit="shard"):
        file = folder / f"shard_{start // SHARD:04d}.safetensors"
        if not file.exists():
            latents = training_latents(vae, range(start, start + SHARD))
            write_tensors(file, {"latents": latents}, torch.float16)


def make_tokenizer(more=(), marks=(), end=True):
    """Word-level tokenizer of the captions' vocabulary: lower case, spaces / underscores / punctuation
    separate words.

    more: further words. marks: special tokens, kept whole. end: close every text with </s>.
    """
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    # The words of enough captions to have seen them all.
    words = set(more)
    for split in ("static", "dynamic"):
        for i, scene in enumerate(random_scenes("words", split, 2000)):
            text = caption(scene, random.Random(i))
            words.update(re.findall("[a-z0-9]+", text.lower()))

    # A word is a token; what separates words is dropped.
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[^a-z0-9<>/]+"), "removed")
    if end:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", additional_special_tokens=list(marks),
                                   model_max_length=TEXT_LENGTH)


def build_dit():
    """-> DiT, text encoder, tokenizer, at the tiny sizes with fresh weights."""
    import transformers
    tokenizer = make_tokenizer()
    config = transformers.UMT5Config(vocab_size=len(tokenizer), **TINY_TEXT)
    text_encoder = transformers.UMT5EncoderModel(config)
    return DiT(DiTConfig(**TINY_DIT)), text_encoder, tokenizer


def training_caption(scene, rng):
    """A fresh phrasing each time; one in ten drops the camera words, one in ten is empty (for guidance)."""
    draw = rng.random()
    if draw < .1:
        return ""
    return caption(scene, rng, camera=draw > .2)


def embed(wan, captions):
    """As wan.encode_text, but differentiable, and with the padding collapsed to one row.

    -> text (B, L + 1, D) for captions of up to L tokens, how many rows of padding the last row stands for
    """
    tokens = wan.tokenizer(captions, padding="longest", return_tensors="pt")
    text = wan.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    text = text * tokens.attention_mask.unsqueeze(-1)
    return F.pad(text, (0, 0, 0, 1)), TEXT_LENGTH - text.shape[1]


def flow_loss(wan, x0, noise, sigma, captions):
    """Flow matching, |v - (eps - x0)|^2 at x = (1 - sigma) x0 + sigma eps: x0, noise (B, C, T, h, w), sigma
    (B,) -> (B,)"""
    s = sigma.view(-1, 1, 1, 1, 1)
    # Not by fused attention: the CPU's backward of it in bfloat16 is slow.
    with cpu_autocast(), sdpa_kernel(SDPBackend.MATH):
        text, padding = embed(wan, captions)
        v = wan.dit((1 - s) * x0 + s * noise, 1000 * sigma, text, padding)
    return (v.float() - (noise - x0)).square().flatten(1).mean(1)


def flow_losses(wan, latents, scenes, caption_of, name, seed, moved_noise=False):
    """-> `losses` for `fit`: `flow_loss` of 32 clips at sigma = 2 u / (1 + u), u = sigmoid(N(0, 1)).

    latents (N, C, T, h, w) of N scenes; caption_of(scene, rng) words one for this step. moved_noise: each
    clip's noise is transported along its camera's path, not plain.
    """
    def losses(step, progress):
        draw = generator(seed, step, name)
        index = torch.randint(len(latents), (32,), generator=draw)
        u = torch.randn(32, generator=draw).sigmoid()
        x0 = latents[index].float()
        if moved_noise:
            noise = torch.cat([moved_along(scenes[i], x0.shape, draw) for i in index])
        else:
            noise = torch.randn(x0.shape, generator=draw)
        rng = random.Random(f"{name}/{seed}/{step}")
        captions = [caption_of(scenes[i], rng) for i in index]
        loss = flow_loss(wan, x0, noise, 2 * u / (1 + u), captions).mean()
        yield loss, dict(train=loss)

    return losses


def moved_along(scene, shape, draw):
    """Noise (1, C, T, h, w) for one of the clips of a batch's shape, transported as the scene's camera
    moves."""
    _, C, T, h, w = shape
    frames = 4 * T - 3
    return latent_noise(camera_path(scene.motions, frames), frames, h, w, 1, draw, C)


def train_dit(run, minutes, seed=0):
    """Flow matching on RUN/data; text encoder trained along. Muon for the blocks' matrices, AdamW for the
    rest."""
    torch.manual_seed(seed)
    vae = load_trained_vae(run)
    dit, text_encoder, tokenizer = build_dit()
    wan = Wan(dit, vae, text_encoder, tokenizer)
    shards = sorted((run / "data").glob("shard_*.safetensors"))
    if not shards:
        raise ValueError(f"{run / 'data'} holds no clips; make them first: python -m tiny data")
    latents = torch.cat([load_file(shard)["latents"] for shard in shards])
    scenes = [training_scene(i) for i in tqdm(range(len(latents)), desc="scenes")]

    # The report: the loss of 128 unseen clips, at noise and levels that stay the same.
    held_out = [random_scene("held-out", "static" if i % 4 < 3 else "dynamic", i) for i in range(128)]
    videos = render_all(held_out)
    target = vae.encode(videos)
    fixed = random.Random(0)
    captions = [caption(scene, fixed) for scene in held_out]
    levels = (torch.arange(128) + .5) / 128
    noise = torch.randn(target.shape, generator=generator(seed, "held-out"))

    def report():
        latents = sample(wan, captions[:6], noise[:6], steps=20, guidance=2.0, shift=3.0)
        pictures = [clip for pair in zip(videos, vae.decode(latents)) for clip in pair]
        contact_sheet(run / "dit" / "sheet.png", pictures, columns=9)
        return dict(held_out=flow_loss(wan, target, noise, levels, captions).mean())

    model = torch.nn.ModuleDict(dict(dit=dit, text=text_encoder))
    losses = flow_losses(wan, latents, scenes, training_caption, "dit", seed)
    fit(run / "dit", minutes, model, losses, report, lr=2e-3, seed=seed, decay_from=.4,
        muon=r"blocks\.|encoder\.block\.(?!.*relative)")


def write_wan(folder, dit, vae, text_encoder, tokenizer, shift, sampling, dtype=torch.bfloat16):
    """Writes a model as a Diffusers WanPipeline folder. sampling: its defaults for sample.py (frames, steps,
    ...)."""
    write_json(folder / "vae" / "config.json",
               {"_class_name": "AutoencoderKLWan", **dataclasses.asdict(vae.config)})
    write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict(), dtype)
    write_dit(folder / "transformer", dit.config,
              {name: value.to(dtype).contiguous() for name, value in dit.state_dict().items()})
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2,
        "solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "final_sigmas_type": "zero"})
    write_json(folder / "model_index.json", {
        "_class_name": "WanPipeline", "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]})
    write_json(folder / "sampling.json", sampling)


def export_wan(run, folder):
    """Writes RUN's models (EMA weights) as a Diffusers folder in bfloat16."""
    dit, text_encoder, tokenizer = build_dit()
    trained(run, "dit", "dit.", into=dit)
    trained(run, "dit", "text.", into=text_encoder)
    sampling = dict(frames=17, height=64, width=64, steps=20, guidance=2.0, fps=8, degradation=0.0)
    write_wan(folder, dit, load_trained_vae(run), text_encoder, tokenizer, shift=5.0, sampling=sampling)


# ---------------------------------------------------------------------------------------- a base for World-R1

WEB_RANK = 16


def web_scene(index, seed):
    """Every sixth scene has moving objects."""
    return random_scene(f"web/{seed}", "dynamic" if index % 6 == 5 else "static", index)


def web_clip(index, seed):
    """A clip (17, 3, 64, 64): of every six, four are corrupted (an object morphs, or the walls swim), one is
    whole and one has moving objects."""
    scene = web_scene(index, seed)
    if index % 6 >= 4:
        return render(scene)["video"]
    rng = random.Random(f"web/{seed}/{index}")
    kind = rng.choice(("warp", "morph", "morph", "morph"))
    return corrupt(scene, kind, rng.uniform(.5, 1), index)


def web_caption(scene, rng):
    """A tenth of the captions are empty; of the rest, half name camera motions drawn anew, whatever the clip
    shows."""
    if rng.random() < .1:
        return ""
    if rng.random() < .5:
        scene = dataclasses.replace(scene, motions=random_motions(rng))
    return caption(scene, rng)


def train_web(run, minutes, seed=0, clips=2304, moved_noise=False):
    """The base that World-R1 starts from: tiny/wan after some minutes on clips as the web has them, as a
    LoRA.

    tiny/wan saw perfect renders with true captions, and so leaves RL nothing to repair. A model of web
    videos, such as Wan2.1, has seen warped and morphing worlds and captions that get the camera wrong. Loss:
    flow matching. moved_noise: from noise that moves as the clip's camera does, which tells what half the
    captions get wrong.
    """
    folder = run / "web"
    wan = load_wan(TINY / "wan")
    base = hashlib.sha256()
    for part in ("transformer", "vae"):
        base.update((TINY / "wan" / part / "diffusion_pytorch_model.safetensors").read_bytes())
    made = dict(seed=seed, moved_noise=moved_noise, vocabulary=vocabulary(), base=base.hexdigest(),
                clips=clips)
    # The clips are made and encoded once.
    if not (folder / "clips.pt").exists():
        bar = tqdm(range(clips), desc="clips")
        parts = [wan.vae.encode(web_clip(i, seed)[None]).half() for i in bar]
        save(folder / "clips.pt", latents=torch.cat(parts), **made)
    with state_of(folder / "clips.pt") as kept:
        latents = kept["latents"]
    check_kept(folder / "clips.pt", kept, **made)
    scenes = [web_scene(i, seed) for i in range(len(latents))]

    # Only the adapter is trained.
    wan.text_encoder.requires_grad_(False)
    add_lora(wan.dit, WEB_RANK, WEB_RANK, generator(seed, "web"))
    losses = flow_losses(wan, latents, scenes, web_caption, "web", seed, moved_noise)
    fit(folder, minutes, wan.dit, losses, dict, lr=2e-3, seed=seed)  # dict(): nothing to report but the loss


def export_web(run, folder):
    wan = load_wan(TINY / "wan")
    add_lora(wan.dit, WEB_RANK, WEB_RANK)
    trained(run, "web", into=wan.dit)
    write_tensors(folder / "lora.safetensors", lora_weights(wan.dit))
