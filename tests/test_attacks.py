"""Hostile calls of every command: exit status 2, one sentence that names what is wrong and says what to do,
nothing written.

An argument's @ stands for the folder of `places`; where a row breaks a file, the folder around it is copied
as links to @broken, and the file replaced.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import short_run
from safetensors.torch import load_file, save_file

import ablate
import bench
import critics
import depth_anything
import eval as evaluation
import lora
import model
import noise_warp
import prompts
import report
import rewards
import sample
import train
import walkthrough
import weights
from tiny import __main__ as tiny

# ------------------------------------------------------------------------------------------------- the table

TRAIN = [*short_run(Path("@wan"), Path("@twins")), "--prompts", "@prompts.jsonl"]
JUDGES = ["--depth-anything", "@twins/depth_anything", "--critic", "@twins/qwen3_vl",
          "--preference", "@twins/hpsv3"]
COMMANDS = {  # name: main, arguments before a row's own
    "sample": (sample.main, ["push_in a box", "--model", "@wan"]),
    "lora": (sample.main, ["push_in a box", "--model", "@wan", "--lora", "@lora"]),
    "peft": (sample.main, ["push_in a box", "--model", "@wan", "--lora", "@peft"]),
    "train": (train.main, TRAIN),
    "preference": (train.main, [*TRAIN, *"--meta 0 --recon 0 --traj 0".split()]),  # loads no other judge
    "metrics": (evaluation.main, ["metrics", "--model", "@wan", "--prompts", "@prompts.jsonl", *JUDGES]),
    "rewards": (rewards.main, ["@video.mp4", "push_in a box", "--out", "x.png", *JUDGES]),
    "depth": (depth_anything.main, ["@video.mp4", "--model", "@twins/depth_anything", "--out", "x"]),
    "study": (report.main, ["study", "--a", "@videos", "--b", "@others/videos", "--out", "x"]),
    "score": (report.main, ["score", "@study/answers.json", "--out", "@study"]),
    "report": (report.main, ["run", "@run"]),
    "table": (evaluation.main, ["table", "--runs", "a=@results", "b=@others"]),
    "noise": (noise_warp.main, ["push_in"]),
    "ablate": (ablate.main, ["run", "full", "--model", "@wan"]),
    "estimate": (bench.main, ["--estimate", "small"]),
    **{name: (tiny.main, [name]) for name in (
        "probe", "compare", "score-vae", "score-depth", "validate", "vae", "data")},
    # without arguments of our own
    **{f"{module.__name__}.py": (module.main, []) for module in (
        sample, evaluation, rewards, depth_anything, report, ablate, noise_warp, bench, walkthrough)},
    "tiny": (tiny.main, []),
}


@dataclass
class Row:
    command: str
    arguments: list = field(default_factory=list)
    word: str = ""  # what the message must name
    source: str = ""  # the place that is copied to @broken, with its `file` ...
    file: str = ""
    content: object = None  # ... made by content(new file, old file), or removed

    def __str__(self):
        what = f" {self.source}/{self.file} {self.content and self.content.__name__}" if self.source else ""
        return f"{self.command} {' '.join(self.arguments)[:80]}{what}"


def calls(command, *cases):
    """Cases such as "--frames 6 -> --frames": further arguments, and the word to find (default: the last)."""
    pairs = [(shlex.split(case.partition(" -> ")[0]), case.partition(" -> ")[2]) for case in cases]
    return [Row(command, arguments, word or arguments[-1]) for arguments, word in pairs]


def each(command, option, values, word=None):
    """One option with each of the values."""
    return [Row(command, [f"{option}={value}"], word or value) for value in values]


# ------------------------------------------------------------------------------------------ numbers and words

FIELDS = [f.name.replace("_", "-") for f in dataclasses.fields(train.Config)
          if re.search("int|float", str(f.type))]
NUMERIC = {
    "sample": "num frames height width steps guidance shift strength degradation",
    "probe": "num frames steps guidance shift strength degradation",
    "train": " ".join([*FIELDS, *rewards.TERMS]),
    "metrics": "num frames views", "rewards": "views", "depth": "views", "noise": "frames",
    "ablate": "num processes", "estimate": "gpus", "bench.py": "repeat", "compare": "num frames",
    "score-vae": "num", "score-depth": "num", "validate": "num views", "vae": "minutes", "data": "clips"}
FINE = {  # numbers that are no fault
    "0": "seed guidance strength degradation traj-alpha traj-beta general-center max-masked lr decay beta1 "
         "beta2 weight-decay clip kl adv-clip grad-clip max-skipped lora-alpha ema-decay dynamic-steps "
         "eval-every meta recon traj general",
    "-1": "seed general-center lora-alpha"}
NUMBERS = [
    Row(command, [f"--{name}={value}"], f"--{name}")
    for command, names in NUMERIC.items() for name in names.split()
    for value in ("0", "-1", "nan", "inf", "-inf", "1e99", "", "many")
    if name not in FINE.get(value, "").split()]

NO_PROMPTS = {"": "empty", " \n\t ": "empty", "a\x00": "control character", "\x1b[2J": "control character",
              "\ud800": "control character", "a" * 180_000: "180000 characters"}
WORDS = [
    *[Row(command, [*before, prompt], word) for prompt, word in NO_PROMPTS.items()
      for command, before in (("sample.py", []), ("noise_warp.py", []), ("rewards.py", ["@video.mp4"]),
                              ("walkthrough.py", []))],
    *[row for command in ("sample", "train", "metrics", "rewards", "depth", "validate")
      for row in each(command, "--device", ("gpu", "meta", "cuda:99", "cpu:x", "mps"), "--device")],
    *[Row(command, ["--nonsense=1"], "--nonsense") for command in (
        "sample", "train", "metrics", "rewards", "depth", "noise", "estimate", "probe", "study")],
    *[row for command, option in (
        ("sample", "--solver"), ("sample", "--dtype"), ("train", "--sde"), ("train", "--lpips"),
        ("train", "--parallel"), ("train", "--dtype"), ("train", "--preset"), ("metrics", "--split"),
        ("metrics", "--lpips"), ("rewards", "--lpips"), ("bench.py", "--estimate"))
      for row in each(command, option, ["nonsense"], option)],
    *each("train", "--name", ("", "a/b", "..", ".x", "/tmp/x", "a/", "a\x00b"), "--name"),
    *each("train", "--runs", ["@plain", "/proc/x"]),
    *calls("sample", "--released --no-transport -> --released", "--frames 6 -> --frames",
           "--height 24 -> --height", "--width 33 -> --width", "--negative '\x07' -> control character",
           "--frames 9997 --height 9984 --width 9984 -> --frames",
           "--num 1000 --frames 9997 --height 9984 --width 9984 -> --num"),
    *calls("train", "--frames 6 -> --frames", "--height 24 -> --height", "--batch 3 -> --batch",
           "--updates 3 -> --updates", "--eta 0 -> --eta", "--window 99 -> window", "--lora @nowhere"),
    *calls("sample.py", " -> prompt"), *calls("rewards.py", " -> video", "'' x -> ''", "'' '' -> empty"),
    *calls("depth_anything.py", " -> video", "'' -> ''"),
    *calls("walkthrough.py", " -> prompt", "'' -> empty"),
    *calls("eval.py", " -> command", "nonsense", "metrics --videos @videos -> --prompts", "table -> --runs",
           "metrics --videos @wan --prompts @prompts.jsonl -> @wan", "table --runs x -> LABEL=FOLDER",
           "metrics --videos @nowhere --prompts @prompts.jsonl -> @nowhere",
           "table --runs a=@nowhere -> @nowhere", "table --runs a= -> summary.json",
           "table --runs a=@results a=@results -> twice"),
    *calls("report.py", " -> command", "run @nowhere", "run @plain", "run @wan", "run '' -> metrics.jsonl",
           "study --a @nowhere --b @videos -> @nowhere", "study --a @videos --b @videos -> same folder", "study --a @wan --b @videos -> @wan",
           "score @nowhere -> study", "score @nowhere --out @study -> @nowhere"),
    *calls("estimate", "--with --full", "--with --lr nan -> --lr", "--with --nonsense",
           "--with --frames 6 -> --frames"),
    *calls("bench.py", "nonsense"),
    *calls("ablate.py", " -> command", "run -> CELL", "run nonsense", "run full --lr nan -> --lr",
           "run full --frames 6 -> --frames", "table --pages @nowhere", "table --pages @plain",
           "table --pages @fifo", "table x"),
    *calls("tiny", " -> COMMAND", "nonsense", "probe --model @nowhere", "probe --lora @nowhere",
           "probe --probe @nowhere", "probe --rendered --prompts @prompts.jsonl -> --rendered",
           "probe --frames 6 -> --frames", "compare --model @nowhere", "score-vae --model @nowhere",
           "score-depth --model @wan", "export --run @nowhere", "dit --run @nowhere", "data --run @nowhere",
           "validate --critic @wan", "vae --minutes 1 --run @plain"),
]

# ------------------------------------------------------------------- files and folders of the wrong kind

FOLDERS = ["@wan", "@twins/depth_anything", "@twins/qwen3_vl", "@twins/hpsv3", "@plain", "@hollow",
           "@nowhere", "@fifo", "", "a/b/c"]
NOT_WRITABLE = ["@plain", "@plain/x", "/proc/x"]
NO_FILES = ["@nowhere", "@hollow", "@bytes", "@fifo", "@hollow.txt", "@wan"]
WRONG_KINDS = [
    *[row for command, option, right in (
        ("sample", "--model", "@wan"), ("sample", "--lora", None), ("metrics", "--model", "@wan"),
        ("train", "--model", "@wan"),
        ("train", "--depth-anything", "@twins/depth_anything"), ("train", "--critic", "@twins/qwen3_vl"),
        ("preference", "--preference", "@twins/hpsv3"), ("depth", "--model", "@twins/depth_anything"))
      for folder in FOLDERS if folder != right for row in each(command, option, [folder], folder or "'")],
    *[row for command in ("metrics", "depth", "ablate", "study", "probe")
      for row in each(command, "--run" if command == "probe" else "--out", NOT_WRITABLE)],
    *[row for command in ("sample", "rewards")
      for row in each(command, "--out", ["", "x", "x.gif", "@link", "@plain/x.mp4", "@plain/x.png",
                                         "/proc/x.mp4", "x" * 300 + ".mp4"], "--out")],
    *each("study", "--out", ["@videos"]),
    *each("noise", "--show", ["@plain/x.png", "/proc/x.png", "@link", "x.nonsense"]),
    *calls("noise", "--show= -> --show"), *calls("tiny", "captions --out @link", "captions --out @plain/x"),
    *[Row("walkthrough.py", ["push_in", "--out", out], out) for out in ("@plain/x", "/proc/x", "@link")],
    *[row for command in ("train", "metrics", "probe")
      for row in each(command, "--prompts", [*NO_FILES, "@split.jsonl", "@long.jsonl", "@list.jsonl",
                                             "@deep.jsonl", "@null.jsonl"])],
    *[Row(f"{name}.py", [video, "push_in a box"][:1 + (name == "rewards")], video)
      for name in ("rewards", "depth_anything") for video in [*NO_FILES, "@cut.mp4"]],
    *each("sample", "--path", [*NO_FILES, *(f"@path_{i}.json" for i in range(7))]),
]

# ---------------------------------------------------------------------------------------------- broken files

def fixed(name, value):
    def content(new, _):
        new.write_bytes(value)

    content.__name__ = name
    return content


def lines(*rows):
    return [fixed(row, row.encode() + b"\n") for row in rows]


def cut(new, old):
    new.write_bytes(old.read_bytes()[:old.stat().st_size // 2])


def a_pipe(new, _):
    os.mkfifo(new)


def a_folder(new, _):
    new.mkdir()


def entries(changes):
    """Contents from "frames=6 steps=true": each is the old file's JSON with one other entry."""
    def content_of(change):
        name, _, value = change.partition("=")

        def content(new, old):
            new.write_text(json.dumps(json.loads(old.read_text()) | {name: json.loads(value)}))

        content.__name__ = change
        return content

    return [content_of(change) for change in changes.split()]


