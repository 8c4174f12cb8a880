"""The page of one prompt: made with the cut-down random Wan, checked against the project's own functions."""

import html
import inspect
import json
import re
import signal
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from test_report import browser, complaints, wait  # noqa: F401

import walkthrough
from model import load_dit
from noise_warp import camera_path, latent_noise, parse_motion, path_flow
from pages import html_picture, place
from rewards import TERMS
from run import Processes
from sample import euler, sigmas
from train import Config, parse_arguments, train
from walkthrough import STAGES, before_and_after, best_and_worst, dynamic_phase, main, noise_statistics, options_of, walk

pytestmark = pytest.mark.usefixtures("loaded_once")

PROMPT = 'push_in then pan_left, a <b>red</b> sphere | "room"'
THEMES = ("light", "dark")


def arguments(checkpoint, twins):
    options = dict(model=checkpoint, depth_anything=twins / "depth_anything", critic=twins / "qwen3_vl",
                   preference=twins / "hpsv3", frames=9, height=32, width=32, members=3, steps=4, noisy_steps=3,
                   window=2, views=3, frames_seen=2, lora_rank=4, kl=.01, lr=1e-2)
    given = []
    for name, value in options.items():
        given += ["--" + name.replace("_", "-"), str(value)]
    return given


@pytest.fixture(scope="module")
def given(checkpoint, twins, tmp_path_factory):
    return [*arguments(checkpoint, twins), "--runs", str(tmp_path_factory.mktemp("runs"))]


@pytest.fixture(scope="module")
def w(given):
    _, c = options_of([PROMPT, *given])
    return walk(c, PROMPT)


@pytest.fixture(scope="module")
def stages(w):
    return [make(w) for make in STAGES]


