# `make train` and `make test` set themselves up: a virtual environment in .venv, the pinned packages, the run.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Processes of the quickstart; one thread each, so that they share the cores instead of fighting for them.
PROCESSES ?= 2
# Test processes, each of which starts up to four of one thread.
WORKERS ?= 2

.PHONY: train test test-all lint setup clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("newcompute needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(READY)

train: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh $(PROCESSES)

test: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --max-worker-restart 0 -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv outputs data
