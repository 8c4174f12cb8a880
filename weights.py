"""Model files: found in a folder or on the hub, checked against a model, read; and files written whole.

    folder = model_folder("Wan-AI/Wan2.1-T2V-1.3B", ["*.json", "*.safetensors"])
    with torch.device("meta"):
        model = ...                                        # shapes without memory
    fill(model, match_tensors(model, weight_files(folder, "model"), str), "cuda", torch.bfloat16)
    with written_whole("runs/x/lora.safetensors") as part: # a kill leaves the old file or the new one
        save_file(tensors, part)

Every header is checked before the first tensor is read: a missing, unknown or misshapen tensor is an error by
name. Weights are safetensors, or a .pth of plain tensors (weights_only). Left out: writing shards.
"""

import contextlib
import dataclasses
import functools
import json
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open

TINY = Path(__file__).parent / "tiny"  # the shipped twins


# --------------------------------------------------------------------------------------- files, written whole

@contextlib.contextmanager
def written_whole(path):
    """with written_whole(path) as part: what is written to `part` is renamed to `path` when the block ends.

    The folder is made. A kill, a full disk or an error in the block leaves the file that was there before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename across disks would be a copy.
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    yield part
    part.rename(path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------- model files, found

def model_folder(path, wanted):
    """A local folder for a path or hub id (owner/name); only the `wanted` patterns are downloaded."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"no model folder '{path}'; give a folder in the Wan2.1 or Diffusers layout, "
                         "or a hub id such as Wan-AI/Wan2.1-T2V-1.3B")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted, etag_timeout=3))
    except Exception as e:
        raise ValueError(f"'{path}' is neither a folder nor a hub id that can be fetched ({_reason(e)}); "
                         f"download it first: hf download {path} --local-dir {Path(path).name}") from None


def weight_files(folder, stem):
    """The safetensors files of `stem` in a folder: one file, or the shards its index lists."""
    whole = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    elif whole.exists():
        files = [whole]
    else:
        # Shards without their index say in their own names how many there are.
        files = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        total = int(files[0].stem.rsplit("-", 1)[1]) if files else 0
        files = [folder / f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    missing = [file.name for file in files if not file.exists()]
    if not files:
        missing = [whole.name]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; download the checkpoint again")
    return files


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; download the checkpoint again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again") from None


def config_from(cls, config, path):
    """The dataclass cls from a config.json's entries that it knows."""
    values = {}
    for field in dataclasses.fields(cls):
        value = config.get(field.name)
        if value is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except TypeError as e:
        raise ValueError(f"{path}: {e}") from None


# ----------------------------------------------------------------------------- tensors, checked and then read

def open_tensors(files, device="cpu"):
    """{name: (shape, read)} of safetensors or .pth files, by their headers alone; read() loads one tensor."""
    tensors = {}
    for file in files:
        if Path(file).suffix == ".safetensors":
            tensors |= _open_safetensors(file, device)
        else:
            tensors |= _open_pth(file)
    return tensors


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
        values = state.values() if isinstance(state, dict) else ()
        if not values or not all(isinstance(value, torch.Tensor) for value in values):
            raise ValueError("it holds something else")
    except Exception as e:
        raise ValueError(f"{file} is not a .pth of plain tensors ({_reason(e)}); "
                         "use the published file") from None
    return {name: (tuple(value.shape), functools.partial(state.get, name)) for name, value in state.items()}


def _reason(error):
    return str(error).strip().split("\n")[0][:160]


TIED = "encoder.embed_tokens.weight"  # UMT5's second name for shared.weight; its files hold either or both


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
    for key, name in names.items():
        shape, expected = found[name][0], tuple(parameters[key].shape)
        if shape != expected:
            raise ValueError(f"{where}: tensor {name} has shape {shape}, the config asks for {expected}")
    return {key: found[name][1] for key, name in names.items()}


def fill(model, reads, device, dtype):
    """Fills a meta model in place, one tensor at a time: no second copy of the weights is ever held.

    The weights come frozen and in eval mode: whoever trains some of them says so.
    """
    for key, read in reads.items():
        owner, _, name = key.rpartition(".")
        value = read().to(device=device, dtype=dtype)
        # A meta parameter has no memory to copy into, so the parameter itself is replaced.
        setattr(model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # transformers: the second name follows the first again
    return model.eval()
