# Each target makes .venv, installs what it needs, and runs.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: sample test bench train-tiny

sample: .venv/sample
	$(BIN)/python sample.py "push_in a red sphere on a checkered green floor, yellow walls"

test: .venv/test
	$(BIN)/python -m pytest

bench: .venv/test
	$(BIN)/python bench.py

# The learning proof: World-R1 on the tiny base (tiny/wan with tiny/web), then base and trained scored on the same unseen
# prompts and seeds. make train-tiny SEED=1: another seed. Two processes of one thread are faster here than one of two.
SEED ?= 0
RUN = runs/tiny-$(SEED)
METRICS = $(BIN)/python eval.py metrics
# what has been scored stays: a results folder is never replaced
SCORED = test -f $(RUN)/$(1)/summary.json || $(METRICS) --out $(RUN)/$(1)
train-tiny: .venv/train
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 train.py --preset tiny --name tiny-$(SEED) --seed $(SEED)
	$(call SCORED,base) --num 100 --lora tiny/web
	$(call SCORED,trained) --num 100 --lora $(RUN)
	$(call SCORED,base_dynamic) --num 50 --split dynamic --lora tiny/web
	$(call SCORED,trained_dynamic) --num 50 --split dynamic --lora $(RUN)
	$(BIN)/python eval.py table --runs base=$(RUN)/base trained=$(RUN)/trained
	$(BIN)/python eval.py table --runs base=$(RUN)/base_dynamic trained=$(RUN)/trained_dynamic
	$(BIN)/python -m tiny probe --run $(RUN) --prompts tiny/prompts.jsonl --num 100 --lora tiny/web $(RUN)
	$(BIN)/python -m tiny compare --lora tiny/web $(RUN) --run $(RUN)
	$(BIN)/python report.py run $(RUN)

# What sampling needs; what rewards, training and evaluation need on top of it; and what the tests need.
.venv/sample: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/train: .venv/sample
	$(BIN)/pip install --quiet --editable ".[train]"
	touch $@

.venv/test: .venv/train
	$(BIN)/pip install --quiet --editable ".[test]"
	$(BIN)/pip install --quiet --no-deps depth-anything-3  # a test oracle; its own pins (numpy<2, ...) are not needed
	# the pages are tested in Chromium where it can be had
	command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium chromium-driver >/dev/null 2>&1 || true
	touch $@
