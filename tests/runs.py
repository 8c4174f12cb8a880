"""Helpers of the tests that look at whole training runs: short ones, in forked children."""

import json
import queue
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
from conftest import ROOT


def short_run(checkpoint, twins):
    """Arguments of a run of a second: 4 groups of 2 videos of 5 frames, two main steps, then a dynamic."""
    options = dict(
        model=checkpoint,
        prompts=checkpoint.parent / "prompts.jsonl",
        depth_anything=twins / "depth_anything",
        critic=twins / "qwen3_vl",
        preference=twins / "hpsv3",
        frames=5, height=32, width=32,
        groups=4, members=2, steps=3, noisy_steps=2, window=1,
        views=2, frames_seen=1, recon=1,
        lora_rank=4, lr=1e-2, decay=0, ema_every=1,
        total_steps=3, main_steps=2, dynamic_steps=1, eval_every=0)
    given = ["--no-pooled", "--no-shared"]
    for name, value in options.items():
        given += ["--" + name.replace("_", "-"), str(value)]
    return given


class Forked:
    """A process of forked.py, which runs one job after the other until the tests end."""

    def __init__(self):
        self.errors = tempfile.TemporaryFile(buffering=0)  # its stderr, and its children's
        self.process = subprocess.Popen([sys.executable, ROOT / "tests" / "forked.py"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def run(self, job):
        """-> the exit codes of the job's processes, what was written to stderr."""
        self.errors.seek(0)
        self.errors.truncate()
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        self.errors.seek(0)
        errors = self.errors.read().decode(errors="replace")
        assert answer, errors[-3000:]
        return json.loads(answer), errors


FREE = queue.LifoQueue()  # of Forked: those that wait for a job


def run_job(job):
    try:
        forked = FREE.get_nowait()
    except queue.Empty:
        forked = Forked()
    done = forked.run(job)
    FREE.put(forked)
    return done


def run_jobs(jobs, at_once=1):
    """Runs forked.py's jobs. -> the exit codes of each job's processes, all that was written to stderr.

    at_once: of jobs that do not need each other, so many are run side by side.
    """
    with ThreadPoolExecutor(at_once) as pool:
        done = list(pool.map(run_job, jobs))
    return [codes for codes, _ in done], "".join(errors for _, errors in done)


def metrics(folder):
    """The lines of metrics.jsonl without what a clock or the machine decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("machine")
    return rows


def newest_checkpoint(folder):
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def weights(folder):
    """The newest checkpoint's tensors, gathered from however many processes wrote it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    dcp_to_torch_save(newest_checkpoint(folder), folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=True)


def largest_difference(a, b):
    """Of two {name: tensor} with the same names."""
    assert a.keys() == b.keys()
    assert len(a) > 10
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)
