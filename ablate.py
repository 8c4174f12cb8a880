"""The proof's experiments: a table of small trainings that grows run by run, all scored on the same prompts.

    python ablate.py run full --seed 1     trains runs/full-1 and scores it -> results/full/seed_1.json
    python ablate.py run base no_3d        several cells, one after the other; base is scored untrained
    python ablate.py run full --total-steps 48 --out runs/results    further arguments go to train.py
    python ablate.py table                 tables of README.md and docs/learning_proof.md, from results/

A result is never replaced, and a stopped call goes on when it is made again. All cells and seeds are scored
on the same noise, so differences are taken video by video. An interval is a bootstrap over prompts of the
mean over seeds: it does not know how far other seeds would fall.
"""

import argparse
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

import numpy as np
import torch

from eval import REWARDS, VideoRow, failures, interval, markdown, read_lines, read_summary
from prompts import read_prompts
from rewards import TERMS
from sample import check_writable
from train import ROOT, Config, check
from train import parse_arguments as training_arguments
from weights import as_command, read_bytes, read_json, write_json, write_text

# ---------------------------------------------------------------------------------------------------- cells

@dataclass(frozen=True)
class Cell:
    table: str
    training: str = ""  # options of train.py, over the tiny preset
    paper: tuple = ()  # World-R1-Small's PAPER_METRICS (its Tables I, J and E), None where it has no number
    seeds: int = 1  # that are wanted
    scoring: str = ""  # options of `eval.py metrics` and of the probe


PAPER_METRICS = ("psnr", "ssim", "lpips", "reward_recon", "reward_traj", "reward_meta", "reward_general")
CELLS = {
    "base": Cell("main"),  # what training starts from
    "full": Cell("main", "", (27.63, .858, .201, .342, .296, .307, .37), 3),
    # one ingredient left out; without R_gen a dynamic phase would have no reward
    "no_3d": Cell("ablations", "--meta 0 --recon 0 --traj 0", (18.93, .502, .496, None, None, None, .33), 2),
    "no_decoupling": Cell("ablations", "--dynamic-steps 0", (27.89, .898, .192, .348, .310, .298, .18), 2),
    # all of the noise fresh, none carried along the camera path, in training and when it is scored
    "no_transport": Cell("ablations", "--degradation 1", (24.46, .745, .298, .312, .213, .275, -.42), 2,
                         "--no-transport"),
    "no_traj": Cell("ablations", "--traj 0", (26.27, .829, .237)),
    "no_recon": Cell("ablations", "--recon 0", (25.14, .798, .271)),
    "no_meta": Cell("ablations", "--meta 0", (26.91, .841, .218)),
    "no_general": Cell("ablations", "--general 0 --dynamic-steps 0", (27.57, .849, .206, .388, .231, .305)),
    # the paper: 1,000 and 2,000 prompts of 3,000. Our main steps draw 320, so that these come up 10 and 2.5
    # times.
    "prompts_32": Cell("data", "--train-prompts 32", (25.82, .812, .258)),
    "prompts_128": Cell("data", "--train-prompts 128", (26.54, .839, .223)),
}
CHOICES = {  # with the full cell's number of videos, whose sampling and rewards are most of a step
    "shared_off": "--no-shared",
    "window_1": "--window 1",
    "window_3": "--window 3",
    "window_1_rectify": "--window 1 --rectify",
    "dance": "--sde dance",
    "cps": "--sde cps",
    "members_4": "--members 4 --groups 8",
    "members_16": "--members 16 --groups 2",
    "pooled_off": "--no-pooled",
    "kl_0": "--kl 0",
    "kl_0.04": "--kl .04",
    "updates_2": "--updates 2",
    # guidance takes two passes: half the denoising steps, and one of them trained; compare it with window_1
    "guidance_2": "--guidance 2 --steps 5 --noisy-steps 2 --window 1",
    # as many passes of the DiT as the full cell, so more or fewer videos; its share of the steps is noisy
    "steps_6": "--steps 6 --noisy-steps 2 --total-steps 120",
    "steps_20": "--steps 20 --noisy-steps 6 --total-steps 64",
}
CELLS |= {name: Cell("choices", options) for name, options in CHOICES.items()}


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
    commit: str  # the one that was checked out when the call began
    machine: str
    minutes: dict[str, float | None]  # of the training's steps, of each scoring (None: an earlier call's)
    seconds: dict[str, float]  # a step, by phase
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
    files = {}
    for name in a.cells:
        seed = 0 if name == "base" else a.seed  # nothing is drawn for the base
        options = [*rest, *CELLS[name].training.split(), "--name", f"{name}-{seed}", "--seed", str(seed)]
        c = training_arguments(options)
        check(c, a.processes)
        files[name] = a.out / name / f"seed_{seed}.json", options
        check_writable(files[name][0])
        if not files[name][0].exists():
            check_scored(name, c, Path(c.runs) / c.name, a.num)

    for name, (file, options) in files.items():
        if file.exists():
            print(f"{file} is there already and is never replaced: skipped")
        else:
            write_json(file, dataclasses.asdict(measured(a, name, options)))
            print(file)


