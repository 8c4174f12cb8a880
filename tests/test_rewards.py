import argparse
import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from matplotlib.axes import Axes

from critics import digit_score, load_lpips, lpips_distance
from depth_anything import DA3Config, DepthAnything3
from noise_warp import MOTIONS, camera_path
from rewards import (TERMS, Clip, add_reward_options, draw_clip, load_rewards, main, meta_views, motion_magnitude,
                     native_intrinsics, paths_in_depths, preference_reward, recon_reward, rewards_of,
                     trajectory_reward, trajectory_term)
from sample import write_video
from tiny.judges import write_depth
from tiny.world import random_scene, render

STILL = torch.eye(4).repeat(17, 1, 1)


# ------------------------------------------------------------------------------------------------- trajectory

def scaled(path, s):
    out = path.clone()
    out[:, :3, 3] *= s
    return out


def moved(path):
    """The same path in other world axes."""
    world = camera_path(["orbit_left", "push_in"], 17)[11]
    return world @ path


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("scale", (.01, 1, 300))
def test_the_requested_path_scores_one_at_any_scale_in_any_axes(motion, scale):
    path = camera_path([motion], 17)
    found = scaled(moved(path), scale)
    assert trajectory_reward(path, found) == pytest.approx(1, abs=1e-6)
    assert trajectory_reward(path, found.float()) == pytest.approx(1, abs=1e-4)


OPPOSITE = dict(push_in="pull_out", move_left="move_right", orbit_left="orbit_right", pan_left="pan_right",
                pull_left="push_in")


@pytest.mark.parametrize("motion, other", OPPOSITE.items())
def test_wrong_paths_are_ordered(motion, other):
    path = camera_path([motion], 17)
    half = trajectory_reward(path, camera_path([motion], 17, .5))
    still = trajectory_reward(path, STILL)
    opposite = trajectory_reward(path, camera_path([other], 17))
    assert 0 < opposite < still < half <= 1


@pytest.mark.parametrize("motion, double, half, still, opposite", [
    ("push_in", 1, 1, .42, .17),
    ("pan_left", .42, .65, .42, .17),
    ("orbit_left", .21, .46, .07, .01)])
def test_values_in_the_docstring(motion, double, half, still, opposite):
    path = camera_path([motion], 17)

    def reward(found):
        return round(trajectory_reward(path, found), 2)

    assert reward(path) == 1
    assert reward(camera_path([motion], 17, 2.0)) == double
    assert reward(camera_path([motion], 17, .5)) == half
    assert reward(STILL) == still
    assert reward(camera_path([OPPOSITE[motion]], 17)) == opposite


def test_still_and_turning_targets_measure_travel_in_depths():
    pan, travel = camera_path(["pan_left"], 17), camera_path(["push_in"], 17)
    found = trajectory_reward(STILL, travel)
    assert found == pytest.approx(math.exp(-5 * travel[:, :3, 3].norm(dim=1).mean()), abs=1e-6)
    assert trajectory_reward(STILL, scaled(travel, 7), depth=7) == pytest.approx(found, abs=1e-6)
    both = pan.clone()
    both[:, :3, 3] = travel[:, :3, 3]
    assert trajectory_reward(pan, both) < trajectory_reward(pan, pan) == 1


def test_travel_is_measured_in_median_depths():
    """Of a reconstruction seven times as large: by the reward, and by what metrics compare."""
    travel = camera_path(["push_in"], 17)
    rec = SimpleNamespace(index=torch.arange(17), camera_to_world=scaled(travel, 7), depth=torch.full((17, 8, 8), 7.0))
    found = trajectory_term(SimpleNamespace(alpha=5.0, beta=5.0), Clip(torch.zeros(17, 3, 8, 8), "", STILL, rec))
    assert found == pytest.approx(trajectory_reward(STILL, travel), abs=1e-6)
    assert torch.allclose(paths_in_depths(travel, rec)[1], travel, atol=1e-9)


def test_noise_in_place_of_travel_is_no_better_than_standing_still():
    path, draw = camera_path(["move_left"], 17), torch.Generator().manual_seed(0)
    for _ in range(20):
        jitter = STILL.clone()
        jitter[1:, :3, 3] = 1e-4 * torch.randn(16, 3, generator=draw)
        assert trajectory_reward(path, jitter) < trajectory_reward(path, STILL) + .01


