import dataclasses
import json
import os

import pytest
import torch

import tiny.train
from conftest import ROOT, VAE_, randomise, train_twice
from lora import merge_lora
from model import VAE, VAEConfig, load_wan
from sample import generator, sampling_of
from tiny.__main__ import main
from tiny.probe import load_probe, read, sample_in_batches, scores
from tiny.train import (export_web, fit, flow_losses, inflate, load_trained_vae, make_data, make_tokenizer, moved_along,
                        train_vae, train_web, trained)
from tiny.world import COLOURS, caption, random_scene, render_all, unseen_scenes


def test_tokenizer_reads_prompt_forms_alike():
    tokenizer = make_tokenizer()
    tokens = tokenizer("push_in a red sphere, blue walls").input_ids
    assert tokens == tokenizer("Push-in a RED sphere  blue walls.").input_ids
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer("a zebra").input_ids[1] == tokenizer.unk_token_id
    assert all(colour in tokenizer.get_vocab() for colour in COLOURS)


def test_the_shipped_model_follows_its_prompts():
    """What 16 samples show, read by the shipped probe, which is right on every one of those scenes' renders."""
    folder = ROOT / "tiny" / "wan"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    probe = load_probe(ROOT / "tiny" / "probe")
    scenes = unseen_scenes(16)
    prompts = [scene.caption for scene in scenes]
    on_renders = scores(read(probe, render_all(scenes)), prompts)
    assert all(all(right) for right in on_renders.values())

    videos = sample_in_batches(load_wan(folder), prompts, sampling_of(folder))
    found = {name: sum(right) for name, right in scores(read(probe, videos), prompts).items()}
    assert found["wall"] >= 15 and found["floor"] >= 15, found
    assert found["objects"] >= 11 and found["motion"] >= 12, found


def test_the_shipped_twins_stay_small():
    def size(folder):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    adapter = size(ROOT / "tiny" / "world_r1")
    assert size(ROOT / "tiny" / "wan") < 20e6
    assert size(ROOT / "tiny") - adapter < 36e6
    assert adapter < 5e6, "one LoRA adapter of the learned proof"


def test_vae_inflation_keeps_single_frames_and_repeats_them():
    """Inflated, a clip of one repeated frame encodes and decodes like that frame alone."""
    vae = randomise(VAE(VAEConfig(**VAE_)))
    frame = torch.rand(1, 1, 3, 16, 16)
    with torch.no_grad():
        before = vae.moments(frame)[0]
        inflate(vae)
        one = vae.moments(frame)[0]
        clip = vae.moments(frame.repeat(1, 9, 1, 1, 1))[0]
        assert torch.equal(before, one)
        assert torch.allclose(clip, one.expand_as(clip), atol=1e-4)
        decoded = vae.decode_raw(one).expand(-1, 9, -1, -1, -1)
        assert torch.allclose(vae.decode_raw(clip), decoded, atol=1e-4)


