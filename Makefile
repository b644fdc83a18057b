# make demo | make test | make test-fast | make bench | make gpu-check | make lint | make setup | make clean
PYTHON ?= python3
VENV   ?= .venv
# The torch that the suite was last run with. A CPU build is enough for demo and test: on a machine without NVIDIA GPUs,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu saves several GB.
TORCH  ?= torch==2.13.0
TORCH_INDEX ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PATH := $(abspath $(BIN)):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-fast bench bench-full gpu-check lint format clean

help:
	@echo "make demo   set up, train one small model on three datasets of real video files, evaluate it, write a report"
	@echo "make test   set up, run the whole test suite, two tests at a time (make test WORKERS=0: one)"
	@echo "make test-fast   for every edit: without the tests that start ranks, SLURM or machines, train, or decode many videos"
	@echo "make bench       measure every figure at sizes that fit two cores, write benchmarks/README.md; under 25 minutes"
	@echo "make bench-full  the same at the real sizes"
	@echo "make gpu-check   on a machine with a GPU, twelve minutes: is everything right on it, and how fast (docs/gpu.md)"
	@echo "make lint   ruff, mypy and codespell, as in pre-commit"
	@echo "make docs   this project's documentation as a site in site/, warnings as errors, without a network"
	@echo "make setup  virtual environment in $(VENV) with everything in it"
	@echo "make clean  remove the demo's files and caches, keep $(VENV)"

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 13) else "MultiTrain needs Python 3.10 to 3.12; this is %s. Use make PYTHON=python3.11" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: setup
	$(BIN)/python launch/demo.py

# Most tests wait for processes, so that two at a time use two cores.
WORKERS ?= 2
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not long"

bench: setup
	$(BIN)/python -m benchmarks.run

bench-full: setup
	$(BIN)/python -m benchmarks.run --full

gpu-check: setup
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf site demo runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
