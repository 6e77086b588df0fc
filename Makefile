# `make demo` and `make test` do everything on a fresh machine, in a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO_READY := $(VENV)/demo-ready
OLDEST := .venv-oldest
# With the oldest versions: everything except what needs transformers, and the examples.
OLD := tests/test_layers.py $(addprefix tests/,chaos checkpoint core integration keys optim planning serving simulation star tls training transport)

# Compiling all modules of all packages at once takes half a minute, and most of them are never imported.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile
# Instead, each is compiled when it is first imported. If that were not kept, each process of the tests would do it again.
unexport PYTHONDONTWRITEBYTECODE
PYTHON_VERSION = $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
# To find the tests marked `alone`, pytest has to import only the files that have some.
ALONE = $(shell grep --recursive --files-with-matches --include='*.py' 'mark\.alone' tests)

.PHONY: demo test test-all test-oldest lint style types layers pages package bench constraints clean

demo: $(DEMO_READY)  ## the main job: train a byte-level GPT under HALoS and DDP, and compare
	$(BIN)/python examples/train_char_lm.py

test: $(READY)  ## the test suite
	$(BIN)/pytest -n 3 --dist worksteal -m "not alone and not slow"
	$(BIN)/pytest -m "alone and not slow" $(ALONE)

test-all: test  ## and what takes long
	$(BIN)/pytest -m slow

test-oldest: $(OLDEST)/ready  ## the tests with the oldest Lightning and torch that pyproject.toml allows
	$(OLDEST)/bin/pytest -n 3 --dist worksteal $(OLD) -m "not alone and not slow"

lint: style types layers pages  ## the checks that run no code

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)  ## which layer may import which
	$(BIN)/lint-imports

pages: $(READY)  ## the documentation's links and navigation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

package: $(READY)  ## the sdist and the wheel in dist/, which has to work by itself
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(PIP_INSTALL) --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel ../$(BIN)/python -c "import lightning_halos.data as data; assert 'build/wheel' in data.__file__"

bench: $(READY)  ## the benchmarks; each prints ratios against a named peer and fails beyond its limit
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/plan_scale.py
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python benchmarks/link.py
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/server.py --inside
	$(BIN)/python benchmarks/defaults.py --quick

constraints:  ## renew constraints.txt: the newest versions, with the torch that it names
	mkdir -p build
	sed '/^torch==/q' constraints.txt > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf $(VENV)
	$(MAKE) $(READY)
	$(BIN)/pip freeze --exclude-editable --exclude torch | sed "s/$$/; python_version == '$(PYTHON_VERSION)'/" >> constraints.txt
	touch $(READY) $(DEMO_READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint constraints.txt torch
	$(PIP_INSTALL) --constraint constraints.txt --editable ".[dev]"
	touch $@ $(DEMO_READY)

$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint constraints.txt torch
	$(PIP_INSTALL) --constraint constraints.txt --editable . "matplotlib>=3.7"
	touch $@

oldest = $(shell sed -n 's/.*"$(1)>=\([0-9.]*\),.*/\1/p' pyproject.toml)
$(OLDEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "torch==$(call oldest,torch).*" "numpy<2"
	$(OLDEST)/bin/pip install --quiet --editable . "torch==$(call oldest,torch).*" "lightning==$(call oldest,lightning)" "numpy<2" \
	    hypothesis "jsonargparse[signatures]" matplotlib psutil pytest pytest-timeout pytest-xdist
	touch $@

clean:  ## remove the environments and what tools leave behind
	rm -rf $(VENV) $(OLDEST) .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist demo