@pytest.fixture(scope="module")
def page(given, tmp_path_factory):
    """The page as the command writes it."""
    file = tmp_path_factory.mktemp("page") / "walkthrough.html"
    assert main([PROMPT, *given, "--out", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def book(given, w, tmp_path_factory):
    """The folder of the same page in Markdown, of a walk that is there already."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walkthrough, "walk", lambda *_: w)
        assert main([PROMPT, *given, "--markdown", str(folder)]) == 0
    return folder


def rows_of(text):
    """{what: value} of each stage's table."""
    sections = text.split("<section")[1:]
    return [{html.unescape(what): html.unescape(value)
             for what, value in re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", section)}
            for section in sections]


class Reader(HTMLParser):
    """Collects ids, links and sources, and checks that tags close in the order they were opened."""
    VOID = {"meta", "link", "img", "br", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.faults = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "poster", "data"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append((tag, self.getpos()))


def test_the_page_is_one_valid_file(page):
    """Tags are balanced, ids unique, and nothing is fetched; a prompt's own tags stay text."""
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.faults == []
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    for address in reader.addresses:
        assert address.startswith("data:") or address[1:] in reader.ids, address[:80]
    targets = re.findall(r"url\(#([^)]+)\)", text)
    assert targets
    assert set(targets) <= set(reader.ids)
    assert "@import" not in text
    assert "<b>" not in text
    assert text.count("&lt;b&gt;red&lt;/b&gt;") >= 2  # the prompt, and the command
    assert page.stat().st_size < 15e6


def test_every_stage_is_there_with_the_source_that_ran(page, stages):
    text = page.read_text()
    sections = text.split("<section")[1:]
    assert len(sections) == len(STAGES) == 13
    contents = re.findall(r'<li><a href="#stage-(\d+)">', text)
    assert contents == [str(i) for i in range(1, 14)]
    for section, stage in zip(sections, stages):
        assert f"{html.escape(stage.title)}</h2>" in section
        assert html.escape(stage.text) in section  # its numbers are those of a second run
        assert html.escape(stage.where) in section
        assert stage.equation in section
        assert 2 <= len(re.findall(r"[.?!](?: |$)", stage.text)) <= 5  # sentences
        assert len(re.findall("<figure>", section)) == len(stage.pictures) > 0
        for function in stage.functions:
            source = inspect.getsource(function)
            file, line, shown = place(function)
            # found anew: at that line of that file the function's text begins
            written = (ROOT / file).read_text().splitlines()[line - 1:]
            assert written[:source.count("\n")] == source.splitlines()
            assert html.escape(shown) in section
            assert f"{file} line {line}</summary>" in section


def test_numbers_on_the_page_are_those_of_the_methods_functions(page, w):
    """Recomputed here from the options alone where the method is a formula, and from the run's tensors."""
    rows = rows_of(page.read_text())
    c = w.c
    path = camera_path(parse_motion(PROMPT), 9)
    assert rows[0]["motions"] == "push_in, pan_left"
    assert rows[0]["last camera: x, z, in distances of the plane"] == f"{path[-1, 0, 3]:.3f}, {path[-1, 2, 3]:.3f}"
    assert float(rows[0]["last camera: turned by, in degrees"]) == pytest.approx(10)  # half of pan_left
    flow = path_flow(path, 32, 32)
    assert rows[1]["flow, in pixels"] == "8 × 2 × 32 × 32, float32"
    assert rows[1]["longest step from frame to frame, in pixels"] == f"{flow.norm(dim=1).max():.4g}"

    # the rollout begins with the noise that is shown, and goes from there to its window by the model before training
    transitions = w.batch.sde_steps
    at_window = euler(w.policy.reference_velocity(PROMPT), w.noise, w.levels[:transitions[0].index + 1])
    assert torch.allclose(transitions[0].x, at_window.expand(3, -1, -1, -1, -1), atol=1e-5)
    assert rows[2]["noise"] == "1 × 4 × 3 × 4 × 4, float32"
    assert rows[3]["parameters: trained"] == f"{sum(p.numel() for p in w.policy.trained.values()):,}"
    assert rows[3]["their grid"] == "3 × 2 × 2"
    assert rows[4]["noise levels"] == ", ".join(f"{level:.3f}" for level in sigmas(4, 3.0).tolist())
    assert len(w.clips) == 3
    for i, clip in enumerate(w.clips):
        assert rows[8][f"member {i}"] == ", ".join(
            f"{term.label} {clip.scores[name]:.3f}" for name, term in TERMS.items())

    # advantages are the terms as they count, standardised in the group
    sums, A = [], []
    for i in range(3):
        terms, _, advantage = rows[9][f"member {i}: terms as they count"].partition("; A ")
        sums.append(sum(float(term.split(" ")[1]) for term in terms.split(", ")))
        A.append(float(advantage))
    expected = (torch.tensor(sums) - sum(sums) / 3) / torch.tensor(sums).std(correction=0)
    torch.testing.assert_close(torch.tensor(A), expected, atol=.1, rtol=.1)
    assert torch.tensor(A).argmax() == best_and_worst(w)[0]

    # ratios before the update are 1, after it they are not; nothing was clipped before
    assert [note["ratio"] for note in w.notes] == pytest.approx([1] * len(transitions), abs=1e-5)
    largest = float(rows[10]["largest |ρ − 1| after the step"])
    assert largest == pytest.approx((w.log_ratios.exp() - 1).abs().max().item(), rel=.01)
    assert largest > 0
    for t in transitions:
        assert rows[10][f"step {t.index}: clipped"].startswith("0 → ")
    followed = [float(a) * r > 0 for ratios in w.log_ratios for a, r in zip(w.batch.advantages, ratios)]
    assert rows[10]["ratios that went with their advantage"] == f"{sum(followed) / len(followed):.0%}"
    after = torch.tensor([note["ratio"] for note in w.notes_after])
    torch.testing.assert_close(w.log_ratios.exp().mean(1), after)
    clipped_norm = sum(norm ** 2 for norm in w.gradients.values()) ** .5
    assert clipped_norm == pytest.approx(min(w.norm, c.grad_clip), rel=1e-4)
    assert (w.looks["before"].video != w.looks["after one step"].video).any()


def test_the_walk_is_a_step_of_training(w, given, tmp_path):
    """train.py, given the prompt alone and one step, logs the same rewards, advantages, loss and gradient."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(dict(prompt=PROMPT, split="train")) + "\n")
    one_step = ["--prompts", str(prompts), "--groups", "1", "--total-steps", "1", "--main-steps", "1",
                "--dynamic-steps", "0", "--eval-every", "0", "--runs", str(tmp_path), "--name", "one"]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert train(parse_arguments(["--preset", "tiny", *given, *one_step]), Processes("cpu"))
    finally:
        signal.signal(signal.SIGTERM, handler)
    row = json.loads((tmp_path / "one" / "metrics.jsonl").read_text())
    for name in (*TERMS, "total"):
        assert row[name] == pytest.approx(float(w.batch.terms[name].mean()), rel=1e-5)
    for name in TERMS:
        assert row[f"share_{name}"] == pytest.approx(w.shares[name], abs=1e-4)
    assert row["grad"] == [pytest.approx(w.norm, rel=1e-4)]
    assert row["kl"] == pytest.approx(sum(note["kl"] for note in w.notes) / len(w.notes), abs=1e-9)


def test_statistics_tell_transported_noise_from_white():
    path = camera_path(["pan_right"], 17)
    moved = latent_noise(path, 17, 16, 16, generator=torch.Generator().manual_seed(0))[0]
    white = torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
    flow = path_flow(path[::4], 16, 16)
    moved, white = noise_statistics(moved, flow), noise_statistics(white, flow)
    along = "in time: correlation along the flow"
    assert moved[along] > .5
    assert abs(white[along]) < .1
    for statistics in (moved, white):
        assert abs(statistics["in space: correlation with the right neighbour"]) < .1
        assert statistics["last frame: kurtosis (of a Gaussian: 3)"] == pytest.approx(3, abs=.3)
        assert statistics["last frame: standard deviation"] == pytest.approx(1, abs=.1)


def test_markdown_is_the_same_stages_with_pictures_that_open(book, stages):
    text = (book / "walkthrough.md").read_text()
    names = re.findall(r"!\[[^\]]+\]\((walkthrough/[\w.]+)\)", text)
    assert len(names) == len(set(names)) == len(list((book / "walkthrough").iterdir()))
    moving = 0
    for name in names:
        file = book / name
        if file.suffix == ".svg":
            xml.etree.ElementTree.parse(file)
        else:
            with Image.open(file) as picture:
                moving += getattr(picture, "n_frames", 1) > 1
                assert picture.height >= 24
    assert moving >= len(stages[5].pictures) - 1  # the members' videos at least
    titles = re.findall(r"^## (\d+)\. (.+)$", text, re.M)
    assert titles == [(str(i), stage.title) for i, stage in enumerate(stages, 1)]
    assert all(stage.text in text for stage in stages)
    assert "<b>" not in text
    # links lead to where functions begin: of a method, its class
    links = re.findall(r"\[`(\w+)`\]\(\.\./([\w./]+)#L(\d+)\)", text)
    assert len(links) > 20
    for name, file, line in links:
        begins = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert begins.startswith((f"def {name}", f"class {name}", "@")), (name, file, line)


def test_a_trained_adapter_is_a_third_video(given, w, stages, tmp_path):
    """Of --trained; and without one, the page says how to make it."""
    assert list(w.looks) == ["before", "after one step"]
    assert "--trained" in before_and_after(w).text
    w.policy.average = dict(w.policy.trained)  # of what the one step has made, not of its running mean
    w.policy.export(tmp_path)
    a, c = options_of([PROMPT, *given, "--trained", str(tmp_path / "lora.safetensors")])
    walkthrough.check_options(a, c)
    third = walk(c, PROMPT, a.trained)
    assert list(third.looks)[-1] == "after a whole training"
    trained = third.looks["after a whole training"].video
    assert not torch.equal(trained, third.looks["before"].video)
    torch.testing.assert_close(trained, w.looks["after one step"].video, atol=1e-3, rtol=0)
    assert "--trained" not in before_and_after(third).text


def test_an_own_model_gets_no_adapter_of_the_tiny_one(given):
    a, c = options_of([PROMPT, *given])
    assert a.trained is None
    assert c.lora is None
    _, tiny = options_of([PROMPT])
    assert tiny.model == Config.model
    assert tiny.lora.endswith("web")
    assert tiny.groups == 1


@pytest.mark.parametrize("options, sentence", (
    (["  "], "the prompt is empty"),
    ([PROMPT, "--meta", "0"], "give none of them weight 0"),
    ([PROMPT, "--groups", "4"], "the page follows one group, all members at once, through one update, and noise "
                                "transported at the start; leave out --groups"),
    ([PROMPT, "--batch=1"], "leave out --batch"),
    ([PROMPT, "--released"], "leave out --released"),
    ([PROMPT, "--frames", "8"], "--frames must be 4k+1"),
    ([PROMPT, "--trained", "nowhere"], "nowhere"),
    ([PROMPT, "--model", "nowhere"], "nowhere"),
    ([PROMPT, "--out", "/proc/no/page.html"], "/proc/no/page.html"),
    ([PROMPT, "--out", "keep.csv"], "--out must end in .html, got 'keep.csv'"),
    ([PROMPT, "--markdown", "book"], "cannot write 'book/walkthrough/01_0.svg'"),
    ([PROMPT, "--trained", "junk.safetensors"], "junk.safetensors is not a whole safetensors file"),
))
def test_wrong_options_are_one_sentence_and_write_nothing(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keep.csv").write_text("kept")
    (tmp_path / "junk.safetensors").write_text("junk" * 9)
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "walkthrough").write_text("a file")
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("walkthrough.py: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "keep.csv").read_text() == "kept"


def adapter(file, **layers):
    """A LoRA file of rank 2 for layers of the first block: {name: (what A holds, what B holds)}."""
    tensors = {}
    for name, (a, b) in layers.items():
        tensors[f"transformer.blocks.0.attn1.{name}.lora_A.weight"] = a
        tensors[f"transformer.blocks.0.attn1.{name}.lora_B.weight"] = b
    save_file(tensors, file)
    return str(file)


def test_an_adapter_that_does_not_fit_is_found_before_any_work(given, tmp_path, capsys):
    """Nothing is written: not the prompts' embeddings either. One that makes no number is a sentence, too."""
    (*_, width), = [p.shape for name, p in load_dit(given[1]).named_parameters()
                    if name == "blocks.0.attn1.to_v.weight"]
    out = tmp_path / "page.html"
    command = [PROMPT, *given, "--runs", str(tmp_path / "runs"), "--out", str(out), "--trained"]
    wide = adapter(tmp_path / "wide.safetensors", to_v=(torch.ones(2, width + 1), torch.ones(width, 2)))
    assert main([*command, wide]) == 2
    assert "fits no layer of this model" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    huge = adapter(tmp_path / "huge.safetensors",
                   to_v=(torch.full((2, width), 1e18), torch.full((width, 2), 1e19)))
    assert main([*command, huge]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"walkthrough.py: '{huge}' made latents that are not finite; give another adapter, or a smaller --lr")
    assert not out.exists()


def test_videos_that_no_judge_can_score_are_one_sentence(given, tmp_path, capsys):
    """One frame shows no camera path."""
    out = tmp_path / "page.html"
    assert main([PROMPT, *given, "--frames", "1", "--views", "2", "--out", str(out)]) == 2
    assert "S_meta failed on every video (ValueError: one frame shows no camera path)" in capsys.readouterr().err
    assert not out.exists()


def test_ids_of_two_charts_never_meet(stages):
    chart = stages[0].pictures[0]
    ids = [set(re.findall(r'\bid="([^"]+)"', html_picture(chart, prefix, 1.0))) for prefix in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("width", (390, 1280))
def test_the_page_in_a_browser(page, browser, width):  # noqa: F811
    """On a phone and on a desk, light and dark: no complaint, no sideways scroll, videos that play and stop."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    videos = "[...document.querySelectorAll('video')]"
    wait(browser, f"{videos}.every(v => v.readyState >= 2)")
    colours = []
    for theme in THEMES:
        feature = dict(name="prefers-color-scheme", value=theme)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[feature]))
        colours.append(browser.execute_script(
            "const style = getComputedStyle(document.body);"
            "const label = getComputedStyle(document.querySelector('svg text'));"
            "return [style.color, style.backgroundColor, label.fill]"))
        assert len(set(colours[-1])) == 3
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert all(light != dark for light, dark in zip(*colours))

    # one button for all videos, by keyboard
    button = browser.find_element("id", "play")
    if button.get_attribute("aria-pressed") == "false":
        button.send_keys("\n")
    wait(browser, f"{videos}.every(v => !v.paused && v.currentTime > 0)")
    button.send_keys("\n")
    wait(browser, f"{videos}.every(v => v.paused)")

    # a link of the contents leads to its stage
    browser.find_element("css selector", "a[href='#stage-8']").click()
    wait(browser, "Math.abs(document.getElementById('stage-8').getBoundingClientRect().top) < 100")
    assert complaints(browser) == []


def test_the_gaussians_turn_by_keyboard_and_by_hand(page, browser):  # noqa: F811
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    browser.get(page.as_uri())
    canvas = browser.find_element("tag name", "canvas")
    picture = "document.querySelector('canvas').toDataURL()"
    seen = [browser.execute_script(f"return {picture}")]
    opaque = "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 == 3)"
    share = browser.execute_script(
        f"const c = document.querySelector('canvas'); const a = {opaque}; return a.filter(x => x).length / a.length")
    assert share > .05  # there are points to see
    for key in (Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP):
        canvas.send_keys(key)
        wait(browser, f"{picture} != '{seen[-1]}'")
        seen.append(browser.execute_script(f"return {picture}"))
    ActionChains(browser).drag_and_drop_by_offset(canvas, 60, 0).perform()
    wait(browser, f"{picture} != '{seen[-1]}'")
    assert complaints(browser) == []


def test_the_dynamic_phase_is_shown_as_training_goes_through_it(w, stages, monkeypatch):
    """After main_steps main steps come dynamic_steps dynamic ones, for the terms outside R_3D alone."""
    shapes = stages[-1].shapes
    assert shapes["main steps, then dynamic steps"] == f"{w.c.main_steps}, {w.c.dynamic_steps}"
    assert shapes["terms that count in a dynamic step"] == "R_gen"
    told = []
    monkeypatch.setattr(walkthrough, "chart", lambda caption, draw, *arguments: told.append(arguments))
    dynamic_phase(w)
    (dynamic,), = told
    assert dynamic == ([False] * w.c.main_steps + [True] * w.c.dynamic_steps) * 2
