import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import pages
from eval import main
from pages import chart, fleiss_kappa
from sample import write_video


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium through its own driver."""
    selenium = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update",
                 "disable-sync", "autoplay-policy=no-user-gesture-required", "window-size=420,900"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def console(browser):
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def wait(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, 20, .1).until(lambda b: b.execute_script(f"return {script}"))


# ---------------------------------------------------------------------------------------------------------------- study

def moving(shade):
    """A small clip whose brightness is its identity."""
    x = torch.full((9, 3, 32, 48), shade)
    for f in range(9):
        x[f, :, 4:12, 3 * f:3 * f + 10] = 1 - shade
    return x


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for side, shade in (("base", .2), ("trained", .8)):
        for i in range(3):
            write_video(folder / side / "videos" / f"{i:04d}.mp4", moving(shade), 8)
    (folder / "base" / "metrics.jsonl").write_text("".join(json.dumps(dict(video=f"{i:04d}", prompt=f"push_in scene <{i}>")) + "\n" for i in range(3)))
    assert main(["study", "--a", str(folder / "base" / "videos"), "--b", str(folder / "trained" / "videos"), "--out", str(folder)]) == 0
    return folder


def test_study_page_names_no_side(study):
    text, key = (study / "page" / "index.html").read_text(), json.loads((study / "study_key.json").read_text())
    assert "trained" not in text and "base/" not in text and str(study) not in text and "http" not in text
    files = sorted(f.name for f in (study / "page").glob("*.mp4"))
    assert files == sorted(key["videos"]) and Counter(key["videos"].values()) == dict(a=3, b=3) and not (study / "page" / "study_key.json").exists()
    assert all(f in text for f in files)


def answers(key, prefer, person, study_id=None):
    """A participant who always prefers one side (or 'same')."""
    by_side = {side: [v for v, s in key["videos"].items() if s == side] for side in "ab"}
    rows = []
    for i, (x, y) in enumerate(zip(by_side["a"], by_side["b"])):
        left, right = (x, y) if (i + person) % 2 else (y, x)
        choice = "same" if prefer == "same" else "left" if (left == x) == (prefer == "a") else "right"
        rows.append(dict(pair=i, left=left, right=right, geometry=choice, camera=choice, overall=choice))
    return dict(study=study_id or key["study"], participant=str(person), answers=rows)


def test_scoring_known_answers(study, tmp_path, capsys):
    key = json.loads((study / "study_key.json").read_text())
    files = []
    for i, prefer in enumerate(("b", "b", "b", "same")):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(answers(key, prefer, i)))
    assert main(["study", "--out", str(study), "--score", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert "4 participants, 12 answers" in out and "overall   0.875" in out
    files[0].write_text(json.dumps(answers(key, "b", 0, "another")))
    assert main(["study", "--out", str(study), "--score", *map(str, files)]) == 2 and "belongs to another study" in capsys.readouterr().err


def test_fleiss_kappa_of_the_published_example_and_the_extremes():
    table = [(0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1), (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)]
    assert fleiss_kappa([Counter({k: n for k, n in enumerate(row) if n}) for row in table]) == pytest.approx(.210, abs=5e-4)
    assert fleiss_kappa([Counter(a=3), Counter(b=3)]) == 1 and fleiss_kappa([Counter(a=1)]) is None and fleiss_kappa([Counter(a=1, b=1)] * 4) == -1


def test_a_study_by_keyboard_scores_back(study, browser, tmp_path, capsys):
    """Every pair is answered with the keyboard alone, always for side b; the score is that answer."""
    from selenium.webdriver.common.keys import Keys
    browser.get((study / "page" / "index.html").as_uri())
    wait(browser, "document.getElementById('left').readyState >= 2 && document.getElementById('right').readyState >= 2")
    key = json.loads((study / "study_key.json").read_text())["videos"]
    for n in range(3):
        wait(browser, f"document.getElementById('progress').textContent.startsWith('Pair {n + 1} of 3')")
        wait(browser, "!document.getElementById('left').paused && document.getElementById('left').currentTime > 0")
        left = browser.execute_script("return document.getElementById('left').src").rsplit("/", 1)[1]
        target = "left" if key[left] == "b" else "right"
        assert not browser.find_element("id", "next").is_enabled() and "push_in scene <" in browser.find_element("id", "prompt").text
        for _ in range(40):
            focus = browser.switch_to.active_element
            if focus.get_attribute("id") == "next":
                focus.send_keys(Keys.ENTER)
                break
            if focus.get_attribute("type") == "radio" and not focus.get_attribute("data-done"):
                name = focus.get_attribute("name")
                focus.send_keys(Keys.SPACE)
                while browser.switch_to.active_element.get_attribute("value") != target:
                    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
                browser.execute_script(f"document.querySelectorAll('input[name={name}]').forEach(r => r.dataset.done = 1)")
            browser.switch_to.active_element.send_keys(Keys.TAB)
        browser.execute_script("document.querySelectorAll('input').forEach(r => delete r.dataset.done)")
    wait(browser, "!document.getElementById('done').hidden")
    state = json.loads(browser.execute_script("return localStorage.getItem(Object.keys(localStorage)[0])"))
    assert console(browser) == [] and len(state["answers"]) == 3 and sorted(r["pair"] for r in state["answers"]) == [0, 1, 2]
    browser.refresh()
    wait(browser, "!document.getElementById('done').hidden")  # answers outlive a reload
    (tmp_path / "answers.json").write_text(json.dumps(dict(study=json.loads((study / "study_key.json").read_text())["study"], **state)))
    assert main(["study", "--out", str(study), "--score", str(tmp_path / "answers.json")]) == 0
    out = capsys.readouterr().out
    assert all(f"{q:9} 1.000" in out for q in pages.QUESTIONS)


# --------------------------------------------------------------------------------------------------------------- report

@pytest.fixture(scope="module")
def reported(twins, tmp_path_factory):
    """A run's folder as train.py leaves it, and its report."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    rows = [dict(step=i, phase="dynamic" if i % 5 == 4 else "main", grad=[.1 * i + .1], ratio=1.0, ratio_max=1.1, clipped=.2, kl=.01 * i, motion=1.0 + i,
                 **{n: None if i % 5 == 4 and n not in ("general", "total") else .1 * i for n in ("total", "meta", "recon", "traj", "general")},
                 **{f"{n}_std": None if i % 5 == 4 and n not in ("general", "total") else .05 for n in ("total", "meta", "recon", "traj", "general")}) for i in range(10)]
    for step in (0, 10):
        for i in range(2):
            write_video(run / "eval" / f"{step:06d}" / f"{i:02d}.mp4", torch.rand(9, 3, 1, 1, generator=torch.Generator().manual_seed(step)).expand(-1, -1, 64, 64), 8)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run / "eval.jsonl").write_text(json.dumps(dict(step=0, total=1.0)) + "\n" + json.dumps(dict(step=10, total=2.5)) + "\n")
    (run / "config.json").write_text(json.dumps(dict(name="demo", groups=2, members=4, frames=9, height=64, width=64, model="tiny/wan", seed=0, lpips="random", prompts="tiny",
                                                     depth_anything=str(twins / "depth_anything"), critic=str(twins / "qwen3_vl"), preference=str(twins / "hpsv3"), views=3, first=1)))
    for name, value in (("base", .25), ("trained", .75)):
        (run / name).mkdir()
        (run / name / "metrics.jsonl").write_text(json.dumps(dict(video="0000", prompt="p", size="9x64x64", psnr=20 + value)) + "\n")
        (run / name / "summary.json").write_text(json.dumps(dict(videos=1, failed=0, sizes=["9x64x64"], seed=0, lpips="random trunk (a stand-in)", summary=dict(psnr=[20 + value] * 3, vbench="not measured"))))
    assert main(["report", str(run)]) == 0
    return run / "report.html"


