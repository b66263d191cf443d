# One command each: demo, test, check, bench. Every one of them does all the set-up it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := deploy/requirements/cpu.lock
STAMP := $(VENV)/.installed
# The simulated world, the tests and the servers they start never need the network.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1

# What `make check` runs beside each other: one pytest per folder of tests/unit, and one for all that import torch and so
# take seconds to begin.
TORCH := $(shell grep -rlE '^(import|from) (torch|transformers|trl|peft)\b' tests/unit --include='test_*.py')
UNIT := $(patsubst tests/unit/%/,unit-%,$(sort $(dir $(filter-out $(TORCH),$(wildcard tests/unit/*/test_*.py)))))
PYTEST := $(BIN)/python -m pytest -q -p no:cacheprovider
# Each job's output appears in one piece when it is done; all of them run to their end, and one failure fails the whole.
BESIDE = +OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --keep-going --output-sync=target --jobs=$(JOBS)
JOBS ?= $(shell nproc 2>/dev/null || echo 4)

.PHONY: setup demo test check unit bench base clean lint types imports unit-top unit-torch $(UNIT)

setup: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml deploy/requirements/install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) LOCK=$(LOCK) bash deploy/requirements/install.sh
	touch $(STAMP)

demo: setup
	$(BIN)/scion demo --prefer polite --seed 0 --report build/demo/report.json

check: setup
	$(BESIDE) unit-torch unit-trainer types $(filter-out unit-trainer,$(UNIT)) unit-top imports lint  # the longest first

unit: setup
	$(BESIDE) unit-torch $(UNIT) unit-top

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

$(UNIT): unit-%:
	$(PYTEST) $(filter-out $(TORCH),$(wildcard tests/unit/$*/test_*.py))

unit-torch:
	$(PYTEST) $(TORCH)

unit-top:
	$(PYTEST) $(wildcard tests/unit/test_*.py)

test: setup
	$(BIN)/python -m pytest tests -q --durations=15

bench: setup
	$(BIN)/python -m tests.bench $(NAME)

base: setup
	$(BIN)/python -m scion_demo.build_base

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
