import dataclasses
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import weights
from model import load_dit, load_vae, load_wan
from weights import (Positive, Size, as_command, config_from, ending, model_folder, open_tensors, read_json,
                     weight_files, write_json, written_whole)


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
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]  # nothing is left lying


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write '.*file/a.json' \(.*\); free some space, or choose"):
        write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(OSError, match="cannot write '/dev/full/lora.safetensors'"):
        with written_whole("/dev/full/lora.safetensors") as part:
            save_file({"a": torch.zeros(2)}, part)


def test_bytes_reach_the_disk_before_the_name_and_then_the_name(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    synced = []

    def fsync(opened):
        synced.append((Path(os.readlink(f"/proc/self/fd/{opened}")), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with written_whole(path) as part:
        part.write_text("text")
    assert synced == [(part, False), (tmp_path, True)]


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": "ä"}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


# -------------------------------------------------------------------------------------------------------- JSON, checked

@dataclasses.dataclass
class Options:
    size: Size = 4
    rate: Positive | None = None
    sizes: tuple[Size, Size] = (1, 2)
    names: dict[str, str] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize("text, message", [
    ('[1]', "Expected object, got array"),
    ('null', "Expected object, got null"),
    ('{"size": "4"}', "entry size: Expected int, got str"),
    ('{"size": true}', "entry size: Expected int, got bool"),
    ('{"size": 4.5}', "entry size: Expected int, got float"),
    ('{"size": null}', "entry size: Expected int, got null"),
    ('{"size": 0}', "entry size: Expected int >= 1"),
    ('{"size": 1000000000}', "entry size: Expected int <= 1000000"),
    ('{"size": %s}' % ("9" * 5000), "entry size: .*range"),
    ('{"rate": -1}', "entry rate: Expected float > 0"),
    ('{"rate": NaN}', "is not valid JSON"),
    ('{"rate": Infinity}', "is not valid JSON"),
    ('{"rate": 1e999}', "entry rate: Number out of range"),
    ('{"sizes": [1, 2, 3]}', "entry sizes: Expected array of length 2"),
    ('{"sizes": [1, {}]}', r"entry sizes\[1\]: Expected int, got object"),
    ('{"names": {"a": 1}}', "entry names.*: Expected str, got int"),
    ('{"size": 4', "is not valid JSON"),
    ('', "is not valid JSON"),
    ('{"x": %s1' % ("[" * 100_000), "is not valid JSON")])
def test_json_of_another_form_is_one_sentence(text, message, tmp_path):
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"options.json.*{message}") as error:
        read_json(file, Options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_json_that_fits_is_the_dataclass(tmp_path):
    file = tmp_path / "options.json"
    file.write_text('{"rate": 2, "sizes": [3, 4], "unknown": null}')
    assert read_json(file, Options) == Options(4, 2.0, (3, 4))
    file.write_bytes(b'{"unknown": "\xff"}')
    with pytest.raises(ValueError, match="options.json is not valid JSON"):
        read_json(file)


def test_only_regular_files_are_opened(tmp_path):
    """A pipe that nobody writes to would hang for ever."""
    for name in ("pipe.json", "pipe.safetensors", "pipe.pth"):
        os.mkfifo(tmp_path / name)
    for file in (tmp_path / "pipe.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no regular file"):
            read_json(file)
    for file in (tmp_path / "pipe.safetensors", tmp_path / "pipe.pth", tmp_path, tmp_path / "nothing.pth"):
        with pytest.raises(ValueError, match="is missing, or no regular file"):
            open_tensors([file])
    with pytest.raises(ValueError, match="lacks pipe.safetensors"):
        weight_files(tmp_path, "pipe")


# --------------------------------------------------------------------------------------------------- what a folder holds

def test_a_missing_folder_is_told_by_what_was_meant():
    with pytest.raises(ValueError, match="no model folder 'nowhere'; give a critic's folder"):
        model_folder("nowhere", [], "a critic's folder")


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


@pytest.mark.parametrize("name", ["../../{0}", "/tmp/{0}", "sub/{0}"])
def test_an_index_leads_to_no_other_folder(shards, name):
    folder, state = shards
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"]
    write_json(index, dict(weight_map={key: name.format(file) for key, file in weight_map.items()}))
    with pytest.raises(ValueError, match="index.json leads out of its folder"):
        load_dit(folder)


@pytest.mark.parametrize("content, message", [
    ({"weight_map": ["a"]}, "entry weight_map: Expected object, got array"),
    ({"weight_map": {"a": 1}}, "entry weight_map.*: Expected str, got int"),
    ({"weight_map": {}}, "lacks diffusion_pytorch_model.safetensors"),
    ({}, "missing required field weight_map")])
def test_an_index_of_another_form_is_named(shards, content, message):
    folder, _ = shards
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", content)
    with pytest.raises(ValueError, match=message):
        load_dit(folder)


def test_a_tensor_is_in_one_shard_the_one_that_the_index_names(shards):
    """Two of one name, with and without an index; an index that names the other shard; shards of two counts."""
    folder, state = shards
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    last = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    weight_map = read_json(index)["weight_map"]
    first = next(name for name, file in weight_map.items() if file != last.name)
    write_json(index, dict(weight_map=weight_map | {first: last.name}))
    with pytest.raises(ValueError, match="index.json says that .* is in .*00002-of-00002.safetensors, but"):
        load_dit(folder)
    write_json(index, dict(weight_map=weight_map))
    save_file({**load_file(last), first: state[first] + 1}, last)
    with pytest.raises(ValueError, match=f"index.json says that {first} is in .*00001-of-00002.safetensors, but"):
        load_dit(folder)
    index.unlink()
    with pytest.raises(ValueError, match=f"00002-of-00002.safetensors holds the tensor {first}, as another shard"):
        load_dit(folder)
    shutil.copy(last, folder / "diffusion_pytorch_model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match="holds shards of 00002 and of 00003; delete those of another"):
        load_dit(folder)


@pytest.mark.parametrize("total", ["00003", "99999", "00000", "99999999"])
def test_shards_that_promise_more_than_there_are(shards, total):
    folder, _ = shards
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / file.name.replace("of-00002", f"of-{total}"))
    with pytest.raises(ValueError, match="lacks diffusion_pytorch_model.*; download") as error:
        load_dit(folder)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("file, entries, message", [
    ("transformer/config.json", dict(num_layers=10 ** 6), "describes no model that can be .*far fewer layers"),
    ("transformer/config.json", dict(image_dim=1280), "takes pictures; give a text-to-video model"),
    ("transformer/config.json", dict(num_layers=10 ** 9), "entry num_layers: Expected int <="),
    ("transformer/config.json", dict(num_attention_heads=10 ** 6, attention_head_dim=10 ** 6),
     "describes no model that can be"),
    ("transformer/config.json", dict(ffn_dim=10 ** 6), "the config asks for"),
    ("transformer/config.json", dict(ffn_dim="56"), "entry ffn_dim: Expected int, got str"),
    ("transformer/config.json", dict(eps=-1), "entry eps: Expected float > 0"),
    ("transformer/config.json", dict(attention_head_dim=23), "must be even"),
    ("transformer/config.json", dict(patch_size=[2, 2]), "entry patch_size: Expected array of length 3"),
    ("transformer/config.json", dict(in_channels=5), "asks for"),
    ("vae/config.json", dict(num_res_blocks=10 ** 6), "describes no model that can be .*far fewer layers"),
    ("vae/config.json", dict(latents_mean=[0.0]), "latents_mean and a latents_std for each"),
    ("vae/config.json", dict(latents_std=[1.0, 1.0, 0.0, 1.0]), r"entry latents_std\[2\]: Expected float > 0"),
    ("vae/config.json", dict(temperal_downsample=[True, True, True]), "halves time twice"),
    ("text_encoder/config.json", dict(num_layers=10 ** 7), "describes no model that can be .*far fewer layers"),
    ("text_encoder/config.json", dict(d_model="x"), "text_dim is 32, .*gives x"),
    ("text_encoder/config.json", dict(d_ff=-1), "describes no model that can be"),
    ("text_encoder/config.json", dict(vocab_size=10 ** 9), "the config asks for"),
    ("scheduler/scheduler_config.json", dict(flow_shift="5"), "entry flow_shift: Expected .*float.*, got str"),
    ("scheduler/scheduler_config.json", dict(flow_shift=-1), "entry flow_shift: Expected float > 0"),
    ("scheduler/scheduler_config.json", dict(prediction_type="epsilon"),
     "entry prediction_type: Invalid enum value 'epsilon'")])
def test_a_config_that_its_weights_contradict_is_named(checkpoint, tmp_path, file, entries, message):
    """In a moment and without memory: 10^7 layers would take hours."""
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    write_json(folder / file, read_json(folder / file) | entries)
    with pytest.raises(ValueError, match=message) as error:
        load_wan(folder)
    assert "\n" not in str(error.value)


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


def test_weights_that_are_no_numbers_are_named(checkpoint, tmp_path):
    file = shutil.copytree(checkpoint, tmp_path / "wan") / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = "decoder.conv_in.bias"
    for value, message in ((torch.tensor(torch.nan), "holds NaN or infinity"),
                           (torch.tensor(-torch.inf), "holds NaN or infinity"),
                           (torch.tensor(1), "is int64; give weights of float32")):
        damaged = torch.zeros_like(state[name], dtype=value.dtype)
        damaged[1] = value
        save_file({**state, name: damaged}, file)
        with pytest.raises(ValueError, match=f"diffusion_pytorch_model.safetensors: tensor {name} {message}"):
            load_vae(tmp_path / "wan")


class Payload:
    """Something that only unpickling could bring back."""


@pytest.mark.parametrize("content", [
    Payload(), [torch.zeros(2)], {"a": {"b": torch.zeros(2)}}, {}, {0: torch.zeros(2)},
    {"a": torch.eye(2).to_sparse()}, {"a": torch.zeros(2, device="meta")},
    {"a": torch.nested.nested_tensor([torch.zeros(2)])}, {"a": torch.zeros(1, 1).expand(10 ** 10, 48)}])
def test_pth_that_is_not_plain_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="vae.pth is not a .pth of plain tensors"):
        load_vae(tmp_path / "vae.pth")


def test_what_is_downloaded_of_a_hub_id_is_enough_and_no_more(checkpoint, tmp_path, monkeypatch):
    """With a hub that is a folder here, and the package's own rule of which files a pattern wants."""
    hub = shutil.copytree(checkpoint, tmp_path / "hub")
    (hub / "assets").mkdir()
    (hub / "assets" / "demo.mp4").write_bytes(b"large")

    def snapshot(name, allow_patterns=None, **_):
        files = [str(file.relative_to(hub)) for file in hub.rglob("*") if file.is_file()]
        folder = tmp_path / "cache" / str(len(list(tmp_path.glob("cache/*"))))
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, folder / file)
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for load in (load_wan, load_dit, load_vae):
        load("owner/wan")
    assert len(list(tmp_path.glob("cache/*"))) == 3
    assert not list(tmp_path.glob("cache/**/*.mp4"))


def test_a_huge_json_is_not_read(tmp_path):
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2 ** 28 + 1)  # of holes: no disk is used
    with pytest.raises(ValueError, match="no regular file of at most 256 MiB"):
        read_json(tmp_path / "huge.json")


