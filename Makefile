# The two commands of a newcomer: `make demo` and `make test`. Both set up a virtual environment first, once.
PYTHON      ?= python3
VENV        ?= .venv
DEMO        ?= demo
PYTEST_ARGS ?=
# A worker for each core. A module's tests stay together, since they share what its fixtures trained. In the order of the
# folders: modules of a few long tests come early so, and one worker does not end long after the others.
WORKERS     ?= auto
PARALLEL    := -n $(WORKERS) --maxprocesses 16 --dist loadfile --no-loadscope-reorder --durations 10
# Programs are started with `python -m`: their own files in the environment name it in a first line that can't hold a
# space. No target is named after a file, since make splits such a name at spaces.
BIN         := $(VENV)/bin

.PHONY: help installed installed-dev demo test test-slow test-all lint docs clean
help:
	@echo "make demo       set up, then text -> shards -> pretraining -> evaluation -> report, on a built-in corpus"
	@echo "make test       set up, then the tests (minutes)"
	@echo "make test-slow  the tests marked slow (tens of minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site with search, in site/: open site/index.html"
	@echo "make clean      remove the virtual environment, the demo's folder and the site"
	@echo
	@echo "PYTHON=python3.12   the Python to set up with ($(PYTHON))"
	@echo "VENV=folder         the virtual environment ($(VENV))"
	@echo "DEMO=folder         the demo's folder ($(DEMO))"
	@echo "WORKERS=1           processes of the tests (one for each core)"
	@echo "PYTEST_ARGS='...'   more words for pytest"

# A PYTHON that was asked for is used, and must be the environment's. Otherwise an environment that is there decides,
# also where python3 is an older one.
ifeq ($(origin PYTHON),file)
PYTHONS = "$(BIN)/python" "$(PYTHON)"
ASKED   =
else
PYTHONS = "$(PYTHON)"
ASKED   = --python "$(PYTHON)"
endif
INSTALL = for python in $(PYTHONS); do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	exec "$$python" -m tools.install --venv "$(VENV)" $(ASKED) $(1); fi; done; \
	echo "make: Python 3.11 or newer is needed, and $(PYTHON) is" \
	"$$("$(PYTHON)" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo 'not there'): say which with PYTHON=python3.12" >&2; exit 2

installed:
	@$(call INSTALL)

installed-dev:
	@$(call INSTALL,--extra dev)

demo: installed
	@exec "$(BIN)/python" -m launch.program demo --dir "$(DEMO)"

test: installed-dev
	"$(BIN)/python" -m pytest -q -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

test-slow: installed-dev
	"$(BIN)/python" -m pytest -q -m slow $(PARALLEL) $(PYTEST_ARGS)

test-all: test test-slow

lint: installed-dev
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy

# --strict: a dead link, or a page that mkdocs.yml does not list, ends the build. With --quiet it would not.
docs: installed-dev
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict
	"$(BIN)/python" -m tools.site.check site

# Only what was made here: a VENV or DEMO mistyped must not cost somebody's folder.
clean:
	@if [ -e "$(VENV)/pyvenv.cfg" ] || [ -e "$(VENV)/.lock" ]; then echo "removing $(VENV)"; rm -rf "$(VENV)"; fi
	@if [ -e site/search/search_index.js ]; then echo "removing site"; rm -rf site; fi
	@if [ -d "$(DEMO)/corpus" ] || [ -e "$(DEMO)/.lock" ]; then echo "removing $(DEMO)"; rm -rf "$(DEMO)"; fi
