import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import cv2
import imageio.v2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval as evaluation
import rewards
import splat
from depth_anything import Reconstruction
from eval import (BATCH, alarms, between, camera_errors, changes, epipolar_error, folder_videos, held_out, interval,
                  main, measure, measured_row, mvcs, new_folder, psnr, rerender, sampled_videos, ssim, table, vbench)
from lora import add_lora, lora_weights
from model import load_wan
from noise_warp import camera_path
from prompts import read_prompts
from rewards import TERMS
from runs import run_jobs
from sample import generator, sample_videos, sampling_of, write_video
from test_splat import scene as random_gaussians
from tiny.world import corrupt, intrinsics, random_scene, render
from weights import TINY

pytestmark = pytest.mark.usefixtures("loaded_once")


# ------------------------------------------------------------------------------------------------------------- pictures

def transcribed_ssim(a, b):
    """The definition of Wang et al. on videos (F, 3, H, W), with an 11 x 11 Gaussian window."""
    x = torch.arange(-5, 6, dtype=torch.float64)
    g = torch.exp(-x * x / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2).view(1, 1, 11, 11)

    def blur(v):
        return F.conv2d(v, window)

    a, b = a.double().flatten(0, 1)[:, None], b.double().flatten(0, 1)[:, None]
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = .01 ** 2, .03 ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return float((luminance * structure).mean())


