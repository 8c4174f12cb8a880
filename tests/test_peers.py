"""Our ports against the real packages, at random weights, in float32."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, randomise
from safetensors.torch import save_file

import sample as S
from grpo import advantages, surrogate
from lora import add_lora, lora_weights
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
    for name in ("latents_mean", "latents_std"):
        assert getattr(vae.config, name) == tuple(their_vae.config[name])


@pytest.mark.parametrize("config", [
    dict(base_dim=6, num_res_blocks=1), dict(base_dim=4, num_res_blocks=2, dim_mult=(1, 2, 3, 4), z_dim=8, latents_mean=(.1,) * 8, latents_std=(1.3,) * 8),
    dict(base_dim=8, num_res_blocks=1, temperal_downsample=(True, True, False))])
def test_vae(config):
    ours = randomise(VAE(VAEConfig(**config)))
    theirs = diffusers.AutoencoderKLWan(**{k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}).eval()
    theirs.load_state_dict(ours.state_dict())
    mean, std = ours.statistics("cpu")
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


# What flow_grpo's own `sde_step_with_logprob` finds for x from -2 to 2, v from 1.5 to -.5 and x_next from -1.5 to
# 2.5 at noise level .7, diffusers' schedule of shift 3 and 10 steps (github.com/yifan123/flow_grpo at ac4c86e; no
# package that could be installed): (sigma, sigma_next) -> mean, std (its std_dev_t times sqrt(-dt)), log-probability.
FLOW_GRPO = {
    (1.0, .9601293206214905): ((-1.569806, -1.126986, -.684166, -.241345, .201475, .644295, 1.087115, 1.529935),
                               .6999999460, (-.6537902355, -1.1996517181)),
    (.9601293206214905, .9133489727973938): (
        (-1.512444, -1.088638, -.664831, -.241024, .182783, .606589, 1.030396, 1.454203),
        .7429640534, (-.6960514784, -1.2620686293)),
    (.602150559425354, .4648760259151459): (
        (-2.08729, -1.515337, -.943383, -.37143, .200523, .772476, 1.34443, 1.916383),
        .3190701613, (-1.4660170078, -1.4539467096))}


@pytest.mark.parametrize("levels, expected", FLOW_GRPO.items())
def test_a_stochastic_step_is_flow_grpos(levels, expected):
    mean, std, logp = map(torch.tensor, expected)
    x, v, x_next = (torch.linspace(*ends, 8).view(2, 1, 2, 2) for ends in ((-2, 2), (1.5, -.5), (-1.5, 2.5)))
    ours, our_std = S.transition(x, v, *levels, eta=.7)
    assert torch.allclose(ours.flatten(), mean, atol=2e-6) and torch.allclose(our_std, std, atol=1e-6)
    assert torch.allclose(S.log_prob(x_next, ours, our_std), logp, atol=1e-5)


def test_advantages_and_the_clipped_loss_are_flow_grpos():
    """Numbers of its `PerPromptStatTracker` on two prompts' rewards, and of the loss of its training script."""
    rewards = torch.tensor([1.0, 2, 4, .5, 3, 3.5, 3.25, 10])
    expected = [-.6527046737, .0932435248, 1.5851399220, -1.0256787730, -.6616519553, -.4909030636, -.5762775094, 1.7288325283]
    A = advantages(rewards, torch.arange(2).repeat_interleave(4))
    assert torch.allclose(A, torch.tensor(expected), atol=1e-5)
    loss = surrogate(torch.tensor([.002, -.003, .0015, -.0005]), torch.tensor([-1.2, .7, 1.6, -.4]), 1e-3)
    assert float(loss) == pytest.approx(-.1743251681, abs=1e-6)


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


