import json
import math
import re
import time
import warnings

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from noise_warp import (FOV, MOTIONS, MOVE, ORBIT, PAN, PUSH, camera_path, draw_paths, latent_noise, main,
                        parse_motion, path_flow, relative_to_first, released_push, rotation_angle,
                        transport_noise)


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
    ("Camera push\u2011in, then pan\u2010left.", ["push_in", "pan_left"]),  # a hyphen that breaks no line
    ("\uff50\uff55\uff53\uff48\u3000\uff49\uff4e", ["push_in"]),  # full-width letters and space
])
def test_parse_motion(prompt, motions):
    assert parse_motion(prompt) == motions


def test_lookalike_motion_warns_with_the_list():
    with pytest.warns(UserWarning, match="zoom in.*push_in, pull_out"):
        assert parse_motion("Camera zoom in on a tower") == ["fixed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in ("Camera push in. Crocuses push up through snow; the slats tilt down.",
                       "Camera push in, then pull left into pan right.", "a panda before window panes in a movie"):
            parse_motion(prompt)


@pytest.mark.parametrize("words", [
    "pans to the left", "moves slowly left", "orbits around to the right", "pushes forward", "pulls back",
    "pushed in", "dollies in", "panning up", "tilting upward", "rotates left", "zooming out"])
def test_what_sounds_like_a_motion_is_not_silently_a_camera_that_stands(words):
    with pytest.warns(UserWarning, match=f"'{words}' is not a camera motion here"):
        assert parse_motion(f"The camera {words}. A tower") == ["fixed"]


def test_a_motion_whose_sentence_does_not_name_the_camera_warns_where_another_does():
    with pytest.warns(UserWarning, match="'move left' is taken for a camera motion, though"):
        assert parse_motion("Dancers move left on a stage. Camera push in.") == ["move_left", "push_in"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_motion("move left. a red box.") == ["move_left"]


@pytest.mark.parametrize("file", ["prompts.jsonl", "tiny/prompts.jsonl"])
def test_shipped_prompts_keep_their_motions_without_a_warning(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            spelt = re.findall("|".join(MOTIONS), row["prompt"].lower().replace(" ", "_"))  # tiny/'s are plain
            assert parse_motion(row["prompt"]) == row.get("camera", spelt or ["fixed"])


def test_a_long_prompt_is_parsed_in_a_moment():
    for words in ("ly_", "slowly ", "push ", "to_the_"):
        prompt = "camera move " + words * 250
        started = time.perf_counter()
        parse_motion(prompt)
        assert time.perf_counter() - started < 1


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
    ("push_in", 0, PUSH, 0),
    ("pull_out", 0, -PUSH, 0),
    ("move_left", -MOVE, 0, 0),
    ("move_right", MOVE, 0, 0),
    ("pan_left", 0, 0, -PAN),
    ("pan_right", 0, 0, PAN),
    ("fixed", 0, 0, 0),
    ("orbit_left", -math.sin(ORBIT), 1 - math.cos(ORBIT), ORBIT),
    ("orbit_right", math.sin(ORBIT), 1 - math.cos(ORBIT), -ORBIT),
    ("pull_left", -MOVE / 2, -PUSH, -PAN / 2),
    ("pull_right", MOVE / 2, -PUSH, PAN / 2)])
def test_final_poses(motion, x, z, yaw):
    pose = camera_path([motion], 9)[-1]
    assert torch.allclose(pose[:3, 3], torch.tensor([x, 0, z], dtype=pose.dtype), atol=1e-12)
    assert math.atan2(pose[0, 2], pose[2, 2]) == pytest.approx(yaw)  # where the camera's z axis points


def test_the_scene_moves_against_the_camera():
    for motion in ("pan_left", "move_left", "pull_left"):
        assert screen_x(camera_path([motion], 9)[-1], (0, 0, 1)) > .1
    for motion in ("pan_right", "move_right", "pull_right"):
        assert screen_x(camera_path([motion], 9)[-1], (0, 0, 1)) < -.1
    for motion, side in (("orbit_left", -1), ("orbit_right", 1)):
        # the centre stays, what lies behind it drifts with the camera
        path = camera_path([motion], 9)
        assert all(abs(screen_x(pose, (0, 0, 1))) < 1e-9 for pose in path)
        assert math.copysign(1, screen_x(path[-1], (0, 0, 2))) == side


