import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from runs import run_jobs

import ablate
from ablate import (CELLS, CHOICES, COLUMNS, KINDS, PAPER_METRICS, TITLES, VALUES, Result, main, main_steps, probe_scored,
                    scorings, smoothed)
from eval import interval
from grpo import draw_window
from prompts import read_prompts
from rewards import TERMS, Term
from sample import generator
from train import parse_arguments as training_arguments
from train import rollout_passes
from weights import read_json, write_json

PAGES = [ROOT / "README.md", ROOT / "docs" / "learning_proof.md"]


# ------------------------------------------------------------------------------------------------------ cells

def config_of(name):
    return training_arguments(CELLS[name].training.split())


def test_every_cell_is_a_training_that_exists():
    """The cells' options are options of train.py, and each changes what it says it leaves out."""
    full = config_of("full")
    for name, cell in CELLS.items():
        assert (config_of(name) == full) == (name in ("base", "full", "base_no_transport")), name
        assert cell.against in CELLS
    assert [term for term, weight in config_of("no_3d").weights.items() if weight == 0] == ["meta", "recon", "traj"]
    assert config_of("no_transport").degradation == 1


def compute(c):
    """-> videos and passes of the DiT of a training: of its rollouts, as drawn, and of its updates, a backward pass
    counted as two; the KL takes a pass of the untouched model."""
    sampled = 0
    for step in range(400):
        window = draw_window(generator(0, step), c.steps, c.window, c.noisy_steps)
        before = window[0] if c.shared else 0
        sampled += (before + c.members * (c.steps - before)) / 400
    update = c.members * c.window * (3 + bool(c.kl))
    groups = c.total_steps * c.groups * (1 if c.guidance == 1 else 2)
    return c.total_steps * c.groups * c.members, groups * (sampled + update)


def test_choices_are_compared_at_equal_compute():
    """As many videos as the full cell, or as many passes of the DiT; and passes within what a window costs."""
    videos_full, passes_full = compute(config_of("full"))
    for name in CHOICES:
        videos, passes = compute(config_of(name))
        if name in ("steps_6", "steps_20"):
            assert videos != videos_full
            assert abs(passes / passes_full - 1) < .03, name
        else:
            assert videos == videos_full, name
            assert abs(passes / passes_full - 1) < .27, name
        if name == "guidance_2":
            assert abs(passes / passes_full - 1) < .03


def test_the_passes_of_a_rollout_are_those_that_training_counts():
    """`compute` above counts videos, training counts batches: with a group a video they are the same."""
    c = dataclasses.replace(config_of("full"), members=1, groups=1, total_steps=1, kl=0)
    windows = [draw_window(generator(0, step), c.steps, c.window, c.noisy_steps) for step in range(400)]
    mean = np.mean([rollout_passes(c, [window], [(0, range(1))]) for window in windows])
    assert compute(c)[1] == pytest.approx(mean + c.window * 3)


# ------------------------------------------------------------------------------------------------------ a run

@pytest.fixture
def model(checkpoint, tmp_path):
    """A small random model that is sampled at 5 frames of 64x64, which the probe can read."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    sampling = dict(frames=5, height=64, width=64, steps=1, guidance=1.0, fps=8)
    (folder / "sampling.json").write_text(json.dumps(sampling))
    return folder


def arguments(model, out):
    return ["--num", "2", "--processes", "1", "--out", str(out / "results"), "--runs", str(out / "runs"),
            "--model", str(model), "--groups", "1", "--members", "2", "--steps", "2", "--noisy-steps", "1",
            "--window", "1", "--lora-rank", "2", "--total-steps", "2", "--main-steps", "1", "--eval-every", "2",
            "--eval-prompts", "1", "--lr", ".1", "--ema-decay", "0", "--views", "2"]


@pytest.fixture
def forked(monkeypatch):
    """train.py and eval.py run where they are imported already; dynamic prompts' eval.py and the probe are launched."""
    launch = ablate.launch

    def launched(a, *arguments, **options):
        script, *rest = map(str, arguments)
        if script not in (str(ablate.ROOT / "train.py"), str(ablate.ROOT / "eval.py")) or "dynamic" in rest:
            return launch(a, *arguments, **options)
        [[code]], _ = run_jobs([dict(main=Path(script).stem, args=rest)])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(ablate, "launch", launched)