def test_ssim_is_the_papers():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(4, 3, 24, 37, generator=g)
    b = (a + .2 * torch.randn(a.shape, generator=g)).clamp(0, 1)
    assert ssim(a, b) == pytest.approx(transcribed_ssim(a, b), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(a[..., :10], b[..., :10])


# -------------------------------------------------------------------------------------------------------------- cameras

def transcribed_errors(path, found):
    """RotErr, TransErr and CamMC by their definition, frame by frame and in plain numbers."""
    rotation = translation = camera = 0.0
    for E, G in zip(path.tolist(), found.tolist()):
        trace = sum(E[k][i] * G[k][i] for i in range(3) for k in range(3))
        rotation += math.acos(max(-1, min(1, (trace - 1) / 2)))
        apart = sum((E[i][3] - G[i][3]) ** 2 for i in range(3))
        turned = sum((E[i][j] - G[i][j]) ** 2 for i in range(3) for j in range(3))
        translation += math.sqrt(apart)
        camera += math.sqrt(turned + apart)
    return rotation, translation, camera


def test_camera_errors_are_the_cited_definition():
    path, found = camera_path(["orbit_left", "push_in"], 17), camera_path(["pull_left"], 17)
    errors = camera_errors(path, found)
    absolute = [errors[name] for name in ("rot_err", "trans_err", "cam_mc")]
    assert absolute == pytest.approx(transcribed_errors(path, found), abs=1e-9)

    # relative: each path divided by its own largest distance from frame 0
    unit = [path.clone(), found.clone()]
    for p in unit:
        p[:, :3, 3] /= p[:, :3, 3].norm(dim=1).max()
    relative = [errors["trans_err_rel"], errors["cam_mc_rel"]]
    assert relative == pytest.approx(transcribed_errors(*unit)[1:], abs=1e-9)


def test_camera_errors_of_known_errors():
    path = camera_path(["push_in"], 17)
    assert all(error == pytest.approx(0, abs=1e-6) for error in camera_errors(path, path).values())

    turned, angle = path.clone(), .1
    turned[1:, :3, :3] = torch.tensor([[math.cos(angle), 0, math.sin(angle)],
                                       [0, 1, 0],
                                       [-math.sin(angle), 0, math.cos(angle)]], dtype=path.dtype)
    assert camera_errors(path, turned)["rot_err"] == pytest.approx(16 * angle, abs=1e-9)

    shifted = path.clone()
    shifted[1:, 0, 3] += .25
    assert camera_errors(path, shifted)["trans_err"] == pytest.approx(16 * .25, abs=1e-9)


def test_camera_errors_and_the_choice_of_world_axes_and_scale():
    """Axes do not matter; the scale of the recovered path matters to the absolute errors alone."""
    path, found = camera_path(["push_in"], 17), camera_path(["orbit_left"], 17)
    errors = camera_errors(path, found)
    world, other_world = camera_path(["pull_right"], 9)[8], camera_path(["orbit_right"], 5)[4]
    assert camera_errors(world @ path, other_world @ found) == pytest.approx(errors, abs=1e-6)

    grown = found.clone()
    grown[:, :3, 3] *= 7
    larger = camera_errors(path, grown)
    assert larger["trans_err_rel"] == pytest.approx(errors["trans_err_rel"])
    assert larger["cam_mc_rel"] == pytest.approx(errors["cam_mc_rel"])
    assert larger["trans_err"] > errors["trans_err"]


@pytest.mark.parametrize("motion", ["fixed", "pan_left"])
def test_a_path_that_asks_for_no_travel_has_no_error_relative_to_it(motion):
    """A millionth of a step of noise would become a path of length 1."""
    path = camera_path([motion], 17)
    shaken = path.clone()
    shaken[1:, :3, 3] += 1e-6
    errors = camera_errors(path, shaken)
    assert 0 < errors["trans_err"] < 1e-3
    assert math.isnan(errors["trans_err_rel"]) and math.isnan(errors["cam_mc_rel"])


def test_mvcs_of_true_geometry_shifted_depth_and_scale():
    clip = render(random_scene("mvcs", "static", 0), depth=True)
    K = intrinsics(64, 64).expand(17, 3, 3)
    true = mvcs(clip["depth"], clip["poses"], K)
    assert .97 < true <= 1

    plane = torch.full((5, 32, 32), 2.0)
    still = torch.eye(4).repeat(5, 1, 1)
    plane_K = intrinsics(32, 32).expand(5, 3, 3)
    assert mvcs(plane, still, plane_K) == pytest.approx(1)
    steps = plane * torch.tensor([1, 1.1, 1, 1.1, 1]).view(5, 1, 1)  # neighbours differ by .1 of the median
    assert mvcs(steps, still, plane_K) == pytest.approx(math.exp(-.01), abs=1e-6)

    grown = clip["poses"].clone()
    grown[:, :3, 3] *= 9
    assert mvcs(clip["depth"] * 9, grown, K) == pytest.approx(true, abs=1e-6)
    assert mvcs(clip["depth"], torch.eye(4).repeat(17, 1, 1), K) < true


def test_halfway_cameras_are_rotations_near_the_true_ones():
    path = camera_path(["pan_left"], 17)
    R = between(path[::2], torch.full((len(path[::2]) - 1,), .5))[:, :3, :3]
    cosine = ((R * path[1::2, :3, :3]).sum((1, 2)) - 1) / 2
    assert cosine.clamp(-1, 1).acos().max() < math.radians(.3)
    assert torch.allclose(R @ R.mT, torch.eye(3, dtype=R.dtype).expand(8, 3, 3), atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- whole videos

def test_exact_geometry_scores_perfectly():
    """The renderer at the exact cameras in place of the reconstruction: PSNR at least 40 dB, camera errors 0
    (none relative to a path that stands still)."""
    for i in range(3):
        scene = random_scene("exact", "static", i)
        clip = render(scene)
        again = render(scene, poses=clip["poses"])["video"]
        assert psnr(again, clip["video"]) >= 40
        assert ssim(again, clip["video"]) > .999
        path = camera_path(scene.motions, 17)
        errors = camera_errors(path, clip["poses"])
        if not path[:, :3, 3].any():
            assert math.isnan(errors.pop("trans_err_rel")) and math.isnan(errors.pop("cam_mc_rel"))
        assert all(error == pytest.approx(0, abs=1e-4) for error in errors.values())
        # cameras halfway between their neighbours are nearly the true ones
        half = between(clip["poses"][::2].double(), torch.full((8,), .5))
        assert psnr(render(scene, poses=half)["video"], clip["video"][1::2]) >= 30


@pytest.mark.parametrize("index, middle", [([0, 2, 4], [1, 3]), ([0, 3, 8], [1, 5]), ([0, 1, 16], [8])])
def test_held_out_frames_and_their_cameras_belong_together(index, middle):
    """Also where the frame in the middle is none, and the one before it is taken; on a straight path."""
    path = camera_path(["push_in"], 17)
    path[:, 2, 3] = torch.arange(17)
    gaps, place, frames = held_out(torch.tensor(index))
    assert frames.tolist() == middle
    assert between(path[index], place)[gaps, 2, 3].tolist() == pytest.approx(middle)


def test_a_rerender_gives_back_what_was_filmed():
    """Of Gaussians, along a straight path: at the reconstructed frames, and at those midway between two."""
    path = torch.eye(4).repeat(6, 1, 1)
    path[:, 0, 3] = .1 * torch.arange(6)
    path[:, 2, 3] = -1
    K = torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]).repeat(6, 1, 1)
    gaussians, index = random_gaussians(300), torch.tensor([0, 2, 3, 5])
    video = splat.render(gaussians, path, K, 16, 24)[0].clamp(0, 1)
    K_of_half = K[index] * torch.tensor([.5, .5, 1])[:, None]  # the reconstruction is of 8x12 pixels
    rec = Reconstruction(torch.ones(4, 8, 12), None, path[index], K_of_half, gaussians, None, index)
    seen, unseen = rerender(rec, video)
    assert torch.equal(seen[1], video[index]) and torch.equal(unseen[1], video[[1, 4]])
    assert psnr(*seen) > 60 and psnr(*unseen) > 60
    assert psnr(rewards.Clip(video, "", path, rec).render(path[index]).clamp(0, 1), video[index]) > 60
    assert psnr(video[:-1], video[1:]) < 40  # neighbours are no match


