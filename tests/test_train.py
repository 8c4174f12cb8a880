import dataclasses
import json
import math

import pytest
import torch
from runs import largest_difference, metrics, run_jobs, short_run, weights

import train
from grpo import advantages, standardise
from rewards import TERMS, Term, combine
from train import Config, check, parse_arguments, step_prompts


@pytest.fixture(scope="module")
def arguments(checkpoint, twins):
    return short_run(checkpoint, twins)


# ---------------------------------------------------------------------------------------------------- options

def test_presets_hold_the_published_values():
    small, large, tiny = (parse_arguments(["--preset", preset]) for preset in ("small", "large", "tiny"))
    check(small, 48)
    check(large, 96)  # as docs/real_size.md launches it
    for c in (small, large):
        assert (c.members, c.frames, c.height, c.width, c.steps, c.guidance) == (8, 81, 480, 832, 50, 5.0)
        assert (c.lora_rank, c.lora_alpha, c.lr, c.clip, c.kl, c.adv_clip) == (32, 64, 1e-4, 1e-3, .004, 5)
        assert (c.ema_decay, c.ema_every, c.eta) == (.9, 8, .7)
        assert (c.main_steps, c.dynamic_steps, c.degradation) == (100, 50, .35)
        assert c.weights == dict(meta=1, recon=1, traj=1, general=1)
        assert not c.standardise
        assert c.lora is None
    assert small.groups == 48
    assert "1.3B" in small.model
    assert "14B" in large.model
    assert large.parallel == "fsdp"
    check(tiny, 1)
    assert tiny.lora.endswith("tiny/web")
    assert tiny.weights == dict(meta=1, recon=2, traj=1, general=1)


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
    "--members 1": "--members must be at least 2",
    "--eta 0": "--eta must be above 0",
    "--window 9": "a window of 9 steps does not fit",
    "--frames 6": "--frames must be 4k+1, got 6; try 5",
    "--width 40": "--width must be a multiple of 16, got 40; try 32",
    "--lora-rank 0": "--lora-rank must be at least 1, got 0",
    "--prompts bad.jsonl": "bad.jsonl, line 2: it needs a non-empty prompt",
    "--prompts none.txt": "cannot be read",
    "--critic /nowhere": "no model folder",
    "--lora /nowhere": "no LoRA file",
    "--batch 3": "--members must be a multiple of --batch",
    "--updates 3": "--groups must be a multiple of --updates",
    "--sde odd": "--sde must be one of"}


