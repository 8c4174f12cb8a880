"""Hostile calls of every command: exit status 2, one sentence that names what is wrong, and nothing written.

A Row is a call. Arguments that begin with @ are files and folders of `places`; where a row breaks a file, the
folder around it is copied as links to @broken, and the file replaced.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import short_run
from safetensors.torch import load_file, save_file

import ablate
import bench
import depth_anything
import eval as eval_
import model
import noise_warp
import report
import rewards
import sample
import train
import walkthrough
import weights
from critics import Hpsv3Json
from lora import PEFTScale
from prompts import Line
from tiny import __main__ as tiny

COMMANDS = dict(sample=sample, train=train, eval=eval_, rewards=rewards, report=report, ablate=ablate,
                noise_warp=noise_warp, depth=depth_anything, bench=bench, walkthrough=walkthrough, tiny=tiny)
JUDGES = ["--depth-anything", "@twins/depth_anything", "--critic", "@twins/qwen3_vl", "--preference", "@twins/hpsv3"]
BASE = dict(
    sample=["push_in a box", "--model", "@wan"],
    train=[*short_run(Path("@wan"), Path("@twins")), "--prompts", "@prompts.jsonl"],
    eval=["metrics", "--model", "@wan", "--prompts", "@prompts.jsonl", "--num", "1", *JUDGES],
    table=["table", "--runs", "a=@results", "b=@broken"],
    rewards=["@video.mp4", "push_in a box", "--out", "x.png", *JUDGES],
    depth=["@video.mp4", "--model", "@twins/depth_anything", "--out", "x"],
    noise_warp=["push_in"],
    ablate=["run", "full", "--model", "@wan"],
    bench=["--estimate", "small"],
    walkthrough=["push_in a box"])
# A sentence of ours says what to do, or what would be right.
MEND = re.compile(r"; |: |must |needs? |give |expected |choose ")


@dataclass
class Row:
    command: str
    arguments: list
    word: str  # what the message must name
    source: str = ""  # the place that is copied to @broken, with its `file` replaced ...
    file: str = ""
    content: object = None  # ... by bytes, or by what a function of (new file, old file) makes; None: removed

    def __str__(self):
        what = f" {self.source}/{self.file} {getattr(self.content, '__name__', '')}" if self.source else ""
        return f"{self.command} {' '.join(self.arguments[-2:])[:60]}{what}"


# ------------------------------------------------------------------------------------------ numbers and words

BAD_NUMBERS = ("0", "-1", "nan", "inf", "-inf", "1e99", "", "many")


def bad_numbers(command, base, options, fine):
    """Every option with every bad number, but the calls that are fine."""
    return [Row(command, [*base, f"{option}={value}"], option)
            for option in options for value in BAD_NUMBERS if f"{option}={value}" not in fine]


FINE_TRAIN = [f"--{name}={value}" for name, values in {
    "guidance strength degradation traj-alpha traj-beta general-center max-masked lr decay beta1 beta2 weight-decay "
    "clip kl adv-clip grad-clip max-skipped lora-alpha ema-decay dynamic-steps eval-every meta recon traj general": "0",
    "seed": "0 -1", "general-center": "0 -1",
    "strength lora-alpha": "-1",
    "guidance strength traj-alpha traj-beta general-center general-spread lr weight-decay clip kl adv-clip "
    "grad-clip lora-alpha timeout meta recon traj general": "1e99",
}.items() for name in name.split() for value in values.split()]


def train_numbers():
    """Training's own numeric options, less the numbers within their range."""
    fields = [f for f in dataclasses.fields(train.Config) if re.search("int|float", str(f.type))]
    options = ["--" + f.name.replace("_", "-") for f in fields] + [f"--{term}" for term in rewards.TERMS]
    return bad_numbers("train", BASE["train"], options, FINE_TRAIN)