def tensors(name, change):
    """The old file's tensors after change(tensors, name of a matrix)."""
    def content(new, old):
        found = load_file(old)
        change(found, next(key for key in sorted(found) if found[key].dim() > 1))
        save_file(found, new)

    content.__name__ = name
    return content


NO_LINE = [a_pipe, a_folder, *lines("[]", "null", '"x"', "1e999", '{"a": NaN}', "1" * 10 ** 4, "[" * 10 ** 5),
           fixed("binary", bytes(range(256))), fixed("utf-16", '{"a": 1}'.encode("utf-16"))]
NO_JSON = [*NO_LINE, fixed("empty", b""), cut]
NO_WEIGHTS = [
    a_pipe, a_folder, None, cut, fixed("empty", b""), fixed("huge header", b"\xff" * 8 + b"{}"),
    fixed("pickle", b"\x80\x04cos\nsystem\n(S'touch marker'\ntR."),
    tensors("no tensors", lambda t, _: t.clear()),
    tensors("NaN", lambda t, key: t[key].view(-1)[:1].fill_(torch.nan)),
    tensors("infinity", lambda t, key: t[key].view(-1)[-1:].fill_(torch.inf)),
    tensors("integers", lambda t, key: t.update({key: t[key].int()})),
    tensors("an extra one", lambda t, _: t.update({"zz.extra": torch.zeros(2)})),
    tensors("one missing", lambda t, key: t.pop(key)),
    tensors("another shape", lambda t, key: t.update({key: t[key].repeat(2, *[1] * (t[key].dim() - 1))}))]
