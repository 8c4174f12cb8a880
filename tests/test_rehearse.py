import dataclasses
import json
import os
import socket
from itertools import accumulate
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp

import bench
import dress
import rehearse
import sample
import train
from depth_anything import DA3Config, DepthAnything3
from lora import add_lora
from model import DiT, DiTConfig, VAEConfig
from policy import Policy
from run import Processes

VAE_CONFIG = VAEConfig(base_dim=8)
SIZES = {  # the DiT, and options of the videos
    "long": (DiTConfig(2, 64, 512, 4, text_dim=64), "--frames 33 --height 64 --width 64 --members 2 --batch 1"),
    "wide": (DiTConfig(8, 64, 2048, 2, text_dim=64), "--frames 5 --height 64 --width 96 --members 4 --batch 2"),
    "deep": (DiTConfig(4, 64, 1024, 6, text_dim=64), "--frames 9 --height 64 --width 64 --members 4 --batch 2"),
}


def config_of(size, *options):
    return train.parse_arguments(["--preset", "small", "--groups", "1", "--device", "cpu", "--steps", "4",
                                  "--noisy-steps", "3", *SIZES[size][1].split(), *options])


# ----------------------------------------------------------------------------------------- against the allocator

def steps_of(size, c, processes, lap):
    wan = rehearse.random_wan(SIZES[size][0], VAE_CONFIG, torch.float32)
    rehearse.one_batch(Policy(c, processes, wan), lap)


def traced(size, c, world):
    """-> {phase: peak bytes beyond what is there when it begins}."""
    trace, processes = rehearse.Trace(), rehearse.Rehearsed(world)
    found, before = {}, 0

    def lap(phase):
        nonlocal before
        found[phase] = trace.lap()[0] - before
        before = trace.now

    try:
        with rehearse.without_data(trace):
            steps_of(size, c, processes, lap)
    finally:
        processes.close()
    return found


def allocated(size, c):
    """The same of a true run: what PyTorch's CPU allocator hands out."""
    found, profile = {}, None

    def lap(phase):
        nonlocal profile
        if profile:
            profile.__exit__(None, None, None)
            events = profile.profiler.kineto_results.events()
            changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
            found[phase] = max(accumulate((change for _, change in changes), initial=0))
        profile = torch.profiler.profile(profile_memory=True)
        profile.__enter__()

    processes = Processes("cpu")
    try:
        with (patch.object(train, "initial_noise", rehearse.no_noise),
              patch.object(sample, "initial_noise", rehearse.no_noise)):
            steps_of(size, c, processes, lap)
    finally:
        profile.__exit__(None, None, None)
        processes.close()
    return found


PARALLEL = {"one process": (1, []), "ddp": (2, ["--parallel", "ddp"]), "fsdp": (2, ["--parallel", "fsdp"])}
CASES = [(size, parallel) for parallel in PARALLEL for size in SIZES]


def one_rank(rank, ports, folder):
    torch.set_num_threads(1)
    for (size, parallel), port in zip(CASES, ports, strict=True):
        world, options = PARALLEL[parallel]
        if rank < world:
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            found = allocated(size, config_of(size, *options))
            if rank == 0:
                (folder / f"{size} {parallel}.json").write_text(json.dumps(found))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def true_runs(tmp_path_factory):
    """Every case in two processes, one after the other -> {case: {phase: bytes}}."""
    folder = tmp_path_factory.mktemp("true")
    mp.spawn(one_rank, ([free_port() for _ in CASES], folder), nprocs=2)
    return {(size, parallel): json.loads((folder / f"{size} {parallel}.json").read_text()) for size, parallel in CASES}


@pytest.mark.parametrize("size, parallel", CASES)
def test_the_trace_is_what_the_allocator_hands_out(size, parallel, true_runs):
    """Phase by phase, of the first process, replicated and sharded. What the communication in flight holds (all
    LoRA gradients of an all-reduce, one block's weights of a gather) is there or not, as the processes' threads are
    timed."""
    world, options = PARALLEL[parallel]
    c = config_of(size, *options)
    true, found = true_runs[size, parallel], traced(size, c, world)
    dit = DiT(SIZES[size][0])
    block = sum(p.numel() * 4 for p in dit.blocks[0].parameters())
    lora = sum(p.numel() * 4 for p in add_lora(dit, c.lora_rank, c.lora_alpha).values())
    in_flight = {"one process": [0], "ddp": [0, lora], "fsdp": [0, lora, block, lora + block]}[parallel]
    for phase in ("rollout, decoding", "update", "optimiser step", "evaluation of 2 steps"):
        possible = [found[phase] + size for size in in_flight]
        assert any(true[phase] == pytest.approx(size, rel=.1) for size in possible), (phase, found, true)


# ---------------------------------------------------------------------------------------------------- mistakes

SMALL = DiTConfig(2, 64, 256, 2, text_dim=64)


def on_the_cpu(wan):
    block = wan.dit.blocks[1]
    block.scale_shift_table = torch.nn.Parameter(torch.zeros_like(block.scale_shift_table, device="cpu"))


def in_float32(wan):
    layer = wan.dit.blocks[1].ffn.net[0].proj
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.float32))


