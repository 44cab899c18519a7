# Every target sets up what it needs by itself: Python 3.11+ and make are enough.
# Variables override, for example: make train EPOCHS=3 NUM_WORKERS=4 RUN_ID=mine

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL: # targets named together depend on each other's results

PYTHON ?= python3
STORAGE ?= $(or $(FASHION_STORAGE),results)
NUM_WORKERS ?= 2
SPLIT ?= test
OUT ?= results/report.html
REFIT ?= yes
ARGS ?=
LANES ?= 3

UV_VERSION := 0.13.9
RUN := .venv/bin/python -m
# Runs under make start a cluster of their own here; submitted jobs join the one of `make up`.
export RAY_ADDRESS ?= local

# A storage is a URI or a path; a submitted job runs in another folder, so it is given the path in full.
storage := $(if $(findstring ://,$(STORAGE)),$(STORAGE),$(abspath $(STORAGE)))
# So is a source that is a folder.
in_full = $(or $(realpath $(1)),$(1))
flag = $(if $($(1)),--$(2) $($(1)))
scale_flags = --num-workers $(NUM_WORKERS) $(call flag,CPUS_PER_WORKER,cpus-per-worker) $(call flag,USE_GPU,use-gpu)
source_flag = $(if $(SOURCE),--source $(call in_full,$(SOURCE)))
submit_source = $(or $(source_flag),$(if $(FASHION_MNIST_SOURCE),--source $(call in_full,$(FASHION_MNIST_SOURCE))))
train_flags = --storage $(storage) $(scale_flags) $(call flag,RUN_ID,run-id) $(call flag,PRESET,preset) \
	$(call flag,EPOCHS,epochs) $(call flag,LR,lr) $(call flag,DROPOUT_CONV,dropout-conv) \
	$(call flag,DROPOUT_FC,dropout-fc) $(call flag,GLOBAL_BATCH_SIZE,global-batch-size) $(call flag,SEED,seed) \
	$(call flag,MAX_TRAIN_ROWS,max-train-rows) $(call flag,PRECISION,precision) $(call flag,PADDING,padding) $(call flag,MLFLOW,mlflow) $(ARGS)

tune_flags = --storage $(storage) $(call flag,SEARCH_ID,search-id) $(call flag,PRESET,preset) \
	$(call flag,NUM_SAMPLES,num-samples) $(call flag,MAX_EPOCHS,max-epochs) $(call flag,GRACE_EPOCHS,grace-epochs) \
	$(call flag,REDUCTION_FACTOR,reduction-factor) $(call flag,WORKERS_PER_TRIAL,workers-per-trial) \
	$(call flag,GPUS_PER_TRIAL,gpus-per-trial) $(call flag,CPUS_PER_WORKER,cpus-per-worker) \
	$(call flag,MAX_TRAIN_ROWS,max-train-rows) $(call flag,TIME_BUDGET_S,time-budget-s) $(call flag,SEED,seed) \
	$(call flag,MLFLOW,mlflow) $(if $(filter yes,$(REFIT)),--refit) $(ARGS)

.PHONY: help setup quickstart prepare train tune study evaluate report bench bench-gpu test test-quick check fmt up submit-train submit-tune down clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## Make the virtual environment from the lock file

# Compiled here, once: where Python is told to write no bytecode, each of Ray's processes would compile torch and Ray anew.
.venv/.installed: uv.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.14; name one, as in: make setup PYTHON=python3.12" >&2; exit 2; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@uv=$$(command -v uv) || { .venv/bin/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION) && \
		uv=.venv/bin/uv; }; $$uv sync --frozen --inexact --compile-bytecode --python .venv/bin/python
	@touch $@

quickstart: setup ## Data, one epoch with two workers, evaluation, the page: some minutes
	@told=$$($(RUN) jobs.prepare --storage $(storage) $(source_flag) --or-synthetic) || exit; echo "$$told"; \
	source=$(SOURCE); case "$$told" in *": fashion-mnist-synthetic, "*) source=synthetic;; esac; \
	$(MAKE) --no-print-directory train evaluate report EPOCHS=1 SPLIT=val \
		RUN_ID=$(or $(RUN_ID),quickstart-$(shell date -u +%Y%m%d-%H%M%S)) SOURCE=$$source

prepare: setup ## Fetch, verify, split and write the data, once: SOURCE, VAL_ROWS, SEED of the split
	@$(RUN) jobs.prepare --storage $(storage) $(source_flag) $(call flag,VAL_ROWS,val-rows) $(call flag,SEED,seed) $(ARGS)

train: setup ## Train PRESET with NUM_WORKERS on real data, and evaluate on test
	@$(RUN) jobs.train $(train_flags) $(source_flag)

tune: setup ## Search lr and dropout with ASHA, then (REFIT=yes) train the winner on all rows
	@$(RUN) jobs.tune $(tune_flags) $(source_flag)

study: setup ## Compare cures against overfitting: PARTS, SEEDS, EPOCHS, MAX_TRAIN_ROWS; goes on where it was cut off
	@$(RUN) jobs.study --storage $(storage) $(scale_flags) $(call flag,STUDY_ID,study-id) $(call flag,PARTS,parts) \
		$(call flag,SEEDS,seeds) $(call flag,EPOCHS,epochs) $(call flag,MAX_TRAIN_ROWS,max-train-rows) $(source_flag) $(ARGS)

evaluate: setup ## Evaluate RUN_ID on SPLIT; EXPORT=folder writes the network for use elsewhere
	@test -n "$(RUN_ID)" || { echo "error: no RUN_ID is given; name the run, as in: make evaluate RUN_ID=mine" >&2; exit 2; }
	@$(RUN) jobs.evaluate --storage $(storage) --run-id $(RUN_ID) --split $(SPLIT) $(scale_flags) $(if $(EXPORT),--export $(abspath $(EXPORT))) $(ARGS)

report: setup ## One page of everything measured, for the browser: OUT
	@mkdir -p $(dir $(OUT))
	@$(RUN) jobs.report --storage $(storage) --out $(OUT) $(ARGS)

bench-gpu: setup ## On a machine with a GPU: its tests, then steps, job and time to accuracy side by side
	@.venv/bin/python -m pytest -m gpu
	@$(RUN) jobs.bench --storage $(storage) --num-workers 1 --use-gpu yes --rows a,b,k $(ARGS)

bench: setup ## Measure the job side by side with its alternatives
	@$(RUN) jobs.bench --storage $(storage) $(scale_flags) $(ARGS)

# Another processor, for `make test PROCESSOR=...`: its instructions, and what precision auto resolves to there.
avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
as_avx2 := $(avx2) FASHION_AUTO_PRECISION=fp32
as_emulated-bf16 := $(avx2) FASHION_AUTO_PRECISION=bf16
pytest := $(if $(PROCESSOR),env $(or $(as_$(PROCESSOR)),$(error PROCESSOR=$(PROCESSOR) must be avx2 or emulated-bf16))) \
	.venv/bin/python -m pytest

# Bytecode is written, whatever the environment says: several hundred processes would compile this project anew.
test test-quick: export PYTHONDONTWRITEBYTECODE :=

# Then lanes side by side, which wait for Ray more than they compute; at last, alone, what measures time or memory.
test: setup ## Run all tests: first the quick ones; PROCESSOR=avx2 or emulated-bf16 as another processor would
	@$(pytest) -n auto --dist worksteal -m quick
	@OMP_NUM_THREADS=1 $(pytest) -n $(LANES) --dist loadscope --no-loadscope-reorder -m "not quick and not quiet"
	@$(pytest) -m quiet

test-quick: setup ## Run what can be run after each edit: under a minute
	@$(pytest) -n auto --dist worksteal -m quick

check: setup ## Lint, format check, types; writes nothing
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

fmt: setup ## Format and mend what the linter can
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

up: setup ## Start a head node here: token authentication on, dashboard on 127.0.0.1
	@$(RUN) fashion.cluster.head up

submit-train: setup ## Submit `jobs.train` to the head node of `make up`, follow it, exit with its status
	@$(RUN) fashion.cluster.head submit jobs.train $(train_flags) $(submit_source)

submit-tune: setup ## Submit `jobs.tune` to it likewise
	@$(RUN) fashion.cluster.head submit jobs.tune $(tune_flags) $(submit_source)

down: setup ## Stop what `make up` started, and nothing else
	@$(RUN) fashion.cluster.head down

clean: ## Delete what the project made here, results apart
	@if [ -d .ray ] && [ -x .venv/bin/python ]; then $(RUN) fashion.cluster.head down; fi
	rm -rf .venv .moto .ray .mypy_cache .pytest_cache .ruff_cache 
	find fashion jobs tests -name __pycache__ -prune -exec rm -rf {} +
