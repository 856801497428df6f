# Needs nothing but make and python3 (3.11 or newer, with venv). Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := infinicontext experiments tests
INSTALLED := .venv/.installed

.PHONY: demo test test-all lint format clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(INSTALLED)  ## train small models on real text and on passkey retrieval, evaluate and compare them
	$(BIN)/infinicontext sweep experiments/language_modeling.py:demo --workdir runs/demo
	$(BIN)/infinicontext sweep experiments/passkey.py:demo --workdir runs/demo
	$(BIN)/infinicontext compare runs/demo/* --output report

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

test: lint  ## lint and the quick tests: what CI runs
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv runs report build *.egg-info
