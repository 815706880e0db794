# make demo   train a real 135M chat model on the example rows, on any machine
# make test   the whole test suite
# make check  format, lint, types, tests: what a change must pass

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: demo test check

demo: $(VENV)/.demo
	@$(BIN)/python examples/fetch_demo_model.py
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file accelerate_config.yaml launch/train.py --cfg demo

test: $(VENV)/.test
	@$(BIN)/python examples/fetch_demo_model.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(BIN)/python examples/fetch_demo_model.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# One environment, one marker file for each set of extras that is in it; made anew when a requirement changes.
$(VENV)/.%: setup.cfg pyproject.toml constraints.txt
	@if [ -n "$(FRESH)" ]; then rm -rf $(VENV); fi
	@echo "environment: installing lora_core[$*] into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@
