# make run: the comparison on mini8; make sweep: a short ablation and its report; make test; make check: linters, types
# and tests, whole files in parallel, slow ones first; make guard: mini8 rows against stored numbers, an hour. The first
# call makes .venv.
PY ?= python3
UV := $(shell command -v uv 2>/dev/null)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run sweep test check lint guard setup
run: setup
	.venv/bin/duet experiment=mini8

sweep: setup
	.venv/bin/duet experiment=mini8_bytes
	.venv/bin/python -m launchers.report --output outputs/report.html --open

test: setup
	.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

check: lint test

guard: setup
	.venv/bin/python tests/guard.py --commands | PATH=$(CURDIR)/.venv/bin:$$PATH sh
	.venv/bin/python tests/guard.py

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
