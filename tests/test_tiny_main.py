import argparse

import pytest

import ablate
import bench
import report
import rewards
import tiny.__main__
import walkthrough
from tiny.__main__ import main


@pytest.mark.parametrize("arguments, message", [
    (["probe", "--num", "0"], "--num must be above 0 and at most a million, got 0"),
    (["compare", "--num", "-3"], "--num must be above 0"),
    (["score-vae", "--num", "100000000000"], "--num must be above 0 and at most a million"),
    (["data", "--clips", "0"], "--clips must be above 0"),
    (["vae", "--minutes", "nan"], "--minutes must be above 0 and at most a million, got nan"),
    (["probe", "--steps", "20", "0"], "--steps must be between 1 and 1000, got 0"),
    (["probe", "--guidance", "nan"], "--guidance must be between 0 and 100, got nan"),
    (["probe", "--strength", "-1"], "--strength must be between 0 and 10, got -1"),
    (["probe", "--frames", "16"], "--frames must be 4k+1, got 16; try 17"),
    (["probe", "--frames", "0"], "--frames must be between 1 and 10000, got 0")])
def test_bad_arguments_get_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module, name", [
    (ablate, "ablate.py"), (bench, "bench.py"), (report, "report.py"), (rewards, "rewards.py"), (tiny.__main__, "tiny"),
    (walkthrough, "walkthrough.py")])
def test_ctrl_c_is_one_line(module, name, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", interrupted)
    assert module.main(["a prompt"]) == 130
    assert capsys.readouterr().err == f"{name}: interrupted; give the same command again\n"
