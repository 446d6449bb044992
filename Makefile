# make demo      a student distilled on real digits, a table and a report (a few minutes)
# make test      linters, the C++ and CUDA kernels without a GPU, Python tests, a build against a CPU-only torch
# make test-full everything: also the slow tests
# make bench     the benchmarks of this machine, into benchmarks/results/ and docs/benchmarks/
# make gpu-check on a machine with a GPU, without network, with the Python it finds: build, tests, sanitizer, benchmarks;
#                STEPS="build smoke" for a part of it (tools/gpu_check.sh)
# make format    rewrite the sources in the project's style
#
# PYTHON=...           the interpreter that .venv is made with (>= 3.10)
# LRDS_FAST_CUDA=1|0   build the CUDA kernels or fail | never build them (default: where nvcc is found)
# LRDS_DATA=...        folder of real data for the tests that use it

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-full bench gpu-check format lint venv cpu-torch clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)
# A build for another wish is another build.
BUILT := $(VENV)/built-$(or $(LRDS_FAST_CUDA),auto)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

venv: $(BUILT)

$(VENV)/installed: pyproject.toml constraints.txt tools/install.sh
	@tools/install.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(BUILT): $(VENV)/installed $(SOURCES) setup.py
	@tools/build.sh "$(VENV)"
	@rm -f $(VENV)/built-* && touch $@

# The packages that ours is compared with; without them their tests are skipped.
$(VENV)/peers: $(VENV)/installed pyproject.toml
	$(BIN)/python tools/requirements.py peers > $@.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r $@.txt
	@touch $@

demo: $(BUILT)
	@$(BIN)/lrds-fast demo

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for script in tools/*.sh .ci/run; do bash -n "$$script"; done
	$(BIN)/shellcheck tools/*.sh .ci/run
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')

cpu-torch: $(BUILT)
	@tools/cpu_torch_build.sh "$(PYTHON)"

# The pytest summary comes last: it is what a reader looks for.
test: $(BUILT) lint cpu-torch
	$(BIN)/python -m pytest -m "not slow" --durations=15

test-full: $(BUILT) $(VENV)/peers lint cpu-torch
	$(BIN)/python -m pytest --durations=30

bench: $(BUILT)
	$(BIN)/lrds-fast bench --out benchmarks/results --pages docs/benchmarks

gpu-check:
	@tools/gpu_check.sh $(STEPS)

format: $(BUILT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')

clean:
	rm -rf build dist *.egg-info lrds_fast/*.so $(VENV)/built-*
