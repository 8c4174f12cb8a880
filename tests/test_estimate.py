"""The estimates of real sizes against what is computed and allocated."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import short_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from estimate import (CRITIC, DEPTH, H200, JUDGES, MACHINES, PREFERENCE, RTX_4090, busiest_rollout, decoding,
                      dit_flops, estimate, estimate_line, rollout_counts)
from lora import add_lora
from model import DIT_SIZES, VAE, DiT, DiTConfig, VAEConfig, released_config
from policy import Policy
from run import Processes
from train import deal, parse_arguments, roll_out_groups, step_window
from weights import write_json


def estimated(preset, gpus=None, options=()):
    return estimate(*bench.preset_config(preset, gpus, options))


def test_estimated_activations_are_what_is_allocated():
    sizes = {name: bench.MEMORY_SIZES[name] for name in ("tiny", "medium")}
    for name, dtype, kind, predicted, allocated in bench.check_memory(sizes):
        assert predicted == pytest.approx(allocated, rel=.1), (name, dtype, kind)


def test_estimated_flops_are_what_is_computed():
    config = DiTConfig(4, 32, 512, 3, text_dim=64)
    x, t, text = torch.randn(1, 16, 5, 16, 16), torch.tensor([500.0]), torch.randn(1, 96, 64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        DiT(config)(x, t, text)
    # what is left out is small: patches, time and text embeddings, the last projection
    assert dit_flops(config, 320, 96) == pytest.approx(counter.get_total_flops(), rel=.05)


def test_the_backward_pass_through_frozen_weights_makes_attention_twice():
    """By plain attention; flash kernels, which make the scores again, are not counted here."""
    config = DiTConfig(4, 32, 512, 3, text_dim=64)
    dit = DiT(config)
    add_lora(dit, 1, 1)
    x, t, text = torch.randn(1, 16, 5, 16, 16), torch.tensor([500.0]), torch.randn(1, 96, 64)
    with sdpa_kernel(SDPBackend.MATH):
        v = dit(x, t, text)
        with FlopCounterMode(display=False) as counter:
            v.sum().backward()
    assert dit_flops(config, 320, 96, attention=2) == pytest.approx(counter.get_total_flops(), rel=.1)


def test_decoding_is_counted_frame_by_frame():
    with torch.device("meta"):
        vae = VAE(VAEConfig()).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(torch.zeros(1, 16, 5, 16, 16, device="meta"))
    first, further, _ = decoding()
    assert (first + 4 * further) * 128 ** 2 == pytest.approx(counter.get_total_flops(), rel=.02)


@pytest.mark.parametrize("options", [["--shared"], ["--no-shared"], ["--shared", "--noisy-steps", "1"]])
def test_passes_are_those_a_rollout_makes(options, checkpoint, twins, tmp_path):
    """Of every one of three processes, whose batches of two split a group: passes, and the videos in them."""
    c = parse_arguments([*short_run(checkpoint, twins), "--runs", str(tmp_path), "--members", "4",
                         "--batch", "2", "--steps", "6", "--noisy-steps", "5", "--guidance", "2", *options])
    policy = Policy(c, Processes("cpu"))
    chosen = [(i, f"push_in a red sphere {i}") for i in range(c.groups)]
    windows = [step_window(c, 0, False, index) for index, _ in chosen]
    sizes = []
    policy.wan.dit.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0]) // 2))
    counted = []
    for share in deal(c, 3):
        sizes.clear()
        list(roll_out_groups(policy, 0, False, chosen, windows, share))
        counted.append((len(sizes), sum(sizes)))
        assert counted[-1] == rollout_counts(c, windows, share)
    if c.noisy_steps == 1:  # the window is always the same
        assert busiest_rollout(c, 3) == list(max(counted))
    else:
        assert max(window[0] for window in windows) > 0


@pytest.mark.parametrize("common", ["--common-window", "--no-common-window"])
def test_the_busiest_process_is_the_mean_of_what_steps_draw(common):
    c = parse_arguments(["--groups", "6", "--steps", "8", "--window", "2", "--noisy-steps", "6", "--batch", "4", common])
    drawn = []
    for step in range(400):
        windows = [step_window(c, step, False, key) for key in range(c.groups)]
        drawn.append(max(rollout_counts(c, windows, share) for share in deal(c, 3)))
    assert busiest_rollout(c, 3) == pytest.approx(torch.tensor(drawn).float().mean(0).tolist(), rel=.02)


@pytest.mark.parametrize("preset", MACHINES)
def test_every_preset_fits_its_card(preset):
    memory, _ = estimated(preset)
    assert memory["peak"] < MACHINES[preset][0]["memory"]


def test_one_offloaded_judge_at_a_time_is_on_the_card():
    memory, _ = estimated("gpu")
    assert memory["peak"] < 24e9
    judges = [size for name, size in memory.items() if "float32" in name or "bfloat16" in name]
    assert sum(judges) > 24e9
    assert memory["peak"] > memory["work: preference model, bfloat16"] > 15e9


def test_a_node_trains_within_two_days():
    c = parse_arguments(["--preset", "node"])
    assert (c.frames, c.height, c.width, c.total_steps) == (49, 480, 832, 600)
    _, seconds = estimated("node", 8)
    assert seconds["run"] <= 48 * 3600


def test_small_is_cheaper_than_full_rollouts_and_scales():
    _, whole = estimated("small", 48, ["--steps", "50", "--window", "2", "--no-shared"])
    _, seconds = estimated("small", 48)
    _, on_twice = estimated("small", 96)
    assert seconds["step"] * 4.1 < whole["step"]
    assert seconds["step"] / on_twice["step"] >= 1.8


def test_weights_are_sharded_inside_a_node():
    few_memory, few_seconds = estimated("large", 8)
    many_memory, many_seconds = estimated("large", 48)
    assert many_memory == few_memory
    assert many_memory["DiT, bfloat16"] == pytest.approx(14.29e9 * 2 / 8, rel=.01)
    assert many_seconds["update"] == pytest.approx(few_seconds["update"] / 6)


def test_there_are_no_more_shards_than_gpus():
    """policy.shard splits inside groups of shard_size, and a smaller world among all it has."""
    weights = [estimated("large", gpus)[0]["DiT, bfloat16"] for gpus in (1, 2, 8, 16)]
    assert weights == pytest.approx([14.29e9 * 2 / shards for shards in (1, 2, 8, 8)], rel=.01)
    _, alone = estimated("large", 1)
    _, unsharded = estimated("large", 1, ["--parallel", "ddp"])
    assert alone == unsharded


@pytest.mark.parametrize("card", [H200, RTX_4090], ids=lambda card: card["name"])
def test_every_card_can_be_sharded_over(card):
    c = parse_arguments(["--preset", "gpu", "--parallel", "fsdp", "--groups", "8"])
    _, one = estimate(c, 2, card)
    assert one["rollout"] > estimate(dataclasses.replace(c, parallel="ddp"), 2, card)[1]["rollout"]


def test_options_of_training_lie_over_a_preset():
    memory, seconds = estimated("node")
    kept, _ = estimated("node", 8, ["--no-checkpointing"])
    assert kept["work: update"] > 5 * memory["work: update"]
    _, unguided = estimated("node", 8, ["--guidance", "1", "--eval-every", "0"])
    assert unguided["rollout"] == pytest.approx(seconds["rollout"] / 2)
    assert unguided["run"] == 600 * unguided["step"]
    _, with_reference = estimated("node", 8, ["--kl", ".004"])
    assert with_reference["update"] > 1.1 * seconds["update"]
    assert seconds | dict(update=0, step=0, run=0) == with_reference | dict(update=0, step=0, run=0)
    with pytest.raises(ValueError, match="leave out --full"):
        estimated("node", 8, ["--full"])


def test_judges_that_no_term_looks_through_take_nothing():
    def judges(memory):
        return {judge for judge in JUDGES if judge in memory}

    memory, seconds = estimated("small")
    assert judges(memory) == set(JUDGES)
    no_critic, sooner = estimated("small", None, ["--meta", "0"])
    assert judges(no_critic) == {DEPTH, PREFERENCE}  # S_recon and S_traj still reconstruct
    assert f"work: {CRITIC}" not in no_critic
    assert memory["peak"] - no_critic["peak"] == JUDGES[CRITIC]
    assert sooner["reward"] < seconds["reward"]
    r_gen_alone, _ = estimated("small", None, ["--meta", "0", "--recon", "0", "--traj", "0"])
    assert judges(r_gen_alone) == {PREFERENCE}

    # offloaded ones are moved for every batch
    few = ["--general", "0", "--dynamic-steps", "0", "--meta", "0"]
    _, offloaded = estimated("gpu", None, few)
    _, kept = estimated("gpu", None, [*few, "--no-offload"])
    c = parse_arguments(["--preset", "gpu"])
    moved = c.groups * c.members / c.batch * JUDGES[DEPTH]
    assert offloaded["reward"] - kept["reward"] == pytest.approx(moved / RTX_4090["host"])


def test_measuring_memory_says_nothing():
    """PyTorch's profiler would report a missing GPU as an error."""
    code = "import torch, estimate; print(estimate.allocated_peak(lambda: torch.zeros(1000)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(bench.__file__).parent, capture_output=True, text=True)
    assert int(run.stdout) >= 4000
    assert run.stderr == ""


