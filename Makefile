# `make` lists the targets. Every target that needs Python packages sets up .venv first and reuses it while the pins in
# containers/requirements-cpu.txt stay the same.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := containers/requirements-cpu.txt
READY := $(VENV)/.ready

VIDEOS ?=
OUT ?= demo
LOGDIR ?= runs
PORT ?= 6006
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint shard tensorboard clean

help:  ## list the targets
	@echo "vmjepa: VideoMamba encoders pretrained with V-JEPA"
	@echo
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(READY)  ## set up .venv with the pinned packages

$(READY): $(PINS) containers/setup-venv.sh pyproject.toml
	@PYTHON="$(PYTHON)" sh containers/setup-venv.sh $(VENV) $(PINS)

demo: $(READY)  ## shard, pretrain and probe on this machine's CPU [VIDEOS=folder] [OUT=demo]
	@$(BIN)/python -m tools.demo --out "$(OUT)" $(if $(VIDEOS),--videos "$(VIDEOS)")

test: $(READY)  ## run all tests [ARGS='-k name']
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

shard: $(READY)  ## pack videos: make shard INPUT=videos.csv OUTPUT=shards [ARGS='--shard-size 256MB']
	@test -n "$(INPUT)" -a -n "$(OUTPUT)" || { echo "usage: make shard INPUT=csv-or-folder OUTPUT=folder" >&2; exit 2; }
	@$(BIN)/python -m tools.shard run "$(INPUT)" "$(OUTPUT)" $(ARGS)

tensorboard: $(READY)  ## show training curves [LOGDIR=runs] [PORT=6006]
	@test -d "$(LOGDIR)" || { echo "$(LOGDIR): no such folder; set LOGDIR to a run directory or a folder of them" >&2; exit 2; }
	@$(BIN)/tensorboard --logdir "$(LOGDIR)" --port "$(PORT)"

clean:  ## remove .venv, the demo's output and caches (runs/ stays)
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
