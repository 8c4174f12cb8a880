import dataclasses
import json
import math
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from runs import largest_difference, metrics, run_jobs, short_run, weights
from safetensors.torch import load_file

import train
from grpo import rectification
from noise_warp import camera_path, released_push
from policy import Policy
from prompts import read_prompts
from rewards import TERMS, Term, combine
from run import Processes
from sample import generator, initial_noise, log_prob, read_video, sample_videos, sigmas, transition
from train import Config, check, parse_arguments, step_prompts

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def arguments(checkpoint, twins):
    return short_run(checkpoint, twins)


# ---------------------------------------------------------------------------------------------------- options

def test_presets_hold_the_published_values():
    presets = {name: parse_arguments(["--preset", name]) for name in train.PRESETS}
    for name, processes in dict(tiny=1, small=48, large=96, release=48, node=8, gpu=1).items():
        check(presets[name], processes)  # as docs/real_size.md launches them
    for c in (presets["small"], presets["large"]):
        assert (c.groups, c.members, c.frames, c.height, c.width) == (48, 8, 81, 480, 832)
        assert (c.lora_rank, c.lora_alpha, c.lr, c.clip, c.kl, c.adv_clip) == (32, 64, 1e-4, 1e-3, .004, 5)
        assert (c.ema_decay, c.ema_every, c.eta, c.guidance) == (.9, 8, .7, 5.0)
        assert (c.main_steps, c.dynamic_steps, c.degradation) == (100, 50, .35)
        assert c.weights == dict(meta=1, recon=1, traj=1, general=1)
        assert not c.standardise
        assert c.lora is None
    assert "1.3B" in presets["small"].model
    assert "14B" in presets["large"].model
    release, node, tiny = presets["release"], presets["node"], presets["tiny"]
    assert (release.members, release.steps, release.window, release.updates) == (2, 50, 24, 1)
    assert release.released
    assert (node.steps, node.guidance, node.kl, node.window, node.rectify) == (20, 4.5, 0, 1, True)
    assert tiny.lora.endswith("tiny/web")
    assert tiny.weights == dict(meta=1, recon=2, traj=1, general=1)


def shrunk(arguments):
    """Of a short run's arguments those that make it small: models, frames and pixels."""
    given = dict(zip(arguments[2::2], arguments[3::2]))
    names = ("model", "depth-anything", "critic", "preference", "frames", "height", "width")
    return [word for name in names for word in ("--" + name, given["--" + name])]


# processes (large shards), the longest run first
LARGE_PRESETS = {"release": 1, "large": 2, "small": 1, "node": 1, "gpu": 1}


@pytest.fixture(scope="module")
def preset_runs(arguments, tmp_path_factory):
    """The folder of two steps of each. Models, frames and pixels are small, the group is one, and LPIPS the
    stand-in; all else is the preset's."""
    folder = tmp_path_factory.mktemp("presets")
    small = [*shrunk(arguments), "--lpips", "random", "--groups", "1", "--total-steps", "2", "--eval-every", "0",
             "--runs", str(folder)]
    jobs = [dict(args=["--preset", preset, "--name", preset, *small], world=world)
            for preset, world in LARGE_PRESETS.items()]
    codes, err = run_jobs(jobs, at_once=2)
    assert codes == [[0] * world for world in LARGE_PRESETS.values()], err[-3000:]
    return folder


@pytest.mark.parametrize("preset", LARGE_PRESETS)
def test_every_preset_runs_two_steps_in_small(preset, preset_runs):
    assert train.PRESETS.keys() == LARGE_PRESETS.keys() | {"tiny"}
    rows = metrics(preset_runs / preset)
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["masked"] == 0 and math.isfinite(row["total"]) for row in rows)
    moved = weights(preset_runs / preset)["model.blocks.0.attn1.to_q.lora_B"]
    assert 0 < moved.abs().max() < 1


def test_options_lie_over_a_preset_and_none_stands_for_None(checkpoint):
    # a preset's adapter is for its own model
    assert parse_arguments(["--model", str(checkpoint)]).lora is None
    assert parse_arguments(["--lora", "none"]).lora is None
    over = ["--groups", "8", "--no-checkpointing", "--batch", "none", "--meta", ".5"]
    c = parse_arguments(["--preset", "small", *over])
    assert (c.groups, c.checkpointing, c.batch) == (8, False, None)
    assert c.weights == dict(meta=.5, recon=1, traj=1, general=1)
    assert parse_arguments(["--batch", "4"]).batch == 4


def test_the_models_own_values_hold_where_none_is_given(checkpoint):
    c = parse_arguments(["--model", str(checkpoint)])
    assert (c.frames, c.height, c.width, c.degradation) == (5, 16, 32, .35)
    c = parse_arguments(["--model", str(checkpoint), "--frames", "9", "--degradation", "0"])
    assert (c.frames, c.height, c.width, c.degradation) == (9, 16, 32, 0)


