import math
import re

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import save_file

import probe
import tiny_world
from conftest import ROOT
from depth_anything import Gaussians, Reconstruction
from lora import add_lora, lora_weights, merge_lora
from model import load_wan
from noise_warp import parse_motion
from tiny_world import (COLOURS, CORRUPTIONS, DAMAGE, DEGRADATIONS, HIGH, LOW, PITCH, SHAPES, Object, Scene, caption, corrupt, damage, degrade, intrinsics,
                        random_scene, render)


def test_scenes_are_deterministic_and_differ():
    assert random_scene(1, "static", 5) == random_scene(1, "static", 5)
    assert len({random_scene(1, "static", i).caption for i in range(50)}) == 50
    a, b = (render(random_scene(3, "dynamic", 2), frames=5)["video"] for _ in range(2))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="static or dynamic, got 'train'"):
        random_scene(1, "train", 0)


def test_captions_name_everything_and_the_prompt_parser_reads_the_camera_back():
    for i in range(300):
        scene = random_scene(0, ("static", "dynamic")[i % 2], i)
        assert parse_motion(scene.caption) == scene.motions, scene.caption
        for word in (scene.wall, scene.floor, *(w for o in scene.objects for w in (o.colour, o.shape, o.behaviour))):
            assert word in scene.caption.lower()
        assert parse_motion(caption(scene, camera=False)) == ["fixed"]


def test_every_motion_word_is_rendered():
    seen = {m for i in range(200) for m in random_scene(0, "static", i).motions}
    assert len(seen) == 11
    assert any(len(random_scene(0, "static", i).motions) == 2 for i in range(20))


def test_video_poses_depth_and_mask_have_the_documented_shapes():
    out = render(random_scene(0, "static", 1), frames=5, height=32, width=48, depth=True)
    assert out["video"].shape == (5, 3, 32, 48) and 0 <= out["video"].min() and out["video"].max() <= 1
    assert out["poses"].shape == (5, 4, 4) and torch.equal(out["poses"][0], torch.eye(4))
    assert out["depth"].shape == out["mask"].shape == (5, 32, 48)
    assert out["depth"].isfinite().all() and out["depth"].min() > 0 and out["mask"].max() >= 1


def test_rendering_some_frames_equals_rendering_all():
    scene = random_scene(0, "dynamic", 3)
    difference = render(scene, frames=9)["video"][[2, 7]] - render(scene, frames=9, at=[2, 7])["video"]
    assert difference.abs().mean() < 1e-5  # a ray on an edge may round either way


def march(scene, pose, ray):
    """Slow oracle: walks a ray in small steps until it enters an object or leaves the room. -> z-depth, owner"""
    c, s = math.cos(PITCH), math.sin(PITCH)
    room = torch.tensor([[1, 0, 0], [0, c, s], [0, -s, c]], dtype=torch.float64)
    t = torch.arange(0, 5, 5e-4, dtype=torch.float64)[:, None]
    points = (room @ pose[:3, 3].double()) + t * (room @ pose[:3, :3].double() @ ray.double())  # (N, 3)
    outside = ((points < torch.tensor(LOW)) | (points > torch.tensor(HIGH))).any(1)
    first, owner = int(outside.nonzero()[0]), 0
    for k, o in enumerate(scene.objects):
        x, y, z = (points - torch.tensor([o.x, HIGH[1] - o.size, o.z])).unbind(1)
        if o.shape == "sphere":
            inside = x * x + y * y + z * z < o.size ** 2
        elif o.shape == "cylinder":
            inside = (x * x + z * z < o.size ** 2) & (y.abs() < o.size)
        else:
            a, b = math.cos(o.yaw) * x - math.sin(o.yaw) * z, math.sin(o.yaw) * x + math.cos(o.yaw) * z
            inside = (a.abs() < o.size) & (y.abs() < o.size) & (b.abs() < o.size)
        if inside.any() and int(inside.nonzero()[0]) < first:
            first, owner = int(inside.nonzero()[0]), k + 1
    return float(t[first]), owner