NO_ADAPTER = [
    tensors("a layer of none", lambda t, _: t.update({"transformer.x.lora_A.weight": torch.ones(1, 2)})),
    tensors("DoRA", lambda t, key: t.update({key[:-13] + "lora_magnitude": torch.ones(2)})),
    tensors("rank 0", lambda t, key: t.update({k: v[:0].clone() if "_A" in k else v[:, :0].clone()
                                               for k, v in t.items()}))]
INDICES = lines(*(json.dumps(dict(weight_map=dict(a=name)))
                  for name in ("../x.safetensors", "/etc/passwd", "a/b", "", "..", "nowhere")))
OBJECT = lines("{}")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TWINS = ("twins/depth_anything", "twins/qwen3_vl", "twins/hpsv3")
# Command, place, file, contents; and the word (default: the file where it is no JSON, else the folder).
BREAKS = [
    ("sample", "wan", "sampling.json", [*NO_JSON, *entries(
        'frames=6 frames="5" height=0 width=1000000000000 steps=-1 steps=true guidance=[] shift=0 fps=0 '
        'degradation=2 guidance=1e300')], "sampling.json"),
    ("train", "wan", "sampling.json", [a_pipe, cut, *entries("frames=6")], "sampling.json"),
    ("sample", "wan", "scheduler/scheduler_config.json", [*NO_JSON, *entries(
        'flow_shift=0 flow_shift="3" flow_shift=-1 flow_shift=1e300 shift=[]')], "scheduler_config.json"),
    ("sample", "wan", "transformer/config.json", [*NO_JSON, *OBJECT, *entries(
        'num_layers=1000000 num_layers=0 num_layers=1e99 num_attention_heads="2" attention_head_dim=25 '
        'ffn_dim=1000000 in_channels=-4 text_dim=100000 patch_size=[1,2] patch_size=[0,2,2] freq_dim=255')]),
    ("train", "wan", "transformer/config.json", [a_pipe, cut]),
    ("train", "wan", TRANSFORMER, [a_pipe, cut], "@broken/transformer"),
    ("sample", "wan", "vae/config.json", [*NO_JSON, *OBJECT, *entries(
        'z_dim=100000 base_dim="x" dim_mult=[] latents_mean=[0] latents_std=[0,0,0,0] latents_std=["a"] '
        'num_res_blocks=1000000 temperal_downsample=[true] dim_mult=[1000000,1000000,1000000,1000000]')]),
    ("sample", "wan", "text_encoder/config.json", [*NO_JSON, *OBJECT, *entries(
        'd_model=1000000000 num_layers=1000000 vocab_size=-1 num_heads=0 d_ff="x" dense_act_fn="x" d_kv=[] '
        'vocab_size=1000000000000000000 layer_norm_epsilon="x"')]),
    ("sample", "wan", "tokenizer/tokenizer.json", [*NO_JSON, *OBJECT, None], "@broken/tokenizer"),
    ("sample", "wan", "tokenizer/tokenizer_config.json", [*NO_JSON, *OBJECT], "@broken/tokenizer"),
    ("sample", "wan", TRANSFORMER, NO_WEIGHTS, "@broken/transformer"),
    ("sample", "wan", f"{TRANSFORMER}.index.json", [*NO_LINE, *OBJECT, *INDICES], "@broken/transformer"),
    ("sample", "wan", "vae/diffusion_pytorch_model.safetensors", NO_WEIGHTS, "@broken/vae"),
    ("sample", "wan", "text_encoder/model.safetensors", NO_WEIGHTS, "@broken/text_encoder"),
    ("depth", TWINS[0], "config.json", [*NO_JSON, *OBJECT, *entries(
        'dim=0 depth=1000000 heads=7 out_layers=[] out_layers=[9,1] process_res=100000 process_res=0 '
        'dim="x"')]),
    ("depth", TWINS[0], "model.safetensors", NO_WEIGHTS, "model.safetensors"),
    *[(command, twin, file, contents, "@broken")
      for command, twin, of_weights in (("train", TWINS[1], "model.safetensors"),
                                        ("preference", TWINS[2], "HPSv3.safetensors"))
      for file, contents in (("config.json", NO_JSON), ("tokenizer.json", [a_pipe, a_folder, cut]),
                             ("processor_config.json", [a_pipe, a_folder, cut]),
                             ("chat_template.jinja", [a_pipe, a_folder, None, cut]),
                             (of_weights, NO_WEIGHTS))],
    ("preference", TWINS[2], "hpsv3.json", [*NO_JSON, *entries(
        'instruction="x" spread=0 image_pixels="x" image_pixels=1000000000 center=null')], "@broken"),
    ("lora", "lora", "lora.safetensors", [*NO_WEIGHTS, *NO_ADAPTER], "lora.safetensors"),
    ("peft", "peft", "adapter_config.json", [*NO_JSON, *entries(
        'use_dora=true peft_type="LOKR" r="x" r=0 lora_alpha=[] init_lora_weights="pissa" rank_pattern=[]')]),
    ("report", "run", "config.json", [*NO_JSON, *entries(
        'groups="x" weights=[] frames="x" model=3 groups=[]')], "config.json"),
    ("report", "run", "metrics.jsonl", [*NO_JSON, None, *lines(
        '{"step": "x"}', '{"step": 0, "total": "x"}', '{"total": 1}', '{"step": 0, "grad": 3}')],
     "metrics.jsonl"),
    ("report", "run", "eval.jsonl", [*NO_LINE, *lines('{"step": "x"}')], "eval.jsonl"),
    ("report", "run", "results/summary.json", NO_JSON),
    ("table", "results", "summary.json", [*NO_JSON, None, *entries(
        'videos="x" sizes=3 seed="x" summary=[] summary={"psnr":[1]} summary={"vbench":[1,2,3]} '
        'failed_terms=[] summary={"vbench":{"AVG":"x"}}')], "summary.json"),
    ("table", "results", "metrics.jsonl", [*NO_LINE, None, *lines('{"psnr": "x"}', '{"video": 3}')],
     "metrics.jsonl"),
    ("score", "study", "study_key.json", [*NO_JSON, *entries('pairs=3 pairs=[{"a":"c"}] study=1')],
     "study_key.json"),
    ("score", "study", "answers.json", [*NO_JSON, None, *entries('answers=3 participant=[]')],
     "answers.json"),
    ("score", "study", "answers.json", entries(
        'study="another" answers=[] answers=[null,3,"x",{},{"pair":1e30}] answers=[{"pair":0,"left":"x"}]'),
     "no answer"),
]
ROWS = [*NUMBERS, *WORDS, *WRONG_KINDS, *(
    Row(command, [], word[0] if word else Path(file).name if content in NO_JSON else "@broken", source, file,
        content)
    for command, source, file, contents, *word in BREAKS for content in contents)]


