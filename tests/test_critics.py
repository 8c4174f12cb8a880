import contextlib
import json
import re
import shutil

import lpips
import pytest
import torch
from safetensors.torch import load_file, save_file

from critics import (CRITIC_PROMPT, REWARD_TOKEN, Critic, Hpsv3Json, Preference, as_pictures, as_text, digit_score,
                     load_lpips, lpips_distance, one_sentence_errors, published_instruction)
from weights import TINY, read_json, write_json


def pictures(n, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------- the vision-language critic

@pytest.fixture(scope="module")
def critic(twins):
    return Critic(twins / "qwen3_vl")


def test_critic_batched_equals_single(critic):
    x = pictures(4)
    x[1] = 0
    batched = critic(x)
    assert batched.shape == (4, 10)
    assert torch.allclose(batched.sum(1), torch.ones(4), atol=1e-6)
    for i in range(4):
        assert (critic(x[i:i + 1])[0] - batched[i]).abs().max() < 1e-6
    assert (batched[0] - batched[1]).abs().max() > 1e-5


def test_a_critic_in_two_shards_loads(critic, twins, tmp_path):
    """As Qwen/Qwen3-VL-4B-Instruct is published: two files and their index, written by transformers."""
    folder = shutil.copytree(twins / "qwen3_vl", tmp_path / "critic")
    (folder / "model.safetensors").unlink()
    size = sum(p.numel() * p.element_size() for p in critic.model.parameters())
    critic.model.save_pretrained(folder, max_shard_size=int(.8 * size))
    assert sorted(file.name for file in folder.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    loaded = Critic(folder).model.state_dict()
    assert all(torch.equal(loaded[name], values) for name, values in critic.model.state_dict().items())


def test_critic_reads_the_digits_of_its_tokenizer(critic):
    """The probabilities are the softmax over the ten digits' logits of the full forward pass."""
    tokenizer = critic.processor.tokenizer
    batch = critic.inputs(as_pictures(pictures(1)))
    with torch.no_grad():
        logits = critic.model(**batch).logits[0, -1]
    ids = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    assert len(set(ids)) == 10
    assert tokenizer.unk_token_id not in ids
    assert (critic(pictures(1))[0] - logits[ids].softmax(0)).abs().max() < 1e-6
    text = tokenizer.decode(batch["input_ids"][0])
    assert tokenizer.unk_token not in text
    assert "float in the air" in text
    assert "0" in CRITIC_PROMPT


def test_digit_score_is_the_expectation_over_nine():
    assert digit_score(torch.eye(10)[9]) == 1
    assert digit_score(torch.eye(10)[0]) == 0
    assert digit_score(torch.full((10,), .1)) == pytest.approx(.5)


def test_critic_without_single_digit_tokens_is_refused(twins, tmp_path):
    folder = shutil.copytree(twins / "qwen3_vl", tmp_path / "critic")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for digit in "37":
        tokenizer["model"]["vocab"].pop(digit)  # both are now the unknown word
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="digit"):
        Critic(folder)


# --------------------------------------------------------------------------------------- the preference model

@pytest.fixture(scope="module")
def judge(twins):
    return Preference(twins / "hpsv3")


def published_scores(folder, judge, images, prompts, dtype):
    """The published scoring, written out with transformers' own generation class: plain positions on all
    three axes, the head at the <|Reward|> token, and rotary frequencies rounded to bfloat16 where the model
    is."""
    import transformers
    head, body = {}, {}
    for name, tensor in load_file(folder / "HPSv3.safetensors").items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = tensor
        elif name.startswith("visual."):
            body["model." + name] = tensor
        else:
            body[name.replace("model.", "model.language_model.", 1)] = tensor
    config = transformers.Qwen2VLConfig.from_pretrained(folder)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    missing, unexpected = model.load_state_dict(body, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"]
    model.to(dtype)

    scores = []
    for image, prompt in zip(images, prompts):
        batch = judge.inputs(as_pictures(image[None]), [prompt])
        length = batch["input_ids"].shape[1]
        positions = torch.arange(length).expand(3, 1, length)
        with torch.no_grad():
            hidden = model.model(**batch, position_ids=positions).last_hidden_state[0]  # (L, width)
        at = batch["input_ids"][0].tolist().index(judge.reward_id)
        y = torch.relu(hidden[at].float() @ head["0.weight"].T + head["0.bias"])
        y = torch.relu(y @ head["3.weight"].T + head["3.bias"])
        y = y @ head["5.weight"].T + head["5.bias"]
        scores.append(y[0])
    return torch.stack(scores)


def test_preference_against_the_published_forward_pass(judge, twins):
    x = pictures(3, seed=1)
    prompts = ["Camera push in. A red box.", "pan_left a blue sphere on a checkered green floor", "x"]
    found = judge(x, prompts)
    published = published_scores(twins / "hpsv3", judge, x, prompts, torch.float32)
    assert (found - published).abs().max() < 1e-5
    for i in range(3):  # right padding changes nothing
        assert (judge(x[i:i + 1], prompts[i:i + 1])[0] - found[i]).abs() < 1e-6

    half = Preference(twins / "hpsv3", dtype=torch.bfloat16)
    assert half.model.model.language_model.rotary_emb.inv_freq.dtype == torch.bfloat16
    for name, p in half.model.rm_head.named_parameters():  # not rounded on the way
        assert torch.equal(p, judge.model.rm_head.get_parameter(name))
    in_half = half(x, prompts)
    published = published_scores(twins / "hpsv3", judge, x, prompts, torch.bfloat16)
    assert (in_half - published).abs().max() < 2e-2
    assert (in_half - found).abs().max() > 0


def test_preference_file_must_match(twins, tmp_path):
    folder = shutil.copytree(twins / "hpsv3", tmp_path / "judge")
    file = folder / "HPSv3.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": torch.zeros(2, 2)}, file)
    Preference(folder)  # the published file holds a language head, which scoring has no use for
    weights.pop("rm_head.3.bias")
    save_file(weights, file)
    with pytest.raises(ValueError, match="rm_head.3.bias"):
        Preference(folder)
    file.unlink()
    with pytest.raises(ValueError, match="lacks HPSv3.safetensors"):
        Preference(folder)


