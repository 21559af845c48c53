# kvlite, the verbs. `make demo` and `make test` do all set-up themselves; a second `make` installs and compiles nothing.
#
# Needs Python >= 3.11 (with venv), a stable Rust toolchain and a C linker. Everything else goes into .venv and target.
# Stamps: .venv/.stamps/packages (constraints.txt, pyproject.toml) -> python/kvlite/_core.abi3.so (rust/, Cargo.*).

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
EXTENSION := python/kvlite/_core.abi3.so
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -path '*/src/*' -o -name Cargo.toml -o -name build.rs)

# A toolchain installed by rustup counts even when the shell's profile was not read since.
export PATH := $(PATH):$(HOME)/.cargo/bin
# One interpreter for every build of pyo3, or cargo and maturin would compile it in turns.
export PYO3_PYTHON := $(abspath $(PY))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# make soak: seeds and steps of the simulated engine, seeds of the cache against its naive twin (5,000 operations each), seeds
# of the migration protocol (about 16 moves each).
KVLITE_SEEDS ?= 10000
KVLITE_MODEL_SEEDS ?= 500
KVLITE_MIGRATION_SEEDS ?= 65000
KVLITE_STEPS ?= 2000
# Forced moves between real processes, and every fault at every message.
KVLITE_MOVES ?= 10000
PYTEST_ARGS ?=

# make gpu: the interpreter of a machine that may have neither Rust nor .venv, and options of `python -m bench gpu`.
GPU_PYTHON ?= $(or $(PYTHON),python3)
GPU_ARGS ?=

.PHONY: help demo test test-rust test-python lint format bench gpu peers soak build clean lines constraints

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: build ## ask the shipped model real questions over HTTP, print answers and times
	@$(VENV)/bin/kvlite demo

test: test-rust test-python ## every test, Rust and Python

test-rust: build
	@if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --workspace --status-level fail --final-status-level fail; \
	  cargo test --quiet --doc -p kvlite-core -p kvlite-cpu; \
	else cargo test --quiet --workspace; fi

test-python: build
	@$(PY) -m pytest $(PYTEST_ARGS)

lint: build ## ruff, pyright (strict), rustfmt, clippy
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet . || { echo "kvlite: not formatted; run: make format" >&2; exit 1; }
	@cargo fmt --all --check
	@$(VENV)/bin/pyright --warnings
	@cargo clippy --quiet --workspace --all-targets -- -D warnings
	@echo "kvlite: lint clean"

format: build ## rewrite sources as ruff and rustfmt want them
	@$(VENV)/bin/ruff check --quiet --fix-only .
	@$(VENV)/bin/ruff format --quiet .
	@cargo fmt --all

bench: build ## speed of the core, from Rust and through PyO3; ends in one JSON line
	@$(PY) -m bench core

gpu: ## on a GPU: every kernel right, then decode and prefill of an 8B shape against floors; torch and triton suffice
	@PYTHONPATH=python$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m bench gpu --save $(GPU_ARGS)

peers: build ## vLLM and llama.cpp in environments of their own (.peers, 7 GB), for: python -m bench compare
	@$(PY) -m bench install-peers

soak: build ## the simulators with many seeds (KVLITE_SEEDS, KVLITE_STEPS, KVLITE_MODEL_SEEDS, KVLITE_MIGRATION_SEEDS)
	@KVLITE_SEEDS=$(KVLITE_SEEDS) KVLITE_STEPS=$(KVLITE_STEPS) KVLITE_MODEL_SEEDS=$(KVLITE_MODEL_SEEDS) \
	  KVLITE_MIGRATION_SEEDS=$(KVLITE_MIGRATION_SEEDS) KVLITE_EXPLORE_DEEP=1 \
	  cargo test --release -p kvlite-core --test model --test simulate --test migrate --test migration -- --nocapture
	@KVLITE_MOVES=$(KVLITE_MOVES) $(PY) -m pytest -s --timeout 0 \
	  tests/fleet/test_storm.py tests/fleet/test_faults.py tests/fleet/test_endings.py

build: $(EXTENSION) ## set up .venv and compile the Rust part

lines: ## lines of code by part, beside their budgets
	@$(firstword $(wildcard $(PY)) python3) tests/tidy/lines.py

clean: ## remove everything that make made
	@rm -rf $(VENV) .peers target dist python/kvlite/_core*.so .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

constraints: build ## write constraints.txt from what .venv holds now
	@{ sed -n '/^#/p' constraints.txt; $(PY) -m pip freeze --exclude-editable --exclude kvlite \
	  | grep -viE '^(nvidia-|cuda-|-e )'; } > constraints.new && mv constraints.new constraints.txt

# First rule of all: what is missing, and how to get it, in one line.
$(PY):
	@command -v cargo >/dev/null || { \
	  echo "kvlite needs a Rust toolchain: curl --proto '=https' -sSf https://sh.rustup.rs | sh" >&2; exit 1; }
	@command -v cc >/dev/null || { \
	  echo "kvlite needs a C linker for Rust: apt install build-essential (macOS: xcode-select --install)" >&2; exit 1; }
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  "$$python" -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "kvlite needs $$python's venv module: apt install python3-venv" >&2; exit 1; }; \
	  echo "kvlite: new environment in $(VENV) from $$("$$python" --version)"; \
	  exec "$$python" -m venv $(VENV); \
	done; echo "kvlite needs Python >= 3.11: https://www.python.org/downloads/ (then: make PYTHON=python3.12 ...)" >&2; exit 1

# pip's own progress bar would drown the log: one line per package that it fetches.
$(STAMPS)/packages: pyproject.toml constraints.txt | $(PY)
	@echo "kvlite: installing Python packages (torch is large: some minutes on a first run)"
	@mkdir -p $(STAMPS)
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(STAMPS)/requirements.txt
	@$(PY) -m pip install --progress-bar off -c constraints.txt -r $(STAMPS)/requirements.txt \
	  | sed -un 's/^ *\(Downloading\|Using cached\) \(.*\)/  \2/p; s/^Installing.*/  unpacking/p'
	@touch $@

# Quiet unless it fails: maturin lists every requirement that is satisfied already.
$(EXTENSION): $(RUST_SOURCES) pyproject.toml $(STAMPS)/packages
	@echo "kvlite: compiling the Rust part (about a minute the first time)"
	@cargo fetch --quiet
	@PIP_QUIET=1 VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/maturin develop --release > $(STAMPS)/compile.log 2>&1 \
	  || { cat $(STAMPS)/compile.log >&2; exit 1; }
	@touch $@
