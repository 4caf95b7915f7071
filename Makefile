# make demo    sets up everything in .venv and runs the demo
# make test    sets up everything in .venv and passes the tests, but for the slow ones
# make slow    passes those that take longer than some seconds each
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test slow check clean

demo: $(VENV)/ready
	$(VENV)/bin/timm-nrpm demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n 2

slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m 'slow and not gpu'

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
