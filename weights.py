"""Model files: found in a folder or on the hub, checked against a model, read; and files written whole.

    folder = model_folder("Wan-AI/Wan2.1-T2V-1.3B", ["*.json", "*.safetensors"])
    config = read_json(folder / "config.json", Config)     # a dataclass: types and ranges are checked
    files = weight_files(folder, "model")
    model = on_meta(partial(Model, config), files, "config.json")  # shapes without memory
    fill(model, match_tensors(model, files, str), "cuda", torch.bfloat16)
    with written_whole("runs/x/lora.safetensors") as part: # a kill leaves the old file or the new one
        save_file(tensors, part)

Every header is checked before the first tensor is read: a missing, unknown or misshapen tensor is an error by
name, as is one that is not finite once it is read. A folder from elsewhere is data: no code of it is run, and
only regular files in it are opened. Weights are safetensors, or a .pth of plain tensors (weights_only). Left
out: writing shards.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import sys
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

TINY = Path(__file__).parent / "tiny"  # the shipped twins


# --------------------------------------------------------------------------------------- files, written whole

@contextlib.contextmanager
def written_whole(path):
    """with written_whole(path) as part: what is written to `part` is renamed to `path` when the block ends.

    The folder is made. A kill, a full disk or an error in the block leaves the file that was there before.
    OSError is one sentence that names the file.
    """
    path = Path(path)
    # In the same folder: a rename cannot cross disks. A name of its own: two runs may fill one text cache.
    part = path.with_name(f".{path.stem}.part-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        if path.is_dir():  # a link to one would be replaced
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        # The bytes reach the disk before the name: else a power cut could leave the name of an empty file.
        to_disk(part)
        part.rename(path)
        to_disk(path.parent)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or _reason(e)
        raise OSError(f"cannot write '{path}' ({reason}); free some space, or choose another folder") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def to_disk(path):
    """Waits until a file, or a folder's list of names, would survive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_safetensors(path, tensors):
    """Writes {name: tensor}."""
    with written_whole(path) as part:
        save_file(tensors, part, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------- commands

def is_out_of_memory(error):
    """Does an error say that memory ran out? torch has no class for the CPU's."""
    by_name = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return by_name or "can't allocate memory" in str(error)


def ending(error, name, again="give the same command again",
           memory="ask for less at once, or use a larger card", alone=False):
    """-> the exit status of a command after an error, and the line that it prints: None where another process
    of torchrun's prints it. again: the mend of an interruption, memory: of too little memory. alone: the
    command shares no work, whatever torchrun's variables say."""
    status, reason = 2, error
    if isinstance(error, KeyboardInterrupt):
        status, reason = 130, f"interrupted; {again}"
    elif is_out_of_memory(error):
        what = f": {error}" if isinstance(error, MemoryError) and str(error) else ""  # torch's is a long text
        reason = f"out of memory{what}; {memory}"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if alone or rank == 0:
        return status, f"{name}: {reason}"
    # a bad setting and Ctrl-C come to every process, what a node lacks to all of that node's: the first
    # process of each node says it
    if isinstance(error, (ValueError, KeyboardInterrupt)) and int(os.environ.get("LOCAL_RANK", rank)):
        return status, None
    return status, f"{name}: process {rank} of {world}: {reason}"


def end_alone(status, silent=False):
    """Ends this process at once, its process group still open: NCCL's is closed by all processes together,
    and the others may be waiting for this one elsewhere. They see its connections close, and end as well.

    silent: another process says why. torchrun ends all with the first, so this one lets that one come before.
    """
    if silent:
        time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def as_command(name, shared=False):
    """Decorates a main(argv): what cannot be is one sentence and exit status 2, Ctrl-C one line and 130.

    shared: torchrun's processes do it together. Then one of them says what cannot be, and each ends at once.
    """
    def decorated(main):
        @functools.wraps(main)
        def command(argv=None):
            alone = not shared or int(os.environ.get("WORLD_SIZE", 1)) == 1
            try:
                return main(argv) or 0
            except (ValueError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as e:
                # A lone process's RuntimeError keeps its traceback. Among several processes most likely
                # another has died, and that one says why: a line is enough.
                if isinstance(e, RuntimeError) and alone and not is_out_of_memory(e):
                    raise
                status, line = ending(e, name, alone=alone)
            except Exception:  # a fault of the program, for which the other processes must not wait
                if alone:
                    raise
                status, line = 1, f"{name}: process {os.environ['RANK']}: {traceback.format_exc().rstrip()}"
            if line:
                print(line if alone else f"\n{line}", file=sys.stderr)  # not glued to a progress bar
            if not alone:
                end_alone(status, silent=not line)
            return status

        return command

    return decorated


def command_line(doc, **options):
    """-> an argument parser, whose --help begins with a file's docstring as it is written there."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, **options)


# ---------------------------------------------------------------------------------------------- JSON, checked

# What a config may say, as types of its dataclass's fields: a bool is no int, and NaN lies in no range.
Size = Annotated[int, msgspec.Meta(ge=1, le=10 ** 6)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=10 ** 6)]


def read_json(path, kind=dict):
    """-> what a JSON file holds, as `kind`: dict, a dataclass, list[float] ... ValueError names the entry."""
    return from_json(read_bytes(path), kind, path)


def read_bytes(path):
    """-> the bytes of a small file; ValueError if it is missing, huge, or a pipe, which would hang."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is missing; check the name, or download it again")
    if not path.is_file() or path.stat().st_size > 2 ** 28:
        raise ValueError(f"{path} is no regular file of at most 256 MiB; give the file itself")
    return path.read_bytes()


def from_json(text, kind, where):
    """-> JSON's value as `kind`. where: the file, and the line if it has many, for the ValueError."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as e:
        raise ValueError(_wrong_entry(e, where)) from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not valid JSON ({e}); correct it, or download it again") from None


def config_from(cls, config, path):
    """The dataclass cls from those entries of a config.json that it knows and that are not null."""
    given = {name: value for name, value in config.items() if value is not None}
    try:
        return msgspec.convert(given, cls)
    except msgspec.ValidationError as e:
        raise ValueError(_wrong_entry(e, path)) from None


def _wrong_entry(error, where):
    """One sentence of msgspec's "Expected `int`, got `str` - at `$.frames`"."""
    problem, _, entry = str(error).partition(" - at `$")
    entry = entry.strip("`.")
    at = f", entry {entry}" if entry else ""
    return f"{where}{at}: {problem.replace('`', '')}; correct it, or download it again"


# ----------------------------------------------------------------------------------------- model files, found

def model_folder(path, wanted, expected="the folder of the model, or its hub id (owner/name)"):
    """A local folder for a path or hub id; only the `wanted` patterns are downloaded.

    expected: what the error says should be given.
    """
    if str(path) and Path(path).exists():  # an empty one would be the working folder
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"no model folder '{path}'; give {expected}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted, etag_timeout=3))
    except Exception as e:
        raise ValueError(f"'{path}' is neither a folder nor a hub id that can be fetched ({_reason(e)}); "
                         f"download it into this folder: hf download {path} --local-dir {path}"
                         + "".join(f" --include '{pattern}'" for pattern in wanted)) from None


@dataclass
class Index:
    weight_map: dict[str, str]  # tensor -> the shard that holds it


def weight_files(folder, stem):
    """The safetensors files of `stem` in a folder: the shards its index lists, else one whole file, else the
    shards by their numbers."""
    # which files there must be
    whole = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    five = "[0-9]" * 5
    shards = sorted(folder.glob(f"{stem}-{five}-of-{five}.safetensors"))
    weight_map = {}
    if index.exists():
        weight_map = read_json(index, Index).weight_map
        names = sorted(set(weight_map.values()))
    elif shards and not whole.exists():
        # The names say how many shards there are. If any is missing, one of the first len(shards) + 1 is.
        totals = sorted({file.stem[-5:] for file in shards})
        if len(totals) > 1:
            raise ValueError(f"{folder} holds shards of {' and of '.join(totals)}; "
                             "delete those of another checkpoint")
        total, = totals
        most = min(int(total), len(shards) + 1)
        names = [f"{stem}-{i:05d}-of-{total}.safetensors" for i in range(1, most + 1)]
    else:
        names = [whole.name]
    # they are in the folder, all of them, and hold what the index says
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} leads out of its folder, to '{name}'; download the checkpoint again")
    files = [folder / name for name in names or [whole.name]]  # an empty index, or "-of-00000", names none
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing[:3])}; download the checkpoint again")
    for file in files:
        for name in open_tensors([file]):
            if weight_map.get(name, file.name) != file.name:
                raise ValueError(f"{index} says that {name} is in {weight_map[name]}, but {file.name} holds "
                                 "it; download the checkpoint again")
    return files


