import collections
import json
import random
import re
import warnings

import pytest
from conftest import ROOT

from noise_warp import MOTIONS, parse_motion

ROWS = [json.loads(line) for line in (ROOT / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
CATEGORIES = {"natural landscapes", "urban and architectural", "micro and still life", "fantasy and surrealism", "artistic styles"}
INTRA = {"push_in", "orbit_left", "orbit_right"}  # stay with the scene; the other single moves uncover a new part of it


def scene_words(row):
    return re.findall(r"[a-z']+", row["prompt"].lower().partition(".")[2])


def test_schema_and_ids():
    assert len({r["id"] for r in ROWS}) == len({r["prompt"] for r in ROWS}) == len(ROWS)
    for r in ROWS:
        assert set(r) == {"id", "split", "prompt", "camera", "trajectory", "category"} | ({"motion"} if r["split"] == "dynamic" else set())
        assert r["split"] in ("train", "dynamic", "test") and r["id"].startswith(r["split"]) and r["category"] in CATEGORIES
        assert r["prompt"] == " ".join(r["prompt"].split())


def test_camera_sentence_reads_back_and_the_scene_names_no_motion():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for r in ROWS:
            assert parse_motion(r["prompt"]) == r["camera"], r["id"]
            assert re.match(r"(the )?camera\b", r["prompt"].lower()), r["id"]
            assert parse_motion(r["prompt"].partition(".")[2]) == ["fixed"], r["id"]
            kind = "composite" if len(r["camera"]) > 1 else "static" if r["camera"] == ["fixed"] else "intra" if r["camera"][0] in INTRA else "inter"
            assert r["trajectory"] == kind, r["id"]


def test_length():
    assert all(25 <= len(scene_words(r)) <= 60 for r in ROWS)


def nearest(rows, others=None):
    """Jaccard similarity of each row's longer words with its nearest neighbour's."""
    content = [{w for w in scene_words(r) if len(w) > 3} for r in rows]
    pool = content if others is None else [{w for w in scene_words(r) if len(w) > 3} for r in others]
    holders = collections.defaultdict(list)
    for j, words in enumerate(pool):
        for w in words:
            holders[w].append(j)
    found = []
    for i, words in enumerate(content):
        shared = collections.Counter(j for w in words for j in holders[w] if others is not None or j != i)
        found.append(max((n / len(words | pool[j]) for j, n in shared.most_common(50)), default=0.0))
    return sorted(found)


def test_diversity_of_train():
    train = [r for r in ROWS if r["split"] == "train"]
    random.Random(0).shuffle(train)
    tokens = [w for r in train for w in scene_words(r)][:20_000]
    pairs = list(zip(tokens, tokens[1:]))
    assert len(set(pairs)) / len(pairs) >= .80 and len(set(tokens)) >= 4500
    likeness = nearest(train)
    assert likeness[len(likeness) // 2] <= .15 and likeness[int(.95 * len(likeness))] <= .25


def test_test_prompts_share_no_scene_with_train():
    assert nearest([r for r in ROWS if r["split"] == "test"], [r for r in ROWS if r["split"] == "train"])[-1] < .25


@pytest.mark.parametrize("split, count", [("train", 3000), ("dynamic", 500), ("test", 300)])
def test_counts_and_balance(split, count):
    rows = [r for r in ROWS if r["split"] == split]
    categories, kinds = (collections.Counter(r[name] for r in rows) for name in ("category", "trajectory"))
    assert len(rows) == count and len(categories) == 5
    assert all(abs(n - count / 5) <= .05 * count / 5 for n in categories.values()), categories
    for kind, share in dict(intra=.4, inter=.3, composite=.2, static=.1).items():
        assert abs(kinds[kind] / count - share) <= .02, kinds
    assert {m for r in rows for m in r["camera"]} == set(MOTIONS)


def test_no_opening_is_repeated():
    """No four first words of a scene more than six times in 3,800."""
    openings = collections.Counter(" ".join(scene_words(r)[:4]) for r in ROWS)
    assert openings.most_common(1)[0][1] <= 6, openings.most_common(5)
