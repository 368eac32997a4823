# make run   installs neurarium into .venv and runs the demo and one paper
# make test  installs what the tests need and runs every check
# make docs  builds the atlas into site/; make screenshots takes the README's pictures of it
# Neither needs a network beyond the package index.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One thread a process: the tests run in two processes, and results do not depend on the number of cores.
test check: export OMP_NUM_THREADS := 1
# Data come from what is here (the dependencies embed some, NEURARIUM_DATA may name a folder); nothing is downloaded.
run test check: export NEURARIUM_OFFLINE := 1
test check: export MPLBACKEND := Agg

.PHONY: run test check docs screenshots clean

run: .venv/.installed
	$(BIN)/neurarium demo
	$(BIN)/neurarium run mono-forward

test: .venv/.installed-test
	$(MAKE) --no-print-directory check

check:
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2

docs: .venv/.installed-docs
	$(BIN)/neurarium site build --out site

screenshots: docs
	$(BIN)/neurarium site screenshots --out site --to docs/assets

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "neurarium needs Python 3.11 or later; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# torch first, at one exact version: resolving it together with the rest could choose a build that is much larger.
.venv/.torch: .venv/bin/python
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.installed-docs: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@ .venv/.installed

.venv/.installed-test: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@ .venv/.installed

clean:
	rm -rf .venv build dist runs site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .benchmarks