def test_a_second_motion_starts_in_the_frame_of_the_first():
    """Half a pan to the left, then half a push along the turned view."""
    pose, half = camera_path(["pan_left", "push_in"], 5)[-1], PAN / 2
    assert pose[:3, 3].tolist() == pytest.approx([-PUSH / 2 * math.sin(half), 0, PUSH / 2 * math.cos(half)])


def test_composites_join_without_a_jump_in_position_or_velocity():
    path = camera_path(["push_in", "pan_left"], 401)
    steps = (path[1:] - path[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < .004  # 400 steps
    assert (steps[1:] - steps[:-1]).abs().max() < 1e-4
    assert path[200, 2, 3] == pytest.approx(PUSH / 2)
    assert torch.allclose(path[200, :3, :3], torch.eye(3, dtype=path.dtype))


def test_strength_scales_and_unknown_motion_is_named():
    assert camera_path(["move_left"], 5, strength=2.0)[-1, 0, 3] == pytest.approx(-2 * MOVE)
    with pytest.raises(ValueError, match="'zoom_in'.*push_in"):
        camera_path(["zoom_in"], 5)


def test_relative_to_first_undoes_the_choice_of_world_axes():
    path = camera_path(["orbit_left", "push_in"], 9)
    world = camera_path(["pull_right"], 5)[-1]
    assert torch.allclose(relative_to_first(world @ path), path, atol=1e-12)
    assert relative_to_first(path.float()).dtype == torch.float64


def test_rotation_angle_from_tiny_to_half_a_turn():
    angles = torch.tensor([0, 1e-9, 1e-4, .5, 2, math.pi], dtype=torch.float64)
    turned = torch.eye(3, dtype=torch.float64).repeat(6, 1, 1)
    turned[:, 0, 0] = turned[:, 2, 2] = angles.cos()
    turned[:, 0, 2] = angles.sin()
    turned[:, 2, 0] = -angles.sin()
    assert torch.allclose(rotation_angle(turned, torch.eye(3)), angles, rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- flow

def test_flow_is_exact_for_every_pixel():
    """One by one: each pixel's ray meets the plane z = depth; the point is projected into the next camera."""
    path = camera_path(["orbit_left", "pull_right"], 5)
    H, W, depth = 6, 10, 1.3
    focal = W / 2 / math.tan(FOV / 2)
    flow = path_flow(path, H, W, depth)
    for f in range(4):
        for row in range(H):
            for column in range(W):
                ray = [(column + .5 - W / 2) / focal, (row + .5 - H / 2) / focal, 1.0]
                ray = torch.tensor(ray, dtype=path.dtype)
                direction = path[f, :3, :3] @ ray
                point = path[f, :3, 3] + direction * (depth - path[f, 2, 3]) / direction[2]
                x, y, z = torch.linalg.inv(path[f + 1, :3, :3]) @ (point - path[f + 1, :3, 3])
                expected = [x / z * focal + W / 2 - column - .5, y / z * focal + H / 2 - row - .5]
                expected = torch.stack(expected)
                assert torch.allclose(flow[f, :, row, column].double(), expected, atol=1e-5)


def test_flow_directions_and_pixels_that_cannot_be_followed():
    for motion, sign in (("pan_left", 1), ("move_left", 1), ("pan_right", -1), ("move_right", -1)):
        assert (path_flow(camera_path([motion], 5), 8, 8)[:, 0] * sign > 0).all()
    grow = path_flow(camera_path(["push_in"], 5), 8, 8)
    assert (grow[:, 0, :, 4:] > 0).all()
    assert (grow[:, 0, :, :4] < 0).all()
    assert (grow[:, 1, 4:] > 0).all()
    assert path_flow(camera_path(["fixed"], 5), 8, 8).abs().max() == 0
    through = path_flow(camera_path(["push_in"], 3, strength=5.0), 8, 8)  # through the plane
    assert through.isfinite().all()
    assert (through[-1].abs() > 8).all()
    assert path_flow(camera_path(["push_in"], 1), 8, 8).shape == (0, 2, 8, 8)


# -------------------------------------------------------------------------------------------------- transport

def go_with_the_flow(flow, channels, generator):
    """Oracle: the published discrete transport, cell by cell. -> (channels, F, H, W)

    Every source cell lands in the nearest target; targets nothing lands in copy the cell their negated flow
    points to. A cell copied n times becomes value/sqrt(n) + zero-sum noise and gives each copy 1/n of its
    weight; values that meet are added with their weights over the root of the weights' squared sum.
    """
    H, W = flow.shape[2:]

    def fresh():
        return torch.randn(channels, generator=generator)

    value = {(y, x): fresh() for y in range(H) for x in range(W)}
    weight = {cell: 1.0 for cell in value}
    frames = [value]
    for step in flow:
        landed, copies = {}, {}
        for (y, x) in value:
            ty, tx = round(y + float(step[1, y, x])), round(x + float(step[0, y, x]))
            if 0 <= ty < H and 0 <= tx < W:
                landed.setdefault((ty, tx), []).append((y, x))
        for (y, x) in value:
            if (y, x) not in landed:
                sy, sx = round(y - float(step[1, y, x])), round(x - float(step[0, y, x]))
                if 0 <= sy < H and 0 <= sx < W:
                    copies[y, x] = (sy, sx)
        owners = {}
        for target, sources in [*landed.items(), *((t, [s]) for t, s in copies.items())]:
            for source in sources:
                owners.setdefault(source, []).append(target)
        arriving = {cell: [] for cell in value}
        for source, targets in owners.items():
            n = len(targets)
            extra = [fresh() for _ in targets] if n > 1 else [torch.zeros(channels)]
            mean = sum(extra) / n
            for target, e in zip(targets, extra):
                arriving[target].append((weight[source] / n, value[source] / math.sqrt(n) + e - mean))
        value, weight = {}, {}
        for cell, got in arriving.items():
            if got:
                value[cell] = sum(w * v for w, v in got) / math.sqrt(sum(w * w for w, _ in got))
                weight[cell] = sum(w for w, _ in got)
            else:
                value[cell] = fresh()
                weight[cell] = 1.0
        average = sum(weight.values()) / len(weight)
        weight = {cell: w / average for cell, w in weight.items()}
        frames.append(value)
    cells = [frame[y, x] for frame in frames for y in range(H) for x in range(W)]
    return torch.stack(cells, -1).view(channels, -1, H, W)


def correlation_along_the_flow(noise, path, m):
    """Mean correlation of the last frame's noise with frame 0's, looked up where it came from.

    noise (K, F, H*m, W*m) -> reduced to (H, W) cells by averaging; frame 0 is read at the m-times finer
    resolution.
    """
    K, F_, Hm, Wm = noise.shape
    back = path_flow(torch.stack([path[-1], path[0]]), Hm, Wm)[0]
    y, x = torch.meshgrid(torch.arange(Hm), torch.arange(Wm), indexing="ij")
    sx, sy = (x + back[0]).round().long(), (y + back[1]).round().long()
    seen = (sx >= 0) & (sx < Wm) & (sy >= 0) & (sy < Hm)
    start = noise[:, 0, sy.clamp(0, Hm - 1), sx.clamp(0, Wm - 1)]

    def cells(z):
        return z.reshape(K, Hm // m, m, Wm // m, m).mean((2, 4))

    whole = cells(seen.float().expand(K, -1, -1)) == 1
    a, b = cells(noise[:, -1])[whole], cells(start)[whole]
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "fixed"])
def test_transport_follows_the_flow_at_least_as_well_as_the_published_form(motion):
    path, m = camera_path([motion], 6), 3
    flow = path_flow(path, 8 * m, 8 * m)
    ours = transport_noise(flow, 24, generator=torch.Generator().manual_seed(0))[0]
    theirs = go_with_the_flow(flow, 24, torch.Generator().manual_seed(0))
    got = correlation_along_the_flow(ours, path, m)
    published = correlation_along_the_flow(theirs, path, m)
    assert got > .3 and got >= published, (got, published)
    for z in (ours, theirs):
        assert z[:, -1].mean().abs() < 4 / math.sqrt(z[:, -1].numel())
        assert abs(z[:, -1].var() - 1) < .06
    # one distribution: two-sample Kolmogorov-Smirnov
    a, b = (z[:, -1].flatten().sort().values for z in (ours, theirs))
    n = len(a)
    every = torch.cat([a, b])
    below = torch.searchsorted(a, every, right=True) - torch.searchsorted(b, every, right=True)
    distance = below.abs().max() / n
    assert distance < math.sqrt(-math.log(.001 / 10 / 2) / n)


def test_zero_flow_returns_the_same_noise_to_the_bit():
    noise = transport_noise(torch.zeros(4, 2, 5, 7), 3, samples=2, generator=torch.Generator().manual_seed(1))
    assert noise.shape == (2, 3, 5, 5, 7)
    assert all(torch.equal(noise[:, :, 0], noise[:, :, f]) for f in range(5))


def test_whole_cell_shift_moves_values_exactly():
    flow = torch.zeros(1, 2, 6, 6)
    flow[:, 0] = 2
    noise = transport_noise(flow, 4, generator=torch.Generator().manual_seed(1))[0]
    assert torch.equal(noise[:, 1, :, 2:], noise[:, 0, :, :-2])


def test_slow_flow_is_not_rounded_away():
    flow = torch.zeros(20, 2, 12, 12)
    flow[:, 0] = .2
    noise = transport_noise(flow, 64, generator=torch.Generator().manual_seed(2))[0]
    shifted = (noise[:, 20, :, 4:] * noise[:, 0, :, :-4]).mean()
    assert shifted > .9
    assert (noise[:, 20] * noise[:, 0]).mean().abs() < .1


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_frame_is_white(motion):
    """200 samples a motion, all latent frames: moments, neighbours in x, y, diagonals and channels, and KS.
    """
    path = camera_path([motion], 9)
    noise = []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        noise.append(latent_noise(path, 9, 12, 16, samples=25, channels=12, generator=g))
    noise = torch.cat(noise)  # (200, 12, 3, 12, 16)
    tests = 3 * len(MOTIONS)
    for z in noise.unbind(2):
        n = z.numel()
        assert abs(z.mean()) < 4 / math.sqrt(n)
        assert abs(z.var() - 1) < .01
        assert abs(z.pow(4).mean() / z.square().mean() ** 2 - 3) < .05
        pairs = [(z[..., 1:], z[..., :-1]), (z[..., 1:, :], z[..., :-1, :]),
                 (z[..., 1:, 1:], z[..., :-1, :-1]),
                 (z[..., 1:, :-1], z[..., :-1, 1:]), (z[:, 1:], z[:, :-1])]
        assert all(abs((a * b).mean()) < .01 for a, b in pairs)
        ordered = torch.special.ndtr(z.flatten().double().sort().values)
        rank = torch.arange(n, dtype=torch.float64)
        distance = max((ordered - rank / n).max(), ((rank + 1) / n - ordered).max())
        assert distance * math.sqrt(n) < math.sqrt(-math.log(.001 / tests / 2) / 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, .1, .49, .51, 1.0, 3.0, 50.0, 1e6, 1e30]),
       st.integers(0, 9), st.booleans())