def test_every_metric_is_of_its_own_pictures(monkeypatch):
    """Frames that the reconstruction has seen, and held-out ones; R_3D without R_gen; the camera by its path."""
    seen, unseen = [(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)) for _ in range(2)]
    monkeypatch.setattr(evaluation, "rerender", lambda *_: (seen, unseen))
    monkeypatch.setattr(evaluation, "lpips_distance", lambda _, a, b: float((a - b).abs().mean()))
    path, index = camera_path(["push_in"], 9), torch.tensor([0, 4, 8])
    rec = Reconstruction(torch.ones(3, 8, 8), None, path[index], intrinsics(8, 8).expand(3, 3, 3), None, None, index)
    scores = dict(meta=1.0, recon=.2, traj=4.0, general=8.0)
    row = measure(rewards.Clip(torch.rand(9, 3, 64, 64), "", path, rec, scores=scores),
                  SimpleNamespace(device="cpu", lpips=None))
    assert [row["psnr"], row["psnr_held_out"]] == [psnr(*seen), psnr(*unseen)]
    assert [row["ssim"], row["ssim_held_out"]] == [ssim(*seen), ssim(*unseen)]
    assert row["lpips_held_out"] == float((unseen[0] - unseen[1]).abs().mean())
    assert [row["lpips"], row["three_d"], row["trans_err"], row["rot_err"]] == pytest.approx([.8, 5.2, 0, 0], abs=1e-6)


def test_a_video_is_judged_by_the_path_of_its_prompt():
    given, video = [], torch.rand(9, 3, 16, 16)

    def score(*arguments):
        given.append(arguments)
        raise ValueError("that was all")

    row = measured_row("0", "orbit_left a room", lambda name: video, SimpleNamespace(score=score))
    assert row["error"] == "ValueError: that was all"
    (judged, prompt, path), = given
    assert judged is video and prompt == "orbit_left a room"
    assert torch.equal(path, camera_path(["orbit_left"], 9))


def read_rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def judges(twins):
    return ["--depth-anything", str(twins / "depth_anything"), "--critic", str(twins / "qwen3_vl"),
            "--preference", str(twins / "hpsv3")]


