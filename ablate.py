"""The proof's experiments: a table of small trainings that grows run by run, all scored on the same prompts.

    python ablate.py run full --seed 1     trains runs/full-1 and scores it -> results/full/seed_1.json
    python ablate.py run base no_3d        several cells, one after the other; base is scored untrained
    python ablate.py run full --total-steps 48 --runs runs/short --out runs/short/results
                                           further arguments go to train.py
    python ablate.py table                 results/ -> tables and figures of README.md, docs/learning_proof.md

A result is never replaced, and a stopped call resumes when the same command is given again.

All cells and seeds are scored on the same prompts, and on the same noise except with --no-transport. Runs of
one seed start from the same weights. So each seed of a cell is compared with the same seed of the cell it is
measured against, video by video: cell - other. These changes are averaged over the seeds, and an interval is
a bootstrap of that over prompts. It does not know how much two trainings of one recipe differ by their seed
alone: `seed_noise` estimates that, and `seeds_apart` makes a threshold of it. A change is called "off zero"
(bold) only where its interval does not contain 0 and the change exceeds the threshold.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

from eval import REWARDS, VideoRow, failures, interval, judges_of, markdown, read_lines, read_summary
from prompts import read_prompts
from report import CHART_STYLE, GREY, NO_METADATA
from rewards import TERMS
from sample import check_writable
from train import ROOT, Config, check
from train import parse_arguments as training_arguments
from weights import as_command, command_line, read_bytes, read_json, write_json, write_text, written_whole

# ---------------------------------------------------------------------------------------------------- cells

@dataclass(frozen=True)
class Cell:
    table: str  # "main", or one of TABLES; of any other name it would be shown nowhere
    training: str = ""  # options of train.py, over the tiny preset
    paper: tuple = ()  # World-R1-Small's PAPER_METRICS (its Tables I, J and E), None where it has no number
    seeds: int = 1  # that are wanted, as in a table's "2 of 3 seeds"; each is a call of its own (--seed)
    scoring: str = ""  # options of `eval.py metrics` and of the probe
    against: str = "full"  # the cell that it is compared with
    trained: bool = True  # False: what training would start from is scored


PAPER_METRICS = ("psnr", "ssim", "reward_recon", "reward_traj", "reward_meta", "reward_general")
CELLS = {
    "base": Cell("main", trained=False),  # what training starts from
    # the whole recipe, with LoRA (train.py's --full, all weights trained, is something else)
    "full": Cell("main", paper=(27.63, .858, .342, .296, .307, .37), seeds=3),
    # tiny/wan without faults: how far training could come
    "clean": Cell("untrained", "--lora none", against="base", trained=False),
    # what the transported noise of the samples does by itself: before training, and after it
    "base_no_transport": Cell("untrained", scoring="--no-transport", against="base", trained=False),
    "world_r1_no_transport": Cell("untrained", "--lora tiny/world_r1", scoring="--no-transport",
                                  trained=False),
    # one ingredient left out; without R_gen a dynamic phase would have no reward
    "no_3d": Cell("ablations", "--meta 0 --recon 0 --traj 0", seeds=2,
                  paper=(18.93, .502, None, None, None, .33)),
    "no_decoupling": Cell("ablations", "--dynamic-steps 0", seeds=2,
                          paper=(27.89, .898, .348, .310, .298, .18)),
    # all of the noise fresh, none carried along the camera path, in training and when it is scored
    "no_transport": Cell("ablations", "--degradation 1", seeds=2, scoring="--no-transport",
                         paper=(24.46, .745, .312, .213, .275, -.42)),
    "no_traj": Cell("ablations", "--traj 0", seeds=2, paper=(26.27, .829)),
    "only_traj": Cell("ablations", "--meta 0 --recon 0"),  # of R_3D; beside it R_gen
    "no_recon": Cell("ablations", "--recon 0", paper=(25.14, .798)),
    "no_meta": Cell("ablations", "--meta 0", paper=(26.91, .841)),
    "no_general": Cell("ablations", "--general 0 --dynamic-steps 0", against="no_decoupling",
                       paper=(27.57, .849, .388, .231, .305)),
    "shuffled": Cell("ablations", "--shuffled"),  # the control: rewards say nothing of who earned them
    # the paper: 1,000 and 2,000 prompts of 3,000. Our main steps draw 320, so that these come up 10 and 2.5
    # times.
    "prompts_32": Cell("data", "--train-prompts 32", paper=(25.82, .812)),
    "prompts_128": Cell("data", "--train-prompts 128", paper=(26.54, .839)),
    "prompts_4": Cell("data", "--train-prompts 4"),  # three of the eleven motions; each comes up 80 times
}
# Options, of one seed each but for SEEDS, at the full cell's number of videos, whose sampling and rewards are
# most of a step.
CHOICES = {
    "plain_sum": "--no-standardise --no-pooled --recon 1",  # the paper's
    "shared_off": "--no-shared",
    "window_1": "--window 1",
    "window_3": "--window 3",
    "window_1_rectify": "--window 1 --rectify",
    "rectify": "--rectify",  # with full's window of two
    "window_3_rectify": "--window 3 --rectify",
    "dance": "--sde dance",
    "dance_4.5": "--sde dance --eta 4.5",  # as noisy at the window's steps as flow at its .7
    "cps": "--sde cps",
    "members_4": "--members 4 --groups 8",
    "members_16": "--members 16 --groups 2",
    "pooled_off": "--no-pooled",
    "kl_0": "--kl 0",
    "kl_0.04": "--kl .04",
    "updates_2": "--updates 2",
    # guidance takes two passes: half the denoising steps, and one of them trained; compare it with window_1
    "guidance_2": "--guidance 2 --steps 5 --noisy-steps 2 --window 1",
    # about as many passes of the DiT as the full cell, so more or fewer videos; about the same share of the
    # denoising steps is noisy (2 of 6, 6 of 20; full: 3 of 10), and of the training's steps dynamic
    "steps_6": "--steps 6 --noisy-steps 2 --total-steps 120",
    "steps_20": "--steps 20 --noisy-steps 6 --total-steps 64 --main-steps 27 --dynamic-steps 5",
}
AGAINST = {"window_1_rectify": "window_1", "window_3_rectify": "window_3", "guidance_2": "window_1"}
SEEDS = {"shared_off": 2, "dance": 2}  # where a claim is made, or one seed seems to differ
CELLS |= {name: Cell("choices", options, seeds=SEEDS.get(name, 1), against=AGAINST.get(name, "full"))
          for name, options in CHOICES.items()}


# -------------------------------------------------------------------------------------------------- a result

VALUES = ("psnr", "ssim", "lpips", "psnr_held_out", "rot_err", "trans_err", "epipolar", *REWARDS)
KINDS = ("no moving object", "one moving object", "two moving objects")


@dataclass
class Scored:
    """A set of videos, or the probe's readings of one."""
    metrics: dict[str, list[float]]  # mean and 95 % interval
    values: dict[str, list[float | None]]  # every video's, None where it failed; the probe's mean alone


