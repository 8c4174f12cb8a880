import itertools
import json
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from depth_anything import Reconstruction
from noise_warp import parse_motion
from splat import Gaussians
from tiny.__main__ import main
from tiny.world import (CORRUPTIONS, DAMAGE, DEGRADATIONS, HIGH, LOW, PITCH, SHAPES, Object, Scene, caption, corrupt,
                        damage, degrade, intrinsics, prompt_rows, random_scene, render,
                        unseen_scenes)


# ------------------------------------------------------------------------------------------------- scenes and captions

def test_scenes_are_deterministic_and_differ():
    assert random_scene(1, "static", 5) == random_scene(1, "static", 5)
    assert len({random_scene(1, "static", i).caption for i in range(50)}) == 50
    scene = random_scene(3, "dynamic", 2)
    assert torch.equal(render(scene, frames=5)["video"], render(scene, frames=5)["video"])
    with pytest.raises(ValueError, match="static or dynamic, got 'train'"):
        random_scene(1, "train", 0)


def test_captions_name_everything_and_the_prompt_parser_reads_the_camera_back():
    for i in range(300):
        scene = random_scene(0, ("static", "dynamic")[i % 2], i)
        assert parse_motion(scene.caption) == scene.motions, scene.caption
        words = [scene.wall, scene.floor]
        for thing in scene.objects:
            words += [thing.colour, thing.shape, thing.behaviour]
        assert all(word in scene.caption.lower() for word in words), scene.caption
        assert parse_motion(caption(scene, random.Random(i), camera=False)) == ["fixed"]


def test_every_motion_word_is_rendered():
    scenes = [random_scene(0, "static", i) for i in range(200)]
    assert len({motion for scene in scenes for motion in scene.motions}) == 11
    assert any(len(scene.motions) == 2 for scene in scenes)


def test_the_prompt_file_holds_the_captions():
    """tiny/prompts.jsonl is what the command writes; the dynamic and the test split repeat nothing."""
    rows = [json.loads(line) for line in (ROOT / "tiny" / "prompts.jsonl").read_text().splitlines()]
    assert rows[:100] == list(itertools.islice(prompt_rows(), 100))
    prompts = dict(train=[], dynamic=[], test=[])
    for row in rows:
        prompts[row["split"]].append(row["prompt"])
    assert [len(part) for part in prompts.values()] == [3000, 500, 300]
    assert not set(prompts["train"]) & set(prompts["test"])
    assert rows[-1]["id"] == "test-0299"


# -------------------------------------------------------------------------------------------------------- the renderer

def test_video_poses_depth_and_mask_have_the_documented_shapes():
    out = render(random_scene(0, "static", 1), frames=5, height=32, width=48, depth=True)
    video, poses, depth, mask = out["video"], out["poses"], out["depth"], out["mask"]
    assert video.shape == (5, 3, 32, 48)
    assert 0 <= video.min() and video.max() <= 1
    assert poses.shape == (5, 4, 4)
    assert torch.equal(poses[0], torch.eye(4))
    assert depth.shape == mask.shape == (5, 32, 48)
    assert depth.isfinite().all() and depth.min() > 0
    assert mask.max() >= 1


def test_rendering_some_frames_equals_rendering_all():
    scene = random_scene(0, "dynamic", 3)
    every = render(scene, frames=9)["video"]
    some = render(scene, frames=9, at=[2, 7])["video"]
    assert (every[[2, 7]] - some).abs().mean() < 1e-5  # a ray on an edge may round either way


def test_render_from_given_cameras():
    scene = random_scene("poses", "static", 2)
    own = render(scene, depth=True)
    again = render(scene, poses=own["poses"], depth=True)
    assert torch.equal(own["video"], again["video"])
    assert torch.equal(own["depth"], again["depth"])


