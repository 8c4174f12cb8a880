import math
import random
import re
from collections import Counter

import pytest
import torch

from conftest import train_twice
from critics import Critic, Preference, as_pictures
from depth_anything import load_depth_anything
from noise_warp import camera_path
from tiny.__main__ import main
from tiny.judges import (LOSS_WEIGHTS, build_depth, camera_step, critic_examples, depth_sample, export_critic,
                         export_preference, geometry_losses, grade, preference_pair, render_step, train_critic,
                         train_preference)
from tiny.probe import asked, labels_of
from tiny.train import save
from tiny.world import intrinsics, random_scene, render
from weights import TINY

# ----------------------------------------------------------------------------------------------------- Depth Anything

@pytest.mark.parametrize("step", ("camera", "render"))
def test_depth_training_losses_reach_every_part(step):
    """A backward pass of each step of the Depth Anything twin's training reaches backbone, heads and camera decoder."""
    rng = random.Random(1)  # its first numbers ask for no VAE round trip
    da3 = build_depth()
    views = [0, 5, 9]
    clips = [depth_sample(rng, None, i, 0, views) for i in range(2)]
    paths = [camera_path(scene.motions, 17).float() for _, _, scene in clips]
    if step == "camera":
        seen = torch.stack([frames for frames, _, _ in clips])
        depth = torch.stack([exact for _, exact, _ in clips])
        poses = torch.stack([path[views] for path in paths])
        losses = camera_step(da3, torch.nn.Linear(128, 12), seen, depth, poses, rng)
        assert set(losses) == set(LOSS_WEIGHTS) - {"render"}
    else:
        seen, depth, scene = clips[0]
        losses = render_step(da3, seen, depth, paths[0], views, scene, [2, 3])
        assert set(losses) == {"depth", "position", "rotation", "focal", "render"}
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    backbone = da3.backbone.pretrained.blocks[0].attn.qkv
    for layer in (backbone, da3.head.projects[0], da3.cam_dec.fc_t, da3.gs_head.projects[0]):
        assert layer.weight.grad.abs().sum() > 0


def test_a_noisy_clip_is_the_same_again_and_another_next_to_it():
    """A training of the depth model that goes on sees what an unbroken one sees."""
    noisy = next(s for s in range(100) if .8 < random.Random(s).random() < .9)
    views = [0, 5]
    first, *_ = depth_sample(random.Random(noisy), None, 3, 0, views)
    again, exact, scene = depth_sample(random.Random(noisy), None, 3, 0, views)
    other, *_ = depth_sample(random.Random(noisy), None, 3, 1, views)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    clean = render(scene, at=views)["video"]
    assert .03 < (again - clean).std() < .07  # it is noisy


def test_depth_batches_are_their_clips():
    """The network on two clips at once is the network on each."""
    transformer = build_depth().backbone.pretrained
    x = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = transformer(x)
        reference = transformer.reference.tolist()
        for i in range(2):
            alone = transformer(x[i:i + 1])
            assert transformer.reference.tolist() == reference[i:i + 1]
            for (patches, tokens), (own_patches, own_tokens) in zip(both, alone, strict=True):
                assert torch.allclose(patches[i], own_patches[0], atol=1e-4)
                assert torch.allclose(tokens[i], own_tokens[0], atol=1e-4)


def test_score_depth_prints_its_figures(tmp_path, capsys):
    assert main(["score-depth", "--num", "2", "--run", str(tmp_path)]) == 0
    figures = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert set(figures) == {"input_db", "odd_db", "rotation_deg", "direction_deg", "absrel"}
    assert float(figures["input_db"]) > 20
    assert float(figures["odd_db"]) > 20 and figures["odd_db"] != figures["input_db"]
    assert float(figures["rotation_deg"]) < 2
    assert 0 < float(figures["direction_deg"]) < 5
    assert 0 < float(figures["absrel"]) < .05
    assert (tmp_path / "score-depth.png").exists()


def test_exact_geometry_costs_nothing_but_its_confidence():
    path, depth = camera_path(["orbit_left"], 5).float(), torch.rand(5, 64, 64) + 1
    K = intrinsics(64, 64).expand(5, 3, 3)
    found = geometry_losses(depth, torch.full_like(depth, math.e), depth, path, K, path)
    assert [float(loss) for loss in found.values()] == pytest.approx([-.1, 0, 0, 0], abs=1e-6)


# ------------------------------------------------------------------------------------------------- the geometry's critic

def test_grades_look_at_what_was_seen_alone():
    truth, seen = torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8)
    seen[..., 4:] = 0
    assert grade(truth + (seen == 0).float()[:, None], truth, seen).item() == 9
    assert grade(truth + .08, truth, seen).item() == 3  # 9 / e


