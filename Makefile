# make serve    sets everything up, then serves the quickstart experts on http://127.0.0.1:8000
# make test     sets everything up, then passes all tests, the ones against real vLLM included
# make check    what CI runs: lint, types, layers, spelling, tests

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := $(shell grep '^torch==' requirements/cpu.lock)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
ARGS   ?=

.PHONY: help install install-runtime serve test lint check format docs lock clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/.dev
install-runtime: $(VENV)/.runtime

# Everything is in the lock, so nothing is resolved here: vLLM's own requirements name torchvision, torchaudio and
# torchcodec, whose builds want CUDA and break the import of transformers on a CPU machine.
# PyTorch's public index of CPU builds is asked only where pip does not find that build otherwise.
$(VENV)/.runtime: requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) || $(PIP) --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	$(PIP) --requirement requirements/cpu.lock
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.lock
	$(PIP) --requirement requirements/dev.lock
	touch $@

serve: install-runtime
	$(BIN)/moerge serve --manifest eval/testbed/data/manifest.yaml $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

check: lint test

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes docs/cli.md and docs/configuration.md anew from the code.
docs: install
	$(BIN)/python docs/generate.py

# Needs uv (pip install uv). Writes the two locks anew.
lock:
	uv pip compile pyproject.toml --extra cpu --extra postgres --extra eval --override requirements/overrides.txt \
	  --python-version 3.11 --no-annotate --no-header --output-file requirements/cpu.lock
	uv pip compile requirements/dev.in --constraints requirements/cpu.lock --python-version 3.11 \
	  --no-annotate --no-header | grep -vxFf requirements/cpu.lock > requirements/dev.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
