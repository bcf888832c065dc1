# The verbs of the repository. Each sets up what it needs in .venv; nothing outside this folder is touched but the caches.
PYTHON ?= python3
VENV ?= .venv
# Other makers and readers of 4-bit checkpoints, and what they pin.
INTEROP ?= .venv-interop
# torch comes first, so that pip takes the build chosen here. A CUDA build: make demo TORCH=torch
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := CMakeLists.txt pyproject.toml $(shell find native -type f)

.PHONY: help demo test test-slow test-interop test-docs docs lint bench cuda-check clean
help:
	@echo "make demo        install, quantize the sample model to 4 bits, compare it with the original"
	@echo "make test        every test not marked slow, gpu or interop"
	@echo "make test-slow   the tests that take minutes: kills at random moments, a Ray cluster, fuzzing"
	@echo "make test-interop  checkpoints to and from gptqmodel, compressed-tensors, llm-compressor, llama.cpp; installs them"
	@echo "make docs        the site of docs/ in build/site"
	@echo "make test-docs   run every command of docs/ that needs no GPU, no hub and no installation"
	@echo "make lint        ruff, mypy --strict, import contracts"
	@echo "make cuda-check  compile the CUDA kernels for four GPUs with nvcc; fails on spills. Needs no GPU"
	@echo "make bench       the benchmarks of README.md; DATA=folder with the WikiText-2 and C4 texts, PEERS=other engines"
	@echo "make clean       remove .venv and build products (the model cache stays)"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar on "$(TORCH)"
	@touch $@

# Editable: Python sources are used in place, the native core is rebuilt when its sources change.
$(VENV)/.halfbyte: $(VENV)/.torch $(NATIVE)
	$(PIP) install --progress-bar on --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.halfbyte
	$(PIP) install --progress-bar on --editable ".[dev]"
	@touch $@

demo: $(VENV)/.halfbyte
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --dist worksteal -m "not slow and not gpu and not interop"

# atheris has wheels for Linux and few versions of Python; without it that one test skips.
test-slow: $(VENV)/.dev
	-$(PIP) install --quiet atheris
	$(BIN)/python -m pytest -m "slow and not gpu and not interop"

$(INTEROP)/.torch:
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip --disable-pip-version-check install --progress-bar on "$(TORCH)"
	@touch $@

# Naming torch again keeps pip from replacing it. A build folder of its own, so that .venv's is not for another Python.
$(INTEROP)/.peers: $(INTEROP)/.torch $(NATIVE)
	$(INTEROP)/bin/python -m pip --disable-pip-version-check install --progress-bar on "$(TORCH)" \
		--config-settings=build-dir=build/interop --editable ".[interop,eval]"
	@touch $@

test-interop: $(INTEROP)/.peers
	$(INTEROP)/bin/python -m pytest -m interop tests/interop

$(VENV)/.docs: $(VENV)/.halfbyte
	$(PIP) install --progress-bar on --editable ".[docs]"
	@touch $@

# The lessons are run while it is built: minutes, and the sample model.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test-docs: $(VENV)/.dev
	$(BIN)/python -m pytest tests/docs -m "slow or not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

cuda-check: $(VENV)/.halfbyte
	$(BIN)/python tests/kernels/cuda_check.py

DATA ?= ../shared/data
# Interpreters that have the peers: PEERS="--llama-cpp llama/bin/python --openvino openvino/bin/python"
PEERS ?=
bench: $(VENV)/.halfbyte
	$(BIN)/python benchmarks/ablation.py --data $(DATA) --only "original, fp32 arithmetic" rtn "awq without range" awq best
	$(BIN)/python benchmarks/cpu_decode.py --data $(DATA) --batches 1 --transformers $(PEERS)
	$(BIN)/python benchmarks/linear_kernels.py

clean:
	rm -rf $(VENV) $(INTEROP) build demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
