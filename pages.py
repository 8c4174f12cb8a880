"""What a stage of the walkthrough holds, and how stages become a page: one HTML file, or Markdown and
pictures.

walkthrough.py makes the stages.
"""

import base64
import html
import inspect
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import torch

import splat
from report import PLAY, STYLE, figure, html_table, inline, inline_video, write_page
from rewards import Clip
from sample import as_bytes, write_video
from weights import write_text, written_whole

# ----------------------------------------------------------------------------------------- what a stage holds

@dataclass
class Picture:
    caption: str
    content: object  # a chart's SVG, an image (3, H, W), a video (F, 3, H, W), or a Clip whose Gaussians turn


@dataclass
class Stage:
    title: str
    text: str
    equation: str  # HTML
    where: str  # what its letters stand for
    source: str  # of the equation
    functions: list  # that ran
    shapes: dict  # what -> tensor, number or words
    pictures: list


def shown(value):
    if isinstance(value, torch.Tensor):
        return f"{' × '.join(map(str, value.shape))}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value


# -------------------------------------------------------------------------------------------------- the pages

OWN_STYLE = """
nav ol { columns: 18rem; column-gap: 3rem; padding-left: 1.5rem }
a { color: var(--focus) }
section > p { max-width: 50rem }
.equation {
  font: 1.1rem/1.6 Georgia, serif; padding: .1rem .8rem; border-left: .2rem solid var(--line);
}
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(4, 1fr); margin: 1rem 0 }
.wide { grid-column: span 2; min-width: 0 }
video { background: none }
td { white-space: normal; overflow-wrap: anywhere }
td:first-child { min-width: 7rem }
details { margin: .3rem 0 }
summary { cursor: pointer }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line); font-size: .82rem; line-height: 1.35 }
canvas { width: 100%; display: block; background: #101214; touch-action: pan-y; cursor: grab }
.bar { position: sticky; bottom: 0; padding: .5rem 0; background: var(--paper) }
@media (max-width: 45rem) { .pictures { grid-template-columns: 1fr 1fr } }
"""

# A canvas's points: int16 x, y, z of each, in thousandths of the scene's depth, in the middle camera's axes
# with the scene's depth at 0; then three bytes of colour.
TURN = """
for (const canvas of document.querySelectorAll('canvas')) {
  const bytes = Uint8Array.from(atob(canvas.dataset.points), c => c.charCodeAt(0)), N = bytes.length / 9;
  const xyz = new Int16Array(bytes.buffer, 0, 3 * N), rgb = new Uint8Array(bytes.buffer, 6 * N);
  const W = canvas.width, H = canvas.height, context = canvas.getContext('2d');
  const focal = canvas.dataset.focal * W, pixel = W / canvas.dataset.columns, away = 1300;
  const image = context.createImageData(W, H), pixels = new Uint32Array(image.data.buffer);
  const nearest = new Float32Array(W * H);
  let yaw = .25, pitch = .1;

  function draw() {
    nearest.fill(Infinity);
    pixels.fill(0);
    const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
    for (let i = 0; i < N; i++) {
      // turn about the vertical, tilt, step back
      const [x, y, z] = xyz.subarray(3 * i, 3 * i + 3), across = cy * x + sy * z, along = cy * z - sy * x;
      const up = cp * y - sp * along, depth = away + sp * y + cp * along;
      if (depth < 50) continue;
      // a square as large as the pixel that the point comes from
      const size = Math.max(1, Math.ceil(pixel * (z + 1000) / depth));
      const left = Math.round(W / 2 + focal * across / depth - size / 2);
      const top = Math.round(H / 2 + focal * up / depth - size / 2);
      const colour = 0xff000000 | rgb[3 * i + 2] << 16 | rgb[3 * i + 1] << 8 | rgb[3 * i];
      for (let v = Math.max(0, top); v < Math.min(H, top + size); v++) {
        for (let p = v * W + Math.max(0, left); p < v * W + Math.min(W, left + size); p++) {
          if (depth < nearest[p]) { nearest[p] = depth; pixels[p] = colour }
        }
      }
    }
    context.putImageData(image, 0, 0);
  }

  function turn(x, y) {
    yaw += x;
    pitch = Math.max(-1.4, Math.min(1.4, pitch + y));
    requestAnimationFrame(draw);
  }

  const keys = { ArrowLeft: [-.1, 0], ArrowRight: [.1, 0], ArrowUp: [0, -.1], ArrowDown: [0, .1] };
  canvas.addEventListener('keydown', event => {
    if (!keys[event.key]) return;
    event.preventDefault();
    turn(...keys[event.key]);
  });
  canvas.addEventListener('pointerdown', event => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener('pointermove', event => {
    if (event.buttons) turn(event.movementX / 150, event.movementY / 150);
  });
  draw();
}
"""


