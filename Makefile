# Each target makes .venv, installs what it needs, and runs.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: sample test test-gpu bench train-tiny

# A video of the tiny model; then, from one noise, what training starts from and what it makes of it.
PROMPT = "push_in a red sphere on a checkered green floor, yellow walls"
sample: .venv/sample
	$(BIN)/python sample.py $(PROMPT)
	$(BIN)/python sample.py $(PROMPT) --lora tiny/web tiny/world_r1 --out out/base_and_trained.mp4

# Two workers of one thread, each with a file of tests at a time.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# On one CUDA GPU: figures go to results/gpu.json. At first gsplat compiles its kernels (nvcc, .venv's ninja).
test-gpu: .venv/test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/test_gpu.py -rs -s || [ $$? -eq 5 ]

bench: .venv/test
	$(BIN)/python bench.py

# The learning proof: World-R1 on the tiny base (tiny/wan with tiny/web), then base and trained scored on the same unseen
# prompts and noise. make train-tiny SEED=1: another seed. Two processes of one thread are faster here than one of two.
SEED ?= 0
RUN = runs/full-$(SEED)
train-tiny: .venv/train
	$(BIN)/python ablate.py run base full --seed $(SEED) --out runs/results
	$(BIN)/python eval.py table --runs base=runs/base-0/test trained=$(RUN)/test
	$(BIN)/python eval.py table --runs base=runs/base-0/dynamic trained=$(RUN)/dynamic
	tail -n 3 runs/base-0/probe.txt $(RUN)/probe.txt
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
