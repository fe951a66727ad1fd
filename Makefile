# Two commands for a fresh clone with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# one thread is many times faster than several for tensors this small
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint docs bench learning clean

demo: $(VENV)/installed
	$(BIN)/looktwice demo --overwrite

test: $(VENV)/installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/numerics.py

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -q docs outputs/site

learning: $(VENV)/installed
	$(BIN)/python benchmarks/learning.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs
