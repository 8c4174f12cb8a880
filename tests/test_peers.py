"""Our ports against the real packages, at random weights, in float32."""

import pytest
import torch
from conftest import randomise

import sample as S
from model import DIT_SIZES, VAE, DiT, DiTConfig, VAEConfig, load_wan

diffusers = pytest.importorskip("diffusers")


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("config, shape", [
    (dict(num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=56, text_dim=20), (2, 16, 3, 6, 10)),
    (dict(num_layers=3, num_attention_heads=3, attention_head_dim=32, ffn_dim=100, text_dim=16, freq_dim=64, in_channels=4, out_channels=4), (1, 4, 5, 8, 2)),
    (dict(num_layers=1, num_attention_heads=5, attention_head_dim=128, ffn_dim=64, text_dim=48, freq_dim=128), (3, 16, 1, 4, 14))])
def test_dit(config, shape):
    ours = randomise(DiT(DiTConfig(**config)))
    theirs = diffusers.WanTransformer3DModel(**config).eval()
    theirs.load_state_dict(ours.state_dict())
    x, text = torch.randn(shape), torch.randn(shape[0], 30, config["text_dim"])
    with torch.no_grad():
        for t in (999.0, 512.25, 3.0):
            t = torch.full((shape[0],), t)
            assert relative(ours(x, t, text), theirs(x, t, text, return_dict=False)[0]) < 1e-5


@pytest.mark.parametrize("size", ["1.3B", "14B"])
def test_dit_names_and_shapes_at_full_size(size):
    c = DIT_SIZES[size]
    with torch.device("meta"):
        ours = DiT(c)
        theirs = diffusers.WanTransformer3DModel(num_attention_heads=c.num_attention_heads, ffn_dim=c.ffn_dim, num_layers=c.num_layers)
        vae, their_vae = VAE(), diffusers.AutoencoderKLWan()
    for a, b in ((ours, theirs), (vae, their_vae)):
        assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


@pytest.mark.parametrize("config", [
    dict(base_dim=6, num_res_blocks=1), dict(base_dim=4, num_res_blocks=2, dim_mult=(1, 2, 3, 4), z_dim=8, latents_mean=(.1,) * 8, latents_std=(1.3,) * 8),
    dict(base_dim=8, num_res_blocks=1, temperal_downsample=(True, True, False))])
def test_vae(config):
    ours = randomise(VAE(VAEConfig(**config)))
    theirs = diffusers.AutoencoderKLWan(**{k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}).eval()
    theirs.load_state_dict(ours.state_dict())
    mean, std = ours._statistics("cpu")
    with torch.no_grad():
        for frames, height, width in ((1, 16, 24), (5, 40, 8), (17, 24, 16), (33, 16, 8)):
            video = torch.rand(1, frames, 3, height, width)
            latents = theirs.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
            assert relative(ours.encode(video) * std + mean, latents) < 1e-4
            z = torch.randn_like(latents) * .5
            decoded = theirs.decode(z).sample.transpose(1, 2).clamp(-1, 1)
            assert relative(ours.decode((z - mean) / std) * 2 - 1, decoded) < 1e-4


def velocity(x, sigma):
    """Some smooth field that mixes channels."""
    W = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) * .4
    return torch.tanh(x @ W + sigma) - .3 * x


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (2, 3.0), (20, 1.0), (20, 3.0), (20, 5.0), (50, 8.0)])
def test_unipc(steps, shift):
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    assert torch.allclose(scheduler.sigmas, S.sigmas(steps, shift), atol=2e-6)
    noise = torch.randn(4, 5, 6)
    x = noise
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps):
        x = scheduler.step(velocity(x, sigma), t, x, return_dict=False)[0]
    assert relative(S.unipc(velocity, noise, S.sigmas(steps, shift)), x) < 1e-5


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (20, 3.0), (20, 5.0)])
def test_euler(steps, shift):
    levels = S.sigmas(steps, shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=levels[:-1].tolist())
    noise = torch.randn(4, 5, 6)
    x = noise
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps):
        x = scheduler.step(velocity(x, sigma), t, x, return_dict=False)[0]
    assert relative(S.euler(velocity, noise, levels), x) < 1e-5


def test_original_text_encoder_formula(checkpoint):
    """UMT5's text path against the release's own description: attention without scaling, bias in every layer, RMS norms."""
    wan = load_wan(checkpoint)
    ids = wan.tokenizer(["a red sphere on a checkered green floor"], return_tensors="pt").input_ids
    state, c = wan.text_encoder.state_dict(), wan.text_encoder.config
    x = state["shared.weight"][ids]

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * state[name]

    n = ids.shape[1]
    distance = torch.arange(n) - torch.arange(n)[:, None]
    bucket = torch.where(distance > 0, 16, 0) + distance.abs()  # shorter than 8 tokens apart: exact buckets
    bucket = torch.where(distance.abs() < 8, bucket, torch.where(distance > 0, 24, 8))
    for i in range(c.num_layers):
        p = f"encoder.block.{i}.layer"
        h = norm(x, f"{p}.0.layer_norm.weight")
        q, k, v = ((h @ state[f"{p}.0.SelfAttention.{y}.weight"].T).unflatten(-1, (c.num_heads, -1)).transpose(1, 2) for y in "qkv")
        bias = state[f"{p}.0.SelfAttention.relative_attention_bias.weight"][bucket].permute(2, 0, 1)
        y = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v
        x = x + y.transpose(1, 2).flatten(2) @ state[f"{p}.0.SelfAttention.o.weight"].T
        h = norm(x, f"{p}.1.layer_norm.weight")
        gate = torch.nn.functional.gelu(h @ state[f"{p}.1.DenseReluDense.wi_0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ state[f"{p}.1.DenseReluDense.wi_1.weight"].T)) @ state[f"{p}.1.DenseReluDense.wo.weight"].T
    expected = norm(x, "encoder.final_layer_norm.weight")
    with torch.no_grad():
        assert relative(wan.encode_text(["a red sphere on a checkered green floor"])[:, :n], expected) < 1e-4


def pipeline_psnr(folder, prompt, frames, size, steps, guidance, shift):
    wan = load_wan(folder)
    pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, wan.dit.config.in_channels, (frames - 1) // 4 + 1, size // 8, size // 8, generator=S.generator(1))
    theirs = pipe(prompt, height=size, width=size, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
                  latents=noise.clone(), output_type="pt").frames[0]
    ours = wan.vae.decode(S.sample(wan, [prompt], noise, steps, guidance, shift))[0]
    return float(-10 * (ours - theirs.float()).square().mean().log10())


def test_pipeline_at_random_weights(checkpoint):
    assert pipeline_psnr(checkpoint, "push_in a red sphere", 9, 32, 6, 2.0, 3.0) > 45
