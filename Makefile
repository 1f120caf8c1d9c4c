# Two commands do everything: `make quickstart` and `make test`. Both make .venv and install what is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process per core, each with one torch thread; a file's tests stay together, as they share what they train.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-full test-fast check audit bench clean

quickstart: $(STAMP)  ## one complete run on embedded data: dense, pruned, proved, exported, with its card
	$(BIN)/finllm-prune run recipes/quickstart.yaml --overwrite

test: check  ## lint, types, tests: under ten minutes on two cores
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not full"

test-full: check  ## these with new examples of the property tests, and the whole of every product that they sample
	$(BIN)/python -m pytest -q $(PARALLEL) --hypothesis-profile=search

test-fast: $(STAMP)  ## the tests that train nothing real and start no process
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not full"

check: $(STAMP)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(STAMP)  ## known weaknesses of the tested versions; asks the network
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

bench: $(STAMP)  ## the overhead of pruning per training step, and the speed of compact models
	$(BIN)/python scripts/bench_training.py
	$(BIN)/python scripts/bench_inference.py

clean:
	rm -rf $(VENV) outputs

# torch first: a bare dependency on torch may bring gigabytes of CUDA where a CPU build would do.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,onnx,quickstart]"
	touch $@
