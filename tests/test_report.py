import json
import os
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import report
from noise_warp import camera_path, parse_motion
from report import (QUESTIONS, chart, draw_curves, example, fleiss_kappa, html_tables, inline_svg, main,
                    missing_steps, one_term_warnings, prompts_of, training_charts, win_rate)
from rewards import TERMS, Rewards
from sample import read_video, write_video
from weights import write_json

pytestmark = pytest.mark.usefixtures("loaded_once")

FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
         "disable-background-networking", "disable-component-update",
         "autoplay-policy=no-user-gesture-required", "window-size=420,900")  # a phone's width


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium through its own driver."""
    selenium = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium with its driver (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def complaints(browser):
    log = browser.get_log("browser")
    return [entry["message"] for entry in log if entry["level"] in ("SEVERE", "WARNING")]


def wait(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, 20, .1).until(lambda b: b.execute_script(f"return {script}"))


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------- study

def moving(shade):
    """A small clip whose brightness is its identity."""
    video = torch.full((9, 3, 32, 48), shade)
    for f in range(9):
        video[f, :, 4:12, 3 * f:3 * f + 10] = 1 - shade
    return video


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of three pairs in `page`, with its key."""
    folder = tmp_path_factory.mktemp("videos")
    base, trained = folder / "base" / "videos", folder / "trained" / "videos"
    for i in range(3):
        write_video(base / f"{i:04d}.mp4", moving(.2), 8)
        write_video(trained / f"{i:04d}.mp4", moving(.8), 8)
    rows = [dict(video=f"{i:04d}", prompt=f"push_in scene <{i}> </script><!--<script>") for i in range(3)]
    write_lines(folder / "base" / "metrics.jsonl", rows)
    assert main(["study", "--a", str(base), "--b", str(trained), "--out", str(folder / "study")]) == 0
    return folder / "study"


def key_of(study):
    return json.loads((study / "study_key.json").read_text())


def sides_of(study):
    """{file: side} of all pairs."""
    return {file: side for pair in key_of(study)["pairs"] for file, side in pair.items()}


def test_study_page_names_no_side(study):
    text, sides = (study / "page" / "index.html").read_text(), sides_of(study)
    assert sorted(file.name for file in study.iterdir()) == ["page", "study_key.json"]
    for word in ("trained", "base/", str(study), "http"):
        assert word not in text
    files = sorted(file.name for file in (study / "page").glob("*.mp4"))
    assert files == sorted(sides)
    assert all(file in text for file in files)
    assert Counter(sides.values()) == dict(a=3, b=3)
    assert not (study / "page" / "study_key.json").exists()
    assert "<!--" not in text  # in a prompt it would empty the page


def test_a_study_is_blind(tmp_path, monkeypatch, capsys):
    """Names, times and the order of copying say nothing of the side, and no seed gives them again."""
    for moment, side in enumerate(("a", "b")):
        (tmp_path / side).mkdir()
        for i in range(12):
            file = tmp_path / side / f"{i:02d}.mp4"
            file.write_bytes(f"{side}{i}".encode())
            os.utime(file, (1e9 + moment, 1e9 + moment))
    copied = []
    copy = shutil.copyfile

    def recorded(source, target):
        copied.append((source.stem, source.parent.name))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", recorded)
    keys, sides = [], []
    for name in ("one", "two"):
        random.seed(0)
        np.random.seed(0)
        command = ["study", "--a", str(tmp_path / "a"), "--b", str(tmp_path / "b"),
                   "--out", str(tmp_path / name)]
        assert main(command) == 0
        keys.append(key_of(tmp_path / name))
        sides.append(sides_of(tmp_path / name))
        times = {(file.stat().st_mtime_ns, file.stat().st_atime_ns)
                 for file in (tmp_path / name / "page").glob("*.mp4")}
        assert len(times) == 1

    one, two = keys
    assert one["study"] != two["study"]
    assert not sides[0].keys() & sides[1].keys()
    assert copied[:24] != copied[24:]
    for order in (copied[:24], copied[24:]):
        assert len(set(order)) == 24
        assert [name for name, _ in order] != sorted(name for name, _ in order)
        assert [side for _, side in order] not in (["a", "b"] * 12, ["a"] * 12 + ["b"] * 12)

    # a study that is given out is not lost by making it again, and one that is stopped leaves nothing
    assert main(command) == 2
    assert "two is there already and is never replaced" in capsys.readouterr().err
    assert key_of(tmp_path / "two") == two

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    assert main([*command[:-1], str(tmp_path / "three")]) == 130
    assert capsys.readouterr().err.splitlines() == ["report.py: interrupted; give the same command again"]
    assert not (tmp_path / "three").exists()


