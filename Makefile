# Both targets do all set-up themselves: a virtual environment in .venv, the package and its tools.
# A GPU or TPU build of jax: `make quickstart EXTRAS=dev,cuda` (or tpu).

EXTRAS ?= dev
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed-$(EXTRAS)

.PHONY: quickstart test lint

quickstart: $(INSTALLED)
	$(BIN)/python train.py configs/quickstart.yaml
	$(BIN)/python eval.py runs/quickstart perplexity
	$(BIN)/python eval.py runs/quickstart sample

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "hope_jax needs Python 3.11 or newer: none found on PATH" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "could not make .venv: install Python's venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@
