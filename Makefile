# make book · make serve · make test · make notebooks. Each sets up what it needs, once; Python 3.11 or newer is enough.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

PYTHON ?= python3
# Another build of torch: make TORCH='torch==… --extra-index-url …' (installed first, and then left alone).
TORCH ?= torch==2.13.0
PORT ?= 8000
WORKERS ?= 2

export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONWARNINGS :=
# The library is this one, whatever others are on somebody's path.
export PYTHONPATH :=
# POT imports every array library that it finds; JAX, the tests' second opinion, costs most of a second each time.
export POT_BACKEND_DISABLE_JAX := 1
export NSGF_WORKERS := $(WORKERS)

BIN := .venv/bin
WHEEL_BIN := .venv-wheel/bin
PIP_INSTALL := -m pip install -q -q -c .venv/constraints.txt
LIBRARY := $(shell find nsgf_lite -name '*.py') nsgf_lite/py.typed
KERNEL := .venv/share/jupyter/kernels/nsgf-wheel/kernel.json
PAGE := _build/html/index.html

.PHONY: help book serve test notebooks repository install wheel lint unit mutations notebook-checks browser clean

help:
	@sed -n '1s/^# //p' Makefile

# --- what a reader types ------------------------------------------------------------------------------------------

book: .venv/.installed
	$(BIN)/jupyter-book build . -W --keep-going
	@echo "The book is at $(CURDIR)/$(PAGE)"

serve: .venv/.installed
	@[ -f $(PAGE) ] || $(MAKE) book
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2>/dev/null || { \
	  echo "Port $(PORT) is taken: name another one, make serve PORT=8001" >&2; exit 1; }
	@echo "The book is at http://localhost:$(PORT)/ until you press Ctrl-C"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

# The cheap checks come first; the book is built once, and all that looks at pages opens that build.
test: lint wheel book unit mutations notebook-checks browser

# The paired .ipynb (executed, with the outputs of the claim cells only) and the notebooks for Colab.
notebooks: .venv/.installed
	$(BIN)/python tools/notebooks.py
	$(BIN)/python tools/colab.py

# make repository URL=https://… : the one repository setting, and every place where it is written out.
repository:
	@$(PYTHON) tools/repository.py '$(URL)'

# --- the parts of make test, each of which works alone ------------------------------------------------------------

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: .venv/.installed $(KERNEL)
	$(BIN)/python -m pytest tests --ignore=tests/test_browser.py -n $(WORKERS) --dist loadscope

mutations: .venv/.installed
	$(BIN)/python tests/mutations.py

notebook-checks: .venv/.installed $(KERNEL) .venv-wheel/.wheel
	tools/nbval.sh

browser: .venv/.installed
	@[ -f $(PAGE) ] || $(MAKE) book
	$(BIN)/python -m pytest tests/test_browser.py

# --- environments -------------------------------------------------------------------------------------------------

install: .venv/.installed
wheel: $(KERNEL) .venv-wheel/.wheel

# Two environments of the same versions: .venv works on the tree; .venv-wheel holds the built wheel and what it needs.
.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "Setting up .venv (once; some minutes)"
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "The venv module is needed (on Debian: apt install python3-venv)." >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(BIN)/python $(PIP_INSTALL) $(TORCH)
	@touch $@

.venv/.installed: .venv/.torch constraints.txt pyproject.toml
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(BIN)/python $(PIP_INSTALL) -e '.[book,build,test,ott]'
	@mkdir -p .venv/etc/ipython # kernels on one's own machine need not warn that they speak unencrypted
	@echo 'c.IPKernelApp.log_level = 40' > .venv/etc/ipython/ipython_kernel_config.py
	@touch $@

dist/.wheel: $(LIBRARY) pyproject.toml README.md LICENSE .venv/.torch
	@rm -rf dist && mkdir dist
	@$(BIN)/python -m pip wheel -q -q --no-deps -w dist .
	@touch $@

.venv-wheel/.needs: constraints.txt pyproject.toml .venv/.installed | dist/.wheel
	@echo "Setting up .venv-wheel, which holds the built wheel (once; some minutes)"
	@rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	@$(WHEEL_BIN)/python $(PIP_INSTALL) $(TORCH)
	@$(WHEEL_BIN)/python $(PIP_INSTALL) ipykernel "$$(ls dist/*.whl)[book]"
	@touch $@

.venv-wheel/.wheel: dist/.wheel .venv-wheel/.needs
	@$(WHEEL_BIN)/python -m pip install -q -q --force-reinstall --no-deps dist/*.whl
	@cd book && ../$(WHEEL_BIN)/python -c 'import nsgf_lite as nl; assert ".venv-wheel" in nl.__file__, nl.__file__'
	@touch $@

$(KERNEL): .venv-wheel/.needs .venv-wheel/.wheel
	@$(WHEEL_BIN)/python -m ipykernel install --prefix .venv --name nsgf-wheel --display-name "the built wheel" \
	  --env PYTHONPATH "" >/dev/null 2>&1
	@touch $@

clean:
	rm -rf _build dist .pytest_cache .mypy_cache .ruff_cache
