# Each target makes .venv, installs, and runs.
PYTHON ?= python3

.PHONY: sample test bench train-tiny

sample: .venv/installed
	.venv/bin/python sample.py "push_in a red sphere on a checkered green floor, yellow walls"

test: .venv/installed
	.venv/bin/python -m pytest

bench: .venv/installed
	.venv/bin/python bench.py

# The learning proof: train the tiny model, then score base and trained on the same unseen prompts and seeds.
train-tiny: .venv/installed
	.venv/bin/python train.py --preset tiny --name tiny
	.venv/bin/python eval.py metrics --num 100 --out runs/tiny/base
	.venv/bin/python eval.py metrics --num 100 --lora runs/tiny --out runs/tiny/trained
	.venv/bin/python eval.py table --runs base=runs/tiny/base trained=runs/tiny/trained
	.venv/bin/python eval.py report runs/tiny

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable ".[test]"
	.venv/bin/pip install --quiet --no-deps depth-anything-3  # a test oracle; its own pins (numpy<2, xformers, ...) are not needed
	# the pages are tested in Chromium where it can be had
	command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium chromium-driver >/dev/null 2>&1 || true
	touch $@