def test_every_field_and_every_term_is_an_option(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    fields = {field.name for field in dataclasses.fields(Config)} - {"weights"}
    for name in fields | set(TERMS):
        assert "--" + name.replace("_", "-") in words


BAD = {
    "--members 1": "--members must be at least 2, got 1",
    "--eta 0": "--eta must be at least 0.001",
    "--beta1 1": "--beta1 must be at most 0.999999",
    "--general-center=-1e308": "--general-center must be at least",
    "--lora-alpha -1": "--lora-alpha must be at least",
    "--seed " + 400 * "1" + " --members 1": "--members must be at least 2",
    "--eta 101": "--eta must be at most 100, got 101.0",
    "--sde cps --eta 1.5": "--eta must be at most 1 with --sde cps, got 1.5",
    "--window 9": "a window of 9 steps does not fit",
    "--frames 6": "--frames must be 4k+1, got 6; try 5",
    "--width 40": "--width must be a multiple of 16, got 40; try 32",
    "--lora-rank 0": "--lora-rank must be at least 1, got 0",
    "--views 1": "--views must be at least 2, got 1",
    "--eval-prompts -1": "--eval-prompts must be at least 1, got -1",
    "--train-prompts 0": "--train-prompts must be at least 1, got 0",
    "--meta -1": "--meta must be at least 0, got -1",
    "--meta 0 --recon 0 --traj 0 --general 0 --dynamic-steps 0": "every reward has weight 0",
    "--general 0": "the dynamic phase has no reward left: give --general a weight, or leave the phase out",
    "--grad-clip 0": "--grad-clip must be at least",
    "--adv-clip 0": "--adv-clip must be at least",
    "--name ../x": "--name must name a folder in --runs",
    "--name .x": "--name must name a folder in --runs",
    "--name /tmp/x": "--name must name a folder in --runs",
    "--name ''": "--name must name a folder in --runs",
    "--name " + 100 * "世": "--name must be at most 255 bytes long, got 300",
    "--device ''": "--device must be cpu or cuda, got ''",
    "--timeout 0": "--timeout must be at least 0.1",
    "--prompts bad.jsonl": "bad.jsonl, line 2: the prompt is empty",
    "--prompts none.txt": "cannot be read",
    "--critic /nowhere": "no model folder",
    "--lora /nowhere": "no LoRA file",
    "--batch 3": "--members must be a multiple of --batch",
    "--updates 3": "--groups must be a multiple of --updates"}


@pytest.mark.parametrize("options, message", BAD.items())
def test_bad_settings_are_one_sentence(options, message, arguments, tmp_path, monkeypatch, capsys):
    """Before any work: not even the run's folder is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "push_in a hill", "split": "train"}\n{"prompt": ""}\n')
    assert train.main([*arguments, "--name", "bad", *shlex.split(options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: ")
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_resumed_with_other_settings(arguments, tmp_path, capsys):
    base = [*arguments, "--runs", str(tmp_path), "--name", "first"]
    assert train.main([*base, "--total-steps", "1"]) == 0
    for options, message in (("--lr 1", "was started with --lr 0.01, not 1.0"),
                             ("--frames-seen 2", "was started with --frames-seen 1, not 2"),
                             ("--recon 3", "was started with --recon 1.0, not 3.0")):
        assert train.main([*base, "--total-steps", "2", *options.split()]) == 2
        assert message in capsys.readouterr().err
    # what an error of memory tells to do
    smaller = ["--batch", "1", "--checkpointing", "--offload"]
    assert train.main([*base, "--total-steps", "2", *smaller]) == 0
    assert len(metrics(tmp_path / "first")) == 2


# --------------------------------------------------------------------------------------------------- schedule

def test_phases_alternate_and_every_prompt_comes_once_an_epoch():
    prompts = dict(train=[f"t{i}" for i in range(12)], dynamic=[f"d{i}" for i in range(5)], test=[])
    c = Config(groups=4, main_steps=3, dynamic_steps=2)
    seen = [step_prompts(c, prompts, step) for step in range(10)]
    assert [dynamic for dynamic, _ in seen] == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2
    main = [prompt for dynamic, rows in seen if not dynamic for _, prompt in rows]
    assert sorted(main[:12]) == sorted(main[12:]) == sorted(prompts["train"])
    assert main[:12] != main[12:]
    moving = [prompt for dynamic, rows in seen if dynamic for _, prompt in rows]
    assert sorted(moving[:5]) == sorted(moving[5:10]) == sorted(prompts["dynamic"])
    assert all(prompts["train"][index] == prompt for index, prompt in seen[0][1])
    assert [step_prompts(dataclasses.replace(c, seed=1), prompts, step) for step in range(10)] != seen


def roll_outs(c, chosen):
    """The batches of a step's groups (index, prompt), a whole group each."""
    policy = Policy(c, Processes("cpu"))
    windows = [train.step_window(c, 0, False, key) for key in train.keys_of(chosen)]
    work = [(g, range(c.members)) for g in range(len(chosen))]
    return [batch for batch, _, _ in train.roll_out_groups(policy, 0, False, chosen, windows, work)]


@pytest.mark.parametrize("switch", ["--shared", "--no-shared"])
def test_a_prompt_that_comes_twice_in_a_step_is_two_groups_of_their_own(switch, arguments, tmp_path):
    """As with --train-prompts 1, to see whether a model can learn one prompt."""
    c = parse_arguments([*arguments, "--runs", str(tmp_path), switch])
    one, two = roll_outs(c, [(7, "push_in a hill"), (7, "push_in a hill")])
    states = torch.cat([one.sde_steps[0].x_next, two.sde_steps[0].x_next]).flatten(1)
    assert len(states.unique(dim=0)) == 2 * c.members
    alone, = roll_outs(c, [(7, "push_in a hill")])
    assert torch.equal(alone.sde_steps[0].x_next, one.sde_steps[0].x_next)


def test_rollouts_use_the_schedule_of_the_models_own_samples(arguments, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    own = json.loads((model / "sampling.json").read_text())
    (model / "sampling.json").write_text(json.dumps(own | dict(shift=2.0)))
    c = parse_arguments([*arguments, "--runs", str(tmp_path), "--model", str(model)])
    batch, = roll_outs(c, [(0, "push_in a hill")])
    assert torch.equal(batch.levels, sigmas(c.steps, 2.0))


def test_the_learning_rate_falls_to_nothing_over_the_last_share_of_steps():
    c = Config(lr=.1, total_steps=100, decay=.4)
    rates = [train.learning_rate(c, step) for step in (0, 60, 80, 99)]
    assert rates == pytest.approx([.1, .1, .05, .0025], abs=1e-9)
    assert train.learning_rate(Config(lr=.1, total_steps=2), 1) == .1  # no decay


def test_a_decaying_run_is_bound_to_its_length(arguments, tmp_path, capsys):
    base = [*arguments, "--runs", str(tmp_path)]
    falling = [*base, "--name", "falling", "--decay", "1"]
    constant = [*base, "--name", "constant", "--decay", "0"]
    codes, err = run_jobs([dict(args=constant), dict(args=falling)], at_once=2)
    assert codes == [[0], [0]], err[-3000:]
    assert train.main([*falling, "--total-steps", "4"]) == 2
    assert "was started with --total-steps 3, not 4" in capsys.readouterr().err  # another length is another rate
    constant, falling = metrics(tmp_path / "constant"), metrics(tmp_path / "falling")
    assert constant[:2] == falling[:2]  # the first update is the same, the second is not
    assert constant[2]["kl"] > falling[2]["kl"] > 0


# ------------------------------------------------------------------------------------ work, and who does it

@pytest.mark.parametrize("world", [1, 2, 3, 6, 48, 96])
def test_processes_share_every_update_evenly_by_batches(world):
    c = Config(groups=48, members=8, batch=1, updates=2)
    work = train.deal(c, world)
    dealt = [(g, member) for share in work for g, members in share for member in members]
    assert sorted(dealt) == [(g, member) for g in range(48) for member in range(8)]
    for update in range(2):
        counts = [sum(train.update_of(c, g) == update for g, _ in share) for share in work]
        assert max(counts) - min(counts) <= (192 % world > 0)
    if world <= 24:  # a process's members of a group are neighbours: few groups are on two processes
        assert max(len({g for g, _ in share}) for share in work) <= 48 / world + 2


def test_an_evaluation_under_fsdp_samples_each_prompt_once(arguments, tmp_path):
    """On 1 and 4 processes, which share five prompts by one: the same scores, and no prompt twice."""
    given = [*arguments, "--runs", str(tmp_path), "--total-steps", "1", "--eval-every", "1",
             "--eval-prompts", "5", "--batch", "1", "--parallel", "fsdp"]
    jobs = [dict(args=[*given, "--name", str(world)], world=world, sampled=str(tmp_path / f"{world}.txt"))
            for world in (1, 4)]
    codes, err = run_jobs(jobs, at_once=2)
    assert codes == [[0], [0] * 4], err[-3000:]
    asked = [row.split("\t")[1] for row in (tmp_path / "1.txt").read_text().splitlines()]
    assert len(asked) == 10 and len(set(asked)) == 5  # before the first step and after it
    expected = (tmp_path / "1" / "eval.jsonl").read_text()
    rows = [row.split("\t") for row in (tmp_path / "4.txt").read_text().splitlines()]
    assert sorted(prompt for _, prompt in rows) == sorted(asked)
    assert len({rank for rank, _ in rows}) == 4
    assert len(list((tmp_path / "4" / "eval" / "000001").glob("*.mp4"))) == 5
    first, = (tmp_path / "4" / "eval.jsonl").read_text().splitlines()[:1]
    assert first == expected.splitlines()[0]  # the untrained model's scores, bit for bit


def test_host_memory_does_not_grow_with_the_groups_of_a_process(arguments, tmp_path):
    """Videos of 17 x 256 x 256 are 13 MB each: 6 groups of 2 would be 160 MB, were they kept."""
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "1", "--frames", "17",
            "--height", "256", "--width", "256", "--meta", "0", "--recon", "0"]
    counts = (1, 6)
    jobs = [dict(args=[*base, "--name", str(n), "--groups", str(n)]) for n in counts]
    codes, err = run_jobs(jobs, at_once=2)
    assert codes == [[0]] * 2, err[-3000:]
    peaks = []
    for n in counts:
        row = json.loads((tmp_path / str(n) / "metrics.jsonl").read_text())
        peaks.append(row["machine"]["peak_bytes"])
    assert max(peaks) - peaks[0] <= 100e6


# ------------------------------------------------------------------------------------------------- whole runs

def sum_3d(row):
    return row["meta"] + row["recon"] + row["traj"]


def test_an_evaluation_is_sampled_by_the_runs_seed_and_strength(arguments, tmp_path):
    c = parse_arguments([*arguments, "--runs", str(tmp_path), "--seed", "3", "--strength", ".5"])
    policy, seen, prompts = Policy(c, Processes("cpu")), [], ["push_in a hill"]
    judges = SimpleNamespace(terms=lambda *given: seen.append(given) or dict(total=torch.zeros(1)))
    train.evaluation_rows(policy, judges, prompts, tmp_path / "e")
    (((video,), _, (path,)),) = seen
    assert torch.equal(path, camera_path(["push_in"], c.frames, .5))
    (expected,), _ = sample_videos(policy.wan, prompts, train.sampling_for(c), 3, strength=.5)
    assert torch.equal(video, expected)
    assert read_video(tmp_path / "e" / "00.mp4")[1] == train.sampling_for(c).fps


def test_evaluation_writes_videos_curves_and_an_adapter(arguments, tmp_path):
    """In a run with every switch that the other runs leave alone."""
    base = [*arguments, "--runs", str(tmp_path), "--name", "e"]
    schedule = ["--total-steps", "2", "--eval-every", "2", "--eval-prompts", "3"]
    switches = ["--shared", "--updates", "2", "--ratio-norm", "--no-standardise", "--sde", "cps",
                "--guidance", "2", "--checkpointing"]
    codes, err = run_jobs([dict(args=[*base, *schedule, *switches])])
    assert codes == [[0]], err[-3000:]
    folder = tmp_path / "e"
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    assert all(math.isfinite(row["total"]) and row["masked"] == 0 for row in rows)
    assert all({"motion", "epipolar"} <= row.keys() for row in rows)
    assert len(list((folder / "eval" / "000002").glob("*.mp4"))) == 3
    asked = (folder / "eval" / "000002" / "prompts.txt").read_text().splitlines()
    assert asked == read_prompts(train.TINY / "prompts.jsonl")["test"][-3:]  # eval.py scores the first
    assert (folder / "lora_comfyui.safetensors").exists()
    kept, first, last = (load_file(file / "lora.safetensors")
                         for file in (folder / "eval" / "000002", folder / "eval" / "000000", folder))
    assert largest_difference(kept, last) == 0 < largest_difference(kept, first)
    row = metrics(folder)[1]
    assert len(row["grad"]) == 2
    assert row["ratio_max"] != 1
    assert row["three_d"] == pytest.approx(sum_3d(row), abs=1e-5)


WANDB = """
import json
rows = open("{rows}", "a")

class Run:
    def log(self, row, step):
        print(json.dumps([step, row]), file=rows, flush=True)

def init(**options):
    print(json.dumps(options["config"]["name"]), file=rows, flush=True)
    return Run()
"""


def test_weights_and_biases_get_the_numbers_of_steps_and_evaluations(arguments, tmp_path, monkeypatch):
    """A stand-in for the wandb package, which writes down what it is given."""
    (tmp_path / "wandb.py").write_text(WANDB.replace("{rows}", str(tmp_path / "rows")))
    monkeypatch.syspath_prepend(tmp_path)
    given = "--meta 0 --recon 0 --traj 0 --kl 0 --total-steps 1 --eval-every 1 --eval-prompts 1 --wandb --name w"
    assert train.main([*arguments, "--runs", str(tmp_path), *given.split()]) == 0
    del sys.modules["wandb"]
    name, *rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert name == "w"
    assert [step for step, _ in rows] == [0, 0, 0]  # an evaluation, a step, an evaluation after it
    before, row, after = (row for _, row in rows)
    assert before.keys() == after.keys() and all(key.startswith("eval/") for key in before)
    evaluated = [json.loads(line) for line in (tmp_path / "w" / "eval.jsonl").read_text().splitlines()]
    assert [one["eval/general"] for one in (before, after)] == [one["general"] for one in evaluated]
    [logged] = metrics(tmp_path / "w")
    assert row["general"] == logged["general"] and row["grad"] == logged["grad"][0]
    assert row["seconds/rollout"] > 0 and row["peak_bytes"] > 0
    assert logged["kl"] is None and "kl" not in row  # without --kl it is not known


def test_a_package_that_is_missing_is_said_before_any_work(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train.main([*arguments, "--runs", str(tmp_path), "--name", "w", "--wandb"]) == 2
    assert "--wandb needs the wandb package: pip install wandb" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def released(tmp_path):
    """A folder whose config is the 1.3B model's, without weights."""
    (tmp_path / "wan" / "transformer").mkdir(parents=True)
    (tmp_path / "wan" / "transformer" / "config.json").write_text('{"num_layers": 30, "ffn_dim": 8960}')
    return str(tmp_path / "wan")


def test_the_real_model_before_tiny_judges_is_said(released, tmp_path, capsys):
    assert train.main(["--model", released, "--runs", str(tmp_path), "--name", "x", "--device", "cpu"]) == 2
    assert "depth_anything, critic, preference: tiny twins, which know rooms of 64x64" in capsys.readouterr().out
    assert train.main(["--preset", "gpu", "--model", released, "--runs", str(tmp_path), "--name", "x",
                       "--device", "cpu", "--critic", str(tmp_path / "nowhere")]) == 2  # the first that is loaded
    assert "tiny twins" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_model_is_not_trained_on_many_cpus(released, tmp_path):
    job = dict(args=["--preset", "node", "--model", released, "--runs", str(tmp_path), "--name", "x"], world=2)
    codes, err = run_jobs([job])
    assert codes == [[2, 2]]
    assert err.count("2 processes would train Wan on CPUs, for PyTorch finds no GPU") == 1


def test_words_that_are_no_camera_s_are_said_before_training(arguments, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(prompt=prompt, split=split)) + "\n" for prompt, split in (
        ("push_in a hill", "train"), ("A hill", "train"), ("Zoom in on a hill", "train"), ("A lake", "test"))))
    given = ["--prompts", str(tmp_path / "p.jsonl"), "--runs", str(tmp_path), "--name", "x", "--dynamic-steps", "0",
             "--depth-anything", str(tmp_path / "nowhere")]  # it ends where the judges are loaded
    codes, err = run_jobs([dict(args=[*arguments, *given], before="import sys; sys.stdout = sys.stderr")])
    assert codes == [[2]]
    assert "'Zoom in' is not a camera motion here" in err
    assert "2 of 3 training prompts ask for a camera that stands still" in err