@pytest.mark.parametrize("shape", SHAPES)
def test_depth_and_mask_agree_with_ray_marching(shape):
    scene = Scene("red", "blue", [Object(shape, "green", -.2, 1.0, .22, .4), Object("box", "yellow", .35, 1.2, .2, -.3)], ["orbit_left"])
    out = render(scene, frames=3, height=16, width=16, depth=True)
    K = intrinsics(16, 16)
    wrong = 0
    for f in (0, 2):
        for row in range(0, 16, 3):
            for column in range(0, 16, 2):
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
    world = (rays * out["depth"][-1][..., None]) @ out["poses"][-1, :3, :3].T + out["poses"][-1, :3, 3]
    seen = world @ K.T
    grid = seen[..., :2] / seen[..., 2:] / 32 - 1
    depth0 = torch.nn.functional.grid_sample(out["depth"][None, :1], grid[None], align_corners=False)[0, 0]
    visible = (grid.abs() < .95).all(-1) & ((depth0 - seen[..., 2]).abs() < .02)
    warped = torch.nn.functional.grid_sample(out["video"][None, 0], grid[None], align_corners=False)[0]
    error = (warped - out["video"][-1]).abs().mean(0)[visible]
    unmoved = (out["video"][0] - out["video"][-1]).abs().mean(0)[visible]
    assert visible.float().mean() > .6
    assert error.mean() < .02 and error.mean() < unmoved.mean() / 4


def test_dynamic_objects_move_while_the_room_stands_still():
    for index in range(8):
        scene = random_scene(0, "dynamic", index)
        scene.motions = ["fixed"]
        out = render(scene, frames=9, depth=True)
        room = (out["mask"] == 0).all(0)
        still = torch.nn.functional.max_pool2d((~room)[None].float(), 3, 1, 1)[0] == 0
        change = (out["video"][1:] - out["video"][:1]).abs().amax((0, 1))
        assert change[still].max() == 0 and change[~still].max() > .2


