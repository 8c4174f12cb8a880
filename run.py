"""A run's machine room: processes, the run's folder, checkpoints, the clock and the log.

runs/NAME/ holds config.json, metrics.jsonl (one line a step; what a clock or the machine decides is under
"machine"), eval.jsonl, eval/, checkpoints/ and, at every evaluation and where it ends, lora.safetensors (with
--full model/ instead). A run goes on from its newest whole checkpoint when it is started again, on any number
of processes.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from prompts import SPLITS
from weights import config_from, read_bytes, read_json, to_disk, write_json, write_text

# -------------------------------------------------------------------------------------------------- processes

class Processes:
    """The process group, or a single process: rank, world, device, timeout."""

    def __init__(self, device, timeout=60.0):
        """timeout: minutes that a process waits for another before it gives the run up."""
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.timeout = datetime.timedelta(minutes=timeout)
        self.lock = None  # of the run's folder, on rank 0
        cuda = device.startswith("cuda")
        self.device = torch.device(device if cuda else "cpu")
        if cuda and (self.world > 1 or self.device.index is None):  # of several processes each has its own
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            gpus = torch.cuda.device_count()
            if self.device.index >= gpus:
                # no ValueError: the machine's first process, which would say it (`ending`), has its GPU
                raise RuntimeError(f"no GPU is left for this process, for the machine has {gpus}; "
                                   f"start no more: torchrun --nproc-per-node {gpus}")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store_of_this_start(), rank=self.rank,
                                    world_size=self.world, timeout=self.timeout)
        if self.world > 1 and cuda:
            # a network that NCCL cannot use is found now, not at the first gradient
            test = torch.ones(1, device=self.device)
            dist.all_reduce(test)
            test.item()  # waits for it

    def gather(self, value):
        """[value of rank 0, of rank 1, ...] on every rank."""
        if self.world == 1:
            return [value]
        out = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def on_rank_0(self, call):
        """-> call() of rank 0, on every rank; its ValueError or RuntimeError is raised on all of them."""
        found = error = None
        if self.rank == 0:
            try:
                found = call()
            except (ValueError, RuntimeError) as e:
                error = e
        found, error = self.gather((found, error))[0]
        if error:
            raise error
        return found

    def wait(self):
        """Until every process has come here."""
        self.gather(None)

    def add(self, tensors):
        """Sums tensors over the ranks in place, in one flat all-reduce."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))

    def close(self):
        if self.lock is not None:
            self.lock.close()
        if self.world > 1:
            dist.destroy_process_group()


def store_of_this_start():
    """-> the key-value store in which processes find each other. ValueError if it could not be found again
    after a restart.

    The store of torchrun's agent outlives a restart, and addresses of the dead are in it: so each start has
    its prefix, the number of restarts. But every node's agent counts those of its own processes alone, so
    with several nodes the store must be a new one at each start, rank 0's own.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if agents and nodes > 1 and restarts:
        raise ValueError("torchrun could not restart several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                         "on all of them and give --rdzv-backend c10d, or leave --max-restarts out")
    store, *_ = next(dist.rendezvous("env://"))
    if agents:
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


# ------------------------------------------------------------------------------------------- the run's folder

# options that may differ when a run is resumed (another --batch changes only the last bits of sums)
MAY_CHANGE = {"runs", "name", "total_steps", "save_every", "keep", "wandb", "device", "eval_every", "timeout",
              "shard_size", "offload", "batch", "checkpointing", "max_masked", "max_skipped"}


class ConfigJson(TypedDict, total=False):
    weights: dict[str, float]


def flat(config):
    """A configuration with the reward terms' weights beside the other options, as on the command line."""
    return {name: value for name, value in config.items() if name != "weights"} | config.get("weights", {})


def open_run(c, processes):
    """-> the folder runs/NAME, locked if it is there. Nothing but the lock is written yet: `begin_run` does.
    ValueError if it holds something else than this run (`check_run`)."""
    folder = Path(c.runs) / c.name
    check_run(c, folder)
    processes.on_rank_0(lambda: acquire_lock(folder, processes))
    return folder


