.DEFAULT_GOAL := help
.PHONY: help demo test test-compile test-emu test-peft test-trl test-deepspeed docs cuda budget lint fmt bench numbers gpu doctor clean

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
# every process has a run of files, and one that has ended takes half of what another has left; ARGS=-n0 for a debugger
PARALLEL := -n logical --maxprocesses 4 --dist worksteal
# a test that waits for ever is ended after 15 minutes, with the place where each thread is, and fails
LIMIT := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
READY := $(VENV)/.ready
# Python compiles the modules that are imported when they are: a tenth of what is installed. It has to keep them: tests
# start dozens of processes, and each would compile torch, transformers and PEFT again, 25 s where an import takes 6
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
REQUIREMENTS := requirements/dev.txt requirements/no-deps.txt

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## see it work on this machine; options with ARGS="..."
	@$(PY) -m lorafuse demo $(ARGS)

# the emulator compiles for minutes and needs two packages: it begins while pip brings the others
test: EARLY := @$(PY) tests/native_commands.py >/dev/null 2>&1 &
test: $(READY) ## run all tests, lint included; pytest options with ARGS="..."
	@$(PY) -m pytest $(PARALLEL) $(LIMIT) $(ARGS)

test-compile: $(READY) ## compile every kernel for every architecture, every dtype; minutes, no GPU
	@$(PY) -m pytest $(PARALLEL) tests/kernels/test_compile.py tests/cuda/test_cuda_build.py --every-dtype $(ARGS)

test-emu: $(READY) ## the CUDA kernels on this CPU under a thousand seeded schedules each; minutes
	@$(PY) -m pytest $(PARALLEL) tests/cuda/test_emu*.py --seeds 1000 $(ARGS)

test-peft: $(READY) ## PEFT's own LoRA tests, from its source distribution, with every model patched; 15 minutes
	@$(PY) tests/peft_suite/run.py -n logical --maxprocesses 4 $(ARGS)

# dill, which datasets hashes functions with, pickles modules by value that lie elsewhere than in site-packages
test-trl: $(READY) ## under TRL: what --data counts, the advisor's scripts, the callback, examples/; installs 400 MB
	@$(INSTALL) --no-deps --upgrade --target build/trl-tests/site-packages -r requirements/trl-tests.txt
	@PYTHONPATH=build/trl-tests/site-packages $(PY) -m pytest tests/tools/test_advise_data.py tests/tools/test_advise_snippet.py tests/tools/test_trl_callback.py tests/integrations/test_examples.py $(ARGS)

docs: $(READY) ## the documentation as a site, into build/site, every link followed
	@$(PY) -c "import sys; sys.path.insert(0, 'tests'); import site_build; sys.exit(site_build.build('build/site'))"

test-deepspeed: $(READY) ## two processes under DeepSpeed's ZeRO; installs 10 MB
	@$(INSTALL) --no-deps --no-build-isolation --upgrade --target build/deepspeed-tests -r requirements/deepspeed-tests.txt
	@PYTHONPATH=build/deepspeed-tests $(PY) -m pytest tests/integrations/test_distributed_zero.py $(ARGS)

cuda: $(READY) ## build the CUDA kernels (with nvcc) and their emulator (with g++) into lorafuse/
	@$(PY) csrc/build.py emu
	@$(PY) csrc/build.py cuda

budget: $(READY) ## write the kernels' registers and shared memory to tests/*/*_budget.json, for review
	@$(PY) -m pytest tests/kernels/test_compile.py tests/cuda/test_cuda_build.py --update-budget -k budget

lint: $(READY) ## check style, format and types; edits nothing
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

fmt: $(READY) ## sort imports, apply ruff's safe fixes and format
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

bench: $(READY) ## measure this machine: call overhead, usual cases, then a layer; options of `lorafuse bench linear` with ARGS
	@$(PY) -m pytest bench
	@$(PY) -m lorafuse bench linear $(ARGS)

numbers: $(READY) ## write the published tables and graph anew from bench/results/; ARGS=--check only compares
	@$(PY) bench/publish.py $(ARGS)

gpu: ## on a machine with an NVIDIA GPU: probes, its tests and times, with the torch that is there, in 9 minutes; the next call goes on
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) bench/gpu.py $(ARGS)

doctor: $(READY) ## versions, devices, backends, and a numerical self-test
	@$(PY) -m lorafuse doctor $(ARGS)

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist *.egg-info lorafuse/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(REQUIREMENTS)
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' on PATH: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), lorafuse needs 3.10 or newer: name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot create virtual environments (no ensurepip): on Debian and Ubuntu run 'apt install python3-venv'" >&2; exit 1; }
	@$(PY) -c 'import pip' 2>/dev/null || { echo "creating $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing what development needs into $(VENV); the first time this takes minutes"
	@$(INSTALL) $$(grep -E '^(pybind11|ninja)==' requirements/dev.txt)
	$(EARLY)
	@$(INSTALL) -r requirements/dev.txt
	@$(INSTALL) --no-deps -r requirements/no-deps.txt
	@LORAFUSE_SKIP_CUDA_BUILD=1 $(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@
