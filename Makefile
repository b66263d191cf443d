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

.PHONY: setup demo test check unit bench base clean

setup: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml deploy/requirements/install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) LOCK=$(LOCK) bash deploy/requirements/install.sh
	touch $(STAMP)

demo: setup
	$(BIN)/scion demo --prefer polite --seed 0 --report build/demo/report.json

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit -q

unit: setup
	$(BIN)/python -m pytest tests/unit -q

test: setup
	$(BIN)/python -m pytest tests -q --durations=15

bench: setup
	$(BIN)/python -m tests.bench $(NAME)

base: setup
	$(BIN)/python -m scion_demo.build_base

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