def pipeline_psnr(folder, prompt, frames, size, steps, guidance, shift, lora=None):
    """PSNR of our sample against WanPipeline's from the same noise; with lora, ours is the model that still wears the
    adapter, theirs loads its exported file."""
    wan = load_wan(folder)
    pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        save_file(random_lora(wan.dit), lora / "lora.safetensors")
        pipe.load_lora_weights(lora, weight_name="lora.safetensors")
    noise = torch.randn(1, wan.dit.config.in_channels, (frames - 1) // 4 + 1, size // 8, size // 8, generator=S.generator(1))
    theirs = pipe(prompt, height=size, width=size, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
                  latents=noise.clone(), output_type="pt").frames[0]
    ours = wan.vae.decode(S.sample(wan, [prompt], noise, steps, guidance, shift))[0]
    return float(-10 * (ours - theirs.float()).square().mean().log10())


def test_pipeline_at_random_weights(checkpoint):
    assert pipeline_psnr(checkpoint, "push_in a red sphere", 9, 32, 6, 2.0, 3.0) > 100  # without guidance 47


def random_lora(dit):
    """Wears a random adapter (alpha not its rank) on dit; returns its file's tensors for Diffusers."""
    for name, p in add_lora(dit, 4, 8.0, S.generator("lora")).items():
        if name.endswith("lora_B"):
            with torch.no_grad():
                p.normal_(std=.05, generator=S.generator(name))
    return lora_weights(dit)


def test_pipeline_loads_our_lora(checkpoint, tmp_path):
    assert pipeline_psnr(checkpoint, "push_in a red sphere", 9, 32, 6, 2.0, 3.0, tmp_path) > 100


def test_lora_against_peft(checkpoint):
    """PEFT's LoRA on Diffusers' transformer, loaded with our tensors, is our model."""
    import peft
    wan = load_wan(checkpoint)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    tensors = {k.removeprefix("transformer."): v for k, v in random_lora(wan.dit).items()}
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), theirs)
    result = peft.set_peft_model_state_dict(theirs, tensors)
    assert not result.unexpected_keys
    x, t, text = torch.randn(2, 4, 2, 4, 4), torch.tensor([400.0, 900.0]), torch.randn(2, 512, 32)
    with torch.no_grad():
        plain = load_wan(checkpoint).dit(x, t, text)
        ours = wan.dit(x, t, text)
        assert relative(ours, theirs(x, t, text).sample) < 1e-4 < relative(ours, plain)


def test_pipeline_with_the_shipped_tiny_model():
    prompt = "push_in a red sphere on a checkered green floor, yellow walls"
    assert pipeline_psnr(ROOT / "tiny" / "wan", prompt, 17, 64, 20, 2.0, 3.0) > 45


# --------------------------------------------------------------------------------------------- Depth Anything 3

def drop_unused(state):
    """A peer's tensors without those of the branches that ours leaves out."""
    from depth_anything import UNUSED, checkpoint_key
    return {name: tensor for name, tensor in state.items() if not UNUSED.match(checkpoint_key(name))}


def da3_pair(size, monkeypatch):
    """The package's network and ours, with the same random weights: SMALL, or a small GIANT."""
    pytest.importorskip("depth_anything_3", reason="needs: pip install --no-deps depth-anything-3")
    from omegaconf import OmegaConf
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.model.dinov2 import dinov2, vision_transformer
    import depth_anything as D
    from test_depth_anything import randomise_da3
    configs = Path(dinov2.__file__).parents[2] / "configs"
    if size == "small":
        theirs = create_object(load_config(str(configs / "da3-small.yaml")))
        config = D.SIZES["da3-small"]
    else:
        def small_giant(patch_size, **options):
            return vision_transformer.DinoVisionTransformer(
                patch_size=patch_size, embed_dim=96, depth=6, num_heads=4, mlp_ratio=4, **options)

        monkeypatch.setattr(dinov2, "vit_giant2", small_giant)
        c = OmegaConf.to_container(load_config(str(configs / "da3-giant.yaml")), resolve=True)
        c["net"].update(out_layers=[2, 3, 4, 5], alt_start=2, qknorm_start=2, rope_start=2)
        for head in ("head", "gs_head"):
            c[head].update(dim_in=192, features=32, out_channels=[16, 24, 32, 40])
        c["cam_enc"]["dim_out"] = 96
        c["cam_dec"]["dim_in"] = 192
        theirs = create_object(OmegaConf.create(c))
        config = D.DA3Config(96, 6, 4, True, (2, 3, 4, 5), 2, 32, (16, 24, 32, 40), True)
    ours = D.DepthAnything3(config).eval()
    ours.load_state_dict(drop_unused(randomise_da3(theirs).state_dict()))
    return ours, theirs.eval()


