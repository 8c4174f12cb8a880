"""Pages to look at: the report of a training run, and a blind pairwise study.

    python report.py run runs/first                      writes runs/first/report.html, self-contained
    python report.py study --a DIR --b DIR --out study   writes study/page/ to give out; study_key.json stays
    python report.py score answers/*.json --out study    prints win rates and agreement of downloaded answers

The report holds the training's curves, test prompts before and after with re-renders, meta-views and camera
paths, and the tables of the results folders inside the run (python eval.py metrics --out runs/NAME/...). The
study shows videos of the same name from two folders side by side without saying which is which, as in the
paper's user study.

Plain HTML, CSS and a little script: both work from a file, without network, in light and dark, by keyboard.
"""

import base64
import html
import io
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

import imageio.v3 as iio
import matplotlib
import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from eval import (ALONE_SHARE, VideoRow, alarms, decided_alone, interval, new_folder, read_lines,
                  read_summary, table, videos_in)
from noise_warp import camera_path, draw_paths, parse_motion
from rewards import TERMS, paths_in_depths
from run import in_words, missing_steps
from sample import as_bytes, check_device, read_video, write_video
from train import Config, rewards_for
from weights import as_command, command_line, config_from, read_bytes, read_json, write_json, write_text

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --soft: #5c6670; --paper: #fbfaf7; --line: #d8d5cc; --focus: #2563a8;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --soft: #a2a8ae; --paper: #16181b; --line: #3a3e44; --focus: #7db4ee }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 1.2rem; max-width: 70rem;
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
}
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
p.warning { padding-left: .8rem; border-left: .3rem solid #d0663f }
p.note, figcaption { color: var(--soft); font-size: .88rem }
figure { margin: 0 }
video, img {
  width: 100%; display: block; image-rendering: pixelated;
  border: 1px solid var(--line); background: #000;
}
svg { width: 100%; height: auto }
svg text { fill: var(--soft) !important }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)) }
.pair { display: grid; gap: .5rem; margin: 1rem 0; grid-template-columns: 1fr 1fr }
.four { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
fieldset { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; padding: .6rem 1rem }
label { display: inline-block; padding: .3rem 1.2rem .3rem 0; cursor: pointer }
button {
  font: inherit; padding: .5rem 1.1rem; border: 1px solid var(--ink); border-radius: .4rem;
  background: none; color: inherit; cursor: pointer;
}
button:disabled { opacity: .4; cursor: default }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def write_page(file, title, body, script, style=STYLE):
    write_text(file, PAGE.format(title=html.escape(title), style=style, body=body, script=script))


# --------------------------------------------------------------------------------------------------- pictures

GREY = "#808080"  # of axes: legible on a light page and on a dark one; text has the page's colours
CHART_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 8, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "legend.framealpha": 0,
    "axes.prop_cycle": matplotlib.cycler(color=["#3f87c9", "#d0663f", "#4b9a5f", "#9a6fc4"]),
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # it would name web addresses
LIMIT = 1e30  # of what a chart can show


def inline_svg(size, description, draw, *arguments):
    """A matplotlib drawing as SVG inside the page: draw(axes, *arguments), on size inches (width, height)."""
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot(), *arguments)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=NO_METADATA)
    _, _, picture = out.getvalue().partition("<svg")  # without the XML prologue
    return f'<svg role="img" aria-label="{html.escape(description)}"{picture}'


def draw_curves(axes, title, rows, curves, spread=None):
    """Curves over the training steps of metrics.jsonl on a matplotlib Axes; a missing value (None) is a gap.

    curves: {label: name in rows}. spread: name of the half-widths of a band around the first. Dynamic phases
    are shaded, missing steps hatched.
    """
    for first, last in missing_steps(rows):
        axes.axvspan(first - .5, last + .5, facecolor="none", edgecolor=GREY, hatch="///", linewidth=0)
        rows = sorted([*rows, dict(step=first)], key=lambda row: row["step"])  # breaks the curves

    def column(name):
        values = np.array([row.get(name) for row in rows], dtype=float)
        return np.where(abs(values) < LIMIT, values, np.nan)

    axes.set_title(title, loc="left")
    axes.grid(axis="y", alpha=.25)
    for row in rows:
        if row.get("phase") == "dynamic":
            axes.axvspan(row["step"] - .5, row["step"] + .5, color=GREY, alpha=.2, linewidth=0)
    steps = column("step")
    for label, name in curves.items():
        axes.plot(steps, column(name), linewidth=1.2, label=label)
    if spread:
        middle, width = column(next(iter(curves.values()))), column(spread)
        axes.fill_between(steps, middle - width, middle + width, alpha=.25, linewidth=0)
    if len(curves) > 1:
        axes.legend(ncols=len(curves), loc="lower left", bbox_to_anchor=(0, -.35))


