"""What one CUDA GPU can show and a CPU cannot: make test-gpu. Its figures go to results/gpu.json."""

import gc
import math
import os
import statistics
import subprocess
import sys
from datetime import date

import pytest
import torch

if not torch.cuda.is_available():  # before anything slow is imported
    pytest.skip("needs a CUDA GPU; on a machine that has one: make test-gpu", allow_module_level=True)
if "PYTEST_XDIST_WORKER" in os.environ:
    pytest.skip("its times count, so nothing may run beside it: make test-gpu", allow_module_level=True)

import diffusers  # noqa: E402
import peft  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from conftest import ROOT, randomise  # noqa: E402
from runs import largest_difference, metrics, run_jobs, short_run, weights  # noqa: E402
from test_peers import relative  # noqa: E402
from test_rehearse import free_port  # noqa: E402
from test_splat import FIELDS, cameras, scene  # noqa: E402

import rehearse  # noqa: E402
import splat  # noqa: E402
import train  # noqa: E402
from bench import elapsed, print_head, print_row  # noqa: E402
from estimate import H200, JUDGES, estimate  # noqa: E402
from fast import trim_text  # noqa: E402
from lora import add_lora  # noqa: E402
from model import DIT_SIZES, VAE, DiT, DiTConfig, VAEConfig  # noqa: E402
from noise_warp import camera_path  # noqa: E402
from policy import Policy, shard  # noqa: E402
from rewards import TERMS, Rewards  # noqa: E402
from run import Processes  # noqa: E402
from sample import generator  # noqa: E402
from tiny.world import random_scene, render  # noqa: E402
from weights import read_json, write_json  # noqa: E402

DEVICE = "cuda"
BACKEND = "cpu:gloo,cuda:nccl"
WITHOUT_SPLAT = ["--meta", "0", "--recon", "0"]  # the other two rewards need no gsplat


@pytest.fixture(autouse=True)
def asked_without_a_context(monkeypatch):
    """forked.py's parent may ask for a GPU before it forks; only NVML's answer leaves the children theirs."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@pytest.fixture
def exact():
    """Float32 products and convolutions without TF32, as long as a test runs."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield
    products.allow_tf32, convolutions.allow_tf32 = before


@pytest.fixture(scope="module")
def gsplat():
    """Its kernels, which it compiles when they are first asked for: minutes, once a machine."""
    pytest.importorskip("gsplat", reason="needs gsplat")
    from gsplat.cuda._backend import _C
    if _C is None:
        pytest.skip("gsplat has no kernels: it compiles them with nvcc, of a CUDA toolkit like torch's")


@pytest.fixture(scope="module")
def arguments(checkpoint, twins):
    return [*short_run(checkpoint, twins), "--device", DEVICE]


@pytest.fixture(scope="module")
def record():
    """record(name=value) adds figures to results/gpu.json."""
    figures = dict(card=torch.cuda.get_device_name(), torch=torch.__version__, date=date.today().isoformat())

    def add(**found):
        figures.update(found)
        write_json(ROOT / "results" / "gpu.json", figures)

    return add


# ------------------------------------------------------------------------------------------ against diffusers

DITS = [  # heads of 128 channels as Wan's, and of a size that few kernels are made for
    dict(num_layers=4, num_attention_heads=2, attention_head_dim=128, ffn_dim=320, text_dim=48),
    dict(num_layers=3, num_attention_heads=2, attention_head_dim=24, ffn_dim=56, text_dim=20)]
DTYPES = [torch.float32, torch.bfloat16]


def dit_pair(config, dtype, folder):
    """Our DiT and diffusers', which reads the same weights in the dtype from disk: some stay float32."""
    ours = randomise(DiT(DiTConfig(**config)))
    theirs = diffusers.WanTransformer3DModel(**config)
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(folder)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    return ours.to(DEVICE, dtype), theirs.to(DEVICE).eval()