def test_a_fifth_reward_is_a_function_and_a_line_of_the_table(arguments, tmp_path, monkeypatch):
    """It gets its option, is logged with its std, and counts by its weight."""
    def brightness(judges, clip):
        return clip.video.mean()

    monkeypatch.setitem(TERMS, "brightness", Term("brightness", "S_bright", (), brightness, three_d=True))
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "1"]
    assert train.main([*base, "--name", "with", "--brightness", "2"]) == 0
    [row] = metrics(tmp_path / "with")
    assert math.isfinite(row["brightness"]) and math.isfinite(row["brightness_std"])
    assert row["three_d"] == pytest.approx(sum_3d(row) + 2 * row["brightness"], abs=1e-5)
    assert train.main([*base, "--name", "without", "--brightness", "0"]) == 0
    [row] = metrics(tmp_path / "without")
    assert row["brightness"] is row["brightness_std"] is None
    assert row["three_d"] == pytest.approx(sum_3d(row), abs=1e-5)


def test_a_step_of_failed_rewards_stops_the_run(arguments, tmp_path, capsys):
    """Videos of one frame cannot be reconstructed: every 3D reward fails."""
    evaluation = ["--eval-every", "1", "--eval-prompts", "2"]
    given = [*arguments, "--runs", str(tmp_path), "--name", "failed", "--frames", "1", *evaluation]
    assert train.main(given) == 2
    error = capsys.readouterr().err
    assert "rewards failed, more than --max-masked" in error
    assert "traj: ValueError: one frame shows no camera path" in error
    evaluated = json.loads((tmp_path / "failed" / "eval.jsonl").read_text())
    assert evaluated["masked"] == 2 and evaluated["total"] is None
    assert not list((tmp_path / "failed" / "checkpoints").iterdir())


