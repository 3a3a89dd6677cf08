# make run    everything for one domain: data, training, GGUF, evaluation, metadata, answers
# make test   all tests that this machine can run
# make lab    JupyterLab on the notebooks
# make style  formatting, lint and types
# Each sets up what it needs first.

PYTHON ?= python3
DOMAINS ?= general_health
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test fast lab style setup clean
.DEFAULT_GOAL := run

run: setup
	$(BIN)/python -m meetara_nb run --domains $(DOMAINS)

test: setup
	$(BIN)/python -m pytest -m "not gpu and not browser"

fast: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not browser"

lab: setup
	$(BIN)/python -m meetara_nb lab

style: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(VENV)/.ready

# llama-cpp-python is compiled here: 6 to 9 minutes on 2 cores, the first time; pip keeps the result.
$(VENV)/.ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 2; }
	@command -v c++ >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -q && apt-get install -yq g++; } || { echo "a C++ compiler is needed: install g++"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -q && apt-get install -yq python3-venv && $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV): 10 to 15 minutes the first time, since llama.cpp is compiled"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
