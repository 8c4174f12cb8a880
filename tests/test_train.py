import dataclasses
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import train
from lora import LoRALinear, add_lora, lora_off, lora_weights, merge_lora
from model import load_wan
from sample import generator
from train import Config, check, load_prompts, parse_arguments, step_prompts


@pytest.fixture(scope="module")
def arguments(checkpoint, twins):
    """Arguments of a run of a second: 4 groups of 2 videos of 5 frames, two main steps, then a dynamic one."""
    return ["--model", str(checkpoint), "--frames", "5", "--height", "32", "--width", "32", "--groups", "4", "--members", "2", "--steps", "3",
            "--high", "2", "--window", "1", "--total-steps", "3", "--main-steps", "2", "--dynamic-steps", "1", "--eval-every", "0", "--views", "2",
            "--first", "1", "--rank", "4", "--lr", "1e-2", "--ema-every", "1", "--no-pooled", "--no-shared", "--recon", "1", "--decay", "0", "--depth-anything", str(twins / "depth_anything"),
            "--critic", str(twins / "qwen3_vl"), "--preference", str(twins / "hpsv3")]


def run(jobs):
    done = subprocess.run([sys.executable, ROOT / "tests" / "forked.py"], input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def metrics(folder):
    """The lines of metrics.jsonl without what a clock or the machine decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "machine"} for row in rows]


def weights(folder):
    """The newest checkpoint's tensors, gathered from however many processes wrote it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    dcp_to_torch_save(newest, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=True)


def largest_difference(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


# ---------------------------------------------------------------------------------------------------- runs, whole and cut

def test_any_number_of_processes_makes_the_same_run(arguments, tmp_path):
    base = [*arguments, "--runs", str(tmp_path)]
    jobs = {"one": (1, []), "two": (2, []), "four": (4, []), "sharded": (2, ["--parallel", "fsdp"]), "by one": (1, ["--batch", "1"]),
            "as tiny": (1, ["--pooled", "--shared"]), "as tiny two": (2, ["--pooled", "--shared"]), "full": (1, ["--full", "--lr", "1e-4"]), "full two": (2, ["--full", "--lr", "1e-4"]),
            "full sharded": (2, ["--full", "--lr", "1e-4", "--parallel", "fsdp"])}
    codes, err = run([dict(args=[*base, "--name", name, *more], world=world) for name, (world, more) in jobs.items()])
    assert codes == [[0] * world for world, _ in jobs.values()], err[-3000:]
    for first, others in (("one", ("two", "four", "sharded")), ("as tiny", ("as tiny two",)), ("full", ("full two", "full sharded"))):
        expected, known = metrics(tmp_path / first), weights(tmp_path / first)
        assert [r["phase"] for r in expected] == ["main", "main", "dynamic"] and expected[0]["kl"] == 0 < expected[2]["kl"]
        assert max(known[k].abs().max() for k in known if k.startswith("adam.exp_avg_sq")) > 0  # every run has moved
        for other in others:
            found = metrics(tmp_path / other)
            rolled = ("prompts", "meta", "recon", "traj", "general", "total", "total_std", "advantage_abs", "motion", "masked")
            assert {k: found[0][k] for k in rolled} == {k: expected[0][k] for k in rolled}, other  # rollouts and rewards, bit for bit
            assert largest_difference(weights(tmp_path / other), known) <= 1e-6, other
    alone, together = metrics(tmp_path / "by one")[0], metrics(tmp_path / "one")[0]  # one video at a time: the same step but for rounding
    assert alone["grad"] == pytest.approx(together["grad"], rel=1e-3) and alone["total"] == pytest.approx(together["total"], abs=1e-4)
    for name in ("two", "four", "sharded"):
        assert largest_difference(load_file(tmp_path / name / "lora.safetensors"), load_file(tmp_path / "one" / "lora.safetensors")) <= 1e-6


def test_killed_at_twenty_moments_it_ends_the_same(arguments, tmp_path):
    """SIGKILL at random moments; started again each time. Metrics and weights equal an uninterrupted run's, to the bit."""
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "8", "--decay", ".5"]
    draw = random.Random(0)
    kills = [dict(args=[*base, "--name", "killed"], kill=draw.uniform(.3, 2.5)) for _ in range(20)]
    jobs = [dict(args=[*base, "--name", "whole"])] + kills + [dict(args=[*base, "--name", "killed"])]
    codes, err = run(jobs)
    assert codes[0] == codes[-1] == [0], err[-3000:]
    assert sum(c == [-9] for c in codes) >= 3  # the moments were in the middle of something
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "whole")) == 8
    assert largest_difference(weights(tmp_path / "killed"), weights(tmp_path / "whole")) == 0