def test_alpha_weighs_travel_and_beta_turning():
    push, pan = camera_path(["push_in"], 17), camera_path(["pan_left"], 17)
    assert trajectory_reward(push, STILL, alpha=0.0) == trajectory_reward(pan, STILL, beta=0.0) == 1
    assert trajectory_reward(push, STILL, beta=0.0) < .5
    assert trajectory_reward(pan, STILL, alpha=0.0) < .5
    # and each option reaches its own
    clip = Clip(torch.zeros(17, 3, 8, 8), "", push)
    clip.reconstruction = SimpleNamespace(index=torch.arange(17), camera_to_world=STILL, depth=torch.ones(17, 8, 8))
    assert trajectory_term(SimpleNamespace(alpha=0.0, beta=9.0), clip) == 1
    assert trajectory_term(SimpleNamespace(alpha=9.0, beta=0.0), clip) < .5


def test_the_recovered_path_is_compared_at_its_own_frames():
    path, index = camera_path(["orbit_left"], 17), torch.tensor([0, 8, 16])
    clip = Clip(torch.zeros(17, 3, 8, 8), "", path)
    clip.reconstruction = SimpleNamespace(index=index, camera_to_world=path[index], depth=torch.ones(3, 8, 8))
    assert trajectory_term(SimpleNamespace(alpha=5.0, beta=5.0), clip) == pytest.approx(1)


def test_intrinsics_are_scaled_to_the_videos_width_and_height():
    K = torch.tensor([[40.0, 0, 25], [0, 40, 14], [0, 0, 1]]).repeat(2, 1, 1)  # of 50x28
    rec = SimpleNamespace(depth=torch.ones(2, 28, 50), intrinsics=K)
    assert torch.equal(native_intrinsics(rec, 56, 200)[1], torch.tensor([[160.0, 0, 100], [0, 80, 28], [0, 0, 1]]))


def test_paths_of_unequal_length_are_refused():
    path = camera_path(["move_left"], 17)
    with pytest.raises(ValueError, match="paths must both"):
        trajectory_reward(path, path[:5])


# --------------------------------------------------------------------------------------------------- together

def options(twins):
    return dict(depth_anything=twins / "depth_anything", critic=twins / "qwen3_vl",
                preference=twins / "hpsv3", views=5)


@pytest.fixture(scope="module")
def batch(twins):
    """Rewards, three clips with their prompts and paths, and their scores."""
    scenes = [random_scene("rewards", "static", i) for i in range(3)]
    videos = [render(scene)["video"] for scene in scenes]
    prompts = [scene.caption for scene in scenes]
    paths = [camera_path(scene.motions, 17) for scene in scenes]
    rewards = load_rewards(**options(twins))
    return rewards, videos, prompts, paths, rewards(videos, prompts, paths)


def test_each_term_looks_at_its_own_frames(batch):
    """S_recon at those that were reconstructed; S_meta from both sides; R_gen at the first ones alone."""
    rewards, (video, *_), (prompt, *_), (path, *_), _ = batch
    clip = rewards.score(video, prompt, path)
    index = clip.reconstruction.index
    assert index.tolist() == [0, 4, 8, 12, 16]
    assert clip.scores["recon"] == pytest.approx(1 - float(lpips_distance(rewards.lpips, clip.rerender, video[index])))
    assert clip.scores["meta"] == pytest.approx(float((digit_score(clip.digits[0]) + digit_score(clip.digits[1])) / 2))
    for frame, alike in ((rewards.frames_seen - 1, False), (rewards.frames_seen, True)):
        other = video.clone()
        other[frame] = 1 - other[frame]
        changed = preference_reward(rewards, Clip(other, prompt, path))
        assert (float(changed) == clip.scores["general"]) == alike


def test_all_terms_are_returned_and_sum(batch):
    rewards, *_, out = batch
    assert set(out) == {*TERMS, "three_d", "total"}
    for values in out.values():
        assert values.shape == (3,)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    assert torch.allclose(out["three_d"], out["meta"] + out["recon"] + out["traj"])
    assert torch.allclose(out["total"], out["three_d"] + out["general"])
    assert ((out["meta"] >= 0) & (out["meta"] <= 1)).all()
    assert ((out["traj"] > 0) & (out["traj"] <= 1)).all()
    assert not rewards.failures


