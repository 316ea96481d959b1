# `make train` and `make test` do everything on a machine with Python 3.11 or newer and make.
.PHONY: help train test tiers sanitize faults check format bench docs clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,\
  $(shell $(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(python))))
TRITON := triton==3.6.0  # for the tests of its kernels, where torch doesn't bring its own, as builds for CUDA do
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:  ## list these targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

train: $(VENV)/train-ready  ## set up, fetch the quickstart model, and train it (ARGS="key=value ...")
	$(BIN)/huarizo train recipes/quickstart.yaml $(ARGS)

test: $(VENV)/dev-ready  ## set up and run the tests (ARGS="-k name")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

tiers: $(VENV)/dev-ready  ## run the kernels of every instruction set, natively or emulated (ARGS="avx512 neon")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.tiers $(ARGS)

sanitize: $(VENV)/dev-ready  ## run the kernels on random shapes under compilers' sanitizers (ARGS="avx2 --shapes 1000")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.tiers --sanitize $(ARGS)

faults: $(VENV)/dev-ready  ## run the long tests of crashes, power cuts, full disks and damaged files (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/faults $(ARGS)

check: $(VENV)/dev-ready  ## check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/dev-ready  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/train-ready  ## compare training speed on this machine, briefly (benchmarks/README.md has the long runs)
	$(BIN)/python benchmarks/train_speed.py --quick

docs: $(VENV)/train-ready  ## generate docs/recipe.md from huarizo/recipe.py
	$(BIN)/huarizo recipe --markdown > docs/recipe.md

clean:  ## remove the virtual environment and the tools' caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found. Name it with make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/train-ready: requirements.txt requirements-extras.txt pyproject.toml | $(BIN)/python
	@echo "setting up: the first time takes a minute or two"
	$(PIP) -r requirements.txt -r requirements-extras.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/dev-ready: requirements-dev.txt $(VENV)/train-ready
	$(PIP) -r requirements-dev.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON) || echo "no Triton: its tests are skipped"
	@touch $@
