import json
import math
import shutil

import pytest
import torch

from eval import changes, camera_errors, folder_videos, halfway, interval, main, mvcs, psnr, ssim, table
from noise_warp import camera_path
from sample import write_video
from tiny_world import intrinsics, random_scene, render


# ------------------------------------------------------------------------------------------------------------- pictures

def test_psnr_of_a_constant_offset():
    a = torch.full((3, 3, 20, 20), .5)
    assert psnr(a, a + .1) == pytest.approx(20, abs=1e-4) and psnr(a, a) == 100
    two = torch.stack([a[0] + .1, a[0] + .01])
    assert psnr(a[:2], two) == pytest.approx((20 + 40) / 2, abs=1e-3)  # per frame, then the mean


def test_ssim_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(0)
    a = torch.rand(4, 3, 24, 37, generator=g)
    b = (a + .2 * torch.randn(a.shape, generator=g)).clamp(0, 1)
    expected = [metrics.structural_similarity(x.double().numpy(), y.double().numpy(), gaussian_weights=True, use_sample_covariance=False, data_range=1, channel_axis=0)
                for x, y in zip(a, b)]
    assert ssim(a, b) == pytest.approx(sum(expected) / 4, abs=1e-6) and ssim(a, a) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(a[..., :10], b[..., :10])


# -------------------------------------------------------------------------------------------------------------- cameras

def transcribed(path, found):
    """The definition, frame by frame and in plain numbers."""
    rot = trans = cam = 0.0
    for f in range(len(path)):
        R, S, t, u = path[f, :3, :3], found[f, :3, :3], path[f, :3, 3], found[f, :3, 3]
        trace = sum(float(R[k, i] * S[k, i]) for i in range(3) for k in range(3))
        rot += math.acos(max(-1, min(1, (trace - 1) / 2)))
        trans += math.sqrt(sum(float(t[i] - u[i]) ** 2 for i in range(3)))
        cam += math.sqrt(sum(float(R[i, j] - S[i, j]) ** 2 for i in range(3) for j in range(3)) + sum(float(t[i] - u[i]) ** 2 for i in range(3)))
    return rot, trans, cam


def test_camera_errors_are_the_cited_definition():
    path, found = camera_path(["orbit_left", "push_in"], 17), camera_path(["pull_left"], 17)
    out = camera_errors(path, found)
    assert [out["rot_err"], out["trans_err"], out["cam_mc"]] == pytest.approx(transcribed(path, found), abs=1e-9)
    unit = [p.clone() for p in (path, found)]
    for p in unit:
        p[:, :3, 3] /= p[:, :3, 3].norm(dim=1).max()
    assert [out["trans_err_rel"], out["cam_mc_rel"]] == pytest.approx(transcribed(*unit)[1:], abs=1e-9)


def test_camera_errors_of_known_errors_and_their_invariances():
    path = camera_path(["push_in"], 17)
    assert all(v == pytest.approx(0, abs=1e-6) for v in camera_errors(path, path).values())
    turned = path.clone()
    angle = .1
    spin = torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]], dtype=path.dtype)
    turned[1:, :3, :3] = spin
    assert camera_errors(path, turned)["rot_err"] == pytest.approx(16 * angle, abs=1e-9)
    shifted = path.clone()
    shifted[1:, 0, 3] += .25
    assert camera_errors(path, shifted)["trans_err"] == pytest.approx(16 * .25, abs=1e-9)
    found, world = camera_path(["orbit_left"], 17), camera_path(["pull_right"], 9)[8]
    a, b = camera_errors(path, found), camera_errors(world @ path, camera_path(["orbit_right"], 5)[4] @ found)
    assert all(a[k] == pytest.approx(b[k], abs=1e-6) for k in a)
    grown = found.clone()
    grown[:, :3, 3] *= 7
    c = camera_errors(path, grown)
    assert c["trans_err_rel"] == pytest.approx(a["trans_err_rel"]) and c["cam_mc_rel"] == pytest.approx(a["cam_mc_rel"]) and c["trans_err"] > a["trans_err"]


def test_mvcs_of_true_geometry_shifted_depth_and_scale():
    clip = render(random_scene("mvcs", "static", 0), depth=True)
    K = intrinsics(64, 64).expand(17, 3, 3)
    true = mvcs(clip["depth"], clip["poses"], K)
    assert .97 < true <= 1
    plane = torch.full((5, 32, 32), 2.0)
    still = torch.eye(4).repeat(5, 1, 1)
    assert mvcs(plane, still, intrinsics(32, 32).expand(5, 3, 3)) == pytest.approx(1)
    steps = plane * torch.tensor([1, 1.1, 1, 1.1, 1]).view(5, 1, 1)  # median 2: every pair differs by .1 of it
    assert mvcs(steps, still, intrinsics(32, 32).expand(5, 3, 3)) == pytest.approx(math.exp(-.01), abs=1e-6)
    grown = clip["poses"].clone()
    grown[:, :3, 3] *= 9
    assert mvcs(clip["depth"] * 9, grown, K) == pytest.approx(true, abs=1e-6)
    assert mvcs(clip["depth"], torch.eye(4).repeat(17, 1, 1), K) < true