def measured(a, name, options):
    """-> the Result of a cell, trained with these options of train.py and scored."""
    c = training_arguments(options)
    folder = Path(c.runs) / c.name
    preset = dataclasses.asdict(training_arguments([]))
    config = {option: value for option, value in dataclasses.asdict(c).items() if value != preset[option]}
    describe = "describe --always --abbrev=40 --exclude='*' --dirty=+changes"
    commit = subprocess.getoutput(f"git -C '{ROOT}' {describe}")
    machine = f"{processor()}, {os.cpu_count()} cores, PyTorch {torch.__version__}"

    minutes, seconds, curve = {}, {}, {}
    if name != "base":
        minutes["training"], seconds, curve = trained(a, c, folder, options)

    # as many scorings at a time as processes, the longest first
    commands = scorings(name, c, folder, a.num)
    if not (folder / "test" / "summary.json").exists():
        (folder / "probe.txt").unlink(missing_ok=True)  # it does not say of what it is
    with ThreadPoolExecutor(a.processes) as pool:
        minutes |= dict(zip(commands, pool.map(lambda way: score(a, folder, way, commands[way]), commands)))

    # by prompts, and by what moves of itself: "a red box that spins"
    probe = {"probe": probe_scored(folder / "probe.txt")} if commands.pop("probe", None) else {}
    rows = {way: read_lines(folder / way / "metrics.jsonl", dict) for way in commands}
    failed = {way: failures(read_summary(folder / way / "summary.json")) for way in commands}
    everyone = rows["test"] + rows["dynamic"]
    for number, kind in enumerate(KINDS):
        rows[kind] = [row for row in everyone if row["prompt"].count(" that ") == number]
    scored = {way: videos_scored(part) for way, part in rows.items() if part}
    return Result(config, commit, machine, minutes, seconds, failed, scored | probe, curve)


def trained(a, c, folder, options):
    """Trains a run to its end. -> minutes and seconds a step by phase, without evaluations; its curve."""
    together = []
    if a.processes > 1:
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", a.processes]
    done = launch(a, *together, ROOT / "train.py", *options)
    rows = read_lines(folder / "metrics.jsonl", dict) if done.returncode == 0 else []
    if len(rows) < c.total_steps:
        raise ValueError(f"{folder} is not trained to its end; see above, and give the same command again")
    clocks = [row["machine"]["seconds"] for row in rows]
    seconds = {phase: rounded(np.mean([clock[phase] for clock in clocks])) for phase in clocks[0]}
    minutes = rounded(len(rows) * sum(seconds.values()) / 60)
    curve = {name: [rounded(row[name]) for row in rows] for name in ("total", *TERMS)}
    if c.eval_every:
        curve["evaluations"] = read_lines(folder / "eval.jsonl", dict)
    return minutes, seconds, curve


