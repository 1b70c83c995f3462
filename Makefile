# Every target sets up what it needs: on a fresh machine with Python (3.11 or newer), pip, gcc and make, `make smoke`
# is the first command.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEFAULT := not faults and not s3 and not slow
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup smoke demo test test-faults test-slow test-s3 check dist bench docs clean

setup: $(VENV)/.installed  ## make .venv with gpt2dist and all that its tests need

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gpt2dist needs Python 3.11 or newer")'
	@echo "installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch 2> >(grep -v WARNING >&2)
	@$(PIP) install --constraint constraints.txt --editable '.[dev]' 2> >(grep -v WARNING >&2)
	@touch $@

smoke: setup  ## prepare, train, generate and audit a small GPT-2 on two CPU workers
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash jobs/smoke.sh

demo: setup  ## a run that is killed, drained and resized, and its loss curve on that of an undisturbed one
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash jobs/demo.sh

test: setup  ## the tests, unit first
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m '$(DEFAULT) and not alone' tests/unit
	@$(BIN)/python -m pytest -q -m '$(DEFAULT)' tests/unit/test_peak.py tests/distributed tests/ray tests/chaos

test-faults: setup  ## a dozen kills, a machine that is taken away, a worker that hangs; also in CI; nine minutes
	@$(BIN)/python -m pytest -q -m faults tests/ray tests/chaos

test-slow: setup  ## more of them: resizing, several nodes, full disks, autoscaling, compile, chaos; an hour on two cores
	@$(BIN)/python -m pytest -q -m slow tests/distributed tests/ray tests/chaos

test-s3: setup  ## everything on a real S3 server on loopback, also killed for a while; about six minutes
	@$(BIN)/python -m pytest -q -m s3 tests/ray

check: setup  ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

dist: setup  ## build/cluster: the wheel and the versions that cluster.yaml and jobs/kuberay/Dockerfile install
	@rm -rf build/cluster build/lib && mkdir -p build/cluster
	@$(PIP) wheel --no-deps --wheel-dir build/cluster .
	@cp constraints.txt build/cluster/ && ls build/cluster

bench: setup  ## every performance figure, each a ratio measured in one run; writes build/bench.json
	@$(BIN)/python -m tests.bench

docs: setup  ## write docs/config.md from the code
	@$(BIN)/python docs/make_config.py

clean:  ## remove the environment and what was built; runs and data stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
