# make run: the comparison on mini8; make test; make check: linters, types and tests. The first call makes .venv.
PY ?= python3
UV := $(shell command -v uv 2>/dev/null)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run test check lint setup
run: setup
	.venv/bin/duet experiment=mini8

test: setup
	.venv/bin/python -m pytest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

check: lint test

setup: .venv/.ok

.venv/.ok: pyproject.toml
ifneq ($(UV),)
	uv venv -q --clear -p $(PY) .venv
	uv pip install -q -p .venv/bin/python -e . --group dev
else
	$(PY) -m venv --clear .venv
	.venv/bin/python -m pip install -q -U pip
	.venv/bin/python -m pip install -q -e . --group dev
endif
	touch $@