def check_run(c, folder, fingerprint=None):
    """ValueError if a folder holds what is no run, another configuration, other prompts, another model
    (fingerprint: its `Policy.fingerprint`), or more steps than are asked for, or has lost its checkpoints."""
    # is it a run's folder, and not one that is ahead of what is asked for?
    config_file, checkpoints = folder / "config.json", checkpoints_of(folder / "checkpoints")
    if checkpoints and not config_file.exists():
        raise ValueError(f"{folder} has checkpoints and no config.json, so nobody knows what was trained; "
                         "put the file back, or choose another --name")
    others = {file.name for file in folder.glob("[!.]*")} - {"checkpoints"}  # a kill may leave hidden ones
    if others and not config_file.exists():
        raise ValueError(f"{folder} holds {min(others)} and no config.json, so it is no run; "
                         "choose another --name")
    if checkpoints and steps_of(checkpoints[-1]) > c.total_steps:
        raise ValueError(f"{folder} has done {steps_of(checkpoints[-1])} steps already; "
                         f"give a --total-steps above that, not {c.total_steps}, or another --name")
    # was it started with the same settings, prompts and weights, and are its checkpoints there?
    if config_file.exists():
        may_change = MAY_CHANGE
        if c.decay:  # which depends on the run's length
            may_change = MAY_CHANGE - {"total_steps"}
        # an option that an older run did not know had its default
        defaults = {f.name: f.default for f in dataclasses.fields(c) if f.default is not dataclasses.MISSING}
        before = read_json(config_file)
        config_from(ConfigJson, before, config_file)  # for its ValueError: `flat` needs a dict of weights
        before = defaults | flat(before)
        for name, value in flat(dataclasses.asdict(c)).items():
            was = before.get(name, 0.0)  # 0: the weight of a term that it did not have
            if name not in may_change and was != value:
                raise ValueError(f"{folder} was started with --{name.replace('_', '-')} {was}, not {value}; "
                                 "choose another --name, or keep its settings")
        # an older run did not keep it
        if before.get("prompts_sha256", prompts_digest(c.prompts)) != prompts_digest(c.prompts):
            raise ValueError(f"{c.prompts} has changed since {folder} was started with it, so --prompts would"
                             " draw others; put the old contents back, or choose another --name")
        if fingerprint and before.get("base_sha256", fingerprint) != fingerprint:
            raise ValueError(f"the weights of --model {c.model} or --lora {c.lora} have changed since "
                             f"{folder} was started; put the old ones back, or choose another --name")
        # a run that was killed before its first checkpoint may begin again; a damaged one (damaged_step_...)
        # counts, for it says why by itself
        log = folder / "metrics.jsonl"
        logged = max((row["step"] for row in read_log(log)), default=0) if log.exists() else 0
        if not list((folder / "checkpoints").glob("*step_*")) and logged >= before.get("save_every", 1):
            raise ValueError(f"{folder} has logged step {logged} and has no checkpoint, so it would begin "
                             "again over what it did; put its checkpoints back, or choose another --name")


def begin_run(c, folder, policy):
    """Makes a run's folder, if it is new, and writes its configuration. ValueError as from `check_run`:
    another may have begun it while the model was loaded."""
    def begin():
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        acquire_lock(folder, policy.processes)
        check_run(c, folder, policy.fingerprint)
        kept = dict(prompts_sha256=prompts_digest(c.prompts), base_sha256=policy.fingerprint)
        write_json(folder / "config.json", dataclasses.asdict(c) | kept)

    policy.processes.on_rank_0(begin)


def prompts_digest(path):
    """-> SHA-256 (hex) of a prompt file's bytes, or of the files that `read_prompts` reads in a folder."""
    path = Path(path)
    if not path.is_dir():
        return hashlib.sha256(read_bytes(path)).hexdigest()
    names = [split + kind for split in SPLITS for kind in (".jsonl", ".txt")]
    files = [path / name for name in names if (path / name).exists()]
    sums = [hashlib.sha256(read_bytes(file)).hexdigest() for file in files]
    # of the names too: the splits may not change places
    return hashlib.sha256(f"{[file.name for file in files]} {sums}".encode()).hexdigest()


