"""Prompt files: the Pure Text Dataset of World-R1 and how it is read. No pictures, no videos: RL needs
prompts alone.

    prompts.jsonl        3,000 train, 500 dynamic and 300 test prompts, written for this project after the
                         paper's description: a camera sentence (the 11 words of noise_warp.py), then a scene
    tiny/prompts.jsonl   the same splits of the tiny world's captions (python -m tiny captions)

A .jsonl file holds one object a line: {"prompt": ..., "split": "train" | "dynamic" | "test", "id": ...},
where split and id may be absent. Any other file is text, one prompt a line.
"""

import json
from pathlib import Path

SPLITS = ("train", "dynamic", "test")


def read_rows(file):
    """-> [{"prompt", "split", "id"}] of a prompt file in order; split is "train" and id None where a line has
    none.

    ValueError names the file, and the line that cannot be used.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"the prompt file '{file}' cannot be read ({e})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not str(file).endswith(".jsonl"):
            rows.append(dict(prompt=line.strip(), split="train", id=None))
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"]
            split = row.get("split", "train")
        except KeyError as e:
            raise ValueError(f"{file}, line {number}: no {e}") from None
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{file}, line {number}: not a JSON object with a prompt ({e})") from None
        if not isinstance(prompt, str) or not prompt.strip() or split not in SPLITS:
            raise ValueError(f"{file}, line {number}: it needs a non-empty prompt, "
                             f"and a split of {', '.join(SPLITS)}")
        rows.append(dict(prompt=prompt, split=split, id=row.get("id", row.get("video"))))
    return rows


def read_prompts(file):
    """-> {"train": [...], "dynamic": [...], "test": [...]} of prompt strings.

    A file without test prompts gives its last tenth, at least one, as test. ValueError if it holds no
    training prompt.
    """
    prompts = {split: [] for split in SPLITS}
    if Path(file).is_dir():
        for split in SPLITS:
            for part in (Path(file) / f"{split}.jsonl", Path(file) / f"{split}.txt"):
                if part.exists():
                    prompts[split] += [row["prompt"] for row in read_rows(part)]
    else:
        for row in read_rows(file):
            prompts[row["split"]].append(row["prompt"])
    train = prompts["train"]
    if not train:
        raise ValueError(f"{file} holds no training prompt")
    if not prompts["test"]:
        held_out = max(1, len(train) // 10)
        prompts["test"] = train[-held_out:]
        prompts["train"] = train[:-held_out] or train
    return prompts
