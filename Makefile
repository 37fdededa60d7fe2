# `make demo` and `make test` need nothing but Python 3.11 or 3.12: the first run installs into .venv.
#   make demo PYTHON=/path/to/python3.12      another interpreter
.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-matrix lint format bench check clean
.DELETE_ON_ERROR:

# The first that runs: a pyenv shim for a version that is not there is found, but fails.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
MANY := -n $(shell nproc) --dist worksteal
SPEC ?= examples/local.yaml
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

help:
	@echo "make demo     serve examples/local.yaml, show one answer and where its time went"
	@echo "make test     all tests; make test ARGS='-m \"not e2e\"' leaves out the slow ones"
	@echo "make test-long     more seeds, models and transports of the same tests"
	@echo "make test-matrix   model families and parallel shapes, all pairs; ranks killed 50 times"
	@echo "make lint     ruff and mypy"
	@echo "make format   ruff's formatting"
	@echo "make bench    a tiny model, disaggregated beside colocated, under the same load"
	@echo "make check    resolve a spec and print its cost: make check SPEC=examples/local.yaml"
	@echo "make clean    remove .venv, caches and build output"

# torch comes first and by its exact version, so that the resolver has no other build to choose.
$(INSTALLED): pyproject.toml constraints.txt scripts/system-packages
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; try PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH)"
	@$(PIP) "$(TORCH)"
	@echo "installing PageRelay and what it needs (a few minutes the first time)"
	@$(PIP) -c constraints.txt -e ".[demo,test,lint,bench,mooncake]"
	@scripts/system-packages
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python -m pd.bench.demo $(SPEC)

# The end-to-end tests run one at a time: each starts as many processes as there are cores.
test: $(INSTALLED)
ifdef ARGS
	@$(BIN)/python -m pytest -q $(ARGS)
else
	@$(BIN)/python -m pytest -q -m "not long" $(MANY) tests/unit tests/contract tests/sim
	@$(BIN)/python -m pytest -q -m "not long" --durations=15 tests/e2e
endif

test-long: $(INSTALLED)
	@$(BIN)/python -m pytest -q -m long $(MANY) tests/unit
	@$(BIN)/python -m pytest -q -m long tests/e2e

test-matrix: $(INSTALLED)
	@$(BIN)/python -m pytest -q tests/matrix $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED)
	@$(BIN)/python -m pd.bench.colocated $(ARGS)

check: $(INSTALLED)
	@$(BIN)/pd check $(SPEC)

clean:
	rm -rf $(VENV) build dist bench-results .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