def test_a_run_goes_on_where_a_reward_fails(arguments, tmp_path, monkeypatch):
    """One of four videos a step, all that --max-masked allows: counted, and the other group is trained on."""
    calls = []

    def flaky(judges, clip):
        calls.append(True)
        if len(calls) % 4 == 1:
            raise ValueError("no")
        return clip.video.mean()

    monkeypatch.setitem(TERMS, "flaky", Term("flaky", "S_flaky", (), flaky, three_d=False))
    given = "--groups 2 --total-steps 2 --meta 0 --recon 0 --traj 0 --flaky 3 --max-masked .25 --name x"
    assert train.main([*arguments, "--runs", str(tmp_path), *given.split()]) == 0
    for row in metrics(tmp_path / "x"):
        assert (row["masked"], row["flat_groups"], row["skipped"]) == (1, 1, 0)
        assert math.isfinite(row["total"]) and row["grad"][0] > 0


def test_an_evaluation_is_of_the_averaged_weights_and_stands_once_in_its_log(arguments, tmp_path):
    c = parse_arguments([*arguments, "--runs", str(tmp_path), "--meta", "0", "--recon", "0", "--traj", "0"])
    policy, judges = Policy(c, Processes("cpu")), train.rewards_for(c)

    def evaluated(step):
        train.evaluate(policy, judges, ["push_in a hill"], tmp_path, step)
        *before, last = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
        assert [row["step"] for row in before] == list(range(step))
        return last | dict(step=0)

    first = evaluated(0)
    with torch.no_grad():
        for name, p in policy.trained.items():
            p += .1 * torch.randn(p.shape, generator=generator(name))
    assert evaluated(1) == first
    policy.average = {name: p.detach().clone() for name, p in policy.trained.items()}
    assert evaluated(1) != first


