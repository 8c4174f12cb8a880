import errno
import fcntl
import json
import math
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from runs import largest_difference, metrics, newest_checkpoint, run_jobs, short_run, weights
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import run
import train
from model import DiT, DiTConfig
from policy import fingerprint
from run import (Processes, append_line, checkpoints_of, drop_lines, fault_of, mean_of, newest_whole,
                 read_log, save_checkpoint, std_in_groups)
from weights import ending


@pytest.fixture(scope="module")
def arguments(checkpoint, twins):
    """Of R_gen alone: how runs are kept does not depend on who judges."""
    return [*short_run(checkpoint, twins), "--groups", "2", "--meta", "0", "--recon", "0", "--traj", "0"]


def assert_same_end(folder, other):
    """Two runs have the same metrics; checkpoints, and what is exported, are equal to the bit."""
    assert metrics(folder) == metrics(other)
    assert largest_difference(weights(folder), weights(other)) == 0
    exported = [load_file(run / "lora.safetensors") for run in (folder, other)]
    assert largest_difference(*exported) == 0


# -------------------------------------------------------------------------------------------- killed, resumed

MOMENTS = [  # of a step: right after this call, where its first argument ends so
    ("train", "update", ""),  # trained, not logged
    ("train", "append_line", "metrics.jsonl"),  # logged, not saved
    ("run.dcp", "save", ""),  # saved, without a manifest
    ("run", "to_disk", "manifest.json"),  # whole, under its temporary name
    ("run", "to_disk", "checkpoints"),  # renamed
    ("run.shutil", "rmtree", "step_000001")]  # the oldest is gone
STARTING_OR_EVALUATING = [  # in this order, with an evaluation before the first step and after the second
    ("run", "write_json", "config.json"),  # begun
    ("train", "evaluation_rows", ""),  # sampled and scored, not logged
    ("train", "append_line", "eval.jsonl"),  # logged, not exported
    ("policy", "write_safetensors", "lora.safetensors"),  # exported, not to eval/ yet
    ("run", "to_disk", "checkpoints"),  # the first step is saved
    ("train", "evaluation_rows", ""),  # the second is trained and evaluated: neither is saved
    ("train", "append_line", "eval.jsonl")]
DIES_AFTER = """
import os, policy, run, signal
owner, name, word = {moment}
owner = eval(owner)
original = getattr(owner, name)
def dies(*arguments, **options):
    out = original(*arguments, **options)
    if str(arguments[0]).endswith(word):
        os.kill(os.getpid(), signal.SIGKILL)
    return out
setattr(owner, name, dies)
"""


def test_killed_at_every_moment_of_a_step_it_ends_the_same(arguments, whole, tmp_path):
    """SIGKILL wherever a step without an evaluation changes files; started again each time. It ends as an uninterrupted
    run, to the bit."""
    killed = [*arguments, "--runs", str(tmp_path), "--total-steps", "5", "--name", "killed"]
    jobs = [dict(args=killed, before=DIES_AFTER.replace("{moment}", repr(moment))) for moment in MOMENTS]
    codes, err = run_jobs([*jobs, dict(args=killed)])
    assert codes == [*([-9] for _ in MOMENTS), [0]], err[-3000:]
    assert len(metrics(whole)) == 5
    assert_same_end(tmp_path / "killed", whole)


