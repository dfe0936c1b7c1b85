# Each command sets up what it needs in .venv; `make help` lists them.

VENV := .venv
PYTHON := $(VENV)/bin/python
SYSTEM_PYTHON ?= python3
READY := $(VENV)/.ready
# Tests by a process for each core, each with one thread; in the order of tests/conftest.py.
SHARED_OUT := --numprocesses logical --maxprocesses 4 --no-loadscope-reorder

.PHONY: demo demo-full web quick test check fuzz bench-gpu clean help

demo: $(READY)  ## train, evaluate and compare on synthetic scenes, in minutes
	$(PYTHON) scenes_demo.py

demo-full: $(READY)  ## the same from the first step on: the whole table of docs/scenes.md
	$(PYTHON) scenes_demo.py --full --output_dir output/scenes_full

web: $(READY)  ## a page to try images and phrases on
	$(PYTHON) demo.py --web

quick: $(READY)  ## the quick tests: no full-size checkpoint, browser or long training
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(SHARED_OUT) -m "not golden and not browser and not slow"

test: check  ## format, lint, types and all tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(SHARED_OUT)
	@echo "make test: format, lint, types and all tests passed; nothing is left behind"

check: $(READY)  ## format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy .

$(READY): requirements.txt requirements-web.txt requirements-dev.txt
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(READY)

fuzz: $(READY)  ## damage input files of every kind, 5000 times
	PYTHONPATH=. $(PYTHON) tests/fuzz.py --tries 5000

bench-gpu: $(READY)  ## an hour on a GPU: tests on it, benchmarks, the demo; one report
	$(PYTHON) benchmarks/bench_gpu.py

clean:  ## remove what the other commands made
	rm -rf $(VENV) data/scenes output .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1: \2/p' Makefile
