# `make train` and `make test` need only Python 3.10-3.13, g++ and make: they create the virtual environment.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
RUN := $(VENV)/bin
comma := ,

.PHONY: train test dryrun soak lint notebooks docs clean
.DELETE_ON_ERROR:

# Compares the plain objective with S2SD on handwriting: a table, and curves, gallery, SavedModel and report in runs/handwriting.
# Each further seed takes three more minutes: make train SEEDS=0,1,2
SEEDS ?= 0
train: $(VENV)/installed
	TF_CPP_MIN_LOG_LEVEL=3 $(RUN)/s2sd-compare --config=configs/omniglot.py --config.model.embedding_dim=64 \
		--workdir=runs/handwriting --seeds=$(SEEDS)
	TF_CPP_MIN_LOG_LEVEL=3 $(RUN)/s2sd-evaluate --workdir=runs/handwriting/runs/s2sd_seed$(firstword $(subst $(comma), ,$(SEEDS))) --report=runs/handwriting/report.html

test: $(VENV)/installed
	$(RUN)/python -m pytest -n 2 --dist=loadfile

# Runs every config end to end for two steps, on generated images in the layouts of the data sets.
dryrun: $(VENV)/installed
	TF_CPP_MIN_LOG_LEVEL=3 $(RUN)/python benchmarks/dry_runs.py

# Kills runs at random moments and checks that they still end as if nothing had happened; 45 minutes.
soak: $(VENV)/installed
	$(RUN)/python benchmarks/soak.py

lint: $(VENV)/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# Runs the notebooks and keeps their output; four minutes.
notebooks: $(VENV)/notebooks_installed
	$(RUN)/jupyter nbconvert --to=notebook --execute --inplace --ExecutePreprocessor.record_timing=False examples/*.ipynb

# Builds the documentation into site/; a dead link or an unknown name fails.
docs: $(VENV)/docs_installed
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

$(VENV)/%_installed: $(VENV)/installed
	$(RUN)/python -m pip install --quiet -e '.[$*]'
	touch $@

$(VENV)/installed: pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10-3.13 found; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet -e '.[dev,jax]'
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
