import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import depth_anything as D
from depth_anything import (SIZES, DA3Config, DepthAnything3, container_memory, free_memory,
                            load_depth_anything)
from noise_warp import relative_to_first, rotation_angle
from sample import read_video, write_video
from tiny.world import random_scene
from tiny.world import render as render_scene
from weights import TINY, read_json, write_json

CONFIG = dict(dim=32, depth=6, heads=2, out_layers=(2, 3, 4, 5), alt_start=2, features=16,
              out_channels=(8, 8, 16, 16), gaussians=True, patch_size=8, grid=8, process_res=32)


@torch.no_grad()
def randomise_da3(model, seed=0):
    """Weights at which every part shows in the output: norms and fields of view near 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        z = torch.randn(p.shape, generator=g)
        if p.dim() < 2:
            near_one = ("norm" in name and "weight" in name) or "gamma" in name or "fc_fov.0.bias" in name
            p.copy_(z * .1 + (1 if near_one else 0))
        else:
            p.copy_(z * .5 if "token" in name or "pos_embed" in name else z * .7 / p[0].numel() ** .5)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in the published layout: every name has a prefix."""
    path = tmp_path_factory.mktemp("da3")
    state = randomise_da3(DepthAnything3(DA3Config(**CONFIG))).state_dict()
    save_file({D.checkpoint_key(k): v.contiguous() for k, v in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_reconstruction_has_the_documented_fields(folder):
    da3 = load_depth_anything(folder)
    rec = da3(torch.rand(5, 3, 40, 64, generator=torch.Generator().manual_seed(0)))
    assert rec.depth.shape == rec.confidence.shape == (5, 24, 32)
    assert rec.images.shape == (5, 3, 24, 32)
    assert (rec.depth > 0).all()
    assert (rec.confidence >= 1).all()
    R = rec.camera_to_world[:, :3, :3]
    assert torch.allclose(R @ R.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(R), torch.ones(5))
    assert torch.equal(rec.intrinsics[:, :2, 2], torch.tensor([[16.0, 12.0]]).expand(5, 2))
    g = rec.gaussians
    assert g.means.shape == g.scales.shape == (5 * 24 * 32, 3)
    assert g.rotations.shape == (3840, 4)
    assert g.harmonics.shape == (3840, 3, 9)
    assert (0 <= g.opacities).all() and (g.opacities <= 1).all()
    assert torch.allclose(g.rotations.norm(dim=-1), torch.ones(3840), atol=1e-5)


def test_views_are_subsampled_evenly(folder):
    da3 = load_depth_anything(folder)
    frames = torch.rand(9, 3, 32, 32)
    rec = da3(frames, views=3)
    assert rec.index.tolist() == [0, 4, 8]
    assert torch.allclose(rec.depth, da3(frames[[0, 4, 8]]).depth, atol=1e-5)


def test_order_of_the_views_does_not_matter(folder):
    """The reference view is put first and everything back in its place: a rolled video is a rolled result."""
    da3 = load_depth_anything(folder)
    frames = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rec, rolled = da3(frames), da3(frames.roll(2, 0))
    assert torch.allclose(rec.depth.roll(2, 0), rolled.depth, atol=1e-4)
    assert torch.allclose(rec.camera_to_world.roll(2, 0), rolled.camera_to_world, atol=1e-4)


@pytest.mark.parametrize("frames", [
    torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32).repeat(4, 1, 1, 1), torch.zeros(3, 3, 32, 32)])
def test_one_identical_or_black_frames_give_finite_poses(folder, frames):
    rec = load_depth_anything(folder)(frames)
    for x in (rec.depth, rec.camera_to_world, rec.intrinsics, rec.gaussians.means, rec.gaussians.rotations):
        assert x.isfinite().all()


def test_bad_frames_are_refused(folder):
    da3 = load_depth_anything(folder)
    nan = torch.rand(2, 3, 32, 32)
    nan[1, 0, 3, 3] = torch.nan
    empty, flat = torch.rand(0, 3, 8, 8), torch.rand(3, 8, 8)
    for frames, message in ((nan, "NaN or infinite"), (empty, "F >= 1"), (flat, r"must be \(F, 3, H, W\)")):
        with pytest.raises(ValueError, match=message):
            da3(frames)
    with pytest.raises(ValueError, match="views must be at least 1"):
        da3(torch.rand(2, 3, 32, 32), views=0)


def test_preprocessing_sizes():
    config = SIZES["da3-giant"]
    expected = {(480, 832): (294, 504), (832, 480): (504, 294), (64, 64): (504, 504), (504, 504): (504, 504),
                (7, 504): (14, 504)}
    for size, processed in expected.items():
        assert D.preprocess(torch.rand(1, 3, *size), config).shape[2:] == processed
        assert D.processed_size(*size, config) == processed
    x = torch.rand(1, 3, 12, 12)
    boxes = x.unflatten(2, (4, 3)).unflatten(4, (4, 3)).mean((3, 5))
    assert torch.allclose(D.resize(x, 4, 4), boxes, atol=1e-6)
    assert torch.allclose(D.resize(torch.full((1, 3, 9, 7), .3), 4, 3), torch.tensor(.3))


def test_strict_loading(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "da3")
    state = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in state.items() if "cls_token" not in k}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="lacks tensor model.backbone.pretrained.cls_token"):
        load_depth_anything(copy)
    save_file({**state, "model.more": torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="unknown tensor model.more"):
        load_depth_anything(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model.safetensors"):
        load_depth_anything(copy)
    (copy / "config.json").write_text('{"model_name": "da3nested"}')
    with pytest.raises(ValueError, match="names none of da3-small"):
        load_depth_anything(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing"):
        load_depth_anything(copy)


@pytest.mark.parametrize("entries, message", [
    (dict(depth=10 ** 6), "describes no model that can be .*far fewer layers"),
    (dict(dim="96"), "config.json, entry dim: Expected int, got str"),
    (dict(heads=0), "config.json, entry heads: Expected int >= 1"),
    (dict(swiglu=1), "config.json, entry swiglu: Expected bool, got int"),
    (dict(out_layers=[0, 1, 2, 99]), "out_layers must rise within"),
    (dict(out_layers=[2, 1, 2, 3]), "out_layers must rise within"),
    (dict(process_res=10 ** 5), "process_res must be at most 4096 pixels")])
def test_a_config_of_another_form_is_named(folder, tmp_path, entries, message):
    copy = shutil.copytree(folder, tmp_path / "da3")
    write_json(copy / "config.json", read_json(copy / "config.json") | entries)
    with pytest.raises(ValueError, match=message):
        load_depth_anything(copy)


def test_branches_left_out_may_be_in_the_file(folder, tmp_path):
    """Published checkpoints hold weights for known cameras and for rays: they change nothing."""
    copy = shutil.copytree(folder, tmp_path / "da3")
    state = load_file(copy / "model.safetensors")
    names = ["model.cam_enc.trunk.0.norm1.bias",
             "model.head.scratch.output_conv1_aux.0.0.weight",
             "model.head.scratch.output_conv2_aux.0.2.bias",
             "model.head.scratch.refinenet4_aux.out_conv.bias"]
    save_file(state | {name: torch.zeros(1) for name in names}, copy / "model.safetensors")
    with_them, without = load_depth_anything(copy).state_dict(), load_depth_anything(folder).state_dict()
    assert with_them.keys() == without.keys()
    assert all(torch.equal(with_them[name], without[name]) for name in without)
    save_file(state | {"model.gs_head.scratch.refinenet4_aux.x": torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="unknown tensor model.gs_head.scratch.refinenet4_aux.x"):
        load_depth_anything(copy)


def test_gaussian_means_sit_at_ray_length_depth():
    raw = torch.zeros(1, 38, 3, 5)
    K = torch.tensor([[[4.0, 0, 2.5], [0, 4, 1.5], [0, 0, 1]]])
    pose = torch.eye(4)[None].clone()
    pose[0, :3, 3] = torch.tensor([1.0, 2, 3])
    g = D.gaussians_of(raw, torch.full((1, 3, 5), 2.0), pose, K)
    away = g.means - pose[0, :3, 3]
    assert torch.allclose(away.norm(dim=-1), torch.tensor(2.0))
    assert torch.allclose(away[7], torch.tensor([0.0, 0, 2]), atol=1e-6)  # the central pixel looks along z
    assert torch.allclose(g.opacities, torch.tensor(.5))
    assert torch.allclose(g.scales, torch.tensor((1e-5 + (30 - 1e-5) / 2) * 2 * .1 * (1 / 4 + 1 / 4)))


def test_more_views_than_memory_is_an_error(folder):
    da3 = load_depth_anything(folder)
    with pytest.raises(MemoryError, match="1000000 views need about .* free .fewer --views need less"):
        da3(torch.zeros(1, 3, 64, 64).expand(10 ** 6, -1, -1, -1))


def test_command_line_writes_pictures_and_a_ply_that_reads_back(folder, tmp_path, capsys):
    video = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 48)
    write_video(tmp_path / "a.mp4", video, 8)
    assert D.main([str(tmp_path / "a.mp4"), "--model", str(folder), "--views", "3"]) == 0
    out = tmp_path / "a_3d"
    files = {"depth.mp4", "path.png", "gaussians.ply", "input_and_rerender.mp4"}
    assert {f.name for f in out.iterdir()} == files
    assert "dB PSNR" in capsys.readouterr().out

    header, body = (out / "gaussians.ply").read_bytes().split(b"end_header\n", 1)
    lines = [line.decode().split() for line in header.splitlines()]
    names = [words[2] for words in lines if words[0] == "property"]
    count = next(int(words[2]) for words in lines if words[0] == "element")
    data = np.frombuffer(body, "<f4").reshape(count, len(names))
    assert names[:6] == ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[-8:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert len(names) == 59 - 21  # degree 2: 8 of the 15 coefficients a colour of degree 3
    assert np.isfinite(data).all()
    g = load_depth_anything(folder)(read_video(tmp_path / "a.mp4")[0], 3).gaussians
    assert np.allclose(data[:, :3], g.means, atol=1e-5)
    assert np.allclose(data[:, 3:6], g.harmonics[:, :, 0], atol=1e-5)
    assert np.allclose(data[:, 6:30], g.harmonics[:, :, 1:].flatten(1), atol=1e-5)  # colour by colour
    assert np.allclose(np.exp(data[:, -7:-4]), g.scales, rtol=1e-4)
    assert np.allclose(1 / (1 + np.exp(-data[:, -8])), g.opacities, atol=1e-4)

    assert D.main([str(tmp_path / "none.mp4"), "--model", str(folder)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_shipped_twin_finds_cameras_and_depth():
    """On held-out rooms, from nine frames alone: rotations, direction of travel, depth up to scale."""
    da3 = load_depth_anything(TINY / "depth_anything")
    angles, directions, depths = [], [], []
    for i, motion in enumerate(("pan_left", "orbit_right", "move_left", "push_in", "pull_right")):
        scene = random_scene("shipped", "static", i)
        scene.motions = [motion]
        clip = render_scene(scene, depth=True)
        rec = da3(clip["video"], 9)
        found, true = relative_to_first(rec.camera_to_world), relative_to_first(clip["poses"][rec.index])
        angle = rotation_angle(found[:, :3, :3], true[:, :3, :3])
        angles.append(math.degrees(angle[1:].median()))
        if true[-1, :3, 3].norm() > .1:
            directions.append(float(F.cosine_similarity(found[-1, :3, 3], true[-1, :3, 3], dim=0)))
        depth = clip["depth"][rec.index]
        error = (rec.depth * depth.median() / rec.depth.median() - depth).abs() / depth
        depths.append(float(error.mean()))
    assert sorted(angles)[2] < 2, angles
    assert min(directions) > math.cos(math.radians(15)), directions
    assert sum(depths) / 5 < .10, depths


def test_memory_that_the_system_would_give_back_is_free():
    """What it caches of files is: after a download nearly all memory is."""
    psutil = pytest.importorskip("psutil")
    free = min(psutil.virtual_memory().available, container_memory())
    assert free_memory(torch.device("cpu")) == pytest.approx(free, rel=.1)


@pytest.mark.parametrize("limit, free", [("8000\n", 8000 - 5000 + 1500), ("max\n", math.inf), (None, math.inf)])
def test_a_containers_limit_is_known(limit, free, tmp_path):
    """As cgroup v2 tells it: what files are cached is given back when it is needed."""
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 1500\nactive_file 500\n")
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    assert container_memory(tmp_path) == free


def test_near_is_light_and_warm():
    near, middle, far = D.colour_depth(torch.tensor([1.0, 2, 8]).repeat_interleave(70).view(3, 7, 10)).mean((2, 3))
    assert near.mean() > middle.mean() > far.mean()
    assert near[0] > near[2]
