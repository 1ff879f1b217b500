# make demo   train on digits of 32 px and draw 80, from nothing
# make test   the whole test suite, slow tests included; make test-core: the mathematics alone
# make coverage   the same with branch coverage of dpm_scales
# make lint   style and types
# make lint-deploy   the Dockerfile, shell scripts and manifests of deploy/
# make docs   the pages of docs/ as a site in site/, every warning an error; make docs-serve serves it and follows edits
# make docs-figures   draw the figures of the pages that need no trained model anew
#
# VENV=DIR puts the environment elsewhere, PYTHON=python3.12 builds it with another interpreter,
# WORKERS=0 runs the tests in one process, PYTEST_ARGS="-m 'not slow'" is handed on.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.installed-lint
DOCS_INSTALLED := $(VENV)/.installed-docs

# No display and no network are needed, so none is asked for.
export MPLBACKEND ?= Agg
export WANDB_MODE ?= offline

.DELETE_ON_ERROR:
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

DEPLOY_INSTALLED := $(VENV)/.installed-deploy

.PHONY: demo test test-core coverage lint lint-deploy docs docs-serve docs-figures

demo: $(INSTALLED)
	$(PY) train.py experiment=demo run_dir=runs/demo
	$(PY) sample.py model=runs/demo num_samples=80 guidance=2 seed=0 out=samples/demo overwrite=true

# One thread in each test process: two that each start a thread per core wait for one another most of the time.
test test-core coverage: export OMP_NUM_THREADS := 1
test test-core coverage: export MKL_NUM_THREADS := 1
test test-core coverage: export OPENBLAS_NUM_THREADS := 1
# Processes that tests start import the package in half the time where its bytecode is kept.
test test-core coverage: export PYTHONDONTWRITEBYTECODE :=
test: $(INSTALLED)
	$(PY) $(PYTEST) $(PYTEST_ARGS)

test-core: $(INSTALLED)
	$(PY) $(PYTEST) tests/core $(PYTEST_ARGS)

coverage: $(INSTALLED)
	$(PY) $(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)

lint: $(LINT_INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lint-deploy: $(DEPLOY_INSTALLED)
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/shellcheck deploy/*.sh deploy/slurm/*.sh
	$(VENV)/bin/kubernetes-validate --strict deploy/kubernetes/job.yaml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml

docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS_INSTALLED)
	$(PY) -m mkdocs build --strict
	$(PY) -m tools.site.links site

docs-serve: $(DOCS_INSTALLED)
	$(PY) -m mkdocs serve

docs-figures: $(INSTALLED)
	$(PY) -m benchmarks.figures --out docs

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[test]' -c constraints.txt
	touch $@

$(LINT_INSTALLED): $(INSTALLED)
	$(PIP_INSTALL) -e '.[test,dev]' -c constraints.txt
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP_INSTALL) -e '.[test,docs]' -c constraints.txt
	touch $@

$(DEPLOY_INSTALLED): $(INSTALLED)
	$(PIP_INSTALL) -e '.[test,deploy]' -c constraints.txt
	touch $@
