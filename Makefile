# Set-up, demo and checks. Pip reads its usual settings (PIP_INDEX_URL, pip.conf): nothing here overrides them.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,$(if $(shell command -v $(name)),$(name))))
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.bpgcn-setup
# accelerate gives a process on the CPU one thread unless told otherwise
CORES  := $(shell getconf _NPROCESSORS_ONLN)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-slow test-kernels check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON (3.11 or newer, now '$(PYTHON)'), VENV (now '$(VENV)'), ARGS (more pytest or train.py options)"

setup: $(STAMP) ## create the virtual environment with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "No Python found at '$(PYTHON)'. Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "'$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); BPGCN needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "'$(PYTHON)' has no venv module. Install it (Debian and Ubuntu: the package python3-venv), or name another Python: make setup PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(STAMP) ## train on scikit-learn's digits, offline, in about 3 minutes on 2 cores
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) \
		train.py configuration/digits.yaml $(ARGS)

test: $(STAMP) ## run the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: $(STAMP) ## run the tests, the slow ones too
	$(BIN)/python -m pytest -m "" $(ARGS)

test-slow: $(STAMP) ## run only the slow tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

test-kernels: $(STAMP) ## install Triton and run its kernels in its interpreter
	$(BIN)/python -m pip install --quiet --constraint constraints.txt triton
	$(BIN)/python -m pytest -q tests/test_triton_kernels.py

check: $(STAMP) ## lint, formatting and the repository's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	bash -n .ci/run
	$(BIN)/python -m pip check
	$(BIN)/python -m pytest -q tests/test_repository.py

format: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build outputs; runs/ and the virtual environment stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
