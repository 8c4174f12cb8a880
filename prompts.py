"""Prompt files and how they are read, modelled on World-R1's Pure Text Dataset. No pictures, no videos: RL
needs prompts alone.

    prompts.jsonl        3,000 train, 500 dynamic and 300 test prompts, written for this project after the
                         paper's description: a camera sentence (the 11 words of noise_warp.py), then a scene
    tiny/prompts.jsonl   the same splits of the tiny world's captions (python -m tiny captions)

A .jsonl file holds one object a line: {"prompt": ..., "split": "train" | "dynamic" | "test", "id": ...},
where split and id may be absent. Any other file is text, one prompt a line.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from weights import from_json, read_bytes

SPLITS = ("train", "dynamic", "test")
LONGEST = 2000  # characters, about the 512 tokens that UMT5 reads


def usable_prompt(text):
    """-> the prompt with single spaces for white space. ValueError if it is empty, too long or no text."""
    if len(text) > LONGEST:
        raise ValueError(f"the prompt has {len(text)} characters; shorten it to at most {LONGEST}")
    prompt = " ".join(text.split())
    # Cc: control characters, Cs: bytes that are no UTF-8.
    strange = [c for c in prompt if unicodedata.category(c) in ("Cc", "Cs")]
    if strange:
        raise ValueError(f"the prompt holds the control character {ascii(strange[0])}; leave it out")
    # Letters, numbers, symbols or punctuation: a space of no width is empty too.
    if not any(unicodedata.category(c)[0] in "LNSP" for c in prompt):
        raise ValueError("the prompt is empty; say what to show, "
                         'e.g. "push_in a red sphere on a checkered green floor, yellow walls"')
    return prompt


@dataclass
class Line:
    """A line of a .jsonl file; where eval.py wrote it, `video` is its id."""
    prompt: str
    split: str | None = None
    id: str | int | None = None
    video: str | None = None


def read_rows(file, split="train"):
    """-> [{"prompt", "split", "id"}] of a prompt file in order. split: what a line without one gets.
    id: None where a line has neither id nor video.

    ValueError names the file, and the line that cannot be used.
    """
    try:
        lines = read_bytes(file).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as e:
        raise ValueError(f"the prompt file '{file}' cannot be read ({e}); give UTF-8 text") from None
    suffix = Path(file).suffix.lower()
    if suffix == ".json":
        raise ValueError(f"the prompt file '{file}' would be read as text; "
                         "give one object a line and name it .jsonl")
    rows = []
    # line by line; JSON under a name that is not .jsonl is a slip, not a prompt
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        if suffix == ".jsonl":
            line = from_json(text, Line, where)
        elif re.match(r'\s*\{\s*"', text):
            raise ValueError(f"{where} is JSON and would be read as text; name the file .jsonl")
        else:
            line = Line(text)
        own = split if line.split is None else line.split
        if own not in SPLITS:
            raise ValueError(f"{where}: unknown split '{own}'; a split is {', '.join(SPLITS)}")
        try:
            prompt = usable_prompt(line.prompt)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        rows.append(dict(prompt=prompt, split=own, id=line.video if line.id is None else line.id))
    ids = Counter(str(row["id"]).removesuffix(".mp4") for row in rows if row["id"] is not None)
    doubled = [name for name, count in ids.items() if count > 1]
    if doubled:
        raise ValueError(f"{file} gives the id '{doubled[0]}' to {ids[doubled[0]]} prompts; "
                         "give each its own")
    return rows


def read_prompts(file, needed="train"):
    """-> {"train": [...], "dynamic": [...], "test": [...]} of prompt strings.

    A folder holds SPLIT.jsonl or SPLIT.txt. Without test prompts, the last tenth of the training prompts, at
    least one, becomes test, and prompts equal to one of them are dropped from train and dynamic; if that
    leaves train empty, as with a single prompt, train keeps all. ValueError if the needed split is empty, if
    a test prompt is also in another split, or if a line of a folder's file names a split not the file's.
    """
    # a folder has a file for each split; the lines of a single file name theirs
    prompts = {split: [] for split in SPLITS}
    if Path(file).is_dir():
        for split in SPLITS:
            for part in (Path(file) / f"{split}.jsonl", Path(file) / f"{split}.txt"):
                if not part.exists():
                    continue
                for row in read_rows(part, split):
                    if row["split"] != split:
                        raise ValueError(f"{part} holds a prompt of the split '{row['split']}'; "
                                         f"move it to {row['split']}{part.suffix}")
                    prompts[split].append(row["prompt"])
        mend = f"a {needed}.jsonl or {needed}.txt"
    else:
        for row in read_rows(file):
            prompts[row["split"]].append(row["prompt"])
        mend = f'a line whose split is "{needed}"'
    # a test prompt that is trained on would score too well
    train = prompts["train"]
    seen = {*train, *prompts["dynamic"]}
    for prompt in prompts["test"]:
        if prompt in seen:
            raise ValueError(f"{file} holds the test prompt '{prompt[:80]}' in another split too; remove one")
    # where no test prompts are given, some of train's are held out
    if train and not prompts["test"]:
        held_out = max(1, len(train) // 10)
        prompts["test"] = train[-held_out:]
        for split in ("train", "dynamic"):
            prompts[split] = [prompt for prompt in prompts[split] if prompt not in prompts["test"]]
        prompts["train"] = prompts["train"] or train
    if not prompts[needed]:
        raise ValueError(f"{file} holds no {needed} prompt; it needs {mend}")
    return prompts