def test_a_clip_keeps_what_its_judging_looked_at(batch):
    rewards, videos, prompts, paths, out = batch
    clip = rewards.score(videos[0], prompts[0], paths[0])
    assert all(torch.tensor(clip.scores[name]) == out[name][0] for name in TERMS)
    assert not clip.errors
    assert clip.rerender.shape == (5, 3, 64, 64)
    assert clip.meta_views.shape == (2, 3, 64, 64)
    assert clip.digits.shape == (2, 10)
    assert len(clip.reconstruction.index) == 5


def test_scores_do_not_depend_on_batch_or_order(batch):
    rewards, videos, prompts, paths, out = batch
    alone = rewards(videos[1:2], prompts[1:2], paths[1:2])
    turned = rewards(videos[::-1], prompts[::-1], paths[::-1])
    for name in out:
        assert alone[name][0] == out[name][1]
        assert torch.equal(turned[name].flip(0), out[name])


def test_a_failed_sample_is_masked_and_the_others_are_untouched(batch, twins):
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins))
    broken = videos[1].clone()
    broken[3, 0, 5, 5] = math.nan
    found = rewards([videos[0], broken, videos[2]], prompts, paths)
    for name in out:
        assert found[name][1].isnan()
        assert torch.equal(found[name][[0, 2]], out[name][[0, 2]])
    assert rewards.failures == dict.fromkeys(TERMS, 1)
    assert "NaN" in rewards.reasons["recon"]
    with pytest.raises(RuntimeError, match="every sample's reward failed"):
        rewards([broken, broken], prompts[:2], paths[:2])


def test_one_frame_shows_no_path_and_no_world_yet_is_a_picture(batch):
    rewards, videos, prompts, paths, _ = batch
    clip = rewards.score(videos[1][:1], prompts[1], paths[1])
    assert math.isfinite(clip.scores["general"])
    assert math.isnan(clip.scores["traj"])
    assert set(clip.errors) == {"meta", "recon", "traj"}
    assert clip.errors["traj"] == "ValueError: one frame shows no camera path"
    found = rewards([videos[0], videos[1][:1]], prompts[:2], paths[:2])
    assert found["general"].isfinite().all()
    assert found["traj"].isnan().tolist() == found["total"].isnan().tolist() == [False, True]


def test_a_path_of_the_wrong_length_masks_its_term_alone(batch, twins):
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins))
    found = rewards(videos[:2], prompts[:2], [paths[0], paths[1][:3]])
    assert found["traj"][1].isnan()
    assert found["recon"][1] == out["recon"][1]
    assert found["total"][1].isnan()
    assert rewards.failures == {"traj": 1}


def test_a_dynamic_phase_asks_for_the_preference_alone(batch, twins):
    """The models of the other terms are not even there."""
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins) | dict(depth_anything="/nowhere", critic="/nowhere"))
    found = rewards(videos, prompts, paths, dynamic=True)
    assert torch.equal(found["total"], out["general"])
    assert found["three_d"].isnan().all()
    assert not rewards.failures


def test_a_weight_of_zero_leaves_the_term_and_its_model_out(batch, twins):
    _, videos, prompts, paths, out = batch
    missing = dict(critic="/nowhere", preference="/nowhere")
    rewards = load_rewards(**options(twins) | missing, weights=dict(meta=0, general=0)).load()
    found = rewards(videos, prompts, paths)
    assert torch.allclose(found["total"], out["recon"] + out["traj"])
    assert found["meta"].isnan().all()


def test_unknown_terms_and_missing_models_are_named():
    with pytest.raises(ValueError, match="unknown reward term 'metta'"):
        load_rewards(weights=dict(metta=1))
    with pytest.raises(ValueError, match="no model folder"):
        load_rewards(depth_anything="/nowhere").load()


IN_A_NEW_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[2]))
from rewards import load_rewards
video, prompt, path = torch.load(sys.argv[3])
twins = sys.argv[4]
rewards = load_rewards(depth_anything=twins + "/depth_anything", critic=twins + "/qwen3_vl",
                       preference=twins + "/hpsv3", views=5)
