# Everything runs in .venv, which is made on first use: a machine needs python3 (3.10 or later) with pip, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-all lint setup qemu lock clean

demo: setup
	$(BIN)/python -m graphwright.tools.demo

test: lint qemu
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup

test-all: lint qemu
	$(BIN)/python -m pytest -n 2 --dist loadgroup
	$(BIN)/python -m graphwright.tools.backend_suite --kind all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/python tools/typecheck.py

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv --clear .venv || { rm -rf .venv; $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv .venv; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# Cross C library and emulator for the arm64 tests; without the right to install them those tests are skipped.
qemu: setup
	sh tools/setup_qemu.sh || true

# Rewrites requirements.lock from the ranges in pyproject.toml.
lock: setup
	$(BIN)/python -m pip install --quiet --upgrade ".[codec,models,test]"
	$(BIN)/python -m pip freeze --all --exclude graphwright --exclude pip | sed 's/+cpu//' > requirements.lock

clean:
	rm -rf .venv build dist *.egg-info
