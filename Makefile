# `make help` lists the targets. Each makes its own virtual environment where it needs one.
PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver torch's CPU build is pinned: anything else brings gigabytes of CUDA packages.
CONSTRAINTS := $(if $(wildcard /proc/driver/nvidia),,-c constraints/cpu.txt)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help setup demo lint test test-oldest harness build clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/ok: pyproject.toml
	$(PY) -m venv $(VENV)
	$(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python $(CONSTRAINTS) -e '.[dev]' \
		|| $(BIN)/pip install -q $(CONSTRAINTS) -e '.[dev]'
	touch $@

setup: $(VENV)/ok ## the virtual environment .venv with everything

demo: $(VENV)/ok ## all four stages on a CPU in minutes; tables and images in outputs/demo
	$(BIN)/vtlmm demo --output outputs/demo

lint: $(VENV)/ok ## style, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

test: $(VENV)/ok ## all tests; no network
	$(BIN)/python -m pytest -q

# The model's files promise an older transformers than the trainer needs.
.venv-oldest/ok: pyproject.toml
	$(PY) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q uv && .venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python \
		$(CONSTRAINTS) -e '.[dev]' transformers==5.16.1
	touch $@

test-oldest: .venv-oldest/ok ## the model's tests on the oldest supported transformers
	.venv-oldest/bin/python -m pytest -q tests/test_losses.py tests/test_modeling.py tests/test_remote_code.py

.venv-harness/ok: pyproject.toml
	$(PY) -m venv .venv-harness
	.venv-harness/bin/pip install -q uv && .venv-harness/bin/uv pip install -q --python .venv-harness/bin/python \
		$(CONSTRAINTS) -e '.[harness,figures]' pytest pytest-timeout
	$(if $(CONSTRAINTS),.venv-harness/bin/uv pip uninstall -q --python .venv-harness/bin/python torchvision)
	touch $@

harness: .venv-harness/ok ## the tests with lm-evaluation-harness and lmms-eval, in an environment of their own
	.venv-harness/bin/python -m pytest -q tests/test_harness.py

build: $(VENV)/ok ## the wheel, in dist/
	$(BIN)/python -m build --wheel

clean: ## everything that was made
	rm -rf .venv .venv-oldest .venv-harness outputs dist build *.egg-info .pytest_cache .ruff_cache
