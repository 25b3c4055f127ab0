# `make demo` and `make test` set everything up on a fresh machine, then run. Nothing else is needed but Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-processors docs lint format setup setup-dev clean

demo: setup
	$(BIN)/python prune_bert.py --model_name all-MiniLM-L6-v2 --task_name similarity --mu 0.5 --bundled_data

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --cov=shrinkformer --cov-report=term-missing:skip-covered --cov-fail-under=90

test-slow: setup-dev
	$(BIN)/python -m pytest -m "slow or gpu"

# What depends on rounding, as on other processors: bfloat16 on and off, 1 and 2 threads, fewer instructions.
test-processors: setup-dev
	PYTHON=$(BIN)/python .ci/processors -n auto --dist loadfile

docs: setup-dev
	$(BIN)/python -m mkdocs build --strict

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# torch comes first and by its exact version: a later, looser wish for torch would bring gigabytes of CUDA packages.
$(VENV)/.installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