NUMBERS = [
    *train_numbers(),
    *bad_numbers("sample", BASE["sample"],
                 ["--num", "--frames", "--height", "--width", "--steps", "--guidance", "--shift", "--strength",
                  "--degradation"],
                 ["--guidance=0", "--strength=0", "--degradation=0"]),
    *bad_numbers("eval", BASE["eval"], ["--num", "--frames", "--views"], []),
    *bad_numbers("rewards", BASE["rewards"], ["--views"], []),
    *bad_numbers("depth", BASE["depth"], ["--views"], []),
    *bad_numbers("noise_warp", BASE["noise_warp"], ["--frames"], []),
    *bad_numbers("ablate", BASE["ablate"], ["--num", "--processes"], []),
    *bad_numbers("bench", [], ["--repeat"], []),
    *bad_numbers("bench", BASE["bench"], ["--gpus"], []),
    *bad_numbers("tiny", ["probe"], ["--num", "--frames", "--steps", "--guidance", "--shift", "--strength",
                                     "--degradation"],
                 ["--guidance=0", "--strength=0", "--degradation=0"]),
    *bad_numbers("tiny", ["compare"], ["--num", "--frames"], []),
    *bad_numbers("tiny", ["score-vae"], ["--num"], []),
    *bad_numbers("tiny", ["score-depth"], ["--num"], []),
    *bad_numbers("tiny", ["validate"], ["--num", "--views"], []),
    *bad_numbers("tiny", ["vae"], ["--minutes"], []),
    *bad_numbers("tiny", ["data"], ["--clips"], []),
]


# ----------------------------------------------------------------------------------------- arguments by hand