def test_killed_while_it_starts_or_evaluates_it_ends_the_same(arguments, tmp_path):
    """SIGKILL before the first step and inside evaluations: the same evaluations, too, each of them once."""
    options = [*arguments, "--runs", str(tmp_path), "--total-steps", "2", "--eval-every", "2", "--eval-prompts", "2"]
    killed = [*options, "--name", "killed"]
    jobs = [dict(args=killed, before=DIES_AFTER.replace("{moment}", repr(moment))) for moment in STARTING_OR_EVALUATING]
    codes, err = run_jobs([*jobs, dict(args=killed), dict(args=[*options, "--name", "alone"])])
    assert codes == [*([-9] for _ in STARTING_OR_EVALUATING), [0], [0]], err[-3000:]
    assert_same_end(tmp_path / "killed", tmp_path / "alone")
    evaluations = [(tmp_path / name / "eval.jsonl").read_text() for name in ("killed", "alone")]
    assert evaluations[0] == evaluations[1]
    assert [json.loads(line)["step"] for line in evaluations[0].splitlines()] == [0, 2]
    for file in ("000000/01.mp4", "000002/01.mp4", "000002/lora.safetensors"):
        assert len({(tmp_path / name / "eval" / file).read_bytes() for name in ("killed", "alone")}) == 1


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The folder of an uninterrupted run of five steps."""
    runs = tmp_path_factory.mktemp("runs")
    base = [*arguments, "--runs", str(runs), "--total-steps", "5"]
    codes, err = run_jobs([dict(args=[*base, "--name", "whole"])])
    assert codes == [[0]], err[-3000:]
    return runs / "whole"


def test_sigterm_saves_and_ends_well(arguments, whole, tmp_path):
    """Asked to stop after its first step, it finishes a step and saves it, though told to save every 100."""
    folder = tmp_path / "stopped"
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "5"]
    job = dict(args=[*base, "--name", "stopped", "--save-every", "100"])
    codes, _ = run_jobs([job | dict(kill="sigterm", after=str(folder / "metrics.jsonl"))])
    assert codes == [[0]]
    done = len(metrics(folder))
    assert 0 < done < 5
    assert [checkpoint.name for checkpoint in (folder / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    assert metrics(folder) == metrics(whole)[:done]
    learnt = load_file(folder / "lora.safetensors")  # so far
    averages = [values for key, values in weights(folder).items() if key.startswith("average.")]
    assert any(torch.equal(values, average) for values in learnt.values() for average in averages)

    codes, _ = run_jobs([job])
    assert codes == [[0]]
    assert_same_end(folder, whole)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(arguments, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "damaged")
    newest = newest_checkpoint(folder)
    assert newest.name == "step_000005"
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "5"]
    codes, err = run_jobs([dict(args=[*base, "--name", "damaged"])])
    assert codes == [[0]]
    assert f"{file.name} is damaged" in err
    assert str(newest) in err
    assert fault_of(newest) is None  # written anew
    assert (newest.parent / "damaged_step_000005").is_dir()
    assert_same_end(folder, whole)


class Hostile:
    """Its pickle makes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_from_elsewhere_runs_no_code(arguments, whole, tmp_path):
    """Its sums may be right: the manifest lies beside what it sums up. It is moved aside like a damaged
    one."""
    folder = shutil.copytree(whole, tmp_path / "hostile")
    newest = newest_checkpoint(folder)
    (newest / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][".metadata"] = run.digest(newest / ".metadata")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    hostile = [*arguments, "--runs", str(tmp_path), "--total-steps", "5", "--name", "hostile"]
    codes, err = run_jobs([dict(args=hostile)])
    assert codes == [[0]]
    assert "posix.mkdir, which is no part of a checkpoint" in err
    assert not (tmp_path / "ran").exists()
    assert_same_end(folder, whole)


def test_what_a_checkpoint_declares_as_bytes_is_not_unpickled(whole, tmp_path):
    """torch loads such an entry with a pickle that may run code; ours are tensors, all of them."""
    newest = newest_checkpoint(shutil.copytree(whole, tmp_path / "bytes"))
    metadata = run.read_metadata(newest)
    metadata.state_dict_metadata[min(metadata.state_dict_metadata)] = BytesStorageMetadata()
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][".metadata"] = run.digest(newest / ".metadata")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert "BytesStorageMetadata, which is no part of a checkpoint" in fault_of(newest)


def test_a_pipe_or_a_file_from_outside_does_not_hang_a_resume(whole, tmp_path):
    newest = newest_checkpoint(shutil.copytree(whole, tmp_path / "pipe"))
    manifest = newest / "manifest.json"
    kept = manifest.read_text()
    manifest.unlink()
    os.mkfifo(manifest)
    assert fault_of(newest) == "manifest.json is no file"
    manifest.unlink()
    manifest.write_text('{"step": 1, "files": {"/dev/zero": "x"}}')
    assert "/dev/zero" in fault_of(newest)
    manifest.write_text(kept)
    assert fault_of(newest) is None


def test_a_file_that_no_manifest_lists_makes_a_checkpoint_damaged(whole, tmp_path):
    newest = newest_checkpoint(shutil.copytree(whole, tmp_path / "more"))
    assert fault_of(newest) is None
    (newest / "__1_0.distcp").write_bytes(b"")
    assert fault_of(newest) == "__1_0.distcp is not in its manifest"


