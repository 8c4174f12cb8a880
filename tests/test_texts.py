import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import texts
from model import load_wan
from texts import TextCache

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
    light.texts = cache
    for _ in range(2):  # encoded, then read
        assert torch.equal(light.encode_text(PROMPTS), expected)


def test_the_encoder_is_loaded_once_and_not_at_all_when_nothing_is_missing(checkpoint, cache, monkeypatch):
    loads = encoder_loads(monkeypatch)
    cache.encode(PROMPTS)
    assert len(loads) == 1
    again = TextCache(checkpoint, cache.folder)
    again.encode(PROMPTS[::-1])
    again(PROMPTS[0])
    assert len(loads) == 1
    again("a prompt that nobody announced")
    assert len(loads) == 2


def test_another_encoder_or_dtype_does_not_answer(checkpoint, cache, tmp_path):
    cache.encode(PROMPTS)
    assert not TextCache(checkpoint, cache.folder, dtype=torch.bfloat16).file(PROMPTS[0]).exists()
    shutil.copytree(checkpoint, tmp_path / "other")
    weights, = (tmp_path / "other" / "text_encoder").glob("*.safetensors")
    weights.touch()
    assert not TextCache(tmp_path / "other", cache.folder).file(PROMPTS[0]).exists()


def test_padding_is_not_kept_on_disk(cache):
    cache.encode([PROMPTS[0]])
    assert cache.file(PROMPTS[0]).stat().st_size < 512 * 32 * 4 / 4


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\xff" * 300])
def test_a_damaged_embedding_is_made_again(content, checkpoint, cache):
    expected = cache(PROMPTS[0])
    cache.file(PROMPTS[0]).write_bytes(content)
    assert torch.equal(TextCache(checkpoint, cache.folder)(PROMPTS[0]), expected)


def test_an_embedding_with_other_values_is_made_again(checkpoint, cache):
    """A file that can be read, but is not what was written."""
    expected = cache(PROMPTS[0])
    changed = load_file(cache.file(PROMPTS[0]))["text"] + 1
    save_file(dict(text=changed), cache.file(PROMPTS[0]))
    assert torch.equal(TextCache(checkpoint, cache.folder)(PROMPTS[0]), expected)
