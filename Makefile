# On a fresh machine `make run` and `make test` do everything, set-up included.
# PYTHON=python3.12 chooses the interpreter, VENV=... the environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: run test lint notebook notebooks tables bench torture gpu-check address colab-check clean

run: $(READY)
	$(BIN)/python scripts/execute.py --out runs/notebooks q1.ipynb q2.ipynb

# A process of one thread a core, four at most; each takes whole files.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# After `make run`: JupyterLab on the two notebooks.
notebook: $(READY)
	$(BIN)/jupyter lab .

# The set-up cells carry the text of scripts/find_labkit.py.
notebooks: $(READY)
	$(BIN)/python scripts/prepare_notebooks.py

# The tables of README and q1 are those of benchmarks/results.
tables: $(READY)
	$(BIN)/python scripts/make_tables.py

# Reruns the short measurements, and names what fell by a tenth; less than 10 minutes.
bench: $(READY)
	$(BIN)/python benchmarks/rerun.py

# Kills, damages, fuzzes and attacks: what is lost or let in is named. About 40 minutes of a core;
# goes on where it stopped. BANDIT=... is the command of bandit, where that is installed.
torture: $(READY)
	$(BIN)/python benchmarks/torture.py --bandit "$(BANDIT)"

# Needs a GPU: its tests, an epoch of each preset, two accuracies; goes on where it stopped.
gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py

# make address REPO=owner/name writes badges and metadata of a fork.
address: $(READY)
	$(BIN)/python scripts/prepare_notebooks.py --repo "$(REPO)"

# Each notebook alone in an empty folder, opened "from" a fork: in a Python 3.13 environment of
# Colab's versions, then in one with the newest torch beside them. Each takes 6 GB of the disk.
colab-check:
	$(PYTHON) scripts/colab_check.py
	$(PYTHON) scripts/colab_check.py --newest-torch

$(READY): requirements.txt requirements-sam2.txt constraints.txt pyproject.toml
	@echo "Setting up $(VENV): up to 6 GB from the package index, mostly the CUDA build of torch; minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt setuptools wheel torch
	SAM2_BUILD_CUDA=0 $(PIP) --no-build-isolation --no-deps --require-hashes -r requirements-sam2.txt
	$(PIP) --no-build-isolation -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
