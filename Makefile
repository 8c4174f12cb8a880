# Each target makes .venv, installs, and runs.
PYTHON ?= python3

.PHONY: sample test bench

sample: .venv/installed
	.venv/bin/python sample.py "push_in a red sphere on a checkered green floor, yellow walls"

test: .venv/installed
	.venv/bin/python -m pytest

bench: .venv/installed
	.venv/bin/python bench.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable ".[test]"
	.venv/bin/pip install --quiet --no-deps depth-anything-3  # a test oracle; its own pins (numpy<2, xformers, ...) are not needed
	touch $@
