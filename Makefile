# Every target sets up what it needs by itself: Python 3.11+ and make are enough.
# Variables override, for example: make train EPOCHS=3 NUM_WORKERS=4 RUN_ID=mine

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL: # targets named together depend on each other's results

PYTHON ?= python3
CSV ?=
NUM_WORKERS ?= 2
SPLIT ?= test
OUT ?= results/report.html
REFIT ?= yes
ARGS ?=
LANES ?= 3
LANE_TESTS ?= not quick and not quiet
# The oldest Ray of the range in pyproject.toml, two between, and the one of uv.lock.
RAYS ?= 2.55.1 2.57.1 2.59.0 2.60.0

UV_VERSION := 0.13.9
RUN := .venv/bin/python -m
# Runs under make start a cluster of their own here; submitted jobs join the one of `make up`.
export RAY_ADDRESS ?= local

# Values of the user's go to the shell in single quotes, whatever signs they hold; `value` takes a `$` as it was typed.
quoted = '$(subst ','\'',$(1))'
# A new line would end the command, so it is refused. The names of all variables that make must hand on whole:
PASSED := STORAGE FASHION_STORAGE SOURCE FASHION_MNIST_SOURCE OUT EXPORT CSV IMAGES PREDICTIONS MODEL COLUMN RUN_ID SEARCH_ID STUDY_ID MLFLOW
define newline


endef
$(foreach name,$(PASSED),$(if $(findstring $(newline),$(value $(name))),\
	$(error $(name) holds a line break, which make cannot hand on; name another)))

ifeq ($(value STORAGE),)
override STORAGE := $(if $(value FASHION_STORAGE),$(value FASHION_STORAGE),results)
endif

