# Everything a newcomer types. Each target does its own set-up; the second time that is instant.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.PHONY: help setup bench-setup quickstart test test-browser test-faults lint types doctor clean

help:
	@echo "make quickstart   train a small model on this machine's CPU, 5 to 20 minutes (ARGS='run.seed=1 ...')"
	@echo "make test         run all tests (ARGS='-k name')"
	@echo "make test-browser open the reports' pages in a headless browser (make test does too, where one is installed)"
	@echo "make test-faults  kill and stop every part of a run on vLLM, at every phase (about half an hour)"
	@echo "make lint types   ruff, mypy"
	@echo "make doctor       check this machine"
	@echo "make setup        only make the environment in $(VENV)"
	@echo "make bench-setup  also install the packages that bench/ops.py and the drop-in tests compare with"

setup: $(VENV)/.ready

$(VENV)/.ready: cpu.lock pyproject.toml kernels/pyproject.toml .ci/setup
	@PYTHON=$(PYTHON) .ci/setup $(VENV)

bench-setup: setup $(VENV)/.bench-ready

$(VENV)/.bench-ready: bench.lock .ci/bench-setup | $(VENV)/.ready
	@.ci/bench-setup $(VENV)

quickstart: setup
	@$(VENV)/bin/fastreason train configs/quickstart.yaml $(ARGS)

# Two files of tests at a time, in order: those that start processes come first, and mostly wait for them.
test: setup
	$(VENV)/bin/python -P -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Says so where there is no browser: CHROMIUM=/path/to/it, or Debian's package chromium.
test-browser: setup
	$(VENV)/bin/python -P -m pytest -m browser $(ARGS)

# Kills and stops every process of runs with the real vLLM, beside what `make test` does.
test-faults: setup
	$(VENV)/bin/python -P -m pytest -m faults $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy -p fastreason_kernels

doctor: setup
	@$(VENV)/bin/fastreason doctor configs/quickstart.yaml

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