# ------------------------------------------------------------------------------------------------- the places

POSE = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
PATHS = [[], [POSE] * 4, [POSE[:3]] * 5, "x", [[[2, 0, 0, 0], *POSE[1:]]] * 5,
         [[*POSE[:3], [0, 0, 0, 2]]] * 5, [[[1, 0, 0, 1e9], *POSE[1:]]] * 5]
SUMMARY = dict(videos=1, failed=0, sizes=["5x32x32"], seed=0, lpips="x", summary=dict(vbench="not measured"))


def make_places(root, checkpoint, twins):
    """Fills the folder that @ stands for: models, a folder of each kind, and files that are none."""
    for name, target in dict(wan=checkpoint, twins=twins, link="hollow").items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    files = {
        "hollow/": "", "plain": "x", "hollow.txt": "",
        "prompts.jsonl": '{"prompt": "push_in a box"}\n{"prompt": "pan_left", "split": "test"}\n'
                         '{"prompt": "static, a ball", "split": "dynamic"}\n',
        "split.jsonl": '{"prompt": "push_in", "split": "tests"}',
        "long.jsonl": json.dumps(dict(prompt="a" * 180_000)),
        "list.jsonl": "[]", "deep.jsonl": "[" * 10 ** 5, "null.jsonl": '{"prompt": null}',
        "run/metrics.jsonl": '{"step": 0, "total": 1.0}\n',
        "run/eval.jsonl": '{"step": 0, "total": 1.0}\n',
        "run/config.json": '{"name": "run"}',
        "study/study_key.json": '{"study": "s", "a": "a", "b": "b", "pairs": [{"x.mp4": "a", "y.mp4": "b"}]}',
        "study/answers.json": '{"study": "s", "participant": "p", "answers": []}',
        "peft/adapter_config.json": '{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'}
    files |= {f"path_{i}.json": json.dumps(path) for i, path in enumerate(PATHS)}
    for folder in ("results", "others", "run/results"):
        files |= {f"{folder}/summary.json": json.dumps(SUMMARY),
                  f"{folder}/metrics.jsonl": '{"video": "0000", "prompt": "x", "size": "5x32x32"}\n'}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).write_text(text)
    (root / "bytes").write_bytes(bytes(range(256)))
    sample.write_video(root / "videos" / "0000.mp4", torch.rand(5, 3, 32, 32), 8)
    shutil.copytree(root / "videos", root / "others" / "videos")
    (root / "video.mp4").symlink_to("videos/0000.mp4")
    (root / "cut.mp4").write_bytes((root / "video.mp4").read_bytes()[:200])
    (root / "lora").mkdir()
    for file, prefix in (("lora/lora", "transformer"), ("peft/adapter_model", "base_model.model")):
        layer = f"{prefix}.blocks.0.attn1.to_q"
        save_file({f"{layer}.lora_A.weight": torch.ones(2, 48), f"{layer}.lora_B.weight": torch.ones(48, 2)},
                  root / f"{file}.safetensors")


