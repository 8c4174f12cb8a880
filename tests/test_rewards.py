import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from noise_warp import MOTIONS, camera_path
from rewards import (CRITIC_PROMPT, TERMS, Critic, Preference, as_pictures, auc, digit_score, load_rewards, meta_views,
                     published_instruction, spearman, trajectory_reward, win_rate)

STILL = torch.eye(4).repeat(17, 1, 1)


# ---------------------------------------------------------------------------------------------------------- trajectory

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
    assert trajectory_reward(path, scaled(moved(path), scale)) == pytest.approx(1, abs=1e-6)
    assert trajectory_reward(path, scaled(moved(path), scale).float()) == pytest.approx(1, abs=1e-4)


OPPOSITE = dict(push_in="pull_out", move_left="move_right", orbit_left="orbit_right", pan_left="pan_right", pull_left="push_in")


@pytest.mark.parametrize("motion, other", OPPOSITE.items())
def test_wrong_paths_are_ordered(motion, other):
    path = camera_path([motion], 17)
    half, still, opposite = (trajectory_reward(path, p) for p in (camera_path([motion], 17, .5), STILL, camera_path([other], 17)))
    assert 0 < opposite < still < half <= 1


def test_values_in_the_docstring():
    def row(make):
        return [round(trajectory_reward(camera_path([m], 17), make(m)), 2) for m in ("push_in", "pan_left", "orbit_left")]
    assert row(lambda m: camera_path([m], 17)) == [1, 1, 1]
    assert row(lambda m: camera_path([m], 17, 2.0)) == [1, .42, .21]
    assert row(lambda m: camera_path([m], 17, .5)) == [1, .65, .46]
    assert row(lambda m: STILL) == [.42, .42, .07]
    assert row(lambda m: camera_path([OPPOSITE[m]], 17)) == [.17, .17, .01]


def test_still_and_turning_targets_measure_travel_in_depths():
    pan, travel = camera_path(["pan_left"], 17), camera_path(["push_in"], 17)
    assert trajectory_reward(STILL, scaled(travel, 7), depth=7) == pytest.approx(trajectory_reward(STILL, travel), abs=1e-6)
    assert trajectory_reward(STILL, travel) == pytest.approx(math.exp(-5 * travel[:, :3, 3].norm(dim=1).mean()), abs=1e-6)
    both = pan.clone()
    both[:, :3, 3] = travel[:, :3, 3]
    assert trajectory_reward(pan, both) < trajectory_reward(pan, pan) == 1


def test_noise_in_place_of_travel_is_no_better_than_standing_still():
    path, draw = camera_path(["move_left"], 17), torch.Generator().manual_seed(0)
    for _ in range(20):
        jitter = STILL.clone()
        jitter[1:, :3, 3] = 1e-4 * torch.randn(16, 3, generator=draw)
        assert trajectory_reward(path, jitter) < .8
    with pytest.raises(ValueError, match="paths must both"):
        trajectory_reward(path, path[:5])


# ---------------------------------------------------------------------------------------------------------- the critics

@pytest.fixture(scope="module")
def critic(twins):
    return Critic(twins / "qwen3_vl")


@pytest.fixture(scope="module")
def judge(twins):
    return Preference(twins / "hpsv3")


