# make install | serve | test | lint | bench; each makes the virtual environment when it is missing or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

MODEL ?=
ARGS ?=

.PHONY: install serve test lint bench
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch by itself first: it is the largest, and a failure to find it should be the first thing seen.
$(INSTALLED): pyproject.toml constraints.txt model/ops/kernels.cpp
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[test,evaluate]"
	$(BIN)/python -m model.ops.build
	touch $@

# make serve MODEL="models/a models/b=name" ARGS="--port 9000 --log-format json"
serve: $(INSTALLED)
	$(BIN)/slimpajama serve $(foreach model,$(MODEL),--model $(model)) $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Our own service at a well-known shape, into the README's numbers; another server: slimpajama bench --url ...
bench: $(INSTALLED)
	$(BIN)/python -m service.bench.own --write $(ARGS)
