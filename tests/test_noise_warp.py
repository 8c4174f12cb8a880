import math

import pytest
import torch

from noise_warp import FOV, MOTIONS, MOVE, ORBIT, PAN, PUSH, camera_path, parse_motion


@pytest.mark.parametrize("prompt, motions", [
    ("push_in a red sphere", ["push_in"]),
    ("Camera push in, then pan left.", ["push_in", "pan_left"]),
    ("move left, pull out, then pan left", ["move_left", "pull_out", "pan_left"]),
    ("Camera Orbit-Right transitioning into PUSH IN. A house.", ["orbit_right", "push_in"]),
    ("The camera pushes in and is panning right", ["push_in", "pan_right"]),
    ("pull_left a lighthouse", ["pull_left"]),
    ("Camera moving right.", ["move_right"]),
    ("Camera fixed. A clock.", ["fixed"]),
    ("a clock on a wall", ["fixed"]),
    ("he pushes into the inn", ["fixed"]),
])
def test_parse_motion(prompt, motions):
    assert parse_motion(prompt) == motions


def test_lookalike_motion_warns_with_the_list():
    with pytest.warns(UserWarning, match="zoom in.*push_in, pull_out"):
        assert parse_motion("Camera zoom in on a tower") == ["fixed"]


@pytest.mark.parametrize("motion", MOTIONS)
def test_paths_start_at_identity_and_are_rigid(motion):
    path = camera_path([motion], 17)
    assert torch.equal(path[0], torch.eye(4, dtype=path.dtype))
    R = path[:, :3, :3]
    assert torch.allclose(R @ R.transpose(1, 2), torch.eye(3, dtype=path.dtype).expand(17, 3, 3), atol=1e-12)
    assert torch.allclose(torch.linalg.det(R), torch.ones(17, dtype=path.dtype))


def screen_x(pose, point):
    """Where a world point appears, in half-widths right of the centre."""
    x, _, z, _ = torch.linalg.inv(pose) @ torch.tensor([*point, 1.0], dtype=pose.dtype)
    return float(x / z) / math.tan(FOV / 2)


@pytest.mark.parametrize("motion, x, z, yaw", [
    ("push_in", 0, PUSH, 0), ("pull_out", 0, -PUSH, 0), ("move_left", -MOVE, 0, 0), ("move_right", MOVE, 0, 0),
    ("pan_left", 0, 0, -PAN), ("pan_right", 0, 0, PAN), ("fixed", 0, 0, 0),
    ("orbit_left", -math.sin(ORBIT), 1 - math.cos(ORBIT), ORBIT), ("orbit_right", math.sin(ORBIT), 1 - math.cos(ORBIT), -ORBIT),
    ("pull_left", -MOVE / 2, -PUSH, -PAN / 2), ("pull_right", MOVE / 2, -PUSH, PAN / 2)])
def test_final_poses(motion, x, z, yaw):
    pose = camera_path([motion], 9)[-1]
    assert torch.allclose(pose[:3, 3], torch.tensor([x, 0, z], dtype=pose.dtype), atol=1e-12)
    assert math.atan2(pose[0, 2], pose[2, 2]) == pytest.approx(yaw)  # where the camera's z axis points


def test_the_scene_moves_against_the_camera():
    for motion in ("pan_left", "move_left", "pull_left"):
        assert screen_x(camera_path([motion], 9)[-1], (0, 0, 1)) > .1
    for motion in ("pan_right", "move_right", "pull_right"):
        assert screen_x(camera_path([motion], 9)[-1], (0, 0, 1)) < -.1
    for motion in ("orbit_left", "orbit_right"):  # the centre stays, what lies behind it drifts with the camera
        path = camera_path([motion], 9)
        assert all(abs(screen_x(pose, (0, 0, 1))) < 1e-9 for pose in path)
        assert math.copysign(1, screen_x(path[-1], (0, 0, 2))) == (-1 if motion == "orbit_left" else 1)


def test_composites_join_without_a_jump_in_position_or_velocity():
    path = camera_path(["push_in", "pan_left"], 401)
    steps = (path[1:] - path[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < .004  # 400 steps
    assert (steps[1:] - steps[:-1]).abs().max() < 1e-4
    assert path[200, 2, 3] == pytest.approx(PUSH / 2) and torch.allclose(path[200, :3, :3], torch.eye(3, dtype=path.dtype))


def test_strength_scales_and_unknown_motion_is_named():
    assert camera_path(["move_left"], 5, strength=2.0)[-1, 0, 3] == pytest.approx(-2 * MOVE)
    with pytest.raises(ValueError, match="'zoom_in'.*push_in"):
        camera_path(["zoom_in"], 5)
