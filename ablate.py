"""Ablations: training with one thing left out at a time, every cell scored on the same prompts and seeds.

    python ablate.py run --out runs/sweep                              all cells
    python ablate.py run --out runs/sweep --cells full no_transport    some of them
    python ablate.py run --out runs/sweep --total-steps 48             further arguments go to train.py
    python ablate.py table --out runs/sweep                            the tables of what is there

OUT/CELL is a training run as train.py leaves it. Beside its files, in the layout of eval.py:
    results/     the test prompts at the length that was trained
    dynamic/     the dynamic prompts, half as many
    N_frames/    the test prompts as longer videos (--also), of the base and the full cell alone
OUT/base holds the same of the model that training starts from. What is done is not done again: a training
goes on from its checkpoint, and a summary.json is kept. Tables go to OUT/table.md. Left out: seeds beyond the
one of train.py.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from eval import markdown, table
from sample import check_writable
from train import check
from train import parse_arguments as training_arguments
from weights import write_text


@dataclass(frozen=True)
class Cell:
    without: str  # what is left out
    training: str  # options of train.py
    paper: tuple  # World-R1-Small's PSNR, SSIM, LPIPS and VBench average (its Tables I, J and E)
    scoring: str = ""  # options of `eval.py metrics`


CELLS = {
    "full": Cell("nothing", "", (27.63, .858, .201, 85.21)),
    # one reward term at a time, then all of R_3D; without R_gen a dynamic phase would have no reward
    "no_meta": Cell("S_meta", "--meta 0", (26.91, .841, .218, 83.67)),
    "no_recon": Cell("S_recon", "--recon 0", (25.14, .798, .271, 84.35)),
    "no_traj": Cell("S_traj", "--traj 0", (26.27, .829, .237, 84.53)),
    "no_3d": Cell("R_3D", "--meta 0 --recon 0 --traj 0", (18.93, .502, .496, 84.96)),
    "no_general": Cell("R_gen", "--general 0 --dynamic-steps 0", (27.57, .849, .206, 83.44)),
    # all of the noise fresh, none carried along the camera path, in training and when it is scored
    "no_transport": Cell("noise transport", "--degradation 1", (24.46, .745, .298, 76.39), "--no-transport"),
    "no_decoupling": Cell("dynamic phases", "--dynamic-steps 0", (27.89, .898, .192, 82.64)),
    # prompts: the paper has 3,000
    "third_of_prompts": Cell("2,000 prompts", "--train-prompts 1000", (25.82, .812, .258, 83.23)),
    "two_thirds_of_prompts": Cell("1,000 prompts", "--train-prompts 2000", (26.54, .839, .223, 84.76)),
}
PAPER_COLUMNS = ("left out", "psnr", "ssim", "lpips", "vbench average")


def run(a, rest):
    """Trains every cell (rest: arguments for train.py), scores it and the base, and writes the tables."""
    # a wrong argument is an error now, before any long work
    config = training_arguments(rest)
    for name in a.cells:
        check(training_arguments([*rest, *CELLS[name].training.split()]), a.processes)
    for option, least in (("num", 2), ("processes", 1), ("also", 5)):
        if getattr(a, option) < least:
            raise ValueError(f"--{option} must be at least {least}, got {getattr(a, option)}")
    if a.also % 4 != 1:
        raise ValueError(f"--also must be 4k+1, got {a.also}; try {a.also // 4 * 4 + 1}")
    check_writable(a.out / "table.md")
    ways = {  # folder -> options of `eval.py metrics`
        "results": f"--split test --num {a.num} --frames {config.frames}",
        "dynamic": f"--split dynamic --num {a.num // 2} --frames {config.frames}",
        f"{a.also}_frames": f"--split test --num {a.num} --frames {a.also}",
    }
    # the judges of the training score it, too
    common = ["--model", config.model, "--prompts", config.prompts, "--depth-anything", config.depth_anything,
              "--critic", config.critic, "--preference", config.preference, "--lpips", config.lpips]

    # one cell after the other; what has a summary is not scored again
    for name in tqdm(["base", *a.cells], desc="sweep", unit="cell"):
        if name == "base":
            scoring = ["--lora", config.lora] if config.lora else []
        else:
            cell = CELLS[name]
            launch("train.py", "--runs", a.out, "--name", name, *rest, *cell.training.split(),
                   processes=a.processes)
            scoring = ["--lora", a.out / name, *cell.scoring.split()]
        for way, options in ways.items():
            folder = a.out / name / way
            asked = name in ("base", "full") or way in ("results", "dynamic")
            if asked and not (folder / "summary.json").exists():
                launch("eval.py", "metrics", "--out", folder, *common, *options.split(), *scoring)
    write_tables(a.out)


def launch(script, *arguments, processes=1):
    """Runs a script of this folder to its end, by torchrun on many processes; its failure ends the sweep."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [Path(__file__).parent / script, *arguments]
    subprocess.run(map(str, command), check=True)


def write_tables(out):
    """Prints the tables of all cells that have been scored, and writes them to OUT/table.md."""
    # one table a set of prompts, a row a cell
    titles = {"results": "Test prompts", "dynamic": "Dynamic prompts"}
    for folder in sorted(out.glob("base/*_frames")):
        titles[folder.name] = "Test prompts, " + folder.name.replace("_", " ")
    parts = []
    for way, title in titles.items():
        done = {name: out / name / way for name in ("base", *CELLS)
                if (out / name / way / "summary.json").exists()}
        if done:
            parts.append(f"# {title}\n\n{table(done)}")
    if not parts:
        raise ValueError(f"{out} holds no scored cell; make one with: python ablate.py run --out {out}")

    # what the paper found
    rows = [[name, cell.without, *map(str, cell.paper)] for name, cell in CELLS.items()]
    parts.append("# The paper\n\n" + markdown("World-R1-Small on its own videos: not comparable in value",
                                              PAPER_COLUMNS, rows))
    text = "\n\n".join(parts)
    write_text(out / "table.md", text + "\n")
    print(text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", allow_abbrev=False, help="train and score")
    add = run_parser.add_argument
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="default: all")
    add("--num", type=int, default=100, help="test prompts that are scored; half as many dynamic ones")
    add("--processes", type=int, default=1, help="of a training, by torchrun (on CPU: set OMP_NUM_THREADS=1)")
    add("--also", type=int, default=33, help="frames of the longer videos (models of 81 frames: 121)")
    table_parser = commands.add_parser("table", help="the tables of what is there")
    for command in (run_parser, table_parser):
        command.add_argument("--out", type=Path, default=Path("runs/sweep"))
    a, rest = parser.parse_known_args(argv)
    if rest and a.command == "table":
        parser.error(f"unknown argument {rest[0]}")
    try:
        if a.command == "run":
            run(a, rest)
        else:
            write_tables(a.out)
    except (ValueError, OSError, subprocess.CalledProcessError) as e:
        print(f"ablate.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