def test_examples_of_the_critic_know_no_scale():
    da3 = load_depth_anything(TINY / "depth_anything")

    def larger(video, views):
        rec = da3(video, views)
        for lengths in (rec.depth, rec.camera_to_world[:, :3, 3], rec.gaussians.means, rec.gaussians.scales):
            lengths *= 4
        return rec

    assert torch.equal(critic_examples(da3, 0, 0)[1], critic_examples(larger, 0, 0)[1])


def test_the_critic_twin_trains_resumes_and_exports(tmp_path):
    """On the pictures of three clips, as the shipped depth model sees them."""
    folder = tmp_path / "critic"
    da3 = load_depth_anything(TINY / "depth_anything")
    pictures, digits = (torch.cat(parts) for parts in zip(*(critic_examples(da3, i, 0) for i in range(3))))
    assert len(set(digits.tolist())) > 2
    save(folder / "data.pt", pictures=torch.stack(as_pictures(pictures)), digits=digits, seed=0)
    first, second = train_twice(lambda minutes: train_critic(tmp_path, minutes, clips=3), folder / "state.pt")
    assert second["step"] > first["step"] > 0

    cells = (folder / "log.txt").read_text().splitlines()[-1].split()
    figures = {name: float(value) for name, value in zip(cells[::2], cells[1::2])}
    assert figures["loss"] > 0
    assert 0 <= figures["held_out_error"] <= 1
    assert 0 < figures["between_scenes"] < 1
    with pytest.raises(ValueError, match="--clips must be at least 3, got 2"):
        train_critic(tmp_path, 1, clips=2)
    with pytest.raises(ValueError, match="was made with another number of clips"):
        train_critic(tmp_path, 1, clips=4)

    export_critic(tmp_path, tmp_path / "out")
    exported, judge = Critic(tmp_path / "out"), Critic(folder / "start")
    start = judge(pictures[:4])
    judge.model.load_state_dict(second["ema"])
    assert torch.allclose(exported(pictures[:4]), judge(pictures[:4]), atol=.02)
    assert not torch.equal(judge(pictures[:4]), start)


# ------------------------------------------------------------------------------------------------------ the preference

def words(text):
    return Counter(word for word in re.findall("[a-z]+", text.lower()) if word not in ("a", "an"))


def test_preference_pairs_differ_in_one_thing():
    pairs = [preference_pair(i, "test") for i in range(150)]
    seen = []
    for (better, prompt), (worse, other_prompt), kind in pairs:
        changed = (better - worse).abs().amax(0) > .01  # pixels
        extra = (words(prompt) - words(other_prompt)).total()
        missing = (words(other_prompt) - words(prompt)).total()
        if kind == "degraded":
            assert prompt == other_prompt
            assert not torch.equal(better, worse)
        elif kind == "room":
            assert extra > 1
            assert not changed.any()
        elif prompt != other_prompt:
            assert extra == missing == 1
            assert not changed.any()
        else:
            assert changed.float().mean() < .6
            seen.append(bool(changed.any()))
    share = Counter(kind for _, _, kind in pairs)
    assert .4 < share["degraded"] / 150 < .6
    assert .3 < share["object"] / 150 < .5
    assert share["room"] > 5
    assert len(seen) > 15
    assert sum(seen) / len(seen) > .85  # an object may have left the picture


def test_the_better_of_a_pair_is_what_was_rendered_and_asked_for():
    for i in range(30):
        (better, prompt), (worse, other_prompt), kind = preference_pair(i, "test")
        rng = random.Random(f"preference/test/{i}")
        scene = random_scene("preference/test", rng.choice(("static", "dynamic")), i)
        clean = render(scene, at=[rng.randrange(17)])["video"][0]
        if kind == "degraded":
            assert (better - clean).abs().mean() < (worse - clean).abs().mean()
        elif prompt != other_prompt:
            assert asked(prompt) == labels_of(scene) != asked(other_prompt)


def test_the_preference_twin_trains_resumes_and_exports(tmp_path):
    """It goes on from where it stopped, and what is exported is the average of the training."""
    first, second = train_twice(lambda minutes: train_preference(tmp_path, minutes, batch=2),
                                tmp_path / "preference" / "state.pt")
    assert second["step"] > first["step"] > 0
    assert all(value.isfinite().all() for value in second["ema"].values())

    lines = (tmp_path / "preference" / "log.txt").read_text().splitlines()
    assert len(lines) >= 2
    cells = lines[-1].split()
    figures = {name: float(value) for name, value in zip(cells[::2], cells[1::2])}
    assert figures["step"] == second["step"]
    assert figures["loss"] > 0 and figures["words"] > 0
    assert all(0 <= figures[name] <= 1 for name in ("held_out_right", "degraded", "object", "room"))

    export_preference(tmp_path, tmp_path / "out")
    exported = Preference(tmp_path / "out")
    judge = Preference(tmp_path / "preference" / "start")
    start = judge.model.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in second["ema"].items())
    judge.model.load_state_dict(second["ema"])
    frames = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a red box", "a blue sphere"]
    assert torch.allclose(exported(frames, prompts), judge(frames, prompts), atol=.02)