def march(scene, pose, ray):
    """Slow oracle: walks a ray in small steps until it enters an object or leaves the room. -> z-depth, owner"""
    c, s = math.cos(PITCH), math.sin(PITCH)
    room = torch.tensor([[1, 0, 0], [0, c, s], [0, -s, c]], dtype=torch.float64)
    t = torch.arange(0, 5, 5e-4, dtype=torch.float64)[:, None]
    points = (room @ pose[:3, 3].double()) + t * (room @ pose[:3, :3].double() @ ray.double())  # (N, 3)
    outside = ((points < torch.tensor(LOW)) | (points > torch.tensor(HIGH))).any(1)
    first, owner = int(outside.nonzero()[0]), 0
    for number, thing in enumerate(scene.objects, 1):
        x, y, z = (points - torch.tensor([thing.x, HIGH[1] - thing.size, thing.z])).unbind(1)
        if thing.shape == "sphere":
            inside = x * x + y * y + z * z < thing.size ** 2
        elif thing.shape == "cylinder":
            inside = (x * x + z * z < thing.size ** 2) & (y.abs() < thing.size)
        else:
            across = math.cos(thing.yaw) * x - math.sin(thing.yaw) * z
            along = math.sin(thing.yaw) * x + math.cos(thing.yaw) * z
            inside = (across.abs() < thing.size) & (y.abs() < thing.size) & (along.abs() < thing.size)
        if inside.any() and int(inside.nonzero()[0]) < first:
            first, owner = int(inside.nonzero()[0]), number
    return float(t[first]), owner


@pytest.mark.parametrize("shape", SHAPES)
def test_depth_and_mask_agree_with_ray_marching(shape):
    things = [Object(shape, "green", -.2, 1.0, .22, .4), Object("box", "yellow", .35, 1.2, .2, -.3)]
    scene = Scene("red", "blue", things, ["orbit_left"])
    out = render(scene, frames=3, height=16, width=16, depth=True)
    K = intrinsics(16, 16)
    wrong = 0
    for f, row, column in itertools.product((0, 2), range(0, 16, 3), range(0, 16, 2)):
        ray = torch.linalg.inv(K) @ torch.tensor([column + .5, row + .5, 1.0])
        depth, owner = march(scene, out["poses"][f], ray)
        wrong += abs(depth - out["depth"][f, row, column]) > 2e-3 or owner != out["mask"][f, row, column]
    assert wrong <= 1  # a ray grazing an edge may fall on either side of a step


def test_depth_and_poses_explain_the_video():
    """Pixels of the last frame, lifted by depth and moved by the poses, find their colour in the first frame."""
    scene = random_scene(0, "static", 6)
    scene.motions = ["move_left"]
    out = render(scene, frames=5, height=64, width=64, depth=True)
    K = intrinsics(64, 64)
    v, u = torch.meshgrid(torch.arange(64) + .5, torch.arange(64) + .5, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], -1) @ torch.linalg.inv(K).T
    last = out["poses"][-1]
    world = (rays * out["depth"][-1][..., None]) @ last[:3, :3].T + last[:3, 3]
    seen = world @ K.T
    grid = seen[..., :2] / seen[..., 2:] / 32 - 1
    depth0 = F.grid_sample(out["depth"][None, :1], grid[None], align_corners=False)[0, 0]
    visible = (grid.abs() < .95).all(-1) & ((depth0 - seen[..., 2]).abs() < .02)
    found = F.grid_sample(out["video"][None, 0], grid[None], align_corners=False)[0]
    error = (found - out["video"][-1]).abs().mean(0)[visible]
    unmoved = (out["video"][0] - out["video"][-1]).abs().mean(0)[visible]
    assert visible.float().mean() > .6
    assert error.mean() < .02
    assert error.mean() < unmoved.mean() / 4


def test_dynamic_objects_move_while_the_room_stands_still():
    for index in range(8):
        scene = random_scene(0, "dynamic", index)
        scene.motions = ["fixed"]
        out = render(scene, frames=9, depth=True)
        room = (out["mask"] == 0).all(0)
        still = F.max_pool2d((~room)[None].float(), 3, 1, 1)[0] == 0
        change = (out["video"][1:] - out["video"][:1]).abs().amax((0, 1))
        assert change[still].max() == 0
        assert change[~still].max() > .2


def test_objects_do_what_their_words_say():
    def masks(behaviour):
        thing = Object("box", "green", 0.0, 1.1, .22, behaviour=behaviour)
        return render(Scene("red", "blue", [thing], ["fixed"]), 5, depth=True)["mask"].bool()

    area = {behaviour: masks(behaviour).sum((1, 2)) for behaviour in ("grows", "shrinks")}
    assert (area["grows"].diff() > 0).all()
    assert (area["shrinks"].diff() < 0).all()
    top = masks("bounces").any(2).int().argmax(1)
    assert top[1] < top[0]  # up
    assert top[3] < top[2]


def test_unseen_scenes_are_those_of_the_page():
    listed = re.findall(r"^\d+\. (.+)$", (ROOT / "docs" / "tiny_world.md").read_text(), re.M)[:12]
    assert listed == [scene.caption for scene in unseen_scenes(12)]


