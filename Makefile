# On a new machine with python3, make and git: `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: install demo test lint parity clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "md2 needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,dask,export,timm,video]'
	touch $@

# Renders a synthetic drive, packs it, trains on the CPU, compares with the exact depth, predicts.
demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" python scripts/demo.py "$(DEMO)"

# Three processes for two cores, because much of the suite waits for servers and processes that it starts; conftest.py
# sorts the files.
test: install
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# Trains md2 and the plain reference side by side, three times each, a few minutes; fails where md2 learns worse.
parity: install
	rm -rf parity_check
	$(BIN)/md2 bench parity parity_check --check

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf "$(DEMO)" parity_check build *.egg-info