def answers(key, prefer, person):
    """A participant who always prefers one side, or neither ("same")."""
    rows = []
    for i, pair in enumerate(key["pairs"]):
        left, right = sorted(pair, key=pair.get, reverse=(i + person) % 2)
        choice = prefer
        if prefer != "same":
            choice = "left" if pair[left] == prefer else "right"
        rows.append(dict(pair=i, left=left, right=right) | dict.fromkeys(QUESTIONS, choice))
    return dict(study=key["study"], participant=str(person), answers=rows)


def test_scoring_known_answers(study, tmp_path, capsys):
    key, files = key_of(study), []
    for person, prefer in enumerate(("b", "b", "b", "same")):
        files.append(tmp_path / f"{person}.json")
        write_json(files[-1], answers(key, prefer, person))
    command = ["score", *map(str, files), "--out", str(study)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "4 participants, 12 answers, left out: none" in out
    assert "overall   0.875 [" in out
    low, high = out.splitlines()[-1].split("[")[1].split("]")[0].split(", ")
    assert .5 <= float(low) < .875 < float(high) <= 1  # over participants, of whom one in four is undecided


def test_answers_that_cannot_count_are_left_out_and_counted(study, tmp_path, capsys):
    """Copies of a file, a pair answered twice, another study's answers and impossible ones move nothing."""
    key = key_of(study)
    people = [answers(key, prefer, person) for person, prefer in enumerate(("a", "b"))]

    def score(*given):
        files = [tmp_path / f"{i}.json" for i in range(len(given))]
        for file, content in zip(files, given):
            write_json(file, content)
        code = main(["score", *map(str, files), "--out", str(study)])
        return code, capsys.readouterr()

    code, honest = score(*people)
    assert code == 0
    first, rates = honest.out.split("\n", 1)
    assert "overall   0.500 [" in rates

    # a participant counts once, however often the file is handed in
    _, stuffed = score(*people, *[people[1]] * 100)
    assert stuffed.out == honest.out.replace("left out: none", "left out: 300 repeated")
    changed = answers(key, "a", 1)  # a change of mind
    assert score(*people, changed)[1].out == honest.out.replace("left out: none", "left out: 3 repeated")

    # impossible: each of them a copy of a good answer of someone new, with one thing wrong
    good = answers(key, "b", 2)["answers"][0]
    other = answers(key, "b", 2)["answers"][1]
    wrong = [good | change for change in (
        dict(pair=3), dict(pair=-3), dict(pair="0"), dict(pair=1), dict(overall="both"), dict(camera=None),
        dict(left=good["right"]), dict(left=other["left"]), dict(left="0.mp4"), dict(left=[]))]
    wrong += [{}, None, "left", [0]]
    _, cheated = score(*people, dict(study=key["study"], participant="2", answers=wrong))
    assert cheated.out == honest.out.replace("left out: none", "left out: 14 impossible")

    crossed = answers(key, "b", 3) | dict(study="another")
    _, mixed = score(*people, crossed)
    assert mixed.out == honest.out.replace("left out: none", "left out: 3 of another study")
    code, nothing = score(crossed)
    assert code == 2
    assert "no answer in these files (left out: 3 of another study)" in nothing.err


@pytest.mark.parametrize("damage", (
    "[", "[]", "{}", '{"study": 1, "participant": "x", "answers": []}', '{"study": "x", "answers": []}',
    '{"study": "x", "participant": "x", "answers": {}}'))
def test_damaged_study_files_are_one_sentence(damage, study, tmp_path, capsys):
    """Of a participant's file, and of the key."""
    shutil.copy(study / "study_key.json", tmp_path / "study_key.json")
    (tmp_path / "answers.json").write_text(damage)
    command = ["score", str(tmp_path / "answers.json"), "--out", str(tmp_path)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "answers.json" in error
    assert error.count("\n") == 1

    (tmp_path / "study_key.json").write_text(damage)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "study_key.json" in error
    assert error.count("\n") == 1


def test_one_participant_is_their_own_interval(study, tmp_path, capsys):
    file = tmp_path / "answers.json"
    write_json(file, answers(key_of(study), "a", 0))
    assert main(["score", str(file), "--out", str(study)]) == 0
    assert "camera    0.000 [0.000, 0.000]  Fleiss' kappa needs two answers a pair" in capsys.readouterr().out


def test_fleiss_kappa_of_the_published_example():
    """The example of Fleiss 1971 as it is commonly given: 14 raters, 10 subjects, 5 categories."""
    counts = [(0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
              (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)]
    items = [Counter({category: n for category, n in enumerate(row) if n}) for row in counts]
    assert fleiss_kappa(items) == pytest.approx(.210, abs=5e-4)


def test_fleiss_kappa_of_the_extremes():
    assert fleiss_kappa([Counter(a=3), Counter(b=3)]) == 1
    assert fleiss_kappa([Counter(a=3), Counter(a=3)]) == 1
    assert fleiss_kappa([Counter(a=1, b=1)] * 4) == -1
    assert fleiss_kappa([Counter(a=1)]) is None


def answer_by_keyboard(browser, target):
    """Tabs through the page, picks `target` in every question and goes on to the next pair."""
    from selenium.webdriver.common.keys import Keys
    for _ in range(40):
        focus = browser.switch_to.active_element
        if focus.get_attribute("id") == "next":
            focus.send_keys(Keys.ENTER)
            break
        if focus.get_attribute("type") == "radio" and not focus.get_attribute("data-done"):
            focus.send_keys(Keys.SPACE)
            while browser.switch_to.active_element.get_attribute("value") != target:
                browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
            name = focus.get_attribute("name")
            inputs = f"document.querySelectorAll('input[name={name}]')"
            browser.execute_script(f"{inputs}.forEach(r => r.dataset.done = 1)")
        browser.switch_to.active_element.send_keys(Keys.TAB)
    browser.execute_script("document.querySelectorAll('input').forEach(r => delete r.dataset.done)")


def test_a_study_by_keyboard_scores_back(study, browser, tmp_path, capsys):
    """Every pair is answered with the keyboard alone, always for side b; the score is that answer."""
    browser.get((study / "page" / "index.html").as_uri())
    for side in ("left", "right"):
        wait(browser, f"document.getElementById('{side}').readyState >= 2")
    sides = sides_of(study)
    for n in range(3):
        wait(browser, f"document.getElementById('progress').textContent.startsWith('Pair {n + 1} of 3')")
        wait(browser, "!document.getElementById('left').paused")
        wait(browser, "document.getElementById('left').currentTime > 0")
        assert not browser.find_element("id", "next").is_enabled()
        assert "push_in scene <" in browser.find_element("id", "prompt").text
        left = browser.execute_script("return document.getElementById('left').src").rsplit("/", 1)[1]
        answer_by_keyboard(browser, "left" if sides[left] == "b" else "right")
    wait(browser, "!document.getElementById('done').hidden")
    state = json.loads(browser.execute_script("return localStorage.getItem(Object.keys(localStorage)[0])"))
    assert complaints(browser) == []
    assert sorted(row["pair"] for row in state["answers"]) == [0, 1, 2]
    browser.refresh()
    wait(browser, "!document.getElementById('done').hidden")  # answers outlive a reload

    write_json(tmp_path / "answers.json", dict(study=key_of(study)["study"], **state))
    assert main(["score", str(tmp_path / "answers.json"), "--out", str(study)]) == 0
    out = capsys.readouterr().out
    assert all(f"{question:9} 1.000" in out for question in QUESTIONS)


# --------------------------------------------------------------------------------------------------------------- report

def training_row(step):
    """A line of metrics.jsonl; every fifth step is dynamic and has no 3D terms."""
    dynamic = step % 5 == 4
    row = dict(step=step, phase="dynamic" if dynamic else "main", grad=[.1 * step + .1], ratio=1.0,
               ratio_max=1.1, clipped=.2, kl=.01 * step, motion=1.0 + step)
    for name in ("total", *TERMS):
        masked = dynamic and name not in ("general", "total")
        row[name] = None if masked else .1 * step
        row[f"{name}_std"] = None if masked else .05
    return row


@pytest.fixture(scope="module")
def reported(twins, tmp_path_factory):
    """A run's folder as train.py leaves it, with two results folders, and its report."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    for step in (0, 10):
        flicker = torch.rand(9, 3, 1, 1, generator=torch.Generator().manual_seed(step)).expand(-1, -1, 64, 64)
        for i in range(2):
            write_video(run / "eval" / f"{step:06d}" / f"{i:02d}.mp4", flicker, 8)
        asked = "".join(f"push_in room {i} </h3><!--<script>\n" for i in range(2))
        (run / "eval" / f"{step:06d}" / "prompts.txt").write_text(asked)
    write_lines(run / "prompts.jsonl", [dict(prompt=f"push_in room {i} </h3><!--<script>", split=split)
                                        for split in ("train", "test") for i in range(2)])
    write_lines(run / "metrics.jsonl", [training_row(step) for step in range(10)])
    write_lines(run / "eval.jsonl", [dict(step=0, total=1.0, traj=None, motion=2.0),
                                      dict(step=10, total=2.5, traj=.5, motion=.5)])
    write_json(run / "config.json", dict(
        name="demo <1>", groups=2, members=4, frames=9, height=64, width=64, seed=0,
        model="tiny/wan", lora=None, prompts=str(run / "prompts.jsonl"), lpips="random", views=3,
        depth_anything=str(twins / "depth_anything"), critic=str(twins / "qwen3_vl"),
        preference=str(twins / "hpsv3"), frames_seen=1))  # of an older version: without traj_alpha
    for name, value in (("untrained", 20.25), ("after", 20.75)):  # the trained one is the first by name
        (run / name).mkdir()
        row = dict(video="0000", prompt="p", size="9x64x64", psnr=value)
        write_lines(run / name / "metrics.jsonl", [row])
        write_json(run / name / "summary.json", dict(
            videos=1, failed=0, sizes=["<i>"], seed=0, lpips="random trunk (a stand-in)",
            lora=str(run / "lora.safetensors") if name == "after" else "elsewhere", summary=dict(psnr=[value] * 3, vbench="not measured <i>")))
    assert main(["run", str(run)]) == 0
    return run / "report.html"


def test_report_is_one_file_with_everything_in_it(reported):
    text = reported.read_text()
    assert "http" not in text.replace("http://www.w3.org", "")  # the names of SVG's own vocabulary
    assert 'src="data:video/mp4;base64,' in text
    labels = [term.label for term in TERMS.values()]
    for word in (*labels, "total reward", "demo &lt;1&gt;", "motion magnitude", "KL to the untouched model",
                 "meta-view", "re-render", "camera path from above", ">asked<", ">found<",
                 "after 0 steps", "after 10 steps", "stand-in", "<td>2.5000</td>",
                 "<h3>Camera control (sums over the reconstructed views)</h3>",
                 "<td>20.250 [20.250, 20.250]</td>", "<td>paper: World-R1-Small</td>",
                 "<td>+0.500 [+0.500, +0.500] (100% of 1)</td>",
                 "the total has risen from 1.000 to 2.500, but motion fell from 2.00 to 0.50",
                 f"walkthrough.py PROMPT --trained {reported.parent} --out {reported.parent / 'walkthrough.html'}"):
        assert word in text, word
    assert "<!--" not in text
    assert "<i>" not in text
    assert text.count("&lt;i&gt;") == 2 + 2
    assert text.count("<script>") == text.count("</script>") == 1
    assert "missing from" not in text
    assert text.count("<video") == 2 * 2 * 2  # two prompts, before and after, input and re-render


def test_a_full_runs_changes_are_from_what_it_did_not_make(reported, tmp_path):
    """It exports a model in place of an adapter, so there is none to follow through the method either."""
    run = shutil.copytree(reported.parent, tmp_path / "run")
    for file, new in (("config.json", dict(full=True)), ("untrained/summary.json", dict(lora=None, model="tiny/wan")),
                      ("after/summary.json", dict(lora=None, model=str(run / "model")))):
        write_json(run / file, json.loads((run / file).read_text()) | new)
    assert main(["run", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "<td>+0.500 [+0.500, +0.500] (100% of 1)</td>" in text
    assert "walkthrough.py" not in text


def test_report_in_a_browser(reported, browser):
    browser.get(reported.as_uri())
    wait(browser, "[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    wait(browser, "[...document.querySelectorAll('video')].every(v => v.currentTime > 0 || !v.paused)")
    colours = {}
    for theme in ("light", "dark"):
        feature = dict(name="prefers-color-scheme", value=theme)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[feature]))
        colours[theme] = browser.execute_script(
            "const page = getComputedStyle(document.body);"
            "const label = getComputedStyle(document.querySelector('svg text'));"
            "return [page.color, page.backgroundColor, label.fill]")
        assert len(set(colours[theme])) == 3
    assert all(light != dark for light, dark in zip(colours["light"], colours["dark"]))
    # a phone's width, no sideways scroll
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth + 1")

    button = browser.find_element("id", "play")
    playing = button.get_attribute("aria-pressed")
    button.send_keys("\n")
    assert button.get_attribute("aria-pressed") == ("false" if playing == "true" else "true")
    assert button.text == ("Play all" if playing == "true" else "Pause all")
    wait(browser, f"[...document.querySelectorAll('video')].every(v => v.paused === {playing})")
    assert complaints(browser) == []


def test_charts_leave_gaps_shade_phases_and_draw_bands():
    axes = Figure().add_subplot()
    values = (1.0, 2.0, 0.0, 3.0, 4.0)
    rows = [dict(step=step, phase="main", a=value, a_std=.1) for step, value in enumerate(values)]
    rows[2] = dict(step=2, phase="dynamic", a=None, a_std=None)
    draw_curves(axes, "x", rows, {"a": "a"}, "a_std")
    line, = axes.lines
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]
    shade, = axes.patches
    assert (shade.get_x(), shade.get_width()) == (1.5, 1)
    band, = axes.collections
    assert len(band.get_paths()) == 2  # broken where the line is
    top = max(path.vertices[:, 1].max() for path in band.get_paths())
    assert top == pytest.approx(4.1)


def test_missing_steps_are_named_hatched_and_no_line_crosses_them(tmp_path):
    rows = [training_row(step) for step in (0, 1, 2, 6, 7, 9)]
    assert missing_steps(rows) == [(3, 5), (8, 8)]
    assert missing_steps(rows[3:]) == [(0, 5), (8, 8)]  # a log that has lost its beginning
    assert missing_steps(rows[:3]) == []
    assert missing_steps(rows[:3], done=5) == [(3, 4)]  # the last lines

    axes = Figure().add_subplot()
    draw_curves(axes, "x", rows, {"total": "total"}, "total_std")
    line, = axes.lines
    x, y = line.get_data()
    assert x[np.isnan(y)].tolist() == [3, 8]
    hatched = [(shade.get_x(), shade.get_width()) for shade in axes.patches if shade.get_hatch()]
    assert hatched == [(2.5, 3), (7.5, 1)]
    band, = axes.collections
    assert len(band.get_paths()) == 3

    write_lines(tmp_path / "metrics.jsonl", rows)
    write_json(tmp_path / "config.json", dict(name="x"))
    assert main(["run", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "Steps 3 to 5, 8 are missing from metrics.jsonl." in text


@pytest.mark.parametrize("name, content, message", (
    ("metrics.jsonl", '{"step": 0}\n{"st\n{"step": 2}', "metrics.jsonl, line 2 "),
    ("metrics.jsonl", '{"total": 1}', "metrics.jsonl, line 1: "),
    ("metrics.jsonl", '{"step": 0, "total": "high"}', "metrics.jsonl, line 1, entry total: "),
    ("metrics.jsonl", '{"step": 0, "grad": 1}', "metrics.jsonl, line 1, entry grad: "),
    ("metrics.jsonl", '[]', "metrics.jsonl, line 1: "),
    ("eval.jsonl", '{"step": 0, "total": []}', "eval.jsonl, line 1"),
    ("eval.jsonl", '{"step": "<img>"}', "eval.jsonl, line 1"),
    ("eval.jsonl", '{"step": 0}\n{"total": 1}', "eval.jsonl has a line without its step; take the line out"),
    ("eval.jsonl", '{"step": 0}\n{"step": 1, "total": 1%s}' % ("0" * 400), "eval.jsonl, line 2"),
    ("metrics.jsonl", '{"step": 1000000000000}', "metrics.jsonl, line 1, entry step: "),
    ("a\nb/summary.json", '{}', "a results folder with a line break in its name, 'a\\nb'; rename it"),
    ("eval/000000/best.mp4", '', "eval/000000/best.mp4 has no prompt"),
    ("eval/000000/02.mp4", '', "eval/000000/02.mp4 has no prompt"),
    ("config.json", '{"name": 1}', "config.json, entry name: "),
    ("config.json", '[]', "config.json"),
    ("config.json", '{', "config.json"),
    ("config.json", '', "config.json"),
    ("x/summary.json", '{}', "summary.json"),
))
def test_a_damaged_run_is_one_sentence(name, content, message, tmp_path, capsys):
    for folder in ("x", "a\nb", "eval/000000", "eval/000001"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "eval/000000/prompts.txt").write_text("push_in a box\npan_left a ball\n")
    (tmp_path / "eval/000001/prompts.txt").touch()
    write_json(tmp_path / "config.json", dict(name="x", depth_anything="nowhere"))
    write_lines(tmp_path / "metrics.jsonl", [dict(step=0, total=1.0), dict(step=1, total=2.0)])
    (tmp_path / name).write_text(content + "\n" * name.endswith(".jsonl"))
    assert main(["run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_goes_on_or_has_diverged_has_a_report(tmp_path):
    """A line that is being written, an evaluation that is not whole yet, numbers beyond any chart."""
    write_json(tmp_path / "config.json", dict(name="x", depth_anything="nowhere"))
    row = '{"step": 0, "total": 1.0, "ratio_max": 1e308, "kl": 3e38, "grad": [1e300]}'
    (tmp_path / "metrics.jsonl").write_text(row + '\n{"step": 1, "tot')
    (tmp_path / "eval.jsonl").write_text('{"step": 0, "total": 1e300}\n{"st')
    for step, whole in (("000000", True), ("000008", False)):
        (tmp_path / "eval" / step).mkdir(parents=True)
        (tmp_path / "eval" / step / "00.mp4").touch()
        if whole:
            (tmp_path / "eval" / step / "prompts.txt").write_text("push_in a box\n")
    assert main(["run", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "1 steps of" in text and "No two evaluations yet" in text


@torch.no_grad()
def test_examples_are_scored_against_the_training_s_path(twins, tmp_path):
    write_video(tmp_path / "0.mp4", moving(.2), 8)
    judges = Rewards(twins / "depth_anything", twins / "qwen3_vl", twins / "hpsv3", views=3,
                     weights=dict(meta=0, recon=0, general=0))
    prompt = "orbit_left a room"
    video, _ = read_video(tmp_path / "0.mp4")
    for strength in (.5, 2.0):
        path = camera_path(parse_motion(prompt), len(video), strength)
        expected = judges.score(video, prompt, path).scores["traj"]
        assert f"S_traj {expected:.3f}" in example(tmp_path / "0.mp4", "x", prompt, judges, strength)


def test_a_report_without_examples_needs_no_judge(reported, tmp_path):
    shutil.copytree(reported.parent, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    write_json(tmp_path / "run" / "config.json", config | dict(critic="nowhere"))
    assert main(["run", str(tmp_path / "run")]) == 2
    assert main(["run", str(tmp_path / "run"), "--no-examples"]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<video" not in text
    assert "motion magnitude" in text and "20.250" in text


def test_a_walkthrough_in_the_run_is_linked(tmp_path):
    write_json(tmp_path / "config.json", dict(name="x"))
    write_lines(tmp_path / "metrics.jsonl", [dict(step=0, total=1.0)])
    (tmp_path / "walkthrough.html").touch()
    assert main(["run", str(tmp_path)]) == 0
    assert '<a href="walkthrough.html">' in (tmp_path / "report.html").read_text()


def test_an_evaluation_that_is_not_there_yet_is_left_out(tmp_path):
    write_json(tmp_path / "config.json", dict(name="x"))
    write_lines(tmp_path / "metrics.jsonl", [dict(step=0, total=1.0)])
    (tmp_path / "eval.jsonl").write_text("")
    assert main(["run", str(tmp_path)]) == 0


def test_charts_survive_constants_and_missing_values():
    picture = chart("S_x", [dict(step=3, phase="main", x=1.0)], {"a": "x"})
    assert "<svg" in picture and "nan" not in picture.lower()
    assert 'aria-label="S_x: a over 1 steps"' in picture
    assert ">S_x</text>" in picture
    assert chart("x", [dict(step=0, phase="main", x=None)], {"a": "x"}) == ""


def test_a_pair_has_one_prompt(tmp_path, capsys):
    """What only one side knows is taken; what both know must be the same."""
    for side, prompt in (("a", "a lake"), ("b", "a hill")):
        write_video(tmp_path / side / "videos" / "0000.mp4", moving(.2), 8)
        write_lines(tmp_path / side / "metrics.jsonl", [dict(video="0000", prompt=prompt)])
    command = ["study", "--out", str(tmp_path / "s")]
    command += [word for side in "ab" for word in (f"--{side}", str(tmp_path / side / "videos"))]
    assert main(command) == 2
    assert "0000.mp4 has another prompt in" in capsys.readouterr().err
    (tmp_path / "a" / "metrics.jsonl").unlink()
    assert main(command) == 0
    assert "a hill" in (tmp_path / "s" / "page" / "index.html").read_text()


def test_the_total_of_a_dynamic_phase_is_no_part_of_its_curve():
    """It is R_gen alone there, and would fall at each phase."""
    rows = [dict(step=step, phase="dynamic" if step == 2 else "main", total=3.0) for step in range(5)]
    rows[2]["total"] = .5
    drawn = training_charts(rows)
    assert drawn == training_charts([row | dict(total=None) if row["phase"] == "dynamic" else row for row in rows])
    assert drawn != training_charts([row | dict(phase="main") for row in rows])


def test_shares_of_the_terms_are_drawn_and_one_alone_is_a_warning():
    rows = [training_row(step) | dict(share_recon=.8, share_meta=.2) for step in range(40)]
    for row in rows:
        if row["phase"] == "dynamic":
            row["share_recon"] = None  # these steps do not count
    assert "share of the advantages&#x27; variance: S_meta, S_recon over 40 steps" in training_charts(rows)
    warning, = one_term_warnings(rows)
    assert "S_recon alone" in warning
    assert "steps 0 to 38" in warning
    rows[20]["share_recon"] = .7  # 16 main steps before it, 15 after
    assert one_term_warnings(rows) == []
    assert one_term_warnings([dict(step=step) for step in range(40)]) == []


def test_what_files_say_is_text_on_the_page(tmp_path):
    """Old rows without phase, gradient and shares have gaps, and no file can bring markup into the report."""
    write_lines(tmp_path / "metrics.jsonl", [dict(step=0, total=1.0), dict(step=1, total=2.0)])
    write_lines(tmp_path / "eval.jsonl", [{"step": 0, "<img src=x onerror=alert(1)>": 1.0}])
    write_json(tmp_path / "config.json", dict(name="</script><img src=x>", model="<img src=x>", lora="<img>"))
    assert main(["run", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "<img" not in text
    assert text.count("</script>") == 1
    assert ">total reward, main steps</text>" in text
    assert "advantages&#x27; variance" not in text


def test_pictures_have_no_ground_and_name_no_address():
    picture = inline_svg((2, 2), "a <line>", lambda axes: axes.plot([0, 1]))
    assert picture.startswith('<svg role="img" aria-label="a &lt;line&gt;"')
    assert "http" not in picture.replace("http://www.w3.org", "")
    assert "fill: #ffffff" not in picture


def test_markdown_tables_become_html():
    text = html_tables("**Title**\n\n| | a |\n|---|---|\n| x | *1 < 2* |\n\nA note.")
    assert "<h3>Title</h3>" in text
    assert "<tr><th></th><th>a</th></tr>\n<tr><td>x</td><td>1 &lt; 2</td></tr>" in text
    assert '<p class="note">A note.</p>' in text


def test_what_cannot_be_shown_is_one_sentence(tmp_path, capsys):
    folder = str(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    for command, message in (
        (["run", folder], "holds no metrics.jsonl"),
        (["study", "--a", folder, "--b", folder, "--out", str(tmp_path / "s")], "are the same folder"),
        (["study", "--a", folder, "--b", str(tmp_path / "b"), "--out", str(tmp_path / "s")], "share no mp4"),
        (["score", str(tmp_path / "x.json"), "--out", folder], "holds no study_key.json"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_texts_go_by_number_and_participants_count_alike(tmp_path):
    (tmp_path / "prompts.txt").write_text("push_in a\npan_left b\n")
    assert prompts_of(tmp_path) == {"00": "push_in a", "01": "pan_left b"}
    people = {"x": {i: dict(overall="b") for i in range(3)}, "y": {0: dict(overall="a")}}
    assert win_rate(people, "overall")[0] == .5


def test_every_chart_draws_what_its_title_says(monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "chart", lambda title, rows, curves, spread=None: drawn.update({title: curves}) or "")
    training_charts([training_row(0)])
    of_terms, rest = list(drawn.items())[:-6], list(drawn.values())[-5:]
    assert all(curves == {name: name} and label == report.LABELS[name]
               for (label, curves), name in zip(of_terms, report.LABELS, strict=True))
    assert rest == [{"motion": "motion"}, {"mean": "ratio", "largest": "ratio_max"}, {"clipped": "clipped"},
                    {"KL": "kl"}, {"norm": "grad"}]