def scorings(name, c, folder, num):
    """-> {what is scored: command}. The judges of the training score it, too."""
    model = ["--model", c.model, "--prompts", c.prompts, *CELLS[name].scoring.split()]
    adapter = c.lora if name == "base" else folder
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


def check_scored(name, c, folder, num):
    """ValueError if a scoring is there already, and says of itself that it is of something else."""
    for way, command in scorings(name, c, folder, num).items():
        if not (folder / way / "summary.json").exists():
            continue
        about = read_summary(folder / way / "summary.json")
        rows = read_lines(folder / way / "metrics.jsonl", VideoRow)
        given = dict(zip(command, command[1:]))  # option -> its value
        split = given["--split"]
        prompts = read_prompts(c.prompts, split)[split][:given["--num"]]

        # what differs, by the options of the call
        differ = [judge for judge, used in about.settings.items()
                  if judge != "views" and Path(str(getattr(c, judge, used))).name != used]
        for option, used in (("model", about.model), ("lora", about.lora)):
            if Path(used or "").resolve() != Path(given.get(f"--{option}") or "").resolve():
                differ.append(option)
        if [row.get("prompt") for row in rows] != prompts:
            differ.append("num or prompts")
        if any(size.split("x")[0] != str(given["--frames"]) for size in about.sizes):
            differ.append("frames")
        if name != "base" and len(read_lines(folder / "metrics.jsonl", dict)) < c.total_steps:
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
    "motion, dynamic prompts": ("dynamic", "motion"),
    **{f"probe: {name}": ("probe", name) for name in ("objects", "motion", "all")},
    "re-projection": ("probe", "4 frames"),
}
LONGER = {"PSNR, longer videos": ("longer", "psnr")}
MARKS = "<!-- table: {} -->\n{}<!-- end -->"
MARKED = re.compile(r"<!-- table: (\w+) -->\n(?:(?!<!--).)*<!-- end -->", re.DOTALL)
RISEN = ("PSNR", "S_traj", "R_3D", "epipolar error")  # the share of prompts is told too
SUMMARY = {  # README's rows
    "re-render PSNR, dB": COLUMNS["PSNR"],
    "S_traj": COLUMNS["S_traj"],
    "R_3D": COLUMNS["R_3D"],
    "motion, 50 dynamic prompts": COLUMNS["motion, dynamic prompts"],
    "epipolar error, px of 256": COLUMNS["epipolar error"],
    "camera read right": COLUMNS["probe: motion"], "objects read right": COLUMNS["probe: objects"],
}
SCENES = {f"{title}, {kind}": (kind, metric) for title, metric in (("PSNR", "psnr"), ("motion", "motion"))
          for kind in KINDS}


def read_results(out):
    """-> {cell: {seed: Result}} of a folder's results, in the order of CELLS."""
    found, counts = {}, {}
    for name in CELLS:
        for file in sorted((out / name).glob("seed_*.json")):
            result = found.setdefault(name, {})[file.stem.removeprefix("seed_")] = read_json(file, Result)
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
    mean, *ends = [f"{round(number, 6):{sign}.4g}" for number in found]
    return f"{mean} [{', '.join(ends)}]" if len(values) > 1 else mean


def seeds_of(full):
    """-> {label: results} of every seed by itself."""
    return {f"full, seed {seed}": {seed: result} for seed, result in full.items()}


def main_table(found, columns, every=seeds_of):
    """Base, every seed of full, and their mean; what it changes."""
    full = found["full"]
    groups = {"base": found["base"]} | every(full) | {f"full, {len(full)} seeds": full}
    rows = []
    for title, column in columns.items():
        means = [over_seeds(results, column) for results in groups.values()]
        rows.append([title, *map(shown, means), shown(means[-1] - means[0], "+")])
    return markdown("Base and full", [*groups, "change"], rows)