def test_a_masked_video_does_not_move_the_advantages_of_the_others():
    """Its critic failed; its other terms would shift the group's std, and the rest's advantages with
    it."""
    group = torch.zeros(4, dtype=torch.long)
    weights = dict.fromkeys(TERMS, 1.0)

    def compared(count, meta):
        terms = dict(meta=torch.tensor(meta), recon=torch.tensor([.90, .95, .96, .20]),
                     traj=torch.tensor([.1, .5, .4, .9]), general=torch.tensor([1.0, 1.2, 1.1, 9.0]))
        terms = {name: values[:count] for name, values in terms.items()}
        _, terms["total"] = combine(terms, weights)
        return train.step_advantages(Config(), terms, group[:count])[0]

    without, masked = compared(3, [.5, .6, .7]), compared(4, [.5, .6, .7, math.nan])
    assert torch.equal(masked[:3], without) and masked[3] == 0 and without.abs().min() > 0


def test_shuffled_deals_out_each_groups_advantages_at_random():
    """A group keeps its advantages, and they say nothing of who earned them: over many steps each member gets
    each of them about as often."""
    c = Config(groups=2, members=4)
    A, masked = torch.tensor([-1.5, -.5, .5, 1.5, 10, 20, 30, 40]), torch.zeros(8, dtype=torch.bool)
    dealt = torch.stack([train.dealt_at_random(c, A, masked, step, dynamic=False) for step in range(400)])
    assert torch.equal(dealt.view(400, 2, 4).sort(-1).values, A.view(2, 4).expand(400, 2, 4))
    shares = torch.stack([(dealt == a).float().mean(0) for a in A])  # of an advantage, to each place
    assert (shares[:4, :4] - .25).abs().max() < .08 and (shares[4:, 4:] - .25).abs().max() < .08
    orders = dealt.view(400, 2, 4).argsort(-1)
    assert (orders[:, 0] == orders[:, 1]).all(-1).float().mean() < .1  # each group's own: 1 in 24 is alike
    assert torch.equal(train.dealt_at_random(c, A, masked, 7, dynamic=False), dealt[7])  # so a resumed run repeats it
    assert not torch.equal(train.dealt_at_random(c, A, masked, 7, dynamic=True), dealt[7])
    A[2], masked[2] = 0, True
    dealt = torch.stack([train.dealt_at_random(c, A, masked, step, dynamic=False) for step in range(20)])
    assert (dealt[:, 2] == 0).all() and (dealt[:, [0, 1, 3]] != 0).all() and dealt[:, :4].std(0)[3] > 0