@pytest.mark.parametrize("options, message", BAD.items())
def test_bad_settings_are_one_sentence(options, message, arguments, tmp_path, monkeypatch, capsys):
    """Before any work: not even the run's folder is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "push_in a hill", "split": "train"}\n{"prompt": ""}\n')
    assert train.main([*arguments, "--name", "bad", *options.split()]) == 2
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


def test_the_learning_rate_falls_to_nothing_over_the_last_share_of_steps():
    c = Config(lr=.1, total_steps=100, decay=.4)
    rates = [train.learning_rate(c, step) for step in (0, 60, 80, 99)]
    assert rates == pytest.approx([.1, .1, .05, .0025], abs=1e-9)
    assert train.learning_rate(Config(lr=.1, total_steps=2), 1) == .1  # no decay


def test_a_decaying_run_is_bound_to_its_length(arguments, tmp_path):
    base = [*arguments, "--runs", str(tmp_path)]
    falling = [*base, "--name", "falling", "--decay", "1"]
    codes, err = run_jobs([dict(args=[*base, "--name", "constant", "--decay", "0"]), dict(args=falling),
                           dict(args=[*falling, "--total-steps", "4"])])
    assert codes == [[0], [0], [2]]
    assert "was started with --total-steps 3, not 4" in err  # another length is another rate
    constant, falling = metrics(tmp_path / "constant"), metrics(tmp_path / "falling")
    assert constant[:2] == falling[:2]  # the first update is the same, the second is not
    assert constant[2]["kl"] > falling[2]["kl"] > 0


# ------------------------------------------------------------------------------------------------- whole runs

def sum_3d(row):
    return row["meta"] + row["recon"] + row["traj"]


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
    assert all(math.isfinite(row["total"]) for row in rows)
    assert len(list((folder / "eval" / "000002").glob("*.mp4"))) == 3
    assert (folder / "lora_comfyui.safetensors").exists()
    row = metrics(folder)[1]
    assert len(row["grad"]) == 2
    assert row["ratio_max"] != 1
    assert row["three_d"] == pytest.approx(sum_3d(row), abs=1e-5)


def test_a_fifth_reward_is_a_function_and_a_line_of_the_table(arguments, tmp_path, monkeypatch):
    """It gets its option, is logged with its spread, and counts by its weight."""
    def brightness(judges, clip):
        return clip.video.mean()

    monkeypatch.setitem(TERMS, "brightness", Term("brightness", "S_bright", (), True, brightness))
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
    assert train.main([*arguments, "--runs", str(tmp_path), "--name", "failed", "--frames", "1"]) == 2
    assert "rewards failed, more than --max-masked" in capsys.readouterr().err
    assert not list((tmp_path / "failed" / "checkpoints").iterdir())


def test_a_masked_video_does_not_move_the_advantages_of_the_others():
    """Its critic failed; its other terms would shift the group's spread, and the rest's advantages with
    it."""
    group = torch.zeros(4, dtype=torch.long)
    weights = dict.fromkeys(TERMS, 1.0)

    def compared(count, meta):
        terms = dict(meta=torch.tensor(meta), recon=torch.tensor([.90, .95, .96, .20]),
                     traj=torch.tensor([.1, .5, .4, .9]), general=torch.tensor([1.0, 1.2, 1.1, 9.0]))
        terms = {name: values[:count] for name, values in terms.items()}
        _, terms["total"] = combine(terms, weights)
        terms = train.without_masked(terms)
        voices = {name: standardise(terms[name], group[:count]) for name in TERMS}
        return advantages(combine(voices, weights)[1], group[:count])

    without, masked = compared(3, [.5, .6, .7]), compared(4, [.5, .6, .7, math.nan])
    assert torch.equal(masked[:3], without) and masked[3] == 0 and without.abs().min() > 0


def test_a_dynamic_phase_without_dynamic_prompts_is_an_error(arguments, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("push_in a hill\npan_left a lake\n")
    given = [*arguments, "--runs", str(tmp_path), "--name", "x", "--prompts", str(tmp_path / "prompts.txt")]
    assert train.main(given) == 2
    assert "holds no dynamic prompts" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", ["--lr", "--kl", "--grad-clip", "--ema-decay", "--general-spread"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_numbers_that_would_ruin_the_weights_are_refused(option, value, arguments, tmp_path, capsys):
    assert train.main([*arguments, "--runs", str(tmp_path), "--name", "x", option, value]) == 2
    assert option in capsys.readouterr().err.splitlines()[-1]
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
    assert train.main([*arguments, "--runs", str(tmp_path), "--name", "x", "--rectify"]) == 0
    main, _, dynamic = metrics(tmp_path / "x")
    assert sum(main[f"share_{name}"] for name in TERMS) == pytest.approx(1)
    assert dynamic["share_general"] == pytest.approx(1)
    assert "share_meta" not in dynamic


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
    """NaN at the third of six steps: the weights end finite, equal to the bit to those of a run in which that
    step's update is left out, and the log counts one skipped step."""
    given = [*arguments, "--runs", str(tmp_path), "--total-steps", "6", "--main-steps", "6",
             "--dynamic-steps", "0"]

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
    assert [row["skipped"] for row in metrics(tmp_path / "poisoned")] == [0, 0, 1, 0, 0, 0]
    found, expected = weights(tmp_path / "poisoned"), weights(tmp_path / "left_out")
    assert largest_difference(found, expected) == 0
    assert all(values.isfinite().all() for values in found.values())


def test_gradients_that_stay_not_finite_stop_the_run(arguments, tmp_path, monkeypatch, capsys):
    def poisoned(call, sum_gradients, policy):
        sum_gradients(policy)
        return math.nan

    given = [*arguments, "--runs", str(tmp_path), "--total-steps", "9", "--max-skipped", "2"]
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