def pictures(n, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_critic_batched_equals_single(critic):
    x = pictures(4)
    x[1] = 0
    batched = critic(x)
    assert batched.shape == (4, 10) and torch.allclose(batched.sum(1), torch.ones(4), atol=1e-6)
    for i in range(4):
        assert (critic(x[i:i + 1])[0] - batched[i]).abs().max() < 1e-6
    assert (batched[0] - batched[1]).abs().max() > 1e-5


def test_critic_reads_the_digits_of_its_tokenizer(critic):
    """The probabilities are the softmax over the ten digits' logits of the full forward pass."""
    batch = critic.inputs(as_pictures(pictures(1)))
    with torch.no_grad():
        logits = critic.model(**batch).logits[0, -1]
    ids = [critic.processor.tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    assert len(set(ids)) == 10 and critic.processor.tokenizer.unk_token_id not in ids
    assert (critic(pictures(1))[0] - logits[ids].softmax(0)).abs().max() < 1e-6
    text = critic.processor.tokenizer.decode(batch["input_ids"][0])
    assert critic.processor.tokenizer.unk_token not in text and "float in the air" in text and "0" in CRITIC_PROMPT


def test_digit_score_is_the_expectation_over_nine():
    assert digit_score(torch.eye(10)[9]) == 1 and digit_score(torch.eye(10)[0]) == 0
    assert digit_score(torch.full((10,), .1)) == pytest.approx(.5)


def test_critic_without_single_digit_tokens_is_refused(twins, tmp_path):
    import json
    import shutil
    shutil.copytree(twins / "qwen3_vl", tmp_path / "critic")
    file = tmp_path / "critic" / "tokenizer.json"
    data = json.loads(file.read_text())
    for digit in "37":
        data["model"]["vocab"].pop(digit)  # both are now the unknown word
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="digit"):
        Critic(tmp_path / "critic")


def test_preference_against_the_published_forward_pass(judge, twins):
    """The published scoring, written out with transformers' own generation class: plain positions on all three axes,
    the head at the <|Reward|> token, and rotary frequencies rounded to bfloat16 where the model is."""
    import transformers
    from safetensors.torch import load_file
    weights = load_file(twins / "hpsv3" / "HPSv3.safetensors")
    config = transformers.Qwen2VLConfig.from_pretrained(twins / "hpsv3")
    x, prompts = pictures(3, seed=1), ["Camera push in. A red box.", "pan_left a blue sphere on a checkered green floor, red walls", "x"]

    def official(dtype):
        model = transformers.Qwen2VLForConditionalGeneration(config).eval()
        renamed = {("model." + k if k.startswith("visual.") else k.replace("model.", "model.language_model.", 1)): v
                   for k, v in weights.items() if not k.startswith("rm_head")}
        missing, unexpected = model.load_state_dict(renamed, strict=False)
        assert not unexpected and missing == ["lm_head.weight"]
        model.to(dtype)
        h = {k[8:]: v for k, v in weights.items() if k.startswith("rm_head")}
        scores = []
        for picture, prompt in zip(x, prompts):
            batch = judge.inputs(as_pictures(picture[None]), [prompt])
            L = batch["input_ids"].shape[1]
            with torch.no_grad():
                hidden = model.model(**batch, position_ids=torch.arange(L).expand(3, 1, L)).last_hidden_state[0]
            at = batch["input_ids"][0].tolist().index(judge.reward_id)
            y = torch.relu(hidden[at].float() @ h["0.weight"].T + h["0.bias"])
            y = torch.relu(y @ h["3.weight"].T + h["3.bias"])
            scores.append((y @ h["5.weight"].T + h["5.bias"])[0])
        return torch.stack(scores)

    found = judge(x, prompts)
    assert (found - official(torch.float32)).abs().max() < 1e-5
    half = Preference(twins / "hpsv3", dtype=torch.bfloat16)
    assert half.model.model.language_model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert (half(x, prompts) - official(torch.bfloat16)).abs().max() < 2e-2 and (half(x, prompts) - found).abs().max() > 0
    for i in range(3):
        assert (judge(x[i:i + 1], prompts[i:i + 1])[0] - found[i]).abs() < 1e-6  # right padding changes nothing


def test_preference_file_must_match(twins, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(twins / "hpsv3", tmp_path / "judge")
    weights = load_file(tmp_path / "judge" / "HPSv3.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "judge" / "HPSv3.safetensors")
    Preference(tmp_path / "judge")  # the published file holds a language head, which scoring has no use for
    save_file({k: v for k, v in weights.items() if k != "rm_head.3.bias"}, tmp_path / "judge" / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="rm_head.3.bias"):
        Preference(tmp_path / "judge")
    (tmp_path / "judge" / "HPSv3.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks HPSv3.safetensors"):
        Preference(tmp_path / "judge")


def test_published_instruction_is_read_from_the_installed_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pip install --no-deps hpsv3"):
        published_instruction()
    package = tmp_path / "hpsv3"
    (package / "dataset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "dataset" / "data_collator_qwen.py").write_text(
        "import torch\nINSTRUCTION = 'Judge {text_prompt} '\nprompt_with_special_token = 'now <|Reward|>'\nclass A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert published_instruction() == "Judge {text_prompt} now <|Reward|>"


# ------------------------------------------------------------------------------------------------------------- together

def options(twins):
    return dict(depth_anything=twins / "depth_anything", critic=twins / "qwen3_vl", preference=twins / "hpsv3", views=5)


@pytest.fixture(scope="module")
def batch(twins):
    """Three clips with their prompts and paths, and their scores."""
    from tiny_world import random_scene, render
    scenes = [random_scene("rewards", "static", i) for i in range(3)]
    videos = [render(s)["video"] for s in scenes]
    prompts, paths = [s.caption for s in scenes], [camera_path(s.motions, 17) for s in scenes]
    rewards = load_rewards(**options(twins))
    return rewards, videos, prompts, paths, rewards(videos, prompts, paths)


def test_all_terms_are_returned_and_sum(batch):
    rewards, *_, out = batch
    assert set(out) == {*TERMS, "three_d", "total"}
    assert all(v.shape == (3,) and v.dtype == torch.float32 and v.isfinite().all() for v in out.values())
    assert torch.allclose(out["three_d"], out["meta"] + out["recon"] + out["traj"])
    assert torch.allclose(out["total"], out["three_d"] + out["general"])
    assert ((out["meta"] >= 0) & (out["meta"] <= 1) & (out["traj"] > 0) & (out["traj"] <= 1)).all() and not rewards.failures


def test_scores_do_not_depend_on_batch_or_order(batch):
    rewards, videos, prompts, paths, out = batch
    alone = rewards(videos[1:2], prompts[1:2], paths[1:2])
    turned = rewards(videos[::-1], prompts[::-1], paths[::-1])
    for name in out:
        assert alone[name][0] == out[name][1] and torch.equal(turned[name].flip(0), out[name])


def test_a_failed_sample_is_masked_and_the_others_are_untouched(batch, twins):
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins))
    broken = videos[1].clone()
    broken[3, 0, 5, 5] = math.nan
    found = rewards([videos[0], broken, videos[2]], prompts, paths)
    for name in out:
        assert found[name][1].isnan() and torch.equal(found[name][[0, 2]], out[name][[0, 2]])
    assert rewards.failures == {t: 1 for t in TERMS} and "NaN" in rewards.reasons["recon"]
    single = rewards([videos[0], videos[1][:1]], prompts[:2], paths[:2])  # one frame: no path, no world, yet a picture
    assert single["general"].isfinite().all() and single["traj"][1].isnan() and single["total"][1].isnan()
    with pytest.raises(RuntimeError, match="every sample's reward failed"):
        rewards([broken, broken], prompts[:2], paths[:2])


def test_a_path_of_the_wrong_length_masks_its_term_alone(batch, twins):
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins))
    found = rewards(videos[:2], prompts[:2], [paths[0], paths[1][:3]])
    assert found["traj"][1].isnan() and found["recon"][1] == out["recon"][1] and found["total"][1].isnan() and rewards.failures["traj"] == 1


