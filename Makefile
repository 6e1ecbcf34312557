# The developer's menu. `make track` and `make test` set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.hpp)

.PHONY: help track test lint typecheck cpp-test format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

track: $(VENV)/installed ## set up .venv, fine-tune the embedded model and track it: the main job
	$(BIN)/rlspec track --every 50

test: $(VENV)/installed-dev ## set up .venv and pass the tests
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/installed-dev ## mypy
	$(BIN)/mypy

cpp-test: ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	mkdir -p build
	$(CXX) -std=c++17 -g -O1 -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all \
		-Icsrc csrc/header.cpp csrc/json.cpp csrc/file.cpp csrc/tests/test_header.cpp -o build/test_header
	build/test_header

format: $(VENV)/installed-dev ## ruff format and the fixes that ruff can make
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and build products
	rm -rf $(VENV) build *.egg-info rlspec/_C*.so
