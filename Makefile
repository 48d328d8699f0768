# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`. `make demo ACCELERATOR=cuda` takes the CUDA build.
PYTHON      ?= python3.11
VENV        ?= .venv
ACCELERATOR ?= cpu
PY          := $(VENV)/bin/python
STAMP       := $(VENV)/.installed-$(ACCELERATOR)
PIP         := $(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt
# Whole files to a worker, because fixtures that train a run are shared within a file.
IN_PARALLEL := -n auto --dist loadfile
# The package as it is installed, for the type checker, which cannot see the mapping of an editable install.
TYPING      := build/typing
# What the site is built from: the pages where they are in the checkout, and the package as one folder, for griffe, which
# takes a folder without __init__.py for none of the package's.
PAGES       := build/pages
REFERENCE   := build/api/torchrec_em3
SOURCES     := torchrec_em3 components datasets torchx_specs benchmarks docs/examples tests setup.py

# Everything that runs is installed below; nothing is fetched while it runs.
export HF_HUB_OFFLINE ?= 1
# With gloo and small operations, waiting threads that spin cost more than they gain.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-fast lint docs install clean

demo: $(STAMP)
	$(PY) -m torchrec_em3 demo

test: $(STAMP)
	$(PY) -m pytest $(IN_PARALLEL)

test-fast: $(STAMP)
	$(PY) -m pytest -m "not slow" $(IN_PARALLEL)

lint: $(STAMP)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	rm -rf $(TYPING) && mkdir -p $(TYPING)/torchrec_em3
	@ln -s $(addprefix $(CURDIR)/,$(wildcard torchrec_em3/*) components datasets torchx_specs) $(TYPING)/torchrec_em3/
	@ln -s $(CURDIR)/benchmarks $(TYPING)/
	cd $(TYPING) && $(abspath $(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml

# In an environment of its own, which needs none of what training needs.
docs: build/docs-venv/.installed
	rm -rf $(PAGES) build/api && mkdir -p $(PAGES) build/api
	ln -s $(addprefix $(CURDIR)/,README.md docs benchmarks configs) $(PAGES)/
	cp -r torchrec_em3 build/api/ && cp -r components datasets torchx_specs $(REFERENCE)/
	find $(REFERENCE) -type d -exec touch {}/__init__.py \;
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/python -m mkdocs build --strict

build/docs-venv/.installed: requirements/docs.txt requirements/constraints.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt -r $<
	touch $@

install: $(STAMP)

# torch first: what comes after must find the build that is already there.
$(STAMP): setup.py pyproject.toml $(wildcard requirements/*.txt) $(wildcard packaging/*/pyproject.toml)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements/$(ACCELERATOR).txt -r requirements/test.txt
	$(PIP) --no-deps --editable .
	$(PY) -m pip check
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
