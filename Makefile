# Everything starts here. Each target does its own set-up: a virtual environment in .venv, exact versions from
# constraints.txt. `make quickstart` needs only Python 3.11 or newer; a C++ compiler makes decoding faster.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
BUILD := pyproject.toml setup.py constraints.txt $(wildcard src/puna/ops/native/*.cpp)

.PHONY: quickstart test test-slow lint format bench clean

quickstart: .venv/core
	$(BIN)/puna quickstart

test: .venv/dev
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: .venv/dev
	$(BIN)/pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/dev
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/tokenize_corpus.py
	$(BIN)/python benchmarks/chaos.py

.venv/core: $(BUILD)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("puna needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@echo "setting up .venv (once; about a minute)"
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

.venv/dev: .venv/core
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info src/puna/ops/native/*.so