def write_base(folder, fingerprint):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(base_sha256=fingerprint)))


@pytest.mark.parametrize("harm, message", [
    (lambda folder: (folder / "config.json").unlink(), "has checkpoints and no config.json"),
    (lambda folder: (folder / "config.json").write_text('{"weights": "x"}'), "entry weights: Expected object"),
    (lambda folder: shutil.rmtree(folder / "checkpoints"), "has no checkpoint, so it would begin again"),
    (lambda folder: [shutil.rmtree(folder / "checkpoints"), (folder / "config.json").unlink()],
     "no config.json, so it is no run"),
    (lambda folder: write_base(folder, "another"), "the weights of --model .* have changed since"),
    (lambda folder: None, "has done 5 steps already")])
def test_a_run_that_cannot_go_on_is_left_as_it_is(harm, message, arguments, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "kept")
    harm(folder)
    def content():
        return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}

    before = content()
    total = "4" if "already" in message else "5"
    assert train.main([*arguments, "--runs", str(tmp_path), "--name", "kept", "--total-steps", total]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert content() == before


ON_A_FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
"""


def test_a_full_disk_loses_no_older_checkpoint(arguments, whole, tmp_path):
    """A run that goes on may write no file beyond 10 kB, as on a full disk: it stops with a message, and the
    older checkpoints stay."""
    folder = shutil.copytree(whole, tmp_path / "full")
    before = {file: file.read_bytes() for file in (folder / "checkpoints").rglob("*") if file.is_file()}
    assert len(before) > 1
    full = [*arguments, "--runs", str(tmp_path), "--name", "full", "--total-steps", "7"]
    codes, err = run_jobs([dict(args=full, before=ON_A_FULL_DISK)])
    assert codes == [[2]], err[-2000:]
    assert "train.py: the checkpoint after step 6 could not be written" in err, err[-2000:]
    assert all(file.exists() and file.read_bytes() == content for file, content in before.items())
    assert not list((folder / "checkpoints").glob(".part*"))


@pytest.mark.parametrize("limit", [100, 2000])
def test_what_a_full_disk_leaves_of_a_checkpoint_is_removed(limit, tmp_path):
    """The weights do not fit, or the manifest alone does not. One sentence; the next one can be written."""
    state = dict(a=torch.zeros(10 if limit == 100 else 2000))
    policy = SimpleNamespace(c=SimpleNamespace(keep=2), processes=Processes("cpu"), state=lambda: state,
                             check_finite=lambda: None)
    save_checkpoint(policy, tmp_path, 1)
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))
    try:
        with pytest.raises(RuntimeError) as error:
            save_checkpoint(policy, tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert str(error.value).startswith(f"the checkpoint after step 2 could not be written to {tmp_path} (")
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["step_000001"]
    save_checkpoint(policy, tmp_path, 2)
    assert newest_whole(tmp_path).name == "step_000002"


def test_ctrl_c_while_a_checkpoint_is_written_is_no_full_disk(tmp_path):
    """torch wraps it like any other error."""
    def state():
        return dict(a=Interrupting())

    policy = SimpleNamespace(c=SimpleNamespace(keep=2), processes=Processes("cpu"), state=state,
                             check_finite=lambda: None)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(policy, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


class Interrupting:
    """Ctrl-C comes when it is pickled."""

    def __reduce__(self):
        raise KeyboardInterrupt


DIES_ONCE = """
import os, pathlib, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import torch
torch.set_num_threads(1)
import train
roll_out_groups = train.roll_out_groups  # called once a step
def dying(policy, step, *rest):
    began = pathlib.Path(__file__ + os.environ["RANK"])
    if step == 1 and not began.exists():
        checkpoint = pathlib.Path(policy.c.runs, policy.c.name, "checkpoints", "step_000001")
        began.write_text(str(checkpoint.exists()))
        if os.environ["RANK"] == "1":
            while not pathlib.Path(__file__ + "0").exists():
                time.sleep(.01)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # as on a GPU, where NCCL would wait for the dead
        os._exit(1)
    return roll_out_groups(policy, step, *rest)
train.roll_out_groups = dying
sys.exit(train.main(sys.argv[1:]))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_restarts_after_a_killed_rank(nodes, arguments, tmp_path):
    """torchrun --max-restarts: one of two ranks is killed once, the other waits for it, on one node or on two; the
    run ends as an undisturbed one. (On two, the agent whose rank lives does not count its restart.)"""
    base = [*arguments, "--runs", str(tmp_path)]
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes),
                "--nproc-per-node", str(2 // nodes), "--max-restarts", "1", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "dies_once"]
    command = [*torchrun, str(script), str(ROOT), *base, "--name", "restarted"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if nodes > 1:
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with open(tmp_path / "log", "w") as log:
        agents = [subprocess.Popen(command, stdout=log, stderr=log, env=env) for _ in range(nodes)]
    try:
        codes = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # it ends its processes first; after a kill they would stay
        for agent in agents:
            agent.wait(timeout=60)
    assert codes == [0] * nodes, (tmp_path / "log").read_text()[-6000:]
    assert Path(f"{script}1").exists()
    assert Path(f"{script}0").read_text() == "True", "a checkpoint was there to go on from"
    codes, _ = run_jobs([dict(args=[*base, "--name", "whole"], world=2)])
    assert codes == [[0, 0]]
    assert_same_end(tmp_path / "restarted", tmp_path / "whole")


def test_several_nodes_are_not_started_where_they_could_not_be_restarted(monkeypatch):
    for name, value in dict(USE_AGENT_STORE="True", MAX_RESTARTS="3").items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        run.store_of_this_start()


# ---------------------------------------------------------------------------------------------------- the log

def test_lines_of_steps_to_be_done_again_are_dropped_with_a_half_written_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    drop_lines(file, 2)  # no file, nothing to drop
    for step in range(4):
        append_line(file, dict(step=step))
    with open(file, "a") as f:
        f.write('{"step": 1, "tot')
    drop_lines(file, 2)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [dict(step=0), dict(step=1)]


def test_means_and_spreads_leave_masked_samples_out():
    assert mean_of([1.0, math.nan, 4.0, math.inf]) == 2.5
    assert mean_of([math.nan]) is None
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, 5.0, 5.0], [math.nan] * 3])
    assert std_in_groups(values) == pytest.approx((1 + 0) / 2)
    assert std_in_groups(values[2:]) is None


