import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_dit, load_vae, load_wan
from weights import config_from, read_json, write_json, written_whole


# ------------------------------------------------------------------------------------------------ files, written whole

def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with written_whole(path) as part:
        part.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(OSError, match="disk"):
        with written_whole(path) as part:
            part.write_text("sec")
            raise OSError("the disk is full")
    assert path.read_text() == "first"


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": "ä"}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


# --------------------------------------------------------------------------------------------------- what a folder holds

def test_config_takes_the_entries_it_knows():
    @dataclasses.dataclass
    class Config:
        width: int
        sizes: tuple = (1, 2)
        depth: int = 3

    entries = {"width": 4, "sizes": [5, 6], "depth": None, "_class_name": "Other"}
    assert config_from(Config, entries, "config.json") == Config(4, (5, 6), 3)
    with pytest.raises(ValueError, match="config.json: .*width"):
        config_from(Config, {}, "config.json")


@pytest.fixture
def shards(checkpoint, tmp_path):
    """A transformer folder in two shards with their index, and the tensors it holds."""
    folder = shutil.copytree(checkpoint / "transformer", tmp_path / "transformer")
    whole = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.unlink()
    weight_map = {}
    for i in range(2):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = {key: state[key] for key in sorted(state)[i::2]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    return folder, state


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_load_with_or_without_their_index_in_the_dtype_asked_for(shards, indexed):
    folder, state = shards
    if not indexed:
        (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    loaded = load_dit(folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[key], state[key].bfloat16()) for key in state)
    last = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (folder / last).unlink()
    with pytest.raises(ValueError, match=f"lacks {last}; download"):
        load_dit(folder)


def test_missing_and_broken_configs_are_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="vae/config.json is not valid JSON"):
        load_wan(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="vae/config.json is missing"):
        load_wan(folder)
    with pytest.raises(ValueError, match="no model folder 'nowhere'"):
        load_wan("nowhere")


# ------------------------------------------------------------------------------------------------------ broken weights

def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def relabel(file):
    torch.save({"a": torch.zeros(2)}, file)


def remove(file):
    file.unlink()


def drop_tensor(file):
    state = load_file(file)
    state.pop(sorted(state)[0])
    save_file(state, file)


def add_tensor(file):
    save_file({**load_file(file), "stranger": torch.zeros(2)}, file)


def reshape_tensor(file):
    state = load_file(file)
    key = next(k for k in sorted(state) if state[k].dim() > 1)
    save_file({**state, key: state[key][1:].contiguous()}, file)


@pytest.mark.parametrize("damage, message", [
    (truncate, "not a whole safetensors file"),
    (relabel, "not a whole safetensors file"),
    (drop_tensor, "lacks tensor"),
    (add_tensor, "has the unknown tensor stranger"),
    (reshape_tensor, "has shape .* the config asks for"),
    (remove, "download the checkpoint again")])
@pytest.mark.parametrize("part", [
    "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_damaged_safetensors_are_named(checkpoint, tmp_path, damage, message, part):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    damage(folder / f"{part}.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_wan(folder)
    assert part.split("/")[0] in str(error.value) and "\n" not in str(error.value)


class Payload:
    """Something that only unpickling could bring back."""


@pytest.mark.parametrize("content", [Payload(), [torch.zeros(2)], {"a": {"b": torch.zeros(2)}}, {}])
def test_pth_that_is_not_plain_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="vae.pth is not a .pth of plain tensors"):
        load_vae(tmp_path / "vae.pth")
