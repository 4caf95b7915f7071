# make demo    sets up everything in .venv and runs the demo
# make test    sets up everything in .venv and passes the tests, but for the slow ones
# make slow    passes those that take longer than some seconds each
# make coverage  measures which lines the tests of make test run, in build/coverage/index.html
# make package  builds wheel and sdist in build/dist, and checks what they say of themselves
# make docs    builds the pages of docs/ into build/site, and fails on a link that leads nowhere
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test slow coverage package docs check clean

demo: $(VENV)/ready
	$(VENV)/bin/timm-nrpm demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n 2

slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m 'slow and not gpu'

coverage: $(VENV)/ready
	$(VENV)/bin/pip install --quiet 'pytest-cov>=7'
	$(VENV)/bin/python -m pytest -n 2 --cov --cov-report=term --cov-report=html

package: $(VENV)/ready
	$(VENV)/bin/pip install --quiet -e '.[package]'
	rm -rf build/dist
	$(VENV)/bin/python -m build --quiet --outdir build/dist
	$(VENV)/bin/twine check --strict build/dist/*

docs: $(VENV)/ready
	$(VENV)/bin/pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

check: $(VENV)/ready
	$(VENV)/bin/pip install --quiet -e '.[dev]'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch and timm, which brings torchvision, in one call: pip then finds builds that fit each other.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
