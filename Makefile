# make demo   train a real 135M chat model on the example rows, on any machine
# make test   the whole test suite
# make check  format, lint, types, tests: what a change must pass
# make properties   the property tests with other examples, drawn anew each time; the suite draws the same ones
# make families   hold every causal language model of transformers against plain PEFT, into docs/families.md
# make trackers   the trackers whose packages are large, each with its package
# make clusters   the job files under SLURM, Ray, SkyPilot and dstack; needs Debian's slurm-wlm
# make seven-billion   train Qwen2.5-7B's architecture in 4 bits on a CPU; takes 16 GB of disk, 10 of memory, and most of an hour
# make docs   the documentation as a site, in site/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CONSTRAINTS ?= --constraint constraints.txt
# PyTorch for CPUs is 0.2 GB; what PyPI has brings 2.7 GB of CUDA with it. Where there is no GPU, it is taken from here.
# TORCH_INDEX= (empty) takes PyPI's at once.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# pip compiles every module of every package, a minute of one core. An environment for one run of the tests has no need of
# it: Python compiles the modules that are imported, once.
INSTALL := $(PIP) install $(if $(FRESH),--no-compile)
# Two test files at a time, each on a thread of its own. JOBS=0 is one after the other.
JOBS ?= 2
TESTS := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)

.PHONY: demo test check properties families trackers clusters seven-billion docs

demo: $(VENV)/.demo
	$(BIN)/lora-core demo

test: $(VENV)/.test
	@$(BIN)/python examples/fetch_demo_model.py
	$(TESTS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright tests/typing
	@$(BIN)/python examples/fetch_demo_model.py
	$(TESTS)

properties: $(VENV)/.test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m hypothesis --hypothesis-profile search

families: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.families.table

# In an environment of its own: Trackio and SwanLab want older Pillow and protobuf than constraints.txt has.
trackers:
	@$(MAKE) --no-print-directory VENV=.venv-trackers CONSTRAINTS= .venv-trackers/.all-trackers
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-trackers/bin/python -m pytest tests/watch/every_tracker.py

# SkyPilot in an environment without lora_core: Hugging Face's hub wants a newer click.
clusters:
	@$(MAKE) --no-print-directory VENV=.venv-clusters .venv-clusters/.all-clusters
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-clusters/bin/python -m pytest tests/launch/every_engine.py
	@test -x .venv-skypilot/bin/python || $(PYTHON) -m venv .venv-skypilot
	.venv-skypilot/bin/python -m pip --disable-pip-version-check -qq install 'skypilot>=0.14' jsonschema pytest
	.venv-skypilot/bin/python -m pytest --noconftest tests/launch/skypilot_job.py

seven-billion: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.seven_billion outputs/seven-billion

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One environment, one marker file for each set of extras that is in it; made anew when a requirement changes.
$(VENV)/.%: setup.cfg pyproject.toml constraints.txt
	@if [ -n "$(FRESH)" ]; then rm -rf $(VENV); fi
	@echo "environment: installing lora_core[$*] into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null && ! $(BIN)/python -c "import torch" 2>/dev/null; then \
		echo "environment: PyTorch for CPUs, from $(TORCH_INDEX)"; \
		$(INSTALL) --no-deps --retries 1 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) \
			|| echo "environment: that index cannot be reached; taking PyPI's PyTorch, with CUDA"; \
	fi
	@$(INSTALL) $(CONSTRAINTS) --editable '.[$*]'
	@touch $@
