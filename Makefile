PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# one thread per test process, two processes: faster than two threads in one
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help train scaling test test-all test-faults test-gpu dependencies mutations audit lint docs docs-serve wheel bench digits lm mislabelled recipes clipping tuning audits clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "dpsgd needs Python 3.10 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV): two to five minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(STAMP)  ## set up, then train on digits at epsilon 3 (ARGS="engine=hooks ...")
	$(BIN)/python -m dpsgd.train $(ARGS)

test: $(STAMP)  ## set up, then run the tests
	$(PYTEST) -m "not slow and not faults and not gpu and not hf" $(ARGS)

test-all: $(STAMP)  ## the tests, slow ones and Hugging Face models included
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,hf]'
	$(PYTEST) -m "not gpu and not faults" $(ARGS)

test-faults: $(STAMP)  ## kills at every place, full disks, damaged files: some ten minutes
	$(PYTEST) tests/faults tests/test_resuming.py $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

mutations: $(STAMP)  ## plant privacy bugs one at a time; the test of each must fail (ARGS=noise)
	$(BIN)/python tests/mutations/run.py $(ARGS)

audit: $(STAMP)  ## try to break the privacy of a configuration (ARGS="engine=vmap ...")
	$(BIN)/python -m dpsgd.audit trainer.num_steps=1 audit.runs=2000 $(ARGS)
	$(BIN)/python -m dpsgd.audit audit.minutes=5 $(ARGS)

dependencies: $(STAMP)  ## known vulnerabilities in what the constraints pin (needs the network)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation site into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(STAMP)  ## show the documentation while you write it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --strict $(ARGS)

wheel: $(STAMP)  ## build dist/, install the wheel into an environment of its own, and train with it
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	rm -rf build/wheel && $(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt dist/*.whl
	cd build && wheel/bin/python -m dpsgd.train trainer.num_steps=2 run.dir=run-$$$$
	cd build && wheel/bin/python -m dpsgd.account privacy.target_epsilon=1

bench: $(STAMP)  ## compare what the engines cost (ARGS="model=mlp bench.batch_size=64 ...")
	$(BIN)/python -m dpsgd.bench $(ARGS)

digits: $(STAMP)  ## the study experiments/digits: accuracy at epsilon 1, 3 and 8 over five seeds
	$(BIN)/python experiments/digits/run.py

scaling: $(STAMP)  ## the study experiments/scaling: what a step costs on 1, 2 and 4 processes
	$(BIN)/python experiments/scaling/run.py

lm: $(STAMP)  ## the study experiments/lm: perplexity at epsilon 1, 3 and 8, LoRA and all weights
	$(BIN)/python experiments/lm/run.py

mislabelled: $(STAMP)  ## the study experiments/mislabelled: wrong labels found by their gradients
	$(BIN)/python experiments/mislabelled/run.py

recipes: $(STAMP)  ## the study experiments/recipes: what each recipe gives on digits
	$(BIN)/python experiments/recipes/run.py $(ARGS)

clipping: $(STAMP)  ## the study experiments/clipping: clipping policies and clip norms
	$(BIN)/python experiments/clipping/run.py $(ARGS)

tuning: $(STAMP)  ## the study experiments/tuning: what choosing the best of several runs costs
	$(BIN)/python experiments/tuning/run.py $(ARGS)

audits: $(STAMP)  ## the study experiments/audit: measured lower bounds beside claimed epsilon
	$(BIN)/python experiments/audit/run.py $(ARGS)

clean:  ## remove the environment and caches; keeps runs/
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
