# Two commands: `make demo` and `make test` (`make test-quick` leaves out the slow tests, `make test-all` adds those that take minutes each).  Both first make .venv and install the project, where that has not happened.

PYTHON ?= python3
# A pip requirement, for instance TORCH="torch==2.13.0" TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
# Where torch comes from.  PyPI's torch for Linux carries CUDA (some gigabytes) and is right on a machine with NVIDIA GPUs;
# without one, PyTorch's own index has a build of a tenth of the size.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

# Two processes on a CPU; with GPUs one for each of them.
DEMO_PROCESSES := $(if $(shell command -v nvidia-smi),,-n 2)

VENV := .venv
BIN := $(VENV)/bin

# The newest torch that the project takes, with what the usual environment cannot have beside its torch.
NEWEST := .venv-newest
NEWEST_TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo test test-all test-quick test-newest test-gpu rehearse-gpu lint install install-newest clean

demo: $(VENV)/installed
	@test -e data/digits/train/index.json || $(BIN)/python -m shards make digits data/digits
	@$(BIN)/python -m launch.local $(DEMO_PROCESSES) configs/quickstart.yaml

# Two at a time: most tests wait for processes to start, and some for SLURM.  JOBS=0 runs them one after the other.
JOBS ?= 2
# Groups of tests, in the order of tests/conftest.py.
GROUPS := -n $(JOBS) --dist loadgroup --no-loadscope-reorder

test: $(VENV)/installed
	$(BIN)/python -m pytest $(GROUPS) -m "not extended"

test-all: $(VENV)/installed
	$(BIN)/python -m pytest $(GROUPS)

test-quick: $(VENV)/installed
	$(BIN)/python -m pytest $(GROUPS) -m "not slow and not slurm"

# What depends on torch most, with the newest torch, torchvision and timm: networks of these libraries, loss, training.  Its compiler
# has a cache of its own: programs that another build of torch compiled end the process.
test-newest: $(NEWEST)/installed
	TORCHINDUCTOR_CACHE_DIR=$(abspath $(NEWEST))/inductor $(NEWEST)/bin/python -m pytest $(GROUPS) \
	    -m "not slow and not slurm and not extended" \
	    tests/dist_train/models tests/dist_train/loss tests/dist_train/training tests/dist_train/test_init.py
	$(NEWEST)/bin/python -m pytest -n $(JOBS) tests/dist_train/models/test_libraries.py

# The first command on a machine with a GPU; prints a table for tests/benchmarks/RESULTS.md.
test-gpu: $(VENV)/installed
	DIST_TRAIN_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu

# The same tests on a CPU, as far as it can play the GPU.
rehearse-gpu: $(VENV)/installed
	DIST_TRAIN_TEST_GPU=rehearsal $(BIN)/python -m pytest tests/gpu

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

# torch first: what depends on it would otherwise bring PyPI's build.
$(VENV)/installed: pyproject.toml
	@echo "installing into $(VENV), once: 1 of 3, pip"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip "setuptools>=77" wheel
	@echo "2 of 3, $(TORCH): some 200 MB without CUDA, some gigabytes with it"
	@test -z "$(TORCH_INDEX)" \
	    || $(BIN)/python -m pip install -qq --retries 0 --index-url "$(TORCH_INDEX)" "$(TORCH)" 2>/dev/null \
	    || echo "$(TORCH_INDEX) cannot be used: torch comes from the index that pip is set to"
	@$(BIN)/python -m pip install -qq "$(TORCH)"
	@echo "3 of 3, dist-train, DeepSpeed, DALI, MLflow and what they need: some minutes"
	@$(BIN)/python -m pip install -qq --editable ".[test]"
	@touch $@

install-newest: $(NEWEST)/installed

$(NEWEST)/installed: pyproject.toml
	@echo "installing into $(NEWEST), once: $(NEWEST_TORCH), some gigabytes"
	@$(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -qq $(NEWEST_TORCH) --editable ".[test,timm,torchvision]"
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) build *.egg-info