def test_the_learning_rate_falls_to_nothing_over_the_last_share_of_steps(arguments, tmp_path):
    c = train.Config(lr=.1, total_steps=100, decay=.4)
    assert [round(train.learning_rate(c, s), 9) for s in (0, 60, 80, 99)] == [.1, .1, .05, .0025]
    assert train.learning_rate(train.Config(lr=.1, total_steps=2), 1) == .1  # no decay
    base = [*arguments, "--runs", str(tmp_path)]
    codes, err = run([dict(args=[*base, "--name", name, "--decay", str(d)]) for name, d in (("constant", 0), ("falling", 1))]
                     + [dict(args=[*base, "--name", "falling", "--decay", "1", "--total-steps", "4"])])
    assert codes == [[0], [0], [2]] and "was started with --total-steps 3, not 4" in err  # another length is another rate
    constant, falling = metrics(tmp_path / "constant"), metrics(tmp_path / "falling")
    assert constant[:2] == falling[:2] and constant[2]["kl"] > falling[2]["kl"] > 0  # the first update is the same, the second is not


def test_sigterm_saves_and_ends_well_and_a_damaged_checkpoint_is_refused(arguments, tmp_path):
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "5"]
    (codes, _), folder = run([dict(args=[*base, "--name", "whole"]),
                              dict(args=[*base, "--name", "stopped", "--save-every", "100"], kill="sigterm", after=str(tmp_path / "stopped" / "metrics.jsonl"))]), tmp_path / "stopped"
    assert codes == [[0], [0]]
    done = len(metrics(folder))
    assert 0 < done < 5 and [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    assert metrics(folder) == metrics(tmp_path / "whole")[:done]

    newest = sorted((tmp_path / "whole" / "checkpoints").glob("step_*"))[-1]
    file = next(newest.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    expected = metrics(tmp_path / "whole")
    codes, err = run([dict(args=[*base, "--name", "whole"]), dict(args=[*base, "--name", "stopped", "--save-every", "100"])])
    assert codes == [[0], [0]] and f"{file.name} is damaged" in err and str(newest) in err
    assert metrics(tmp_path / "whole") == expected == metrics(folder)
    assert largest_difference(weights(tmp_path / "whole"), weights(folder)) == 0


def test_a_full_disk_loses_no_older_checkpoint(arguments, tmp_path):
    """The second run may write no file beyond 10 kB, as on a full disk: it stops with a message, the older checkpoint stays."""
    base = [*arguments, "--runs", str(tmp_path), "--name", "full"]
    codes, _ = run([dict(args=[*base, "--total-steps", "2"])])
    before = {f: f.read_bytes() for f in (tmp_path / "full" / "checkpoints").rglob("*") if f.is_file()}
    code = ("import resource, signal, sys\nsys.path.insert(0, sys.argv[1])\nimport torch\ntorch.set_num_threads(1)\nimport train\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\nsys.exit(train.main(sys.argv[2:]))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), *base, "--total-steps", "4"], capture_output=True, text=True)
    assert codes == [[0]] and done.returncode == 2 and "train.py: the checkpoint after step 3 could not be written" in done.stderr, done.stderr[-2000:]
    assert all(f.exists() and f.read_bytes() == data for f, data in before.items())


def test_torchrun_restarts_after_a_killed_rank(arguments, tmp_path):
    """torchrun --max-restarts: one of two ranks is killed once; the run goes on and ends as an undisturbed one."""
    base = [*arguments, "--runs", str(tmp_path)]
    script = tmp_path / "dies_once.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
import train
step = train.one_step
def dying(policy, rewards, prompts, number, bar):
    if number == 1 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(policy, rewards, prompts, number, bar)
train.one_step = dying
sys.exit(train.main(sys.argv[1:]))
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
                           str(script), *base, "--name", "restarted"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    codes, _ = run([dict(args=[*base, "--name", "whole"], world=2)])
    assert codes == [[0, 0]] and metrics(tmp_path / "restarted") == metrics(tmp_path / "whole")
    assert largest_difference(weights(tmp_path / "restarted"), weights(tmp_path / "whole")) == 0


def test_evaluation_writes_videos_curves_and_an_adapter(arguments, tmp_path):
    base = [*arguments, "--runs", str(tmp_path), "--name", "e", "--total-steps", "2", "--eval-every", "2", "--eval-prompts", "3", "--shared", "--updates", "2",
            "--ratio-norm", "--no-standardise", "--sde", "cps", "--guidance", "2", "--checkpointing"]
    codes, err = run([dict(args=base)])
    assert codes == [[0]], err[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "e" / "eval.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 2] and all(math.isfinite(r["total"]) for r in rows)
    assert len(list((tmp_path / "e" / "eval" / "000002").glob("*.mp4"))) == 3 and (tmp_path / "e" / "lora_comfyui.safetensors").exists()
    row = metrics(tmp_path / "e")[1]
    assert len(row["grad"]) == 2 and row["ratio_max"] != 1 and row["three_d"] == pytest.approx(row["meta"] + row["recon"] + row["traj"], abs=1e-5)


def test_a_run_starts_from_an_adapter_and_exports_both(arguments, checkpoint, adapted, tmp_path):
    """A run of learning rate 0 on a base exports the base; one that learns, the base and what it learned, as one adapter."""
    based, plain, _ = adapted
    save_file(lora_weights(based.dit), tmp_path / "lora.safetensors")
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "1", "--rank", "2", "--lora", str(tmp_path)]
    codes, err = run([dict(args=[*base, "--name", "still", "--lr", "0"]), dict(args=[*base, "--name", "moved"])])
    assert codes == [[0], [0]], err[-3000:]
    assert load_file(tmp_path / "still" / "lora.safetensors")["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape[0] == 4 + 2
    outputs = {}
    for name in ("still", "moved"):
        for layout in ("lora", "lora_comfyui"):
            wan = load_wan(checkpoint)
            merge_lora(wan.dit, tmp_path / name / f"{layout}.safetensors")
            outputs[name, layout] = wan.dit(*inputs())
        assert (outputs[name, "lora"] - outputs[name, "lora_comfyui"]).abs().max() < 1e-5
    assert (outputs["still", "lora"] - based.dit(*inputs())).abs().max() < 1e-5 < 1e-4 < (outputs["moved", "lora"] - based.dit(*inputs())).abs().max()
    assert metrics(tmp_path / "still")[0]["kl"] == 0  # the reference is the base


def test_bad_settings_are_one_sentence_before_any_work(arguments, tmp_path, capsys):
    base = [*arguments, "--runs", str(tmp_path)]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "push_in a hill", "split": "train"}\n{"prompt": ""}\n')
    for more, message in ((["--members", "1"], "--members must be at least 2"), (["--eta", "0"], "--eta must be above 0"),
                          (["--window", "9"], "a window of 9 steps does not fit"), (["--frames", "6"], "4k+1 frames"),
                          (["--prompts", str(tmp_path / "bad.jsonl")], "bad.jsonl, line 2: it needs a non-empty prompt"),
                          (["--prompts", str(tmp_path / "none.txt")], "cannot be read"), (["--critic", "/nowhere"], "no model folder"),
                          (["--lora", "/nowhere"], "no LoRA file"), (["--batch", "3"], "--members must be a multiple of --batch"), (["--updates", "3"], "--groups must be a multiple of --updates"), (["--sde", "odd"], "--sde must be one of")):
        assert train.main([*base, "--name", "bad", *more]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("train.py: ") and message in err, (more, err)
        assert not (tmp_path / "bad").exists()
    assert train.main([*base, "--name", "first", "--total-steps", "1"]) == 0
    assert train.main([*base, "--name", "first", "--total-steps", "2", "--lr", "1"]) == 2
    assert "was started with --lr 0.01, not 1.0" in capsys.readouterr().err


def test_a_step_of_failed_rewards_stops_the_run(arguments, tmp_path, capsys):
    """Videos of one frame cannot be reconstructed: every 3D reward fails."""
    assert train.main([*arguments, "--runs", str(tmp_path), "--name", "failed", "--frames", "1"]) == 2
    assert "rewards failed, more than --max-masked" in capsys.readouterr().err and not list((tmp_path / "failed" / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------------ prompts, presets

def test_prompt_files(tmp_path):
    tiny = load_prompts("tiny")
    assert [len(tiny[k]) for k in ("train", "dynamic", "test")] == [3000, 500, 300] and not set(tiny["train"]) & set(tiny["test"])
    ours = load_prompts(ROOT / "prompts.jsonl")
    assert [len(ours[k]) for k in ("train", "dynamic", "test")] == [3000, 500, 300]
    (tmp_path / "a.txt").write_text("push_in a hill\n\nCamera pan left. A lake.\n")
    assert load_prompts(tmp_path / "a.txt") == dict(train=["push_in a hill"], dynamic=[], test=["Camera pan left. A lake."])
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\nnot json\n')
    with pytest.raises(ValueError, match="b.jsonl, line 2"):
        load_prompts(tmp_path / "b.jsonl")


def test_phases_alternate_and_every_prompt_comes_once_an_epoch():
    prompts = dict(train=[f"t{i}" for i in range(12)], dynamic=[f"d{i}" for i in range(5)], test=[])
    c = Config(groups=4, main_steps=3, dynamic_steps=2)
    seen = [step_prompts(c, prompts, s) for s in range(10)]
    assert [dynamic for dynamic, _ in seen] == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2
    main = [p for dynamic, rows in seen if not dynamic for _, p in rows]
    assert sorted(main[:12]) == sorted(main[12:]) == sorted(prompts["train"]) and main[:12] != main[12:]
    moving = [p for dynamic, rows in seen if dynamic for _, p in rows]
    assert sorted(moving[:5]) == sorted(moving[5:10]) == sorted(prompts["dynamic"])


def test_presets_hold_the_published_values(checkpoint):
    small, large, tiny = (parse_arguments(["--preset", p]) for p in ("small", "large", "tiny"))
    for c in (small, large):
        check(c, 48)
        assert (c.members, c.frames, c.height, c.width, c.steps, c.guidance) == (8, 81, 480, 832, 50, 5.0)
        assert (c.rank, c.alpha, c.lr, c.clip, c.kl, c.adv_clip, c.ema_decay, c.ema_every, c.eta) == (32, 64, 1e-4, 1e-3, .004, 5, .9, 8, .7)
        assert (c.main_steps, c.dynamic_steps, c.degradation) == (100, 50, .35)
    assert small.groups == 48 and "1.3B" in small.model and "14B" in large.model and large.parallel == "fsdp"
    check(tiny, 1)
    assert tiny.lora.endswith("tiny/web") and parse_arguments(["--model", str(checkpoint)]).lora == "" and small.lora == ""
    assert parse_arguments(["--preset", "small", "--groups", "8", "--no-checkpointing"]).groups == 8
    assert all(f.name == name for f, name in zip(dataclasses.fields(Config), dataclasses.asdict(Config())))


# ----------------------------------------------------------------------------------------------------------------- LoRA

@pytest.fixture
def adapted(checkpoint):
    """A model with a random adapter, its plain twin, and the adapter's settings."""
    wan, plain = load_wan(checkpoint), load_wan(checkpoint)
    trained = add_lora(wan.dit, 4, 8.0, generator("lora"))
    with torch.no_grad():
        for name, p in trained.items():
            if name.endswith("lora_B"):
                p.normal_(std=.1, generator=generator(name))
    return wan, plain, trained


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 2, 2, 4, generator=g), torch.tensor([500.0, 20]), torch.randn(2, 5, 32, generator=g)


def test_lora_starts_as_the_identity_turns_off_and_trains_alone(checkpoint, adapted):
    wan, plain, trained = adapted
    fresh = load_wan(checkpoint)
    add_lora(fresh.dit)
    assert torch.equal(fresh.dit(*inputs()), plain.dit(*inputs()))
    moved = wan.dit(*inputs())
    assert (moved - plain.dit(*inputs())).abs().max() > 1e-3
    with lora_off(wan.dit):
        assert torch.equal(wan.dit(*inputs()), plain.dit(*inputs()))
    assert torch.equal(wan.dit(*inputs()), moved)
    assert len(trained) == 2 * 8 * len(wan.dit.blocks) and all("lora" in n and p.dtype == torch.float32 for n, p in trained.items())


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_lora_files_merge_back_to_the_same_model(adapted, tmp_path, layout):
    wan, plain, _ = adapted
    save_file(lora_weights(wan.dit, layout=layout), tmp_path / "lora.safetensors")
    merge_lora(plain.dit, tmp_path)
    assert (plain.dit(*inputs()) - wan.dit(*inputs())).abs().max() < 1e-5
    broken = load_file(tmp_path / "lora.safetensors")
    broken["transformer.blocks.9.attn1.to_q.lora_A.weight"] = torch.zeros(4, 48)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="fits no layer of this model"):
        merge_lora(plain.dit, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="no LoRA file"):
        merge_lora(plain.dit, tmp_path / "none.safetensors")


def test_lora_key_names(adapted):
    """ComfyUI's and PEFT's names, by list."""
    wan, *_ = adapted
    ours, theirs = set(lora_weights(wan.dit)), set(lora_weights(wan.dit, layout="original"))
    expected, original = set(), set()
    for i in range(2):
        for a, b in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for x, y in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                for m in "AB":
                    expected.add(f"transformer.blocks.{i}.{a}.{x}.lora_{m}.weight")
                    original.add(f"diffusion_model.blocks.{i}.{b}.{y}.lora_{m}.weight")
    assert ours == expected and theirs == original
    assert sum(isinstance(m, LoRALinear) for m in wan.dit.modules()) == 16