BY_HAND = [
    # what cannot be a prompt, a device, a file to write
    *[Row(command, [prompt, *BASE[command][1:]], word)
      for command in ("sample", "noise_warp")
      for prompt, word in (("", "empty"), (" \n\t ", "empty"), ("push_in\x00a", "control character"),
                           ("push_in \x1b[2J", "control character"), ("\ud800", "control character"),
                           ("a" * 180_000, "180000 characters"))],
    *[Row("rewards", ["@video.mp4", prompt], word)
      for prompt, word in (("", "empty"), ("a\x07", "control character"), ("b" * 180_000, "180000"))],
    Row("walkthrough", [""], "empty"),
    *[Row(command, [*BASE[command], "--device", device], "--device")
      for command in ("sample", "train", "eval", "rewards", "depth")
      for device in ("gpu", "meta", "cuda:99", "cpu:x", "mps")],
    *[Row(command, [*BASE[command], "--out", out], "--out")
      for command in ("sample", "rewards")
      for out in ("", "x", "x.gif", "@link", "@plain_file/x.mp4", "@plain_file/x.png", "/proc/x.mp4", "x" * 300 + ".mp4")],
    *[Row(command, [*BASE[command], "--out", out], out)
      for command in ("eval", "depth") for out in ("@plain_file", "@plain_file/x", "/proc/x")],
    *[Row("report", ["study", "--a", "@videos", "--b", "@videos", "--out", out], out)
      for out in ("@plain_file", "@plain_file/x", "/proc/x", "@videos")],
    *[Row("noise_warp", ["push_in", "--show", out], word)
      for out, word in (("@plain_file/x.png", "@plain_file/x.png"), ("/proc/x.png", "/proc/x.png"), ("@link", "@link"),
                        ("x.nonsense", "x.nonsense"), ("", "--show"))],
    *[Row("walkthrough", ["push_in", "--out", out], word)
      for out, word in (("@plain_file/x.html", "@plain_file/x.html"), ("/proc/x", "/proc/x"), ("@link", "@link"))],
    *[Row("ablate", [*BASE["ablate"], "--out", out], out) for out in ("@plain_file", "@plain_file/x", "/proc/x")],
    *[Row("train", [*BASE["train"], "--name", name], "--name")
      for name in ("", "a/b", "..", ".x", "/tmp/x", "a/")],
    *[Row("train", [*BASE["train"], "--runs", runs], word)
      for runs, word in (("@plain_file", "@plain_file"), ("/proc/x", "/proc/x"))],
    # options that are none, words that are none, and what does not fit together
    *[Row(command, [*BASE[command], "--nonsense=1"], "--nonsense") for command in BASE],
    *[Row(command, [*BASE[command], option, "nonsense"], option)
      for command, option in (("sample", "--solver"), ("sample", "--dtype"), ("train", "--sde"),
                              ("train", "--lpips"), ("train", "--parallel"), ("train", "--dtype"),
                              ("train", "--preset"), ("eval", "--split"), ("eval", "--lpips"),
                              ("rewards", "--lpips"))],
    *[Row(command, [], word)
      for command, word in (("sample", "prompt"), ("eval", "command"), ("report", "command"),
                            ("ablate", "command"), ("tiny", "COMMAND"), ("rewards", "video"),
                            ("depth", "video"), ("walkthrough", "prompt"))],
    *[Row("sample", [*BASE["sample"], *options.split()], word) for options, word in (
        ("--released --no-transport", "--released"), ("--frames 6", "--frames"), ("--height 24", "--height"),
        ("--width 33", "--width"), ("--num 1000 --frames 9997 --height 9984 --width 9984", "--num"),
        ("--frames 9997 --height 9984 --width 9984", "--frames"))],
    *[Row("train", [*BASE["train"], *options.split()], word) for options, word in (
        ("--frames 6", "--frames"), ("--height 24", "--height"), ("--batch 3", "--batch"),
        ("--updates 3", "--updates"), ("--eta 0", "--eta"), ("--window 99", "window"), ("--lora @nowhere", "@nowhere"),
        ("--parallel fsdp --shard-size 7 --updates 3", "--updates"))],
    Row("eval", ["metrics", "--videos", "@videos"], "--prompts"),
    Row("eval", ["metrics", "--videos", "@wan", "--prompts", "@prompts.jsonl"], "@wan"),
    Row("eval", ["metrics", "--videos", "@nowhere", "--prompts", "@prompts.jsonl"], "@nowhere"),
    Row("eval", [*BASE["eval"], "--split", "dynamic", "--prompts", "@train.txt"], "train.txt"),
    *[Row("eval", ["table", "--runs", *runs], word)
      for runs, word in ((["x"], "LABEL=FOLDER"), (["a=@nowhere"], "@nowhere"), (["a=@plain_file"], "@plain_file"),
                         (["a="], "summary.json"), (["a=@results", "a=@results"], "twice"))],
    *[Row("report", arguments, word) for arguments, word in (
        (["run", "@nowhere"], "@nowhere"), (["run", "@plain_file"], "@plain_file"), (["run", "@wan"], "@wan"), (["run", ""], "run"),
        (["study", "--a", "@nowhere", "--b", "@videos"], "@nowhere"), (["study", "--a", "@wan", "--b", "@videos"], "@wan"),
        (["score", "@nowhere"], "study"), (["score", "@nowhere", "--out", "@study"], "@nowhere"))],
    *[Row("bench", arguments, word) for arguments, word in (
        (["--estimate", "tiny"], "--estimate"), (["nonsense"], "nonsense"),
        (["--estimate", "small", "--with", "--full"], "--full"),
        (["--estimate", "small", "--with", "--lr", "nan"], "--lr"),
        (["--estimate", "small", "--with", "--nonsense"], "--nonsense"),)],
    *[Row("tiny", arguments, word) for arguments, word in (
        (["nonsense"], "nonsense"), (["probe", "--model", "@nowhere"], "@nowhere"), (["probe", "--lora", "@nowhere"], "@nowhere"),
        (["probe", "--probe", "@nowhere"], "@nowhere"), (["probe", "--prompts", "@nowhere"], "@nowhere"),
        (["probe", "--rendered", "--prompts", "@prompts.jsonl"], "--rendered"),
        (["probe", "--frames", "6"], "--frames"), (["compare", "--model", "@twins/depth_anything"], "depth_anything"),
        (["score-vae", "--model", "@nowhere"], "@nowhere"), (["score-depth", "--model", "@wan"], "@wan"),
        (["captions", "--out", "@link"], "@link"), (["captions", "--out", "@plain_file/x"], "@plain_file/x"),
        (["show", "--run", "@plain_file"], "@plain_file"), (["export", "--run", "@nowhere"], "@nowhere"),
        (["dit", "--run", "@nowhere"], "@nowhere"), (["data", "--run", "@nowhere"], "@nowhere"),
        (["validate", "--critic", "@wan"], "@wan"), (["vae", "--minutes", "1", "--run", "@plain_file"], "@plain_file"))],
    *[Row("ablate", arguments, word) for arguments, word in (
        (["run"], "CELL"), (["run", "nonsense"], "CELL"), (["run", "full", "--lr", "nan"], "--lr"),
        (["run", "full", "--frames", "6"], "--frames"), (["table", "--page", "@nowhere"], "@nowhere"),
        (["table", "--page", "@plain_file"], "@plain_file"), (["table", "--page", "@a_fifo"], "@a_fifo"),
        (["table", "x"], "x"))],
]

# ---------------------------------------------------------------------------------- files of the wrong kind

FOLDERS = ("@wan", "@twins/depth_anything", "@twins/qwen3_vl", "@twins/hpsv3", "@plain_file", "@hollow", "@nowhere", "@a_fifo", "", "a/b/c")


def wrong_kinds(command, option, right):
    """The option with every folder but the right one."""
    return [Row(command, [*BASE[command], option, folder], folder or "''")
            for folder in FOLDERS if folder != right]


# What is read of a prompt file, where a command takes one.
PROMPT_FILES = ("@nowhere", "@hollow.txt", "@noise.bin", "@a_fifo", "@hollow", "@split.jsonl", "@long.jsonl", "@list.jsonl",
                "@deep.jsonl", "@null.jsonl", "@wan")
