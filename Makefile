# Everything a newcomer needs: `make demo` and `make test` set up .venv by themselves.
# Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_JAX := $(VENV)/.installed-jax
INSTALLED_TORCH := $(VENV)/.installed-torch
INSTALLED_HUB := $(VENV)/.installed-hub
INSTALLED_QAT := $(VENV)/.installed-qat
INSTALLED_PRETRAINED := $(VENV)/.installed-pretrained
INSTALLED_REAL := $(VENV)/.installed-real
CODE := setup.py keras_polar tests examples docs/draw_ids.py docs/draw_transformer.py
# What runs on every backend of Keras.
ANYWHERE := $(addprefix tests/,gates/test_gradients.py graph/test_frozen_shared_typed.py surgery/test_precision.py \
	$(addprefix training/test_,backends.py fit_variants.py distribute.py idioms.py loop.py))
# PyPI's build for Linux brings CUDA along; another one: `make test-torch TORCH=torch==2.13.0+cpu`.
TORCH ?= torch

# TensorFlow's start-up notes hide what the commands below have to say.
export TF_CPP_MIN_LOG_LEVEL ?= 2
export KERAS_BACKEND ?= tensorflow
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-jax test-torch coverage-matrix real-files scaling latency results docs lint format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv and install the package with its examples and tests

# The stamp is written last: an interrupted installation starts again.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[examples,test]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable '.[docs]'
	@touch $@

$(INSTALLED_JAX): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable '.[jax]'
	@touch $@

$(INSTALLED_TORCH): $(INSTALLED)
	$(RUN) -m pip install --quiet $(TORCH) --editable '.[torch]'
	@touch $@

$(INSTALLED_HUB): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable '.[hub]'
	@touch $@

$(INSTALLED_QAT): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable '.[qat]'
	@touch $@

$(INSTALLED_PRETRAINED): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable '.[pretrained]'
	@touch $@

$(INSTALLED_REAL): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable '.[real]'
	@touch $@

demo: $(INSTALLED) ## train, prune, convert and export a small model; about a minute of training
	$(RUN) examples/demo.py

# A file stays in one process: its fixtures are made once.
test: $(INSTALLED) ## the quick tests, two files at a time
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(INSTALLED) $(INSTALLED_HUB) $(INSTALLED_QAT) $(INSTALLED_PRETRAINED) $(INSTALLED_REAL) test-jax test-torch ## every test: KerasHub's models, QAT, JAX and PyTorch included
	$(RUN) -m pytest

test-jax: $(INSTALLED_JAX)
	KERAS_BACKEND=jax $(RUN) -m pytest -m "not slow" $(ANYWHERE) tests/training/test_compaction.py tests/training/test_machines.py

test-torch: $(INSTALLED_TORCH)
	KERAS_BACKEND=torch $(RUN) -m pytest -m "not slow" $(ANYWHERE)

coverage-matrix: $(INSTALLED) ## every model of keras.applications and KerasHub: docs/coverage.md; hours
	$(RUN) -m pip install --quiet --editable '.[hub]'
	$(RUN) examples/benchmarks/coverage_matrix.py

real-files: $(INSTALLED_REAL) ## networks that others have published, cut to half: docs/real_files.md; minutes
	$(RUN) examples/real_files.py

scaling: $(INSTALLED) ## how apply and convert grow with the model: docs/benchmarks/scaling.md; an hour
	$(RUN) examples/benchmarks/scaling.py

latency: $(INSTALLED) ## bytes and time of pruned .tflite files, every precision: docs/benchmarks/latency.md; half an hour
	$(RUN) examples/benchmarks/latency.py

results: $(INSTALLED) ## measured numbers into README.md and docs, from committed results files
	$(RUN) examples/benchmarks/comparison/report.py
	$(RUN) examples/benchmarks/pages.py

# The notice that it silences is about versions to come, not about the pages.
docs: $(INSTALLED_DOCS) ## the documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: $(INSTALLED) ## ruff check, ruff format --check, mypy
	$(RUN) -m ruff check $(CODE)
	$(RUN) -m ruff format --check $(CODE)
	$(RUN) -m mypy

format: $(INSTALLED) ## let ruff rewrite the code
	$(RUN) -m ruff check --fix $(CODE)
	$(RUN) -m ruff format $(CODE)

clean: ## remove everything that was generated, .venv included
	rm -rf $(VENV) build dist site *.egg-info demo_output deploy_output .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