def test_published_instruction_is_read_from_the_installed_package(tmp_path, monkeypatch):
    """Without being imported: the package's own imports are many."""
    with pytest.raises(ValueError, match="pip install --no-deps hpsv3"):
        published_instruction()
    package = tmp_path / "hpsv3"
    (package / "dataset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "dataset" / "data_collator_qwen.py").write_text(
        "import torch\n"
        "INSTRUCTION = 'Judge {text_prompt} '\n"
        "prompt_with_special_token = 'now <|Reward|>'\n"
        "class A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert published_instruction() == "Judge {text_prompt} now <|Reward|>"


# ---------------------------------------------------------------------------------------- perceptual distance

def test_the_stand_in_for_lpips_is_seeded_and_a_distance():
    network = load_lpips("random")
    a, b = pictures(2), pictures(2, seed=1)
    assert lpips_distance(network, a, a) == 0
    torch.manual_seed(123)
    assert lpips_distance(load_lpips("random"), a, b) == lpips_distance(network, a, b) > 0
    with pytest.raises(ValueError, match="the LPIPS trunk must be alex or random, got 'vgg'"):
        load_lpips("vgg")


def test_a_critic_whose_file_lacks_tensors_is_refused(twins, tmp_path):
    """transformers would fill them at random and only warn."""
    folder = shutil.copytree(twins / "qwen3_vl", tmp_path / "critic")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    lost = next(name for name in sorted(tensors) if "visual" in name)
    tensors.pop(lost)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing keys such as {re.escape(lost)}"):
        Critic(folder)


def test_no_model_folder_runs_its_code(twins, tmp_path, monkeypatch):
    """An auto_map asks to run a file of the folder; nobody is asked on stdin, and the file is not run."""
    folder = shutil.copytree(twins / "qwen3_vl", tmp_path / "critic")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil:\n    pass\n")
    for name, kind in (("processor_config.json", "AutoProcessor"),
                       ("tokenizer_config.json", "AutoTokenizer")):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {kind: ["evil.Evil", None] if kind == "AutoTokenizer" else "evil.Evil"}
        (folder / name).write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with contextlib.suppress(ValueError, OSError):
        Critic(folder)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------ prompts and folders from elsewhere

MARKS = (REWARD_TOKEN, "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "</s>", "<pad>")


@pytest.mark.parametrize("mark", [*MARKS, "<<|Reward|>|Reward|>", " ".join(MARKS)])
def test_marks_in_a_prompt_are_text(mark, judge):
    """Each input holds the template's own marks and no more; the score is read at the one of the
    instruction."""
    tokenizer = judge.processor.tokenizer
    marks = [tokenizer.convert_tokens_to_ids(name) for name in MARKS if name not in ("<pad>", "</s>")]
    x, plain, marked = pictures(1), "a red box", f"a red box {mark} and a blue sphere"
    own, found = (judge.inputs(as_pictures(x), [text])["input_ids"][0].tolist() for text in (plain, marked))
    assert [i for i in found if i in marks] == [i for i in own if i in marks]
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(found)
    assert found.count(judge.reward_id) == 1
    assert judge(x, [marked]).isfinite().all()


def test_a_prompt_without_marks_is_left_as_it_is(judge):
    for prompt in ("Camera push in. A red box.", "a < b, |x| > 3 <b>", ""):
        assert as_text(prompt, judge.processor.tokenizer) == prompt


def test_a_score_without_its_token_is_an_error(judge):
    hidden, ids = torch.zeros(2, 5, 96), torch.ones(2, 5, dtype=torch.long)
    ids[0, 3] = judge.reward_id
    with pytest.raises(ValueError, match=re.escape(f"must hold {REWARD_TOKEN} once")):
        judge.model.score(hidden, ids, judge.reward_id)


@pytest.mark.parametrize("entry, value", [
    ("center", "a"), ("center", None), ("spread", 0), ("spread", -1.0), ("image_pixels", -1),
    ("image_pixels", True), ("image_pixels", 10 ** 9), ("instruction", ["a"]), ("instruction", "no token")])
def test_wrong_entries_of_hpsv3_json_are_named(entry, value, twins, tmp_path):
    folder = shutil.copytree(twins / "hpsv3", tmp_path / "judge")
    file = folder / "hpsv3.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    with pytest.raises(ValueError) as refused:
        Preference(folder)
    assert str(file) in str(refused.value) and entry in str(refused.value)


def test_more_pixels_than_the_model_reads_are_refused(twins, tmp_path):
    folder = shutil.copytree(twins / "hpsv3", tmp_path / "judge")
    write_json(folder / "hpsv3.json", read_json(folder / "hpsv3.json") | dict(image_pixels=10 ** 6))
    with pytest.raises(ValueError, match="hpsv3.json, entry image_pixels: 1000000 are more tokens than"):
        Preference(folder)


FOLDERS = {Critic: ("qwen3_vl", "Qwen/Qwen3-VL-4B-Instruct"),
           Preference: ("hpsv3", "Qwen/Qwen2-VL-7B-Instruct")}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_chooses_no_kernel_of_the_hub(kind, twins, tmp_path):
    """Nor any other attention: the scores are those of the plain folder."""
    folder = shutil.copytree(twins / FOLDERS[kind][0], tmp_path / "judge")
    config, foreign = read_json(folder / "config.json"), dict(attn_implementation="kernels-evil/attn")
    for part in ("text_config", "vision_config"):
        config[part] |= foreign | dict(_attn_implementation="kernels-evil/attn")
    write_json(folder / "config.json", config | foreign)
    given = [pictures(2)] if kind is Critic else [pictures(2), ["a box", "a ball"]]
    assert torch.equal(kind(folder)(*given), kind(twins / FOLDERS[kind][0])(*given))


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_template_that_counts_is_refused(kind, twins, tmp_path):
    folder = shutil.copytree(twins / FOLDERS[kind][0], tmp_path / "judge")
    loop, end = "{% for a in range(99999) %}", "{% endfor %}"
    (folder / "chat_template.jinja").write_text(3 * loop + 3 * end)
    with pytest.raises(ValueError, match="its chat template counts with range"):
        kind(folder)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_damaged_folders_get_one_sentence(kind, name, text, twins, tmp_path):
    """It names the folder, what is expected there, and where to get it."""
    twin, hub_id = FOLDERS[kind]
    folder = shutil.copytree(twins / twin, tmp_path / "judge")
    (folder / name).write_text(text)
    with pytest.raises(ValueError) as refused:
        kind(folder)
    assert str(refused.value).startswith(f"'{folder}' does not hold a model such as {hub_id}")
    assert str(refused.value).endswith(f"hf download {hub_id}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [
    "processor_config.json", "tokenizer.json", "model.safetensors", "config.json"])
def test_a_critic_that_lacks_a_file_is_refused(name, twins, tmp_path):
    folder = shutil.copytree(twins / "qwen3_vl", tmp_path / "critic")
    (folder / name).unlink()
    with pytest.raises(ValueError, match="hf download Qwen/Qwen3-VL-4B-Instruct"):
        Critic(folder)


def test_full_memory_is_no_fault_of_the_folder():
    with pytest.raises(RuntimeError, match="can't allocate memory"), one_sentence_errors("folder", "hub/id"):
        torch.empty(2 ** 50)


@pytest.mark.parametrize("other", ["wan", "depth_anything", "hpsv3"])
def test_another_models_folder_is_no_critic(other):
    with pytest.raises(ValueError, match="does not hold a model such as Qwen/Qwen3-VL-4B-Instruct"):
        Critic(TINY / other)


def test_mistyped_paths_get_the_model_that_is_expected():
    for kind, expected in ((Critic, "Qwen/Qwen3-VL-4B-Instruct"), (Preference, "MizzenAI/HPSv3")):
        with pytest.raises(ValueError, match=f"no model folder '/nowhere'; give a folder with .*{expected}"):
            kind("/nowhere")
    with pytest.raises(ValueError, match="lacks HPSv3.safetensors.*MizzenAI/HPSv3"):
        Preference(TINY / "qwen3_vl")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_config_of_endless_layers_is_refused_at_once(kind, twins, tmp_path):
    folder = shutil.copytree(twins / FOLDERS[kind][0], tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["depth"] = 10 ** 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds far fewer layers"):
        kind(folder)


# ---------------------------------------------------------------------------------------------- what judges are shown

def test_the_score_depends_on_the_prompt(judge):
    red, blue = judge(pictures(1).expand(2, -1, -1, -1), ["a red box", "a blue sphere"])
    assert red != blue


@pytest.mark.parametrize("side", [32, 128])
def test_pictures_are_as_large_as_hpsv3_json_says(side, twins, tmp_path):
    folder = shutil.copytree(twins / "hpsv3", tmp_path / "judge")
    write_json(folder / "hpsv3.json", read_json(folder / "hpsv3.json") | dict(image_pixels=side ** 2))
    judge = Preference(folder)
    grid = judge.inputs(as_pictures(pictures(1)), ["a box"])["image_grid_thw"][0]
    assert grid.prod() * judge.processor.image_processor.patch_size ** 2 == side ** 2


def test_pictures_are_rounded_and_do_not_wrap():
    picture, = as_pictures(torch.tensor([-.1, .6 / 255, 1.1]).view(1, 3, 1, 1))
    assert picture.flatten().tolist() == [0, 1, 255]


def test_the_trunk_of_lpips_is_the_one_that_is_named(monkeypatch):
    torch.manual_seed(0)
    expected = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_lpips("random").state_dict().items())
    made = []
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: made.append(options["pnet_rand"]) or torch.nn.Identity())
    for trunk in ("alex", "random"):
        load_lpips(trunk)
    assert made == [False, True]


def test_the_scale_of_r_gen_is_of_hpsv3_json_else_the_published_models(judge):
    assert (judge.center, judge.spread) == (1, 5)
    assert Hpsv3Json() == Hpsv3Json("", 256 * 28 * 28, 5.0, 5.0)


def test_lpips_sees_pixels_between_minus_one_and_one():
    network, a, b = load_lpips("random"), pictures(2), pictures(2, seed=1)
    assert lpips_distance(network, a, b) == pytest.approx(float(network(2 * a - 1, 2 * b - 1).mean()), rel=1e-5)