def test_report_is_one_file_with_everything_in_it(reported):
    text = reported.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text and 'src="data:video/mp4;base64,' in text
    for word in ("S_meta", "S_recon", "S_traj", "R_gen", "motion magnitude", "KL to the untouched model", "meta-view", "re-render", "path: asked grey", "before", "after 10 steps", "stand-in", "2.5000",
                 "<h3>Camera control</h3>", "<td>20.250 [20.250, 20.250]</td>", "<td>paper: World-R1-Small</td>", "<td>+0.500 [+0.500, +0.500] (100%)</td>"):
        assert word in text, word
    assert text.count("<video") == 2 * 2 * 2  # two prompts, before and after, input and re-render


def test_report_in_a_browser(reported, browser, tmp_path):
    browser.get(reported.as_uri())
    wait(browser, "[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    wait(browser, "[...document.querySelectorAll('video')].every(v => v.currentTime > 0 || !v.paused)")
    colours = {}
    for theme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value=theme)]))
        colours[theme] = browser.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    assert colours["light"] != colours["dark"] and colours["light"][0] != colours["light"][1] != colours["dark"][1]
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth + 1")  # a phone's width, no sideways scroll
    button = browser.find_element("id", "play")
    playing = button.get_attribute("aria-pressed")
    button.send_keys("\n")
    assert button.get_attribute("aria-pressed") == ("false" if playing == "true" else "true")
    assert button.text == ("Play all" if playing == "true" else "Pause all")
    wait(browser, f"[...document.querySelectorAll('video')].every(v => v.paused === {playing})")
    assert console(browser) == []


def test_charts_leave_gaps_and_survive_constants():
    svg = chart("x", [0, 1, 2, 3, 4], {"a": [1.0, 2.0, None, 3.0, 4.0]}, [.1, .1, None, .1, .1], [2])
    assert svg.count("<polyline") == 2 and "<polygon" in svg and "nan" not in svg.lower()
    assert "nan" not in chart("x", [3], {"a": [1.0]}).lower() and chart("x", [0], {"a": [None]}) == ""


def test_reports_without_runs_are_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2 and "holds no metrics.jsonl" in capsys.readouterr().err
    assert main(["study", "--a", str(tmp_path), "--b", str(tmp_path), "--out", str(tmp_path / "s")]) == 2 and "share no mp4" in capsys.readouterr().err
    assert not Path(tmp_path / "s").exists()
