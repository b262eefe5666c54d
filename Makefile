# Two commands on a bare machine: `make train` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
PROCESSES ?= 1
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train test coverage test-all test-gpu lint setup clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

train: .venv/ready ## Pretrain a small SLTrain LLaMA on real text, on all cores.
	$(BIN)/$(if $(filter 1,$(PROCESSES)),python,torchrun --nproc_per_node=$(PROCESSES)) launch/pretrain.py model=llama_tiny param=sltrain resume=auto $(ARGS)

test: .venv/ready ## The quick tests.
	$(PYTEST) -m "not full and not gpu" $(ARGS)

coverage: .venv/ready ## The quick tests, and which lines they run.
	$(PYTEST) -m "not full and not gpu" --cov $(ARGS)

test-all: test ## All tests.
	$(PYTEST) -m full $(ARGS)

test-gpu: .venv/ready ## The checks on one GPU, with a table and gpu_report.json; skipped without a GPU.
	$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: .venv/ready ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv
