# `make demo` and `make test` do everything on a fresh machine, in a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-all lint bench clean

demo: $(READY)  ## the main job: train a byte-level GPT under HALoS and DDP, and compare
	$(BIN)/python examples/train_char_lm.py

test: $(READY)  ## the test suite
	$(BIN)/pytest -n 3 --dist worksteal -m "not alone and not slow"
	$(BIN)/pytest -m "alone and not slow"

test-all: test  ## and what takes long
	$(BIN)/pytest -m slow

lint: $(READY)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the benchmarks; each prints ratios against a named peer and fails beyond its limit
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/plan_scale.py
	$(BIN)/python benchmarks/tokens.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:  ## remove the environment and what tools leave behind
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache demo
