# On a fresh machine `make run` and `make test` do everything, set-up included.
# PYTHON=python3.12 chooses the interpreter, VENV=... the environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: run test lint colab-check clean

run: $(READY)
	$(BIN)/python scripts/execute.py --out runs/notebooks q1.ipynb q2.ipynb

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# A Python 3.13 environment of Colab's versions, with each notebook alone in an empty folder.
colab-check:
	$(PYTHON) scripts/colab_check.py

$(READY): requirements.txt constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--no-build-isolation --no-deps -c constraints.txt sam2
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
