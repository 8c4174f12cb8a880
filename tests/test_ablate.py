import json
import math
import shutil

import pytest

from ablate import CELLS, main
from train import parse_arguments as training_arguments


@pytest.fixture
def model(checkpoint, tmp_path):
    """A small random model that is sampled at 5 frames of 32x32."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    sampling = dict(frames=5, height=32, width=32, steps=2, guidance=2.0, fps=8)
    (folder / "sampling.json").write_text(json.dumps(sampling))
    return folder


def test_a_sweep_trains_scores_and_does_nothing_twice(model, tmp_path, capsys):
    out = tmp_path / "sweep"
    command = ["run", "--out", str(out), "--cells", "no_3d", "--num", "2", "--also", "9",
               "--model", str(model), "--groups", "1", "--members", "2", "--steps", "2", "--noisy-steps", "1",
               "--window", "1", "--lora-rank", "2", "--total-steps", "1", "--eval-every", "0"]
    assert main(command) == 0
    text = (out / "table.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("# ")]
    assert titles == ["# Test prompts", "# Dynamic prompts", "# Test prompts, 9 frames", "# The paper"]
    assert "| no_3d |" in text
    assert "Change from base" in text

    # every cell has been scored with its own weights; longer videos of base and full alone
    scored = {}
    for file in sorted(out.glob("*/*/summary.json")):
        summary = json.loads(file.read_text())
        scored[str(file.parent.relative_to(out))] = (summary["sizes"], summary["videos"], summary["lora"])
    trained = str(out / "no_3d")
    assert scored == {
        "base/results": (["5x32x32"], 2, None),
        "base/dynamic": (["5x32x32"], 1, None),
        "base/9_frames": (["9x32x32"], 2, None),
        "no_3d/results": (["5x32x32"], 2, trained),
        "no_3d/dynamic": (["5x32x32"], 1, trained),
    }

    # the cell's term was left out of its training
    step = json.loads((out / "no_3d" / "metrics.jsonl").read_text())
    assert step["traj"] is None
    assert math.isfinite(step["general"])

    # again: nothing is written anew, and the tables are the same
    written = {file: file.stat().st_mtime_ns for file in out.glob("*/*/metrics.jsonl")}
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/*/metrics.jsonl")} == written
    assert (out / "table.md").read_text() == text
    capsys.readouterr()
    assert main(["table", "--out", str(out)]) == 0
    assert capsys.readouterr().out == text


def test_every_cell_is_a_training_that_exists():
    """The cells' options are options of train.py, and each changes what it says it leaves out."""
    full = training_arguments([])
    for name, cell in CELLS.items():
        config = training_arguments(cell.training.split())
        assert (config == full) == (name == "full"), name
    no_3d = training_arguments(CELLS["no_3d"].training.split())
    assert [term for term, weight in no_3d.weights.items() if weight == 0] == ["meta", "recon", "traj"]
    assert training_arguments(CELLS["no_transport"].training.split()).degradation == 1


@pytest.mark.parametrize("arguments, message", (
    (["--num", "1"], "--num must be at least 2, got 1"),
    (["--processes", "0"], "--processes must be at least 1, got 0"),
    (["--also", "1"], "--also must be at least 5, got 1"),
    (["--also", "34"], "--also must be 4k+1, got 34; try 33"),
    (["--groups", "0"], "--groups must be at least 1, got 0"),
    (["--general", "0", "--cells", "no_3d"], "weight"),
    (["--out", "{tmp}/file/sweep"], "cannot write"),
))
def test_a_sweep_that_cannot_work_does_not_begin(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["run", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_damaged_results_are_one_sentence(tmp_path, capsys):
    folder = tmp_path / "base" / "results"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"videos": 1}')
    assert main(["table", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "base/results/summary.json" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "table.md").exists()


def test_user_errors_are_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--cells", "no_such"])
    assert "invalid choice: 'no_such' (choose from 'full'" in capsys.readouterr().err
    assert main(["table", "--out", str(tmp_path)]) == 2
    assert "holds no scored cell" in capsys.readouterr().err
