# Two commands do everything on a fresh machine: `make demo` and `make test`. Both install into .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-envoy test-oldest lint format bench fuzz engines published data clean help

help:
	@echo "make demo    run the main job: a real OpenAI client through serve and a simulated model server"
	@echo "make test    lint and all tests"
	@echo "make test-envoy   the endpoint picker behind a real Envoy, with real clients"
	@echo "make lint    ruff and mypy alone"
	@echo "make fuzz    random bytes at every public door, bounded (FUZZ_SECONDS=20 each)"
	@echo "make test-oldest   the tests, with the oldest dependencies that pyproject.toml allows"
	@echo "make engines   the real front ends of vLLM, SGLang and smg with fake engines behind (ENGINES='vllm-native:0.33.0 ...')"
	@echo "make bench   cost per streamed token, as a ratio to the floor"
	@echo "make published   compare the vendored protos with the published packages"
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

test-envoy: $(STAMP)
	$(BIN)/python -m pytest tests/envoy

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

# Downloads them once, about 500 MB in all, to ~/.cache/gaie-codec-engines: tests/engines/README.md.
engines: $(STAMP)
	ENGINES="$(ENGINES)" $(BIN)/python -m pytest tests/engines

# Downloads every vendored smg-grpc-proto release and compares its descriptors with ours.
published: $(STAMP)
	$(BIN)/python tools/vendor.py check-published
	$(BIN)/python tools/ext_proc.py --check-published

bench: $(STAMP)
	$(BIN)/python bench/per_chunk.py
	$(BIN)/python bench/ext_proc.py

data: $(STAMP)
	$(BIN)/python tools/vendor.py write-data
	$(BIN)/python tools/ext_proc.py
	$(BIN)/python tools/compat.py write
	$(BIN)/python tools/supported.py
	$(BIN)/python tools/state_table.py
	$(BIN)/python tools/formats_table.py

# The lower bounds of pyproject.toml. Without the suites that need smg-grpc-proto, whose stubs want a newer protobuf.
OLDEST_TESTS := $(filter-out $(addprefix tests/test_,e2e.py e2e_endpoints.py e2e_responses.py clients.py anthropic_sdk.py cli.py vllm_engine.py sglang_scheduler.py example_trtllm.py sim.py snapshots.py compat.py docs.py),$(wildcard tests/test_*.py))
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[all]" pytest pytest-timeout hypothesis httpx openai opentelemetry-sdk
	.venv-oldest/bin/python -m pytest $(OLDEST_TESTS)

clean:
	rm -rf $(VENV) .venv-oldest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
