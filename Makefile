# `make train` and `make test` set themselves up: a virtual environment in .venv, the pinned packages, the run.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Processes of the quickstart; one thread each, so that they share the cores instead of fighting for them.
PROCESSES ?= 2
# Test processes, each of which starts up to four of one thread.
WORKERS ?= 2

OLDEST := .venv-oldest
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile --max-worker-restart 0

.PHONY: train test test-all test-oldest test-slurm lint setup clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("newcompute needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(READY)

train: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh $(PROCESSES)

test: $(READY)
	$(BIN)/python $(PYTEST) -m "not slow and not gpu and not slurm"

test-all: $(READY)
	$(BIN)/python $(PYTEST) --no-loadscope-reorder -m "not slurm"

# The same with the oldest torch that is supported. On PyPI that is a CUDA build: 3 GB to download, for a machine without GPU, too.
$(OLDEST)/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	names=$$(sed -n 's/==.*//p' constraints-oldest.txt | paste -sd'|'); \
	  grep -vE "^($$names)==" constraints.txt | cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	touch $@

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python $(PYTEST) --no-loadscope-reorder --failures-at-once -m "not slurm"

# launch/*.sh under a real SLURM of two nodes on this machine, installed with apt where it is not there.
test-slurm: $(READY)
	bash tests/launch/slurm/install.sh
	$(BIN)/python -m pytest -q --failures-at-once -m slurm --durations 5 tests/launch/test_real_slurm.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(OLDEST) outputs data