# ---------------------------------------------------------------------------------------- history is not lost

def written_checkpoint(folder, step):
    """A folder as save_checkpoint leaves it: files, and the manifest of their digests."""
    checkpoint = folder / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "a.distcp").write_bytes(b"weights")
    (checkpoint / ".metadata").write_bytes(pickle.dumps({}))
    files = {file.name: run.digest(file) for file in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps(dict(step=step, files=files)))
    return checkpoint


@pytest.mark.parametrize("manifest", [
    "[]", "null", "{}", '{"files": {}}', '{"files": {"b": "0"}}', "{", '"x"'])
def test_a_manifest_that_is_none_goes_back_to_the_one_before(manifest, tmp_path, capsys):
    before, last = written_checkpoint(tmp_path, 1), written_checkpoint(tmp_path, 2)
    (last / "manifest.json").write_text(manifest)
    assert newest_whole(tmp_path) == before
    assert "step_000002 is refused" in capsys.readouterr().err
    assert not last.exists()


def test_a_run_without_a_whole_checkpoint_does_not_begin_again(tmp_path):
    """Its log and its damaged checkpoints are its history; the next start says so again."""
    assert newest_whole(tmp_path) is None
    (written_checkpoint(tmp_path, 1) / "a.distcp").write_bytes(b"other")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no checkpoint in .* is whole"):
            newest_whole(tmp_path)
    assert (tmp_path / "damaged_step_000001" / "a.distcp").read_bytes() == b"other"


