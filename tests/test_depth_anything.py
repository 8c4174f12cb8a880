import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import depth_anything as D
from depth_anything import SIZES, DA3Config, DepthAnything3, Gaussians, load_depth_anything, move_gaussians
from noise_warp import camera_path

CONFIG = dict(dim=32, depth=6, heads=2, out_layers=(2, 3, 4, 5), alt_start=2, features=16, out_channels=(8, 8, 16, 16), gaussians=True,
              patch_size=8, grid=8, process_res=32)


@torch.no_grad()
def randomise_da3(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        z = torch.randn(p.shape, generator=g)
        if p.dim() < 2:
            p.copy_(z * .1 + (1 if ("norm" in name and "weight" in name) or "gamma" in name or "fc_fov.0.bias" in name else 0))
        else:
            p.copy_(z * .5 if "token" in name or "pos_embed" in name else z * .7 / p[0].numel() ** .5)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in the published layout: prefix, and the shared norm stored once."""
    path = tmp_path_factory.mktemp("da3")
    model = randomise_da3(DepthAnything3(DA3Config(**CONFIG)))
    save_file({D.checkpoint_key(k): v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_reconstruction_has_the_documented_fields(folder):
    da3 = load_depth_anything(folder)
    rec = da3(torch.rand(5, 3, 40, 64, generator=torch.Generator().manual_seed(0)))
    assert rec.depth.shape == rec.confidence.shape == (5, 24, 32) and rec.images.shape == (5, 3, 24, 32)
    assert (rec.depth > 0).all() and (rec.confidence >= 1).all()
    R = rec.camera_to_world[:, :3, :3]
    assert torch.allclose(R @ R.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5) and torch.allclose(torch.linalg.det(R), torch.ones(5))
    assert torch.equal(rec.intrinsics[:, :2, 2], torch.tensor([[16.0, 12.0]]).expand(5, 2))
    g = rec.gaussians
    assert g.means.shape == g.scales.shape == (5 * 24 * 32, 3) and g.rotations.shape == (3840, 4) and g.harmonics.shape == (3840, 3, 9)
    assert (0 <= g.opacities).all() and (g.opacities <= 1).all()
    assert torch.allclose(g.rotations.norm(dim=-1), torch.ones(3840), atol=1e-5)


def test_views_are_subsampled_evenly(folder):
    da3 = load_depth_anything(folder)
    frames = torch.rand(9, 3, 32, 32)
    rec = da3(frames, views=3)
    assert rec.frames.tolist() == [0, 4, 8]
    assert torch.allclose(rec.depth, da3(frames[[0, 4, 8]]).depth, atol=1e-5)


@pytest.mark.parametrize("frames", [torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32).repeat(4, 1, 1, 1), torch.zeros(3, 3, 32, 32)])
def test_one_identical_or_black_frames_give_finite_poses(folder, frames):
    rec = load_depth_anything(folder)(frames)
    assert all(x.isfinite().all() for x in (rec.depth, rec.camera_to_world, rec.intrinsics, rec.gaussians.means, rec.gaussians.rotations))


def test_bad_frames_are_refused(folder):
    da3 = load_depth_anything(folder)
    nan = torch.rand(2, 3, 32, 32)
    nan[1, 0, 3, 3] = torch.nan
    for frames, message in ((nan, "NaN or infinite"), (torch.rand(0, 3, 8, 8), "F >= 1"), (torch.rand(3, 8, 8), r"must be \(F, 3, H, W\)")):
        with pytest.raises(ValueError, match=message):
            da3(frames)
    with pytest.raises(ValueError, match="views must be at least 1"):
        da3(torch.rand(2, 3, 32, 32), views=0)


def test_preprocessing_sizes():
    c = SIZES["da3-giant"]
    for (H, W), expected in (((480, 832), (294, 504)), ((832, 480), (504, 294)), ((64, 64), (504, 504)), ((504, 504), (504, 504)), ((7, 504), (14, 504))):
        assert D.preprocess(torch.rand(1, 3, H, W), c).shape[2:] == expected
    x = torch.rand(1, 3, 12, 12)
    assert torch.allclose(D.resize(x, 4, 4), x.unflatten(2, (4, 3)).unflatten(4, (4, 3)).mean((3, 5)), atol=1e-6)
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
    (copy / "config.json").write_text('{"model_name": "da3nested"}')
    with pytest.raises(ValueError, match="names none of da3-small"):
        load_depth_anything(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing"):
        load_depth_anything(copy)


def test_quaternions_and_spherical_harmonics_rotate():
    q = torch.nn.functional.normalize(torch.randn(200, 4, dtype=torch.float64), dim=-1)
    q = torch.cat([q, torch.eye(4, dtype=q.dtype), torch.tensor([[1.0, 1e-9, 0, 0], [0, 1, 0, 1e-9]])])
    R = D.quaternion_to_matrix(q)
    assert torch.allclose(D.quaternion_to_matrix(D.matrix_to_quaternion(R)), R, atol=1e-9)
    sh = torch.randn(200, 3, 9, dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.randn(200, 3, dtype=torch.float64), dim=-1)
    turned = torch.einsum("vcn,vn->vc", D.rotate_sh(sh, R[:200]), D.sh_basis(directions))
    back = torch.einsum("vij,vi->vj", R[:200], directions)  # R^T d
    assert torch.allclose(turned, torch.einsum("vcn,vn->vc", sh, D.sh_basis(back)), atol=1e-9)


def test_gaussian_means_sit_at_ray_length_depth():
    raw = torch.zeros(1, 38, 3, 5)
    K = torch.tensor([[[4.0, 0, 2.5], [0, 4, 1.5], [0, 0, 1]]])
    pose = torch.eye(4)[None].clone()
    pose[0, :3, 3] = torch.tensor([1.0, 2, 3])
    g = D.gaussians_of(raw, torch.full((1, 3, 5), 2.0), pose, K)
    assert torch.allclose((g.means - pose[0, :3, 3]).norm(dim=-1), torch.tensor(2.0))
    assert torch.allclose(g.means[7] - pose[0, :3, 3], torch.tensor([0.0, 0, 2]), atol=1e-6)  # the central pixel looks along z
    assert torch.allclose(g.opacities, torch.tensor(.5))
    assert torch.allclose(g.scales, torch.tensor((1e-5 + (30 - 1e-5) / 2) * 2 * .1 * (1 / 4 + 1 / 4)))


def test_umeyama_scale():
    a = torch.randn(6, 3)
    R = D.quaternion_to_matrix(torch.randn(4))
    assert D.umeyama_scale(2.5 * a @ R.T + 3, a) == pytest.approx(2.5, rel=1e-5)
    line = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2, 3])
    assert D.umeyama_scale(.5 * line, line) == pytest.approx(.5, rel=1e-5)
    assert D.umeyama_scale(a, torch.zeros(6, 3)) == 1.0


def test_known_cameras_put_the_result_in_their_world(folder):
    """The same cameras in other axes, farther apart by a factor: the reconstruction turns and grows with them."""
    da3 = load_depth_anything(folder)
    frames = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    path = camera_path(["orbit_left", "push_in"], 4).float()
    path[:, :3, 3] *= 3  # distances from the first camera above .1, below which the model's scale is clamped
    K = torch.tensor([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]]).repeat(4, 1, 1)
    world = camera_path(["pull_left"], 5)[4].float()
    moved = path.clone()
    moved[:, :3, 3] *= 5
    moved = world @ moved
    a, b = (da3(frames, camera_to_world=p, intrinsics=K) for p in (path, moved))
    assert torch.allclose(a.camera_to_world, path) and torch.allclose(b.camera_to_world, moved)
    assert torch.allclose(b.depth, 5 * a.depth, rtol=1e-3)
    assert torch.allclose(b.gaussians.means, 5 * a.gaussians.means @ world[:3, :3].T + world[:3, 3], rtol=1e-3, atol=1e-2 * float(a.depth.max()))
    assert torch.allclose(b.gaussians.scales, 5 * a.gaussians.scales, rtol=1e-3)
    assert not torch.allclose(a.depth, da3(frames).depth)  # they are used
    fx = a.depth.shape[2] / 48 * 40
    assert torch.allclose(a.intrinsics[:, 0, 0], torch.full((4,), fx))
    with pytest.raises(ValueError, match="known cameras need both"):
        da3(frames, camera_to_world=path)


def test_moved_gaussians_look_the_same_from_the_moved_camera():
    from splat import render
    g = torch.Generator().manual_seed(1)
    r = lambda *s: torch.rand(*s, generator=g)  # noqa: E731
    splats = Gaussians(torch.stack([r(50) - .5, r(50) - .5, r(50) + 1], 1), r(50, 3) * .1 + .02, torch.nn.functional.normalize(r(50, 4) - .5, dim=1), r(50, 3, 9) - .3, r(50))
    K, pose, world = torch.tensor([[[20.0, 0, 10], [0, 20, 10], [0, 0, 1]]]), torch.eye(4), camera_path(["orbit_left"], 5)[4].float()
    moved = world @ pose
    assert (render(splats, pose[None], K, 20, 20)[0] - render(move_gaussians(splats, world, 1.0), moved[None], K, 20, 20)[0]).abs().max() < 1e-4
    doubled = pose.clone()
    big = render(move_gaussians(splats, torch.eye(4), 2.0), doubled[None], K, 20, 20)
    assert (big[0] - render(splats, pose[None], K, 20, 20)[0]).abs().max() < 1e-4


def test_more_views_than_memory_is_an_error(folder):
    da3 = load_depth_anything(folder)
    with pytest.raises(ValueError, match="1000000 views need about .* ask for fewer views"):
        da3(torch.zeros(1, 3, 64, 64).expand(10 ** 6, -1, -1, -1))


def test_command_line_writes_pictures_and_a_ply_that_reads_back(folder, tmp_path, capsys):
    import numpy as np
    from depth_anything import main
    from sample import read_video, write_video
    video = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 48)
    write_video(tmp_path / "a.mp4", video, 8)
    assert main([str(tmp_path / "a.mp4"), "--model", str(folder), "--views", "3"]) == 0
    out = tmp_path / "a_3d"
    assert {f.name for f in out.iterdir()} == {"depth.mp4", "path.png", "gaussians.ply", "input_and_rerender.mp4"} and "dB PSNR" in capsys.readouterr().out
    header, body = (out / "gaussians.ply").read_bytes().split(b"end_header\n", 1)
    names = [line.split()[2].decode() for line in header.splitlines() if line.startswith(b"property")]
    count = int(next(line.split()[2] for line in header.splitlines() if line.startswith(b"element")))
    data = np.frombuffer(body, "<f4").reshape(count, len(names))
    assert names[:6] == ["x", "y", "z", "nx", "ny", "nz"] and names[-8:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert len(names) == 62 - 21 and np.isfinite(data).all()  # degree 2: 8 of the 15 coefficients a colour of degree 3
    rec = load_depth_anything(folder)(read_video(tmp_path / "a.mp4")[0], 3)
    order = rec.gaussians.opacities.argsort(descending=True)
    assert np.allclose(data[:, :3], rec.gaussians.means[order], atol=1e-5) and np.allclose(np.exp(data[:, -7:-4]), rec.gaussians.scales[order], rtol=1e-4)
    assert np.allclose(1 / (1 + np.exp(-data[:, -8])), rec.gaussians.opacities[order], atol=1e-4)
    assert main([str(tmp_path / "none.mp4"), "--model", str(folder)]) == 2 and "cannot be read" in capsys.readouterr().err


def test_the_shipped_twin_finds_cameras_and_depth():
    """On held-out rooms, from nine frames alone: rotations, direction of travel, depth up to scale."""
    import math
    from conftest import ROOT
    from tiny_world import random_scene, render
    da3 = load_depth_anything(ROOT / "tiny" / "depth_anything")
    angles, directions, depths = [], [], []
    for i, motion in enumerate(("pan_left", "orbit_right", "move_left", "push_in", "pull_right")):
        scene = random_scene("shipped", "static", i)
        scene.motions = [motion]
        clip = render(scene, depth=True)
        rec = da3(clip["video"], 9)
        found, true = (torch.linalg.inv(p[:1]) @ p for p in (rec.camera_to_world, clip["poses"][rec.frames]))
        cosine = ((found[:, :3, :3] * true[:, :3, :3]).sum((1, 2)) - 1) / 2
        angles.append(math.degrees(cosine.clamp(-1, 1).acos()[1:].median()))
        if true[-1, :3, 3].norm() > .1:
            directions.append(torch.nn.functional.cosine_similarity(found[-1, :3, 3], true[-1, :3, 3], dim=0).item())
        depth = clip["depth"][rec.frames]
        depths.append(((rec.depth * depth.median() / rec.depth.median() - depth).abs() / depth).mean().item())
    assert sorted(angles)[2] < 2 and min(directions) > math.cos(math.radians(15)) and sum(depths) / 5 < .10, (angles, directions, depths)