def acquire_lock(folder, processes):
    """Locks the run's folder, if it is there, until this process ends, however it ends. ValueError if another
    run holds it."""
    if processes.lock is not None or not folder.exists():
        return
    processes.lock = open(folder / ".lock", "a+")
    try:
        fcntl.flock(processes.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        processes.lock.seek(0)
        holder = processes.lock.read().strip() or "another process"
        raise ValueError(f"{folder} is being trained by {holder}; wait for it, stop it, or choose another "
                         "--name") from None
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # some clusters' file systems know no locks
        print(f"{folder} cannot be locked ({e.strerror}); see to it that no other run trains there",
              file=sys.stderr)
    processes.lock.truncate(0)
    processes.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    processes.lock.flush()


def append_line(file, row):
    with open(file, "a") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_log(file):
    """-> the rows of a log. What is not a row, such as a half-written last line, is skipped."""
    rows = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0:
                rows.append(row)
    return rows


def missing_steps(rows, done=0):
    """-> [(first, last)] of each stretch of steps that a log should have, and has not. done: steps that are
    known to be done, whether the log has them or not."""
    # gaps lie between neighbours; -1 and `done` stand for the two ends
    ends = {-1, done} if done else {-1}
    steps = sorted(ends | {row["step"] for row in rows})
    return [(before + 1, after - 1) for before, after in itertools.pairwise(steps) if after > before + 1]


def in_words(stretches):
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in stretches)


