# Two commands for a user: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types contract native clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt lmpipe/native/CMakeLists.txt $(wildcard lmpipe/native/*.cpp lmpipe/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

native: ## rebuild the C++ extension after editing it
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps -e .

demo: setup
	$(BIN)/lmpipe demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

contract: setup
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build