def test_dynamic_phase_and_zero_weights_skip_the_work(batch, twins):
    _, videos, prompts, paths, out = batch
    rewards = load_rewards(**options(twins) | dict(depth_anything="/nowhere", critic="/nowhere"))
    found = rewards(videos, prompts, paths, dynamic=True)
    assert torch.equal(found["total"], out["general"]) and found["three_d"].isnan().all() and not rewards.failures
    rewards = load_rewards(**options(twins) | dict(critic="/nowhere", preference="/nowhere"), weights=dict(meta=0, general=0)).load()
    found = rewards(videos, prompts, paths)
    assert torch.allclose(found["total"], out["recon"] + out["traj"]) and found["meta"].isnan().all()
    with pytest.raises(ValueError, match="unknown reward term 'metta'"):
        load_rewards(weights=dict(metta=1))
    with pytest.raises(ValueError, match="no model folder"):
        load_rewards(depth_anything="/nowhere").load()


def test_scores_are_the_same_in_a_new_process(batch, twins, tmp_path):
    _, videos, prompts, paths, out = batch
    torch.save((videos[0], prompts[0], paths[0]), tmp_path / "clip.pt")
    code = (f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); torch.set_num_threads({torch.get_num_threads()})\n"
            f"from rewards import load_rewards\nv, p, e = torch.load({str(tmp_path / 'clip.pt')!r})\nr = {str(twins)!r}\n"
            "out = load_rewards(depth_anything=r + '/depth_anything', critic=r + '/qwen3_vl', preference=r + '/hpsv3', views=5)([v], [p], [e])\n"
            "print([x.item().hex() for x in out.values()])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == str([v[0].item().hex() for v in out.values()])