def test_halfway_cameras():
    path = camera_path(["pan_left"], 17)
    a = halfway(path[::2])
    angle = ((a[:, :3, :3] * path[1::2, :3, :3]).sum((1, 2)) - 1) / 2
    assert angle.clamp(-1, 1).acos().max() < math.radians(.3) and torch.allclose(a[:, :3, :3] @ a[:, :3, :3].mT, torch.eye(3, dtype=a.dtype).expand(8, 3, 3), atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- whole videos

def test_exact_geometry_scores_perfectly():
    """The renderer at the exact cameras in place of the reconstruction: PSNR at least 40 dB, camera errors 0."""
    for i in range(3):
        scene = random_scene("exact", "static", i)
        clip, path = render(scene), camera_path(scene.motions, 17)
        again = render(scene, poses=clip["poses"])["video"]
        assert psnr(again, clip["video"]) >= 40 and ssim(again, clip["video"]) > .999
        assert all(v == pytest.approx(0, abs=1e-4) for k, v in camera_errors(path, clip["poses"]).items() if k != "rot_err")
        assert camera_errors(path, clip["poses"])["rot_err"] < .02  # float32 poses: arccos near 1 is this coarse
        between = render(scene, poses=halfway(clip["poses"][::2].double()))["video"]
        assert psnr(between, clip["video"][1::2]) >= 30  # cameras halfway between their neighbours are nearly the true ones


@pytest.fixture(scope="module")
def scored(twins, tmp_path_factory):
    """A folder with good and bad videos, scored through the command line."""
    folder = tmp_path_factory.mktemp("videos")
    scenes = [random_scene("eval", "static", i) for i in range(3)]
    for i, s in enumerate(scenes):
        write_video(folder / f"{i}.mp4", render(s)["video"], 8)
    write_video(folder / "3.mp4", render(scenes[0], 9, 48, 80)["video"], 8)  # other size, other length
    (folder / "4.mp4").write_bytes(b"no video")
    write_video(folder / "5.mp4", render(scenes[0], 1)["video"], 8)
    write_video(folder / "6.mp4", render(scenes[0])["video"], 8)  # without a prompt
    (folder / "prompts.txt").write_text("\n".join([s.caption for s in scenes] + [scenes[0].caption] * 3) + "\n")
    out = folder / "out"
    where = ["--depth-anything", str(twins / "depth_anything"), "--critic", str(twins / "qwen3_vl"), "--preference", str(twins / "hpsv3")]
    code = main(["metrics", "--videos", str(folder), "--prompts", str(folder / "prompts.txt"), "--out", str(out), *where])
    return code, out, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], where


def test_bad_videos_are_rows_that_say_why(scored):
    code, out, rows, _ = scored
    assert code == 1 and len(rows) == 7
    errors = {r["video"]: r.get("error") for r in rows}
    assert errors["0"] is errors["1"] is errors["2"] is errors["3"] is None
    assert "cannot be read" in errors["4"] and "one frame" in errors["5"] and "no prompt" in errors["6"]
    about = json.loads((out / "summary.json").read_text())
    assert about["videos"] == 4 and about["failed"] == 3 and about["sizes"] == ["17x64x64", "9x48x80"]
    good = [r["psnr"] for r in rows if "psnr" in r]
    assert about["summary"]["psnr"][0] == pytest.approx(sum(good) / 4) and "not measured" in about["summary"]["vbench"]
    assert (out / "metrics.csv").read_text().count("\n") == 8
    assert {"psnr", "psnr_held_out", "ssim", "lpips", "mvcs", "rot_err", "trans_err_rel", "motion", "reward_traj"} <= set(rows[0]) and rows[0]["frames"] == 9


def test_table_holds_ours_and_the_papers(scored, tmp_path):
    _, out, _, _ = scored
    text = table(dict(base=out))
    assert "| base |" in text and "*paper: World-R1-Small* | *27.63*" in text and "random trunk (a stand-in)" in text and "not comparable" in text
    with pytest.raises(ValueError, match="holds no summary.json"):
        table(dict(x=tmp_path))