def point_cloud(clip):
    """A reconstruction's Gaussians as a canvas for TURN."""
    rec = clip.reconstruction
    view = len(rec.camera_to_world) // 2
    camera, gaussians, depth = rec.camera_to_world[view], rec.gaussians, rec.depth[view].median()
    solid = gaussians.opacities > .1
    means = gaussians.means[solid]
    colours = splat.colour(gaussians.harmonics[solid], means, camera[:3, 3]).clamp(0, 1)
    points = (means - camera[:3, 3]) @ camera[:3, :3] / depth  # in the camera's axes
    points[:, 2] -= 1
    thousandths = (points * 1000).round().clamp(-32768, 32767).short()
    data = thousandths.cpu().numpy().tobytes() + (colours * 255).byte().cpu().numpy().tobytes()
    H, W = rec.depth.shape[1:]
    return (f'<canvas width="480" height="{480 * H // W}" tabindex="0" role="img" '
            f'aria-label="{len(means)} points that the arrow keys turn" data-columns="{W}" '
            f'data-focal="{rec.intrinsics[view, 0, 0] / W:.4f}" '
            f'data-points="{base64.b64encode(data).decode()}"></canvas>')


def html_picture(picture, prefix, seconds):
    """A Picture as HTML. prefix: keeps the ids of an SVG apart from those of the page's others. seconds: a
    video's length."""
    content, kind = picture.content, "wide"
    if isinstance(content, str):
        content = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", content)
    elif isinstance(content, Clip):
        content = point_cloud(content)
    elif content.dim() == 3:
        png = iio.imwrite("<bytes>", as_bytes(content), extension=".png")
        content = f'<img src="{inline(png, "image/png")}" alt="{html.escape(picture.caption)}">'
    else:
        kind = "video"
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "video.mp4"
            write_video(file, content, len(content) / seconds)
            content = inline_video(file)
    return f'<div class="{kind}">\n{figure(content, picture.caption)}\n</div>'


def place(function):
    """-> a function's file, line and source."""
    function = inspect.unwrap(function)
    lines, line = inspect.getsourcelines(function)
    return Path(inspect.getsourcefile(function)).name, line, textwrap.dedent("".join(lines))


def html_stage(number, stage, seconds):
    pictures = [html_picture(picture, f"p{number}-{i}", seconds) for i, picture in enumerate(stage.pictures)]
    rows = [[what, shown(value)] for what, value in stage.shapes.items()]
    sources = []
    for function in stage.functions:
        file, line, text = place(function)
        sources.append(
            f"<details>\n<summary><code>{function.__qualname__}</code>, {file} line {line}</summary>\n"
            f"<pre><code>{html.escape(text)}</code></pre>\n</details>")
    return "\n".join([
        f'<section class="step" id="stage-{number}">',
        f"<h2>{number}. {html.escape(stage.title)}</h2>",
        f"<p>{html.escape(stage.text)}</p>",
        f'<p class="equation">{stage.equation}</p>',
        f"<p>{html.escape(stage.where)}</p>",
        f'<p class="note">{html.escape(stage.source)}</p>',
        '<div class="pictures">', *pictures,
        '<div class="wide">', html_table(["what", "shape or value"], rows), "</div>", "</div>",
        *sources, "</section>"])