# ----------------------------------------------------------------------------- tensors, checked and then read

def renamed(names, key):
    """A tensor's name after all replacements {pattern: text}, in order."""
    for ours, theirs in names.items():
        key = re.sub(ours, theirs, key)
    return key


def open_tensors(files, device="cpu"):
    """{name: (shape, read)} of safetensors or .pth files, by their headers alone; read() loads one tensor."""
    tensors = {}
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file} is missing, or no regular file; give the weights' file itself")
        if Path(file).suffix == ".safetensors":
            opened = _open_safetensors(file, device)
        else:
            opened = _open_pth(file)
        for name, (shape, read) in opened.items():
            if name in tensors:
                raise ValueError(f"{file} holds the tensor {name}, as another shard does; "
                                 "download the checkpoint again")
            tensors[name] = shape, functools.partial(_read, file, name, read)
    return tensors


def _read(file, name, read):
    value = read()
    # A scalar may be an integer: kohya's alpha is.
    if value.dim() and value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{file}: tensor {name} is {str(value.dtype).removeprefix('torch.')}; "
                         "give weights of float32, float16 or bfloat16")
    if not value.isfinite().all():
        raise ValueError(f"{file}: tensor {name} holds NaN or infinity; download it again, or train it anew")
    return value


def _open_safetensors(file, device):
    try:
        opened = safe_open(file, framework="pt", device=str(device))
    except Exception as e:
        raise ValueError(f"{file} is not a whole safetensors file ({e}); download it again") from None
    return {name: (tuple(opened.get_slice(name).get_shape()), functools.partial(opened.get_tensor, name))
            for name in opened.keys()}