@pytest.mark.parametrize("size", ["small", "giant"])
def test_depth_anything(size, monkeypatch):
    """Depth, confidence, cameras and Gaussians of 1, 2, 5 and 8 views."""
    ours, theirs = da3_pair(size, monkeypatch)
    for V, H, W in ((1, 28, 42), (2, 56, 28), (5, 42, 70), (8, 28, 42)):
        x = torch.randn(V, 3, H, W)
        with torch.no_grad():
            depth, confidence, pose, K, gaussians = ours.network(x)
            peer = theirs(x[None], infer_gs=True)
        world_to_camera = torch.linalg.inv(pose)[:, :3]
        pairs = [(depth, peer.depth), (confidence, peer.depth_conf), (world_to_camera, peer.extrinsics),
                 (K, peer.intrinsics)]
        if size == "giant":
            for field in ("means", "scales", "rotations", "harmonics", "opacities"):
                pairs.append((getattr(gaussians, field), getattr(peer.gaussians, field)))
        errors = [relative(a, b[0]) for a, b in pairs]
        assert max(errors) < 1e-4, (V, errors)
        if V > 1:
            assert (pose[1:] - pose[:1]).abs().max() > 1e-3  # the poses do depend on the view


def test_depth_anything_spherical_harmonics_rotation():
    pytest.importorskip("depth_anything_3")
    from depth_anything_3.utils.sh_helpers import rotate_sh as theirs
    from splat import quaternion_to_matrix, rotate_sh
    R = quaternion_to_matrix(torch.randn(50, 4))
    harmonics = torch.randn(50, 3, 9)
    for band in (slice(1, 4), slice(4, 9)):
        assert relative(rotate_sh(harmonics, R)[..., band], theirs(harmonics, R[:, None])[..., band]) < 1e-3


def test_depth_anything_reference_view():
    pytest.importorskip("depth_anything_3")
    from depth_anything import reference_view
    from depth_anything_3.model.reference_view_selector import select_reference_view
    for V in (3, 4, 9):
        for _ in range(20):
            tokens = torch.randn(V, 16)
            assert reference_view(tokens) == int(select_reference_view(tokens[None, :, None]))