def chart(title, rows, curves, spread=None):
    """`draw_curves` as a figure of the page; nothing where no value is known."""
    if all(row.get(name) is None for name in curves.values() for row in rows):
        return ""
    picture = inline_svg((4.2, 2.0), f"{title}: {', '.join(curves)} over {len(rows)} steps",
                         draw_curves, title, rows, curves, spread)
    return f"<figure>{picture}</figure>"


def inline(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def inline_video(path):
    source = inline(path.read_bytes(), "video/mp4")
    return f'<video src="{source}" muted loop playsinline preload="auto" tabindex="0"></video>'


def figure(content, caption):
    return f"<figure>\n{content}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"


def html_table(head, rows):
    """Cells of text -> a table that scrolls sideways on a narrow screen."""
    lines = []
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll">\n<table>\n{body}\n</table>\n</div>'


# --------------------------------------------------------------------------------------------- a run's report

PLAY = """
const videos = [...document.querySelectorAll('video')], button = document.getElementById('play');

function playAll(play) {
  for (const video of videos) {
    if (play) { video.currentTime = 0; video.play() } else video.pause();
  }
  button.textContent = play ? 'Pause all' : 'Play all';
  button.setAttribute('aria-pressed', play);
}

if (button) {
  button.onclick = () => playAll(button.getAttribute('aria-pressed') !== 'true');
  for (const video of videos) {
    video.addEventListener('keydown', event => {
      if (event.key !== ' ' && event.key !== 'Enter') return;
      event.preventDefault();
      if (video.paused) video.play(); else video.pause();
    });
  }
  // the videos of one prompt run together, after the first of them
  for (const example of document.querySelectorAll('.step')) {
    const [first, ...others] = example.querySelectorAll('video');
    if (first) first.addEventListener('timeupdate', () => {
      for (const video of others) {
        if (Math.abs(video.currentTime - first.currentTime) > .15) video.currentTime = first.currentTime;
      }
    });
  }
  if (!matchMedia('(prefers-reduced-motion: reduce)').matches) playAll(true);
}
"""


Step = Annotated[int, msgspec.Meta(ge=0, le=10 ** 9)]
LABELS = {"total": "total reward, main steps"} | {name: term.label for name, term in TERMS.items()}
CURVES = (*LABELS, *(f"{name}_std" for name in LABELS), *(f"share_{name}" for name in TERMS),
          "motion", "ratio", "ratio_max", "clipped", "kl")
# A line of the training's metrics.jsonl, as far as the report shows it; older versions' lines hold less.
LogRow = TypedDict("LogRow", dict(step=Required[Step], phase=str, grad=list[float | None])
                   | dict.fromkeys(CURVES, float | None), total=False)


def training_charts(rows):
    """Charts of metrics.jsonl: the reward and its terms with their spread in a group, and the updates."""
    # the rewards; where the band has no width, a group's videos are alike and nothing is learnt from them. A
    # dynamic step's total has no R_3D in it and would look like a fall: it is not drawn
    drawn = [row | dict(total=None) if row.get("phase") == "dynamic" else row for row in rows]
    charts = [chart(label, drawn, {name: name}, f"{name}_std") for name, label in LABELS.items()]
    # what is watched beside them
    rows = [row | dict(grad=(row.get("grad") or [None])[0]) for row in rows]  # a step's first update
    shares = {term.label: f"share_{name}" for name, term in TERMS.items()
              if any(f"share_{name}" in row for row in rows)}
    for title, curves in (
        ("share of the advantages' variance", shares),
        ("motion magnitude (% of width a frame)", {"motion": "motion"}),
        ("ratio: mean and largest", {"mean": "ratio", "largest": "ratio_max"}),
        ("share of ratios clipped", {"clipped": "clipped"}),
        ("KL to the untouched model", {"KL": "kl"}),
        ("gradient norm", {"norm": "grad"}),
    ):
        charts.append(chart(title, rows, curves))
    return '<div class="grid">\n' + "\n".join(charts) + "\n</div>"


def one_term_warnings(rows):
    """A paragraph for each time that one term decided alone."""
    paragraphs = []
    for name, steps in decided_alone(rows):
        text = (f"Warning: {TERMS[name].label} alone decided more than {ALONE_SHARE:.0%} of the advantages' "
                f"variance in steps {steps[0]} to {steps[-1]}: the others hardly counted. "
                f"Lower --{name}, or use --standardise.")
        paragraphs.append(f'<p class="warning">{html.escape(text)}</p>')
    return paragraphs


def missing_warning(rows):
    """A paragraph that names the steps that are missing, if any are."""
    gaps = in_words(missing_steps(rows))
    return [f'<p class="warning">Steps {gaps} are missing from metrics.jsonl.</p>'] if gaps else []


def evaluation_table(rows):
    """eval.jsonl: mean scores of the validation prompts during training."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    cells = []
    for row in rows:
        values = ["" if row.get(name) is None else f"{row[name]:.4f}" for name in names]
        cells.append([str(row.get("step", "")), *values])
    return html_table(["step", *names], cells)


def examples(run, config, device, count=6):
    """The first validation prompts before and after training, from the same noise, scored on this device."""
    # the first and the last whole evaluation that training has left: its prompts are written last
    folders = sorted(file.parent for file in run.glob("eval/*/prompts.txt") if file.parent.name.isdecimal())
    if len(folders) < 2:
        return '<p class="note">No two evaluations yet: nothing to compare.</p>'
    evaluations = {f"after {int(folder.name)} steps": folder for folder in (folders[0], folders[-1])}
    files = sorted(folders[0].glob("*.mp4"))[:count]
    prompts = read_bytes(folders[0] / "prompts.txt").decode().rstrip("\n").split("\n")
    for file in files:
        if not file.stem.isdecimal() or int(file.stem) >= len(prompts):
            raise ValueError(f"{file} has no prompt, which is the line of its number in prompts.txt; "
                             "take it out of the folder")
    # scored again, with the training's judges: they show what they see
    rewards = rewards_for(config, device)

    sections = ['<p><button id="play" aria-pressed="false">Play all</button></p>']
    for file in tqdm(files, desc="report", unit="prompt"):
        prompt = prompts[int(file.stem)]
        sections += [
            f'<section class="step">\n<h3>{html.escape(prompt)}</h3>',
            *(example(folder / file.name, when, prompt, rewards, config.strength)
              for when, folder in evaluations.items()),
            "</section>"]
    return "\n".join(sections)


def example(file, label, prompt, rewards, strength):
    """One video with its scores, and what its judges saw: re-render, meta-view, camera path."""
    video, fps = read_video(file)
    clip = rewards.score(video, prompt, camera_path(parse_motion(prompt), len(video), strength))
    scores = ", ".join(f"{term.label} {clip.scores[name]:.3f}" for name, term in TERMS.items())
    figures = [figure(inline_video(file), f"{label}: {scores}")]
    # what a judge could not make is left out
    if clip.rerender is not None:
        with tempfile.TemporaryDirectory() as scratch:
            rerender = Path(scratch) / "rerender.mp4"
            # fewer frames in the same time
            write_video(rerender, clip.rerender, fps * len(clip.rerender) / len(video))
            figures.append(figure(inline_video(rerender), "re-render"))
    if clip.meta_views is not None:
        png = iio.imwrite("<bytes>", as_bytes(clip.meta_views[0]), extension=".png")
        source = inline(png, "image/png")
        figures.append(figure(f'<img src="{source}" alt="meta-view">', "meta-view"))
    if clip.reconstruction is not None:
        requested, found = paths_in_depths(clip.path, clip.reconstruction)
        picture = inline_svg((2.6, 2.6), "camera path, asked and found",
                             draw_paths, {"asked": requested, "found": found})
        figures.append(figure(picture, "camera path from above"))
    return '<div class="pair four">\n' + "\n".join(figures) + "\n</div>"


def html_tables(markdown):
    """The Markdown of `eval.table` as HTML: its titles, tables and paragraphs."""
    blocks = []
    for block in markdown.split("\n\n"):
        lines = block.splitlines()
        if block.startswith("**"):
            blocks.append(f"<h3>{html.escape(block.strip('*'))}</h3>")
        elif block.startswith("|"):
            cells = []
            for line in lines:
                row = re.split(r"(?<!\\)\|", line)[1:-1]  # "\|" is a bar inside a cell
                cells.append([cell.replace("\\|", "|").strip(" *") for cell in row])
            head, _, *rows = cells  # _: the dashes under the head
            blocks.append(html_table(head, rows))
        else:
            blocks.append(f'<p class="note">{html.escape(block)}</p>')
    return "\n".join(blocks)


def about_run(config, steps):
    """A sentence on what was trained, and how to read the page."""
    models = " + ".join(Path(model).name for model in (config.model, config.lora) if model)
    lpips = "a random trunk, a stand-in" if config.lpips == "random" else "AlexNet"
    return (f"{steps} steps of {config.groups} groups of {config.members} videos, {config.frames} frames of "
            f"{config.height}x{config.width}, model {models}, seed {config.seed}. LPIPS: {lpips}. "
            "Bands: mean standard deviation inside a group. Shaded: dynamic phases. Hatched: missing steps.")


def is_inside(path, folder):
    """Whether a path, if there is one, is the folder or in it."""
    return path is not None and Path(path).resolve().is_relative_to(folder.resolve())


def walkthrough_link(run):
    """Where one prompt is followed through the method with this run's adapter, or what makes that page."""
    page = run / "walkthrough.html"
    if page.exists():
        return f'<p><a href="{page.name}">One prompt followed through the method, with this adapter</a></p>'
    command = shlex.join(["python", "walkthrough.py", "PROMPT", "--trained", str(run), "--out", str(page)])
    return (f'<p class="note">One prompt followed through the method, with this adapter: '
            f"<code>{html.escape(command)}</code></p>")


def report(run, device="cpu", with_examples=True):
    """A training run's folder -> its report.html; judges look at its examples on the device, for minutes."""
    # what train.py has written; what an older version did not write has its default
    log = run / "metrics.jsonl"
    rows = read_lines(log, LogRow, growing=True) if log.exists() else []
    if not rows:
        raise ValueError(f"{run} holds no metrics.jsonl with a step; give a training run's folder")
    config = config_from(Config, read_json(run / "config.json"), run / "config.json")

    # from the run as a whole to single videos
    body = [f"<h1>{html.escape(config.name)}</h1>", *missing_warning(rows), *one_term_warnings(rows),
            f'<p class="note">{html.escape(about_run(config, len(rows)))}</p>']
    if (run / "eval.jsonl").exists():
        evaluations = read_lines(run / "eval.jsonl", dict[str, Step | float | None], growing=True)
        if any(row.get("step") is None for row in evaluations):
            raise ValueError(f"{run / 'eval.jsonl'} has a line without its step; take the line out")
        body += ["<h2>Validation prompts</h2>", evaluation_table(evaluations)]
        body += [f'<p class="warning">{html.escape(sentence)}</p>' for sentence in alarms(evaluations)]
    # Results folders inside the run. Shown last, but read now: what is wrong with one should be found before
    # the examples are scored, which takes minutes.
    results = {file.parent.name: file.parent for file in sorted(run.glob("*/summary.json"))}
    unprintable = [name for name in results if not name.isprintable()]
    if unprintable:
        raise ValueError(f"{run} holds a results folder with a line break in its name, {unprintable[0]!r}; "
                         "rename it")
    # The table shows changes from its first row: those not made with this run's own weights come first.
    about = {name: read_summary(folder / "summary.json") for name, folder in results.items()}

    def made_by_this_run(name):
        return is_inside(about[name].lora, run) or is_inside(about[name].model, run / "model")

    results = {name: results[name] for name in sorted(results, key=made_by_this_run)}  # False is first
    tables = ["<h2>Results</h2>", html_tables(table(results))] if results else []
    body += ["<h2>Training</h2>", training_charts(rows)]
    if with_examples:
        body += ["<h2>Before and after</h2>", examples(run, config, device)]
    if not config.full:  # which has no adapter to follow
        body.append(walkthrough_link(run))
    body += tables
    write_page(run / "report.html", config.name, "\n".join(body), PLAY)
    print(run / "report.html")


# ------------------------------------------------------------------------------------------------ blind study

NO_TEXT = "(no text given)"
QUESTIONS = {
    "geometry": "In which video do walls, floor and objects keep their shape and place better "
                "as the camera moves?",
    "camera": "Which video's camera moves more as the text asks?",
    "overall": "Which video do you prefer overall?",
}

STUDY = """<h1 id="heading" tabindex="-1">Two videos of one text</h1>
<p id="progress" class="note" aria-live="polite"></p>
<main id="trial">
<p id="prompt"></p>
<div class="pair">
<figure>
<video id="left" muted loop playsinline aria-label="left video"></video>
<figcaption>left</figcaption>
</figure>
<figure>
<video id="right" muted loop playsinline aria-label="right video"></video>
<figcaption>right</figcaption>
</figure>
</div>
<p><button id="again">Play both again</button></p>
{questions}
<p><button id="next" disabled>Next pair</button></p>
</main>
<section id="done" hidden>
<p>Your answers are kept in this browser. Download them and send the file to whoever asked you.</p>
<p><button id="download">Download answers</button></p>
</section>"""

QUESTION = """<fieldset>
<legend>{text}</legend>
<label><input type="radio" name="{name}" value="left"> left</label>
<label><input type="radio" name="{name}" value="same"> same</label>
<label><input type="radio" name="{name}" value="right"> right</label>
</fieldset>"""

STUDY_SCRIPT = """
const DATA = {data};
const store = 'study-' + DATA.study;
const $ = id => document.getElementById(id);
let state = JSON.parse(localStorage.getItem(store) || 'null');
if (!state) {
  // a new participant: own order of pairs, own sides
  const bytes = [...crypto.getRandomValues(new Uint8Array(8))];
  const order = shuffled(DATA.pairs.map((pair, i) => i)).map(i => ({ pair: i, sides: shuffled([0, 1]) }));
  state = { participant: bytes.map(b => b.toString(16).padStart(2, '0')).join(''), order, answers: [] };
  save();
}

function shuffled(list) {
  for (let i = list.length - 1; i > 0; i--) {
    const j = crypto.getRandomValues(new Uint32Array(1))[0] % (i + 1);
    [list[i], list[j]] = [list[j], list[i]];
  }
  return list;
}

function save() { localStorage.setItem(store, JSON.stringify(state)) }

function current() {
  const { pair, sides } = state.order[state.answers.length];
  const { prompt, videos } = DATA.pairs[pair];
  return { pair, prompt, left: videos[sides[0]], right: videos[sides[1]] };
}

function chosen() {
  const value = name => (document.querySelector('input[name=' + name + ']:checked') || {}).value;
  return Object.fromEntries(DATA.questions.map(name => [name, value(name)]));
}

function show() {
  const n = state.answers.length, all = state.order.length, done = n >= all;
  $('trial').hidden = done;
  $('done').hidden = !done;
  $('progress').textContent = done ? 'Finished: ' + n + ' pairs' : 'Pair ' + (n + 1) + ' of ' + all;
  if (done) {
    $('heading').textContent = 'Thank you';
  } else {
    const trial = current();
    $('prompt').textContent = trial.prompt;
    for (const side of ['left', 'right']) {
      $(side).src = trial[side];
      $(side).load();
      $(side).play().catch(() => {});
    }
    for (const radio of document.querySelectorAll('input[type=radio]')) radio.checked = false;
    $('next').disabled = true;
  }
  $('heading').focus();
}

document.addEventListener('change', () => {
  $('next').disabled = Object.values(chosen()).some(value => !value);
});

$('again').onclick = () => {
  for (const side of ['left', 'right']) { $(side).currentTime = 0; $(side).play() }
};

$('next').onclick = () => {
  const { pair, left, right } = current();
  state.answers.push({ pair, left, right, ...chosen() });
  save();
  show();
};

$('download').onclick = () => {
  const answers = { study: DATA.study, participant: state.participant, answers: state.answers };
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([JSON.stringify(answers, null, 1)], { type: 'application/json' }));
  link.download = 'answers_' + state.participant + '.json';
  link.click();
};

show();
"""


def prompts_of(folder):
    """{video name: prompt} where `eval.py metrics` or a training's evaluation made the videos, or nothing."""
    prompts = {}
    if (folder / "prompts.txt").exists():
        lines = read_bytes(folder / "prompts.txt").decode().splitlines()
        prompts = {f"{number:02d}": prompt for number, prompt in enumerate(lines)}
    for file in (folder.parent / "metrics.jsonl", folder / "metrics.jsonl"):
        if file.exists():
            prompts |= {row.get("video"): row.get("prompt") for row in read_lines(file, VideoRow)}
    return prompts


@dataclass
class Key:
    """study_key.json: which video is from which side, {file: side} for each pair in the page's order."""
    study: str
    a: str
    b: str
    pairs: list[dict[str, Literal["a", "b"]]]


def make_study(a, b, out):
    """Writes OUT/page, whose files' names and times say nothing of the side, and OUT/study_key.json, which
    does. What tags an mp4 holds inside is copied as it is; `write_video` writes the same into all.

    Names and orders are the operating system's randomness: who has this file cannot draw them again.
    """
    # the videos that both have
    folders = dict(a=a, b=b)
    if a.resolve() == b.resolve():
        raise ValueError(f"--a and --b are the same folder, {a}; give the videos of two models")
    names = sorted({file.name for file in videos_in(a)} & {file.name for file in videos_in(b)})
    if not names:
        raise ValueError(f"{a} and {b} share no mp4 of the same name; "
                         "give the videos of two models for one list of prompts")
    prompts_a, prompts_b = prompts_of(a), prompts_of(b)
    for name in names:
        stem = Path(name).stem
        known = {prompts_a.get(stem), prompts_b.get(stem)} - {None, ""}
        if len(known) > 1:
            raise ValueError(f"{name} has another prompt in {a} than in {b}; "
                             "give videos of the same prompts")
    prompts = prompts_b | prompts_a

    with new_folder(out) as part:
        page = part / "page"
        page.mkdir(parents=True)

        # every video under a random name; the times of the copies must not tell the sides apart
        chance = secrets.SystemRandom()
        now = time.time()
        copies = [(name, side) for name in names for side in folders]
        chance.shuffle(copies)
        pairs = defaultdict(dict)
        for name, side in copies:
            file = page / f"{secrets.token_hex(8)}.mp4"
            shutil.copyfile(folders[side] / name, file)
            os.utime(file, (now, now))
            pairs[name][file.name] = side

        # pairs and sides in random order; a participant's answers name this very study
        chance.shuffle(names)
        key = Key(secrets.token_hex(6), str(a), str(b), [pairs[name] for name in names])
        write_json(part / "study_key.json", asdict(key))
        shown = [dict(prompt=prompts.get(Path(name).stem) or NO_TEXT, videos=sorted(pairs[name]))
                 for name in names]
        questions = [QUESTION.format(name=name, text=html.escape(text)) for name, text in QUESTIONS.items()]
        data = json.dumps(dict(study=key.study, pairs=shown, questions=list(QUESTIONS)))
        data = data.replace("<", "\\u003c")  # no prompt can end the script, or open a comment in it
        write_page(page / "index.html", "Which video?", STUDY.format(questions="\n".join(questions)),
                   STUDY_SCRIPT.replace("{data}", data))
    nameless = sum(pair["prompt"] == NO_TEXT for pair in shown)
    if nameless:
        print(f"{nameless} of {len(names)} pairs have no text, and one question is about the text: give "
              "folders that `eval.py metrics` or a training has made, or leave that question's answers out")
    print(f"{len(names)} pairs: give out the folder {out / 'page'} (open index.html); "
          f"keep {out / 'study_key.json'}")


@dataclass
class Answers:
    """A participant's downloaded file."""
    study: str
    participant: str
    answers: list[Any]  # each an Answer, or it is impossible


Answer = TypedDict("Answer", dict(pair=int, left=str, right=str)
                   | dict.fromkeys(QUESTIONS, Literal["left", "right", "same"]))


def is_possible(answer, key):
    """Whether the study's page can have given an answer: a choice to every question, of a pair as it is."""
    try:
        answer = msgspec.convert(answer, Answer)
    except msgspec.ValidationError:
        return False
    pair = answer["pair"]
    return 0 <= pair < len(key.pairs) and {answer["left"], answer["right"]} == set(key.pairs[pair])


def read_answers(files, key):
    """Downloaded answers -> {participant: {pair: {question: "a" | "b" | "tie"}}}, and a Counter of what is
    left out: only a participant's first answer to a pair of this study counts."""
    people, left_out = defaultdict(dict), Counter()
    for file in files:
        given = read_json(file, Answers)
        for answer in given.answers:
            if given.study != key.study:
                left_out["of another study"] += 1
            elif not is_possible(answer, key):
                left_out["impossible"] += 1
            elif answer["pair"] in people[given.participant]:
                left_out["repeated"] += 1
            else:
                sides = key.pairs[answer["pair"]]
                meaning = dict(left=sides[answer["left"]], right=sides[answer["right"]], same="tie")
                people[given.participant][answer["pair"]] = {
                    question: meaning[answer[question]] for question in QUESTIONS}
    return {participant: rows for participant, rows in people.items() if rows}, left_out


def score_study(files, out):
    """Prints win rates of b over a with intervals over participants, and how far participants agree."""
    if not (out / "study_key.json").exists():
        raise ValueError(f"{out} holds no study_key.json; give the --out that the study was made with")
    # who has answered
    key = read_json(out / "study_key.json", Key)
    people, left_out = read_answers(files, key)
    dropped = ", ".join(f"{n} {what}" for what, n in left_out.items()) or "none"
    if not people:
        raise ValueError(f"there is no answer in these files (left out: {dropped}); "
                         "participants download theirs when they finish")
    print(f"{len(people)} participants, {sum(map(len, people.values()))} answers, left out: {dropped}; "
          f"share that prefers b = {key.b} over a = {key.a}, ties half")
    # how often b wins, and whether people agree on where it does
    for question in QUESTIONS:
        rate, low, high = win_rate(people, question)
        by_pair = defaultdict(Counter)  # answers of all participants
        for rows in people.values():
            for pair, row in rows.items():
                by_pair[pair][row[question]] += 1
        kappa = fleiss_kappa(by_pair.values())
        agreement = "needs two answers a pair" if kappa is None else f"{kappa:.2f}"
        print(f"{question:9} {rate:.3f} [{low:.3f}, {high:.3f}]  Fleiss' kappa {agreement}")


def win_rate(people, question):
    """Share of answers that prefer b, ties half, each participant counting the same -> (rate, low, high)."""
    worth = {"a": 0.0, "tie": .5, "b": 1.0}
    return interval([np.mean([worth[row[question]] for row in rows.values()]) for rows in people.values()])


def fleiss_kappa(items):
    """Agreement of raters beyond chance, at most 1. items: a Counter of answers for each item.

    Fleiss 1971, whose items all have equally many raters; here an item weighs as much as it has answers. An
    item with a single rater is left out. None if no item is left; 1 where everyone always says the same.
    """
    items = [item for item in items if item.total() > 1]
    if not items:
        return None
    # the share of an item's other raters that an answer agrees with, averaged over all answers
    everything = sum(items, Counter())
    answers = everything.total()
    agreeing = sum(sum(n * (n - 1) for n in item.values()) / (item.total() - 1) for item in items)
    observed = agreeing / answers
    # what it would be if everyone answered at random, with each answer as frequent as it is here
    chance = sum((n / answers) ** 2 for n in everything.values())
    if chance > 1 - 1e-12:
        return 1.0
    return (observed - chance) / (1 - chance)


# ------------------------------------------------------------------------------------------- the command line

@as_command("report.py")
def main(argv=None):
    parser = command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="one self-contained page of a training run")
    run_parser.add_argument("run", type=Path, help="its folder")
    run_parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run_parser.add_argument("--no-examples", dest="examples", action="store_false",
                            help="curves and tables alone: no judge is loaded")
    study_parser = commands.add_parser("study", help="a blind pairwise study page")
    for side in ("--a", "--b"):
        study_parser.add_argument(side, type=Path, required=True, help="folder of mp4s; both share names")
    score_parser = commands.add_parser("score", help="the study's results")
    score_parser.add_argument("answers", type=Path, nargs="+", help="files that participants have downloaded")
    for command in (study_parser, score_parser):
        command.add_argument("--out", type=Path, default=Path("study"), help="the study's folder")
    a = parser.parse_args(argv)
    if a.command == "run":
        check_device(a.device)
        report(a.run, a.device, a.examples)
    elif a.command == "study":
        make_study(a.a, a.b, a.out)
    else:
        score_study(a.answers, a.out)


if __name__ == "__main__":
    sys.exit(main())
