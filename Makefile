# Each target starts from nothing: the first one that runs makes the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash

.PHONY: demo test slow lint types clean

# torch comes first: once it is there, nothing pulls another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' ruff mypy
	touch $@

demo: $(STAMP)
	$(BIN)/python samples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

# mypy does not see mapped packages: it reads a folder of links that looks like the wheel.
types: $(STAMP)
	@links=$$(mktemp -d) && mkdir $$links/dit_accel \
	&& for item in dit_accel/*; do ln -s "$$PWD/$$item" $$links/dit_accel/; done \
	&& for mapped in kernels pipelines configs; do ln -s "$$PWD/$$mapped" $$links/dit_accel/; done \
	&& root=$$PWD && cd $$links \
	&& "$$root/$(BIN)/mypy" --config-file "$$root/pyproject.toml" -p dit_accel; \
	status=$$?; rm -rf $$links; exit $$status

clean:
	rm -rf $(VENV) out build dist *.egg-info