def test_tokenizer_reads_prompt_forms_alike():
    from tiny_train import make_tokenizer
    tokenizer = make_tokenizer()
    a, b = (tokenizer(p).input_ids for p in ("push_in a red sphere, blue walls", "Push-in a RED sphere  blue walls."))
    assert a == b and a[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in a
    assert tokenizer("a zebra").input_ids[1] == tokenizer.unk_token_id
    assert all(c in tokenizer.get_vocab() for c in COLOURS)


def test_the_shipped_model_follows_its_prompts():
    """What 16 samples show, read by the shipped probe, which is right on every one of those scenes' renders."""
    import json
    from conftest import ROOT
    from model import load_wan
    from sample import model_defaults
    from tiny_world import sample_prompts, unseen_scenes
    folder = ROOT / "tiny" / "wan"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 20e6
    assert sum(f.stat().st_size for f in folder.parent.rglob("*") if f.is_file()) < 32e6
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    scenes, judge = unseen_scenes(16), probe.load_probe(folder.parent / "probe")
    prompts = [s.caption for s in scenes]
    assert all(map(all, probe.scores(probe.read(judge, [render(s)["video"] for s in scenes]), prompts).values()))
    defaults = model_defaults(folder)
    sampled = sample_prompts(load_wan(folder), defaults, prompts, degradation=defaults["degradation"])
    found = {name: sum(right) for name, right in probe.scores(probe.read(judge, sampled), prompts).items()}
    assert found["wall"] >= 15 and found["floor"] >= 15 and found["objects"] >= 11 and found["motion"] >= 12, found


def test_vae_inflation_keeps_single_frames_and_repeats_them():
    """Inflated, a clip of one repeated frame encodes and decodes like that frame alone."""
    from conftest import VAE_, randomise
    from model import VAE, VAEConfig
    from tiny_train import inflate
    vae = randomise(VAE(VAEConfig(**VAE_)))
    inflate(vae)
    frame = torch.rand(1, 1, 3, 16, 16)
    with torch.no_grad():
        one, clip = vae.moments(frame)[0], vae.moments(frame.repeat(1, 9, 1, 1, 1))[0]
        assert torch.allclose(clip, one.expand_as(clip), atol=1e-4)
        assert torch.allclose(vae.decode_raw(clip), vae.decode_raw(one).expand(-1, 9, -1, -1, -1), atol=1e-4)


def test_preference_pairs_differ_in_one_thing():
    from collections import Counter
    from tiny_judges import preference_pair
    pairs = [preference_pair(i, "test") for i in range(150)]
    words = lambda text: Counter(w for w in re.findall("[a-z]+", text.lower()) if w not in ("a", "an"))  # noqa: E731
    seen = []
    for (a, p), (b, q), kind in pairs:
        other_words, other_picture = p != q, (a - b).abs().amax(0) > .01
        if kind == "degraded":
            assert not other_words and not torch.equal(a, b)
        elif kind == "room":
            assert (words(p) - words(q)).total() > 1 and not other_picture.any()
        elif other_words:
            assert (words(p) - words(q)).total() == (words(q) - words(p)).total() == 1 and not other_picture.any()
        else:
            assert other_picture.float().mean() < .6
            seen.append(bool(other_picture.any()))
    share = Counter(kind for *_, kind in pairs)
    assert .4 < share["degraded"] / 150 < .6 and .3 < share["object"] / 150 < .5 and share["room"] > 5
    assert len(seen) > 15 and sum(seen) / len(seen) > .85  # an object may have left the picture


def test_the_preference_twin_trains_resumes_and_exports(tmp_path):
    from rewards import Preference
    from tiny_judges import export_preference, train_preference
    for minutes in (.01, .02):
        train_preference(tmp_path, minutes, batch=2)
    lines = [dict(zip(line.split()[::2], map(float, line.split()[1::2]))) for line in (tmp_path / "preference" / "log.txt").read_text().splitlines()]
    assert len(lines) == 2 and lines[1]["step"] > lines[0]["step"] > 0 and all(0 <= lines[1][k] <= 1 for k in ("held_out_right", "degraded", "object", "room"))
    assert lines[1]["words"] < math.log(80)  # better than any of the tokenizer's words
    export_preference(tmp_path, tmp_path / "out")
    judge, trained = Preference(tmp_path / "out"), Preference(tmp_path / "preference" / "start")
    frames, prompts = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a red box", "a blue sphere"]
    start = trained(frames, prompts)
    trained.model.load_state_dict(torch.load(tmp_path / "preference" / "state.pt", weights_only=True)["ema"])
    assert torch.allclose(32 * judge(frames, prompts), trained(frames, prompts), atol=.02) and not torch.allclose(trained(frames, prompts), start, atol=.001)


def test_depth_training_losses_reach_every_part():
    """A backward pass of each step of the Depth Anything twin's training reaches backbone, heads and camera decoder."""
    import random
    from noise_warp import camera_path
    from tiny_judges import build_depth, camera_step, depth_sample, render_step
    rng = random.Random(1)  # its first numbers ask for no VAE round trip
    for together in (True, False):
        da3 = build_depth()
        data = [depth_sample(rng, None, i, 0, [0, 5, 9]) for i in range(2)]
        paths = [camera_path(scene.motions, 17).float() for *_, scene in data]
        if together:
            losses = camera_step(da3, torch.nn.Linear(128, 12), torch.stack([x for x, _, _ in data]), torch.stack([d for _, d, _ in data]), torch.stack([p[[0, 5, 9]] for p in paths]), rng)
        else:
            losses = render_step(da3, *data[0][:2], paths[0], [0, 5, 9], data[0][2], [2, 3])
        assert set(losses) == {"depth", "position", "rotation", "focal"} | ({"room", "surface", "colour", "flat", "opacity"} if together else {"render"}) and all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        for part in (da3.backbone.pretrained.blocks[0].attn.qkv, da3.head.projects[0], da3.cam_dec.fc_t, da3.gs_head.projects[0]):
            assert part.weight.grad.abs().sum() > 0


def test_depth_batches_are_their_clips():
    """The network on two clips at once is the network on each."""
    from tiny_judges import build_depth
    vit = build_depth().backbone.pretrained
    x = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = vit(x)
        reference = vit.reference.tolist()
        for i in range(2):
            alone = vit(x[i:i + 1])
            assert vit.reference.tolist() == reference[i:i + 1]
            assert all(torch.allclose(a[i], b[0], atol=1e-4) for pair, other in zip(both, alone) for a, b in zip(pair, other))


# ------------------------------------------------------------------------------------------------- what goes wrong, graded

@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_grows_with_strength_and_frames_stay_clean(kind):
    scene = random_scene("corrupt", "static", 3)
    scene.motions = ["orbit_left"]
    true = render(scene)["video"]
    errors = [(corrupt(scene, kind, s, 5) - true).abs().mean().item() for s in (.01, .5, 1.0)]
    assert errors[0] < .02 and errors[0] < errors[1] < errors[2] and errors[2] > .01
    assert torch.equal(corrupt(scene, kind, .7, 5), corrupt(scene, kind, .7, 5))
    video = corrupt(scene, kind, 1.0, 5)
    assert video.shape == true.shape and video.isfinite().all() and 0 <= video.min() and video.max() <= 1


def test_freeze_is_the_camera_standing_still():
    scene = random_scene("corrupt", "static", 3)
    video = corrupt(scene, "freeze", 1.0)
    assert (video - video[:1]).abs().max() == 0
    with pytest.raises(ValueError, match="kind must be one of"):
        corrupt(scene, "melt")


def test_degradations_and_damage_grow_with_strength():
    image = render(random_scene("ugly", "static", 1), at=[0])["video"][0]
    g = torch.Generator()
    for kind in DEGRADATIONS:
        errors = [(degrade(image, kind, s, g.manual_seed(0)) - image).square().mean().item() for s in (.2, .6, 1.0)]
        assert errors == sorted(errors) and errors[2] > 3 * errors[0], kind
    n = 200
    r = torch.rand(n, 3, generator=g.manual_seed(1))
    gaussians = Gaussians(r - .5 + torch.tensor([0, 0, 1.5]), torch.full((n, 3), .01), torch.tensor([1.0, 0, 0, 0]).repeat(n, 1), torch.zeros(n, 3, 9), torch.full((n,), .9))
    rec = Reconstruction(torch.full((2, 4, 4), 1.5), torch.ones(2, 4, 4), torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1), gaussians, torch.zeros(2, 3, 4, 4), torch.arange(2))
    for kind in DAMAGE:
        def change(s):
            b = damage(rec, kind, s, g.manual_seed(2)).gaussians
            return float((b.means - gaussians.means).norm(dim=1).mean() + (b.scales - gaussians.scales).abs().mean() + (b.opacities - gaussians.opacities).abs().mean())
        assert change(0.0) < 1e-6 < change(.3) < change(1.0), kind
    assert torch.equal(gaussians.means, r - .5 + torch.tensor([0, 0, 1.5]))  # the original is untouched