def test_any_flow_keeps_the_statistics(height, width, size, seed, collapse):
    g = torch.Generator().manual_seed(seed)
    flow = torch.randn(3, 2, height, width, generator=g) * size
    if collapse:  # everything falls into one cell
        flow[1, 0] = -torch.arange(width).float()
        flow[1, 1] = -torch.arange(height).float()[:, None]
    noise = transport_noise(flow, 500, generator=g)
    assert noise.isfinite().all()
    last = noise[0, :, -1].flatten(1)  # (500, cells)
    covariance = last.T @ last / 500  # over channels, between cells
    assert (covariance - torch.eye(height * width)).abs().max() < 6 * math.sqrt(2 / 500)


@pytest.mark.parametrize("flow, message", [
    (torch.full((1, 2, 3, 3), math.nan), "NaN or infinite"),
    (torch.zeros(1, 3, 3, 3), r"must be float \(F-1, 2, H, W\), got float32 \(1, 3"),
    (torch.zeros(2, 3, 3), "must be float"),
    (torch.zeros(1, 2, 3, 3, dtype=torch.long), "got int64")])
def test_bad_flow_is_refused(flow, message):
    with pytest.raises(ValueError, match=message):
        transport_noise(flow, 4)


def test_latent_noise_shape_seed_and_degradation():
    path = camera_path(["move_left"], 17)

    def make(seed=0, degradation=0.0):
        g = torch.Generator().manual_seed(seed)
        return latent_noise(path, 17, 8, 8, samples=2, generator=g, degradation=degradation)

    clean, half, gone = make(), make(degradation=.6), make(degradation=1.0)
    assert clean.shape == (2, 16, 5, 8, 8)
    assert torch.equal(clean, make())
    assert not torch.equal(clean, make(1))
    assert (clean * half).mean() == pytest.approx(.4 / math.hypot(.4, .6), abs=.03)
    assert abs((clean * gone).mean()) < .03
    assert half.var() == pytest.approx(1, abs=.03)
    with pytest.raises(ValueError, match="17 poses for 21 frames"):
        latent_noise(path, 21, 8, 8)
    with pytest.raises(ValueError, match="degradation must be in"):
        make(degradation=1.5)


