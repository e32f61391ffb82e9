# Every target sets up what it needs first. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# make venv SGLANG=0.5.21 builds, and make quick SGLANG=0.5.21 uses, an environment of its own.
SGLANG ?= 0.5.23
VENV ?= .venv$(if $(filter-out 0.5.23,$(SGLANG)),-sglang-$(SGLANG))
RUN := $(VENV)/bin/python
# make READY=1 RUN=/path/to/python ... uses an interpreter that has everything already (a machine without an index).
STAMP := $(if $(READY),,$(VENV)/.installed)
PIP := $(RUN) -m pip install -qq --disable-pip-version-check --no-warn-conflicts
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest
ARGS ?=

TORCH := torch==2.13.0
TORCHVISION := torchvision==0.28.0
SGLANG_PINS := requirements-sglang-$(SGLANG).txt

.PHONY: help venv demo ascend-demo quick test check hooks-doc metrics-doc models-doc format soak gpu-test gpu-test-nvlink clean distclean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## Build the virtual environment with SGLang in it (about two minutes, once).

# SGLang and torchvision come without their dependencies: those are CUDA-only; requirements-sglang-*.txt list the rest.
$(VENV)/.installed: requirements-sglang-cpu.txt $(SGLANG_PINS) requirements-dev.txt pyproject.toml Makefile scripts/bootstrap.sh
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh
	@test -x $(RUN) || { echo "make venv: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "make venv: installing $(TORCH), sglang==$(SGLANG) and what they need (once, some minutes)"
	@$(PIP) $(TORCH) -r requirements-sglang-cpu.txt -r $(SGLANG_PINS) -r requirements-dev.txt
	@$(PIP) --no-deps sglang==$(SGLANG) $(TORCHVISION)
	@$(PIP) --no-deps -e .
	@touch $@

demo: $(STAMP) ## Serve a small MoE and change its EP size while streams decode.
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.demo $(ARGS)

ascend-demo: $(STAMP) ## The demo on simulated NPUs: SGLang's NPU path on a machine without one (builds a venv, once).
	@OMP_NUM_THREADS=1 $(RUN) -m tests.helpers.npusim -m benchmarks.demo --device npu --out demo-out/npu $(ARGS)

quick: $(STAMP) ## Run the tests that start no process: under 60 seconds.
	@$(PYTEST) tests/unit -m "pure and not soak and not gpu" --at-most 60 $(ARGS)

test: $(STAMP) ## Run the tests that CI runs: about 40 minutes on two cores (ARGS="-k name" selects).
	@$(if $(CI),ELASTICMOE_REQUIRE=all) $(PYTEST) -m "not soak and not gpu" $(ARGS)

# All of them run, so that one failure does not hide the next.
check: $(STAMP) ## Check linters, types, import directions, declared uses of SGLang, generated pages.
	@failed=(); \
	try() { "$$@" || failed+=("$${*##*/bin/}"); }; \
	try $(VENV)/bin/ruff check --quiet .; \
	try $(VENV)/bin/ruff format --check --quiet .; \
	try $(VENV)/bin/mypy; \
	try $(VENV)/bin/mypy -p benchmarks.demo; \
	try env OMP_NUM_THREADS=1 $(RUN) -m pytest -q --no-header tests/unit/test_import_directions.py tests/unit/test_project.py \
		tests/unit/test_declared_uses.py; \
	try $(RUN) -m elasticmoe_patches.hookdocs --check docs/hooks.md; \
	try $(RUN) -m elasticmoe_patches.featuredocs --check docs/operations.md; \
	try $(RUN) -m elasticmoe_sglang.metrics.docs --check docs/metrics.md; \
	try $(RUN) -m elasticmoe_sglang.models.docs --check docs/models.md; \
	if [ "$${#failed[@]}" -gt 0 ]; then printf 'check: failed: %s\n' "$${failed[@]}" >&2; exit 1; fi

hooks-doc: $(STAMP) ## Write docs/hooks.md and the tables in docs/operations.md from their declarations.
	@$(RUN) -m elasticmoe_patches.hookdocs docs/hooks.md
	@$(RUN) -m elasticmoe_patches.featuredocs docs/operations.md

metrics-doc: $(STAMP) ## Write docs/metrics.md from the table of metrics.
	@$(RUN) -m elasticmoe_sglang.metrics.docs docs/metrics.md

models-doc: $(STAMP) ## Write docs/models.md from the architectures.
	@$(RUN) -m elasticmoe_sglang.models.docs docs/models.md

format: $(STAMP) ## Format the code and sort its imports.
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@$(VENV)/bin/ruff format .

soak: $(STAMP) ## Run the rest: long tests, and more servers with other flags.
	@$(PYTEST) -m soak $(ARGS)

gpu-test: ## Run the tests on an NVIDIA GPU; skipped with the reason where there is none.
	@scripts/with_gpus.sh 1 "$@" $(MAKE) --no-print-directory gpu-test-run

gpu-test-nvlink: ## Run the tests across two GPUs; skipped with the reason where there are fewer.
	@scripts/with_gpus.sh 2 "$@" $(MAKE) --no-print-directory gpu-test-nvlink-run

.PHONY: gpu-test-run gpu-test-nvlink-run
gpu-test-run: $(STAMP)
	@$(PYTEST) -m "gpu and not nvlink" $(ARGS)

gpu-test-nvlink-run: $(STAMP)
	@$(PYTEST) -m nvlink $(ARGS)

clean: ## Remove caches and outputs.
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo-out
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environments as well.
	@rm -rf $(VENV) .venv-* .dev *.egg-info
