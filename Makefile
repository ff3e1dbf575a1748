# `make demo` and `make test` do everything on a machine with Python 3.11+, pip and make.
# `make VENV=path ...` uses an environment that is already there: what it has is kept, what it lacks is installed.

VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= test,docs,timm,openvino,tensorrt-rtx
# Tested versions, for a virtual environment that make creates; `make CONSTRAINTS=` takes the newest ones instead.
CONSTRAINTS ?= constraints.txt
DEMO ?= runs/demo
# Of the game alone; becomes steps once, at the rate that this machine is measured to play at.
DEMO_MINUTES ?= 4
DEMO_EXPORTS ?= onnx onnx:fp16 openvino:fp16 tensorrt-rtx:fp16

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.dfadc-installed
FASHION_MNIST := examples/fashion_mnist

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check lint types tests examples docs format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## Virtual environment with dfadc and what its tests need

demo: $(INSTALLED) ## Distil the Fashion-MNIST teacher without data, export, verify (6 minutes on 2 CPU cores)
	$(BIN)/dfadc distill $(FASHION_MNIST)/teacher.safetensors --student compact_resnet_20 \
		--data $(FASHION_MNIST)/test_2000.npz --minutes $(DEMO_MINUTES) --out $(DEMO) --force $(addprefix --export ,$(DEMO_EXPORTS))

test: check ## Install, then lint, types and tests

check: $(INSTALLED) ## Lint, types and tests, beside each other
	$(MAKE) --no-print-directory --jobs 3 lint types tests

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy, strict
	$(BIN)/mypy

# With bytecode on the disk, the processes that tests start do not compile dfadc anew.
tests: $(INSTALLED) ## pytest, a process for each core, up to four
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

examples: $(INSTALLED) ## The example scripts and the documentation's commands, run whole: CI does so after make test
	$(BIN)/python -m pytest -m example --numprocesses auto --maxprocesses 4 --dist load

docs: $(INSTALLED) ## Documentation as a site in build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

format: $(INSTALLED) ## Format and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build outputs; keeps the virtual environment and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find dfadc exporters examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Only where there is no environment yet. A failed install removes the interpreter again, so the next make starts over.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$(EXTRAS)]'

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@