def risen_table(found):
    """On what share of the prompts a metric rose, in every seed and in their mean."""
    full = found["full"]
    groups = seeds_of(full) | {f"full, {len(full)} seeds": full}
    rows = []
    for title in RISEN:
        base = over_seeds(found["base"], COLUMNS[title])
        changes = [over_seeds(results, COLUMNS[title]) - base for results in groups.values()]
        rows.append([title, *(f"{(change[~np.isnan(change)] > 0).mean():.0%}" for change in changes)])
    return markdown("Prompts on which it rose", groups, rows)


def cells_table(found, table):
    """What every cell of a table changes against full, beside the paper's change, and whether both rise or
    both fall: "open" where our interval holds 0."""
    rows = []
    for name, cell in CELLS.items():
        if cell.table != table or name not in found:
            continue
        row = [f"{name} (`{cell.training}`), {len(found[name])} of {cell.seeds} seeds"]
        paper = dict(zip(PAPER_METRICS, cell.paper))
        for column in COLUMNS.values():
            change = over_seeds(found[name], column) - over_seeds(found["full"], column)
            row.append(shown(change, "+"))
            metric = column[1]
            if row[-1] and paper.get(metric) is not None:
                theirs = paper[metric] - CELLS["full"].paper[PAPER_METRICS.index(metric)]
                mean, low, high = interval(change)
                agreement = "agrees" if mean * theirs > 0 else "disagrees"
                row[-1] += f"<br>paper {theirs:+.3f}: {'open' if low <= 0 <= high else agreement}"
        rows.append(row)
    return markdown("Change from full", COLUMNS, rows) if rows else ""


def tables_of(out):
    """-> {marker: table, or nothing where there are no results} of a folder."""
    found = read_results(out)
    made = dict.fromkeys(("summary", "main", "risen", "scenes", "ablations", "data", "choices"), "")
    if "base" in found and "full" in found:
        made |= dict(
            summary=main_table(found, SUMMARY, lambda full: {}), main=main_table(found, COLUMNS | LONGER),
            risen=risen_table(found), scenes=main_table(found, SCENES))
    if "full" in found:
        made |= {table: cells_table(found, table) for table in ("ablations", "data", "choices")}
    return {name: table and table + "\n" for name, table in made.items()}


def write_tables(out, pages):
    """Puts the tables of the results in `out` between the pages' markers."""
    made = tables_of(out)
    texts = {page: read_bytes(page).decode() for page in pages}
    for page, text in texts.items():
        places = MARKED.findall(text)
        if not places or set(places) - set(made) or len(places) < text.count("<!-- table"):
            raise ValueError(f"{page} must hold lines like '<!-- table: main -->', each with '<!-- end -->' "
                             f"below; tables: {', '.join(made)}")
        texts[page] = MARKED.sub(lambda place: MARKS.format(place[1], made[place[1]]), text)
    for page, text in texts.items():
        write_text(page, text)
    print(f"{', '.join(map(str, pages))}: the results of {out}")


# ------------------------------------------------------------------------------------------- the command line

@as_command("ablate.py")
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", allow_abbrev=False, help="train and score cells")
    add = run_parser.add_argument
    add("cells", nargs="+", metavar="CELL", choices=CELLS, help=", ".join(CELLS))
    add("--seed", type=int, default=0, help="of the training")
    add("--num", type=int, default=100, help="test prompts that are scored; half as many dynamic ones")
    add("--processes", type=int, default=2, help="of a training; scorings at a time")
    table_parser = commands.add_parser("table", help="the tables of what is there")
    pages = [Path("README.md"), Path("docs/learning_proof.md")]
    table_parser.add_argument("--pages", type=Path, nargs="+", default=pages)
    for command in (run_parser, table_parser):
        command.add_argument("--out", type=Path, default=Path("results"), help="folder of results")
    a, rest = parser.parse_known_args(argv)
    if rest and a.command == "table":
        parser.error(f"unknown argument {rest[0]}")
    if a.command == "run":
        run(a, rest)
    else:
        write_tables(a.out, a.pages)


if __name__ == "__main__":
    sys.exit(main())
