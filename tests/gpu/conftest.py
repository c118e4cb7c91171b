"""The first tests on a machine with a GPU: `make test-gpu`.  Elsewhere they are skipped; `make rehearse-gpu` runs them on a CPU."""

import os
import platform

import pytest
import torch

WANTED = os.environ.get("DIST_TRAIN_TEST_GPU", "")
"""1: on GPUs; rehearsal: what can be run without one, so that the tests themselves are known to work."""

ROWS: list[tuple[str, str]] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker("gpu")
            if not (WANTED == "rehearsal" or (WANTED == "1" and torch.cuda.is_available())):
                item.add_marker(pytest.mark.skip(reason="make test-gpu, on a machine with a GPU"))


@pytest.fixture
def device():
    return torch.device("cpu") if WANTED == "rehearsal" else torch.device("cuda", 0)


@pytest.fixture
def gpus():
    """Processes to start: one per GPU, at most two."""
    return 2 if WANTED == "rehearsal" else min(2, torch.cuda.device_count())


@pytest.fixture
def note():
    """`note(what, value)` adds a row to the table at the end."""
    return lambda what, value: ROWS.append((what, value))


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    machine = platform.machine() + ", no GPU: a rehearsal"
    if WANTED == "1":
        machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    terminalreporter.write_line(
        f"\nFor tests/benchmarks/RESULTS.md ({machine}, torch {torch.__version__}, `make test-gpu`):\n"
    )
    for what, value in [("what", "result"), ("---", "---"), *ROWS]:
        terminalreporter.write_line(f"| {what} | {value} |")
