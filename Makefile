# The commands of development. `make` alone lists them.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST := not slow and not cuda and not npu
# One worker per processor. All tests of a file run on the same worker, because they share fixtures.
WORKERS := auto
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# `make check` tests these folders, without the files that take seconds per test or start processes.
QUICK := tests/test_*.py $(addprefix tests/,checkpoint device inspect kernels model mx ops quant twin weights)
NOT_QUICK := mx/test_encoder.py mx/test_row_encoder.py twin/test_install.py weights/lora/test_fold.py
DEMO := a red circle moves right on a black background
VIDEO := outputs/demo.mp4

.DEFAULT_GOAL := help
.PHONY: help install demo lint check test test-all fix docs bench

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install ascendit with the development tools

# Runs again when one of these files is newer. Takes the first Python of at least 3.11; skips a shim that
# does not start.
$(STAMP): pyproject.toml constraints.txt
	@set -e; chosen=; if [ ! -x $(BIN)/python ]; then \
	  for python in python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then chosen=$$python; break; fi; \
	  done; \
	  if [ -z "$$chosen" ]; then echo "ascendit needs Python 3.11 or newer; PATH has none" >&2; exit 3; fi; \
	  echo "making $(VENV) with $$($$chosen --version)"; \
	  $$chosen -m venv $(VENV) || { \
	    echo "$$chosen cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; \
	    rm -rf $(VENV); exit 3; }; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@echo "installing ascendit and its development tools into $(VENV)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: install  ## generate a video with the embedded demo model
	$(BIN)/ascendit generate --demo "$(DEMO)" -o $(VIDEO) --seed 42 --overwrite
	@echo "The video is $(CURDIR)/$(VIDEO)"

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint  ## style, types and the quick tests, in about a minute
	$(BIN)/pytest -m "$(FAST)" $(PARALLEL) $(QUICK) $(addprefix --ignore=tests/,$(NOT_QUICK))

test: lint  ## style, types and every test that is not slow and needs no accelerator
	$(BIN)/pytest -m "$(FAST)" $(PARALLEL)

test-all: lint  ## every test; those that lack their hardware are skipped with the reason
	$(BIN)/pytest

fix: install  ## correct and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## renew the tables and pictures in README.md and docs/
	$(BIN)/python tools/docs_tables.py
	$(BIN)/python tools/draw_architecture.py

bench: install  ## run every file in benchmarks/
	@set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python "$$file"; done
