# The front door. `make serve` runs the main job, `make test` the tests; CI calls the same targets.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2-135m-instruct
PORT ?= 8000
TEST_PROCESSES ?= 2
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

NATIVE := $(shell find native -type f)

.PHONY: help serve chat test check sanitize instructions bench clean

help:  ## What there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/.kvarn: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	@echo "installing kvarn and building its kernels (about a minute)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.kvarn-dev: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	@echo "installing kvarn and what the tests need (PyTorch for the oracle among it)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.kvarn $@

serve: $(VENV)/.kvarn  ## Install, pull a small model, serve it on http://127.0.0.1:8000 (MODEL=…, PORT=…)
	$(VENV)/bin/kvarn pull $(MODEL)
	$(VENV)/bin/kvarn serve $(MODEL) --port $(PORT)

chat: $(VENV)/.kvarn  ## Talk with a small model in the terminal (MODEL=…)
	$(VENV)/bin/kvarn chat $(MODEL)

test: $(VENV)/.kvarn-dev  ## All tests, the end-to-end ones on the real SmolLM2 among them
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(VENV)/.kvarn-dev  ## Lint, types, import contracts
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

sanitize:  ## Native kernels under ASan and UBSan (needs cmake)
	$(PYTHON) tests/native/sanitize.py

instructions:  ## Instruction counts of the hot kernels against the record (needs cmake, valgrind)
	$(PYTHON) tests/native/instructions.py

bench: $(VENV)/.kvarn  ## Speed of MODEL and its share of what the machine can do
	$(VENV)/bin/kvarn pull $(MODEL)
	$(VENV)/bin/kvarn bench latency $(MODEL)

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build dist src/kvarn/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