def test_picture(tmp_path, capsys):
    for prompt, motions in (("push in, then pan left", "push_in, pan_left"), ("fixed", "fixed")):
        file = tmp_path / motions / "b.png"
        assert main([prompt, "--show", str(file)]) == 0
        assert file.stat().st_size > 10000
        assert motions in capsys.readouterr().out
    assert main(["fixed", "--frames", "1", "--show", str(tmp_path / "c.png")]) == 2
    assert "at least 2 frames" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for arguments, message in ((["fixed", "--frames", "0"], "--frames must be between 1 and 1000, got 0"),
                               (["fixed", "--frames", "-5"], "--frames must be between 1 and 1000, got -5"),
                               (["fixed", "--frames", "1000000000"], "--frames must be between 1 and 1000"),
                               ([" "], "the prompt is empty"),
                               (["push_in " * 20_000], "the prompt has 160000 characters"),
                               (["fixed", "--show", str(tmp_path / "file" / "a.png")], "cannot write"),
                               (["fixed", "--show", str(tmp_path / "a.odd")], "--show must end in .png")):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_drawn_paths_are_seen_from_above():
    """A line a path through its x and z, and a legend of the labels."""
    axes = Figure().subplots()
    paths = {"asked": camera_path(["pull_left"], 5), "found": camera_path(["fixed"], 5).float()}
    draw_paths(axes, paths)
    for line, (label, path) in zip(axes.get_lines(), paths.items(), strict=True):
        assert line.get_label() == label
        assert torch.allclose(torch.tensor(line.get_xydata()), path[:, [0, 2], 3].double())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["asked", "found"]


