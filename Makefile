# Each target makes .venv, installs, and runs.
PYTHON ?= python3

.PHONY: sample test bench train-tiny

sample: .venv/installed
	.venv/bin/python sample.py "push_in a red sphere on a checkered green floor, yellow walls"

test: .venv/installed
	.venv/bin/python -m pytest

bench: .venv/installed
	.venv/bin/python bench.py

# The learning proof: World-R1 on the tiny base (tiny/wan with tiny/web), then base and trained scored on the same unseen
# prompts and seeds. make train-tiny SEED=1: another seed. Two processes of one thread are faster here than one of two.
SEED ?= 0
RUN = runs/tiny-$(SEED)
train-tiny: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 train.py --preset tiny --name tiny-$(SEED) --seed $(SEED)
	.venv/bin/python eval.py metrics --num 100 --lora tiny/web --out $(RUN)/base
	.venv/bin/python eval.py metrics --num 100 --lora $(RUN) --out $(RUN)/trained
	.venv/bin/python eval.py metrics --num 50 --split dynamic --lora tiny/web --out $(RUN)/base_dynamic
	.venv/bin/python eval.py metrics --num 50 --split dynamic --lora $(RUN) --out $(RUN)/trained_dynamic
	.venv/bin/python eval.py table --runs base=$(RUN)/base trained=$(RUN)/trained
	.venv/bin/python eval.py table --runs base=$(RUN)/base_dynamic trained=$(RUN)/trained_dynamic
	.venv/bin/python tiny_world.py probe --run $(RUN) --prompts tiny --num 100 --lora tiny/web $(RUN)
	.venv/bin/python tiny_world.py compare --lora tiny/web $(RUN) --run $(RUN)
	.venv/bin/python eval.py report $(RUN)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable ".[test]"
	.venv/bin/pip install --quiet --no-deps depth-anything-3  # a test oracle; its own pins (numpy<2, xformers, ...) are not needed
	# the pages are tested in Chromium where it can be had
	command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium chromium-driver >/dev/null 2>&1 || true
	touch $@
