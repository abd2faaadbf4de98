# Everything runs in a virtual environment of its own, made on first use.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
QUALITY := docs/results/quality
NPM    := @qvac/llm-llamacpp@0.53.0 bare@latest @huggingface/transformers@4.3.1

.PHONY: help demo test test-all check lint format bench quality-pages reference pictures compatibility clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## warm up, pack and measure the embedded model (minutes)
	$(BIN)/bitconvert demo --output demo-output/$$(date +%Y%m%d-%H%M%S)

test: $(READY)  ## the default tests (under ten minutes on two cores)
	$(BIN)/python -m pytest --numprocesses auto

test-all: $(READY)  ## all tests, the slow ones too
	$(BIN)/python -m pytest --numprocesses auto -m ""

check: lint  ## lint, types, import layers
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## speed and memory against named peers, as ratios in one run (an hour)
	$(BIN)/pip install --quiet torchao || echo "torchao is not to be had: left out"
	for name in training_step loss evaluation packing startup; do $(BIN)/python -W ignore -m benchmarks.$$name || exit 1; done

quality-pages: $(READY)  ## draw the tables and pictures of docs/results/quality from its results
	for page in $(QUALITY)/*.md; do \
		grid=$$(basename $$page .md); test $$grid = README && continue; \
		$(BIN)/python -m benchmarks.quality table --grid $$grid > $$page && \
		$(BIN)/python -m benchmarks.quality plot --grid $$grid || exit 1; \
	done

reference: $(READY)  ## write docs/reference from the code
	$(BIN)/python -m docs.generator reference

pictures: $(READY)  ## draw the pictures of docs/explanation.md
	$(BIN)/python -m docs.generator pictures

compatibility: $(READY)  ## load every family in every format into every runtime; writes docs/compatibility.md
	$(BIN)/pip install --quiet --constraint constraints.txt cyllama || echo "cyllama has no wheel for this Python: left out"
	npm install --silent --ignore-scripts --prefix $(VENV)/npm $(NPM) || echo "no npm, or no network: left out"
	$(BIN)/python -m tests.compatibility docs/compatibility.md

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
