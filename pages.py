"""Two pages to look at, each from one command of eval.py: a training run's report, and a blind pairwise study.

    python eval.py report runs/tiny                    -> runs/tiny/report.html, self-contained
    python eval.py study --a DIR --b DIR --out study   -> study/index.html and its videos; study_key.json stays with you
    python eval.py study --score answers/*.json --out study

Plain HTML, CSS and a little script, no network: both work from a file:// address, in light and dark, by keyboard.
"""

import base64
import hashlib
import html
import io
import itertools
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --paper: #fbfaf7; --line: #d8d5cc; --a: #2563a8; --b: #b0482e; --band: #2563a833 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --soft: #a2a8ae; --paper: #16181b; --line: #3a3e44; --a: #7db4ee; --b: #ee9a80; --band: #7db4ee33 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
p.note, figcaption, small { color: var(--soft); font-size: .88rem }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)) }
figure { margin: 0 } video, img { width: 100%; display: block; image-rendering: pixelated; border: 1px solid var(--line); background: #000 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; margin: 1rem 0 } .four { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)) }
button { font: inherit; padding: .5rem 1.1rem; border: 1px solid var(--ink); border-radius: .4rem; background: none; color: inherit; cursor: pointer }
button:disabled { opacity: .4; cursor: default } :focus-visible { outline: 3px solid var(--a); outline-offset: 2px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
svg { width: 100%; height: auto } svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
fieldset { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; padding: .6rem 1rem } label { display: inline-block; padding: .3rem 1.2rem .3rem 0; cursor: pointer }
"""


def document(title, body, script=""):
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n'
            + (f"<script>{script}</script>\n" if script else "") + "</body>\n</html>\n")


# --------------------------------------------------------------------------------------------------------------- report

def chart(title, steps, series, bands=(), phases=()):
    """An SVG line chart. series: {label: values (None = gap)}; bands: half-widths of the first series; phases: indices of
    steps to shade (the dynamic ones)."""
    W, H, left, top, right, bottom = 520, 230, 58, 26, 10, 24
    rows = [v for values in series.values() for v in values if v is not None]
    first = next(iter(series.values()))
    rows += [v + s * d for v, d in zip(first, bands) for s in (-1, 1) if v is not None and d is not None]
    if not rows:
        return ""
    low, high = min(rows), max(rows)
    high, low = (high, low) if high - low > 1e-12 else (high + .5, low - .5)
    x = lambda i: left + (W - left - right) * (steps[i] - steps[0]) / max(steps[-1] - steps[0], 1)  # noqa: E731
    y = lambda v: top + (H - top - bottom) * (1 - (v - low) / (high - low))  # noqa: E731
    step = (x(len(steps) - 1) - x(0)) / max(len(steps) - 1, 1)
    parts = [f'<rect x="{x(i) - step / 2:.1f}" y="{top}" width="{step:.2f}" height="{H - top - bottom}" fill="var(--line)" opacity=".45"/>' for i in phases]
    for v in (low, (low + high) / 2, high):
        parts.append(f'<line x1="{left}" x2="{W - right}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="var(--line)"/><text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>')
    parts += [f'<text x="{x(i):.1f}" y="{H - 6}" text-anchor="{a}">{steps[i]}</text>' for i, a in ((0, "start"), (len(steps) - 1, "end"))]
    if bands:
        known = [(i, v, d) for i, (v, d) in enumerate(zip(first, bands)) if v is not None and d is not None]
        outline = [f"{x(i):.1f},{y(v + d):.1f}" for i, v, d in known] + [f"{x(i):.1f},{y(v - d):.1f}" for i, v, d in reversed(known)]
        parts.append(f'<polygon points="{" ".join(outline)}" fill="var(--band)"/>')
    for (label, values), ink in zip(series.items(), itertools.cycle(("var(--a)", "var(--b)", "var(--soft)"))):
        known = [(i, v) for i, v in enumerate(values) if v is not None]
        for _, run in itertools.groupby(enumerate(known), lambda pair: pair[1][0] - pair[0]):  # unbroken stretches
            points = " ".join(f"{x(i):.1f},{y(v):.1f}" for _, (i, v) in run)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="1.6"/>')
    legend = "   ".join(series)
    return (f'<figure><svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(title)}: {html.escape(legend)} over {len(steps)} steps"><text x="{left}" y="15" '
            f'style="fill:var(--ink);font-size:13px">{html.escape(title)}</text>{"".join(parts)}</svg></figure>')


def inline(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def inline_video(path):
    return f'<video src="{inline(Path(path).read_bytes(), "video/mp4")}" muted loop playsinline preload="auto" tabindex="0"></video>'


def inline_picture(picture, alt):
    """A PIL picture or an image (3, H, W) in [0, 1]."""
    from PIL import Image
    if isinstance(picture, torch.Tensor):
        picture = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f'<img src="{inline(out.getvalue(), "image/png")}" alt="{html.escape(alt)}">'


PLAY = """
const all = [...document.querySelectorAll('video')], button = document.getElementById('play');
function set(play) { for (const v of all) { if (play) { v.currentTime = 0; v.play() } else v.pause() } button.textContent = play ? 'Pause all' : 'Play all'; button.setAttribute('aria-pressed', play) }
if (button) { button.onclick = () => set(button.getAttribute('aria-pressed') !== 'true');
  for (const v of all) v.addEventListener('keydown', e => { if (e.key === ' ' || e.key === 'Enter') { e.preventDefault(); v.paused ? v.play() : v.pause() } });
  for (const row of document.querySelectorAll('.step')) { const vs = [...row.querySelectorAll('video')];
    vs[0] && vs[0].addEventListener('timeupdate', () => { for (const v of vs.slice(1)) if (Math.abs(v.currentTime - vs[0].currentTime) > .15) v.currentTime = vs[0].currentTime }) }
  if (!matchMedia('(prefers-reduced-motion: reduce)').matches) set(true) }
"""


def examples(run, config, count=6):
    """Before and after, same prompts and seeds: videos, re-renders, meta-views, paths -> HTML."""
    import splat
    from depth_anything import plot_paths
    from noise_warp import camera_path, parse_motion
    from rewards import Rewards
    from sample import read_video, write_video
    from train import load_prompts
    steps = sorted((p for p in (run / "eval").glob("*") if p.is_dir()), key=lambda p: int(p.name)) if (run / "eval").is_dir() else []
    if len(steps) < 2:
        return '<p class="note">No two evaluations yet: nothing to compare.</p>'
    prompts = load_prompts(config["prompts"])["test"]
    rewards = Rewards(config["depth_anything"], config["critic"], config["preference"], config["lpips"], config["views"], config["first"])
    out = ['<p><button id="play" aria-pressed="false">Play all</button></p>']
    with tempfile.TemporaryDirectory() as scratch:
        for i in tqdm(range(min(count, len(list(steps[0].glob("*.mp4"))))), desc="report", unit="prompt"):
            columns = []
            for folder, name in ((steps[0], "before"), (steps[-1], f"after {int(steps[-1].name)} steps")):
                video, fps = read_video(folder / f"{i:02d}.mp4")
                path = camera_path(parse_motion(prompts[i]), len(video))
                scores, seen = rewards.score(video, prompts[i], path)
                cell = [f"<figure>{inline_video(folder / f'{i:02d}.mp4')}<figcaption>{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()) + "</figcaption></figure>"]
                if "rec" in seen:
                    rec = seen["rec"]
                    shown = seen["render"] if "render" in seen else splat.render(rec.gaussians, rec.camera_to_world, seen["K"], *video.shape[2:])[0]
                    write_video(Path(scratch) / "r.mp4", shown, fps * len(shown) / len(video))
                    E, R = (torch.linalg.inv(p[:1]) @ p for p in (path[rec.frames].double(), rec.camera_to_world.double().cpu()))
                    R[:, :3, 3] /= float(rec.depth.median())
                    cell += [f"<figure>{inline_video(Path(scratch) / 'r.mp4')}<figcaption>re-render</figcaption></figure>"]
                    cell += [f"<figure>{inline_picture(seen['views'][0], 'meta-view')}<figcaption>meta-view</figcaption></figure>"] if "views" in seen else []
                    cell += [f"<figure>{inline_picture(plot_paths({'grey': E, 'firebrick': R}, 160), 'camera path')}<figcaption>path: asked grey, found red</figcaption></figure>"]
                columns.append(f'<div class="pair four">{"".join(cell)}</div>')
            out.append(f'<section class="step"><h3>{html.escape(prompts[i])}</h3>{"".join(columns)}</section>')
    return "\n".join(out)


def tables(markdown):
    """eval.table's Markdown as HTML."""
    out, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows += [[html.escape(c.strip().strip("*")) for c in line.strip("|").split("|")]] if set(line) - set("|-") else []
            continue
        if rows:
            head, *rest = ["".join(f"<{tag}>{c}</{tag}>" for c in row) for tag, row in zip(["th"] + ["td"] * len(rows), rows)]
            out.append('<div class="scroll"><table>' + "".join(f"<tr>{row}</tr>" for row in (head, *rest)) + "</table></div>")
            rows = []
        if line:
            out.append(f"<h3>{html.escape(line.strip('*'))}</h3>" if line.startswith("**") else f'<p class="note">{html.escape(line)}</p>')
    return "\n".join(out)


def report(run):
    """runs/NAME -> runs/NAME/report.html. Results folders inside the run (eval.py metrics --out runs/NAME/...) become its tables."""
    from eval import table
    if not (run / "metrics.jsonl").exists():
        raise ValueError(f"{run} holds no metrics.jsonl; give a training run's folder")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    if not rows:
        raise ValueError(f"{run}/metrics.jsonl is empty; let the run make a step first")
    steps, of = [r["step"] for r in rows], lambda name: [r.get(name) for r in rows]
    dynamic = [i for i, r in enumerate(rows) if r["phase"] == "dynamic"]
    charts = [chart({"meta": "S_meta", "recon": "S_recon", "traj": "S_traj", "general": "R_gen", "total": "total reward"}[n], steps, {n: of(n)}, of(f"{n}_std"), dynamic)
              for n in ("total", "meta", "recon", "traj", "general")]
    charts += [chart("motion magnitude (% of width a frame)", steps, {"motion": of("motion")}, (), dynamic),
               chart("ratio: mean and largest", steps, {"mean": of("ratio"), "largest": of("ratio_max")}, (), dynamic), chart("share of ratios clipped", steps, {"clipped": of("clipped")}, (), dynamic),
               chart("KL to the untouched model", steps, {"KL": of("kl")}, (), dynamic), chart("gradient norm", steps, {"norm": [r["grad"][0] for r in rows]}, (), dynamic)]
    body = [f"<h1>{html.escape(config['name'])}</h1>", f'<p class="note">{len(rows)} steps of {config["groups"]} groups of {config["members"]} videos, {config["frames"]} frames of '
            f'{config["height"]}x{config["width"]}, model {html.escape(" + ".join(Path(config[k]).name for k in ("model", "lora") if config.get(k)))}, seed {config["seed"]}. LPIPS: '
            f'{"a random trunk, a stand-in" if config["lpips"] == "random" else "AlexNet"}. Bands: mean standard deviation inside a group. Shaded: dynamic phases.</p>']
    evals = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()] if (run / "eval.jsonl").exists() else []
    if evals:
        names = [n for n in evals[0] if n != "step"]
        cell = lambda v: "" if v is None else f"{v:.4f}"  # noqa: E731
        body += ["<h2>Fixed test prompts</h2>", '<div class="scroll"><table><tr><th>step</th>' + "".join(f"<th>{n}</th>" for n in names) + "</tr>"
                 + "".join(f"<tr><td>{e['step']}</td>" + "".join(f"<td>{cell(e[n])}</td>" for n in names) + "</tr>" for e in evals) + "</table></div>"]
    body += ["<h2>Training</h2>", f'<div class="grid">{"".join(charts)}</div>', "<h2>Before and after</h2>", examples(run, config)]
    results = {f.parent.name: f.parent for f in sorted(run.glob("*/summary.json"))}
    body += ["<h2>Results</h2>", tables(table(results))] if results else []
    part = run / ".report.part"
    part.write_text(document(config["name"], "\n".join(body), PLAY), encoding="utf-8")
    part.rename(run / "report.html")
    print(run / "report.html")
    return 0


# ---------------------------------------------------------------------------------------------------------------- study

QUESTIONS = {"geometry": "In which video do walls, floor and objects keep their shape and place better as the camera moves?",
             "camera": "Which video's camera moves more as the text asks?", "overall": "Which video do you prefer overall?"}

STUDY = """
const store = 'study-' + DATA.study, pick = a => { for (let i = a.length - 1; i > 0; i--) { const j = crypto.getRandomValues(new Uint32Array(1))[0] % (i + 1); [a[i], a[j]] = [a[j], a[i]] } return a };
let state = JSON.parse(localStorage.getItem(store) || 'null');
if (!state) { state = { participant: [...crypto.getRandomValues(new Uint8Array(8))].map(b => b.toString(16).padStart(2, '0')).join(''), order: pick(DATA.pairs.map((p, i) => i)).map(i => ({ pair: i, sides: pick([0, 1]) })), answers: [] }; save() }
function save() { localStorage.setItem(store, JSON.stringify(state)) }
const $ = id => document.getElementById(id);
function show() {
  const n = state.answers.length, done = n >= state.order.length;
  $('trial').hidden = done; $('done').hidden = !done;
  $('progress').textContent = done ? 'Finished: ' + n + ' pairs' : 'Pair ' + (n + 1) + ' of ' + state.order.length;
  if (done) { $('heading').textContent = 'Thank you'; $('heading').focus(); return }
  const t = state.order[n], p = DATA.pairs[t.pair];
  $('prompt').textContent = p.prompt; $('left').src = p.videos[t.sides[0]]; $('right').src = p.videos[t.sides[1]];
  for (const v of [$('left'), $('right')]) { v.load(); v.play().catch(() => {}) }
  for (const r of document.querySelectorAll('input[type=radio]')) r.checked = false;
  $('next').disabled = true; $('heading').focus()
}
function chosen() { return Object.fromEntries(DATA.questions.map(q => [q, (document.querySelector('input[name=' + q + ']:checked') || {}).value])) }
document.addEventListener('change', () => { $('next').disabled = Object.values(chosen()).some(v => !v) });
$('again').onclick = () => { for (const v of [$('left'), $('right')]) { v.currentTime = 0; v.play() } };
$('next').onclick = () => { const t = state.order[state.answers.length], p = DATA.pairs[t.pair];
  state.answers.push({ pair: t.pair, left: p.videos[t.sides[0]], right: p.videos[t.sides[1]], ...chosen() }); save(); show() };
$('download').onclick = () => { const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob([JSON.stringify({ study: DATA.study, participant: state.participant, answers: state.answers }, null, 1)], { type: 'application/json' }));
  a.download = 'answers_' + state.participant + '.json'; a.click() };
show();
"""


def study(a):
    """Makes the page, or scores its answers."""
    if a.score:
        return score(a.score, json.loads((a.out / "study_key.json").read_text()))
    if not (a.a and a.b):
        raise ValueError("a study needs --a DIR and --b DIR, two folders with videos of the same names")
    names = sorted({f.name for f in a.a.glob("*.mp4")} & {f.name for f in a.b.glob("*.mp4")})
    if not names:
        raise ValueError(f"{a.a} and {a.b} share no mp4 of the same name")
    page = a.out / "page"
    page.mkdir(parents=True, exist_ok=True)
    prompts = {}
    for file in (a.a.parent / "metrics.jsonl", a.a / "metrics.jsonl"):
        if file.exists():
            prompts |= {r["video"]: r["prompt"] for r in map(json.loads, file.read_text().splitlines())}
    rng, pairs, key = random.Random(f"study/{a.seed}"), [], {}
    for name in names:
        videos = []
        for side, folder in (("a", a.a), ("b", a.b)):
            hidden = "".join(rng.choices("0123456789abcdef", k=16)) + ".mp4"
            shutil.copyfile(folder / name, page / hidden)
            key[hidden] = side
            videos.append(hidden)
        rng.shuffle(videos)
        pairs.append(dict(prompt=prompts.get(Path(name).stem) or "(no text given)", videos=videos))
    rng.shuffle(pairs)
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    fields = "".join(f"<fieldset><legend>{html.escape(text)}</legend>" + "".join(
        f'<label><input type="radio" name="{q}" value="{v}"> {v}</label>' for v in ("left", "same", "right")) + "</fieldset>" for q, text in QUESTIONS.items())
    body = f"""<h1 id="heading" tabindex="-1">Two videos of one text</h1>
<p id="progress" class="note" aria-live="polite"></p>
<main id="trial"><p id="prompt"></p>
<div class="pair"><figure><video id="left" muted loop playsinline aria-label="left video"></video><figcaption>left</figcaption></figure>
<figure><video id="right" muted loop playsinline aria-label="right video"></video><figcaption>right</figcaption></figure></div>
<p><button id="again">Play both again</button></p>{fields}<p><button id="next" disabled>Next pair</button></p></main>
<section id="done" hidden><p>Your answers are kept in this browser. Download them and send the file to whoever asked you.</p><p><button id="download">Download answers</button></p></section>"""
    data = json.dumps(dict(study=identity, pairs=pairs, questions=list(QUESTIONS))).replace("</", "<\\/")
    (page / "index.html").write_text(document("Which video?", body, f"const DATA = {data};\n{STUDY}"), encoding="utf-8")
    (a.out / "study_key.json").write_text(json.dumps(dict(study=identity, a=str(a.a), b=str(a.b), videos=key), indent=1) + "\n")
    print(f"{len(pairs)} pairs: give out the folder {page} (open index.html); keep {a.out / 'study_key.json'}")
    return 0


def score(files, key):
    """Prints win rates of b over a (ties count half) with bootstrap intervals over participants, and Fleiss' kappa."""
    people = []
    for file in files:
        try:
            person = json.loads(Path(file).read_text())
            if person["study"] != key["study"]:
                raise ValueError("it belongs to another study")
            people.append([dict(pair=row["pair"], **{q: {"same": "tie"}.get(row[q]) or key["videos"][row[row[q]]] for q in QUESTIONS}) for row in person["answers"]])
        except (KeyError, ValueError, TypeError) as e:
            raise ValueError(f"{file} cannot be scored ({e})") from None
    print(f"{len(people)} participants, {sum(map(len, people))} answers; share that prefers b = {key['b']} over a = {key['a']}, ties half")
    results = {}
    for q in QUESTIONS:
        worth = [torch.tensor([{"a": 0.0, "b": 1.0, "tie": .5}[row[q]] for row in rows]) for rows in people if rows]
        g = torch.Generator().manual_seed(0)
        draws = torch.stack([torch.cat([worth[i] for i in torch.randint(len(worth), (len(worth),), generator=g)]).mean() for _ in range(2000)])
        by_pair = {}
        for rows in people:
            for row in rows:
                by_pair.setdefault(row["pair"], Counter())[row[q]] += 1
        results[q] = dict(rate=float(torch.cat(worth).mean()), low=float(draws.quantile(.025)), high=float(draws.quantile(.975)), kappa=fleiss_kappa(by_pair.values()))
        r = results[q]
        print(f"{q:9} {r['rate']:.3f} [{r['low']:.3f}, {r['high']:.3f}]  Fleiss' kappa " + (f"{r['kappa']:.2f}" if r["kappa"] is not None else "needs two answers a pair"))
    return 0


def fleiss_kappa(items):
    """Agreement of raters on items beyond chance (Fleiss 1971). items: Counter of answers an item; those with one rater say
    nothing and are left out. None without any; 1 where everyone always says the same."""
    items = [c for c in items if sum(c.values()) > 1]
    if not items:
        return None
    total = sum(sum(c.values()) for c in items)
    observed = sum((sum(n * n for n in c.values()) - sum(c.values())) / (sum(c.values()) - 1) for c in items) / total
    chance = sum((sum(c[k] for c in items) / total) ** 2 for k in set().union(*items))
    return 1.0 if chance > 1 - 1e-12 else (observed - chance) / (1 - chance)