@pytest.fixture(scope="module")
def scored(judges, tmp_path_factory):
    """A folder with good and bad videos, scored through the command line -> exit status, results folder,
    rows."""
    folder = tmp_path_factory.mktemp("videos")
    scenes = [random_scene("eval", "static", i) for i in range(3)]
    for i, scene in enumerate(scenes):
        write_video(folder / f"{i}.mp4", render(scene)["video"], 8)
    write_video(folder / "3.mp4", render(scenes[0], 9, 48, 80)["video"], 8)  # other size, other length
    (folder / "4.mp4").write_bytes(b"no video")
    write_video(folder / "5.mp4", render(scenes[0], 1)["video"], 8)
    write_video(folder / "6.mp4", render(scenes[0])["video"], 8)  # without a prompt
    captions = [scene.caption for scene in scenes] + [scenes[0].caption] * 3
    rows = [dict(id=str(i), prompt=caption) for i, caption in enumerate(captions)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    prompts = str(folder / "prompts.jsonl")
    code = main(["metrics", "--videos", str(folder), "--prompts", prompts, "--out", str(out), *judges])
    return code, out, read_rows(out)


@pytest.mark.parametrize("kind", ["warp", "morph", "swap"])
def test_the_epipolar_error_rises_where_the_world_is_not_rigid(kind):
    scenes = [random_scene("epipolar", "static", i) for i in range(4)]
    errors = [[epipolar_error(corrupt(scene, kind, strength, i)) for i, scene in enumerate(scenes)]
              for strength in (0, .5, 1)]
    whole, half, broken = np.mean(errors, 1)
    assert whole < half
    assert whole < broken


def test_the_epipolar_error_needs_no_camera_and_repeats():
    video = render(random_scene("epipolar", "static", 1))["video"]
    error = epipolar_error(video)
    assert 0 < error < 8
    assert epipolar_error(video.clone()) == error
    assert epipolar_error(torch.rand(17, 3, 64, 64, generator=torch.Generator().manual_seed(0))) > 6
    assert math.isnan(epipolar_error(torch.zeros(17, 3, 64, 64)))  # nothing to track
    assert math.isnan(epipolar_error(video[:5]))  # one pair


def test_a_wide_video_is_looked_at_256_pixels_high(monkeypatch):
    flow, seen = cv2.calcOpticalFlowPyrLK, set()

    def noting(here, *rest, **options):
        seen.add(here.shape)
        return flow(here, *rest, **options)

    monkeypatch.setattr(cv2, "calcOpticalFlowPyrLK", noting)
    epipolar_error(render(random_scene("epipolar", "static", 1), 7, 32, 64)["video"])
    assert seen == {(256, 512)}


def test_a_total_that_rises_while_other_judges_fall_is_an_alarm():
    first = dict(step=0, total=3.0, epipolar=2.0, motion=1.0)

    def said(**changes):
        return alarms([first, first | dict(step=8, total=3.5) | changes])

    assert said() == said(epipolar=2.1, motion=.95) == said(epipolar=1.0, motion=2.0) == []
    assert said(total=2.9, epipolar=4.0) == []
    assert said(epipolar=None) == said(motion=None) == alarms([first]) == alarms([]) == []
    assert said(epipolar=2.5) == ["After 8 steps the total has risen from 3.000 to 3.500, but the epipolar error "
                                  "rose from 2.00 to 2.50: look at the videos."]
    assert "motion fell from 1.00 to 0.50" in said(motion=.5)[0]
    assert len(said(motion=.5, epipolar=3.0)) == 2


def test_bad_videos_are_rows_that_say_why(scored):
    code, _, rows = scored
    assert code == 1
    assert len(rows) == 7
    errors = {row["video"]: row.get("error") for row in rows}
    assert errors["0"] is errors["1"] is errors["2"] is errors["3"] is None
    assert "cannot be read" in errors["4"]
    assert "one frame" in errors["5"]
    assert "no prompt" in errors["6"]


def test_a_results_folder_holds_every_metric(scored):
    _, out, rows = scored
    names = {"psnr", "psnr_held_out", "ssim", "lpips", "mvcs", "rot_err", "cam_mc_rel", "motion", "three_d"}
    assert names | {f"reward_{term}" for term in TERMS} <= set(rows[0])
    assert rows[0]["views"] == 9

    about = json.loads((out / "summary.json").read_text())
    assert about["videos"] == 4
    assert about["failed"] == 3
    assert about["failed_terms"] == dict(meta=1, recon=1, traj=1)  # of the video of one frame
    assert about["sizes"] == ["17x64x64", "9x48x80"]
    good = [row["psnr"] for row in rows if "psnr" in row]
    assert about["summary"]["psnr"][0] == pytest.approx(sum(good) / 4)
    assert "not measured" in about["summary"]["vbench"]


def strict(text):
    """JSON as it is defined: without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def deaf(twins, tmp_path_factory):
    """A critic whose every answer is NaN: its last norm's weights are too large for float32."""
    folder = tmp_path_factory.mktemp("judges") / "qwen3_vl"
    shutil.copytree(twins / "qwen3_vl", folder)
    file, = folder.glob("*.safetensors")
    tensors = load_file(file)
    norm, = (name for name in tensors if name.endswith("language_model.norm.weight"))
    tensors[norm].fill_(3e38)
    save_file(tensors, file, metadata=dict(format="pt"))
    return folder


def test_full_memory_is_one_sentence(one_video, judges, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(rewards, "load_depth_anything", full)
    assert main([*one_video, *judges, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "eval.py: out of memory; ask for less at once, or use a larger card"


@pytest.fixture
def one_video(tmp_path):
    """The command that scores one good video."""
    scene = random_scene("eval", "static", 0)
    write_video(tmp_path / "videos" / "0.mp4", render(scene)["video"], 8)
    (tmp_path / "p.txt").write_text(scene.caption + "\n")
    return ["metrics", "--videos", str(tmp_path / "videos"), "--prompts", str(tmp_path / "p.txt")]


def test_a_term_that_fails_is_counted_and_never_a_number(one_video, judges, deaf, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*one_video, "--out", str(out), *judges, "--critic", str(deaf)]) == 1
    assert "1 videos (17x64x64), 0 failed, meta failed on 1;" in capsys.readouterr().out

    about = strict((out / "summary.json").read_text())
    assert about["failed"] == 0
    assert about["failed_terms"] == dict(meta=1)
    assert "psnr" in about["summary"]
    assert not {"reward_meta", "three_d"} & set(about["summary"])  # no video has them
    row = strict((out / "metrics.jsonl").read_text())
    assert row["reward_meta"] is row["three_d"] is None
    assert "the score is nan" in row["failed_terms"]["meta"]
    assert "0 failed, meta failed on 1" in table(dict(x=out, y=out))


@pytest.mark.parametrize("error", (
    TypeError("x"), AttributeError("x"), NameError("x"), MemoryError("x"), torch.OutOfMemoryError("x"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")))
def test_faults_of_the_program_or_the_machine_are_no_failed_video(error):
    def load(name):
        raise error

    with pytest.raises(type(error)) as raised:
        measured_row("0", "push_in a room", load, None)
    assert raised.value is error


@pytest.mark.parametrize("error", (ValueError, OSError, RuntimeError, ZeroDivisionError))
def test_faults_of_a_video_are_a_row(error):
    def load(name):
        raise error("the video's")

    row = measured_row("0", "push_in a room", load, None)
    assert row["error"] == f"{error.__name__}: the video's"


def test_a_results_folder_is_whole_and_never_replaced(one_video, judges, tmp_path, capsys):
    out = tmp_path / "out"
    command = [*one_video, "--out", str(out), *judges]

    # a call that is stopped leaves no folder, and the next one begins anew
    part = tmp_path / ".out.part"
    with pytest.raises(KeyboardInterrupt), new_folder(out) as folder:
        (folder / "metrics.jsonl").write_text("{}\n")
        # nobody else may begin meanwhile
        assert main(command) == 2
        assert "another process is making" in capsys.readouterr().err
        raise KeyboardInterrupt
    assert not out.exists()
    (part / "left over").mkdir()
    assert main(command) == 0
    assert not part.exists()
    assert sorted(file.name for file in out.iterdir()) == ["metrics.jsonl", "summary.json"]

    # what is there stays as it is, and is found before any model is loaded
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert main([*command, "--depth-anything", str(tmp_path)]) == 2
    assert "out is there already and is never replaced" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert main([*one_video, "--out", str(tmp_path / "empty"), *judges]) == 0


def test_table_holds_ours_and_the_papers(scored, tmp_path):
    _, out, _ = scored
    text = table(dict(base=out))
    assert "| base |" in text
    assert "*paper: World-R1-Small* | *27.63*" in text
    assert "*paper: Wan2.1-1.3B* | *62.43*" in text
    assert "random trunk (a stand-in)" in text
    assert "not comparable" in text
    with pytest.raises(ValueError, match="holds no summary.json"):
        table(dict(x=tmp_path))


# A stand-in for the vbench package, which is not installed: it measures nothing, and writes a results file as
# the real one's `evaluate` does: {dimension: [score, [{"video_path": ..., "video_results": ...}, ...]]}.
FAKE_VBENCH = """
import json
from pathlib import Path

SCORES = dict(aesthetic_quality=.6574, imaging_quality={imaging}, motion_smoothness=.9855,
              subject_consistency=.9758, background_consistency=.9667, dynamic_degree=.5)

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output_path = output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "custom_input"
        videos = [str(file) for file in Path(videos_path).iterdir() if file.suffix == ".mp4"]
        results = dict()
        for dimension in dimension_list:
            each = [dict(video_path=video, video_results=SCORES[dimension]) for video in videos]
            results[dimension] = SCORES[dimension], each
        file = Path(self.output_path) / (name + "_eval_results.json")
        file.write_text(json.dumps(results, indent=4))
"""


@pytest.mark.parametrize("imaging", (.6753, 67.53))  # by the package's version: of 1, of 100
def test_vbench_is_in_percent_with_the_papers_average(imaging, scored, tmp_path, monkeypatch):
    (tmp_path / "vbench.py").write_text(FAKE_VBENCH.replace("{imaging}", str(imaging)))
    (tmp_path / "0.mp4").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vbench", raising=False)
    scores = vbench(tmp_path, tmp_path)
    del sys.modules["vbench"]
    assert scores["AVG"] == pytest.approx(85.214)
    assert scores["dynamic_degree"] == 50  # which is no part of the average
    assert scores["imaging_quality"] == pytest.approx(67.53)

    run = tmp_path / "run"
    shutil.copytree(scored[1], run)
    about = json.loads((run / "summary.json").read_text())
    about["summary"]["vbench"] = scores
    (run / "summary.json").write_text(json.dumps(about))
    lines = table(dict(ours=run)).split("**VBench (%)**")[1].splitlines()
    assert lines[2].endswith("| background_consistency | AVG | dynamic_degree |")
    lines = [line.replace("*", "") for line in lines]
    assert "| ours | 65.74 | 67.53 | 98.55 | 97.58 | 96.67 | 85.21 | 50.00 |" in lines
    assert "| paper: Wan2.1-1.3B | 62.43 | 66.51 | 97.44 | 96.34 | 97.29 | 84.0 |  |" in lines
    assert "| paper: World-R1-Small | 65.74 | 67.53 | 98.55 | 97.58 | 96.67 | 85.21 |  |" in lines


def test_a_failing_vbench_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "vbench.py").write_text("class VBench:\n    def __init__(self, *a):\n        raise OSError('no net')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vbench", raising=False)
    assert vbench(tmp_path, tmp_path) == "not measured: OSError: no net"
    del sys.modules["vbench"]


def test_runs_on_the_same_prompts_are_compared_video_by_video(scored, tmp_path):
    _, out, rows = scored
    better = tmp_path / "better"
    shutil.copytree(out, better)
    good = [row for row in rows if "error" not in row]
    raised = [row | dict(psnr=row["psnr"] + change) for row, change in zip(good, (.5, -.1, .2, .2))]
    raised.reverse()  # another order
    (better / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raised))

    found = changes(out, better)
    mean, low, high, rose, count = found["psnr"]
    assert mean == pytest.approx(.2)
    assert low <= .2 <= high
    assert (rose, count) == (.75, 4)
    assert found["motion"] == (0, 0, 0, 0, 4)
    text = table(dict(base=out, rl=better))
    assert "**Change from base" in text
    assert "+0.200" in text


def test_figures_that_are_no_pairs_are_not_compared(scored, tmp_path):
    """Other views, another judge, another seed; and a label is one cell of the table."""
    for name, entry, value, word in (("views", "settings", dict(views=3), "views 3 instead of 9"),
                                     ("critic", "settings", dict(critic="x"), "critic x instead of"),
                                     ("seed", "seed", 7, "seed 7 instead of None")):
        other = tmp_path / name
        shutil.copytree(scored[1], other)
        about = json.loads((other / "summary.json").read_text())
        about[entry] = value if entry == "seed" else about[entry] | value
        (other / "summary.json").write_text(json.dumps(about))
        text = table({"a|b": scored[1], "other": other})
        assert "Not compared with a|b: other, made with " + word in text
        assert "Change from" not in text
        assert "| a\\|b | " in text
    assert "Change from" in table(dict(base=scored[1], same=scored[1]))
    other = tmp_path / "others_prompts"
    shutil.copytree(scored[1], other)
    rows = [row | dict(prompt="another") for row in scored[2]]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = table(dict(base=scored[1], other=other))
    assert "Not compared with base: other, which shares no scored video" in text


def test_a_model_is_sampled_and_scored(judges, checkpoint, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    sampling = dict(frames=5, height=32, width=32, steps=2, guidance=2.0, fps=8)
    (model / "sampling.json").write_text(json.dumps(sampling))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(prompt=f"push_in {split} room {i}", split=split)) + "\n"
                                              for split in ("train", "test") for i in range(12)))
    command = ["metrics", "--model", str(model), "--prompts", str(tmp_path / "p.jsonl"), "--views", "3", *judges]
    command += ["--device", "cpu"]
    eleven = [*command, "--num", "11", "--out"]
    assert run_jobs([dict(main="eval", args=[*eleven, str(out)])])[0] == [[0]]
    rows = read_rows(out)
    assert [row["size"] for row in rows] == ["5x32x32"] * 11
    assert all(math.isfinite(row[name]) for row in rows for name in ("psnr", "psnr_held_out", "three_d"))
    assert len(list((out / "videos").glob("*.mp4"))) == 11

    # two processes share the same videos by batches: the first has ten of them
    together = tmp_path / "together"
    jobs = [dict(main="eval", world=2, args=[*eleven, str(folder)]) for folder in (together, out)]
    codes, said = run_jobs(jobs)
    assert codes == [[0, 0], [2, 2]]
    assert said.count("is there already and is never replaced") == 1  # by the first process alone
    assert read_rows(together) == rows
    for name in ("summary.json", "videos/0010.mp4"):
        assert (together / name).read_bytes() == (out / name).read_bytes()

    # at another size than the model's own, the judges one at a time
    assert main([*command, "--num", "1", "--width", "48", "--offload", "--out", str(tmp_path / "wide")]) == 0
    row, = read_rows(tmp_path / "wide")
    assert row["size"] == "5x32x48"
    assert all(math.isfinite(row[name]) for name in ("psnr", "psnr_held_out", "three_d"))


def test_the_tiny_model_is_sampled_for_its_own_prompts(judges, tmp_path):
    out = tmp_path / "out"
    assert main(["metrics", "--num", "1", "--frames", "5", "--out", str(out), *judges]) == 0
    row, = read_rows(out)
    assert row["prompt"] == read_prompts(TINY / "prompts.jsonl")["test"][0]
    assert [file.name for file in (out / "videos").iterdir()] == ["0000.mp4"]


@torch.no_grad()
def test_videos_are_sampled_as_they_were_asked_for(checkpoint, tmp_path):
    """By adapter, seed and kind of noise; and prompt k from the seed's k-th noise, whichever batch it is in."""
    rows = [dict(prompt=f"push_in room {k}", split="test") for k in range(BATCH + 1)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, adapted, sampling = load_wan(checkpoint), load_wan(checkpoint), sampling_of(checkpoint)
    for name, p in add_lora(adapted.dit, 2, 2.0, generator("lora")).items():
        p.normal_(std=.3, generator=generator(name))
    save_file(lora_weights(adapted.dit), tmp_path / "lora.safetensors")

    last, seen = f"{BATCH:04d}", []  # alone in the second batch
    for wan, given in ((plain, {}), (plain, dict(seed=4)), (plain, dict(transport=False)),
                       (adapted, dict(lora=tmp_path))):
        a = dict(prompts=tmp_path / "p.jsonl", model=str(checkpoint), split="test", num=BATCH + 1, frames=None,
                 height=None, width=None, device="cpu", lora=None, seed=3, transport=True) | given
        prompts, load, _ = sampled_videos(SimpleNamespace(**a), tmp_path / "videos")
        assert prompts[last] == rows[BATCH]["prompt"]
        (expected,), _ = sample_videos(wan, [prompts[last]], sampling, a["seed"], noise_ids=[BATCH],
                                       transport=a["transport"])
        seen.append(load(last))
        assert torch.allclose(seen[-1], expected, atol=1e-3)
    assert torch.pdist(torch.stack(seen).flatten(1)).min() > 1e-2


def test_large_videos_are_sampled_one_by_one(checkpoint, tmp_path):
    rows = [dict(prompt=f"push_in {k} hills", split="test") for k in range(2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a = SimpleNamespace(prompts=tmp_path / "p.jsonl", model=str(checkpoint), split="test", num=2, frames=5, height=448,
                        width=448, device="cpu", lora=None, seed=0, transport=True)
    for width, sampled in ((448, ["0000.mp4"]), (32, ["0000.mp4", "0001.mp4"])):
        a.width = width
        _, load, _ = sampled_videos(a, tmp_path / str(width))
        load("0000")
        assert sorted(file.name for file in (tmp_path / str(width)).iterdir()) == sampled


def test_prompts_are_matched_by_id_or_by_order(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "p.jsonl").write_text('{"id": "b", "prompt": "second"}\n{"id": "a.mp4", "prompt": "first"}\n')
    prompts, _ = folder_videos(tmp_path, tmp_path / "p.jsonl")
    assert prompts == {"a": "first", "b": "second"}
    (tmp_path / "p.jsonl").write_text('{"id": "b", "prompt": "second"}\n')
    prompts, _ = folder_videos(tmp_path, tmp_path / "p.jsonl")
    assert prompts == {"a": None, "b": "second"}
    (tmp_path / "p.jsonl").write_text('{"id": "c", "prompt": "another\'s"}\n{"prompt": "nobody\'s"}\n')
    with pytest.raises(ValueError, match="no id in .*p.jsonl is the name of a video in .*; name the videos by"):
        folder_videos(tmp_path, tmp_path / "p.jsonl")
    (tmp_path / "None.mp4").write_bytes(b"")  # a name, not a row without an id
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n{"prompt": "z"}\n')
    prompts, _ = folder_videos(tmp_path, tmp_path / "p.jsonl")
    assert prompts == {"None": "x", "a": "y", "b": "z"}
    (tmp_path / "None.mp4").unlink()
    (tmp_path / "p.txt").write_text("one\n")
    with pytest.raises(ValueError, match="has 1 prompts and .* 2 videos, so which is whose is not known; give"):
        folder_videos(tmp_path, tmp_path / "p.txt")
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n{}\n')
    with pytest.raises(ValueError, match="q.jsonl, line 2"):
        folder_videos(tmp_path, tmp_path / "q.jsonl")


def test_numbered_videos_are_in_order_of_number(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.mp4").touch()
    (tmp_path / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(12)))
    prompts, _ = folder_videos(tmp_path, tmp_path / "p.txt")
    assert prompts == {str(number): f"prompt {number}" for number in range(12)}


def test_hidden_files_are_no_videos(tmp_path):
    """What a killed call left, and a Mac's: else each video would be scored against its neighbour's prompt."""
    for name in ("0000", ".0000.part-deadbeef", "._0000", "0001"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert folder_videos(tmp_path, tmp_path / "p.txt")[0] == {"0000": "one", "0001": "two"}


def test_a_name_that_no_results_file_could_hold_is_refused_before_any_scoring(one_video, judges, tmp_path, capsys):
    os.link(tmp_path / "videos" / "0.mp4", os.fsencode(tmp_path / "videos" / "1") + b"\xff.mp4")
    assert main([*one_video, "--out", str(tmp_path / "out"), *judges]) == 2
    assert r"1\udcff.mp4' is not UTF-8; give another name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.part").exists()


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(OSError, match="cannot write '.*out' .No space left on device.; free some space, or choose"):
        with new_folder(tmp_path / "out"):
            with open("/dev/full", "w") as log:
                print("{}", file=log, flush=True)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line(one_video, judges, tmp_path, monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(imageio.v2, "get_reader", pressed)
    assert main([*one_video, "--out", str(tmp_path / "out"), *judges]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("eval.py: interrupted")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, message", (
    (dict(videos="4"), "summary.json, entry videos: Expected int, got str"),
    (dict(seed="x"), "summary.json, entry seed"),
    (dict(summary=dict(psnr=[1, 2])), "summary.json, entry summary"),
    (dict(summary=dict(psnr="1")), "summary.json: psnr is not what eval.py writes"),
    (dict(summary=dict(vbench=[1, 2, 3])), "summary.json: vbench is not what eval.py writes"),
    ([], "summary.json: Expected object, got array"),
))
def test_damaged_results_are_one_sentence(damage, message, scored, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(scored[1], run)
    about = damage or []
    if damage:
        about = json.loads((run / "summary.json").read_text()) | damage
    (run / "summary.json").write_text(json.dumps(about))
    assert main(["table", "--runs", f"x={run}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("line", ("{", "[]", '{"video": 1}', '{"psnr": "high"}', '{"psnr": NaN}'))
def test_a_damaged_row_is_named(line, scored, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(scored[1], run)
    with open(run / "metrics.jsonl", "a") as file:
        print(line, file=file)
    assert main(["table", "--runs", f"x={scored[1]}", f"y={run}"]) == 2
    error = capsys.readouterr().err
    assert "run/metrics.jsonl, line 8" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments, message", (
    (["metrics", "--num", "0"], "--num must be at least 1, got 0"),
    (["metrics", "--num", "-1"], "--num must be at least 1, got -1"),
    (["metrics", "--views", "1"], "--views must be"),
    (["metrics", "--views", "0"], "--views must be"),
    (["metrics", "--frames", "1"], "--frames must be at least 5"),
    (["metrics", "--device", "abacus"], "abacus"),
    (["metrics", "--out", "{tmp}/p.txt"], "p.txt is there already"),
    (["metrics", "--out", "{tmp}/p.txt/out"], "cannot write"),
    (["metrics", "--videos", "{tmp}"], "--videos needs --prompts"),
    *((["metrics", "--videos", "{tmp}", "--prompts", "{tmp}/p.txt", *option.split()],
       f"{option.split()[0]} changes how videos are sampled")
      for option in ("--lora x", "--num 3", "--seed 1", "--frames 9", "--no-transport", "--split train")),
    (["metrics", "--videos", "{tmp}", "--prompts", "{tmp}/p.txt"], "holds no mp4"),
    (["metrics", "--prompts", "{tmp}/p.txt", "--split", "dynamic"], "holds no dynamic prompt"),
    (["metrics", "--frames", "6"], "--frames must be 4k+1"),
    (["metrics", "--model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], "--depth-anything is a tiny twin"),
    (["metrics", "--model", "Wan-AI/Wan2.1-T2V-14B", "--depth-anything", "x"], "--critic is a tiny twin"),
    (["table", "--runs", "a={tmp}"], "holds no summary.json"),
    (["table", "--runs", "{tmp}"], "--runs takes LABEL=FOLDER"),
))
def test_user_errors_are_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("x\n")
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["p.txt"]


def test_interval_covers_the_mean():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    mean, low, high = interval([*x, math.nan, None])
    assert mean == pytest.approx(np.mean(x))
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=.15)
    assert interval([*x, math.nan]) == (mean, low, high)  # the same every time
    assert interval([3.0]) == (3.0, 3.0, 3.0)
    assert all(math.isnan(value) for value in interval([math.nan]))