print([values.item().hex() for values in rewards([video], [prompt], [path]).values()])
"""


def test_scores_are_the_same_in_a_new_process(batch, twins, tmp_path):
    _, videos, prompts, paths, out = batch
    clip = tmp_path / "clip.pt"
    torch.save((videos[0], prompts[0], paths[0]), clip)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, ROOT, torch.get_num_threads(), clip, twins]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == str([values[0].item().hex() for values in out.values()])


def test_meta_views_stand_beside_the_path_and_look_at_the_scene(batch):
    rewards, videos, *_ = batch
    rec = rewards.depth_anything(videos[0], 5)
    views, middle = meta_views(rec), rec.camera_to_world[2]
    offsets = (torch.linalg.inv(middle) @ views)[:, :3, 3]
    expected = rec.depth.median() * torch.tensor([[-.35, -.2, 0], [.35, -.2, 0]])
    assert torch.allclose(offsets, expected, atol=1e-5)
    target = torch.cat([rec.gaussians.means.median(0).values, torch.ones(1)])
    for view in views:
        x, y, z, _ = torch.linalg.inv(view) @ target
        assert max(abs(x), abs(y)) < 1e-5
        assert z > 0
        rotation = view[:3, :3]
        assert torch.allclose(rotation.T @ rotation, torch.eye(3), atol=1e-5)
        assert torch.det(rotation) > 0
        assert view[:3, 1] @ middle[:3, 1] > .7  # upright


@pytest.mark.parametrize("options, message", [
    (dict(views=1), "--views must be a number of at least 2, got 1"),
    (dict(frames_seen=0), "--frames-seen must be a number of at least 1"),
    (dict(alpha=-1.0), "--traj-alpha"), (dict(beta=math.nan), "--traj-beta"),
    (dict(weights=dict(meta=-1.0)), "--meta must be a number of at least 0"),
    (dict(weights=dict(recon=math.inf)), "--recon"),
    (dict(weights=dict.fromkeys(TERMS, 0.0)), "every reward has weight 0"),
    (dict(spread=0.0), "--general-spread must be a positive number, got 0.0"),
    (dict(center=math.nan), "--general-center must be a finite number")])
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(**options)


# ----------------------------------------------------------------------------------------- what a failure is

def failing(error, twins):
    """Rewards whose preference model raises an error."""
    def judge(frames, prompts):
        raise error

    rewards = load_rewards(**options(twins))
    rewards.preference = judge
    return rewards


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("no"), ZeroDivisionError("no"),
                                   torch.linalg.LinAlgError("no\nand more")])
def test_what_a_judge_can_do_wrong_is_masked_with_its_reason(error, batch, twins):
    _, videos, prompts, paths, _ = batch
    rewards = failing(error, twins)
    found = rewards.terms(videos, prompts, paths, dynamic=True)
    assert found["total"].isnan().all()
    assert rewards.failures == {"general": 3}
    assert rewards.reasons == {"general": f"{type(error).__name__}: no"}


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("no"), MemoryError("no"), TypeError("no"), AttributeError("no"), NameError("no"),
    KeyError("no"), IndexError("no"), NotImplementedError("no"), AssertionError("no"),
    torch.AcceleratorError("no"),
    # as CUDA's libraries say that they cannot go on
    RuntimeError("no. CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("no. CUDA driver error: out of memory"),
    RuntimeError("no. cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("no. cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling cusolverDnCreate(handle)"),
    RuntimeError("no. GET was unable to find an engine to execute this computation")])
def test_faults_of_the_program_and_full_memory_are_not_masked(error, batch, twins):
    _, videos, prompts, paths, _ = batch
    rewards = failing(error, twins)
    with pytest.raises(type(error), match="no"):
        rewards.terms(videos, prompts, paths, dynamic=True)
    assert not rewards.failures


def test_full_memory_of_the_cpu_is_not_masked(batch, twins):
    """Torch has no error of its own for it."""
    _, videos, prompts, paths, _ = batch
    rewards = load_rewards(**options(twins))
    rewards.preference = lambda frames, prompts: torch.empty(10 ** 15)
    with pytest.raises(RuntimeError, match="allocate memory"):
        rewards.terms(videos, prompts, paths, dynamic=True)


def test_a_missing_model_is_no_fault_of_the_video(batch):
    _, videos, prompts, paths, _ = batch
    rewards = load_rewards(preference="/nowhere")
    with pytest.raises(ValueError, match="no model folder '/nowhere'"):
        rewards.terms(videos, prompts, paths, dynamic=True)


def test_failures_and_reasons_are_those_of_the_latest_call(batch, twins):
    _, videos, prompts, paths, _ = batch
    rewards = load_rewards(**options(twins))
    broken = [video * math.nan for video in videos[:2]]
    with pytest.raises(RuntimeError, match="general: ValueError: frames have NaN"):
        rewards(broken, prompts[:2], paths[:2], dynamic=True)
    assert rewards.failures == {"general": 2}
    rewards.terms(broken[:1], prompts[:1], paths[:1], dynamic=True)
    assert rewards.failures == {"general": 1}
    rewards(videos, prompts, paths, dynamic=True)
    assert not rewards.failures and not rewards.reasons


def test_a_model_without_gaussians_serves_the_path_alone(batch, tmp_path):
    _, videos, prompts, paths, _ = batch
    config = DA3Config(24, 4, 2, out_layers=(0, 1, 2, 3), alt_start=1, features=8, out_channels=(8, 8, 8, 8),
                       patch_size=8, grid=4, process_res=64)
    write_depth(tmp_path / "small", DepthAnything3(config).eval(), torch.float32)
    rewards = dict(depth_anything=tmp_path / "small", views=3)
    with pytest.raises(ValueError, match="small' makes no Gaussians"):
        load_rewards(**rewards).load()
    clip = load_rewards(**rewards, weights=dict(meta=0, recon=0, general=0)).score(videos[0], "", paths[0])
    assert clip.reconstruction.gaussians is None
    assert 0 < clip.scores["traj"] <= 1


# --------------------------------------------------------------------------------------- one model at a time

def test_offload_has_one_model_on_the_device_at_a_time(batch, twins, monkeypatch):
    """Each is there only while it looks at all clips, and scores are the same bits. The device is called
    cpu:0 here, where the models wait cpu."""
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins), device="cpu:0", offload=True).load()
    modules = {rewards.depth_anything: "depth_anything", rewards.critic.model: "critic",
               rewards.preference.model: "preference", rewards.lpips: "lpips"}
    there, seen, moves = set(), [], []
    move = nn.Module.to

    def recorded(module, device, *more, **options):
        name = modules.get(module)
        if name:
            moves.append((name, str(device)))
            (there.add if str(device) == "cpu:0" else there.discard)(name)
        return move(module, device, *more, **options)

    monkeypatch.setattr(nn.Module, "to", recorded)
    for module, name in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append((name, set(there))))
    found = rewards(videos, prompts, paths)
    assert all(torch.equal(found[name], out[name]) for name in out)
    assert {name for name, _ in seen} == set(modules.values())
    assert all(others == {name} for name, others in seen)
    order = ("depth_anything", "critic", "lpips", "preference")
    assert moves == [(name, device) for name in order for device in ("cpu:0", "cpu")]  # once for all clips

    # what is found on the way waits on the CPU, and a fault brings the model back too
    clip = rewards.score(videos[0], prompts[0], paths[0])
    assert clip.reconstruction.gaussians.means.device == torch.device("cpu")

    def fault(*_):
        raise IndexError

    rewards.preference.model.register_forward_pre_hook(fault)
    with pytest.raises(IndexError):
        rewards(videos, prompts, paths, dynamic=True)
    assert moves[-1] == ("preference", "cpu")
    assert not there


def test_what_is_offloaded_is_not_copied_back(batch, twins, monkeypatch):
    """Frozen weights wait where they were, to the address; a reconstruction goes where a term looks at it alone."""
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins), device="cpu:0", offload=True).load()
    weights = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in rewards.critic.model.named_parameters()}
    with rewards.on_device({"critic"}):
        pass
    assert all(p.data_ptr() == place and torch.equal(p, before) for p, place, before in weights.values())

    moved, move = [], Clip.to
    monkeypatch.setattr(Clip, "to", lambda clip, device: moved.append(str(device)) or move(clip, device))
    found = rewards.terms(videos[:1], prompts[:1], paths[:1])
    assert moved == ["cpu:0", "cpu"] * 4  # to be made, and for S_meta, S_recon and S_traj
    assert torch.equal(found["total"], out["total"][:1])
    moved.clear()
    rewards.terms(videos[:1], prompts[:1], paths[:1], dynamic=True)
    assert moved == []


def test_models_are_loaded_where_they_wait(twins):
    """Straight to the CPU, not over the device: of a device without memory nothing would be left."""
    rewards = load_rewards(**options(twins), device="meta", offload=True).load()
    for module in (rewards.depth_anything, rewards.critic.model, rewards.preference.model, rewards.lpips):
        assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


# ------------------------------------------------------------------------------------------------- the motion

def test_motion_is_what_moves_by_itself():
    """A pan over a far picture hardly counts; a square in it that goes its own way does, and twice as fast more."""
    draw = torch.Generator().manual_seed(0)
    far = torch.rand(1, 3, 10, 24, generator=draw)
    far = F.interpolate(far, size=(80, 192), mode="bicubic").clamp(0, 1)[0]
    still = torch.stack([far[:, 8:72, 8 + 2 * f:72 + 2 * f] for f in range(6)])

    def with_square(speed):
        video = still.clone()
        for f in range(6):
            x = 6 + speed * f
            video[f, :, 20:44, x:x + 24] = far[:, :24, 150:174]
        return motion_magnitude(video)

    assert motion_magnitude(still[:1].expand(6, -1, -1, -1)) < .01
    assert motion_magnitude(still) < 1 < 2 < with_square(2) < with_square(4)


# ------------------------------------------------------------------------------------------------ the picture

@pytest.mark.parametrize("lost", [
    (), ("digits",), ("meta_views", "digits"), ("rerender",),
    ("reconstruction", "rerender", "meta_views", "digits")])
def test_a_clip_is_drawn_whatever_failed(lost, batch, tmp_path, monkeypatch):
    """And whatever the prompt: dollar signs are no formula."""
    rewards, videos, _, paths, _ = batch
    clip = copy.copy(rewards.score(videos[0], r"$\nothing$ costs 5", paths[0]))
    for name in lost:
        setattr(clip, name, None)
    clip.scores = dict.fromkeys(TERMS, math.nan)
    drawn = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, image: drawn.append(image) or imshow(axes, image))
    draw_clip(tmp_path / "clip.png", clip)
    assert (tmp_path / "clip.png").stat().st_size > 5000
    shown = [video for video in (clip.video, clip.rerender, clip.meta_views) if video is not None]
    assert len(drawn) == sum(min(6, len(video)) for video in shown) - (clip.reconstruction is not None)  # of 5 frames


# ------------------------------------------------------------------------------------------- the command line

def test_a_commands_judges_are_those_that_it_is_given():
    parser = argparse.ArgumentParser()
    add_reward_options(parser)
    given = "--depth-anything a --critic b --preference c --lpips alex --views 3 --frames-seen 2 --device cpu --offload"
    made = rewards_of(parser.parse_args(given.split()))  # loads nothing
    assert made.sources == dict(depth_anything="a", critic="b", preference="c", lpips="alex")
    assert (made.views, made.frames_seen) == (3, 2) and made.offload


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """An mp4 of a scene, and the scene's caption."""
    scene = random_scene("cli", "static", 0)
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(file, render(scene)["video"], 8)
    return file, scene.caption


