# make demo    sets up everything in .venv and runs the demo
# make test    sets up everything in .venv and passes the tests
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test test-slow check clean

demo: $(VENV)/ready
	$(VENV)/bin/timm-nrpm demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n 2

# The whole CIFAR-10 test set through the published models, and attacks on them: half an hour on two cores.
test-slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n 2 -m slow

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