@dataclass
class Result:
    """results/CELL/seed_N.json."""
    config: dict  # the options that are not the tiny preset's
    commit: str  # checked out when this cell began; ends in +changes if tracked files differed from it
    machine: str
    minutes: dict[str, float | None]  # of the training's steps, of each scoring (None: an earlier call's)
    seconds: dict[str, float]  # mean of all steps, main and dynamic: {"rollout", "reward", "wait", "update"}
    failed: dict[str, str]  # of each scoring, in words
    scored: dict[str, Scored]  # test, dynamic; both by KINDS; probe; longer videos of base and full
    curve: dict[str, list]  # the training's evaluations; the total and its terms, step by step


def rounded(value):
    return None if value is None else float(f"{value:.4g}")


def videos_scored(rows):
    """Rows of eval.py's metrics.jsonl -> Scored."""
    values = {name: [rounded(row.get(name)) for row in rows] for name in VALUES}
    known = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    return Scored({name: interval([row.get(name) for row in rows]) for name in known}, values)


def probe_scored(file):
    """The table that the probe has printed -> Scored."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    # Between a line's first two bars is the row's name.
    header, _, row = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    readings = {name: [float(number) for number in re.findall(r"[\d.]+", cell)]
                for name, cell in zip(header, row, strict=True)}
    return Scored(readings, {name: numbers[:1] for name, numbers in readings.items()})


# ----------------------------------------------------------------------------------------------------- a run

def run(a, rest):
    """Trains and scores the cells, one after the other (rest: arguments of train.py, under the cell's)."""
    # a wrong argument is an error now, before any long work
    for option, least in (("num", 2), ("processes", 1)):
        if getattr(a, option) < least:
            raise ValueError(f"--{option} must be at least {least}, got {getattr(a, option)}")
    planned = {}
    for name in a.cells:
        seed = a.seed if CELLS[name].trained else 0  # without training it changes nothing
        options = [*rest, *CELLS[name].training.split(), "--name", f"{name}-{seed}", "--seed", str(seed)]
        c = training_arguments(options)
        check(c, a.processes)
        check_can_be_scored(c)
        file = a.out / name / f"seed_{seed}.json"
        check_writable(file)
        if not file.exists():
            check_scored(name, c, Path(c.runs) / c.name, a.num)
        planned[name] = file, options

    for name, (file, options) in planned.items():
        if file.exists():
            print(f"{file} is there already and is never replaced: skipped")
        else:
            write_json(file, dataclasses.asdict(train_and_score(a, name, options)))
            print(file)


def train_and_score(a, name, options):
    """-> the Result of a cell, trained with these options of train.py and scored."""
    c = training_arguments(options)
    folder = Path(c.runs) / c.name
    preset = dataclasses.asdict(training_arguments([]))
    config = {option: value for option, value in dataclasses.asdict(c).items() if value != preset[option]}
    describe = "describe --always --abbrev=40 --exclude='*' --dirty=+changes"
    commit = subprocess.getoutput(f"git -C '{ROOT}' {describe}")
    machine = f"{processor()}, {os.cpu_count()} cores, PyTorch {torch.__version__}"

    minutes, seconds, curve = {}, {}, {}
    if CELLS[name].trained:
        minutes["training"], seconds, curve = train_to_end(a, c, folder, options)

    # as many scorings at a time as processes, the longest first
    commands = scorings(name, c, folder, a.num)
    if not (folder / "test" / "summary.json").exists():
        # unlike summary.json, probe.txt does not say which model it is of: without test's it is not trusted
        (folder / "probe.txt").unlink(missing_ok=True)
    with ThreadPoolExecutor(a.processes) as pool:
        taken = pool.map(lambda way: score(a, folder, way, commands[way]), commands)
        minutes |= dict(zip(commands, taken))

    # each set, and all videos again by how many objects move: a caption says " that " once for each of them,
    # as in "a red box that spins"
    probe = {}
    if commands.pop("probe", None):  # the other ways, which are left, have a row for every video
        probe["probe"] = probe_scored(folder / "probe.txt")
    rows = {way: read_lines(folder / way / "metrics.jsonl", dict) for way in commands}
    failed = {way: failures(read_summary(folder / way / "summary.json")) for way in commands}
    everyone = rows["test"] + rows["dynamic"]
    for number, kind in enumerate(KINDS):
        rows[kind] = [row for row in everyone if row["prompt"].count(" that ") == number]
    scored = {way: videos_scored(part) for way, part in rows.items() if part}
    return Result(config, commit, machine, minutes, seconds, failed, scored | probe, curve)


def train_to_end(a, c, folder, options):
    """Trains a run to its end. -> its minutes; {part of a step: mean seconds}; its curve. The times leave out
    evaluations."""
    together = []
    if a.processes > 1:
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", a.processes]
    done = launch(a, *together, ROOT / "train.py", *options)
    rows = read_lines(folder / "metrics.jsonl", dict) if done.returncode == 0 else []
    if len(rows) < c.total_steps:
        raise ValueError(f"{folder} is not trained to its end; see above, and give the same command again")
    clocks = [row["machine"]["seconds"] for row in rows]
    seconds = {part: rounded(np.mean([clock[part] for clock in clocks])) for part in clocks[0]}
    minutes = rounded(len(rows) * sum(seconds.values()) / 60)
    curve = {name: [rounded(row[name]) for row in rows] for name in ("total", *TERMS)}
    if c.eval_every:
        curve["evaluations"] = read_lines(folder / "eval.jsonl", dict)
    return minutes, seconds, curve


def scorings(name, c, folder, num):
    """-> {way: command}. A way of scoring is a set of videos ("test", "dynamic", "longer") or the "probe".
    Judges: the training's models, but with eval.py's own number of views, and of frames that R_gen sees."""
    model = ["--model", c.model, "--prompts", c.prompts, *CELLS[name].scoring.split()]
    adapter = folder if CELLS[name].trained else c.lora
    if adapter:
        model += ["--lora", adapter]
    judges = ["--depth-anything", c.depth_anything, "--critic", c.critic, "--preference", c.preference,
              "--lpips", c.lpips]
    sets = {"longer": ("test", num, 2 * c.frames - 1)} if name in ("base", "full") else {}
    sets |= {"test": ("test", num, c.frames), "dynamic": ("dynamic", num // 2, c.frames)}
    commands = {way: [ROOT / "eval.py", "metrics", "--out", folder / way, *model, *judges,
                      "--split", split, "--num", count, "--frames", frames]
                for way, (split, count, frames) in sets.items()}
    if c.prompts == Config.prompts:  # the probe reads the tiny world alone
        commands["probe"] = ["-m", "tiny", "probe", "--run", folder, *model,
                             "--num", num, "--frames", c.frames]
    return commands


# What scoring has of its own: eval.py takes these from the model, or has its defaults; and it is given an
# adapter, which a --full training does not export.
NOT_SCORED = ("full", "height", "width", "strength", "traj_alpha", "traj_beta", "general_center",
              "general_spread")


def check_can_be_scored(c):
    """ValueError for an option of NOT_SCORED that is not the preset's: scoring could not be told of it."""
    preset = training_arguments(["--model", c.model])
    for name in NOT_SCORED:
        if getattr(c, name) != getattr(preset, name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is for training alone, and the videos would be scored without it; "
                             "leave it out, or teach `scorings` to pass it on")


def check_scored(name, c, folder, num):
    """ValueError if an earlier call's scoring is there whose summary names another model, other judges,
    prompts or frames, or if the run has been trained less far: it would be taken for this cell's."""
    for way, command in scorings(name, c, folder, num).items():
        if not (folder / way / "summary.json").exists():
            continue
        about = read_summary(folder / way / "summary.json")
        rows = read_lines(folder / way / "metrics.jsonl", VideoRow)
        given = dict(zip(command, command[1:]))  # option -> its value
        split = given["--split"]
        prompts = read_prompts(c.prompts, split)[split][:given["--num"]]

        # what differs, by the options of the call
        differ = [judge for judge, used in judges_of(c).items() if about.settings.get(judge, used) != used]
        for option, used in (("model", about.model), ("lora", about.lora)):
            if Path(used or "").resolve() != Path(given.get(f"--{option}") or "").resolve():
                differ.append(option)
        if [row.get("prompt") for row in rows] != prompts:
            differ.append("num or prompts")
        if any(size.split("x")[0] != str(given["--frames"]) for size in about.sizes):
            differ.append("frames")
        if CELLS[name].trained and len(read_lines(folder / "metrics.jsonl", dict)) < c.total_steps:
            differ.append("total_steps")
        if differ:
            raise ValueError(f"{folder / way} was scored with another {', '.join(differ)}; give another "
                             f"--runs, or delete longer, test, dynamic and probe.txt in {folder}")


def score(a, folder, way, command):
    """Makes one scoring of a run, if it is not there. -> minutes, None if it was."""
    made = folder / "probe.txt" if way == "probe" else folder / way / "summary.json"
    if made.exists():
        return None
    start = time.monotonic()
    done = launch(a, *command, stdout=subprocess.PIPE)
    if way == "probe" and done.returncode == 0:
        write_text(made, done.stdout)
    if not made.exists():
        raise ValueError(f"{made} was not made; see above, and give the same command again")
    return rounded((time.monotonic() - start) / 60)


def launch(a, *arguments, **options):
    """Runs this Python with these arguments, on a process's share of the cores."""
    threads = max(1, os.cpu_count() // a.processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, text=True, **options)


def processor():
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", file.read_text()) if file.exists() else None
    return found[1] if found else os.uname().machine


# ---------------------------------------------------------------------------------------------------- tables

COLUMNS = {  # title -> set, metric
    "PSNR": ("test", "psnr"),
    "PSNR, held-out frames": ("test", "psnr_held_out"),
    "SSIM": ("test", "ssim"),
    "LPIPS": ("test", "lpips"),
    "RotErr": ("test", "rot_err"),
    "TransErr": ("test", "trans_err"),
    **{term.label: ("test", f"reward_{name}") for name, term in TERMS.items()},
    "R_3D": ("test", "three_d"),
    "epipolar error": ("test", "epipolar"),
    "R_3D, dynamic prompts": ("dynamic", "three_d"),
    "motion, dynamic prompts": ("dynamic", "motion"),
    **{f"probe: {name}": ("probe", name) for name in ("objects", "motion", "all")},
    "re-projection": ("probe", "4 frames"),
}
LONGER = {"PSNR, longer videos": ("longer", "psnr")}
TABLES = {  # of cells -> title
    "untrained": "Scored without training",
    "ablations": "One ingredient left out",
    "data": "Fewer prompts: the first 4, 32 or 128 of 3,000, of which a run's main steps draw 320",
    "choices": "Other choices, at full's number of videos (steps_6, steps_20: at its passes of the DiT)",
}
PAPER_TABLES = {"ablations": "paper_ablations", "data": "paper_data"}
MARKS = "<!-- table: {} -->\n{}<!-- end -->"
MARKED = re.compile(r"<!-- table: (\w+) -->\n(?:(?!<!--).)*<!-- end -->", re.DOTALL)
BETTER = {"PSNR, held-out frames": 1, "S_traj": 1, "R_3D": 1, "epipolar error": -1}  # up or down
# the columns of a cell's row: the metrics that say most, and those that a choice moves first
TITLES = ("PSNR, held-out frames", "S_meta", "S_traj", "R_gen", "epipolar error", "R_3D, dynamic prompts",
          "motion, dynamic prompts", "probe: motion", "probe: objects")
PLOTTED = ("PSNR, held-out frames", "S_traj", "epipolar error", "motion, dynamic prompts")
HALF_WAY = 48  # of full's 96 steps
SUMMARY = {  # README's rows
    "re-render PSNR, dB": COLUMNS["PSNR"],
    "S_traj": COLUMNS["S_traj"],
    "motion, 50 dynamic prompts": COLUMNS["motion, dynamic prompts"],
    "epipolar error, px of 256": COLUMNS["epipolar error"],
    "camera read right": COLUMNS["probe: motion"], "objects read right": COLUMNS["probe: objects"],
}
SCENES = {f"{title}, {kind}": (kind, metric) for title, metric in (("PSNR", "psnr"), ("motion", "motion"))
          for kind in KINDS}


def read_results(out):
    """-> {cell: {seed: Result}} of a folder's results, in the order of CELLS. ValueError for one trained with
    other options than the cell's first seed, or with more or fewer videos in a set than results before."""
    found, counts, trainings = {}, {}, {}
    for name in CELLS:
        for file in sorted((out / name).glob("seed_*.json")):
            result = read_json(file, Result)
            found.setdefault(name, {})[file.stem.removeprefix("seed_")] = result
            recipe = {option: value for option, value in result.config.items()
                      if option not in ("name", "seed", "runs", "device")}
            if trainings.setdefault(name, recipe) != recipe:  # seeds of one training
                raise ValueError(f"{file} is of the options {recipe}, and the seed before it of "
                                 f"{trainings[name]}; a cell's seeds are of one training")
            for way, scored in result.scored.items():
                count = len(next(iter(scored.values.values())))
                if counts.setdefault(way, count) != count:  # differences are taken video by video
                    raise ValueError(f"{file} has {count} videos of '{way}', results before it have "
                                     f"{counts[way]}; score all with one --num")
    return found


def over_seeds(results, column):
    """-> every video's mean over the seeds (N,) of a column, NaN where a seed has none."""
    way, metric = column
    values = [result.scored[way].values[metric] for result in results.values()
              if way in result.scored and metric in result.scored[way].values]
    return np.mean(np.array(values, dtype=float), 0) if values else np.full(1, math.nan)


def shown(values, sign=""):
    """Mean and interval in words; the mean alone of the probe's one value; nothing where nothing is known."""
    found = interval(values)
    if math.isnan(found[0]):
        return ""
    digits = 3 if sign else 4  # of a change, and of a value
    mean, *ends = [f"{round(number, 6):{sign}.{digits}g}" for number in found]
    return f"{mean} [{', '.join(ends)}]" if len(values) > 1 else mean


def main_table(found, columns):
    """Base, the mean of full's seeds, its change, and every seed's mean."""
    base, full = found["base"], found["full"]
    rows = []
    for title, column in columns.items():
        before, after = over_seeds(base, column), over_seeds(full, column)
        seeds = [over_seeds({seed: result}, column) for seed, result in full.items()]
        known = [f"{interval(values)[0]:.4g}" for values in seeds if not np.isnan(values).all()]
        rows.append([title, shown(before), shown(after), shown(after - before, "+"), ", ".join(known)])
    titles = ["base", f"full, {len(full)} seeds", "change", f"seeds {', '.join(full)}"]
    return markdown("Base and full", titles, rows)


def summary_table(found):
    """README's: means, and the change with its interval."""
    # the change is of base and full; beside it what else they are compared with
    names = {"base": "base", "full": f"full, {len(found['full'])} seeds"}
    others = {"clean": "clean", "base_no_transport": "base, plain noise",
              "world_r1_no_transport": "seed 0, plain noise"}
    others = {name: title for name, title in others.items() if name in found}
    rows = []
    for row, column in SUMMARY.items():
        values = {name: over_seeds(found[name], column) for name in (*names, *others)}
        means = {name: f"{interval(each)[0]:.3g}" for name, each in values.items()}
        change = shown(values["full"] - values["base"], "+")
        rows.append([row, *(means[name] for name in names), change, *(means[name] for name in others)])
    return markdown("Base and full", [*names.values(), "change", *others.values()], rows)


def better_table(found):
    """On what share of the prompts a metric became better, in every seed and in their mean."""
    full = found["full"]
    groups = {f"seed {seed}": {seed: result} for seed, result in full.items()} | {"mean change": full}
    rows = []
    for title, sign in BETTER.items():
        base = over_seeds(found["base"], COLUMNS[title])
        changes = [sign * (over_seeds(results, COLUMNS[title]) - base) for results in groups.values()]
        rows.append([title, *(f"{(change[~np.isnan(change)] > 0).mean():.0%}" for change in changes)])
    return markdown("Prompts on which full is better than base", groups, rows)


def changes_by_seed(found, name, column, against=None):
    """How far a cell is from the one it is compared with, video by video -> (seeds, N): each seed from the
    same one, or from the only one of a cell without training; NaN if there is none."""
    against = against or CELLS[name].against
    parts = []
    for seed, result in found[name].items():
        other = found.get(against, {}).get(seed if CELLS[against].trained else "0")
        if other is not None:
            parts.append(over_seeds({seed: result}, column) - over_seeds({seed: other}, column))
    return np.stack(parts) if parts else np.full((1, 1), math.nan)


def seed_noise(found, column, chosen=slice(None)):
    """How much a run's mean over videos varies with the seed alone: a standard deviation, and its degrees of
    freedom. (NaN, 0) if no cell has two seeds.

    Pooled from full's own seeds, and from every other training's changes from full, seed by seed. A change
    is taken to have twice a run's variance, as if its two runs were independent, and the cells' changes as
    independent of each other. Both are approximations: all changes share full's seeds, and the two runs of a
    seed begin alike.
    """
    samples = [(1, [over_seeds({seed: result}, column) for seed, result in found.get("full", {}).items()])]
    samples += [(2, changes_by_seed(found, name, column, "full")) for name in found
                if CELLS[name].trained and name != "full"]
    total, freedom = 0.0, 0
    for variances, runs in samples:
        # one run has no deviation; it may be the lone NaN of `changes_by_seed`, which `chosen` does not fit
        parts = [run[chosen] for run in runs] if len(runs) > 1 else []
        means = [part[np.isfinite(part)].mean() for part in parts if np.isfinite(part).any()]
        if len(means) > 1:
            total += (len(means) - 1) * np.var(means, ddof=1) / variances
            freedom += len(means) - 1
    return (math.sqrt(total / freedom), freedom) if freedom else (math.nan, 0)


def seeds_apart(found, name, column, against=None, chosen=slice(None)):
    """How far a cell would at most be from what it is compared with, in 95 of 100 cases, had only the seeds
    changed it (Student's t): 0 without a training, infinite where no cell has two seeds."""
    if not CELLS[name].trained:
        return 0.0
    deviation, freedom = seed_noise(found, column, chosen)
    if not freedom:
        return math.inf
    trainings = 2 if CELLS[against or CELLS[name].against].trained else 1
    seeds = len(changes_by_seed(found, name, column, against))
    return float(scipy.stats.t.ppf(.975, freedom)) * deviation * math.sqrt(trainings / seeds)


def change_shown(found, name, column, against=None, chosen=slice(None)):
    """A cell's change in three lines: the mean over seeds, bold if it is off zero; its interval; every seed's
    mean. Of the probe's one value the mean alone. chosen: the videos that count."""
    each = changes_by_seed(found, name, column, against)[:, chosen]
    mean, low, high = interval(each.mean(0))
    if math.isnan(mean):
        return ""
    if each.shape[1] == 1:
        return f"{mean:+.2g}"

    def signed(number):
        return f"{round(number, 12):+.3g}"  # a sum that is 0 but for rounding is 0

    text = signed(mean)
    if is_off_zero(each, seeds_apart(found, name, column, against, chosen)):
        text = f"**{text}**"
    text += f"<br>[{signed(low)}, {signed(high)}]"
    if len(each) > 1:
        text += "<br>" + ", ".join(signed(interval(seed)[0]) for seed in each)
    return text


def is_off_zero(each, apart):
    """Of changes (seeds, N): does the mean's interval hold no 0, and is the mean farther from it than seeds
    alone would bring it?"""
    mean, low, high = interval(each.mean(0))
    return low * high > 0 and abs(mean) > apart


def label(found, name):
    cell = CELLS[name]
    options = f"{cell.training} {cell.scoring}".strip()
    notes = [f"`{options}`"]
    if cell.trained:
        # a seed that the other cell lacks is not compared
        compared = np.isfinite(changes_by_seed(found, name, COLUMNS["R_gen"])).any(1).sum()
        notes.append(f"{compared} of {cell.seeds} seeds")
    if cell.against != "full":
        notes.append(f"against {cell.against}")
    return "<br>".join([name, *notes])


def cells_of(found, table):
    """-> the names of a table's cells that can be compared: of both there is a seed."""
    names = [name for name, cell in CELLS.items() if cell.table == table and name in found]
    # where the two cells share no seed, `changes_by_seed` is a single NaN, (1, 1)
    return [name for name in names if changes_by_seed(found, name, COLUMNS["R_gen"]).shape[1] > 1]


def cells_table(found, table):
    """What every cell of a table changes; of trainings also how fast they learn."""
    titles = [*TITLES, f"S_traj after {HALF_WAY} steps"] if table != "untrained" else TITLES
    rows = []
    for name in cells_of(found, table):
        row = [label(found, name), *(change_shown(found, name, COLUMNS[title]) for title in TITLES)]
        if table != "untrained":
            seeds = found[CELLS[name].against].keys() & found[name].keys()
            row.append(", ".join(filter(None, [half_way(found[name][seed]) for seed in sorted(seeds)])))
        rows.append(row)
    return markdown(TABLES[table], titles, rows) if rows else ""


def half_way(result):
    """-> S_traj of the validation prompts in the middle of full's training, in words; "" where it was no
    reward, or was not measured then."""
    for row in result.curve.get("evaluations", []):
        if row["step"] == HALF_WAY and row["traj"] is not None:
            return f"{row['traj']:.2f}"
    return ""


def paper_table(found, table):
    """The paper's change of each metric without what a cell leaves out, and whether ours agrees: "open" where
    it is not off zero."""
    columns = {title: metric for title, (way, metric) in COLUMNS.items()
               if way == "test" and metric in PAPER_METRICS}
    rows = []
    for name in [name for name in cells_of(found, table) if CELLS[name].paper]:
        theirs = dict(zip(PAPER_METRICS, CELLS[name].paper))
        theirs_against = dict(zip(PAPER_METRICS, CELLS[CELLS[name].against].paper))
        row = [name]
        for title, metric in columns.items():
            text = ""
            if theirs.get(metric) is not None:
                change = theirs[metric] - theirs_against[metric]
                each = changes_by_seed(found, name, COLUMNS[title])
                verdict = "open"
                if is_off_zero(each, seeds_apart(found, name, COLUMNS[title])):
                    verdict = "agrees" if interval(each.mean(0))[0] * change > 0 else "disagrees"
                text = f"{change:+.3g}: {verdict}"
            row.append(text)
        rows.append(row)
    return markdown("World-R1-Small's changes, and whether ours agree", columns, rows) if rows else ""


def subsets_table(found):
    """What cells change from the base, on the prompts that remain after each of two objections: an earlier
    run's length was chosen on 24 test prompts, probably the first of these; and a model may have learned the
    camera's words alone, which shows on prompts that the base obeys already."""
    obeyed = over_seeds(found["base"], COLUMNS["S_traj"]) >= .8
    subsets = {"all": np.ones_like(obeyed), "from the 25th on": np.arange(len(obeyed)) >= 24,
               "base obeys the camera (S_traj at least .8)": obeyed}
    columns = [title for title in PLOTTED if COLUMNS[title][0] == "test"]
    rows = []
    for name in ("full", "no_3d"):
        if name not in found:
            continue
        for subset, chosen in subsets.items():
            shown_changes = [change_shown(found, name, COLUMNS[title], "base", chosen) for title in columns]
            rows.append([f"{name}: {subset}, {chosen.sum()} prompts", *shown_changes])
    return markdown("Changes from base", columns, rows)


def draw_changes(file, found):
    """The cells' changes as a picture: a bar is an interval, a dot a seed; grey is how far from 0 the mean
    could be for the seeds alone."""
    names = [name for table in ("ablations", "data", "choices") for name in cells_of(found, table)]
    with matplotlib.rc_context(CHART_STYLE | {"axes.prop_cycle": matplotlib.cycler(color=["#3f87c9"])}):
        height = .6 + .24 * len(names)
        figure = Figure(figsize=(9, height))
        figure.subplots_adjust(left=.13, right=.99, bottom=.3 / height, top=1 - .25 / height, wspace=.08)
        panels = figure.subplots(1, len(PLOTTED), sharey=True)
        for axes, title in zip(panels, PLOTTED):
            axes.axvline(0, color=GREY, linewidth=.8)
            for place, name in enumerate(names):
                apart = seeds_apart(found, name, COLUMNS[title])
                if math.isfinite(apart):
                    axes.barh(place, 2 * apart, .9, -apart, color=GREY, alpha=.25, linewidth=0)
                each = changes_by_seed(found, name, COLUMNS[title])
                _, low, high = interval(each.mean(0))
                axes.plot([low, high], [place, place], linewidth=4, alpha=.5, solid_capstyle="butt")
                axes.plot([interval(seed)[0] for seed in each], [place] * len(each), "o", markersize=3.5)
            axes.set_title(title, fontsize=8)
        panels[0].set_yticks(range(len(names)), names, color="black")
        panels[0].set_ylim(len(names) - .4, -.6)  # the first on top
        with written_whole(file) as part:
            figure.savefig(part, format="svg", facecolor="white", metadata=NO_METADATA)


def draw_learning(file, found):
    """What every term does as full is trained, a colour a seed: means of a main step's videos, smoothed over
    the steps around it (lines), and of the validation prompts (dots; motion has nothing else). Grey: the
    control, whose rewards say nothing of who earned them."""
    names = (*TERMS, "motion")
    runs = [(result, f"C{number}") for number, result in enumerate(found["full"].values())]
    runs += [(result, GREY) for result in found.get("shuffled", {}).values()]
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(9, 1.9), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names)), names):
            for result, color in runs:
                if name in result.curve:
                    axes.plot(smoothed(main_steps(result.curve, name)), color=color, linewidth=1, alpha=.6)
                rows = result.curve.get("evaluations", [])
                values = np.array([row.get(name) for row in rows], dtype=float)  # NaN: not asked for
                axes.plot([row["step"] for row in rows], values, "o", color=color, markersize=3.5)
            axes.set_title(TERMS[name].label if name in TERMS else "motion", fontsize=8)
        with written_whole(file) as part:
            figure.savefig(part, format="svg", facecolor="white", metadata=NO_METADATA)


def main_steps(curve, name):
    """-> a term's values (steps,), NaN in dynamic phases: these have other prompts, and no R_3D."""
    terms = np.array([curve[name] for name in curve if name in TERMS and TERMS[name].three_d], dtype=float)
    return np.where(np.isnan(terms).all(0), math.nan, np.array(curve[name], dtype=float))


def smoothed(values, width=9):
    """Values (steps,) -> means of those known among the `width` steps around each, fewer at the ends."""
    known = np.isfinite(values)
    around = np.ones(min(width, len(values)))
    counts = np.convolve(known, around, "same")
    return np.convolve(np.where(known, values, 0), around, "same") / np.where(counts, counts, math.nan)


def tables_of(found):
    """-> {marker: table, or nothing where there are no results}."""
    names = "summary", "main", "better", "scenes", "subsets", *TABLES, *PAPER_TABLES.values()
    made = dict.fromkeys(names, "")
    if "base" in found and "full" in found:
        made |= dict(summary=summary_table(found), main=main_table(found, COLUMNS | LONGER),
                     better=better_table(found), scenes=main_table(found, SCENES),
                     subsets=subsets_table(found))
    if "full" in found:
        made |= {table: cells_table(found, table) for table in TABLES}
        made |= {name: paper_table(found, table) for table, name in PAPER_TABLES.items()}
    return {name: table and table + "\n" for name, table in made.items()}


def write_tables(out, pages, pictures):
    """Puts the tables of the results in `out` between the pages' markers, and draws the cells' changes and
    full's training into the folder `pictures`."""
    found = read_results(out)
    made = tables_of(found)
    texts = {page: read_bytes(page).decode() for page in pages}
    for page, text in texts.items():
        places = MARKED.findall(text)
        if not places or set(places) - set(made) or len(places) < text.count("<!-- table"):
            raise ValueError(f"{page} must hold lines like '<!-- table: main -->', each with '<!-- end -->' "
                             f"below; tables: {', '.join(made)}")
        texts[page] = MARKED.sub(lambda place: MARKS.format(place[1], made[place[1]]), text)
    for page, text in texts.items():
        write_text(page, text)
    changed = [*pages]
    if "full" in found:
        draw_learning(pictures / "learning_curves.svg", found)
        changed.append(pictures / "learning_curves.svg")
    if "full" in found and cells_of(found, "ablations"):
        draw_changes(pictures / "ablations.svg", found)
        changed.append(pictures / "ablations.svg")
    print(f"{', '.join(map(str, changed))}: the results of {out}")


# ------------------------------------------------------------------------------------------- the command line

@as_command("ablate.py")
def main(argv=None):
    parser = command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", allow_abbrev=False, help="train and score cells")
    add = run_parser.add_argument
    add("cells", nargs="+", metavar="CELL", choices=CELLS, help=", ".join(CELLS))
    add("--seed", type=int, default=0, help="of the training")
    add("--num", type=int, default=100, help="test prompts that are scored; half as many dynamic ones")
    add("--processes", type=int, default=2, help="of a training; scorings at a time")
    table_parser = commands.add_parser("table", allow_abbrev=False, help="the tables of what is there")
    pages = [Path("README.md"), Path("docs/learning_proof.md")]
    table_parser.add_argument("--pages", type=Path, nargs="+", default=pages)
    table_parser.add_argument("--pictures", type=Path, default=Path("docs"), help="folder of the figures")
    for command in (run_parser, table_parser):
        command.add_argument("--out", type=Path, default=Path("results"), help="folder of results")
    a, rest = parser.parse_known_args(argv)
    if rest and a.command == "table":
        parser.error(f"unknown argument {rest[0]}")
    if a.command == "run":
        run(a, rest)
    else:
        write_tables(a.out, a.pages, a.pictures)


if __name__ == "__main__":
    sys.exit(main())
