# On a bare machine `make demo` and `make test` are all that anyone needs; each makes its environment first.
# PYTHON=python3.12 picks the interpreter of a new .venv (3.11 to 3.13).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# PyTorch is for the tests only and must be the CPU build: from a folder of wheels where one is set, else from PyTorch's index.
WHEELS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
TORCH := $(if $(WHEELS),--find-links $(WHEELS),--torch-backend cpu)
# Compiled once here, not by every process where Python is told to keep no bytecode.
UV := $(RUN) -m uv pip install --quiet --compile-bytecode --python $(RUN)

.PHONY: help gpu tpu demo test test-slow lint format tiny tiny-metaquery tiny-edit-reward plan-check clean

help:
	@echo "make gpu        .venv for NVIDIA GPUs         make tpu        .venv for TPUs (docs/quickstart.md)"
	@echo "make demo       reinforce the shipped tiny model: editing, then text-to-image (5 to 15 minutes on 2 idle cores)"
	@echo "make test       the default test suite        make test-slow  the long tests"
	@echo "make lint       style, imports and types      make tiny       retrain the shipped tiny models (2 to 3 hours)"
	@echo "make plan-check compile every full-size program for GPUs and TPUs (hours on 2 cores; cached)"
	@echo "make tiny-edit-reward                         retrain the shipped tiny EditReward (two hours)"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + ": choose one with PYTHON=python3.12.")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(UV) -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(UV) $(TORCH) -r requirements-dev.txt
	@touch $@

# What an accelerator needs is in one file, which `pip install ".[cuda]"` and ".[tpu]" read too.
gpu: $(VENV)/.gpu
tpu: $(VENV)/.tpu

$(VENV)/.gpu: requirements-cuda.txt $(VENV)/.run
	$(UV) -r requirements-cuda.txt
	@touch $@

$(VENV)/.tpu: requirements-tpu.txt $(VENV)/.run
	$(UV) -r requirements-tpu.txt
	@touch $@

demo: $(VENV)/.run
	$(RUN) -m launch.train --config=configs/pdtr.py:tiny --workdir=runs/demo
	@echo; sed '/^## Evaluations/,$$d' runs/demo/report.md; echo "Everything is in runs/demo: report.md, curves.png, samples/, export/."

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(RUN) -m pytest -m slow

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(RUN) -m mypy

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Each step continues where it was interrupted; the gates fail loudly, and only then the checkpoints are replaced.
# The vision-language model is rounded to what ships before anything reads it, so that it stays as it is, bit for bit.
TRAIN := $(RUN) -m launch.train --cpu_devices=2
EVALUATE := $(RUN) -m launch.evaluate --gates
ASSETS := unipic2_jax/assets

tiny: $(VENV)/.run
	$(TRAIN) --config=configs/tiny_vae.py --workdir=runs/tiny_vae
	$(EVALUATE) --suite=shapes --reconstruct --model=runs/tiny_vae/export
	$(TRAIN) --config=configs/tiny.py --config.init=runs/tiny_vae/export --workdir=runs/tiny
	$(EVALUATE) --suite=shapes --model=runs/tiny/export --out=runs/tiny/evaluation
	$(RUN) -m launch.export --model=runs/tiny/export --out=$(ASSETS)/tiny --dtype=float16
	$(MAKE) tiny-metaquery

tiny-metaquery: $(VENV)/.run
	$(TRAIN) --config=configs/tiny_vlm.py --workdir=runs/tiny_vlm
	$(RUN) -m launch.export --model=runs/tiny_vlm/export --out=runs/tiny_vlm/half --dtype=float16
	$(EVALUATE) --suite=shapes-vqa --model=runs/tiny_vlm/half
	$(TRAIN) --config=configs/tiny_metaquery.py --workdir=runs/tiny_metaquery
	$(RUN) -m launch.evaluate --suite=shapes --model=$(ASSETS)/tiny --out=runs/tiny_metaquery/baseline
	$(EVALUATE) --suite=shapes --model=runs/tiny_metaquery/export --out=runs/tiny_metaquery/evaluation \
	  --baseline=runs/tiny_metaquery/baseline/scores.json
	$(RUN) -m launch.export --model=runs/tiny_metaquery/export --out=$(ASSETS)/tiny_metaquery --dtype=float16
	cmp runs/tiny_vlm/half/vlm/model.safetensors $(ASSETS)/tiny_metaquery/vlm/model.safetensors

# Edits by the shipped model with few steps, a part of them for another instruction or not edited at all, so that the verifier's
# scores vary; then more of what is learned last; then edits by models that were reinforced with what this gives, by the group's
# std and so without care, which find what it does not see. All hold out the same source pictures. Training fails below its
# gate, and then nothing is replaced.
SCORED := --steps=1,2,3,6 --guidance=1 --mismatched=0.3 --unedited=0.08 --batch=64 --at_once=32
HARD := ["background", "move", "arrange", "add", "background", "move", "remove", "replace", "background", "move", "arrange", "recolor"]
TURNS := ["add", "arrange", "replace", "recolor", "arrange", "replace", "move", "remove", "background"]
ON_POLICY = --steps=6 --guidance=1 --unedited=0.02 --samples=3 --prompts=1500 --heldout=0.1 --batch=64 --at_once=32 \
  --source='{"kind": "shapes", "task": "edit", "tags": $(TURNS)}'

tiny-edit-reward: $(VENV)/.run
	$(RUN) -m launch.score_edits $(SCORED) --prompts=10240 --heldout=0.1 --out=runs/edit_reward
	$(RUN) -m launch.score_edits $(SCORED) --prompts=8192 --heldout=0.1 --out=runs/edit_reward_hard --seed=1 \
	  --source='{"kind": "shapes", "task": "edit", "tags": $(HARD)}'
	$(TRAIN) --config=configs/edit_reward.py:tiny --workdir=runs/tiny_edit_reward_first
	for seed in 0 1 2; do \
	  $(TRAIN) --config=configs/pdtr.py:tiny,edit=editreward,t2i=none --workdir=runs/edit_reward_model$$seed --config.seed=$$seed \
	    --config.stages.edit.rewards.editreward.model=runs/tiny_edit_reward_first/export --config.stages.edit.grpo.global_std=False && \
	  $(RUN) -m launch.score_edits $(ON_POLICY) --out=runs/edit_reward_policy$$seed --seed=$$((11 + seed)) \
	    --model=runs/edit_reward_model$$seed/export || exit 1; \
	done
	$(RUN) -m launch.score_edits $(ON_POLICY) --out=runs/edit_reward_policy --seed=14
	$(TRAIN) --config=configs/edit_reward.py:tiny,again --workdir=runs/tiny_edit_reward
	$(RUN) -m launch.export --model=runs/tiny_edit_reward/export --out=$(ASSETS)/tiny_edit_reward --dtype=float16

$(VENV)/.compilers: requirements-cuda.txt requirements-tpu.txt $(VENV)/.run
	$(UV) -r requirements-cuda.txt -r requirements-tpu.txt
	@touch $@

# No GPU or TPU is needed. It goes on where it was interrupted, and makes the tables of docs/scaling.md.
plan-check: $(VENV)/.compilers
	$(RUN) -m launch.plan_check

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