@pytest.fixture(scope="module")
def places(tmp_path_factory, checkpoint, twins):
    root = tmp_path_factory.mktemp("places")
    make_places(root, checkpoint, twins)
    return root


# -------------------------------------------------------------------------------------------------- the calls

class Hung(BaseException):
    """Nothing that a command catches."""


def hung(*_):
    raise Hung


def attack(row, root):
    """Makes the row's call in the working folder. -> exit status, what was written, the word to find"""
    main, base = COMMANDS[row.command]

    def path(text):
        return text.replace("@broken", f"{Path.cwd()}/broken").replace("@", f"{root}/")

    arguments = [*base, *row.arguments]
    if row.source:
        arguments = [argument.replace(f"@{row.source}", "@broken") for argument in arguments]
        shutil.copytree((root / row.source).resolve(), "broken", copy_function=os.symlink)
        new = Path("broken").absolute() / row.file
        new.unlink(missing_ok=True)
        if row.content:
            row.content(new, (root / row.source / row.file).resolve())
    before = set(Path().rglob("*"))
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(20)
    try:
        status = main([path(argument) for argument in arguments])
    except SystemExit as e:
        status = e.code
    finally:
        signal.alarm(0)
    return status, set(Path().rglob("*")) - before, path(row.word)


# What tells the mend: a sentence of ours has a clause for it or says what must be, argparse names the option.
MEND = re.compile("; |must |needs? |such as |error: (argument |un|the following arguments are required)")