def test_the_command_prints_the_terms_and_draws_them(clip_file, twins, capsys):
    file, caption = clip_file
    models = ["--depth-anything", str(twins / "depth_anything"), "--critic", str(twins / "qwen3_vl"),
              "--preference", str(twins / "hpsv3")]
    assert main([str(file), caption, *models]) == 0
    out = capsys.readouterr().out
    assert all(term in out for term in TERMS)
    assert "stand-in" in out
    assert file.with_suffix(".rewards.png").stat().st_size > 5000


def test_a_failed_term_gets_a_line_and_status_1(clip_file, twins, tmp_path, capsys):
    """One frame shows no path: the three terms of R_3D fail, the total is no number, the picture is drawn."""
    _, caption = clip_file
    file = tmp_path / "one.mp4"
    write_video(file, render(random_scene("cli", "static", 0))["video"][:1], 8)
    assert main([str(file), caption, "--out", str(tmp_path / "one.png")]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[0] for line in lines if "failed: ValueError: one frame shows no camera" in line]
    assert failed == ["meta", "recon", "traj"]
    assert any(line.split()[:2] == ["total", "nan"] for line in lines)
    assert (tmp_path / "one.png").exists()


def test_bad_arguments_get_one_sentence(clip_file, tmp_path, capsys):
    file, caption = clip_file
    for arguments, message in (([str(tmp_path / "none.mp4"), caption], "cannot be read"),
                               ([str(file), caption, "--critic", "/nowhere"], "no model folder"),
                               ([str(file), caption, "--views", "1"], "--views must be a number of at least"),
                               ([str(file), " "], "the prompt is empty"),
                               ([str(file), caption, "--out", str(tmp_path)], "--out must end in .png"),
                               ([str(file), caption, "--out", "/proc/x/y.png"], "cannot write"),
                               ([str(file), caption, "--device", "toaster"], "toaster")):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("rewards.py: ")
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit) as refused:
        main([str(file)])
    assert refused.value.code == 2
    assert "prompt" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------ what counts as a number

