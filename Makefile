# The two commands of the README are `make demo` and `make test`; each sets up everything that it needs in .venv.
# The page's Gradio has a .venv-web on top of it: it holds Pillow back, and older ones resize otherwise (docs/web.md).

VENV := .venv
WEB_VENV := .venv-web
PYTHON := $(VENV)/bin/python
SYSTEM_PYTHON ?= python3
READY := $(VENV)/.ready
WEB_READY := $(WEB_VENV)/.ready
PACKAGES := import site; print(site.getsitepackages()[0])

.PHONY: demo demo-full web test check clean

demo: $(READY)
	$(PYTHON) scenes_demo.py

demo-full: $(READY)
	$(PYTHON) scenes_demo.py --full --output_dir output/scenes_full

web: $(WEB_READY)
	$(PYTHON) prepare.py scenes data/scenes
	$(WEB_VENV)/bin/python demo.py --web

test: check $(WEB_READY)
	$(WEB_VENV)/bin/python -m pytest tests/test_web.py
	$(PYTHON) -m pytest --ignore=tests/test_web.py
	@echo "make test: format, lint, types and all tests passed; nothing is left behind"

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy .

$(READY): requirements.txt requirements-dev.txt
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(READY)

$(WEB_READY): $(READY) requirements-web.txt
	$(SYSTEM_PYTHON) -m venv $(WEB_VENV)
	$(PYTHON) -c "$(PACKAGES)" > "$$($(WEB_VENV)/bin/python -c "$(PACKAGES)")/all-of-venv.pth"
	$(WEB_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-web.txt
	@touch $(WEB_READY)

clean:
	rm -rf $(VENV) $(WEB_VENV) data/scenes output .pytest_cache .mypy_cache .ruff_cache .hypothesis