def test_a_cell_is_trained_scored_and_written_once(model, forked, tmp_path, capfd):
    command = ["run", "no_traj", *arguments(model, tmp_path), "--seed", "3"]
    assert main(command) == 0
    file = tmp_path / "results" / "no_traj" / "seed_3.json"
    result = read_json(file, Result)

    # what was trained, where, and for how long
    folder = tmp_path / "runs" / "no_traj-3"
    assert result.config["weights"]["traj"] == 0
    assert result.config["seed"] == 3
    assert result.config["total_steps"] == 2
    assert "lr" in result.config
    assert "eta" not in result.config, "the preset's"
    assert "cores, PyTorch" in result.machine
    assert len(result.commit.removesuffix("+changes")) == 40
    assert all(minutes > 0 for minutes in result.minutes.values())
    assert list(result.minutes) == ["training", "test", "dynamic", "probe"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert result.seconds["reward"] == pytest.approx(np.mean([s["machine"]["seconds"]["reward"] for s in steps]),
                                                     rel=1e-3)
    assert result.curve["recon"] == [pytest.approx(steps[0]["recon"], rel=1e-3), None], "a dynamic step has none"
    assert result.curve["traj"] == [None, None]
    assert [row["step"] for row in result.curve["evaluations"]] == [0, 2]

    # what was scored: every video, by prompts and by what moves in them
    assert result.failed == {"test": "0 failed", "dynamic": "0 failed"}
    for way in ("test", "dynamic"):
        rows = [json.loads(line) for line in (folder / way / "metrics.jsonl").read_text().splitlines()]
        assert json.loads((folder / way / "summary.json").read_text())["lora"] == str(folder)
        for name in VALUES:
            found = np.array(result.scored[way].values[name], dtype=float)
            true = np.array([row.get(name) for row in rows], dtype=float)
            assert found == pytest.approx(true, rel=1e-3, nan_ok=True), name
        assert result.scored[way].metrics["rot_err"] == list(interval([row["rot_err"] for row in rows]))
        assert "cam_mc_rel" in result.scored[way].metrics
    assert result.scored[KINDS[0]] == result.scored["test"]
    moving = rows[0]["prompt"].count(" that ")
    assert result.scored[KINDS[moving]] == result.scored["dynamic"]
    assert set(result.scored) == {"test", "dynamic", KINDS[0], KINDS[moving], "probe"}
    assert len(result.scored["probe"].metrics["motion"]) == 3

    # again: nothing is done
    written = file.read_text()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    capfd.readouterr()
    assert main(command) == 0
    assert capfd.readouterr().out == f"{file} is there already and is never replaced: skipped\n"
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*")} == times

    # a longer training would not be that which was scored
    assert main([*command, "--total-steps", "4", "--out", str(tmp_path / "longer")]) == 2
    assert f"{folder / 'test'} was scored with another total_steps; " in capfd.readouterr().err
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2

    # without its result: what is there is gathered again, by the same weights and scores
    file.unlink()
    assert main(command) == 0
    again = read_json(file, Result)
    assert dict.fromkeys(("test", "dynamic", "probe")).items() <= again.minutes.items()
    assert json.loads(written)["scored"] == json.loads(file.read_text())["scored"]


@pytest.mark.parametrize("options, differ", (
    ([], None),
    (["--num", "4"], "num or prompts"),
    (["--model", "{tmp}/other"], "model"),
    (["--lora", str(ROOT / "tiny" / "web")], "lora"),
    (["--prompts", "{tmp}/prompts.jsonl"], "num or prompts"),
    (["--frames", "9"], "frames"),
    (["--critic", "{tmp}/other"], "critic"),
    (["--critic", "{tmp}/qwen3_vl"], "critic"),  # of the shipped one's name
    (["--lpips", "alex"], "lpips"),
))
def test_what_was_scored_otherwise_is_not_taken(options, differ, model, tmp_path, capsys):
    """The base was scored into a result; another result of the same --runs is not made of those scores."""
    c, folder = training_arguments(arguments(model, tmp_path)[6:]), tmp_path / "runs" / "base-0"
    settings = {judge: Path(getattr(c, judge)).name for judge in ("depth_anything", "critic", "preference")}
    for way, split, num in (("longer", "test", 2), ("test", "test", 2), ("dynamic", "dynamic", 1)):
        (folder / way).mkdir(parents=True)
        prompts = read_prompts(c.prompts, split)[split][:num]
        rows = [json.dumps(dict(video=f"{k:04d}", prompt=prompt)) for k, prompt in enumerate(prompts)]
        (folder / way / "metrics.jsonl").write_text("\n".join(rows))
        write_json(folder / way / "summary.json", dict(
            videos=num, failed=0, sizes=[f"{9 if way == 'longer' else 5}x64x64"], seed=0, lpips="AlexNet",
            summary={}, model=str(model), settings=settings | dict(lpips=c.lpips, views=9)))
    (folder / "probe.txt").write_text("| | all |\n|---|---|\n| lora none | 0.5 |\n")
    (tmp_path / "prompts.jsonl").write_text("".join(
        json.dumps(dict(prompt=f"push_in {split} {i}", split=split)) + "\n"
        for split in ("train", "dynamic", "test") for i in range(4)))
    shutil.copytree(model, tmp_path / "other")
    command = ["run", "base", *arguments(model, tmp_path), *(word.format(tmp=tmp_path) for word in options)]
    file = tmp_path / "results" / "base" / "seed_0.json"
    if differ is None:
        assert main(command) == 0
        assert read_json(file, Result).minutes == dict.fromkeys(("longer", "test", "dynamic", "probe"))
    else:
        assert main(command) == 2
        assert capsys.readouterr().err == (
            f"ablate.py: {folder / 'longer'} was scored with another {differ}; give another --runs, or delete "
            f"longer, test, dynamic and probe.txt in {folder}\n")
        assert not file.exists()


def test_every_cell_is_scored_by_its_own_weights():
    """The base by the adapter that training starts from; longer videos of base and full alone; the probe reads the
    tiny world's prompts alone; and without transport nothing is transported."""
    c = training_arguments([])
    ways = {name: scorings(name, c, Path("runs/x"), 100) for name in CELLS}
    for name, commands in ways.items():
        longer = ["longer"] if name in ("base", "full") else []
        assert list(commands) == [*longer, "test", "dynamic", "probe"]
        for command in commands.values():
            adapter = command[command.index("--lora") + 1]
            assert adapter == (Path("runs/x") if CELLS[name].trained else c.lora)
            assert ("--no-transport" in command) == name.endswith("no_transport")
    numbers = [command[command.index("--num") + 1] for command in ways["full"].values()]
    assert numbers == [100, 100, 50, 100]
    assert ways["base"]["longer"][-1] == 33
    assert "probe" not in scorings("full", dataclasses.replace(c, prompts="prompts.jsonl"), Path("runs/x"), 100)
    untouched = scorings("base", dataclasses.replace(c, lora=None), Path("runs/x"), 100)
    assert not any("--lora" in command for command in untouched.values())
    assert config_of("clean").lora is None
    assert (ROOT / config_of("world_r1_no_transport").lora / "lora.safetensors").exists()


def test_the_base_has_no_seed_and_a_result_is_never_replaced(tmp_path, capsys):
    file = tmp_path / "base" / "seed_0.json"
    write_json(file, {})
    assert main(["run", "base", "--seed", "7", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{file} is there already and is never replaced: skipped\n"
    assert read_json(file) == {}


def test_a_training_that_is_not_at_its_end_is_not_scored(model, tmp_path, capfd):
    """Prompts without a dynamic split are found by train.py alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("push_in a box\n" * 20)
    assert main(["run", "full", *arguments(model, tmp_path), "--prompts", str(prompts)]) == 2
    error = capfd.readouterr().err.splitlines()
    assert "holds no dynamic prompts" in error[-2]
    assert error[-1] == f"ablate.py: {tmp_path}/runs/full-0 is not trained to its end; see above, and give the " \
                        "same command again"
    assert not (tmp_path / "results").exists()
    assert not list(tmp_path.glob("runs/*/test"))


@pytest.mark.parametrize("wrong, message", (
    (["--num", "1"], "--num must be at least 2, got 1"),
    (["--processes", "0"], "--processes must be at least 1, got 0"),
    (["--groups", "0"], "--groups must be at least 1, got 0"),
    (["no_3d", "--general", "0"], "weight"),
    (["--out", "{tmp}/file/x"], "cannot write"),
))
def test_what_cannot_work_does_not_begin(wrong, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["run", "full", *(word.format(tmp=tmp_path) for word in wrong)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_user_errors_are_one_sentence(capsys):
    for command, message in ((["run", "no_such"], "invalid choice: 'no_such' (choose from 'base'"),
                             (["run"], "CELL"), (["table", "--lr", "1"], "unknown argument --lr")):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert message in capsys.readouterr().err


def test_the_probes_table_is_read(tmp_path):
    """As `python -m tiny probe` prints it."""
    file = tmp_path / "probe.txt"
    file.write_text("| | wall | all | re-projection, 1 frame | 4 frames |\n|---|---|---|---|---|\n"
                    "| lora runs/x-0.5 | 1.000 [0.963, 1.000] | 0.390 [0.300, 0.488] | 0.0092 | 0.0234 |\n"
                    "\na prompt | with a bar\n")
    found = probe_scored(file)
    assert found.metrics == {"wall": [1, .963, 1], "all": [.39, .3, .488], "re-projection, 1 frame": [.0092],
                             "4 frames": [.0234]}
    assert found.values["all"] == [.39]


# ----------------------------------------------------------------------------------------------------- tables

def made_up(name, seed, rng):
    """A result with random metrics, one of them unknown."""
    scored = {}
    counts = {"test": 20, "dynamic": 10, KINDS[0]: 20, KINDS[1]: 6, KINDS[2]: 4}
    for way, count in counts.items():
        values = {metric: list(rng.normal(20, 1, count).round(3)) for metric in VALUES}
        scored[way] = dict(metrics={}, values=values)
    scored["test"]["values"]["psnr"][3] = None
    scored["probe"] = dict(metrics={}, values={"all": [.5 + .1 * seed], "motion": [.25]})
    curve = {}
    if name != "base":
        curve = {term: [.1 * seed + step for step in range(6)] for term in TERMS}
        for term in ("meta", "recon", "traj"):
            curve[term][4] = None  # a dynamic step
        curve["evaluations"] = [dict.fromkeys((*TERMS, "motion"), .5) | dict(step=step) for step in (0, 48)]
        curve["evaluations"][1]["traj"] = None if name == "no_traj" else .6 + .1 * seed
    return dict(config={}, commit="0", machine="m", minutes={}, seconds={}, failed={}, scored=scored, curve=curve)


def write_results(folder):
    """Results of base, two seeds of full, and cells: no_traj has lost PSNR and S_traj and won SSIM, no_3d lost S_traj
    in one seed and won some in the other; no_meta and cps have a seed that full has not."""
    rng = np.random.default_rng(0)
    names = (("base", 0), ("base_no_transport", 0), ("clean", 0), ("full", 0), ("full", 2), ("no_3d", 0), ("no_3d", 2), ("no_traj", 0),
             ("no_meta", 1), ("cps", 0), ("window_1", 0), ("guidance_2", 0), ("cps", 1), ("world_r1_no_transport", 0), ("shuffled", 0))
    made = {(name, seed): made_up(name, seed, rng) for name, seed in names}
    made["base", 0]["scored"]["test"]["values"]["reward_traj"] = [.5] * 8 + [.8] * 6 + [.9] * 6
    full = {seed: made["full", seed]["scored"]["test"]["values"] for seed in (0, 2)}
    for name, seed, metric, change in (("no_traj", 0, "psnr", -3), ("no_traj", 0, "ssim", 3),
                                       ("no_traj", 0, "reward_traj", -9), ("no_3d", 0, "reward_traj", -3),
                                       ("no_3d", 2, "reward_traj", .5)):
        made[name, seed]["scored"]["test"]["values"][metric] = [
            value if value is None else value + change for value in full[seed][metric]]
    for (name, seed), result in made.items():
        write_json(folder / "results" / name / f"seed_{seed}.json", result)
    return made


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The same results, their tables, and the folder with the picture."""
    folder = tmp_path_factory.mktemp("tables")
    return write_results(folder), tables_of(folder), folder


def copied_pages(tmp_path):
    return [Path(shutil.copy(page, tmp_path)) for page in PAGES]


def table_command(tmp_path, pages, out="results"):
    return ["table", "--out", str(tmp_path / out), "--pictures", str(pages[0].parent), "--pages", *map(str, pages)]


def tables_of(tmp_path):
    """-> {marker: [{column: cell}]} of the pages that the command makes."""
    pages = copied_pages(tmp_path)
    assert main(table_command(tmp_path, pages)) == 0
    found = {}
    for part in "".join(page.read_text() for page in pages).split("<!-- table: ")[1:]:
        name, _, rest = part.partition(" -->\n")
        lines = [line[2:-2].split(" | ") for line in rest.partition("<!-- end -->")[0].splitlines() if "|" in line]
        found[name] = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    return found


def in_words(values, sign=""):
    mean, low, high = (f"{round(number, 6):{sign}.{3 if sign else 4}g}" for number in interval(values))
    return f"{mean} [{low}, {high}]"


def values_of(made, name, seed, way, metric):
    return np.array(made[name, seed]["scored"][way]["values"][metric], dtype=float)


def test_the_main_tables_show_base_full_its_seeds_and_the_paired_change(tables):
    results, found, _ = tables
    for table, title, way, metric in (("main", "PSNR", "test", "psnr"),
                                      ("main", "motion, dynamic prompts", "dynamic", "motion"),
                                      ("scenes", "PSNR, one moving object", KINDS[1], "psnr")):
        row = found[table][title]
        base, first, second = (values_of(results, name, seed, way, metric)
                               for name, seed in (("base", 0), ("full", 0), ("full", 2)))
        assert row["base"] == in_words(base)
        assert row["full, 2 seeds"] == in_words((first + second) / 2)
        assert row["seeds 0, 2"] == f"{np.nanmean(first):.4g}, {np.nanmean(second):.4g}"
        assert row["change"] == in_words((first + second) / 2 - base, "+")
    for title, metric, sign in (("PSNR, held-out frames", "psnr_held_out", 1), ("epipolar error", "epipolar", -1)):
        change = values_of(results, "full", 2, "test", metric) - values_of(results, "base", 0, "test", metric)
        assert found["better"][title]["seed 2"] == f"{sum(sign * change > 0) / 20:.0%}"
    summary = found["summary"]["epipolar error, px of 256"]
    means = [np.mean([values_of(results, name, seed, "test", "epipolar") for seed in seeds])
             for name, seeds in (("base", [0]), ("base_no_transport", [0]), ("full", [0, 2]), ("world_r1_no_transport", [0]))]
    titles = ("base", "base, plain noise", "full, 2 seeds", "seed 0, plain noise")
    assert [summary[title] for title in titles] == [f"{m:.3g}" for m in means]
    assert summary["change"] == found["main"]["epipolar error"]["change"]
    row = found["main"]["probe: all"]
    assert [row[name] for name in ("base", "full, 2 seeds", "seeds 0, 2", "change")] == ["0.5", "0.6", "0.5, 0.7", "+0.1"]
    assert set(found["main"]["PSNR, longer videos"].values()) == {"PSNR, longer videos", ""}, "not scored"


def for_the_seeds(made, column, chosen=slice(None)):
    """How far two trainings are apart in 95 of 100 cases: of what is made up, full and no_3d have two seeds."""
    full, no_3d = ([np.nanmean(values_of(made, name, seed, *column)[chosen]) for seed in (0, 2)]
                   for name in ("full", "no_3d"))
    # the changes from full vary by twice the variance of a run; a variance of two is half their difference squared
    variance = (np.diff(full)[0] ** 2 / 2 + np.diff(np.subtract(no_3d, full))[0] ** 2 / 2 / 2) / 2
    return 4.302653 * np.sqrt(2 * variance)  # Student's t with two degrees of freedom


def change_in_words(each, apart):
    """Changes [(N,)] of a cell's seeds, in the lines of a table. apart: as far as seeds alone could bring it."""
    mean, low, high = interval(np.mean(each, 0))
    seeds = [np.nanmean(seed) for seed in each]
    bold = "**" if low * high > 0 and abs(mean) > apart else ""
    mean, low, high = (round(number, 12) for number in (mean, low, high))
    lines = [f"{bold}{mean:+.3g}{bold}", f"[{low:+.3g}, {high:+.3g}]"]
    if len(seeds) > 1:
        lines.append(", ".join(f"{seed:+.3g}" for seed in seeds))
    return "<br>".join(lines)


def test_a_cell_is_compared_with_its_own_seeds_and_with_the_paper(tables):
    results, found, _ = tables
    assert [label.split("<br>")[0] for label in found["ablations"]] == ["no_3d", "no_traj", "shuffled"], "seed 1 is not in full"
    assert found["data"] == found["paper_data"] == {}
    no_3d = found["ablations"]["no_3d<br>`--meta 0 --recon 0 --traj 0`<br>2 of 2 seeds"]
    no_traj = found["ablations"]["no_traj<br>`--traj 0`<br>1 of 2 seeds"]
    for row, name, seeds in ((no_3d, "no_3d", (0, 2)), (no_traj, "no_traj", (0,))):
        for title in TITLES[:7]:
            each = [values_of(results, name, seed, *COLUMNS[title]) - values_of(results, "full", seed, *COLUMNS[title])
                    for seed in seeds]
            apart = for_the_seeds(results, COLUMNS[title]) / np.sqrt(len(seeds))
            assert row[title] == change_in_words(each, apart), title
    assert no_traj["S_traj"].startswith("**-")
    assert no_3d["S_traj"].startswith("-"), "its interval is below 0, but its seeds are far apart"
    assert no_3d["S_traj"].endswith(", +0.5")
    assert no_traj["probe: motion"] == "+0"
    assert (no_3d["S_traj after 48 steps"], no_traj["S_traj after 48 steps"]) == ("0.60, 0.80", "")
    assert "cps<br>`--sde cps`<br>1 of 1 seeds" in found["choices"], "its seed 1 is compared with nothing"

    # against another cell than full, and a table of scorings without training
    guided = found["choices"]["guidance_2<br>`--guidance 2 --steps 5 --noisy-steps 2 --window 1`<br>1 of 1 seeds"
                              "<br>against window_1"]
    each = [values_of(results, "guidance_2", 0, "test", "epipolar") - values_of(results, "window_1", 0, "test", "epipolar")]
    apart = for_the_seeds(results, COLUMNS["epipolar error"])
    assert guided["epipolar error"] == change_in_words(each, apart)
    clean = found["untrained"]["clean<br>`--lora none`<br>against base"]
    each = [values_of(results, "clean", 0, "test", "epipolar") - values_of(results, "base", 0, "test", "epipolar")]
    assert clean["epipolar error"] == change_in_words(each, 0), "no training, no seeds"

    # the paper's change of a metric, and whether ours goes its way off zero
    paper = found["paper_ablations"]["no_traj"]
    assert paper["PSNR"] == "-1.36: agrees"  # both fell
    assert paper["SSIM"] == "-0.029: disagrees"  # ours rose
    assert paper["S_meta"] == "", "the paper has no such number"
    assert found["paper_ablations"]["no_3d"]["PSNR"].startswith("-8.7: ")
    assert "no_meta" not in found["paper_ablations"]


def test_the_papers_changes_are_from_the_cell_that_ours_is_compared_with(results, tmp_path):
    for name in ("no_general", "no_decoupling"):
        write_json(tmp_path / "results" / name / "seed_0.json", made_up(name, 0, np.random.default_rng(1)))
    paper = tables_of(tmp_path)["paper_ablations"]["no_general"]
    assert paper["PSNR"].startswith("-0.32: ")  # 27.57 - 27.89, not 27.63
    assert paper["S_meta"].startswith("+0.007: ")  # .305 - .298


def test_subsets_of_prompts_are_those_that_they_name(tables):
    results, found, _ = tables
    found = found["subsets"]
    obeyed = values_of(results, "base", 0, "test", "reward_traj") >= .8
    assert obeyed.sum() == 12
    for subset, chosen in (("all, 20 prompts", slice(None)),
                           ("base obeys the camera (S_traj at least .8), 12 prompts", obeyed)):
        each = [values_of(results, "full", seed, "test", "epipolar")[chosen]
                - values_of(results, "base", 0, "test", "epipolar")[chosen] for seed in (0, 2)]
        apart = for_the_seeds(results, COLUMNS["epipolar error"], chosen) / 2  # two seeds, and one training
        assert found[f"full: {subset}"]["epipolar error"] == change_in_words(each, apart)
    assert "no_3d: from the 25th on, 0 prompts" in found


def test_seeds_of_a_cell_are_of_one_training(results, tmp_path, capsys):
    file = tmp_path / "results" / "full" / "seed_2.json"
    write_json(file, results["full", 2] | dict(config=dict(seed=2, name="full-2", total_steps=48)))
    pages = copied_pages(tmp_path)
    assert main(table_command(tmp_path, pages)) == 2
    assert "full/seed_2.json is of the options {'total_steps': 48}, and the seed before it of {}" in capsys.readouterr().err


@pytest.mark.parametrize("option, value", [("--strength", ["2"]), ("--full", [])])
def test_what_scoring_would_not_know_is_refused(option, value, tmp_path, capsys):
    assert main(["run", "full", option, *value, "--out", str(tmp_path / "results")]) == 2
    assert f"{option} is for training alone, and the videos would be scored without it" in capsys.readouterr().err


def test_the_picture_of_the_training_shows_every_term_of_every_seed(tables):
    *_, folder = tables
    picture = (folder / "learning_curves.svg").read_text()
    lines = [picture.count(f"fill: none; stroke: {color};") for color in ("#3f87c9", "#d0663f", "#4b9a5f")]
    assert lines == [4, 4, 0]  # of the two seeds of full; motion has none
    assert picture.count("fill: none; stroke: #808080; stroke-opacity: 0.6") == 4  # of the control
    assert len(re.findall(r'<use xlink:href="#\w+" x="[\d.]+" y="[\d.]+" style="fill: #3f87c9; ', picture)) == 10, "dots"
    for title in ("S_meta", "S_recon", "S_traj", "R_gen", "motion"):
        assert f">{title}<" in picture


def test_a_term_that_older_results_do_not_have_is_an_empty_panel(results, tmp_path, monkeypatch):
    monkeypatch.setitem(TERMS, "brightness", Term("brightness", "S_bright", (), lambda *_: 0, three_d=True))
    assert main(table_command(tmp_path, copied_pages(tmp_path))) == 0
    picture = (tmp_path / "learning_curves.svg").read_text()
    assert ">S_bright<" in picture and picture.count("fill: none; stroke: #3f87c9;") == 4


def test_a_curve_is_of_main_steps_and_smoothed_over_the_known_ones():
    curve = dict(meta=[1, None, 3, 4], recon=[1, None, 3, 4], traj=[1, None, 3, 4], general=[.1, .2, .3, None])
    kept = main_steps(curve, "general")
    assert np.array_equal(kept, [.1, math.nan, .3, math.nan], equal_nan=True)
    assert smoothed(kept, 3) == pytest.approx([.1, .2, .3, .3])
    assert smoothed(kept, 9) == pytest.approx(4 * [.2], abs=.11) and len(smoothed(kept, 9)) == 4  # a run so short
    assert np.isnan(smoothed(np.array([math.nan, math.nan, math.nan, 1]), 3)).tolist() == [True, True, False, False]


def test_the_picture_shows_every_cell(tables):
    *_, folder = tables
    picture = (folder / "ablations.svg").read_text()
    for name in ("no_3d", "no_traj", "cps", "guidance_2", "epipolar error"):
        assert f">{name}<" in picture
    assert ">no_meta<" not in picture


def test_the_papers_changes_have_its_signs():
    """Its Tables I, J and E: what is left out makes the re-render worse, but for decoupling."""
    full = dict(zip(PAPER_METRICS, CELLS["full"].paper))
    for name, cell in CELLS.items():
        paper = dict(zip(PAPER_METRICS, cell.paper))
        if name != "full" and paper:
            worse = name != "no_decoupling"
            assert (paper["psnr"] < full["psnr"]) == (paper["ssim"] < full["ssim"]) == worse, name


def test_the_committed_tables_are_what_the_committed_results_make(tmp_path):
    pages = copied_pages(tmp_path)
    assert main(table_command(ROOT, pages)) == 0
    for page, committed in zip(pages, PAGES, strict=True):
        assert page.read_text() == committed.read_text(), "run: python ablate.py table"
    # another Matplotlib may draw in other words, but not other bars
    lines = {"ablations.svg": r'd="M ([\d.]+) ([\d.]+) ?\nL ([\d.]+) ([\d.]+) ?\n"',
             "learning_curves.svg": r"\nL ([\d.]+) ([\d.]+) "}
    for name, line in lines.items():
        numbers = [re.findall(line, (folder / name).read_text()) for folder in (tmp_path, ROOT / "docs")]
        assert len(numbers[0]) > 20 and numbers[0] == numbers[1], "run: python ablate.py table"


def test_without_results_the_tables_are_empty(results, tmp_path):
    pages = copied_pages(tmp_path)

    def made(out):
        assert main(table_command(tmp_path, pages, out)) == 0
        return [page.read_text() for page in pages]

    empty = made("nowhere")
    assert [text.count(" -->\n<!-- end -->") for text in empty] == [1, 10]
    filled = made("results")
    assert all(text != before for text, before in zip(filled, empty, strict=True))
    assert made("results") == filled
    assert made("nowhere") == empty


def test_results_that_do_not_fit_are_one_sentence(results, tmp_path, capsys):
    pages = copied_pages(tmp_path)
    page = pages[1]
    command = table_command(tmp_path, pages)
    file = tmp_path / "results" / "no_traj" / "seed_0.json"
    whole = json.loads(file.read_text())

    fewer = json.loads(file.read_text())
    for metric in VALUES:
        fewer["scored"]["test"]["values"][metric].pop()
    for content, message in ((fewer, "no_traj/seed_0.json has 19 videos of 'test', results before it have 20"),
                             (dict(whole, minutes="many"), "no_traj/seed_0.json, entry minutes"),
                             (None, "must hold lines like '<!-- table: main -->'")):
        write_json(file, content or whole)
        if content is None:
            page.write_text(page.read_text().replace("<!-- end -->", "", 1))
        before = page.read_text()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert page.read_text() == before
