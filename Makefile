# The two commands of the README. Each sets everything up on a machine that has Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test benchmarks aot docs lint format clean

demo: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/lark-fast demo --out demo-run

# A process a core, so a thread a process. Threads that spin while they wait hold up whatever else runs.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder

benchmarks: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks $(ARGS)

aot: $(VENV)/.installed
	$(BIN)/python -m benchmarks.aot

docs: $(VENV)/.installed
	$(BIN)/python -m benchmarks.documents

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# torch comes first: a plain install of what depends on it may take another build of it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo-run build dist *.egg-info