def _open_pth(file):
    try:
        # mmap: a tensor's bytes are read when it is used. weights_only: nothing in the file is executed.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        plain = isinstance(state, dict) and all(_is_plain(name, value) for name, value in state.items())
        if not plain or not state:
            raise ValueError("it holds other names or values")
    except Exception as e:
        raise ValueError(f"{file} is not a .pth of plain tensors ({_reason(e)}); "
                         "use the published file") from None
    return {name: (tuple(value.shape), functools.partial(state.get, name)) for name, value in state.items()}


def _is_plain(name, value):
    """Whether this is a name and a plain CPU tensor that claims no more numbers than its storage holds."""
    return (isinstance(name, str) and isinstance(value, torch.Tensor) and value.device.type == "cpu"
            and value.layout == torch.strided and not value.is_nested
            and value.numel() * value.itemsize <= value.untyped_storage().nbytes())


def _reason(error):
    return str(error).strip().split("\n")[0][:160]


TIED = "encoder.embed_tokens.weight"  # UMT5's second name for shared.weight; its files hold either or both


def on_meta(build, files, config):
    """-> build() on the meta device: the model that a config describes, shapes without memory.

    ValueError names the file `config` if no such model can be. Building stops at far more parameters than the
    files hold: a config that asks for 10^7 layers would take hours.
    """
    most = 2 * len(open_tensors(files)) + 100
    made = []

    def count(module, name, parameter):
        made.append(name)
        if len(made) > most:
            raise ValueError(f"{Path(files[0]).name} holds far fewer layers")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return build()
    except Exception as e:
        raise ValueError(f"{config} describes no model that can be ({_reason(e)}); "
                         "download the checkpoint again") from None
    finally:
        hook.remove()


def match_tensors(model, files, rename, device="cpu", unused=frozenset()):
    """Pairs every tensor of a (meta) model with one in the files, by name and shape. -> {our name: read}

    rename: our name -> the files'. unused: names that the files may hold and the model has no use for.
    """
    found = open_tensors(files, device)
    where = Path(files[0]).parent if len(files) > 1 else files[0]
    parameters = model.state_dict(keep_vars=True)
    parameters.pop(TIED, None)

    # The name in the files of each of our tensors.
    names = {key: rename(key) for key in parameters}
    if "shared.weight" in names and names["shared.weight"] not in found:
        names["shared.weight"] = TIED

    # Both sets of names must be equal, and each pair of shapes.
    missing = [name for name in names.values() if name not in found]
    unknown = sorted(set(found) - set(names.values()) - {TIED} - unused)
    for problem, wrong in (("lacks", missing), ("has the unknown", unknown)):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"{where} {problem} tensor {wrong[0]}{more}; "
                             "it is not the checkpoint its config describes")
    reads = {}
    for key, name in names.items():
        shape, reads[key] = found[name]
        expected = tuple(parameters[key].shape)
        if shape != expected:
            raise ValueError(f"{where}: tensor {name} has shape {shape}, the config asks for {expected}; "
                             "download the checkpoint again")
    return reads


def fill_arguments(model, files, rename, device, dtype):
    """-> the arguments of `fill`. Checks every tensor's name and shape, reads none: `load_wan` checks both
    models in this way before it fills the first."""
    return model, match_tensors(model, files, rename, device), device, dtype


def fill(model, reads, device, dtype):
    """Fills a meta model in place, one tensor at a time: no second copy of the weights is ever held.

    The weights come frozen and in eval mode: whoever trains some of them says so.
    """
    for key, read in reads.items():
        owner, _, name = key.rpartition(".")
        # A copy even where nothing changes: a file's tensors may start at any address, and the last bits of
        # some kernels depend on it.
        value = read().to(device=device, dtype=dtype, copy=True)
        # A meta parameter has no memory to copy into, so the parameter itself is replaced.
        setattr(model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # transformers: the second name follows the first again
    return model.eval()
