import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import texts
from model import load_wan
from texts import TextCache
from weights import written_whole

PROMPTS = ["push_in a red sphere", "", "orbit_left a blue box on a green floor"]


@pytest.fixture
def cache(checkpoint, tmp_path):
    return TextCache(checkpoint, tmp_path / "texts")


def encoder_loads(monkeypatch):
    """-> a list that grows with every load of the text encoder."""
    loads, load_text = [], texts.load_text

    def counted(*arguments):
        loads.append(arguments)
        return load_text(*arguments)

    monkeypatch.setattr(texts, "load_text", counted)
    return loads


def test_cached_embeddings_are_the_encoders_to_the_bit(checkpoint, cache):
    wan = load_wan(checkpoint)
    expected = torch.cat([wan.encode_text([prompt]) for prompt in PROMPTS])
    light = load_wan(checkpoint, text=False)
    assert light.text_encoder is None
    light.text_cache = cache
    for _ in range(2):  # encoded, then read
        assert torch.equal(light.encode_text(PROMPTS), expected)


def test_the_encoder_is_loaded_once_and_not_at_all_when_nothing_is_missing(checkpoint, cache, monkeypatch):
    loads = encoder_loads(monkeypatch)
    cache.encode_missing(PROMPTS)
    assert len(loads) == 1
    again = TextCache(checkpoint, cache.folder)
    again.encode_missing(PROMPTS[::-1])
    again(PROMPTS[0])
    assert len(loads) == 1
    again("a prompt that nobody announced")
    assert len(loads) == 2


def test_another_encoder_or_dtype_does_not_answer(checkpoint, cache, tmp_path):
    cache.encode_missing(PROMPTS)
    assert not TextCache(checkpoint, cache.folder, dtype=torch.bfloat16).file(PROMPTS[0]).exists()
    shutil.copytree(checkpoint, tmp_path / "other")
    weights, = (tmp_path / "other" / "text_encoder").glob("*.safetensors")
    weights.touch()
    assert not TextCache(tmp_path / "other", cache.folder).file(PROMPTS[0]).exists()


def test_an_encoder_of_another_config_does_not_answer(checkpoint, cache, tmp_path):
    """The same weights with a larger epsilon in their norms."""
    expected = cache(PROMPTS[0])
    assert torch.equal(TextCache(checkpoint, cache.folder)(PROMPTS[0]), expected)
    model = shutil.copytree(checkpoint, tmp_path / "other")
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(layer_norm_epsilon=.5)))
    assert not torch.allclose(TextCache(model, cache.folder)(PROMPTS[0]), expected, atol=1e-3)


def test_padding_is_not_kept_on_disk(cache):
    cache.encode_missing([PROMPTS[0]])
    assert cache.file(PROMPTS[0]).stat().st_size < 512 * 32 * 4 / 4


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\xff" * 300])
def test_a_damaged_embedding_is_made_again(content, checkpoint, cache):
    expected = cache(PROMPTS[0])
    cache.file(PROMPTS[0]).write_bytes(content)
    assert torch.equal(TextCache(checkpoint, cache.folder)(PROMPTS[0]), expected)


def test_another_embedding_in_a_whole_file_is_made_again(checkpoint, cache):
    """One number changed under the old checksum, no checksum at all, another prompt's file."""
    expected, file = cache(PROMPTS[0]), cache.file(PROMPTS[0])
    cache.encode_missing(PROMPTS)
    with safe_open(file, framework="pt") as opened:
        text, known = opened.get_tensor("text"), opened.metadata()
    text[0, 0] += 1
    for metadata in (known, None):
        save_file(dict(text=text), file, metadata=metadata)
        assert cache.read(PROMPTS[0]) is None
        assert torch.equal(TextCache(checkpoint, cache.folder)(PROMPTS[0]), expected)
    shutil.copy(cache.file(PROMPTS[2]), file)
    assert torch.equal(cache(PROMPTS[0]), expected)


def test_bfloat16_embeddings_are_read_again(checkpoint, tmp_path, monkeypatch):
    loads = encoder_loads(monkeypatch)
    cache = TextCache(checkpoint, tmp_path, dtype=torch.bfloat16)
    assert torch.equal(cache(PROMPTS[0]), cache(PROMPTS[0]))
    assert len(loads) == 1


def test_two_writers_of_one_embedding_do_not_meet(cache):
    """Each has its own temporary file, and whoever ends last has the name."""
    file = cache.file(PROMPTS[0])
    with written_whole(file) as first:
        first.write_bytes(b"first")
        with written_whole(file) as second:
            second.write_bytes(b"second")
        assert file.read_bytes() == b"second"
    assert file.read_bytes() == b"first"
    assert list(file.parent.iterdir()) == [file]


def test_another_tokenizer_does_not_answer(checkpoint, tmp_path):
    cache = TextCache(checkpoint, tmp_path / "texts")
    cache.encode_missing(["a box"])
    other = shutil.copytree(checkpoint, tmp_path / "other")
    assert TextCache(other, cache.folder).file("a box").exists()
    (other / "tokenizer" / "tokenizer.json").touch()
    assert not TextCache(other, cache.folder).file("a box").exists()