# Submitted jobs run in another folder, so paths are given in full. make's functions for paths split at blanks: these
# are another sign meanwhile.
empty :=
blank := $(empty) $(empty)
tab := $(empty)	$(empty)
encoded = $(subst $(tab),<<tab>>,$(subst $(blank),<<blank>>,$(1)))
decoded = $(subst <<tab>>,$(tab),$(subst <<blank>>,$(blank),$(1)))
path = $(call quoted,$(call decoded,$(abspath $(patsubst ~/%,$(call encoded,$(HOME))/%,$(call encoded,$(value $(1)))))))
# A storage may be a URI, and a source a word.
path_or = $(if $(or $(findstring ://,$(value $(1))),$(filter $(2),$(call encoded,$(value $(1))))),$(call quoted,$(value $(1))),$(call path,$(1)))
storage := $(call path_or,STORAGE)
flag = $(if $(value $(1)),--$(2) $(call quoted,$(value $(1))))
SOURCES := auto download synthetic
source_of = $(if $(value $(1)),--source $(call path_or,$(1),$(SOURCES)))
source_flag = $(call source_of,SOURCE)
submit_source = $(or $(source_flag),$(call source_of,FASHION_MNIST_SOURCE))
scale_flags = $(call flag,NUM_WORKERS,num-workers) $(call flag,CPUS_PER_WORKER,cpus-per-worker) $(call flag,USE_GPU,use-gpu)
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

.PHONY: help setup quickstart prepare train tune study evaluate predict report bench bench-gpu test test-quick test-faults test-rays check fmt up submit-train submit-tune down clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

find_uv = uv=$$(command -v uv) || { test -x .venv/bin/uv || \
	.venv/bin/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION); uv=.venv/bin/uv; }

setup: .venv/.installed ## Make the virtual environment from the lock file

# Compiled here, once: where Python is told to write no bytecode, each of Ray's processes would compile torch and Ray anew.
.venv/.installed: uv.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.14; name one, as in: make setup PYTHON=python3.12" >&2; exit 2; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(find_uv); $$uv sync --frozen --inexact --compile-bytecode --python .venv/bin/python
	@touch $@

quickstart: setup ## Data, one epoch with two workers, evaluation, the page: some minutes
	@told=$$($(RUN) jobs.prepare --storage $(storage) $(source_flag) --or-synthetic) || exit; echo "$$told"; \
	source=$(call quoted,$(value SOURCE)); case "$$told" in *": fashion-mnist-synthetic, "*) source=synthetic;; esac; \
	$(MAKE) --no-print-directory train evaluate report EPOCHS=1 SPLIT=val \
		RUN_ID=$(call quoted,$(or $(value RUN_ID),quickstart-$(shell date -u +%Y%m%d-%H%M%S))) SOURCE="$$source"

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
	@test -n $(call quoted,$(value RUN_ID)) || { echo "error: no RUN_ID is given; name the run, as in: make evaluate RUN_ID=mine" >&2; exit 2; }
	@$(RUN) jobs.evaluate --storage $(storage) $(call flag,RUN_ID,run-id) $(call flag,SPLIT,split) $(scale_flags) $(if $(value EXPORT),--export $(call path,EXPORT)) $(ARGS)

predict: setup ## Classes of your own IMAGES (file, folder, glob, URI) by RUN_ID or MODEL; PHOTO=yes for photographs
	@test -n $(call quoted,$(value IMAGES)) || { echo "error: no IMAGES are given; name them, as in: make predict RUN_ID=mine IMAGES=folder" >&2; exit 2; }
	@$(RUN) jobs.predict --storage $(storage) --images $(call path_or,IMAGES) --out $(if $(value PREDICTIONS),$(call path_or,PREDICTIONS),$(call quoted,$(CURDIR)/results/predictions)) $(call flag,RUN_ID,run-id) $(if $(value MODEL),--model $(call path,MODEL)) $(call flag,COLUMN,column) $(if $(filter yes,$(PHOTO)),--photo) $(scale_flags) $(ARGS)

report: setup ## One page of everything measured, for the browser: OUT; CSV=folder for tables; PREDICTIONS=folder for your images
	@mkdir -p "$$(dirname $(call path,OUT))"
	@$(RUN) jobs.report --storage $(storage) --out $(call path,OUT) $(if $(value CSV),--csv $(call path,CSV)) $(if $(value PREDICTIONS),--predictions $(call path_or,PREDICTIONS)) $(ARGS)

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
test test-quick test-faults: export PYTHONDONTWRITEBYTECODE :=

# Then lanes side by side, which wait for Ray more than they compute; at last, alone, what measures time or memory.
test: setup ## Run all tests: first the quick ones; PROCESSOR=avx2 or emulated-bf16 as another processor would
	@$(pytest) -n auto --dist worksteal -m quick
	@OMP_NUM_THREADS=1 $(pytest) -n $(LANES) --dist loadscope --no-loadscope-reorder -m '$(LANE_TESTS)'
	@FASHION_TESTS_FORK=no $(pytest) -m quiet

test-faults: setup ## Of these, run the ones that break runs, over several hosts, and on Ray's documented API alone
	@OMP_NUM_THREADS=1 $(pytest) -n $(LANES) --dist loadscope --no-loadscope-reorder -m "hosts or faults or engine"

test-quick: setup ## Run what can be run after each edit: under a minute
	@$(pytest) -n auto --dist worksteal -m quick

rays := $(RAYS:%=test-ray-%)
.PHONY: $(rays)
test-rays: $(rays) ## Run a job, broken and resumed, and searches under RAYS, on Ray's documented API alone

# Each process starts by itself: a forked one does not take its name under Ray 2.55, and tests look for workers by it.
$(rays): test-ray-%: .rays/%/.installed
	@FASHION_TESTS_FORK=no .rays/$*/bin/python -m pytest -n 0 -m engine tests/distributed/test_engine.py

# Another Ray, in an environment that has everything else from .venv.
.rays/%/.installed: .venv/.installed
	@$(find_uv); $$uv venv -q --clear --python .venv/bin/python .rays/$* && \
		.venv/bin/python -c 'import sys, sysconfig; line = "import site; site.addsitedir({!r})\n"; \
		open(sys.argv[1] + "/rest.pth", "w").write(line.format(sysconfig.get_path("purelib")))' \
		.rays/$*/lib/python*/site-packages && \
		$$uv pip install -q --no-deps --python .rays/$*/bin/python ray==$*
	@touch $@

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
	rm -rf .venv .rays .moto .ray .mypy_cache .pytest_cache .ruff_cache 
	find fashion jobs tests -name __pycache__ -prune -exec rm -rf {} +
