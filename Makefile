# Everything a checkout needs: Python 3.11, gcc, git, make. No root, no Docker, no system packages.
# `make` alone lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# make runs recipes with /bin/sh; pip says little unless something goes wrong.
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check format bench serve clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(VENV)/.ready-dev ## Virtual environment in .venv with everything for development

demo: $(VENV)/.ready-demo ## 336,776 real flights in, into segments, and back out again
	$(BIN)/python demo/demo.py

test: $(VENV)/.ready-dev ## All tests; says what was skipped and why
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.ready-dev ## What CI checks: format, lint, types, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/gen_proto.py --check
	$(BIN)/python tools/gen_settings_docs.py --check

format: $(VENV)/.ready-dev ## Format the code, fix what can be fixed, write generated files
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python tools/gen_proto.py
	$(BIN)/python tools/gen_settings_docs.py

bench: $(VENV)/.ready-demo ## Codec and platform figures of this machine
	$(BIN)/python bench/end_to_end.py $(ARGS)

serve: $(VENV)/.ready-demo ## The embedded platform on ./streamhouse-data
	$(BIN)/streamhouse serve $(ARGS)

clean: ## Remove the virtual environment, caches and build output; data directories stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of packages: installed once, and again when pyproject.toml changes.
$(VENV)/.ready-demo: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[demo]'
	@touch $@

$(VENV)/.ready-dev: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[demo,test,dev]'
	@touch $@ $(VENV)/.ready-demo