def test_a_shuffled_run_scores_the_same_and_learns_another_thing(arguments, tmp_path):
    rows = {}
    for switch in ("--shuffled", "--no-shuffled"):
        given = ["--name", switch[2:], "--total-steps", "1", "--members", "4", switch]
        assert train.main([*arguments, "--runs", str(tmp_path), *given]) == 0
        [rows[switch]] = metrics(tmp_path / switch[2:])
    dealt, earned = rows["--shuffled"], rows["--no-shuffled"]
    assert all(dealt[name] == earned[name] for name in (*TERMS, "total", "advantage_max"))
    assert dealt["advantage_abs"] == pytest.approx(earned["advantage_abs"])
    assert dealt["grad"] != pytest.approx(earned["grad"])


def test_a_dynamic_phase_without_dynamic_prompts_is_an_error(arguments, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("push_in a hill\npan_left a lake\n")
    given = [*arguments, "--runs", str(tmp_path), "--name", "x", "--prompts", str(tmp_path / "prompts.txt")]
    assert train.main(given) == 2
    assert "holds no dynamic prompts" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_one_term_that_decides_alone_is_said(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"

    def said(rows):
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train.warn_of_one_term(log)
        printed = capsys.readouterr()
        return printed.out + printed.err

    rows = [dict(step=i, phase="main", share_general=.9, share_meta=.1) for i in range(20)]
    assert "R_gen alone has decided more than 70% of the advantages for 20 steps" in said(rows)
    assert said(rows[:19]) == ""
    before = [dict(row, share_general=.5, step=row["step"] - 5) for row in rows[:5]]
    assert "for 20 steps" in said([*before, *rows])  # wherever the stretch begins
    # said once, not in every step that follows
    assert said([*rows, dict(step=20, phase="dynamic", share_general=1.0)]) == ""
    assert said([*rows[:19], dict(step=19, phase="main", share_general=.5, share_meta=.5)]) == ""


def test_every_step_logs_who_decided(arguments, tmp_path):
    given = ["--name", "x", "--rectify", "--train-prompts", "1"]
    assert train.main([*arguments, "--runs", str(tmp_path), *given]) == 0
    main, _, dynamic = metrics(tmp_path / "x")
    assert main["prompts"] == 4 * [0]
    assert sum(main[f"share_{name}"] for name in TERMS) == pytest.approx(1)
    assert dynamic["share_general"] == pytest.approx(1)
    assert "share_meta" not in dynamic
    assert dynamic["flat_groups"] == 0 and dynamic["advantage_abs"] > .1  # R_gen alone, and it teaches


# ------------------------------------------------------------------------------ gradients that are not finite

def patched_run(monkeypatch, given, name, **methods):
    """A run in which Policy's methods are wrapped: methods {name: function(call number, method, policy,
    ...)}."""
    with monkeypatch.context() as patch:
        for method, wrapper in methods.items():
            original, calls = getattr(train.Policy, method), []

            def wrapped(policy, *arguments, original=original, calls=calls, wrapper=wrapper):
                calls.append(True)
                return wrapper(len(calls), original, policy, *arguments)

            patch.setattr(train.Policy, method, wrapped)
        return train.main([*given, "--name", name])


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(arguments, tmp_path, monkeypatch):
    """NaN at the third of four steps: the weights end finite, equal to the bit to those of a run in which that
    step's update is left out, and the log counts one skipped step."""
    given = [*arguments, "--runs", str(tmp_path), "--total-steps", "4", "--main-steps", "4",
             "--dynamic-steps", "0", "--groups", "2"]

    def poisoned(call, sum_gradients, policy):
        norm = sum_gradients(policy)
        if call == 3:
            for p in policy.trained.values():
                p.grad.fill_(math.nan)
            return math.nan
        return norm

    def left_out(call, step, policy, lr, norm):
        if call == 3:
            policy.optimiser.zero_grad(set_to_none=True)
            return True
        return step(policy, lr, norm)

    assert patched_run(monkeypatch, given, "poisoned", sum_gradients=poisoned) == 0
    assert patched_run(monkeypatch, given, "left_out", step=left_out) == 0
    assert [row["skipped"] for row in metrics(tmp_path / "poisoned")] == [0, 0, 1, 0]
    found, expected = weights(tmp_path / "poisoned"), weights(tmp_path / "left_out")
    assert largest_difference(found, expected) == 0
    assert all(values.isfinite().all() for values in found.values())


def test_gradients_that_stay_not_finite_stop_the_run(arguments, tmp_path, monkeypatch, capsys):
    def poisoned(call, sum_gradients, policy):
        sum_gradients(policy)
        return math.nan

    given = [*arguments, "--runs", str(tmp_path), "--total-steps", "9", "--max-skipped", "2",
             "--groups", "2"]
    for _ in range(2):  # when it goes on, the two that are logged still count
        assert patched_run(monkeypatch, given, "stopped", sum_gradients=poisoned) == 2
        assert "3 gradients in a row were not finite" in capsys.readouterr().err
        assert len(metrics(tmp_path / "stopped")) == 2


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(arguments, tmp_path, monkeypatch, capsys):
    def ruined(call, step, policy, lr, norm):
        next(iter(policy.trained.values())).data.fill_(math.inf)
        return True

    assert patched_run(monkeypatch, [*arguments, "--runs", str(tmp_path)], "ruined", step=ruined) == 2
    assert "holds NaN or infinite values" in capsys.readouterr().err
    assert not list((tmp_path / "ruined" / "checkpoints").glob("step_*"))
    assert not (tmp_path / "ruined" / "lora.safetensors").exists()


# ----------------------------------------------------------------------------------------------- how it ends

OUT_OF_MEMORY = ("out of memory; run fewer videos at once with a smaller --batch, or add --checkpointing or "
                 "--offload")


def interrupted(*_):
    raise KeyboardInterrupt


def too_much(*_):
    bytearray(2 ** 62)


def too_much_for_torch(*_):
    torch.empty(2 ** 50)


def too_much_for_cuda(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")


@pytest.mark.parametrize("happens, status, line", [
    (interrupted, 130, "interrupted; start it again to go on from its newest checkpoint"),
    (too_much, 2, OUT_OF_MEMORY),
    (too_much_for_torch, 2, OUT_OF_MEMORY),
    (too_much_for_cuda, 2, OUT_OF_MEMORY)])
def test_ctrl_c_and_too_little_memory_end_with_one_line(happens, status, line, arguments, tmp_path,
                                                        monkeypatch, capsys):
    monkeypatch.setattr(train, "read_prompts", happens)
    assert train.main([*arguments, "--runs", str(tmp_path), "--name", "x"]) == status
    assert capsys.readouterr().err.strip() == "train.py: " + line


# ------------------------------------------------------------------------- the loss, the advantages and their options

@pytest.mark.parametrize("switch", ["--no-rectify", "--rectify", "--ratio-norm"])
def test_the_loss_is_the_clipped_surrogate_plus_the_kl(switch, arguments, tmp_path):
    """Of two members after the weights have moved, the second beyond the clip; by the equations, of public parts."""
    given = ["--runs", str(tmp_path), "--kl", "100", "--clip", ".002", "--steps", "4", "--noisy-steps", "3", switch]
    c = parse_arguments([*arguments, *given])
    policy, prompt = Policy(c, Processes("cpu")), "push_in a hill"
    (batch, _, _), = train.roll_out_groups(policy, 0, False, [(7, prompt)], [range(1, 2)], [(0, range(2))])
    batch.advantages, (step,) = torch.tensor([1.5, -.5]), batch.sde_steps
    with torch.no_grad():
        for name, p in policy.trained.items():
            p += .02 * torch.randn(p.shape, generator=generator(name))
    loss, note = train.policy_loss(policy, batch, step)

    sigma, sigma_next = batch.levels[1:3]
    (mean, std), (reference, _) = (transition(step.x, velocity(step.x, sigma), sigma, sigma_next, c.eta, c.sde)
                                   for velocity in (policy.velocity(prompt), policy.reference_velocity(prompt)))
    log_ratio = log_prob(step.x_next, mean, std) - step.logp
    if c.ratio_norm:
        log_ratio = std * (log_ratio + ((mean - step.mean) ** 2 / (2 * std ** 2)).flatten(1).mean(1))
    ratio, A = log_ratio.exp(), batch.advantages
    expected = -torch.minimum(A * ratio, A * ratio.clamp(1 - c.clip, 1 + c.clip)).mean()
    if c.rectify:
        expected = expected * rectification(batch.levels, 3, c.eta, c.sde)[1]
    distance = ((mean - reference) ** 2 / (2 * std ** 2)).mean()
    assert loss.item() == pytest.approx((expected + c.kl * distance).item(), rel=1e-5)
    assert note["kl"] == pytest.approx(distance.item(), rel=1e-5)
    of_loss, of_equations = (torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.trained.values()))])
                             for value in (loss, expected + c.kl * distance))
    assert (of_loss - of_equations).norm() < 1e-3 * of_equations.norm()
    moved = ((mean - step.mean) / std).square().flatten(1).mean(1).sqrt()
    assert note["drift"] == pytest.approx(moved.max().item(), rel=1e-5) and note["drift"] > 1e-3