def test_one_generator_a_sample_makes_samples_independent_of_their_company():
    path = camera_path(["orbit_left", "push_in"], 9)

    def make(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    group = latent_noise(path, 9, 6, 8, 3, make([5, 6, 7]), 4, .3)
    assert torch.equal(group[1:2], latent_noise(path, 9, 6, 8, 1, make([6]), 4, .3))
    assert torch.equal(group[:1], latent_noise(path, 9, 6, 8, 1, torch.Generator().manual_seed(5), 4, .3))
    with pytest.raises(ValueError, match="3 samples need as many generators"):
        latent_noise(path, 9, 6, 8, 3, make([1]), 4)


def test_released_push_is_its_formula():
    g = torch.Generator().manual_seed(0)
    base, moved, x = 3 * torch.randn(3, 1, 2, 3, 12, 16, generator=g)
    delta = torch.nn.functional.avg_pool2d((moved - base).flatten(0, 1), 9, 1, 4).view_as(base)
    delta = delta / delta.std()
    push = released_push(base, moved, strength=.5, steps=2)
    for step, weight in enumerate((1 / 1.1, .1 / 1.1)):
        y = x + .5 * weight * x.std() * delta
        assert torch.allclose(push(x, step), (y - y.mean()) / y.std() * x.std() + x.mean(), atol=1e-4)
    assert torch.equal(push(x, 2), x)
    ours, stated = released_push(base, moved), released_push(base, moved, strength=.35, steps=8)
    assert all(torch.equal(ours(x, step), stated(x, step)) for step in range(9))


def test_released_push_moves_white_noise_towards_the_transported():
    """Correlation with the blurred difference rises with every step, statistics stay; then nothing moves."""
    moved = latent_noise(camera_path(["pan_left"], 17), 17, 12, 16, 2, torch.Generator().manual_seed(0))
    base = torch.randn(2, 16, 5, 12, 16, generator=torch.Generator().manual_seed(1))
    low = torch.nn.functional.avg_pool2d((moved - base).flatten(0, 2)[:, None], 9, 1, 4).view_as(base)
    push = released_push(base, moved, steps=4)
    x = base
    seen = []
    for i in range(4):
        x = push(x, i)
        seen.append(torch.corrcoef(torch.stack([x.flatten(), low.flatten()]))[0, 1].item())
    assert seen == sorted(seen)
    assert seen[-1] > seen[0] + .05
    assert torch.allclose(x.mean((1, 2, 3, 4)), base.mean((1, 2, 3, 4)), atol=1e-4)
    assert torch.allclose(x.std((1, 2, 3, 4)), base.std((1, 2, 3, 4)), rtol=1e-4)
    assert torch.equal(push(x, 4), x)
    with pytest.raises(ValueError, match="must both be"):
        released_push(base, moved[:, :3])