def test_meta_views_stand_beside_the_path_and_look_at_the_scene(batch):
    rewards, videos, *_ = batch
    rec = rewards.depth_anything(videos[0], 5)
    views, middle = meta_views(rec), rec.camera_to_world[2]
    relative = torch.linalg.inv(middle) @ views
    d = rec.depth.median()
    assert torch.allclose(relative[:, :3, 3], d * torch.tensor([[-.35, -.2, 0], [.35, -.2, 0]]), atol=1e-5)
    target = rec.gaussians.means.median(0).values
    for view in views:
        seen = torch.linalg.inv(view) @ torch.cat([target, torch.ones(1)])
        assert seen[:2].abs().max() < 1e-5 and seen[2] > 0
        assert torch.allclose(view[:3, :3].T @ view[:3, :3], torch.eye(3), atol=1e-5) and torch.det(view[:3, :3]) > 0
        assert view[:3, 1] @ middle[:3, 1] > .7  # upright


def test_ranking_measures():
    assert win_rate([1, 2, 3], [0, 2, 4])[0] == .5 and auc([3, 4], [1, 2]) == (1, 1, 1) and auc([1, 2], [1, 2])[0] == .5
    x, y = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    area, low, high = auc(x + 1, y)  # of two normals a deviation apart: Phi(1/sqrt 2) = .760, standard error about .017
    assert low < .760 < high and .05 < high - low < .08 and area == pytest.approx(((x + 1)[:, None] > y).double().mean().item())
    assert spearman(torch.tensor([1., 5, 9]), torch.tensor([0., 1, 2])) == pytest.approx(1)


def test_the_shipped_twins_tell_good_from_bad(capsys):
    """The validity suite on 12 clips: every term ranks most of its pairs right, the geometric ones nearly all."""
    from rewards import load_rewards, validate
    found = {name.split(":")[0]: row["pairs"][0] for name, row in validate(load_rewards(views=5).load(), num=12, seed=1, levels=2).items() if "weaker" not in name}
    assert set(found) == {"recon", "total, plain sum", "total, standardised in its group", "re-render where the prompt asked", "meta", "general", "traj"}
    assert min(found.values()) >= .75 and min(found["recon"], found["traj"], found["total, standardised in its group"], found["re-render where the prompt asked"]) > .9, found


def test_command_line(twins, tmp_path, capsys):
    from rewards import main
    from sample import write_video
    from tiny_world import random_scene, render
    scene = random_scene("cli", "static", 0)
    write_video(tmp_path / "clip.mp4", render(scene)["video"], 8)
    where = ["--depth-anything", str(twins / "depth_anything"), "--critic", str(twins / "qwen3_vl"), "--preference", str(twins / "hpsv3")]
    assert main([str(tmp_path / "clip.mp4"), scene.caption, *where]) == 0
    out = capsys.readouterr().out
    assert all(term in out for term in TERMS) and "stand-in" in out and (tmp_path / "clip.rewards.png").stat().st_size > 5000
    for arguments, message in (([str(tmp_path / "none.mp4"), "x"], "cannot be read"), ([str(tmp_path / "clip.mp4")], "give the prompt"),
                               ([str(tmp_path / "clip.mp4"), "x", "--critic", "/nowhere"], "no model folder")):
        assert main([*arguments, *([] if "--critic" in arguments else where)]) == 2
        assert message in capsys.readouterr().err