WRONG_KINDS = [
    *wrong_kinds("sample", "--model", "@wan"),
    *wrong_kinds("sample", "--lora", ""),
    *wrong_kinds("train", "--depth-anything", "@twins/depth_anything"),
    *wrong_kinds("train", "--critic", "@twins/qwen3_vl"),
    *wrong_kinds("train", "--preference", "@twins/hpsv3"),
    *wrong_kinds("eval", "--model", "@wan"),
    *wrong_kinds("rewards", "--critic", "@twins/qwen3_vl"),
    *wrong_kinds("depth", "--model", "@twins/depth_anything"),
    *[Row(command, [*BASE[command], "--prompts", file], file)
      for command in ("train", "eval") for file in PROMPT_FILES],
    *[Row("tiny", ["probe", "--prompts", file], file) for file in PROMPT_FILES],
    *[Row(command, [video, *BASE[command][1:]], video)
      for command in ("rewards", "depth")
      for video in ("@nowhere", "@hollow", "@noise.bin", "@a_fifo", "@hollow.txt", "@cut.mp4", "@wan")],
    *[Row("sample", [*BASE["sample"], "--path", file], file)
      for file in ("@nowhere", "@a_fifo", "@wan", *(f"@path_{i}.json" for i in range(7)))],
]

# ------------------------------------------------------------------------------------------------ broken JSON

def as_constant(name, value):
    def content(new, old):
        new.write_bytes(value)

    content.__name__ = name
    return content


