# Everything here runs on a machine that has git, make and Python 3.11 or newer; the first target that needs
# packages installs them into $(VENV), with the versions of .ci/constraints.txt.
#
# VENV=DIR          virtual environment to use (default .venv)
# PYTHON=COMMAND    interpreter that creates it (default: the first suitable one on PATH)
# PIP_FLAGS=...     further flags of `pip install`, for example an index that carries CPU builds of torch
# PYTEST_FLAGS=...  further flags of pytest, for example -x or -k muon
# JOBS=N            test processes (default 2; 0 runs in one process, which a debugger needs)

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1 && echo $$p && break; done)
PIP_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= 2

py := $(VENV)/bin/python
muonlm := $(py) -m muonlm
# One thread for each process: the matrices of the tests are small, and the test processes share the cores.
pytest = OMP_NUM_THREADS=1 $(py) -m pytest -n $(JOBS) $(PYTEST_FLAGS)
# Two processes, because Triton decides between interpreter and compiler when it is imported.
test_kernels = if $(py) -c 'import triton' 2>/dev/null; then \
	TRITON_INTERPRET=1 $(pytest) tests/kernels/interpret && $(pytest) -m aot tests/kernels/aot; \
	else echo "no triton for this platform: its kernels are not tested"; fi
run_stamp := $(VENV)/.muonlm-run
dev_stamp := $(VENV)/.muonlm-dev
# A virtual environment whose interpreter has gone is repaired even where its stamps are still there.
repair := $(if $(shell test -x $(py) && echo usable),,FORCE)

.PHONY: help env demo test test-all test-kernels test-package image check bench clean distclean FORCE
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(run_stamp) ## The environment alone, in .venv: then .venv/bin/muonlm, .venv/bin/torchrun

demo: $(run_stamp) ## Muon against AdamW on this machine's CPU, from text to HTML report; repeating it goes on
	@if $(py) -c 'import json, sys; sys.exit(json.load(open("runs/demo/compare.json"))["state"] != "finished")' \
		2>/dev/null; then echo "runs/demo is finished already; to measure again: rm -r runs/demo && make demo"; fi
	$(muonlm) compare demo
	@echo "Report, to open in a browser: $(CURDIR)/runs/demo/report.html"

test: $(dev_stamp) ## The fast tests, and those of the GPU kernels, which need no GPU
	$(pytest) -m "not slow"
	$(test_kernels)

test-all: $(dev_stamp) ## All tests, the slow ones too
	$(pytest)
	$(test_kernels)

test-kernels: $(dev_stamp) ## The GPU kernels alone: their values under Triton's interpreter, their code as compiled
	$(test_kernels)

test-package: $(dev_stamp) ## Build wheel and sdist, install them, run what was installed
	$(pytest) -n 0 tests/unit/house/test_packaging.py

image: $(run_stamp) ## Build and check the image without an engine: needs root, buildah and debootstrap
	PYTHON=$(abspath $(py)) bash docker/build-local.sh

check: $(dev_stamp) ## Format, lint, types, rules of the house, generated docs; changes no file
	@failed=; step() { echo "$$ $$*"; "$$@" || failed="$$failed '$$1 $$2 $$3 $$4'"; }; \
	step $(py) -m ruff format --check . ; \
	step $(py) -m ruff check . ; \
	step $(py) -m mypy; \
	step $(py) -m pytest -m "not slow" $(PYTEST_FLAGS) tests/unit/house $(wildcard tests/docs); \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

bench: $(run_stamp) ## Time training steps on this machine
	$(muonlm) bench train

clean: ## Remove caches, build outputs and .venv; keeps runs/ and data/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find muonlm kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## As clean, and the results too: runs/ and data/
	rm -rf runs data

$(run_stamp): pyproject.toml .ci/constraints.txt $(repair)
	$(call install,.)
	@touch $(run_stamp)

$(dev_stamp): pyproject.toml .ci/constraints.txt $(repair)
	$(call install,.[dev$(comma)text])
	@touch $(run_stamp) $(dev_stamp)

comma := ,

# Stamps are written last, so an install that was interrupted is done again; pip keeps what is there already.
# pip shows its progress in a terminal, and elsewhere only warnings and errors.
define install
	@$(py) -m pip --version >/dev/null 2>&1 || { $(create_venv); }
	@echo "Installing muonlm and what it needs into $(VENV): minutes, and 1.5 to 3 GB of disk (more with CUDA)."
	@$(py) -m pip install $$(test -t 1 || echo --quiet) --disable-pip-version-check $(PIP_FLAGS) \
		--constraint .ci/constraints.txt torch --editable '$(1)'
endef

define create_venv
	test -n "$(PYTHON)" || { echo "Found no Python 3.11 to 3.14 on PATH. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer; name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(PYTHON) -c 'import sys; print(f"$(PYTHON) cannot make virtual environments: its modules venv or ensurepip are missing. On Debian and Ubuntu: apt install python3.{sys.version_info.minor}-venv")' >&2; exit 1; }; \
	echo "Creating $(VENV) with $(PYTHON)"; \
	$(PYTHON) -m venv --clear $(VENV)
endef
