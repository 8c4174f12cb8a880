# Each target makes .venv, installs, and runs.
PYTHON ?= python3

.PHONY: sample test bench train-tiny

sample: .venv/installed
	.venv/bin/python sample.py "push_in a red sphere on a checkered green floor, yellow walls"

test: .venv/installed
	.venv/bin/python -m pytest

bench: .venv/installed
	.venv/bin/python bench.py

# The learning proof: train the tiny model, then score base and trained on the same unseen prompts and seeds (make train-tiny SEED=1: another one).
SEED ?= 0
RUN = runs/tiny-$(SEED)
train-tiny: .venv/installed
	.venv/bin/python train.py --preset tiny --name tiny-$(SEED) --seed $(SEED)
	.venv/bin/python eval.py metrics --num 100 --out $(RUN)/base
	.venv/bin/python eval.py metrics --num 100 --lora $(RUN) --out $(RUN)/trained
	.venv/bin/python eval.py metrics --num 50 --split dynamic --out $(RUN)/base_dynamic
	.venv/bin/python eval.py metrics --num 50 --split dynamic --lora $(RUN) --out $(RUN)/trained_dynamic
	.venv/bin/python eval.py table --runs base=$(RUN)/base trained=$(RUN)/trained
	.venv/bin/python eval.py table --runs base=$(RUN)/base_dynamic trained=$(RUN)/trained_dynamic
	.venv/bin/python tiny_world.py probe --run $(RUN)/base --prompts tiny --num 100
	.venv/bin/python tiny_world.py probe --run $(RUN)/trained --prompts tiny --num 100 --lora $(RUN)
	.venv/bin/python eval.py report $(RUN)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable ".[test]"
	.venv/bin/pip install --quiet --no-deps depth-anything-3  # a test oracle; its own pins (numpy<2, xformers, ...) are not needed
	# the pages are tested in Chromium where it can be had
	command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium chromium-driver >/dev/null 2>&1 || true
	touch $@