# ------------------------------------------------------------------------------------------------------------ commands

@pytest.mark.parametrize("error, rank, status, said", [
    (ValueError("--lr must be ..."), 0, 2, "x.py: --lr must be ..."),
    (ValueError("--lr must be ..."), 1, 2, None),  # rank 0 says it
    (RuntimeError("lost"), 1, 2, "x.py: process 1 of 2: lost"),
    (KeyboardInterrupt(), 0, 130, "x.py: interrupted; start it again"),
    (KeyboardInterrupt(), 1, 130, None),
    (MemoryError(), 0, 2, "x.py: out of memory; ask for less"),
    (MemoryError("9 views need 2 GB"), 0, 2, "x.py: out of memory: 9 views need 2 GB; ask for less"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, 2, "x.py: process 1 of 2: out of memory; ask for less"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 0, 2, "x.py: out of memory; ask for less")])
def test_an_error_ends_in_one_line(error, rank, status, said, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ending(error, "x.py", "start it again", "ask for less") == (status, said)


def test_a_command_ends_its_process_only_where_work_is_shared(monkeypatch, capsys):
    for name, value in dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    ended = []
    monkeypatch.setattr(weights, "end_alone", lambda status, silent: ended.append((status, silent)))

    def fails(error, **options):
        def main(argv=None):
            raise error

        return as_command("x.py", **options)(main)()

    assert fails(ValueError("bad")) == 2
    assert (ended, capsys.readouterr().err) == ([], "x.py: bad\n")
    fails(ValueError("bad"), shared=True)  # the first process says it
    assert (ended, capsys.readouterr().err) == ([(2, True)], "")
    fails(KeyError("a fault of the program"), shared=True)
    assert ended[1] == (1, False)
    assert capsys.readouterr().err.startswith("\nx.py: process 1: Traceback")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(KeyError):
        fails(KeyError("a fault of the program"), shared=True)
    assert len(ended) == 2


def test_what_a_node_lacks_is_said_by_its_first_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    for local_rank, said in ((0, "x.py: process 8 of 16: gsplat does not compile"), (1, None)):
        monkeypatch.setenv("RANK", str(8 + local_rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert ending(ValueError("gsplat does not compile"), "x.py") == (2, said)