def drop_lines(file, steps):
    """Drops the rows of step `steps` and later, which will be done again, and lines that are no rows. Of two
    rows of one step the later is kept, with a warning. -> the rows that are left."""
    if not file.exists():
        return []
    rows = [row for row in read_log(file) if row["step"] < steps]
    kept = list({row["step"]: row for row in rows}.values())
    if len(kept) < len(rows):
        print(f"train.py: {file} had {len(rows) - len(kept)} further lines of steps that it has already; "
              "the last of each step is kept", file=sys.stderr)
    write_text(file, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def wandb_log(c, folder):
    """-> log(row, prefix) to Weights & Biases: numbers, also `machine`'s and the first gradient's norm."""
    import wandb  # train.check has seen that it is there
    # a run is its folder: of the same name elsewhere it is another one
    own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    run = wandb.init(project="nanoworld-r1", name=c.name, id=f"{c.name}-{own}", resume="allow", dir=folder,
                     config=dataclasses.asdict(c))

    def log(row, prefix=""):
        machine = row.get("machine", {})
        seconds = {f"seconds/{phase}": value for phase, value in machine.get("seconds", {}).items()}
        norms = dict(grad=row["grad"][0]) if row.get("grad") else {}  # of the step's first update
        numbers = {prefix + name: value for name, value in (row | machine | seconds | norms).items()
                   if isinstance(value, (int, float)) and name != "step"}
        run.log(numbers, step=row["step"])

    return log


# ------------------------------------------------------------------------------------------------ checkpoints

def digest(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_checkpoint(policy, folder, step):
    """folder/step_N, N steps done: written under another name, checksummed, then renamed; only then are old
    ones deleted. RuntimeError if that fails, as on a full disk; nothing half-written is left."""
    policy.check_finite()
    part = folder / f".part_{step:06d}"
    try:
        write_checkpoint(policy, folder, part, step)
    except (OSError, dcp.CheckpointException) as e:
        if policy.processes.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise RuntimeError(f"the checkpoint after step {step} could not be written to {folder} "
                           f"({reason_of(e)}); free some space: older ones are untouched, "
                           "and the run goes on from them") from None


def reason_of(e):
    """-> why torch could not write or read a checkpoint, in a line; Ctrl-C goes on as such."""
    # torch keeps (error, stack) of each process
    error = next((error for error, _ in getattr(e, "failures", {}).values()), e)
    if isinstance(error, KeyboardInterrupt):
        raise error from None
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return reason.splitlines()[0][:160]


def write_checkpoint(policy, folder, part, step):
    """The work of `save_checkpoint`; part: the name it is written under."""
    c, processes = policy.c, policy.processes
    final = folder / f"step_{step:06d}"
    if processes.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    processes.wait()  # until the folder is there

    # every process writes its part
    dcp.save(policy.state(), checkpoint_id=part, no_dist=processes.world == 1)
    processes.wait()  # until all files are written

    # checksums and the new name come last, and older checkpoints go only then: a kill leaves the ones before
    if processes.rank == 0:
        digests = {f.name: digest(f) for f in sorted(part.iterdir())}
        write_json(part / "manifest.json", dict(step=step, files=digests))
        for f in (*part.iterdir(), part):
            to_disk(f)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        to_disk(folder)
        for old in checkpoints_of(folder)[:-c.keep]:
            shutil.rmtree(old)


def checkpoints_of(folder):
    """The checkpoints of a run's folder, the oldest first, and nothing else that lies there."""
    return sorted(folder.glob("step_" + 6 * "[0-9]"))


def steps_of(checkpoint):
    return int(checkpoint.name.rsplit("_", 1)[1])


def fault_of(checkpoint):
    """-> what is not as it was written in a checkpoint, None if all of it is."""
    try:
        there = {file.name: file for file in checkpoint.iterdir()}
        for name, file in there.items():  # a pipe would wait for ever
            if not file.is_file():
                raise ValueError(f"{name} is no file")
        files = json.loads(there.pop("manifest.json").read_text())["files"]
        if not files:
            raise ValueError("its manifest lists no files")
        for name, expected in files.items():
            if digest(there.pop(name)) != expected:
                raise ValueError(f"{name} is damaged")
        if there:
            raise ValueError(f"{min(there)} is not in its manifest")
        read_metadata(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as e:
        return str(e) or type(e).__name__


def newest_whole(folder):
    """-> the newest whole checkpoint, None where none was ever written. Damaged ones are moved aside, and
    said; RuntimeError if there are no others: a run must not begin again over its own history unasked."""
    found = checkpoints_of(folder)
    for checkpoint in reversed(found):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        print(f"train.py: checkpoint {checkpoint} is refused ({fault}) and moved aside; "
              "going back to the one before", file=sys.stderr)
        shutil.rmtree(checkpoint.with_name(f"damaged_{checkpoint.name}"), ignore_errors=True)
        checkpoint.rename(checkpoint.with_name(f"damaged_{checkpoint.name}"))
    if found or list(folder.glob("damaged_*")):
        raise RuntimeError(f"no checkpoint in {folder} is whole; to begin again choose another --name")


PLAIN_MODULES = {"torch", "torch.serialization", "torch.distributed.checkpoint.metadata",
                 "torch.distributed.checkpoint.filesystem",
                 "pathlib", "pathlib._local"}  # PosixPath's, and where Python 3.13 has it
PLAIN_NAMES = {"Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
               "ChunkStorageMetadata", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING",
               "_get_layout", "Size", "PosixPath"}


class PlainUnpickler(pickle.Unpickler):
    """Makes nothing but what the .metadata of a checkpoint of tensors is made of: a pickle from elsewhere
    could run code. What is declared as bytes is refused too: torch would unpickle it without a check."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module in PLAIN_MODULES and name in PLAIN_NAMES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its .metadata asks for {module}.{name}, "
                                     "which is no part of a checkpoint")


def read_metadata(checkpoint):
    with open(checkpoint / ".metadata", "rb") as f:
        return PlainUnpickler(f).load()


class PlainReader(dcp.FileSystemReader):
    """The reader of a checkpoint, by PlainUnpickler."""

    def read_metadata(self, *rest, **options):
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load_checkpoint(policy, folder):
    """Loads the newest whole checkpoint in place. -> steps done, 0 if there is none."""
    found = policy.processes.on_rank_0(lambda: newest_whole(folder))
    if found is None:
        return 0
    try:
        dcp.load(policy.state(), storage_reader=PlainReader(found), no_dist=policy.processes.world == 1)
    except dcp.CheckpointException as e:  # a BaseException, whose text has many lines
        raise RuntimeError(f"{found} cannot be loaded ({reason_of(e)}); if that is for good, move it away to "
                           "go on from the one before") from None
    policy.check_finite()
    return steps_of(found)


def resume(c, folder, policy):
    """Begins a run, or goes on from its newest whole checkpoint: what is logged of later steps is dropped.
    -> steps done, and how many updates in a row were left out just before."""
    begin_run(c, folder, policy)
    steps_done = load_checkpoint(policy, folder / "checkpoints")
    skipped = 0
    if policy.processes.rank == 0:
        rows = drop_lines(folder / "metrics.jsonl", steps_done)
        gaps = missing_steps(rows, steps_done)
        if gaps:
            print(f"steps {in_words(gaps)} are missing from {folder / 'metrics.jsonl'}; "
                  "the rest of the run is whole", file=sys.stderr)
        for row in rows:
            for norm in row.get("grad", []):  # one an update; None: not finite, so it was left out
                skipped = (skipped + 1) if norm is None else 0
    return steps_done, policy.processes.gather(skipped)[0]  # rank 0's count, for it alone has the log


# -------------------------------------------------------------------------------------- the clock and the log

class Clock:
    """Seconds by phase of a step; lap(phase) adds the time since the last lap."""

    def __init__(self):
        self.seconds = {}
        self.last = time.monotonic()

    def lap(self, phase):
        now = time.monotonic()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self.last, 3)
        self.last = now


def mean_of(values):
    """Mean of the finite values, None without any (JSON has no NaN)."""
    values = [v for v in values if math.isfinite(v)]
    return sum(values) / len(values) if values else None


def std_in_groups(values):
    """values (groups, G) -> mean over groups of the standard deviation inside the group, masked samples left
    out."""
    known = [row[~row.isnan()] for row in values]
    return mean_of([float(row.std(correction=0)) for row in known if len(row)])


def metrics_row(c, step, dynamic, indices, terms, motion, shares, A, notes, norms, processes, clock):
    """One line of metrics.jsonl: of all processes, and the same on each.

    indices: of the step's prompts; terms {name: (groups x G,)}; motion and A, the advantages, (groups x G,);
    shares {name: share of the advantages' variance, a float}; notes: this process's statistics, one a step of
    a batch; norms: of the gradients, one an update.
    """
    # what the processes know of their own batches
    if processes.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    everyones_notes, everyones_seconds, peaks = zip(*processes.gather((notes, clock.seconds, peak)))
    notes = list(itertools.chain(*everyones_notes))
    row = dict(step=step, phase="dynamic" if dynamic else "main", prompts=indices)

    # rewards and advantages: means, and how far members of a group are apart
    for name, values in terms.items():
        row[name] = mean_of(values.tolist())
        row[f"{name}_std"] = std_in_groups(values.view(c.groups, -1))
    for name, share in shares.items():
        row[f"share_{name}"] = share
    row["advantage_abs"], row["advantage_max"] = A.abs().mean().item(), A.max().item()
    row["flat_groups"] = int((A.view(c.groups, -1) == 0).all(1).sum())
    row["masked"] = int(terms["total"].isnan().sum())
    row["motion"] = mean_of(motion)

    # the update: how far the policy has moved from the one that rolled out, and from the reference
    for name in ("ratio", "clipped", "kl", "loss"):
        row[name] = mean_of([note[name] for note in notes])
    largest = [note["ratio_max"] for note in notes]
    row["ratio_max"] = max(largest) if all(map(math.isfinite, largest)) else None  # JSON has no infinity
    row["grad"] = [norm if math.isfinite(norm) else None for norm in norms]
    row["skipped"] = row["grad"].count(None)

    # what only the machine decides: the slowest process's seconds, the largest one's memory
    phases = dict.fromkeys(itertools.chain(*everyones_seconds))
    slowest = {phase: max(seconds.get(phase, 0.0) for seconds in everyones_seconds) for phase in phases}
    row["machine"] = dict(seconds=slowest, peak_bytes=max(peaks), processes=processes.world)
    return row
