# The two commands of a newcomer: `make demo` and `make test`. Both set up a virtual environment first, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= demo

.PHONY: help demo test test-slow test-all lint clean
help:
	@echo "make demo       set up, then text -> shards -> pretraining -> evaluation -> report, on a built-in corpus"
	@echo "make test       set up, then the tests (minutes)"
	@echo "make test-slow  the tests marked slow (tens of minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove the virtual environment and the demo's folder"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say which with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/nystrom demo --dir $(DEMO)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow

test-all: test test-slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)