def cut(new, old):
    new.write_bytes(old.read_bytes()[:old.stat().st_size // 2])


def fifo(new, old):
    os.mkfifo(new)


def folder(new, old):
    new.mkdir()


def entry(**values):
    """The JSON of the old file with these entries."""
    def content(new, old):
        new.write_text(json.dumps(json.loads(old.read_text()) | values))

    content.__name__ = str(values)[:60]
    return content


CONSTANTS = dict(list=b"[]", null=b"null", text=b'"x"', number=b"1e999", nan=b'{"a": NaN}', deep=b"[" * 10 ** 5,
                 long=b"1" * 10 ** 4, binary=bytes(range(256)), empty=b"", object=b"{}", utf16='{"a":1}'.encode("utf-16"))
NO_JSON = [as_constant(name, value) for name, value in CONSTANTS.items()] + [cut, folder, fifo]


def broken_files(command, source, files, fine=(), contents=NO_JSON, word=None):
    """Every file broken in every way; fine: those that may hold any object. Where it says something else than
    its folder's other files, either can be the wrong one, so that the folder is named."""
    return [Row(command, arguments_of(command, source),
                word or ("@broken" if content.__name__ == "object" else Path(file).name), source, file, content)
            for file in files for content in contents
            if not (file in fine and content.__name__ == "object")]


def arguments_of(command, source):
    return ["@broken" + a.removeprefix("@" + source) if a.startswith("@" + source) else a for a in BASE[command]]


def broken_entries(command, source, file, *entries):
    return [Row(command, arguments_of(command, source), "@broken", source, file, entry(**values))
            for values in entries]


JSON = [
    *broken_files("sample", "wan", ["sampling.json", "scheduler/scheduler_config.json"],
                  fine=["sampling.json", "scheduler/scheduler_config.json"]),
    *broken_files("sample", "wan", ["transformer/config.json", "vae/config.json", "text_encoder/config.json"]),
    *broken_files("sample", "wan", ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"], word="tokenizer"),
    *broken_files("train", "wan", ["sampling.json"], contents=[NO_JSON[0], cut, fifo]),
    *broken_files("depth", "twins/depth_anything", ["config.json"]),
    *broken_entries("sample", "wan", "sampling.json", dict(frames=6), dict(frames="5"), dict(height=0),
                    dict(width=10 ** 30), dict(steps=-1), dict(steps=True), dict(guidance=[]), dict(shift=0),
                    dict(fps=0), dict(degradation=2), dict(guidance=1e300), dict(steps=2.5)),
    *broken_entries("sample", "wan", "scheduler/scheduler_config.json", dict(shift=0, flow_shift=0),
                    dict(flow_shift="3"), dict(flow_shift=-1), dict(flow_shift=1e300), dict(flow_shift=[])),
    *broken_entries("sample", "wan", "transformer/config.json", dict(num_layers=10 ** 9), dict(num_layers=0),
                    dict(num_attention_heads="2"), dict(attention_head_dim=25), dict(ffn_dim=10 ** 6),
                    dict(in_channels=-4), dict(text_dim=10 ** 5), dict(patch_size=[1, 2]), dict(patch_size=[0, 2, 2]),
                    dict(freq_dim=255), dict(num_layers=10 ** 40)),
    *broken_entries("sample", "wan", "vae/config.json", dict(z_dim=10 ** 5), dict(base_dim="x"), dict(dim_mult=[]),
                    dict(latents_mean=[0]), dict(latents_std=[0, 0, 0, 0]), dict(latents_std=["a"] * 4),
                    dict(num_res_blocks=10 ** 6), dict(temperal_downsample=[True]), dict(dim_mult=[10 ** 6] * 4)),
    *broken_entries("sample", "wan", "text_encoder/config.json", dict(d_model=10 ** 9), dict(num_layers=10 ** 6),
                    dict(vocab_size=-1), dict(num_heads=0), dict(d_ff="x"), dict(dense_act_fn="x"),
                    dict(d_kv=[]), dict(vocab_size=10 ** 18), dict(layer_norm_epsilon="x")),
    *broken_entries("depth", "twins/depth_anything", "config.json", dict(dim=0), dict(depth=10 ** 9), dict(heads=7),
                    dict(out_layers=[]), dict(out_layers=[9, 1]), dict(process_res=10 ** 5), dict(dim="x"),
                    dict(process_res=0)),
    *broken_files("train", "twins/qwen3_vl", ["config.json", "tokenizer.json", "processor_config.json"],
                  contents=[*NO_JSON[:5], *NO_JSON[7:10], cut, fifo], word="@broken"),
    *broken_files("train", "twins/hpsv3", ["config.json", "hpsv3.json"],
                  contents=[*NO_JSON[:5], *NO_JSON[7:9], cut, fifo], word="@broken"),
    *broken_files("train", "twins/qwen3_vl", ["chat_template.jinja"],
                  contents=[None, fifo, folder, cut], word="@broken"),
    *broken_files("train", "twins/hpsv3", ["tokenizer.json", "processor_config.json", "chat_template.jinja"],
                  contents=[None, fifo, folder, cut], word="@broken"),
    *broken_entries("train", "twins/hpsv3", "hpsv3.json", dict(instruction="x"), dict(spread=0), dict(image_pixels="x"),
                    dict(center=None), dict(image_pixels=10 ** 9)),
]

# ---------------------------------------------------------------------------------------------- broken weights

def with_tensors(name, change):
    """The file's tensors, changed."""
    def content(new, old):
        tensors = load_file(old)
        change(tensors)
        save_file(tensors, new)

    content.__name__ = name
    return content


def first(tensors):
    """The name of a matrix."""
    return next(name for name in sorted(tensors) if tensors[name].dim() > 1)


BROKEN_WEIGHTS = [
    cut, fifo, folder, None,
    as_constant("empty", b""),
    as_constant("huge header", b"\xff" * 8 + b"{}"),
    as_constant("pickle", b"\x80\x04cos\nsystem\n(S'touch marker'\ntR."),
    with_tensors("NaN", lambda t: t[first(t)].view(-1)[:1].fill_(torch.nan)),
    with_tensors("infinity", lambda t: t[first(t)].view(-1)[-1:].fill_(torch.inf)),
    with_tensors("integer", lambda t: t.update({first(t): t[first(t)].int()})),
    with_tensors("extra", lambda t: t.update({"zz.extra": torch.zeros(2)})),
    with_tensors("missing", lambda t: t.pop(first(t))),
    with_tensors("shape", lambda t: t.update({first(t): t[first(t)][1:].clone()})),
    with_tensors("none", dict.clear),
]
DIT = "transformer/diffusion_pytorch_model.safetensors"
WEIGHTS = [
    *broken_files("sample", "wan", [DIT], contents=BROKEN_WEIGHTS, word="diffusion_pytorch_model"),
    *broken_files("sample", "wan", [DIT + ".index.json"], word="@broken/transformer",
                  contents=[*NO_JSON[:-3], folder, fifo, *[as_constant(name, json.dumps(dict(weight_map={"a": name})).encode())
                                        for name in ("../x.safetensors", "/etc/passwd", "a/b", "", "..", "@nowhere")]]),
    *broken_files("sample", "wan", ["vae/diffusion_pytorch_model.safetensors"], contents=BROKEN_WEIGHTS,
                  word="diffusion_pytorch_model"),
    *broken_files("sample", "wan", ["text_encoder/model.safetensors"], contents=BROKEN_WEIGHTS, word="model.safetensors"),
    *broken_files("depth", "twins/depth_anything", ["model.safetensors"], contents=BROKEN_WEIGHTS,
                  word="model.safetensors"),
    *broken_files("train", "twins/qwen3_vl", ["model.safetensors"], contents=BROKEN_WEIGHTS, word="@broken"),
    *broken_files("train", "twins/hpsv3", ["HPSv3.safetensors"], contents=BROKEN_WEIGHTS, word="HPSv3.safetensors"),
    # adapters
    *[Row("sample", [*BASE["sample"], "--lora", "@broken/lora.safetensors"], "lora.safetensors", "lora",
          "lora.safetensors", content) for content in [
              *BROKEN_WEIGHTS[:10], *BROKEN_WEIGHTS[11:],
              with_tensors("unknown key", lambda t: t.update({"transformer.x.lora_A.weight": torch.ones(1, 2)})),
              with_tensors("DoRA", lambda t: t.update({first(t)[:-13] + "lora_magnitude": torch.ones(2)})),
              with_tensors("rank 0", lambda t: t.update({k: v[:0].clone() if "lora_A" in k else v[:, :0].clone()
                                                         for k, v in t.items()}))]],
    *[Row("sample", [*BASE["sample"], "--lora", "@broken"], "adapter_config.json" if not isinstance(content, str)
          else content, "peft", "adapter_config.json", content) for content in NO_JSON if content.__name__ not in
      ("object", "nan")],
    *[Row("sample", [*BASE["sample"], "--lora", "@broken"], next(iter(values)), "peft", "adapter_config.json",
          entry(**values)) for values in (dict(use_dora=True), dict(peft_type="LOKR"), dict(r="x"), dict(r=0),
                                          dict(lora_alpha=[]), dict(init_lora_weights="pissa"),
                                          dict(rank_pattern=[]))],
]

# --------------------------------------------------------------------------------- runs, results and answers

def lines(*rows):
    return as_constant(str(rows)[:60], "".join(row + "\n" for row in rows).encode())


BASE |= dict(report=["run", "@run"], score=["score", "@study/answers.json", "--out", "@study"])
COMMANDS |= dict(table=eval_, score=report)
OWN_FILES = [
    *broken_files("report", "run", ["config.json"], fine=["config.json"]),
    *broken_entries("report", "run", "config.json", dict(groups="x"), dict(weights=[]), dict(frames="x"),
                    dict(model=3), dict(seed=None, groups=[])),
    *[Row("report", ["run", "@broken"], "metrics.jsonl", "run", "metrics.jsonl", content)
      for content in (None, *NO_JSON, lines('{"step": "x"}'), lines('{"step": 0, "total": "x"}'), lines('{"total": 1}'),
                      lines('{"step": 0, "grad": 3}'), lines('{"step": NaN}'))],
    *[Row("report", ["run", "@broken"], "eval.jsonl", "run", "eval.jsonl", content)
      for content in (*NO_JSON[:8], NO_JSON[10], fifo, folder, lines('{"step": "x"}'), lines("[1]"))],
    *[Row("report", ["run", "@broken"], "summary.json", "run", "results/summary.json", content) for content in NO_JSON],
    *[Row("table", BASE["table"], "summary.json", "results", "summary.json", content) for content in (None, *NO_JSON)],
    *[Row("table", BASE["table"], "summary.json", "results", "summary.json", entry(**values)) for values in
      (dict(videos="x"), dict(sizes=3), dict(seed=None), dict(summary=[]), dict(summary=dict(psnr=[1])),
       dict(summary=dict(vbench=[1, 2, 3])), dict(failed_terms=[]), dict(summary=dict(vbench=dict(AVG="x"))))],
    *[Row("table", BASE["table"], "metrics.jsonl", "results", "metrics.jsonl", content)
      for content in (None, *NO_JSON[:8], NO_JSON[10], fifo, folder, lines('{"psnr": "x"}'), lines('{"video": 3}'))],
    *[Row("score", arguments_of("score", "study"), file, "study", file, content)
      for file in ("study_key.json", "answers.json") for content in NO_JSON],
    *[Row("score", arguments_of("score", "study"), file, "study", file, entry(**values)) for file, values in (
        ("study_key.json", dict(pairs=3)), ("study_key.json", dict(pairs=[{"a": "c"}])), ("study_key.json", dict(study=1)),
        ("answers.json", dict(answers=3)), ("answers.json", dict(participant=[])))],
    *[Row("score", arguments_of("score", "study"), "no answer", "study", "answers.json", entry(**values))
      for values in (dict(study="another"), dict(answers=[]), dict(answers=[None, 3, "x", {}, {"pair": 10 ** 30}]),
                     dict(answers=[{"pair": 0, "left": "x", "right": "y"}]))],
]

# ------------------------------------------------------------------------------------------------- the places

POSE = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
PATHS = [[], [POSE] * 4, [POSE[:3]] * 5, "x", [[[2, 0, 0, 0], *POSE[1:]]] * 5, [[*POSE[:3], [0, 0, 0, 2]]] * 5,
         [[[1, 0, 0, 1e9], *POSE[1:]]] * 5]


def make_places(root, checkpoint, twins):
    """Fills the folder that @ stands for."""
    (root / "wan").symlink_to(checkpoint)
    (root / "twins").symlink_to(twins)
    for name in ("hollow", "videos", "run", "results", "study", "lora", "peft"):
        (root / name).mkdir()
    os.mkfifo(root / "a_fifo")
    (root / "link").symlink_to("hollow")
    files = {
        "plain_file": b"x",
        "noise.bin": bytes(range(256)),
        "hollow.txt": b"",
        "train.txt": b"push_in a box\npan_left a ball\n",
        "prompts.jsonl": b'{"prompt": "push_in a box"}\n{"prompt": "pan_left", "split": "test"}\n'
                         b'{"prompt": "static, a ball", "split": "dynamic"}\n',
        "split.jsonl": b'{"prompt": "push_in", "split": "tests"}\n',
        "long.jsonl": json.dumps(dict(prompt="a" * 180_000)).encode(),
        "list.jsonl": b"[]\n",
        "deep.jsonl": b"[" * 10 ** 5,
        "null.jsonl": b'{"prompt": null}\n',
        "run/metrics.jsonl": b'{"step": 0, "total": 1.0}\n',
        "run/eval.jsonl": b'{"step": 0, "total": 1.0}\n',
        "run/config.json": json.dumps(dict(name="run")).encode(),
        "results/metrics.jsonl": b'{"video": "0000", "prompt": "x", "size": "5x32x32", "psnr": 1.0}\n',
        "results/summary.json": json.dumps(dict(videos=1, failed=0, sizes=["5x32x32"], seed=0, lpips="x",
                                                summary=dict(psnr=[1, 1, 1], vbench="not measured"))).encode(),
        "study/study_key.json": json.dumps(dict(study="s", a="a", b="b", pairs=[{"x.mp4": "a", "y.mp4": "b"}])).encode(),
        "study/answers.json": json.dumps(dict(study="s", participant="p", answers=[])).encode(),
    }
    files |= {f"path_{i}.json": json.dumps(path).encode() for i, path in enumerate(PATHS)}
    for name, value in files.items():
        (root / name).write_bytes(value)
    shutil.copytree(root / "results", root / "run" / "results")
    sample.write_video(root / "videos" / "0000.mp4", torch.rand(5, 3, 32, 32), 8)
    shutil.copyfile(root / "videos" / "0000.mp4", root / "video.mp4")
    (root / "cut.mp4").write_bytes((root / "video.mp4").read_bytes()[:200])
    pair = {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 48), "blocks.0.attn1.to_q.lora_B.weight": torch.ones(48, 2)}
    save_file({f"transformer.{key}": value for key, value in pair.items()}, root / "lora" / "lora.safetensors")
    save_file({f"base_model.model.{key}": value for key, value in pair.items()},
              root / "peft" / "adapter_model.safetensors")
    (root / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')


@pytest.fixture(scope="module")
def places(tmp_path_factory, checkpoint, twins):
    root = tmp_path_factory.mktemp("places")
    make_places(root, checkpoint, twins)
    return root


# --------------------------------------------------------------------------------------------------- the calls

class Hung(BaseException):
    """Nothing that a command catches."""


def hung(*_):
    raise Hung


def attack(row, root):
    """Makes the row's call in the working folder. -> exit status, what was written, the words to find"""
    if row.source:
        source = Path(shutil.copytree((root / row.source).resolve(), "broken", copy_function=os.symlink))
        new = source.absolute() / row.file
        new.unlink(missing_ok=True)
        if row.content:
            row.content(new, (root / row.source / row.file).resolve())

    def path(text):
        return text.replace("@broken", f"{Path.cwd()}/broken").replace("@", f"{root}/")

    before = set(Path().rglob("*"))
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(20)
    try:
        status = COMMANDS[row.command].main([path(argument) for argument in row.arguments])
    except SystemExit as e:
        status = e.code
    finally:
        signal.alarm(0)
    return status, set(Path().rglob("*")) - before, path(row.word)


def problem(row, status, written, word, stderr):
    """-> what is wrong with how a call was refused, or None."""
    last = (stderr.strip().splitlines() or [""])[-1]
    if status != 2:
        return f"exit status {status}: {last}"
    if word not in last or not MEND.search(last) or "Traceback" in stderr or len(last) > 900:
        return f"no sentence with '{word}' and a mend: {last}"
    if written:
        return f"wrote {sorted(map(str, written))}"
    return None


ROWS = [*NUMBERS, *BY_HAND, *WRONG_KINDS, *JSON, *WEIGHTS, *OWN_FILES]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_hostile_call_is_refused(row, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, written, word = attack(row, places)
    assert problem(row, status, written, word, capsys.readouterr().err) is None


def test_no_code_of_a_model_folder_is_run_and_nobody_is_asked(places, tmp_path, monkeypatch, capsys):
    """auto_map names classes in the folder: they are not imported, and there is no question on stdin."""
    monkeypatch.chdir(tmp_path)
    evil = f"open({str(tmp_path / 'marker')!r}, 'w')\n"
    for source, command, files in (("wan", "sample", ["tokenizer/tokenizer_config.json", "text_encoder/config.json"]),
                                   ("twins/qwen3_vl", "train", ["config.json", "processor_config.json"])):
        for file in files:
            copy = Path(shutil.copytree((places / source).resolve(), f"{command}_{Path(file).name}"))
            own = json.loads((copy / file).read_text())
            classes = dict.fromkeys(("AutoTokenizer", "AutoProcessor", "AutoConfig", "AutoModel"), "evil.Evil")
            classes["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
            own |= dict(auto_map=classes, tokenizer_class="Evil", processor_class="Evil", model_type="evil")
            (copy / file).write_text(json.dumps(own))
            (copy / file).with_name("evil.py").write_text(evil)
            arguments = [a.replace(f"@{source}", str(copy)).replace("@", f"{places}/") for a in BASE[command]]
            status = COMMANDS[command].main(arguments)
            assert not (tmp_path / "marker").exists()
            assert "Traceback" not in capsys.readouterr().err
            assert status in (0, 2)


# --------------------------------------------------------------------------------------------- random configs

KINDS = (model.DiTConfig, model.VAEConfig, model.OriginalDiT, model.Scheduler, sample.Sampling, eval_.Summary,
         depth_anything.DA3Config, Hpsv3Json, PEFTScale, Line, weights.Index, report.Key, report.Answers,
         report.LogRow, eval_.VideoRow, train.Config, list[tuple[sample.Row, ...]], dict)
NAMES = sorted({name for kind in KINDS for name in getattr(kind, "__annotations__", ())})
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=3),
                      max_leaves=8)


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6) | VALUES | st.binary())
@settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
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

def write_until(file, point, stop):
    """Writes `new` to the file in three parts; stop() is called at the point-th line that Python runs on the
    way. -> whether the point was reached"""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        ours = frame.f_code.co_filename in (weights.__file__, __file__)
        if ours and event == "line":
            count += 1
            if count == point:
                stop()
        return trace if ours else None

    def work():
        with weights.written_whole(file) as part, open(part, "wb") as out:
            for piece in NEW:
                out.write(piece)
                out.flush()

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count >= point


OLD, NEW = b"old" * 1000, [b"new" * 1000, b"er" * 1000, b"est" * 1000]


@pytest.mark.parametrize("before", [OLD, None], ids=["over a file", "a new file"])
def test_a_kill_at_any_line_leaves_the_old_file_or_the_new(before, tmp_path):
    left = set()
    for point in range(1, 200):
        folder = tmp_path / str(point)
        folder.mkdir()
        file = folder / "x.bin"
        if before:
            file.write_bytes(before)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                write_until(file, point, lambda: os._exit(9))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = file.read_bytes() if file.exists() else None
        assert found in (before, b"".join(NEW))
        left.add(found)
        if status == 0:
            break
    assert status == 0
    assert point > 15
    assert left == {before, b"".join(NEW)}


def test_an_error_at_any_line_leaves_the_old_file_or_the_new_and_no_part(tmp_path):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    file = tmp_path / "x.bin"
    for point in range(1, 200):
        file.write_bytes(OLD)
        reached = True
        with contextlib.suppress(Stop):
            reached = write_until(file, point, stop)
        assert file.read_bytes() in (OLD, b"".join(NEW))
        file.unlink()
        leftover = sorted(tmp_path.iterdir())
        print(point, leftover)
        for part in leftover:
            part.unlink()
        if not reached:
            break
    assert not reached