def write_html(file, prompt, stages, made, seconds):
    """The page as one file. made: a sentence on how it was made. seconds: length of a video."""
    links = [f'<li><a href="#stage-{i}">{html.escape(stage.title)}</a></li>'
             for i, stage in enumerate(stages, 1)]
    body = ["<h1>One prompt through World-R1</h1>", f"<p><strong>{html.escape(prompt)}</strong></p>",
            f'<p class="note">{html.escape(made)}</p>', "<nav><ol>", *links, "</ol></nav>", "<main>",
            *(html_stage(i, stage, seconds) for i, stage in enumerate(stages, 1)), "</main>",
            '<p class="bar"><button id="play" aria-pressed="false">Play all</button></p>']
    write_page(file, "One prompt through World-R1", "\n".join(body), PLAY + TURN, STYLE + OWN_STYLE)


def write_picture(folder, name, content, seconds):
    """Writes a picture into a file of a kind that code hosts show inside a page. -> the file's name"""
    if isinstance(content, str):
        name = f"{name}.svg"
        write_text(folder / name, content)
        return name
    pixels = as_bytes(content)
    width, options = 720, {}
    if content.dim() == 4:
        width, options = 256, dict(duration=round(1000 * seconds / len(content)), loop=0, quality=80)
    scale = max(1, width // pixels.shape[-2])
    pixels = pixels.repeat(scale, -3).repeat(scale, -2)
    name += ".webp" if options else ".png"
    with written_whole(folder / name) as part:
        iio.imwrite(part, pixels, **options)
    return name


def in_cell(text):
    return html.escape(text, quote=False).replace("|", "&#124;")


def markdown_stage(number, stage, folder, seconds):
    # pictures in tables of two columns, captions below them; a still page has nothing to turn
    cells = []
    for i, picture in enumerate(stage.pictures):
        if not isinstance(picture.content, Clip):
            name = write_picture(folder / "walkthrough", f"{number:02d}_{i}", picture.content, seconds)
            cells.append((f"![{picture.caption}](walkthrough/{name})", picture.caption))
    tables = []
    columns = 4 if len(cells) > 4 else 2
    for start in range(0, len(cells), columns):
        images, captions = zip(*cells[start:start + columns])
        tables += [f"| {' | '.join(images)} |", "|---" * len(images) + "|", f"| {' | '.join(captions)} |", ""]
    rows = [f"| {in_cell(what)} | {in_cell(shown(value))} |" for what, value in stage.shapes.items()]
    # a class stands for its methods: tests/test_docs.py keeps links of this form right
    links = []
    for function in stage.functions:
        name = function.__qualname__.partition(".")[0]
        file, line, _ = place(getattr(sys.modules[function.__module__], name))
        links.append(f"[`{name}`](../{file}#L{line})")
    return "\n".join([
        f"## {number}. {stage.title}", "", stage.text, "", f"<p>{stage.equation}</p>", "",
        html.escape(stage.where, quote=False).replace("_", "&#95;"), "",
        f"{stage.source}. What ran: {', '.join(dict.fromkeys(links))}", "",
        *tables, "| what | shape or value |", "|---|---|", *rows, ""])


def write_markdown(folder, prompt, stages, made, seconds):
    """walkthrough.md and walkthrough/ into a folder of the repository, whose sources it links to."""
    body = ["# One prompt through World-R1", "", f"> {html.escape(prompt)}", "",
            html.escape(made, quote=False), ""]
    body += [markdown_stage(i, stage, folder, seconds) for i, stage in enumerate(stages, 1)]
    body += ["Now change something: [exercises](exercises.md). What a whole training does: "
             "[learning proof](learning_proof.md).", ""]
    write_text(folder / "walkthrough.md", "\n".join(body))
