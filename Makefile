# make demo      students distilled on real digits, a table and a report (under a minute once it is built)
# make tidy      clang-tidy on the C++ and CUDA sources and on tests/simt (three to four minutes of one core)
# make test      linters, the C++ and CUDA kernels without a GPU, Python tests
# make test-full make test, the slow tests, comparisons with other packages, and the three targets below
# make test-cuda   compiles the CUDA kernels for every architecture; checks registers and machine code, loads the extension
# make test-compat the adapters, examples and snippets on the libraries that they are for, which it installs
# make test-compat-oldest  the adapters on the oldest versions that pyproject.toml allows
# make test-cpu    a build against a CPU-only torch
# make test-python the fast Python tests alone: what make test runs after the linters
# make coverage  the same with the lines of lrds_fast that they run: a table, coverage/index.html and coverage/coverage.xml;
#                TESTS="tests/test_nn.py ..." for some files
# make docs      the site of docs/ into site/, from packages of its own (.venv-docs); a warning is an error; Python >= 3.11
# make wheels    a source archive into dist/ and a wheel for PYTHON and TORCH into dist/torch-X.Y-cpu (or -cuda), from which pip
#                installs it into an empty environment; VENV=.venv-3.12 PYTHON=python3.12 for another Python
# make bench     the benchmarks of this machine, into benchmarks/results/ and docs/benchmarks/
# make gpu-check on a machine with a GPU, without network, with the Python it finds: build, tests, sanitizer, benchmarks;
#                STEPS="build smoke" for a part of it (tools/gpu_check.sh)
# make format    rewrite the sources in the project's style
#
# PYTHON=...           the interpreter that .venv is made with (>= 3.10)
# TORCH=2.13.0         the version of torch (default: constraints.txt); a CPU-only version is an eighth of the download
# LRDS_FAST_CUDA=1|0   build the CUDA kernels or fail | never build them (default: build them for the GPUs of this machine)
# TORCH_CUDA_ARCH_LIST="8.0 9.0"  the GPU architectures to build for
# MAX_JOBS=...         parallel compilers
# JOBS=2               parallel test processes, of one thread each
# LRDS_DATA=...        folder of real data for the tests that use it

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-full test-cuda test-cpu test-compat test-compat-oldest test-python coverage docs wheels bench gpu-check format lint tidy venv clean

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)
# A change of TORCH installs again; a change of TORCH or LRDS_FAST_CUDA builds again.
TORCH_NAME := $(or $(TORCH),tested)
BUILT := $(VENV)/built-$(or $(LRDS_FAST_CUDA),auto)-$(TORCH_NAME)
# What `make test` leaves to `make test-full`.
FAST := -m "not slow and not nvcc"
# Each test process uses one thread, so that JOBS of them do not compete for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TORCH

venv: $(VENV)/with-dev-$(TORCH_NAME) $(BUILT)

# with-demo has the few packages that the demo needs, with-dev also those of the tests.
$(VENV)/with-%-$(TORCH_NAME): pyproject.toml constraints.txt tools/install.sh
	@tools/install.sh "$(PYTHON)" "$(VENV)" $*
	@touch $@

$(BUILT): $(SOURCES) setup.py | $(VENV)/with-demo-$(TORCH_NAME)
	@tools/build.sh "$(VENV)"
	@rm -f $(VENV)/built-* && touch $@

# Packages to compare with, and those that lrds_fast.compat adapts to; tests that need them are skipped without them.
$(VENV)/peers $(VENV)/compat: $(VENV)/with-dev-$(TORCH_NAME) pyproject.toml constraints.txt
	$(BIN)/python tools/requirements.py $(notdir $@) > $@.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r $@.txt
	@touch $@

demo: $(BUILT)
	@$(BIN)/lrds-fast demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for script in tools/*.sh .ci/run; do bash -n "$$script"; done
	$(BIN)/shellcheck tools/*.sh .ci/run
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')

tidy: venv
	@JOBS=$(JOBS) tools/tidy.sh "$(VENV)"

# The pytest summary comes last: it is what a reader looks for.
test: venv lint
	$(PYTEST) $(FAST) --durations=15

test-python: venv
	$(PYTEST) $(FAST) --durations=15

coverage: venv
	$(PYTEST) $(FAST) --cov --cov-report=term-missing:skip-covered --cov-report=html:coverage \
	  --cov-report=xml:coverage/coverage.xml $(TESTS)

test-cuda: venv
	@$(MAKE) --no-print-directory LRDS_FAST_CUDA=1 venv
	$(BIN)/python -c "from lrds_fast._ops import build_info as b; assert b()['cuda']; print('lrds-fast: CUDA kernels', *b()['cuda_archs'])"
	$(PYTEST) -m nvcc

test-cpu: venv
	@tools/cpu_torch_build.sh "$(PYTHON)"

# -rs prints why a test is still skipped.
test-compat: venv $(VENV)/compat
	$(PYTEST) $(FAST) -rs tests/test_compat_*.py tests/test_examples.py tests/test_docs.py

test-compat-oldest: venv $(VENV)/compat
	@OMP_NUM_THREADS=1 tools/compat_oldest.sh "$(VENV)"

test-full: test-cpu test-cuda lint tidy $(VENV)/peers
	$(PYTEST) -m "not nvcc" --durations=30
	@$(MAKE) --no-print-directory test-compat

bench: venv
	$(BIN)/lrds-fast bench --out benchmarks/results --pages docs/benchmarks

# The site needs neither torch nor the extension: the reference is read from the sources.
$(VENV)-docs/installed: pyproject.toml constraints.txt tools/requirements.py
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python tools/requirements.py --only docs >$(VENV)-docs/docs.txt
	$(VENV)-docs/bin/python -m pip install --quiet -c constraints.txt -r $(VENV)-docs/docs.txt
	@touch $@

docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(VENV)-docs/bin):$$PATH" $(VENV)-docs/bin/mkdocs build --strict --quiet

wheels: $(VENV)/with-wheels-$(TORCH_NAME)
	@tools/wheels.sh "$(VENV)"

gpu-check:
	@tools/gpu_check.sh $(STEPS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')

clean:
	rm -rf build dist site coverage .coverage *.egg-info lrds_fast/*.so lrds_fast/_build.json $(VENV)/built-*