def test_only_what_was_written_here_counts_as_a_checkpoint(tmp_path):
    ours = written_checkpoint(tmp_path, 3)
    (tmp_path / "step_1_best").mkdir()
    (tmp_path / "step_000003_copy").mkdir()
    assert checkpoints_of(tmp_path) == [ours]
    assert newest_whole(tmp_path) == ours


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "x": 1.5}\n[1]\n{}\nnull\n{"step": 1}\n{"step": 2, "x"')
    assert read_log(file) == [dict(step=0, x=1.5), dict(step=1)]
    drop_lines(file, 1)
    assert file.read_text() == '{"step": 0, "x": 1.5}\n'


def test_one_run_has_one_owner(arguments, tmp_path, capsys):
    """A second start names the holder, ends 2 and leaves the run alone; a lock goes with the process that
    held it."""
    given = [*arguments, "--runs", str(tmp_path), "--name", "x", "--total-steps", "1"]
    (tmp_path / "x").mkdir()
    with open(tmp_path / "x" / ".lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        holder.write("process 7 on somewhere\n")
        holder.flush()
        assert train.main(given) == 2
        assert "x is being trained by process 7 on somewhere" in capsys.readouterr().err
        assert not (tmp_path / "x" / "config.json").exists()
    assert train.main(given) == 0
    assert train.main(given) == 0  # nothing left to do, and nobody in the way


POISONED = """
import math, os
collect, calls = train.Policy.collect_gradients, []
def poisoned(policy):
    collect(policy)
    calls.append(True)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        next(iter(policy.sums.values())).fill_(math.nan)
train.Policy.collect_gradients = poisoned
"""


def test_a_gradient_that_is_not_finite_on_one_process_is_left_out_on_all(arguments, tmp_path):
    """Two processes of two groups each: the third group of the second one falls into its second step."""
    given = [*arguments, "--groups", "4", "--runs", str(tmp_path), "--name", "x"]
    codes, err = run_jobs([dict(args=given, world=2, before=POISONED)])
    assert codes == [[0, 0]], err[-3000:]
    assert [row["skipped"] for row in metrics(tmp_path / "x")] == [0, 1, 0]
    assert all(values.isfinite().all() for values in weights(tmp_path / "x").values())


def test_a_step_that_is_logged_twice_is_kept_once_and_said(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    for step, value in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 4.0)):
        append_line(file, dict(step=step, total=value))
    assert [row["total"] for row in drop_lines(file, 3)] == [1.0, 3.0, 4.0]
    assert "1 further lines" in capsys.readouterr().err
    assert [row["step"] for row in read_log(file)] == [0, 1, 2]


def test_a_digest_of_prompts_knows_contents_not_names(tmp_path):
    for name, text in (("a.txt", "one\n"), ("b.txt", "one\n"), ("c.txt", "two\n")):
        (tmp_path / name).write_text(text)
    one, same, other = [run.prompts_digest(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]
    assert one == same != other

    # of a folder: its splits, which may not change places
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text("one\n")
    (folder / "test.txt").write_text("two\n")
    before = run.prompts_digest(folder)
    (folder / "train.txt").write_text("two\n")
    (folder / "test.txt").write_text("one\n")
    assert run.prompts_digest(folder) != before


def test_a_run_does_not_go_on_with_other_prompts(tmp_path):
    """A run that was begun before digests were kept does."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("push_in one\n")
    c = train.parse_arguments(["--name", "a", "--runs", str(tmp_path), "--prompts", str(prompts)])
    alone = run.Processes("cpu", 1.0)
    run.begin_run(c, tmp_path / "a", SimpleNamespace(processes=alone, fingerprint="1"))
    run.open_run(c, alone)
    prompts.write_text("push_in two\n")
    with pytest.raises(ValueError, match="has changed since"):
        run.open_run(c, alone)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["prompts_sha256"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    run.open_run(c, alone)
    alone.close()


def test_a_timeout_is_in_minutes(monkeypatch, capsys):
    assert Processes("cpu", 1.5).timeout.total_seconds() == 90

    def asked(device, timeout):
        raise ValueError(f"{timeout} minutes")

    monkeypatch.setattr(train, "Processes", asked)
    assert train.main(["--timeout", "2.5"]) == 2
    assert capsys.readouterr().err.endswith("train.py: 2.5 minutes\n")


def test_a_line_of_the_log_by_hand():
    """Three groups of two; the second one is flat. Two updates, whose largest ratios are 1.5 and 3."""
    notes = [dict(ratio=1.0, ratio_max=largest, clipped=0.0, kl=0.0, loss=0.0) for largest in (1.5, 3.0)]
    A = torch.tensor([-2.0, 1, 0, 0, -1, 1])
    row = run.metrics_row(SimpleNamespace(groups=3), 0, False, [0, 1, 2], dict(total=torch.arange(6.0)), [0.0] * 6, {}, A,
                          notes, [1.0], Processes("cpu"), run.Clock())
    assert (row["total_std"], row["ratio_max"], row["advantage_max"], row["flat_groups"]) == (.5, 3, 1, 1)
    assert row["advantage_abs"] == pytest.approx(5 / 6)


def test_more_processes_than_gpus_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in dict(LOCAL_RANK=4, RANK=4, WORLD_SIZE=8).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RuntimeError) as error:
        Processes("cuda")
    assert ending(error.value, "x.py") == (2, "x.py: process 4 of 8: no GPU is left for this process, for the machine "
                                              "has 4; start no more: torchrun --nproc-per-node 4")


def test_a_file_system_without_locks_is_said_and_no_reason_to_stop(monkeypatch, tmp_path, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    alone = Processes("cpu")
    assert run.acquire_lock(tmp_path, alone) is None
    assert f"{tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err
    alone.close()


def test_a_run_that_another_began_meanwhile_is_not_gone_on_with(tmp_path):
    """Between open_run and begin_run a model is loaded, for minutes; another may come, train, and end."""
    first, second = (train.parse_arguments(["--name", "a", "--runs", str(tmp_path), "--seed", seed]) for seed in "12")
    alone, other = run.Processes("cpu", 1.0), run.Processes("cpu", 1.0)
    folder = run.open_run(first, alone)
    run.begin_run(second, run.open_run(second, other), SimpleNamespace(processes=other, fingerprint="1"))
    other.close()
    with pytest.raises(ValueError, match="was started with --seed 2, not 1"):
        run.begin_run(first, folder, SimpleNamespace(processes=alone, fingerprint="1"))
    alone.close()


def test_a_model_that_was_changed_in_place_has_another_fingerprint():
    dit = DiT(DiTConfig(2, 16, 64, 1, text_dim=8))
    before = fingerprint(dit, None)
    assert fingerprint(dit, None) == before
    with torch.no_grad():
        dit.blocks[0].ffn.net[2].weight[0, 0] += 1e-4
    assert fingerprint(dit, None) != before


def test_ctrl_c_while_a_checkpoint_is_read_is_no_damage():
    interrupted = CheckpointException("", {0: (KeyboardInterrupt(), None)})
    with pytest.raises(KeyboardInterrupt):
        run.reason_of(interrupted)
    assert run.reason_of(CheckpointException("", {0: (OSError(5, "Input/output error"), None)})) == "Input/output error"


def test_what_a_kill_leaves_of_the_first_config_is_no_obstacle(tmp_path):
    """config.json is written under a hidden name, then renamed."""
    c = train.parse_arguments(["--name", "a", "--runs", str(tmp_path)])
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / ".config.part-0123.json").write_text("{")
    run.check_run(c, tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="holds summary.json and no config.json, so it is no run"):
        run.check_run(c, tmp_path / "a")


# -------------------------------------------------------------------------------------- what is kept, and what was

def test_another_adapter_is_another_fingerprint(tmp_path):
    dit = DiT(DiTConfig(2, 16, 64, 1, text_dim=8))
    for number, name in enumerate("ab"):
        save_file({"x": torch.full((1,), float(number))}, tmp_path / f"{name}.safetensors")
    adapters = None, tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert len({fingerprint(dit, adapter) for adapter in adapters}) == 3


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    policy = SimpleNamespace(c=SimpleNamespace(keep=2), processes=Processes("cpu"),
                             state=lambda: dict(a=torch.zeros(2)), check_finite=lambda: None)
    for step in range(1, 5):
        save_checkpoint(policy, tmp_path, step)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_an_option_an_older_run_did_not_know_had_its_default(tmp_path):
    c, alone = train.parse_arguments(["--name", "a", "--runs", str(tmp_path)]), Processes("cpu")
    run.begin_run(c, tmp_path / "a", SimpleNamespace(processes=alone, fingerprint="1"))
    file = tmp_path / "a" / "config.json"
    config = json.loads(file.read_text())
    for name in ("ema_every", "noisy_steps"):
        del config[name]
    file.write_text(json.dumps(config))
    own = train.Config().noisy_steps
    assert own != c.noisy_steps, "the tiny preset's"
    with pytest.raises(ValueError, match=f"was started with --noisy-steps {own}, not {c.noisy_steps}"):
        run.check_run(c, tmp_path / "a")
    alone.close()
