# Every way to run this repository. A fresh machine needs Python 3.11 or later, git and make.
#
#   make demo     install Slipstream, fetch a small model and stream an answer from it
#   make test     install what the tests need, fetch both test models, run the default suite
#   make lint     ruff, pyright, codespell and the layering laws
#   make format   let ruff rewrite what it can
#   make wheels   build the wheels of every platform, CPU kernels inside, into dist (needs no compiler)
#   make models   fetch the test models into .models (or SLIPSTREAM_TEST_MODELS)
#   make clean    remove what the other targets made, models aside
#
#   PYTHON        the interpreter that .venv is made from          (make test PYTHON=python3.12)
#   TORCH_INDEX   a package index for torch alone; empty means the one pip uses for everything. PyPI's torch
#                 for Linux carries CUDA and is large; PyTorch publishes smaller CPU builds:
#                 make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   TESTS         what to test, with any options of pytest         (make test TESTS='tests/core -x')

PYTHON ?= python3
TORCH_INDEX ?=
TESTS ?= tests
QUESTION ?= Why is the sky blue?

BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
# Twice quiet: errors only.
INSTALL = $(PIP) install -qq -c constraints.txt
DEMO_MODEL = $${SLIPSTREAM_TEST_MODELS:-.models}/smollm2-135m-instruct-q4_1.gguf
LAWS = tests/test_layering.py tests/test_source_laws.py

.PHONY: help demo test lint format wheels models clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

demo: .venv/.runtime
	@$(BIN)/python tools/fetch_models.py smollm2
	$(BIN)/slipstream run "$(DEMO_MODEL)" "$(QUESTION)"

# Two processes of one thread each; a file stays in one of them, with what it has loaded.
test: .venv/.dev models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/python -m pytest $(LAWS)

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheels: .venv/.runtime
	@$(INSTALL) -e '.[zig]' 'setuptools>=77'
	$(BIN)/python tools/build_wheels.py

models: .venv/.made
	@$(BIN)/python tools/fetch_models.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find slipstream tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# Each file under .venv says that a step is done for the pyproject.toml and constraints.txt as they are.
.venv/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
		f"Slipstream needs Python 3.11 or later, this is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@touch $@

# torch alone comes from TORCH_INDEX, without its dependencies: the line after it takes those from the usual
# index.
.venv/.runtime: .venv/.made pyproject.toml constraints.txt
	@echo "Installing Slipstream and torch into .venv ..."
	@if [ -n "$(TORCH_INDEX)" ]; then $(INSTALL) --no-deps --index-url "$(TORCH_INDEX)" torch; fi
	@$(INSTALL) -e .
	@touch $@

# pyright[nodejs] brings its JavaScript engine as a wheel, so nothing is downloaded when it runs.
.venv/.dev: .venv/.runtime
	@echo "Installing the tools of tests and lint into .venv ..."
	@$(INSTALL) -e '.[dev]' 'pyright[nodejs]'
	@touch $@