def test_render_from_given_cameras():
    scene = random_scene("poses", "static", 2)
    own = render(scene, depth=True)
    again = render(scene, poses=own["poses"], depth=True)
    assert torch.equal(own["video"], again["video"]) and torch.equal(own["depth"], again["depth"])


def test_the_base_of_world_r1_trains_resumes_and_is_exported_as_an_adapter(tmp_path):
    from tiny_train import export_web, train_web
    for minutes in (.02, .04):  # the second goes on from the first
        train_web(tmp_path, minutes, clips=4)
    steps = [int(line.split()[1]) for line in (tmp_path / "web" / "log.txt").read_text().splitlines()]
    assert 0 < steps[0] < steps[-1]
    export_web(tmp_path, tmp_path / "shipped")
    plain, based = (load_wan(ROOT / "tiny" / "wan") for _ in range(2))
    pairs = merge_lora(based.dit, tmp_path / "shipped")
    assert len(pairs) == 8 * len(based.dit.blocks) and all(A.shape[0] == 16 and B.any() for A, B in pairs.values())
    assert merge_lora(plain.dit, ROOT / "tiny" / "web").keys() == pairs.keys()


# -------------------------------------------------------------------------------------------------------------- the probe

def test_commands_print_a_row_for_every_setting_and_name_their_errors(tmp_path, capsys):
    def command(*arguments):
        code = tiny_world.main([*map(str, arguments), "--run", str(tmp_path)])
        out, err = capsys.readouterr()
        return code, [line for line in out.splitlines() if line.startswith("|")][2:], out, err

    code, rows, _, _ = command("probe", "--num", 2, "--steps", 1, 2, "--degradation", 0, 1)
    assert code == 0 and [r.split("|")[1].strip() for r in rows] == [f"steps {s}, degradation {d}" for s in (1, 2) for d in (0, 1)]
    assert len({r.split("|")[-2] for r in rows}) == 4 and (tmp_path / "probe.png").exists()  # every setting made other videos
    assert command("probe", "--num", 2, "--rendered")[1][0].count("1.000 [") == 5
    assert command("probe", "--num", 2, "--rendered", "--frames", 33)[1][0].count("1.000 [") == 5  # a long clip is read at the frames of a short one
    assert command("compare", "--num", 1)[0] == 0 and (tmp_path / "compare.webp").stat().st_size > 1000
    wan = load_wan(tiny_world.__file__.replace("tiny_world.py", "tiny/wan"))
    add_lora(wan.dit, 2, 2)
    save_file({k: torch.full_like(v, .2) for k, v in lora_weights(wan.dit).items()}, tmp_path / "lora.safetensors")
    assert command("compare", "--num", 1, "--lora", tmp_path)[0] == 0
    shown = torch.from_numpy(iio.imread(tmp_path / "compare.webp", index=0)).float()[:128, :396].unflatten(1, (3, 132))[:, :, :128]
    assert all((shown[:, a] - shown[:, b]).abs().mean() > 2 for a, b in ((0, 1), (1, 2), (0, 2)))  # rendered, base, trained: three pictures
    rows = command("probe", "--num", 1, "--steps", 1, "--lora", ROOT / "tiny/web", tmp_path)[1]
    assert len(rows) == 2 and "tiny/web, steps 1" in rows[0] and rows[0].split("|")[-2] != rows[1].split("|")[-2]
    assert "no LoRA file 'nowhere'" in command("probe", "--num", 1, "--lora", ROOT / "tiny/web", "nowhere")[3]
    code, rows, out, _ = command("score-depth", "--num", 2)
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == {"input_db", "odd_db", "rotation_deg", "direction_deg", "absrel"}
    assert command("probe", "--probe", tmp_path)[0] == 2 and "train-probe" in command("probe", "--probe", tmp_path)[3]
    (tmp_path / "p.txt").write_text("a mountain\n")
    assert "cannot read what this prompt asks" in command("probe", "--prompts", tmp_path / "p.txt")[3]


