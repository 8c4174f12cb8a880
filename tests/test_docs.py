"""README and docs hold true: links, line numbers and counts, commands, figures.

    python tests/test_docs.py     brings line numbers and counts up to date

Commands in code blocks are run as they are printed, in a copy of the repository. One that takes longer or needs more
says so in a comment at the end of its line, or in a comment line above it (`NOT_RUN`); it is then only read, as are
commands inside a sentence: script and options must exist. A word in capitals stands for what a reader fills in.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ablate  # noqa: E402
import bench  # noqa: E402
import train  # noqa: E402
from sample import read_video  # noqa: E402

README = ROOT / "README.md"
REAL_SIZE = ROOT / "docs/real_size.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TO_FUNCTION = re.compile(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)")  # [`name`](file.py#L12)
TO_FILE = re.compile(r"\]\(([^)#:]+)\)")
TO_HEADING = re.compile(r"\]\(([\w./]*)#(?!L\d)([\w-]+)\)")  # [words](page.md#heading)
LINES_OF = re.compile(r"^\| \[([\w./]+)\]\([\w./]+\) \| (\d+) \|", re.M)  # the reading order's rows
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
IN_PROSE = re.compile(r"`((?:python|torchrun|make) [^`]+)`")
FILLED_IN = re.compile(r"\b[A-Z]{3,}\b|\[|\.\.\.")  # `--estimate PRESET [--gpus N]`
NOT_RUN = re.compile(r"#.*\b(minutes?|hours?|GPUs?|downloads|needs|after|cluster)\b")


# ------------------------------------------------------------------------------------------------------ links

def line_of(name, file):
    """The line on which a function, class or constant begins; 0 if there is none."""
    lines = file.read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b|{name} =", line)]
    return found[0] if found else 0


def updated(text, folder):
    """The page with the line numbers and counts as they are now."""
    def function(match):
        name, file, _ = match.groups()
        return f"[`{name}`]({file}#L{line_of(name, folder / file)})"

    def count(match):
        lines = len((folder / match[1]).read_text().splitlines())
        return match[0].replace(f"| {match[2]} |", f"| {lines} |")

    return LINES_OF.sub(count, TO_FUNCTION.sub(function, text))


def headings(page):
    """The names under which a page's headings can be linked to."""
    titles = re.findall(r"^#+ (.+)", BLOCK.sub("", page.read_text()), re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_links_lead_to_files_functions_lines_and_headings_that_exist():
    for page in PAGES:
        text = page.read_text()
        for target in TO_FILE.findall(text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name, file, line in TO_FUNCTION.findall(text):
            assert int(line) == line_of(name, page.parent / file) > 0, f"{page.name}: {name} in {file}, line {line}"
        for target, heading in TO_HEADING.findall(text):
            there = page.parent / target if target else page
            assert heading in headings(there), f"{page.name}: {target}#{heading}"


def test_line_counts_are_those_of_the_files():
    for page in PAGES:
        assert updated(page.read_text(), page.parent) == page.read_text(), f"run: python tests/test_docs.py ({page.name})"


def test_the_readme_is_one_page():
    words = [word for word in README.read_text().split() if re.search(r"\w", word)]
    assert len(words) <= 1000


def test_every_file_is_installed_and_named_in_the_readme():
    files = {file.stem for file in ROOT.glob("*.py")}
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(installed) == sorted(files)
    text = README.read_text()
    assert [name for name in files if f"[{name}.py]({name}.py)" not in text and f"`{name}.py`" not in text] == []


def test_what_a_diff_leaves_stands_in_the_code():
    code = {line for file in ROOT.glob("*.py") for line in file.read_text().splitlines()}
    code |= {line for file in ROOT.glob("tiny/*.py") for line in file.read_text().splitlines()}
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            for line in block.splitlines() if language == "diff" else []:
                kept = not line.startswith("+") and line.strip() not in ("", "...")
                assert not kept or line[1:] in code, f"{page.name}: {line}"


# --------------------------------------------------------------------------------------------------- commands

def commands(text):
    """The commands of a page's code blocks in order -> [(command, is it run)]. A comment line speaks for the lines
    below it, up to an empty one."""
    found = []
    for language, block in BLOCK.findall(text):
        if language not in ("", "bash"):
            continue
        above, variables = "", {}
        for line in block.replace("\\\n", "").splitlines():
            command, comment = re.fullmatch(r"(.*?)(#.*)?", line).groups("")
            assignment = re.fullmatch(r'(\w+)="(.*)"', command.strip())
            if assignment:
                variables[assignment[1]] = string.Template(assignment[2]).safe_substitute(variables)
            elif command.strip():
                command = string.Template(command.strip()).safe_substitute(variables)
                found.append((command, not NOT_RUN.search(above + comment)))
            else:
                above = above + line if line else ""
    return found


class Accepted(Exception):
    """The command line was read without an error."""


def accepted(*_):
    raise Accepted


@pytest.fixture
def only_read(monkeypatch):
    """Commands stop as soon as they have read their arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(*arguments):
        parse_args(*arguments)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(ablate, "run", accepted)  # its further options are the training's
    monkeypatch.setattr(ablate, "write_tables", accepted)


def check_command(command):
    """Of a command of this repository: its script or target exists and takes these options."""
    if command.startswith("make "):
        target = command.split()[1]
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), command
        return
    tests = re.search(r"-m pytest (.+)", command)
    script = re.search(r"(?:^| )(\w+)\.py( .*|$)|-m (tiny)( .*|$)", command)
    if tests:
        for file in re.findall(r"\S+\.py", tests[1]):
            assert (ROOT / file).exists(), command
    elif script and re.search(r"\b(python|torchrun)\b", command):
        name, options, _, lab_options = script.groups("")
        module = importlib.import_module(name or "tiny.__main__")
        options = options + lab_options
        if options.count("'") % 2:  # the end of bash -c '...'
            options = options.rstrip("'")
        launcher = re.search(r"\btorchrun (.*)", command)
        if launcher and "$" not in launcher[1]:  # it looks for options of its own behind the script's name, too
            taken, _ = torchrun_parser().parse_known_args(shlex.split(launcher[1]))
            assert (ROOT / taken.training_script).exists(), command
        if options:  # without any, a program is named
            with pytest.raises(Accepted):
                module.main(shlex.split(options))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_scripts_and_options_that_exist(page, only_read):
    text = page.read_text()
    in_prose = [" ".join(command.split()) for command in IN_PROSE.findall(BLOCK.sub("", text))]
    printed = [command for command, _ in commands(text)]
    for command in [command for command in in_prose if not FILLED_IN.search(command)] + printed:
        try:
            check_command(command)
        except (SystemExit, ModuleNotFoundError) as error:
            raise AssertionError(f"{page.name}: {command}: not accepted") from error


@pytest.fixture(scope="module")
def copy():
    """A copy of the repository with a .venv in which all is installed: this Python."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "nanoWorld-R1"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "out")
        shutil.copytree(ROOT, root, ignore=ignored)
        (root / ".venv").mkdir()
        for stamp in ("sample", "train", "test"):
            (root / ".venv" / stamp).touch()
        yield root


RUN = [pytest.param(command, id=f"{page.stem}: {command}") for page in PAGES
       for command, is_run in commands(page.read_text()) if is_run]


@pytest.mark.parametrize("command", RUN)
def test_short_commands_run_as_they_are_printed(command, copy):
    python = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{python}:{os.environ['PATH']}", "MAKEFLAGS": "e", "BIN": str(python)}
    done = subprocess.run(["bash", "-ec", command], cwd=copy, env=environment, capture_output=True, text=True,
                          timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- figures

# Where the numbers of README's tables are checked.
CHECKED = {
    "The method": "pictures",
    "Formulas": "formulas",
    "Reading order": "lines are counted above",
    "Does it learn?": "between markers: what `ablate.py table` makes of results/, tests/test_ablate.py",
    "The real Wan": "arithmetic: compared with bench.py below",
}


def tables(text):
    """-> [(heading, header, rows)] of a page, cells as text."""
    found = []
    for section in re.split(r"^#+ ", BLOCK.sub("", text), flags=re.M):
        heading = section.partition("\n")[0]
        for table in re.findall(r"(?:^\|.*\n)+", section, re.M):
            header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
            found.append((heading, header, rows))
    return found


def test_every_table_of_the_readme_is_checked_somewhere():
    assert {heading for heading, _, _ in tables(README.read_text())} == set(CHECKED)
    measured = README.read_text().partition("## Does it learn?")[2].partition("\n## ")[0]
    outside = re.sub(r"<!-- table: .*?<!-- end -->", "", measured, flags=re.DOTALL)
    assert "|" not in outside, "a table typed by hand"


def estimated(preset, gpus=None, options=()):
    """What `bench.py --estimate` prints of a preset, under the headers of the tables."""
    c, gpus, card = bench.preset_config(preset, gpus, options)
    memory, seconds = bench.estimate(c, gpus, card)
    hours = seconds["run"] / 3600
    peak = f"{memory['peak'] / 1e9:.1f}"
    return {"size": f"{c.height}×{c.width}×{c.frames}", "videos": f"{c.frames} frames of {c.height}x{c.width}",
            "GPUs": f"{gpus} {card['name']}", "machine": f"{gpus} {card['name']}", "s a step": f"{seconds['step']:.0f}",
            f"hours for {c.total_steps} steps": f"{hours:.0f}", "hours": f"{hours:.0f}",
            "GPU hours": f"{hours * gpus:,.0f}", "memory a GPU": f"{peak} GB", "peak GB": peak}


def check_row(header, row, figures):
    for name, cell in zip(header, row, strict=True):
        if name in figures and cell:
            assert cell.split(" (")[0] == figures[name], f"{row[0]}: {name}"


def test_tables_of_presets_are_what_bench_estimates():
    presets = [(header, row) for page in (README, REAL_SIZE) for _, header, rows in tables(page.read_text())
               if header[0] == "preset" for row in rows]
    assert len(presets) == 10
    for header, row in presets:
        preset, *gpus = re.search(r"`(.+)`", row[0])[1].split(" --gpus ")
        figures = estimated(preset, *map(int, gpus))
        check_row(header, row, figures)
        assert "×" not in row[0] or figures["size"] in row[0], row[0]


def test_the_table_of_options_is_what_the_presets_have():
    (header, rows), = [(header, rows) for _, header, rows in tables(REAL_SIZE.read_text()) if header[1:2] == ["`tiny`"]]
    presets = [preset.strip("`") for preset in header[1:]]
    assert set(presets) == set(train.PRESETS)
    configs = [train.parse_arguments(["--preset", preset, "--model", str(ROOT / "tiny" / "wan")]) for preset in presets]
    for row in rows:
        values = [getattr(c, row[0].strip("`-").replace("-", "_")) for c in configs]
        assert row[1:] == [{True: "yes", False: "no"}[v] if isinstance(v, bool) else f"{v:g}" for v in values], row


def test_the_table_of_savings_is_what_bench_estimates():
    (header, rows), = [(header, rows) for _, header, rows in tables(REAL_SIZE.read_text()) if header[0] == "saving"]
    usual = estimated("node")
    assert header[2:4] == [f"{name} ({usual[name]})" for name in ("s a step", "peak GB")]
    names = [name.split(" (")[0] for name in header]
    for row in rows:
        check_row(names, row, estimated("node", None, row[1].strip("`").split()))


def test_diffusers_takes_our_noise_and_adapter_as_the_page_says(tmp_path):
    """The page's own lines, for the tiny model."""
    block = next(block for language, block in BLOCK.findall(REAL_SIZE.read_text()) if language == "python")
    tiny = {"49, 60, 104": "17, 8, 8", "49": "17", "torch.bfloat16": "torch.float32", '"cuda"': '"cpu"',
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": str(ROOT / "tiny/wan"), "runs/n1": str(ROOT / "tiny/world_r1"),
            "latents=noise": "latents=noise, num_inference_steps=2",
            "lighthouse.mp4": str(tmp_path / "lighthouse.mp4")}
    for real, twin in tiny.items():
        assert real in block
        block = block.replace(real, twin)
    exec(block, {})
    video, fps = read_video(tmp_path / "lighthouse.mp4")
    assert video.shape == (17, 3, 64, 64) and fps == 16


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text(), page.parent))