def test_runs_on_the_same_prompts_are_compared_video_by_video(scored, tmp_path):
    _, out, rows, _ = scored
    better = tmp_path / "better"
    shutil.copytree(out, better)
    good = [r for r in rows if "error" not in r]
    up = [.5, -.1, .2, .2]
    (better / "metrics.jsonl").write_text("".join(json.dumps(r | dict(psnr=r["psnr"] + d)) + "\n" for r, d in zip(good[::-1], up[::-1])))  # another order
    found = changes(out, better)
    assert found["psnr"][0] == pytest.approx(.2) and found["psnr"][1] <= .2 <= found["psnr"][2] and found["psnr"][3] == .75
    assert found["motion"][0] == 0 and found["motion"][3] == 0
    assert "**Change from base" in table(dict(base=out, rl=better)) and "+0.200" in table(dict(base=out, rl=better))
    about = json.loads((better / "summary.json").read_text())
    (better / "summary.json").write_text(json.dumps(about | dict(seed=1)))
    assert "Change from" not in table(dict(base=out, rl=better))  # other seeds are other videos


def test_a_model_is_sampled_and_scored(scored, checkpoint, tmp_path, capsys):
    *_, where = scored
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    (model / "sampling.json").write_text(json.dumps(dict(frames=5, height=32, width=32, steps=2, guidance=2.0, fps=8)))
    assert main(["metrics", "--model", str(model), "--prompts", "tiny", "--num", "2", "--out", str(out), "--views", "3", *where]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["size"] for r in rows] == ["5x32x32"] * 2 and all(math.isfinite(r[k]) for r in rows for k in ("psnr", "psnr_held_out", "three_d"))
    assert len(list((out / "videos").glob("*.mp4"))) == 2


def test_a_sweep_trains_scores_and_does_nothing_twice(checkpoint, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "sweep"
    shutil.copytree(checkpoint, model)
    (model / "sampling.json").write_text(json.dumps(dict(frames=5, height=32, width=32, steps=2, guidance=2.0, fps=8)))
    command = ["sweep", "--out", str(out), "--cells", "no_3d", "--num", "2", "--also", "9", "--model", str(model), "--prompts", "tiny", "--groups", "1",
               "--members", "2", "--steps", "2", "--high", "1", "--window", "1", "--rank", "2", "--total-steps", "1", "--eval-every", "0"]
    assert main(command) == 0
    text = (out / "table.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# Test prompts", "# Dynamic prompts", "# Test prompts, 9 frames"]
    sizes = {str(f.parent.relative_to(out)): (s["sizes"], s["videos"], s["lora"]) for f in sorted(out.glob("*/*/summary.json")) if (s := json.loads(f.read_text()))}
    trained = str(out / "no_3d")
    assert sizes == {"base/results": (["5x32x32"], 2, None), "base/dynamic": (["5x32x32"], 1, None), "base/9_frames": (["9x32x32"], 2, None),
                     "no_3d/results": (["5x32x32"], 2, trained), "no_3d/dynamic": (["5x32x32"], 1, trained)}
    step = json.loads((out / "no_3d" / "metrics.jsonl").read_text())
    assert step["traj"] is None and math.isfinite(step["general"])
    assert "| no_3d |" in text and "Change from base" in text
    written = {f: f.stat().st_mtime_ns for f in out.glob("*/*/metrics.jsonl")}
    assert main(command) == 0 and {f: f.stat().st_mtime_ns for f in out.glob("*/*/metrics.jsonl")} == written and (out / "table.md").read_text() == text


def test_prompts_are_matched_by_id_or_by_order(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "p.jsonl").write_text('{"id": "b", "prompt": "second"}\n{"id": "a", "prompt": "first"}\n')
    assert [(n, p) for n, _, p in folder_videos(tmp_path, tmp_path / "p.jsonl")] == [("a", "first"), ("b", "second")]
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert [p for _, _, p in folder_videos(tmp_path, tmp_path / "p.txt")] == ["one", "two"]
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n{}\n')
    with pytest.raises(ValueError, match="q.jsonl, line 2"):
        folder_videos(tmp_path, tmp_path / "q.jsonl")


def test_user_errors_are_one_sentence(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("x\n")
    for arguments, message in ((["metrics", "--videos", str(tmp_path)], "--videos needs --prompts"),
                               (["table", "--runs", f"a={tmp_path}"], "holds no summary.json"), (["sweep", "--cells", "no_such"], "unknown cell 'no_such'")):
        assert main(arguments) == 2 and message in capsys.readouterr().err


def test_interval_covers_the_mean():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist() + [math.nan]
    mean, low, high = interval(x)
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 / 20, rel=.15) and math.isnan(interval([math.nan])[0])
