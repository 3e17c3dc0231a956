# `make demo`, `make test` and `make docs` set themselves up: the environment goes to .venv.
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= demo
KILLS ?= 20
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
# Tests run in one process per core; a file stays in one, with what its tests share.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-oldest quick lint types unit faults docs clean

demo: $(VENV)/demo
	$(BIN)/python recipes/demo.py --output_dir $(DEMO_DIR)

test: lint types unit

# What whoever edits runs: under two minutes, without what is marked slow.
quick: lint types
	$(PYTEST) -m "not slow and not faults"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

unit: $(VENV)/dev
	$(PYTEST)

# Every kind of run, killed KILLS times at random moments, and other tests of minutes: hours on two cores. `make unit` has
# a short form of each.
faults: $(VENV)/dev
	KILLS=$(KILLS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m faults tests/faults

# The tests on the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/dev
	$(subst $(BIN)/,$(OLDEST)/bin/,$(PYTEST))

# The site, in site/; a warning is an error. The variable leaves out an advertisement of the theme's.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# What is installed is the extra of that name.
$(VENV)/demo $(VENV)/dev $(VENV)/docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(@F)]"
	touch $@

# Without torchao: diffusers 0.35 and 0.36 cannot be imported beside 0.16 of it, and tests that need it skip. datasets
# brings pyarrow, of which the newest takes no numpy before 2, and matplotlib pyparsing, of which the newest warns of what
# an older matplotlib calls.
$(OLDEST)/dev: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		--editable ".[dev]" "pyarrow==21.*" "pyparsing==3.2.*"
	$(OLDEST)/bin/uv pip uninstall --quiet --python $(OLDEST)/bin/python torchao
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
