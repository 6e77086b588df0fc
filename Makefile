# `make demo` and `make test` do everything on a fresh machine, in a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OLDEST := .venv-oldest
PRIVATE := tests/test_layers.py $(patsubst %,tests/integration/test_%.py,checkpoints decisions flags launch logging schedules state_dict)

.PHONY: demo test test-all test-oldest lint package bench clean

demo: $(READY)  ## the main job: train a byte-level GPT under HALoS and DDP, and compare
	$(BIN)/python examples/train_char_lm.py

test: $(READY)  ## the test suite
	$(BIN)/pytest -n 3 --dist worksteal -m "not alone and not slow"
	$(BIN)/pytest -m "alone and not slow"

test-all: test  ## and what takes long
	$(BIN)/pytest -m slow

test-oldest: $(OLDEST)/ready  ## what touches private names of Lightning, with the oldest one that pyproject.toml allows
	$(OLDEST)/bin/pytest $(PRIVATE) -m "not alone and not slow"

lint: $(READY)  ## style, format, types, which layer may import which, and the documentation's links and navigation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

package: $(READY)  ## the sdist and the wheel in dist/, which has to work by itself
	rm -rf dist build/wheel
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/pip install --quiet --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel ../$(BIN)/python -c "import lightning_halos.data as data; assert 'build/wheel' in data.__file__"

bench: $(READY)  ## the benchmarks; each prints ratios against a named peer and fails beyond its limit
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/plan_scale.py
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python benchmarks/defaults.py --quick

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(OLDEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints.txt torch
	$(OLDEST)/bin/pip install --quiet --constraint constraints.txt --editable . hypothesis "jsonargparse[signatures]" pytest pytest-timeout \
	    lightning==$$(sed -n 's/.*"lightning>=\([0-9.]*\),.*/\1/p' pyproject.toml)
	touch $@

clean:  ## remove the environments and what tools leave behind
	rm -rf $(VENV) $(OLDEST) .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist demo
