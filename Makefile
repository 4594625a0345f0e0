# make parity | test | puzzles | notebooks | lint | docs | lab | sass | test-newest | clean
#
# Each builds the environment it needs by itself, once (constraints/venv.sh). Everything stays inside
# the checkout. Paths are relative, so that a space in the checkout's own path does no harm.
# PYTHON=/path/to/python chooses the interpreter, ARGS="..." goes to the command that a target runs.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help parity test puzzles notebooks lint docs lab sass test-newest clean venv tmp

ARGS ?=
# jax finds a GPU through a plugin of its own; torch brings its CUDA along.
CUDA = $(shell nvidia-smi -L >/dev/null 2>&1 && echo ,cuda)

# What would otherwise land in the home directory or in /tmp.
CACHE := $(CURDIR)/.cache
export XDG_CACHE_HOME := $(CACHE)
export TRITON_HOME := $(CACHE)
export TRITON_CACHE_DIR := $(CACHE)/triton
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export CUDA_CACHE_PATH := $(CACHE)/cuda
export MPLCONFIGDIR := $(CACHE)/matplotlib
export IPYTHONDIR := $(CACHE)/ipython
export JUPYTER_CONFIG_DIR := $(CACHE)/jupyter/config
export JUPYTER_DATA_DIR := $(CACHE)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CACHE)/jupyter/runtime
export JUPYTERLAB_SETTINGS_DIR := $(CACHE)/jupyter/settings
export JUPYTERLAB_WORKSPACES_DIR := $(CACHE)/jupyter/workspaces
export PYRIGHT_PYTHON_CACHE_DIR := $(CACHE)/pyright
export PYTEST_DEBUG_TEMPROOT := $(CACHE)/pytest
export TMPDIR := $(CACHE)/tmp
# A temporary folder is not part of the checkout that it lies in.
export GIT_CEILING_DIRECTORIES := $(CACHE)
# NumPy's threads would fight those of Mosaic's interpreter.
export OPENBLAS_NUM_THREADS ?= 1
# Wheels are kept once, installed; a cache that the user has chosen is used.
ifndef PIP_CACHE_DIR
export PIP_NO_CACHE_DIR := 1
endif

help:
	@echo 'make parity        check every kernel against the oracle, compile it for sm_90a, measure it on a Hopper GPU'
	@echo 'make test          the test suite'
	@echo 'make puzzles       every puzzle through its gates: skeletons fail, solutions pass, mutants are named'
	@echo 'make notebooks     every lesson: it rebuilds, its exercises fail as given and pass when solved'
	@echo 'make lint          format, lint and types'
	@echo 'make docs          render the pictures, the tables and the pages that show records'
	@echo 'make lab           JupyterLab on your own copy of the lessons, in my_lessons/'
	@echo 'make sass          the compile gate down to machine code for both languages'
	@echo 'make test-newest   the test suite on the newest frameworks'
	@echo 'make clean         remove environments, caches and reports'

parity: venv
	@.venv/bin/parity all $(ARGS)

test: venv
	@.venv/bin/python -m pytest -n auto $(ARGS)

puzzles: venv
	@.venv/bin/puzzles author check $(ARGS)

notebooks: venv
	@.venv/bin/python notebooks/build.py --check $(ARGS)

lint: venv
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/pyright --pythonpath .venv/bin/python $(ARGS)

docs: venv
	@PYTHONPATH=docs .venv/bin/python -c 'import picture, reading, tried, accuracy, decoding as d; [m.main() for m in (picture, reading, tried, accuracy, d)]'
	@.venv/bin/python -m puzzles.pictures
	@.venv/bin/parity report --readme $(ARGS)

# JupyterLab asks nothing and calls nobody when it opens.
QUIET = $(JUPYTERLAB_SETTINGS_DIR)/@jupyterlab/apputils-extension
lab: tmp
	@sh constraints/venv.sh checkout .venv verified.txt dev,notebooks$(CUDA)
	@.venv/bin/python notebooks/build.py --mine
	@mkdir -p '$(QUIET)' && echo '{"fetchNews": "false", "checkForUpdates": false}' \
		>'$(QUIET)/notification.jupyterlab-settings'
	@.venv/bin/jupyter lab --notebook-dir=. my_lessons/01_first_tile_kernel.ipynb $(ARGS)

# Pallas' machine code needs jax's CUDA compiler, but neither a GPU nor the rest of CUDA.
sass: venv
	@sh constraints/venv.sh packages .venv-sass verified.txt \
		jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc
	@.venv/bin/parity compile --sass $(ARGS)

test-newest: tmp
	@sh constraints/venv.sh checkout .venv-newest newest.txt dev$(CUDA)
	@.venv-newest/bin/python -m pytest -n auto $(ARGS)

venv: tmp
	@sh constraints/venv.sh checkout .venv verified.txt dev$(CUDA)

tmp:
	@mkdir -p .cache/tmp .cache/pytest

clean:
	rm -rf .venv .venv-newest .venv-sass .cache .hypothesis .pytest_cache .ruff_cache report *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