@pytest.mark.parametrize("part, value, message", [
    ("depth", math.nan, "depth holds NaN"), ("means", math.nan, "means holds NaN"),
    ("scales", math.inf, "scales holds NaN or infinite"), ("opacities", math.nan, "opacities holds NaN"),
    ("opacities", 0.0, "empty"), ("depth", 0.0, "empty")])
def test_a_failed_reconstruction_is_no_number(part, value, message, batch, twins):
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins))

    def broken(module, arguments, rec):
        owner = rec if part == "depth" else rec.gaussians
        getattr(owner, part).fill_(value)

    rewards.depth_anything.register_forward_hook(broken)
    clip = rewards.score(videos[0], prompts[0], paths[0])
    for name, term in TERMS.items():
        if term.three_d:
            assert math.isnan(clip.scores[name])
            assert message in clip.errors[name]
        else:
            assert torch.tensor(clip.scores[name]) == out[name][0]


def test_r_gen_asks_for_the_prompt_on_the_judges_own_scale():
    class Judge:
        center, spread = 4.0, 2.0

        def __call__(self, frames, prompts):
            self.asked = prompts
            return torch.full((len(frames),), 5.0)

    judges = SimpleNamespace(preference=Judge(), frames_seen=3, center=None, spread=None)
    found = float(preference_reward(judges, Clip(torch.rand(5, 3, 8, 8), "a lake", None)))
    assert found == pytest.approx(math.tanh(.5))
    assert judges.preference.asked == ["a lake"] * 3