def test_the_vae_trains_resumes_and_is_read_back(tmp_path, monkeypatch):
    """It starts with single frames, which leave the weights that look back at 0; clips, near the end, do not."""
    first, second = train_twice(lambda minutes: train_vae(tmp_path, minutes), tmp_path / "vae" / "state.pt")
    assert second["step"] > first["step"] > 0
    assert (tmp_path / "vae" / "sheet.png").exists()
    vae = load_trained_vae(tmp_path)
    weights = vae.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in second["ema"].items())
    backwards = [state["ema"]["encoder.conv_in.weight"][:, :, :2] for state in (first, second)]
    assert not backwards[0].any()
    assert backwards[1].any()

    # latents are of the VAE that has made them
    monkeypatch.setattr(tiny.train, "training_latents", lambda vae, clips: torch.rand(len(clips), 16, 5, 8, 8))
    make_data(tmp_path, 1)  # renders none: that takes minutes
    assert load_trained_vae(tmp_path).config.latents_mean[0] == pytest.approx(.5, abs=.05)
    make_data(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setitem(COLOURS, "pink", (1.0, .6, .7))  # scenes are other ones now, under the same pixels
        with pytest.raises(ValueError, match="data was made with another vocabulary"):
            make_data(tmp_path, 1)
    torch.save(second | dict(step=second["step"] + 1), tmp_path / "vae" / "state.pt")
    with pytest.raises(ValueError, match=f"data was made when .*vae was at step {second['step']}, and it has gone on"):
        load_trained_vae(tmp_path)


def test_a_report_is_no_training(tmp_path, monkeypatch):
    """A clock on which a step takes a second, and a report more than the two minutes between reports."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    model = torch.nn.Linear(1, 1)
    steps = []

    def losses(step, progress):
        now[0] += 1
        steps.append(step)
        yield model(torch.ones(1)).sum(), {}

    def report():
        now[0] += 130
        return {}

    fit(tmp_path, 10, model, losses, report, lr=1e-3, seed=0)
    assert len(steps) == 600
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 5
    with pytest.raises(ValueError, match="state.pt was made with another seed; give that one, or another --run"):
        fit(tmp_path, 20, model, losses, report, lr=1e-3, seed=1)


def test_the_base_of_world_r1_trains_resumes_and_is_exported_as_an_adapter(tmp_path, monkeypatch):
    first, second = train_twice(lambda minutes: train_web(tmp_path, minutes, clips=4),
                                tmp_path / "web" / "state.pt")
    assert second["step"] > first["step"] > 0
    for given, told in ((dict(seed=1), "seed"), (dict(clips=6), "clips"), (dict(moved_noise=True), "moved noise")):
        with pytest.raises(ValueError, match=f"clips.pt was made with another {told}; give that one, or another"):
            train_web(tmp_path, 1, **dict(clips=4) | given)
    with monkeypatch.context() as patch:
        patch.setitem(COLOURS, "pink", (1.0, .6, .7))
        with pytest.raises(ValueError, match="clips.pt was made with another vocabulary"):
            train_web(tmp_path, 1, clips=4)
    export_web(tmp_path, tmp_path / "shipped")
    wan = load_wan(ROOT / "tiny" / "wan")
    pairs = merge_lora(wan.dit, tmp_path / "shipped")
    assert len(pairs) == 8 * len(wan.dit.blocks)
    assert all(A.shape[0] == 16 and B.any() for A, B in pairs.values())
    assert merge_lora(wan.dit, ROOT / "tiny" / "web").keys() == pairs.keys()


def test_noise_can_move_with_the_camera_in_training():
    """A still camera's noise is the same in all frames; of scenes that move, another loss comes out than plain."""
    scenes = [random_scene("moved", "static", index) for index in range(3)]
    still = dataclasses.replace(scenes[0], motions=["fixed"])
    noise = moved_along(still, (32, 16, 5, 8, 8), generator("moved"))
    assert torch.equal(noise, noise[:, :, :1].expand_as(noise))
    wan, latents = load_wan(ROOT / "tiny" / "wan"), torch.zeros(3, 16, 5, 8, 8)
    losses = [next(flow_losses(wan, latents, scenes, caption, "web", 0, moved)(0, 0))[0].item()
              for moved in (False, True)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("command", [["vae", "--minutes", ".001"], ["data", "--clips", "1"],
                                     ["dit", "--minutes", ".001"], ["export", "--out", "{run}/out"]])
@pytest.mark.parametrize("content", [
    None, b"", b"junk" * 100, dict(x=1), dict(model={}, ema={}, step=0, spent=0.0, optimisers=[])])
def test_a_state_that_is_none_is_one_sentence(content, command, tmp_path, capsys):
    """None: a pipe, which would never end."""
    name = "dit" if command[0] == "export" else "vae"
    file = tmp_path / name / "state.pt"
    file.parent.mkdir()
    if content is None:
        os.mkfifo(file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert main([word.format(run=tmp_path) for word in command] + ["--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    ending = "missing, or no regular file; train it first" if content is None else "damaged, or of another model"
    assert f"tiny: {file} is {ending}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_not_trained_yet_is_an_error_by_name(tmp_path, capsys):
    with pytest.raises(ValueError, match="state.pt is missing, or no regular file; train it first"):
        trained(tmp_path, "vae")
    assert main(["data", "--run", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("tiny: ")
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds nothing that is trained" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