@pytest.mark.parametrize("updates", ["1", "2"])
def test_an_update_is_the_mean_over_its_groups_steps_and_members(updates, arguments, tmp_path):
    """Rolled out video by video. The norm of the first gradient, by autograd of the mean of all losses."""
    given = "--groups 2 --batch 1 --steps 4 --noisy-steps 3 --window 2 --updates".split()
    c = parse_arguments([*arguments, "--runs", str(tmp_path), *given, updates])
    policy, windows = Policy(c, Processes("cpu")), [range(0, 2), range(1, 3)]
    chosen, (work,) = [(0, "push_in a hill"), (1, "pan_left a lake")], train.deal(c, 1)
    batches = [batch for batch, _, _ in train.roll_out_groups(policy, 0, False, chosen, windows, work)]
    for i, batch in enumerate(batches):
        batch.advantages = torch.tensor([1.0 + i])
    first = [batch for batch in batches if train.update_of(c, batch.group) == 0]
    losses = [train.policy_loss(policy, batch, step)[0] for batch in first for step in batch.sde_steps]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(policy.trained.values()))
    _, norms, skipped = train.update(policy, batches, 0, 0)
    assert norms[0] == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4)
    assert len(norms) == int(updates) and skipped == 0

    batches[0].sde_steps[0].mean += 1  # what the rollout said is not what the update finds
    with pytest.raises(RuntimeError, match="rollout and update run the model differently"):
        train.update(policy, batches, 1, 0)


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_advantages_are_of_the_sum_that_is_asked_for(standardised, pooled):
    draw, group_ids = torch.Generator().manual_seed(0), torch.arange(2).repeat_interleave(4)
    terms = {name: scale * torch.randn(8, generator=draw) for name, scale in zip(TERMS, (.1, 1, 10, .3))}
    twice = dict.fromkeys(TERMS, 1.0) | dict(recon=2.0)
    c = Config(standardise=standardised, pooled=pooled, adv_clip=.9, weights=twice)  # their RMS is 1: it bites
    _, terms["total"] = combine(terms, c.weights)

    def scaled(x):
        x = x.view(2, 4) - x.view(2, 4).mean(1, keepdim=True)
        variance = x.square().mean(1, keepdim=True)
        return (x / (variance.mean() if pooled else variance).sqrt()).flatten()

    total = sum(c.weights[name] * (scaled(terms[name]) if standardised else terms[name]) for name in TERMS)
    expected = scaled(total).clamp(-.9, .9)
    assert torch.allclose(train.step_advantages(c, terms, group_ids)[0], expected, atol=1e-3)