def test_an_estimate_says_what_the_whole_run_takes(capsys, monkeypatch):
    _, seconds = estimated("node")
    assert seconds["run"] == pytest.approx(600 * seconds["step"] + 13 * seconds["evaluation"])
    bench.print_estimate("node")
    hours = seconds["run"] / 3600
    said = capsys.readouterr().out
    assert f"600 steps and their evaluations: {hours:,.0f} hours, {8 * hours:,.0f} GPU hours" in said
    assert "GB of 141: it fits" in said
    monkeypatch.setitem(MACHINES, "node", (H200 | dict(memory=24e9), 8))
    bench.print_estimate("node")
    assert "GB of 24: it does NOT fit" in capsys.readouterr().out


@pytest.mark.parametrize("gpus, message", [("0", "--gpus must be at least 1, got 0"),
                                           ("7", "the 7 processes")])
def test_gpus_that_a_preset_cannot_use_are_one_sentence(gpus, message, capsys):
    assert bench.main(["--estimate", "large", "--gpus", gpus]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("gpus", ["-1", "0", "129", "100000000"])
def test_more_gpus_than_batches_or_none_are_refused_at_once(gpus, capsys):
    assert bench.main(["--estimate", "node", "--gpus", gpus]) == 2
    most = "at least 1" if int(gpus) < 1 else "at most 128, the batches of a step"
    assert capsys.readouterr().err == f"bench.py: --gpus must be {most}, got {gpus}\n"


@pytest.mark.parametrize("gpus", ["1e8", "nan", "inf", "1.5"])
def test_gpus_that_are_no_whole_number_are_an_argument_error(gpus, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--estimate", "node", "--gpus", gpus])
    assert ended.value.code == 2
    assert f"argument --gpus: invalid int value: '{gpus}'" in capsys.readouterr().err


def test_a_batch_that_cannot_be_is_said_before_batches_are_counted():
    with pytest.raises(ValueError, match="--batch must be at least 1, got 0"):
        estimated("node", 8, ["--batch", "0"])
    with pytest.raises(ValueError, match="--members must be a multiple of --batch"):
        estimated("node", 8, ["--batch", "500"])


@pytest.mark.parametrize("parts", (("--estimate", "small", "--rehearse", "gpu"),
                                   ("--estimate", "small", "--check-memory")))
def test_two_questions_at_once_are_an_argument_error(parts, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([*parts])
    assert ended.value.code == 2
    assert f"argument {parts[2]}: not allowed with argument --estimate" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ("transformer", "."))
def test_a_folder_is_of_the_size_that_its_config_says(folder, tmp_path):
    """In both layouts and whatever its name; a twin's is of no size."""
    model = tmp_path / "my-wan-1.3b"
    assert released_config(str(model)) == DIT_SIZES["1.3B"], "by its name alone"
    write_json(model / folder / "config.json", dict(num_layers=40, ffn_dim=13824))
    assert released_config(str(model)) == DIT_SIZES["14B"]
    options = ["--dynamic-steps", "0", "--model"]
    assert estimated("node", 8, [*options, str(model)]) == estimated("node", 8, [*options, "Wan2.1-T2V-14B"])
    write_json(model / folder / "config.json", dict(num_layers=2, ffn_dim=13824))
    with pytest.raises(ValueError, match="the estimate knows Wan2.1"):
        estimated("node", 8, [*options, str(model)])


def test_training_begins_with_its_estimate(tmp_path, capsys):
    """Of a released model, before anything is loaded, in the figures that bench.py prints; of twins none."""
    options = ["--preset", "node", "--runs", str(tmp_path), "--device", "cpu"]
    assert train.main([*options, "--critic", str(tmp_path / "missing")]) == 2  # at the first that is loaded
    memory, seconds = estimated("node", 1)
    said = capsys.readouterr().out
    assert said.startswith("no GPU here; estimate on 1 H200")
    assert f"{memory['peak'] / 1e9:.1f} GB of 141 each; {seconds['step']:,.0f} s a step" in said
    small = estimate_line(parse_arguments([*options, "--batch", "8", "--no-checkpointing"]), 1)
    assert "it does NOT fit; give --offload" in small
    assert estimate_line(parse_arguments(["--preset", "tiny"]), 1) is None
    assert estimate_line(parse_arguments([*options, "--full"]), 1) is None
