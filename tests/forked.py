"""Runs train.main or eval.main in forked children: torch is imported once, and a run can be killed anytime.

Reads a job a line from stdin, as JSON, and prints a line with the exit codes of its processes. A job:
    {"args": [...], "world": 2}                               train.main(args) on 2 processes (default 1)
    {"args": [...], "main": "eval"}                           eval.main(args)
    {"args": [...], "kill": "sigterm", "after": "a file"}     asked to stop once that file exists
    {"args": [...], "sampled": "a file"}                      a line there for each prompt an evaluation samples
    {"args": [...], "before": "source"}                       Python that is run first; it may patch train
"""
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a fork must not find CUDA initialised

import torch  # noqa: E402

torch.set_num_threads(1)
import lpips  # noqa: E402, F401
import transformers  # noqa: E402

import train  # noqa: E402

for lazy in ("Qwen3VLForConditionalGeneration", "Qwen2VLModel", "AutoProcessor", "UMT5EncoderModel"):
    getattr(transformers, lazy)  # imported here, once, not in each child


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(job, rank, world, port):
    """Never returns: exits with that main's code, or 70 after an exception that it let through."""
    if world > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 1)  # no library's line is taken for an answer
    if "sampled" in job:
        train.sample_latents = noting(train.sample_latents, job["sampled"], rank)
    code = 70
    try:
        exec(job.get("before", ""), dict(train=train))
        code = importlib.import_module(job.get("main", "train")).main(job["args"])
    except BaseException as e:  # noqa: BLE001
        print(repr(e), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def noting(sample_latents, file, rank):
    """sample_latents that notes its prompts, one "rank<tab>prompt" a line."""
    def noted(wan, prompts, *rest, **options):
        with open(file, "a") as f:
            f.writelines(f"{rank}\t{prompt}\n" for prompt in prompts)
        return sample_latents(wan, prompts, *rest, **options)

    return noted


def run(job):
    """-> the exit codes of the job's processes; -9 if killed."""
    world = job.get("world", 1)
    port = free_port()
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            child(job, rank, world, port)
        children.append(pid)

    if job.get("kill") == "sigterm":
        file = Path(job["after"])  # it exists in the middle of the run
        while not file.exists():
            time.sleep(.01)
        for pid in children:
            os.kill(pid, signal.SIGTERM)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
