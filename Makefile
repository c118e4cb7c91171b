# Two commands: `make demo` and `make test`.  Both first make .venv and install the project, where that has not happened.

PYTHON ?= python3
# A pip requirement, for instance TORCH="torch==2.13.0" TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
# Where torch comes from.  PyPI's torch for Linux carries CUDA (some gigabytes) and is right on a machine with NVIDIA GPUs;
# without one, PyTorch's own index has a build of a tenth of the size.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

demo: $(VENV)/installed
	@test -e data/digits/train/index.json || $(BIN)/python -m shards make digits data/digits
	@$(BIN)/python -m launch.local -n 2 configs/quickstart.yaml

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

# torch first: what depends on it would otherwise bring PyPI's build.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip "setuptools>=77" wheel
	@test -z "$(TORCH_INDEX)" \
	    || $(BIN)/python -m pip install -qq --retries 0 --index-url "$(TORCH_INDEX)" "$(TORCH)" 2>/dev/null \
	    || echo "$(TORCH_INDEX) cannot be used: torch comes from the index that pip is set to"
	$(BIN)/python -m pip install -qq "$(TORCH)"
	$(BIN)/python -m pip install -qq --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
