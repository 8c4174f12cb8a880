"""Runs train.main in forked children: torch is imported once for many runs, and a run can be killed at any moment.

Reads a JSON list of jobs from stdin, each {"args": [...], "world": 1, "kill": null | seconds | "sigterm"}; prints a JSON
list with the exit code of every child of every job.
"""
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

import torch  # noqa: E402

torch.set_num_threads(1)
import lpips  # noqa: E402, F401
import transformers  # noqa: E402

import train  # noqa: E402

transformers.Qwen3VLForConditionalGeneration, transformers.Qwen2VLModel, transformers.AutoProcessor, transformers.UMT5EncoderModel  # lazy imports, done


def run(job):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world, children = job.get("world", 1), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            sys.stdout = open(os.devnull, "w")
            code = 70
            try:
                code = train.main(job["args"])
            except BaseException as e:  # noqa: BLE001
                print(repr(e), file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    if isinstance(job.get("kill"), (int, float)):
        time.sleep(job["kill"])
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    elif job.get("kill") == "sigterm":
        file = Path(job["after"])  # once this file exists, i.e. in the middle of the run
        while not file.exists():
            time.sleep(.01)
        for pid in children:
            os.kill(pid, signal.SIGTERM)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


print(json.dumps([run(job) for job in json.load(sys.stdin)]))