def dit_inputs(config, dtype, tokens=25):
    """x, t, and a text of 80 tokens, all but so many padding."""
    draw = generator("inputs")
    x = torch.randn(2, 16, 3, 6, 10, generator=draw)
    text = torch.randn(2, 80, config["text_dim"], generator=draw)
    text[:, tokens:] = 0
    return x.to(DEVICE), torch.tensor([900.0, 312.25], device=DEVICE), text.to(DEVICE, dtype)


def both_outputs(ours, theirs, x, t, text):
    """Ours of the text with its padding as one token, as sampling and training run it."""
    found = ours(x, t, *trim_text(text))
    expected = theirs(x.to(text.dtype), t, text, return_dict=False)[0]
    return found, expected.float()


@torch.no_grad()
def randomise_lora(trained):
    """Both matrices of every pair, so that both have a gradient."""
    for name, p in trained.items():
        p.copy_(torch.randn(p.shape, generator=generator(name)) * .1)


@pytest.mark.parametrize("config", DITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dit_is_diffusers(config, dtype, exact, tmp_path):
    """To 1e-4 in float32 and to 2 % in bfloat16, in which each is .7 % away from float32 on a CPU. Of
    prompts of 1, 25, 32 and 63 tokens: kernels of attention look at keys by 8, 32, 64 or 128."""
    pair = dit_pair(config, dtype, tmp_path)
    for tokens in (1, 25, 32, 63):
        with torch.no_grad():
            found, expected = both_outputs(*pair, *dit_inputs(config, dtype, tokens))
        assert relative(found, expected) < {torch.float32: 1e-4, torch.bfloat16: .02}[dtype], tokens


@pytest.mark.parametrize("config", DITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_lora_are_pefts(config, dtype, exact, tmp_path):
    """Of every matrix, on diffusers' transformer with PEFT's LoRA: to 1e-3 in float32, to 6 % in bfloat16, in
    which both are 2 % away from float32 on a CPU."""
    ours, theirs = dit_pair(config, dtype, tmp_path)
    trained = add_lora(ours, 4, 8.0)
    randomise_lora(trained)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets), theirs)
    tensors = {f"{name}.weight": p.detach() for name, p in trained.items()}
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys

    x, t, text = dit_inputs(config, dtype)
    direction = torch.randn(x.shape, generator=generator("direction")).to(DEVICE)
    for output in both_outputs(ours, theirs, x, t, text):
        (output * direction).sum().backward()
    expected = {name.replace(".default.weight", ""): p.grad.float()
                for name, p in theirs.named_parameters() if "lora_" in name}
    assert expected.keys() == trained.keys()
    errors = {name: relative(p.grad, expected[name]) for name, p in trained.items()}
    assert max(errors.values()) < {torch.float32: 1e-3, torch.bfloat16: .06}[dtype], errors