def test_a_released_rollout_pushes_the_carried_noise_into_white(arguments, tmp_path):
    c = parse_arguments([*arguments, "--runs", str(tmp_path), "--released"])
    policy, path, whose = Policy(c, Processes("cpu")), camera_path(["push_in"], 5), (0, False, 7)
    white, after_step = train.first_noise(policy, path, whose, [0, 1])
    c.released = False
    carried, _ = train.first_noise(policy, path, whose, [0, 1])
    assert torch.equal(after_step(white, 0), released_push(white, carried)(white, 0))
    assert not torch.equal(after_step(white, 0), white)


@pytest.mark.parametrize("switch", ["--no-shared", "--shared"])
def test_a_released_rollout_is_pushed_after_every_step(switch, arguments, tmp_path, monkeypatch):
    """Those before the window, which members may share, the window's own, and those after it."""
    pushed = []
    monkeypatch.setattr(train, "released_push", lambda *_: lambda x, i: pushed.append(i) or x)
    c = parse_arguments([*arguments, "--runs", str(tmp_path), "--released", switch])
    list(train.roll_out_groups(Policy(c, Processes("cpu")), 0, False, [(7, "push_in a hill")], [range(1, 2)],
                               [(0, range(2))]))
    assert pushed == [0, 1, 2]


@pytest.mark.parametrize("switch", ["--no-shared", "--shared"])
def test_a_rollout_begins_with_noise_that_its_path_carries(switch, arguments, tmp_path):
    """Drawn by (seed, step, phase, prompt, member, purpose) and nothing else; shared, all have the first's."""
    c = parse_arguments([*arguments, "--runs", str(tmp_path), "--seed", "3", "--degradation", ".6", switch])
    policy, key = Policy(c, Processes("cpu")), (3, 4, "dynamic", 7)
    (batch, _, _), = train.roll_out_groups(policy, 4, True, [(7, "move_left a hill")], [range(1)], [(0, range(2))])
    noise, sde = ([generator(*key, member, purpose) for member in (0, 1)] for purpose in ("noise", "sde"))
    carried = initial_noise(policy.wan, camera_path(["move_left"], 5), 32, 32, noise, True, .6)
    if c.shared:
        carried = carried[[0, 0]]
    step, = batch.sde_steps
    assert torch.equal(step.x, carried)
    _, std = transition(step.x, step.x, *batch.levels[:2], c.eta, c.sde)
    drawn = torch.stack([torch.randn(step.x.shape[1:], generator=g) for g in sde])
    assert torch.allclose((step.x_next - step.mean) / std, drawn, atol=1e-4)


def test_a_rollout_asks_for_the_path_at_its_strength(arguments, tmp_path):
    c = parse_arguments([*arguments, "--runs", str(tmp_path), "--strength", ".5"])
    (_, _, path), = train.roll_out_groups(Policy(c, Processes("cpu")), 0, False, [(7, "push_in a hill")], [range(1)],
                                   [(0, range(2))])
    assert torch.equal(path, camera_path(["push_in"], 5, .5))


def test_a_rollout_that_the_update_does_not_repeat_stops_the_run():
    for dtype, small, large in (("float32", 5e-5, 5e-4), ("bfloat16", 5e-3, 5e-2)):
        train.stop_if_drifted(Config(dtype=dtype), [dict(drift=small)])
        train.stop_if_drifted(Config(dtype=dtype, guidance=20.0), [dict(drift=large)])  # which multiplies rounding
        with pytest.raises(RuntimeError, match="rollout and update run the model differently"):
            train.stop_if_drifted(Config(dtype=dtype), [dict(drift=0.0), dict(drift=large), dict(drift=0.0)])


def test_options_reach_the_rewards(checkpoint):
    given = "--traj-alpha 2 --traj-beta 3 --views 4 --frames-seen 3 --general-center 1 --general-spread 2 --recon .5"
    models = "--depth-anything a --critic b --preference c --lpips alex"
    options = [*given.split(), *models.split()]
    made = train.rewards_for(parse_arguments(["--model", str(checkpoint), "--offload", *options]))
    assert (made.alpha, made.beta, made.views, made.frames_seen, made.center, made.spread) == (2, 3, 4, 3, 1, 2)
    assert made.offload and made.weights["recon"] == .5
    assert made.sources == dict(depth_anything="a", critic="b", preference="c", lpips="alex")


def test_a_common_window_is_one_for_all_groups():
    for common in (False, True):
        c = Config(steps=10, window=1, noisy_steps=9, common_window=common)
        assert (len({train.step_window(c, 0, False, key) for key in range(20)}) == 1) == common
        assert len({train.step_window(c, step, False, 0) for step in range(20)}) > 4