# ------------------------------------------------------------------------------------------------- what goes wrong, graded

def test_a_swapped_room_is_filmed_by_the_same_camera():
    scene = random_scene("corrupt", "static", 3)
    scene.motions = ["fixed"]
    for seed in (5, 6):
        video = corrupt(scene, "swap", 1.0, seed)
        assert torch.equal(video[-1], video[-2])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_grows_with_strength_and_frames_stay_clean(kind):
    scene = random_scene("corrupt", "static", 3)
    scene.motions = ["orbit_left"]
    true = render(scene)["video"]
    errors = [(corrupt(scene, kind, strength, 5) - true).abs().mean().item() for strength in (.01, .5, 1.0)]
    assert errors[0] < .02
    assert errors == sorted(errors)
    assert errors[2] > .01
    assert torch.equal(corrupt(scene, kind, .7, 5), corrupt(scene, kind, .7, 5))
    video = corrupt(scene, kind, 1.0, 5)
    assert video.shape == true.shape
    assert video.isfinite().all() and 0 <= video.min() and video.max() <= 1


def test_freeze_is_the_camera_standing_still():
    scene = random_scene("corrupt", "static", 3)
    video = corrupt(scene, "freeze", 1.0)
    assert (video - video[:1]).abs().max() == 0
    with pytest.raises(ValueError, match="kind must be one of warp"):
        corrupt(scene, "melt")


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_degradations_grow_with_strength(kind):
    image = render(random_scene("ugly", "static", 1), at=[0])["video"][0]
    errors = []
    for strength in (.2, .6, 1.0):
        ugly = degrade(image, kind, strength, torch.Generator().manual_seed(0))
        errors.append((ugly - image).square().mean().item())
    assert errors == sorted(errors)
    assert errors[2] > 3 * errors[0]
    assert kind != "fade" or ugly.std() < .3 * image.std()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_grows_with_strength_and_leaves_the_original_untouched(kind):
    n = 200
    means = torch.rand(n, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([-.5, -.5, 1.0])
    upright = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1)
    whole = Gaussians(means, torch.full((n, 3), .01), upright, torch.zeros(n, 3, 9), torch.full((n,), .9))
    depth = torch.full((2, 4, 4), 1.5)
    poses, K = torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1)
    rec = Reconstruction(depth, torch.ones(2, 4, 4), poses, K, whole, torch.zeros(2, 3, 4, 4), torch.arange(2))

    def change(strength):
        broken = damage(rec, kind, strength, torch.Generator().manual_seed(2)).gaussians
        moved = (broken.means - whole.means).norm(dim=1).mean()
        grown = (broken.scales - whole.scales).abs().mean()
        faded = (broken.opacities - whole.opacities).abs().mean()
        return float(moved + grown + faded)

    before = means.clone()
    assert change(0.0) < 1e-6 < change(.3) < change(1.0)
    far = damage(rec, kind, 1.0, torch.Generator().manual_seed(2)).gaussians.means.norm(dim=1)
    assert kind != "floaters" or (far <= means.norm(dim=1) + 1e-6).all()  # in front of their surface
    assert kind != "billboard" or torch.allclose(far, torch.tensor(1.5))
    assert torch.equal(whole.means, before)


def test_a_shape_without_its_rays_is_no_box():
    scene = random_scene(0, "static", 7)
    scene.objects[0].shape = "cone"
    with pytest.raises(ValueError, match="no ray is known to hit a cone"):
        render(scene)


def test_depth_is_finite_where_a_column_looks_straight_ahead():
    scene = random_scene(0, "static", 7)  # whose camera is fixed
    depth = render(scene, 1, 64, 65, depth=True)["depth"]
    assert depth.isfinite().all() and (depth > 0).all()


# ------------------------------------------------------------------------------------------------------- the command line

def test_show_and_captions_write_their_files(tmp_path, capsys):
    assert main(["show", "--run", str(tmp_path)]) == 0
    assert (tmp_path / "show.png").stat().st_size > 1000
    assert "freeze" in capsys.readouterr().out
    assert main(["captions", "--out", str(tmp_path / "prompts.jsonl")]) == 0
    assert (tmp_path / "prompts.jsonl").read_bytes() == (ROOT / "tiny" / "prompts.jsonl").read_bytes()


def test_a_command_takes_only_its_own_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["captions", "--minutes", "3"])
    assert stop.value.code == 2
    assert "--minutes" in capsys.readouterr().err