@pytest.mark.parametrize("config", [dict(base_dim=8, num_res_blocks=1), dict(base_dim=16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_vae_is_diffusers(config, dtype, exact):
    """Encoded and decoded: to 1e-3 in float32, and to 6 % in bfloat16, which training does not use."""
    ours = randomise(VAE(VAEConfig(**config))).to(DEVICE)
    theirs = diffusers.AutoencoderKLWan(**config).to(DEVICE).eval()
    theirs.load_state_dict(ours.state_dict())
    ours.to(dtype)
    theirs.to(dtype)
    mean, std = ours.statistics(DEVICE)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: .06}[dtype]
    for frames, height, width in ((1, 16, 24), (9, 32, 48)):
        video = torch.rand(1, frames, 3, height, width, generator=generator(frames)).to(DEVICE)
        pixels = (video.transpose(1, 2) * 2 - 1).to(dtype)
        latents = theirs.encode(pixels).latent_dist.mode().float()
        assert relative(ours.encode(video) * std + mean, latents) < tolerance
        z = torch.randn(latents.shape, generator=generator("z", frames)).to(DEVICE) * .5
        decoded = theirs.decode(z.to(dtype)).sample.float().transpose(1, 2).clamp(-1, 1)
        assert relative(ours.decode((z - mean) / std) * 2 - 1, decoded) < tolerance


# ----------------------------------------------------------------------------------------- gsplat and rewards

def on_device(gaussians):
    return splat.Gaussians(**{field: getattr(gaussians, field).to(DEVICE) for field in FIELDS})


@torch.no_grad()
def test_gsplat_draws_what_the_cpu_rasteriser_does(gsplat):
    """Colour, depth times alpha, and alpha of 500 Gaussians: to 1e-3 on the whole. A pixel may differ by 2 %,
    where a Gaussian is just above a threshold here and just below it there."""
    g, (poses, K) = scene(500), cameras(3, 48, 64)
    rgb, depth, alpha = splat.render(g, poses, K, 48, 64)
    assert alpha.mean() > .1
    found = splat.render(on_device(g), poses.to(DEVICE), K.to(DEVICE), 48, 64)
    found_rgb, found_depth, found_alpha = (picture.cpu() for picture in found)
    pairs = [(found_rgb, rgb), (found_depth * found_alpha, depth * alpha), (found_alpha, alpha)]
    for ours, expected in pairs:
        assert ours.shape == expected.shape
        assert (ours - expected).abs().mean() < 1e-3
        assert (ours - expected).abs().max() < .02 * expected.abs().max()


@pytest.fixture(scope="module")
def clips():
    """Videos of the tiny world, their prompts and paths."""
    scenes = [random_scene("gpu", "static", i) for i in range(4)]
    videos = [render(scene)["video"] for scene in scenes]
    return videos, [scene.caption for scene in scenes], [camera_path(scene.motions, 17) for scene in scenes]


def test_rewards_are_the_cpus(clips, gsplat, exact):
    """To .03 of S_meta, .01 of S_recon, .06 of S_traj and .02 of R_gen, three times what bfloat16 changes
    on a CPU: Depth Anything's transformer runs in it on a GPU, and so do critic and preference model."""
    expected, found = Rewards(views=5)(*clips), Rewards(views=5, device=DEVICE)(*clips)
    for name, tolerance in dict(meta=.03, recon=.01, traj=.06, general=.02).items():
        difference = (found[name] - expected[name]).abs().max()
        print(f"{TERMS[name].label}: {difference:.1e} from the CPU's")
        assert found[name].device.type == "cpu"
        assert difference < tolerance


def test_a_failing_critic_is_masked_and_counted(clips, gsplat):
    """It costs its own term, and the total; the others' stay what they are."""
    rewards = Rewards(views=5, device=DEVICE)
    expected = rewards.terms(*clips)

    def failing(images):
        assert images.shape == (2, 3, 64, 64)
        raise ValueError("no digit")

    rewards.critic = failing
    found = rewards.terms(*clips)
    assert found["meta"].isnan().all() and found["total"].isnan().all()
    for name in ("recon", "traj", "general"):
        assert torch.allclose(found[name], expected[name], atol=1e-3)
    assert rewards.failures == dict(meta=4)
    assert rewards.reasons == dict(meta="ValueError: no digit")


def test_full_memory_of_the_card_is_not_masked(clips):
    rewards = Rewards(device=DEVICE)
    rewards.preference = lambda frames, prompts: torch.empty(2 ** 50, device=DEVICE)
    with pytest.raises(RuntimeError, match="memory"):
        rewards.terms(*clips, dynamic=True)
    assert not rewards.failures


# --------------------------------------------------------------------------------------------------- training

def one_step(policy):
    """Rolls out the first group and trains on it. -> statistics of its stochastic steps, the gradient's norm."""
    c = policy.c
    chosen = [(index, "push_in a red box") for index in range(c.groups)]
    windows = [train.step_window(c, 0, False, index) for index, _ in chosen]
    (batch, _, _), = train.roll_out_groups(policy, 0, False, chosen, windows, [(0, range(c.members))])
    batch.advantages = torch.tensor([1.0, -1.0])
    notes = []
    for sde_step in batch.sde_steps:
        loss, note = train.policy_loss(policy, batch, sde_step)
        loss.backward()
        notes.append(note)
    policy.collect_gradients()
    norm = policy.sum_gradients()
    policy.step(c.lr, norm)
    return notes, norm


@pytest.mark.parametrize("options", [[], ["--checkpointing"], ["--checkpointing", "--compile"]], ids=" ".join)
def test_the_ratio_is_one_before_the_first_update(options, arguments, tmp_path):
    """In bfloat16, with a LoRA that is not zero: the rollout's forward passes, without gradients, and the
    update's agree to what train.py allows."""
    given = ["--dtype", "bfloat16", "--guidance", "2", "--window", "2", "--runs", str(tmp_path)]
    c = train.parse_arguments([*arguments, *given, *options])
    policy = Policy(c, Processes(DEVICE))
    randomise_lora(policy.trained)
    notes, norm = one_step(policy)
    print(f"means move by {max(note['drift'] for note in notes):.1e} standard deviations")
    assert len(notes) == 2
    train.stop_if_drifted(c, notes)
    assert [note["ratio"] for note in notes] == pytest.approx([1, 1], abs=1e-3)
    assert 0 < norm < math.inf


class Alone(Processes):
    """A single process that sums over its group all the same."""

    def add(self, tensors):
        self.world = 2  # as `Processes.add` asks for; the group has one
        super().add(tensors)
        self.world = 1


def flat(trained):
    return torch.cat([p.detach().flatten().cpu() for p in trained.values()])


def with_a_group(rank, port, arguments, file):
    """A process group of one rank -> {way: (the gradient's norm, how a step moves the weights)} in a file."""
    dist.init_process_group(BACKEND, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=1)
    found = {}
    for way, kind in (("plain", Processes), ("ddp", Alone), ("fsdp", Processes)):
        policy = Policy(train.parse_arguments(arguments), kind(DEVICE))
        randomise_lora(policy.trained)
        before = flat(policy.trained)
        if way == "fsdp":
            shard(policy.wan.dit, policy.processes)
        _, norm = one_step(policy)
        found[way] = norm, flat(policy.trained) - before
    torch.save(found, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_one_rank(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    given = [*arguments, "--dtype", "bfloat16", "--guidance", "2", "--runs", str(folder)]
    mp.spawn(with_a_group, (free_port(), given, folder / "found.pt"), nprocs=1)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_step_over_nccl_is_the_step_without(way, of_one_rank):
    """One process alone makes no group, whatever --parallel says, so one of a single rank is made here.
    ddp: the float64 sums go through its all-reduce. fsdp: FSDP2 wraps the blocks, frees their weights and
    restores them, and gathers nothing, as its rank is alone. What ranks say to each other is left to the test
    of two.

    The gradient's norm agrees to 1e-3. Adam's first step moves every weight by the learning rate, up or down:
    less than 1 % of them may go the other way (a distance of .2), as a backward pass may sum in any order.
    """
    norm, moved = of_one_rank["plain"]
    found_norm, found = of_one_rank[way]
    assert found_norm == pytest.approx(norm, rel=1e-3)
    assert 0 < norm < math.inf
    assert relative(found, moved) < .2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two CUDA GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_make_the_run_of_one(parallel, arguments, tmp_path):
    """Over NCCL, in float32: rewards of the first step, and weights after it to a tenth of Adam's step."""
    given = [*arguments, *WITHOUT_SPLAT, "--dtype", "float32", "--parallel", parallel]
    given += ["--runs", str(tmp_path), "--total-steps", "1"]
    codes, err = run_jobs([dict(args=[*given, "--name", str(world)], world=world) for world in (1, 2)])
    assert codes == [[0], [0, 0]], err[-3000:]
    (expected,), (found,) = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for name in ("traj", "general", "total", "motion"):
        assert found[name] == pytest.approx(expected[name], abs=1e-3)
    assert largest_difference(weights(tmp_path / "2"), weights(tmp_path / "1")) < 1e-3


def test_offloaded_judges_score_alike_and_are_on_the_cpu_after(arguments, gsplat, tmp_path, monkeypatch):
    """A step of training with and without --offload, on the same videos: rewards to 1e-3."""
    made, rewards_for = [], train.rewards_for

    def kept(*given):
        made.append(rewards_for(*given))
        return made[-1]

    monkeypatch.setattr(train, "rewards_for", kept)
    places = {}
    for option in ("--offload", "--no-offload"):
        given = ["--runs", str(tmp_path), "--name", option[2:], "--total-steps", "1", option]
        assert train.main([*arguments, *given]) == 0
        judges = made[-1]
        modules = [judges.depth_anything, judges.critic.model, judges.preference.model, judges.lpips]
        places[option] = {p.device.type for module in modules for p in module.parameters()}
    assert places == {"--offload": {"cpu"}, "--no-offload": {DEVICE}}
    (found,), (expected,) = metrics(tmp_path / "offload"), metrics(tmp_path / "no-offload")
    for name in (*TERMS, "total", "motion"):
        assert found[name] == pytest.approx(expected[name], abs=1e-3)
    assert found["masked"] == 0


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train
step_window = train.step_window
def killed(c, step, dynamic, index):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step_window(c, step, dynamic, index)
train.step_window = killed
train.main(sys.argv[2:])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(arguments, tmp_path):
    """SIGKILL after two of four steps, in float32, then started again: weights, their average and Adam's
    state as those of an uninterrupted run. Not the same bits, as train.py has no option for deterministic
    kernels (the difference is printed), but to 1e-3: on a CPU, weights that are off by a millionth when it
    goes on end 5e-7 away, and a lost average or a lost state of Adam's more than 1e-2."""
    given = [*arguments, *WITHOUT_SPLAT, "--dtype", "float32", "--runs", str(tmp_path), "--total-steps", "4"]
    again = [*given, "--name", "killed"]
    command = [sys.executable, "-c", KILLED, str(ROOT), *again]
    died = subprocess.run(command, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr[-3000:]
    assert len(metrics(tmp_path / "killed")) == 2
    codes, err = run_jobs([dict(args=[*given, "--name", "whole"]), dict(args=again)])
    assert codes == [[0], [0]], err[-3000:]
    assert [row["step"] for row in metrics(tmp_path / "killed")] == [0, 1, 2, 3]
    difference = largest_difference(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    print(f"killed and resumed: {difference:.1e} from an uninterrupted run")
    assert difference < 1e-3


# ------------------------------------------------------------------------------------------- memory and speed

def test_the_small_presets_step_takes_the_memory_that_the_trace_says(record):
    """A batch of the preset at its full size, random weights, without judges. The peak of the step to 10 %;
    that of each phase is written down beside the trace's."""
    c = train.parse_arguments(["--preset", "small", "--device", DEVICE, "--dtype", "bfloat16"])
    parts, _ = estimate(c, 1, H200)
    resident = [size for part, size in parts.items() if part not in (*JUDGES, "peak") and "work" not in part]
    needed = sum(resident) + max(parts[f"work: {name}"] for name in ("update", "rollout", "decoding"))
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if 1.1 * needed > free:
        pytest.skip(f"the small preset needs {1.1 * needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")

    traced = {phase: peak for phase, (peak, _) in rehearse.rehearse(c, 1).items()}
    measured, before = {}, torch.cuda.memory_allocated()

    def lap(phase):
        measured[phase] = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()

    torch.cuda.reset_peak_memory_stats()
    with torch.device(DEVICE):
        wan = rehearse.random_wan(DIT_SIZES["1.3B"], VAEConfig(), torch.bfloat16)
    rehearse.one_batch(Policy(c, Processes(DEVICE), wan), lap)

    # written down whatever comes out
    rows = {"step": (max(measured.values()), max(traced.values()))}
    rows |= {phase: (measured[phase], traced[phase]) for phase in traced}
    print_head("small preset, one batch", "GB measured", "GB traced", "ratio")
    figures = {}
    for phase, (found, expected) in rows.items():
        gb = [round(size / 1e9, 2) for size in (found, expected)]
        figures[phase] = dict(zip(("measured_gb", "traced_gb", "ratio"), (*gb, round(found / expected, 3))))
        print_row(phase, *figures[phase].values())
    record(memory_of_small=figures)
    assert rows["step"][0] == pytest.approx(rows["step"][1], rel=.1)


def dit_calls():
    """Wan2.1-1.3B's forward pass in bfloat16, a video of 81 frames of 480x832."""
    config = DIT_SIZES["1.3B"]
    with torch.device(DEVICE):
        ours, theirs = DiT(config), diffusers.WanTransformer3DModel(**vars(config))
        x, t = torch.randn(1, 16, 21, 60, 104), torch.tensor([900.0])
        text = torch.randn(1, 512, config.text_dim, dtype=torch.bfloat16)
    ours.to(torch.bfloat16)
    theirs.load_state_dict(ours.state_dict())
    theirs.to(torch.bfloat16)
    return lambda: ours(x, t, text), lambda: theirs(x.bfloat16(), t, text)


def vae_calls():
    """Wan2.1's VAE decodes 17 frames of 480x832 in float32, as training does."""
    with torch.device(DEVICE):
        ours, theirs = VAE(VAEConfig()), diffusers.AutoencoderKLWan()
        z = torch.randn(1, 16, 5, 60, 104)
    theirs.load_state_dict(ours.state_dict())
    return lambda: ours.decode(z), lambda: theirs.decode(z)


def splat_calls():
    """17 views of 64x64 of a reconstruction of 9: the CPU's rasteriser, and gsplat."""
    clip = render(random_scene("gpu", "static", 0))["video"]
    rec = Rewards(device=DEVICE).depth_anything(clip, 9)
    views = [*range(9), *range(8)]
    g, poses, K = rec.gaussians, rec.camera_to_world[views], rec.intrinsics[views]

    on_cpu = splat.Gaussians(**{field: getattr(g, field).cpu() for field in FIELDS}), poses.cpu(), K.cpu()
    return lambda: splat.render(*on_cpu, 64, 64), lambda: splat.render(g, poses, K, 64, 64)


@pytest.mark.parametrize("part, calls, peer", [
    ("DiT forward", dit_calls, "diffusers"), ("VAE decode", vae_calls, "diffusers"),
    ("splat on the CPU", splat_calls, "gsplat")])
@torch.no_grad()
def test_speed(part, calls, peer, record, request):
    """Medians of five calls that take turns, ours / theirs: no time is asked for, but that they are written
    down."""
    if peer == "gsplat":
        request.getfixturevalue("gsplat")
    gc.collect()
    torch.cuda.empty_cache()

    def synchronised(call):
        def whole():
            call()
            torch.cuda.synchronize()
        return whole

    ours, theirs = (synchronised(call) for call in calls())
    ours()
    theirs()
    turns = [(elapsed(ours), elapsed(theirs)) for _ in range(5)]
    ours_ms, theirs_ms = (round(statistics.median(times) * 1e3, 2) for times in zip(*turns))
    print_head(part, "ours", peer, "ratio")
    ratio = round(ours_ms / theirs_ms, 3)
    print_row(calls.__doc__, f"{ours_ms} ms", f"{theirs_ms} ms", ratio)
    figures = dict(what=calls.__doc__, ours_ms=ours_ms, theirs_ms=theirs_ms, ratio=ratio)
    record(**{f"{part} against {peer}": figures})
    written = read_json(ROOT / "results" / "gpu.json")
    assert written[f"{part} against {peer}"] == figures
