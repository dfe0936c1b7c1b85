# Each command sets up what it needs in .venv. `make demo` takes minutes, `make demo-full` trains everything (docs/scenes.md).

VENV := .venv
PYTHON := $(VENV)/bin/python
SYSTEM_PYTHON ?= python3
READY := $(VENV)/.ready

.PHONY: demo demo-full web test check fuzz clean

demo: $(READY)
	$(PYTHON) scenes_demo.py

demo-full: $(READY)
	$(PYTHON) scenes_demo.py --full --output_dir output/scenes_full

web: $(READY)
	$(PYTHON) demo.py --web

test: check
	$(PYTHON) -m pytest
	@echo "make test: format, lint, types and all tests passed; nothing is left behind"

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy .

$(READY): requirements.txt requirements-web.txt requirements-dev.txt
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(READY)

fuzz: $(READY)
	PYTHONPATH=. $(PYTHON) tests/fuzz.py --tries 5000

clean:
	rm -rf $(VENV) data/scenes output .pytest_cache .mypy_cache .ruff_cache .hypothesis