def fault(status, written, word, stderr):
    """-> what is wrong with how a call was refused, or None. Reading stdin is an error under pytest."""
    last = (stderr.strip().splitlines() or [""])[-1]
    if status != 2:
        return f"exit status {status}: {last}"
    if word not in last or not MEND.search(last) or "Traceback" in stderr or len(last) > 1000:
        return f"no sentence with '{word}' and a mend: {last}"
    return f"wrote {sorted(map(str, written))}" if written else None


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_hostile_call_is_refused(row, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fault(*attack(row, places), capsys.readouterr().err) is None


@pytest.mark.parametrize("command, source, file", [
    ("sample", "wan", "tokenizer/tokenizer_config.json"), ("sample", "wan", "text_encoder/config.json"),
    *[("rewards", twin, f"{name}config.json")
      for twin in TWINS[1:] for name in ("", "processor_", "tokenizer_")]])
def test_no_code_of_a_model_folder_is_run(command, source, file, places, tmp_path, monkeypatch, capsys):
    """auto_map names classes of the folder: they are not imported, and nobody is asked."""
    monkeypatch.chdir(tmp_path)
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "evil.Evil")
    classes |= dict(AutoTokenizer=["evil.Evil", "evil.Evil"])

    def evil(new, old):
        new.with_name("evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
        new.write_text(json.dumps(json.loads(old.read_text()) | dict(
            auto_map=classes, model_type="evil", tokenizer_class="Evil", processor_class="Evil")))

    status, written, _ = attack(Row(command, [], "", source, file, evil), places)
    assert Path("marker") not in written
    assert "Traceback" not in capsys.readouterr().err
    assert status in (0, 2)


# --------------------------------------------------------------------------------------------- random configs

KINDS = (model.DiTConfig, model.VAEConfig, model.OriginalDiT, model.Scheduler, sample.Sampling,
         evaluation.Summary, evaluation.VideoRow, depth_anything.DA3Config, critics.Hpsv3Json, lora.PEFTScale,
         prompts.Line, weights.Index, report.Key, report.Answers, report.LogRow, train.Config,
         list[tuple[sample.Row, ...]], dict)
NAMES = sorted({name for kind in KINDS for name in getattr(kind, "__annotations__", ())})
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=3),
                      max_leaves=8)


