# Two commands do everything on a fresh machine: `make demo` and `make test`. Both install into .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint format bench fuzz data clean help

help:
	@echo "make demo    run the main job: a real OpenAI client through serve and a simulated model server"
	@echo "make test    lint and all tests"
	@echo "make lint    ruff and mypy alone"
	@echo "make fuzz    random bytes at every public door, bounded (FUZZ_SECONDS=20 each)"
	@echo "make bench   cost per streamed token, as a ratio to the floor"
	@echo "make data    regenerate run-time data from proto_vendor/"

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gaie-codec needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]" --group dev
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

FUZZ_SECONDS ?= 20
fuzz: $(STAMP)
	for target in fuzz/fuzz_*.py; do $(BIN)/python $$target --seconds $(FUZZ_SECONDS) || exit 1; done

bench: $(STAMP)
	$(BIN)/python bench/per_chunk.py

data: $(STAMP)
	$(BIN)/python tools/vendor.py write-data

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