def test_the_probe_asks_what_the_caption_asks():
    for split in ("static", "dynamic"):
        for i in range(200):
            s = random_scene("asked", split, i)
            assert probe.asked(s.caption) == probe.labels(s.wall, s.floor, {o.colour: o.shape for o in s.objects}, s.motions), s.caption
    with pytest.raises(ValueError, match="cannot read what this prompt asks for"):
        probe.asked("push_in a mountain lake")


def test_probe_scores_count_each_attribute():
    prompts = ["push_in a red sphere on a checkered green floor, blue walls", "Camera pan left, then pull out. A red box and a blue cylinder, green checkered floor, yellow walls."]
    right = [probe.asked(p) for p in prompts]
    assert all(all(v) for v in probe.scores(right, prompts).values())
    wrong = [dict(r) for r in right]
    wrong[0]["wall"] = probe.NAMES.index("green")
    wrong[1]["purple object"] = 1  # an object nobody asked for
    wrong[1]["second motion"] = probe.MOTIONS.index("fixed")
    assert probe.scores(wrong, prompts) == dict(wall=[False, True], floor=[True, True], objects=[True, False], motion=[True, False], all=[False, False])


def test_probe_files_round_trip(tmp_path):
    torch.manual_seed(0)
    judge = probe.Probe(8)
    video = torch.rand(2, 17, 3, 64, 64)
    assert {h: tuple(x.shape) for h, x in judge(video).items()} == {h: (2, n) for h, n in probe.HEADS.items()}
    assert len(probe.read(judge, list(video))) == 2
    with pytest.raises(ValueError, match="train-probe"):
        probe.load_probe(tmp_path)


def test_probe_rows_and_intervals():
    assert probe.wilson([True] * 90 + [False] * 10) == "0.900 [0.826, 0.945]"  # Wilson's interval, from its formula by hand


def test_reprojection_is_small_on_renders_and_grows_with_what_no_room_could_show():
    """A still camera's clip is explained to the bit; a moving one nearly; corrupted clips and wrong cameras are not."""
    from noise_warp import camera_path
    errors = {}
    for i in range(3):
        scene = random_scene("reprojection", "static", i)
        scene.motions = [("orbit_left", "push_in", "move_right")[i]]
        true, path = render(scene)["video"], camera_path(scene.motions, 17)
        still = true[:1].expand(17, -1, -1, -1)
        assert probe.reprojection(still, camera_path(["fixed"], 17)) < 1e-6
        cases = dict(true=(true, path), warp=(corrupt(scene, "warp", 1.0, 1), path), other=(true, camera_path([("orbit_right", "pull_out", "move_left")[i]], 17)))
        for name, (video, cameras) in cases.items():
            errors[name] = errors.get(name, 0) + probe.reprojection(video, cameras, gap=4)
    assert errors["warp"] > 1.5 * errors["true"] and errors["other"] > 1.5 * errors["true"], errors


def test_the_linear_codec_is_exact_where_clips_are_linear():
    """Clips spanned by two pictures need two components, and one component is the best rank-1 fit."""
    pictures = torch.rand(2, 17, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clips = [a * pictures[0] + b * pictures[1] for a, b in torch.rand(12, 2, generator=torch.Generator().manual_seed(1))]
    frames, groups = probe.blocks(clips[0])
    assert frames.shape == (4, 192) and groups.shape == (16, 768)
    one = [c[..., :8, :8].repeat(1, 1, 2, 2)[:5].index_select(0, torch.zeros(5, dtype=torch.long)) for c in clips]
    assert probe.pca_codec(one, 2)(one[3]) < 1e-6 < 1e-3 < probe.pca_codec(one, 0 + 1)(one[3])
