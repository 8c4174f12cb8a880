import json
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

from conftest import ROOT
from eval import epipolar_error
from lora import add_lora, lora_weights
from model import load_wan
from noise_warp import MOTIONS, camera_path
from tiny.__main__ import main
from tiny import probe
from tiny.probe import (FORMS, HEADER, HEADS, NAMES, NOISE_PATHS, Probe, asked, blocks, labels_of, load_probe,
                        noise_motions, pca_codec, proportion, read, reprojection, scores, table_row)
from tiny.world import corrupt, random_scene, render

# ------------------------------------------------------------------------------------------------------- command lines

@pytest.fixture
def command(tmp_path, capsys):
    """-> run(arguments): exit status, the table's rows, all output, errors."""
    def run(*arguments):
        code = main([*map(str, arguments), "--run", str(tmp_path)])
        out, err = capsys.readouterr()
        rows = [line for line in out.splitlines() if line.startswith("|")]
        return code, rows[2:], out, err

    return run


@pytest.fixture
def adapter(tmp_path):
    """A folder with a LoRA that changes what the shipped model samples."""
    wan = load_wan(ROOT / "tiny" / "wan")
    add_lora(wan.dit, 2, 2)
    weights = {name: torch.full_like(value, .2) for name, value in lora_weights(wan.dit).items()}
    save_file(weights, tmp_path / "lora.safetensors")
    return tmp_path


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_probe_prints_a_row_for_every_combination_of_settings(command, tmp_path):
    code, rows, _, _ = command("probe", "--num", 2, "--steps", 1, 2, "--degradation", 0, 1)
    assert code == 0
    names = [cells(row)[0] for row in rows]
    assert names == [f"steps {steps}, degradation {share}" for steps in (1, 2) for share in (0, 1)]
    assert len({cells(row)[-2] for row in rows}) == 4  # every setting made other videos
    assert (tmp_path / "probe.png").exists()


def test_samples_have_each_their_own_noise(monkeypatch):
    """The i-th prompt the seed's i-th, whichever batch it is in; along a path as strong as was asked for."""
    asked_for = []
    monkeypatch.setattr(probe, "sample_videos", lambda wan, part, sampling, seed, **options:
                        asked_for.append((seed, options)) or (part, None))
    probe.sample_in_batches(None, ["push_in"] * 3, SimpleNamespace(frames=5), 7, strength=.5, transport=False, batch=2)
    assert [(seed, list(options["noise_ids"]), options["transport"]) for seed, options in asked_for] == [
        (7, [0, 1], False), (7, [2], False)]
    assert torch.equal(asked_for[0][1]["paths"][0], camera_path(["push_in"], 5, .5))