def test_a_render_brighter_than_white_is_white(monkeypatch):
    monkeypatch.setattr(Clip, "render", lambda clip, cameras: torch.full((2, 3, 64, 64), 1.5))
    rec = SimpleNamespace(camera_to_world=None, index=torch.arange(2))
    judges = SimpleNamespace(lpips=load_lpips("random"), device="cpu")
    assert float(recon_reward(judges, Clip(torch.ones(2, 3, 64, 64), "", None, rec))) == pytest.approx(1)


def test_r_gen_lies_within_one_and_rises_with_the_score(batch, twins):
    """For any finite score; center and spread are the judge's own unless given."""
    _, videos, prompts, _, _ = batch

    class Judge:
        center, spread = 5.0, 5.0

        def __call__(self, frames, prompts):
            return torch.full((len(frames),), self.score)

    rewards = load_rewards(**options(twins))
    rewards.preference = judge = Judge()
    found = []
    for judge.score in (-1e30, -7.0, -.2, 5.0, 5.1, 10.6, 1e30):
        found.append(float(preference_reward(rewards, Clip(videos[0], prompts[0], None))))
    assert found == sorted(found)
    assert found[0] == -1 and found[-1] == 1 and found[3] == 0
    assert len(set(found)) == len(found)
    rewards.center, rewards.spread = 0.0, 1.0
    judge.score = .5
    given = float(preference_reward(rewards, Clip(videos[0], prompts[0], None)))
    assert given == pytest.approx(math.tanh(.5))