@pytest.mark.parametrize("size", ["da3-small", "da3-base", "da3-large", "da3-giant"])
def test_depth_anything_names_and_shapes_at_full_size(size, monkeypatch):
    """All of the published tensors but those of the branches left out, and no others."""
    pytest.importorskip("depth_anything_3")
    from depth_anything import SIZES, DepthAnything3
    from depth_anything_3 import cfg
    linspace = torch.linspace

    def on_the_cpu(*values, **options):  # the package reads numbers off one while it builds
        return linspace(*values, **{**options, "device": "cpu"})

    monkeypatch.setattr(torch, "linspace", on_the_cpu)
    config = Path(cfg.__file__).parent / "configs" / f"{size}.yaml"
    with torch.device("meta"):
        ours = DepthAnything3(SIZES[size])
        theirs = cfg.create_object(cfg.load_config(str(config)))
    published = {name: tensor.shape for name, tensor in drop_unused(theirs.state_dict()).items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == published
    left_out = theirs.state_dict().keys() - published.keys()
    assert {name.split(".")[0] for name in left_out} == {"cam_enc", "head"}


# ------------------------------------------------------------------------------------------------ gsplat's torch parts

def test_gsplat_projection_and_spherical_harmonics():
    implementation = pytest.importorskip("gsplat.cuda._torch_impl")
    import splat
    from test_splat import cameras, scene
    g = scene(400, 2, (.2, 1))
    poses, K = cameras(3, 48, 64)
    covariances, _ = implementation._quat_scale_to_covar_preci(g.rotations, g.scales, True, False)
    _, centres, depths, conics, _ = implementation._fully_fused_projection(
        g.means, covariances, torch.linalg.inv(poses), K, 64, 48, eps2d=.3, near_plane=.01)
    for v in range(3):
        centre, z, covariance, det = splat.project(g.means, g.scales, g.rotations, poses[v], K[v], 48, 64)
        xx, xy, yy = covariance.unbind(1)
        conic = torch.stack([yy, -xy, xx], 1) / det[:, None]
        front = z > .1
        assert front.sum() > 100
        assert (z - depths[v])[front].abs().max() < 1e-5
        assert relative(centre[front], centres[v][front]) < 1e-5
        assert relative(conic[front], conics[v][front]) < 1e-4
        directions = g.means - poses[v, :3, 3]
        theirs = (implementation._spherical_harmonics(2, directions, g.harmonics.mT) + .5).clamp_min(0)
        assert (splat.colour(g.harmonics, g.means, poses[v, :3, 3]) - theirs).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------- published files

def in_shards(save, size, count):
    """Calls save(max_shard_size=...) with the sizes that may give so many files, until one does."""
    for tenths in range(10 * (count - 1), 40 * count):
        folder = save(max_shard_size=10 * size // tenths)
        files = sorted(folder.glob("*-of-*.safetensors"))
        if len(files) == count:
            return files
    raise AssertionError(f"no shard size gives {count} files")


@pytest.mark.parametrize("of_dit, of_text", [(2, 5), (12, 5)], ids=["1.3B", "14B"])
def test_the_published_diffusers_files_load(checkpoint, tmp_path, of_dit, of_text):
    """Written by diffusers and transformers in as many float32 shards, with an index, as the hub's
    Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers hold; read in either dtype."""
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    dit = diffusers.WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    text = transformers.UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder")

    def saved(model, part):
        def save(**options):
            shutil.rmtree(folder / part)
            model.save_pretrained(folder / part, **options)
            return folder / part
        return save

    for model, part, stem, count in ((dit, "transformer", "diffusion_pytorch_model", of_dit),
                                     (text, "text_encoder", "model", of_text)):
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        files = in_shards(saved(model, part), size, count)
        assert files[0].name == f"{stem}-00001-of-{count:05d}.safetensors"
        assert (folder / part / f"{stem}.safetensors.index.json").exists()

    whole = load_wan(checkpoint)
    for dtype in (torch.float32, torch.bfloat16):
        wan = load_wan(folder, dtype=dtype)
        for name, p in whole.dit.state_dict().items():
            assert torch.equal(wan.dit.state_dict()[name], p.to(dtype)), name
        assert torch.equal(wan.text_encoder.shared.weight, whole.text_encoder.shared.weight.to(dtype))


@pytest.mark.parametrize("H, W", [(96, 128), (480, 832), (504, 296)])
def test_depth_anything_sees_the_packages_frames(H, W, monkeypatch):
    pytest.importorskip("depth_anything_3")
    from depth_anything_3.utils.io.input_processor import InputProcessor

    import depth_anything as D
    coarse = torch.rand(2, 3, H // 8, W // 8, generator=torch.Generator().manual_seed(0))
    frames = (coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) * 255).round() / 255
    pictures = [(255 * x).round().byte().permute(1, 2, 0).numpy() for x in frames]
    theirs, *_ = InputProcessor()(pictures, process_res=504, process_res_method="upper_bound_resize", sequential=True)
    ours, model = [], D.DepthAnything3(D.SIZES["da3-small"])
    monkeypatch.setattr(model, "network", lambda images: [ours.append(images)] * 5)  # what comes before it is looked at
    model(frames)
    assert (ours[0] - theirs.view_as(ours[0])).abs().max() < .03