def test_a_planted_mistake_is_caught():
    """Every forward pass on a GPU that is not there: as it is, with a tensor on the CPU, with one of another dtype."""
    c = config_of("wide")
    assert rehearse.rehearse_devices(c, SMALL) == (5, 3, 64, 64)
    with pytest.raises(Exception, match="device"):
        rehearse.rehearse_devices(c, SMALL, on_the_cpu)
    with pytest.raises(Exception, match="dtype"):
        rehearse.rehearse_devices(c, SMALL, in_float32)


def test_a_planted_mistake_among_the_judges_is_caught():
    """On a GPU that the CPU plays: every judge scores; with one weight on the CPU, or of another dtype, it raises."""
    assert all(-1 <= score <= 1 for score in rehearse.rehearse_judges().values())

    def critic_on_the_cpu(judges):
        layer = next(module for module in judges.critic.model.modules() if isinstance(module, torch.nn.Linear))
        layer._parameters["weight"] = torch.zeros(layer.weight.shape, dtype=torch.bfloat16)

    def camera_on_the_cpu(judges):
        network = judges.depth_anything.network
        judges.depth_anything.network = lambda images: [out.cpu() if out is not None and isinstance(out, torch.Tensor)
                                                        else out for out in network(images)]

    def preference_in_float32(judges):
        layer = judges.preference.model.model.language_model.layers[0].mlp.gate_proj
        layer._parameters["weight"] = torch.zeros(layer.weight.shape, device="cuda:0")

    for change, message in ((critic_on_the_cpu, "device"), (camera_on_the_cpu, "device"),
                            (preference_in_float32, "dtype")):
        with pytest.raises(RuntimeError, match=message):
            rehearse.rehearse_judges(change)


def test_what_cannot_work_is_one_sentence_before_any_work(capsys):
    for options, message in (
        (["large", "--gpus", "12"], "--shard-size"),
        (["node", "--gpus", "0"], "--gpus must be at least 1"),
        (["gpu", "--with", "--no-offload"], "the weights of gpu alone take 3"),
        (["small", "--with", "--batch", "3"], "--batch"),
    ):
        assert bench.main(["--rehearse", *options]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out, "nothing was traced"


def test_the_command_traces_a_step(capsys, monkeypatch):
    """Three of the 1.3B model's layers, which are all alike, of a video that is as small as can be."""
    whole = rehearse.released_config
    monkeypatch.setattr(rehearse, "released_config", lambda model: dataclasses.replace(whole(model), num_layers=3))
    small = "--frames 5 --height 32 --width 32 --steps 3 --noisy-steps 2 --members 2 --groups 1 --batch 1".split()
    assert bench.main(["--rehearse", "gpu", "--gpus", "1", "--with", *small]) == 0
    printed = capsys.readouterr().out
    for phase in ("rollout, decoding", "update", "optimiser step", "evaluation of 2 steps", "Depth Anything 3"):
        assert phase in printed
    assert "GB with the judges and a gather in flight" in printed


def test_batches_of_a_group_share_the_steps_before_the_window():
    def flops(batches, *options):
        c = config_of("wide", *options)
        return rehearse.rehearse(c, 1, SIZES["wide"][0], VAE_CONFIG, batches)["rollout, decoding"][1]

    first = train.step_window(config_of("wide"), 0, False, 0)[0]
    assert first > 0  # so there are steps to share
    # without the prompt's keys and values, which are made once: less than 1 in 10,000
    alone = flops(1, "--no-shared")
    of_a_step = flops(1, "--no-shared", "--steps", "5") - alone
    assert flops(2, "--no-shared") == pytest.approx(2 * alone, rel=1e-4)
    # of 2 videos a batch: what 2 batches share is the ODE of 1 of 4 videos
    assert flops(1) == pytest.approx(alone - first * of_a_step / 2, rel=1e-4)
    assert flops(2) == pytest.approx(2 * alone - first * of_a_step * 3 / 2, rel=1e-4)
    assert first * of_a_step > .05 * alone


# ------------------------------------------------------------------------------------------------------- dressed

def test_a_dress_rehearsal_trains_a_step_from_folders_it_has_written(monkeypatch, tmp_path):
    """Of cut-down models here: loaded by train.py in a process of its own, which leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    depth = DA3Config(64, 4, 2, features=32, out_channels=(16, 16, 16, 16), out_layers=(0, 1, 2, 3), alt_start=1,
                      gaussians=True, patch_size=8, grid=8, process_res=64)
    options = "--frames 5 --height 32 --width 48 --members 2 --batch 1 --views 2 --steps 3 --noisy-steps 2".split()
    row, phases, (depth_peak, depth_flops) = dress.dress("small", options, (SMALL, VAE_CONFIG, depth))
    assert row["masked"] < 2
    assert row["grad"][0] > 0
    assert {"rollout", "reward", "update"} <= row["machine"]["seconds"].keys()
    assert row["machine"]["peak_bytes"] > phases["weights, optimiser"][0]
    assert depth_peak > sum(p.numel() * 4 for p in DepthAnything3(depth).parameters())
    assert list(tmp_path.iterdir()) == []

    # the whole group's rollout is traced, for it is the whole group's that was timed
    c = train.parse_arguments(["--preset", "small", "--groups", "1", *options])
    both = rehearse.rehearse(c, 1, SMALL, VAE_CONFIG, rolled_out=2)
    assert phases["rollout, decoding"] == both["rollout, decoding"]
    with pytest.raises(ValueError, match="a window of 9 steps does not fit"):
        dress.dress("small", [*options, "--window", "9"])
    assert list(tmp_path.iterdir()) == []
