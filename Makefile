# Needs Linux, make and Python 3.10 or newer; everything else comes by one `pip install` into .venv.
#   make quickstart   real data -> shards -> train -> kill -> resume -> evaluate -> export -> report
#   make test         every test this machine can run
#   make check        format, lint, types, architecture and quick tests
#   make gpu          on a GPU: its tests, the sweep of tile sizes, the benches; figures go to docs/log.md
# VENV=path uses the libraries of another environment: nothing is installed into it, and the code run is this checkout's.
# ARGS=... is handed to the command: make quickstart ARGS=--prove, make test ARGS="-k loader".

PYTHON ?= python3
ARGS ?=

ifeq ($(origin VENV),undefined)
VENV := .venv
INSTALLED := $(VENV)/.installed
else
INSTALLED := $(VENV)/bin/python
export PYTHONPATH := $(CURDIR)/pretrain:$(CURDIR)/kernels:$(CURDIR)/launch
endif
RUN := $(VENV)/bin/python -m

HAS_GPU := $(wildcard /dev/nvidiactl /dev/kfd)
export OMP_NUM_THREADS ?= 1
export PATH := $(abspath $(VENV))/bin:$(PATH)
ifeq ($(HAS_GPU),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help quickstart test check gpu install
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

quickstart: install
	$(RUN) trichord.cli quickstart $(ARGS)

test: install
	$(RUN) pytest -m "not gpu" $(ARGS)

check: install
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) pyright
	$(RUN) pytest -m "not slow and not distributed and not slurm and not gpu" $(ARGS)

ifeq ($(HAS_GPU),)
gpu:
	@echo "make gpu: this machine has no GPU (no /dev/nvidiactl, no /dev/kfd)" >&2; exit 3
else
gpu: install
	$(RUN) pytest -m gpu $(ARGS)
	$(RUN) trichord_kernels.tables.sweep --log docs/log.md
	$(RUN) trichord.cli bench kernels --device cuda --log docs/log.md
endif

install: $(INSTALLED)

.venv/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON); install Python 3.10 or newer, or say PYTHON=path" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Trichord needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); say PYTHON=path" >&2; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	touch $@

ifneq ($(VENV),.venv)
$(VENV)/bin/python:
	@echo "make: VENV=$(VENV) holds no bin/python; leave VENV out to have .venv made" >&2; exit 2
endif