CONFIGS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6) | VALUES | st.binary()


@given(st.sampled_from(KINDS), CONFIGS)
@settings(max_examples=500, deadline=None, database=None)
def test_a_random_config_is_read_or_refused_in_one_line(kind, value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    for read in (lambda: weights.from_json(text, kind, "x.json"),
                 lambda: weights.config_from(kind, weights.from_json(text, dict, "x.json"), "x.json")):
        try:
            read()
        except ValueError as e:
            assert str(e).startswith("x.json")
            assert len(str(e).splitlines()) == 1
            assert MEND.search(str(e))


# --------------------------------------------------------------------------------------- files, written whole

OLD, NEW = b"old" * 1000, [b"new" * 1000, b"er" * 1000]


def write_until(file, point, stop):
    """Writes NEW to the file; stop() is called at the point-th line that Python runs here or in weights.py on
    the way. -> whether the point was reached"""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename not in (weights.__file__, __file__):
            return None
        count += event == "line"
        if event == "line" and count == point:
            stop()
        return trace

    def write():
        with weights.written_whole(file) as part, open(part, "wb") as out:
            for piece in NEW:
                out.write(piece)
                out.flush()

    sys.settrace(trace)
    try:
        write()
    finally:
        sys.settrace(None)
    return count >= point


@pytest.mark.parametrize("before", [OLD, None], ids=["over a file", "a new file"])
def test_a_kill_at_any_line_leaves_the_old_file_or_the_new(before, tmp_path):
    file, left = tmp_path / "x.bin", []
    for point in range(1, 200):
        if before:
            file.write_bytes(before)
        else:
            file.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                write_until(file, point, lambda: os._exit(9))
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        left.append(file.read_bytes() if file.exists() else None)
        if not killed:
            break
    assert not killed
    # once there, it stays: the old one up to some line, from then on the new
    switch = left.index(b"".join(NEW))
    assert 10 < switch < len(left) - 3
    assert left == [before] * switch + [b"".join(NEW)] * (len(left) - switch)


def test_an_error_at_any_line_leaves_the_old_file_or_the_new_and_nothing_beside_it(tmp_path):
    def stop():
        raise KeyboardInterrupt

    file, reached, point = tmp_path / "x.bin", True, 0
    while reached:
        point += 1
        file.write_bytes(OLD)
        with contextlib.suppress(KeyboardInterrupt):
            reached = write_until(file, point, stop)
        assert file.read_bytes() in (OLD, b"".join(NEW))
        assert list(tmp_path.iterdir()) == [file]
    assert point > 15