def test_the_probe_samples_test_prompts_as_it_is_told(command, tmp_path, monkeypatch):
    room, told = "a blue box on a checkered green floor, red walls", []
    rows = [dict(prompt=f"{word} {room}", split=split) for word, split in (("push_in", "train"), ("pan_left", "test"))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(probe, "sample_in_batches", lambda wan, texts, sampling, seed, **options:
                        told.append((texts, seed, options)) or [])
    for name in ("table_row", "contact_sheet"):
        monkeypatch.setattr(probe, name, lambda *_: "| x |")
    assert command("probe", "--prompts", tmp_path / "p.jsonl", "--seed", 5, "--no-transport")[0] == 0
    assert told == [([f"pan_left {room}"], 5, dict(transport=False))]


def test_a_row_stands_under_its_header():
    scene = random_scene("row", "static", 0)
    scene.motions = ["orbit_left"]
    video, prompt = render(scene)["video"], "orbit_left a red box on a checkered green floor, blue walls"
    names = cells(HEADER.splitlines()[0])
    row = dict(zip(names, cells(table_row("x", [video], [prompt], load_probe(ROOT / "tiny" / "probe"))), strict=True))
    path = camera_path(["orbit_left"], 17)
    assert row["re-projection, 1 frame"] == f"{reprojection(video, path):.4f}" != row["4 frames"]
    assert row["4 frames"] == f"{reprojection(video, path, 4):.4f}"
    assert row["epipolar"] == f"{epipolar_error(video):.2f}"
    assert list(scores([asked(prompt)], [prompt])) == names[1:6]


def test_the_noise_can_move_otherwise_than_the_words_say(command):
    prompt = "Camera push in, then pull left. A red box."
    assert [noise_motions(prompt, kind) for kind in NOISE_PATHS] == [
        ["push_in", "pull_left"], ["fixed"], ["pull_out", "pull_right"]]
    _, rows, _, _ = command("probe", "--num", 1, "--steps", 1, "--noise-path", *NOISE_PATHS)
    assert [cells(row)[0] for row in rows] == [f"steps 1, noise_path {kind}" for kind in NOISE_PATHS]
    assert len({cells(row)[-2] for row in rows}) == 3  # other videos each


@pytest.mark.parametrize("frames", (17, 33))
def test_probe_reads_renders_rightly(command, frames):
    """A long clip is read at the frames of a short one."""
    code, rows, _, _ = command("probe", "--num", 2, "--rendered", "--frames", frames)
    assert code == 0
    assert rows[0].count("1.000 [") == 5


def test_probe_and_compare_take_adapters(command, adapter):
    _, rows, _, _ = command("probe", "--num", 1, "--steps", 1, "--lora", ROOT / "tiny" / "web", adapter)
    assert len(rows) == 2
    assert "tiny/web, steps 1" in rows[0]
    assert cells(rows[0])[-1] != cells(rows[1])[-1]
    assert command("compare", "--num", 1, "--lora", adapter)[0] == 0
    # Rendered, base, trained: three pictures of 64 pixels at double size, 4 pixels apart.
    sheet = torch.from_numpy(iio.imread(adapter / "compare.webp", index=0)).float()
    shown = sheet[:128, :396].unflatten(1, (3, 132))[:, :, :128]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (shown[:, a] - shown[:, b]).abs().mean() > 2


def test_errors_are_one_sentence(command, tmp_path):
    (tmp_path / "mountain.txt").write_text("a mountain\n")
    wrong = {
        "no LoRA file 'nowhere'": ("--lora", ROOT / "tiny" / "web", "nowhere"),
        "train it: python -m tiny train-probe": ("--probe", tmp_path),
        "cannot read what this prompt asks": ("--prompts", tmp_path / "mountain.txt"),
        "--rendered scores the unseen scenes": ("--rendered", "--prompts", tmp_path / "mountain.txt"),
        "clips; drop --guidance": ("--rendered", "--guidance", 7),
        "clips; drop --no-transport": ("--rendered", "--no-transport"),
        "--strength is of the noise's camera path": ("--no-transport", "--strength", .5),
        "--frames must be 4k+1": ("--frames", 16),
    }
    for message, arguments in wrong.items():
        code, _, _, err = command("probe", "--num", 1, *arguments)
        assert code == 2
        assert err.startswith("tiny: ") and message in err, err
        assert len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- the classifier

def test_the_probe_asks_what_the_caption_asks():
    for split in ("static", "dynamic"):
        for i in range(200):
            scene = random_scene("asked", split, i)
            assert asked(scene.caption) == labels_of(scene), scene.caption
    with pytest.raises(ValueError, match="cannot read what this prompt asks for"):
        asked("push_in a mountain lake")


def test_probe_scores_count_each_attribute():
    prompts = ["push_in a red sphere on a checkered green floor, blue walls",
               "Camera pan left, then pull out. A red box and a blue cylinder, green checkered floor, yellow walls."]
    readings = [asked(prompt) for prompt in prompts]
    assert all(all(right) for right in scores(readings, prompts).values())
    readings[0]["wall"] = NAMES.index("green")
    readings[1]["purple object"] = FORMS.index("sphere")  # an object nobody asked for
    readings[1]["second motion"] = MOTIONS.index("fixed")
    assert scores(readings, prompts) == dict(wall=[False, True], floor=[True, True], objects=[True, False],
                                             motion=[True, False], all=[False, False])


def test_the_probe_has_a_softmax_for_every_head(tmp_path):
    torch.manual_seed(0)
    probe = Probe()
    video = torch.rand(2, 17, 3, 64, 64)
    shapes = {head: tuple(logits.shape) for head, logits in probe(video).items()}
    assert shapes == {head: (2, classes) for head, classes in HEADS.items()}
    assert len(read(probe, list(video))) == 2
    with pytest.raises(ValueError, match="train-probe"):
        load_probe(tmp_path)


def test_shares_carry_wilsons_interval():
    assert proportion([True] * 90 + [False] * 10) == "0.900 [0.826, 0.945]"  # from its formula by hand


# ------------------------------------------------------------------------------------------------------------- rigidity

def test_reprojection_is_small_on_renders_and_grows_with_what_no_room_could_show():
    """A still camera's clip is explained to the bit; a moving one nearly; corrupted clips and wrong cameras are not."""
    errors = dict(true=0.0, warp=0.0, other=0.0)
    opposites = dict(orbit_left="orbit_right", push_in="pull_out", move_right="move_left")
    for i, (motion, opposite) in enumerate(opposites.items()):
        scene = random_scene("reprojection", "static", i)
        scene.motions = [motion]
        true = render(scene)["video"]
        path = camera_path([motion], 17)
        still = true[:1].expand(17, -1, -1, -1)
        assert reprojection(still, camera_path(["fixed"], 17)) < 1e-6
        errors["true"] += reprojection(true, path, gap=4)
        errors["warp"] += reprojection(corrupt(scene, "warp", 1.0, 1), path, gap=4)
        errors["other"] += reprojection(true, camera_path([opposite], 17), gap=4)
    assert errors["warp"] > 1.5 * errors["true"], errors
    assert errors["other"] > 1.5 * errors["true"], errors


def test_the_epipolar_judge_ranks_strengths_as_reprojection_does():
    """It knows no camera and no room. Where a room swims or a thing changes shape; a slow swap of rooms it takes for
    one world, see `python -m tiny validate`."""
    found = []
    for kind in ("warp", "morph"):
        for i in range(3):
            scene = random_scene("judges", "static", i)
            path = camera_path(scene.motions, 17)
            clips = [corrupt(scene, kind, strength, i) for strength in (0.0, .33, .67, 1.0)]
            epipolar = [epipolar_error(clip) for clip in clips]
            assert epipolar[0] == min(epipolar)
            found.append(spearmanr(epipolar, [reprojection(clip, path, gap=4) for clip in clips]).statistic)
    assert sum(found) / len(found) >= .7, found


def test_the_epipolar_judge_orders_renders_trained_base(command):
    """On the same scenes, with the shipped adapters."""
    scenes = ["--num", 6, "--seed", 1]
    _, rows, _, _ = command("probe", *scenes, "--rendered")
    rows += command("probe", *scenes, "--lora", ROOT / "tiny" / "world_r1", ROOT / "tiny" / "web")[1]
    rendered, trained, base = (float(cells(row)[-1]) for row in rows)
    assert rendered < trained < base


# ------------------------------------------------------------------------------------------------------- the VAE, scored

def test_the_linear_codec_is_exact_where_clips_are_linear():
    """Clips spanned by two pictures need two components, and one component is the best rank-1 fit."""
    pictures = torch.rand(2, 17, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mixtures = torch.rand(12, 2, generator=torch.Generator().manual_seed(1))
    clips = [a * pictures[0] + b * pictures[1] for a, b in mixtures]
    frames, groups = blocks(clips[0])
    assert frames.shape == (4, 192)
    assert groups.shape == (16, 768)
    first = torch.zeros(5, dtype=torch.long)
    alike = [clip[..., :8, :8].repeat(1, 1, 2, 2)[first] for clip in clips]  # one block, everywhere and always
    assert pca_codec(alike, 2)(alike[3]) < 1e-6 < 1e-3 < pca_codec(alike, 1)(alike[3])
