import collections
import json
import os
import random
import re
import warnings

import pytest
from conftest import ROOT

from noise_warp import MOTIONS, parse_motion
from prompts import SPLITS, read_prompts, usable_prompt

ROWS = [json.loads(line) for line in (ROOT / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
CATEGORIES = {"natural landscapes", "urban and architectural", "micro and still life",
              "fantasy and surrealism", "artistic styles"}
INTRA = {"push_in", "orbit_left", "orbit_right"}  # stay with the scene; other single moves uncover a new part


# --------------------------------------------------------------------------------------------- reading a file

@pytest.mark.parametrize("file", ["tiny/prompts.jsonl", "prompts.jsonl"])
def test_shipped_files_hold_the_three_splits_and_share_no_prompt(file):
    prompts = read_prompts(ROOT / file)
    assert [len(prompts[split]) for split in SPLITS] == [3000, 500, 300]
    assert not set(prompts["train"]) & set(prompts["test"])


def test_plain_text_is_one_prompt_a_line_and_its_last_tenth_is_for_testing(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("push_in a hill\n\nCamera pan left. A lake.\n")
    assert read_prompts(file) == dict(train=["push_in a hill"], dynamic=[], test=["Camera pan left. A lake."])
    file.write_text("\n".join(f"hill {i}" for i in range(30)))
    assert read_prompts(file)["test"] == ["hill 27", "hill 28", "hill 29"]
    # what is held out is not trained on, wherever it stands
    rows = [*(dict(prompt=f"hill {i % 9}") for i in range(10)), dict(prompt="hill 0", split="dynamic")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(tmp_path / "b.jsonl") == dict(train=[f"hill {i}" for i in range(1, 9)], dynamic=[],
                                                       test=["hill 0"])
    file.write_text("one hill")
    assert read_prompts(file) == dict(train=["one hill"], dynamic=[], test=["one hill"])


@pytest.mark.parametrize("text, message", [
    ('{"prompt": "x"}\nnot json\n', "b.jsonl, line 2 is not valid JSON"),
    ('{"prompt": "x"}\n[1]\n', "b.jsonl, line 2: Expected object, got array"),
    ('{"scene": "x"}\n', "b.jsonl, line 1: .*missing required field prompt"),
    ('{"prompt": 1}\n', "b.jsonl, line 1, entry prompt: Expected str, got int"),
    ('{"prompt": "x", "id": ["a"]}\n', "b.jsonl, line 1, entry id: Expected .*, got array"),
    ('{"prompt": "x"}\n{"prompt": " "}\n', "b.jsonl, line 2: the prompt is empty"),
    ('{"prompt": "\u200b \u00ad\ufe0f"}\n', "b.jsonl, line 1: the prompt is empty"),  # nothing is seen of it
    ('{"prompt": "x"}\n{"prompt": "x", "split": "test"}\n', "the test prompt 'x' in another split too; remove"),
    ('{"prompt": "x", "split": "dynamic"}\n{"prompt": "x", "split": "test"}\n', "'x' in another split too"),
    ('{"prompt": "%s"}\n' % ("x" * 180_000), "line 1: the prompt has 180000 characters; shorten it to at most"),
    ('{"prompt": "a \\u0007 b"}\n', r"line 1: the prompt holds the control character '.x07'; leave it out"),
    ('{"prompt": "x", "split": "validation"}\n',
     "line 1: unknown split 'validation'; a split is train, dynamic, test"),
    ('{"prompt": "x", "split": "test"}\n', 'b.jsonl holds no train prompt; it needs a line .* "train"'),
    ('{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "1"}\n', "b.jsonl gives the id '1' to 2 prompts"),
    ('{"prompt": "x", "id": "1"}\n{"prompt": "y", "id": "1.mp4"}\n', "b.jsonl gives the id '1' to 2 prompts")])
def test_a_line_that_cannot_be_used_is_named(text, message, tmp_path):
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "b.jsonl")


def test_only_the_split_that_is_needed_must_be_there(tmp_path):
    (tmp_path / "test.txt").write_text("a lake\n")
    assert read_prompts(tmp_path, "test") == dict(train=[], dynamic=[], test=["a lake"])
    with pytest.raises(ValueError, match="holds no dynamic prompt; it needs a dynamic.jsonl or dynamic.txt"):
        read_prompts(tmp_path, "dynamic")


def test_json_is_not_read_as_text(tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "a lake"}]')
    with pytest.raises(ValueError, match="one object a line and name it .jsonl"):
        read_prompts(tmp_path / "p.json")
    for name in ("p.ndjson", "p.txt", "p"):
        (tmp_path / name).write_text('a {"lake"}\n { "prompt": "a lake"}\n')
        with pytest.raises(ValueError, match=f"{name}, line 2 is JSON and would be read as text; name the file"):
            read_prompts(tmp_path / name)


def test_a_suffix_is_the_same_in_capitals(tmp_path):
    (tmp_path / "P.JSONL").write_text('{"prompt": "a lake"}\n{"prompt": "a hill", "split": "test"}\n')
    assert read_prompts(tmp_path / "P.JSONL") == dict(train=["a lake"], dynamic=[], test=["a hill"])
    (tmp_path / "P.JSON").write_text('[{"prompt": "a lake"}]')
    with pytest.raises(ValueError, match="name it .jsonl"):
        read_prompts(tmp_path / "P.JSON")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / "pipe.txt")  # would hang
    for name in ("none.txt", "binary.txt", "pipe.txt"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            read_prompts(tmp_path / name)


def test_white_space_is_one_space_and_other_marks_stay(tmp_path):
    """Also a line separator inside of a prompt, which ends no line; and the mark that Windows begins a file with."""
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"prompt": "push_in\\n a\u2028 h\u00fcgel \\ud83c\\udfd4"}\r\n', encoding="utf-8")
    assert read_prompts(file)["train"] == ["push_in a h\u00fcgel \U0001f3d4"]
    with pytest.raises(ValueError, match="control character '.udcff'"):  # an argument that is no UTF-8
        usable_prompt("a \udcff")


# ---------------------------------------------------------------------------------------- the shipped prompts

def scene_words(row):
    return re.findall(r"[a-z']+", row["prompt"].lower().partition(".")[2])


def rows_of(split):
    return [row for row in ROWS if row["split"] == split]


def trajectory(camera):
    """The paper's kind of a camera path, from its words."""
    if len(camera) > 1:
        return "composite"
    if camera == ["fixed"]:
        return "static"
    return "intra" if camera[0] in INTRA else "inter"


def test_schema_and_ids():
    assert len({row["id"] for row in ROWS}) == len({row["prompt"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        keys = {"id", "split", "prompt", "camera", "trajectory", "category"}
        if row["split"] == "dynamic":
            keys.add("motion")
        assert set(row) == keys
        assert row["split"] in SPLITS
        assert row["id"].startswith(row["split"])
        assert row["category"] in CATEGORIES
        assert row["prompt"] == " ".join(row["prompt"].split())


def test_camera_sentence_reads_back_and_the_scene_names_no_motion():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in ROWS:
            assert parse_motion(row["prompt"]) == row["camera"], row["id"]
            assert re.match(r"(the )?camera\b", row["prompt"].lower()), row["id"]
            assert parse_motion(row["prompt"].partition(".")[2]) == ["fixed"], row["id"]
            assert row["trajectory"] == trajectory(row["camera"]), row["id"]


def test_scenes_are_of_25_to_60_words():
    assert all(25 <= len(scene_words(row)) <= 60 for row in ROWS)


def nearest(rows, others=None):
    """Jaccard similarity of each row's longer words with its nearest neighbour's, sorted. others: where to
    look; without, among the rows themselves."""
    def content(rows):
        return [{word for word in scene_words(row) if len(word) > 3} for row in rows]

    own = content(rows)
    pool = own if others is None else content(others)
    holders = collections.defaultdict(list)
    for j, words in enumerate(pool):
        for word in words:
            holders[word].append(j)
    found = []
    for i, words in enumerate(own):
        shared = collections.Counter(j for word in words for j in holders[word])
        if others is None:
            del shared[i]
        likeness = [count / len(words | pool[j]) for j, count in shared.most_common(50)]
        found.append(max(likeness, default=0.0))
    return sorted(found)


def test_diversity_of_train():
    train = rows_of("train")
    random.Random(0).shuffle(train)
    tokens = [word for row in train for word in scene_words(row)][:20_000]
    pairs = list(zip(tokens, tokens[1:]))
    assert len(set(pairs)) / len(pairs) >= .80
    assert len(set(tokens)) >= 4500
    likeness = nearest(train)
    assert likeness[len(likeness) // 2] <= .15
    assert likeness[int(.95 * len(likeness))] <= .25


def test_test_prompts_share_no_scene_with_train():
    assert nearest(rows_of("test"), rows_of("train"))[-1] < .25


@pytest.mark.parametrize("split, count", [("train", 3000), ("dynamic", 500), ("test", 300)])
def test_counts_and_balance(split, count):
    rows = rows_of(split)
    assert len(rows) == count
    categories = collections.Counter(row["category"] for row in rows)
    assert len(categories) == 5
    assert all(abs(n - count / 5) <= .05 * count / 5 for n in categories.values()), categories
    kinds = collections.Counter(row["trajectory"] for row in rows)
    for kind, share in dict(intra=.4, inter=.3, composite=.2, static=.1).items():
        assert abs(kinds[kind] / count - share) <= .02, kinds
    assert {motion for row in rows for motion in row["camera"]} == set(MOTIONS)


def test_no_opening_is_repeated():
    """No four first words of a scene more than six times in 3,800."""
    openings = collections.Counter(" ".join(scene_words(row)[:4]) for row in ROWS)
    assert openings.most_common(1)[0][1] <= 6, openings.most_common(5)


def test_a_folder_holds_a_file_a_split(tmp_path):
    """The authors' data set: rows of id and prompt alone; the split is the file's name."""
    rows = '{"id": 1, "prompt": "push_in a hill"}\n{"id": 2, "prompt": "a lake"}\n'
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "dynamic.txt").write_text("a waterfall\n")
    (tmp_path / "test.txt").write_text("pan_left a street\n")
    (tmp_path / "README.md").write_text("not read")
    assert read_prompts(tmp_path) == dict(train=["push_in a hill", "a lake"], dynamic=["a waterfall"],
                                          test=["pan_left a street"])
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no train prompt; it needs a train.jsonl or train.txt"):
        read_prompts(tmp_path)


def test_a_folders_file_holds_no_other_split(tmp_path):
    """A row may say its split: its file's. Rows that say none are of the file's."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "a hill", "split": "train"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "a lake", "split": "test"}\n{"prompt": "a moor"}\n')
    assert read_prompts(tmp_path)["test"] == ["a lake", "a moor"]
    (tmp_path / "train.jsonl").write_text('{"prompt": "a hill"}\n{"prompt": "a fen", "split": "test"}\n')
    with pytest.raises(ValueError, match="train.jsonl holds a prompt of the split 'test'; move it to test.jsonl"):
        read_prompts(tmp_path)
