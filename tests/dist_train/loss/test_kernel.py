"""The Triton kernel without a GPU: run in the interpreter, compiled for two architectures; with one, run on it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.common import LIMIT

triton = pytest.importorskip("triton")
CASES = Path(__file__).with_name("kernel_cases.py")


def test_in_the_interpreter():
    """In a process of its own, because Triton looks at the variable when it is imported."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout[-8000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 60


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles a kernel, see :func:`sass.compile_kernel`."""
    pytest.importorskip("triton")
    from tests.dist_train.loss.sass import compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return functools.partial(compile_kernel, tmp_path / "kernel.cubin")


@pytest.mark.parametrize(
    ("exits", "classes", "dtype"),
    [(5, 1000, "bf16"), (7, 1000, "bf16"), (11, 100, "fp32"), (5, 21_841, "bf16"), (3, 10, "fp16")],
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiled_without_spilled_registers(compiled, architecture, exits, classes, dtype):
    kernel = compiled(exits, classes, dtype, architecture=architecture)
    assert kernel.stack == 0, f"{kernel.registers} registers and {kernel.stack} bytes of stack"


@pytest.mark.parametrize(
    ("exits", "rule", "smoothing", "targets"),
    [
        (11, "later", 0.0, "labels"),
        (5, "ensemble", 0.0, "labels"),
        (16, "last", 0.0, "labels"),
        (32, "later", 0.0, "labels"),
        (5, "last", 0.1, "mix"),
        (11, "last", 0.1, "labels"),
        (11, "matrix", 0.1, "mix"),
    ],
)
def test_other_rules_and_targets_without_spilled_registers(compiled, exits, rule, smoothing, targets):
    kernel = compiled(exits, 1000, "bf16", rule, smoothing, targets)
    assert kernel.stack == 0, f"{kernel.registers} registers and {kernel.stack} bytes of stack"


# What tests/benchmarks/RESULTS.md says of sm_90.
@pytest.mark.parametrize(("exits", "instructions"), [(5, 3567), (11, 8193)])
def test_instructions_of_a_sample(compiled, exits, instructions):
    kernel = compiled(exits, 1000, "bf16", "last")
    assert kernel.name == "single_pass_kernel"
    assert 0.8 * instructions < kernel.per_sample.total() < 1.1 * instructions
    assert kernel.stack == 0
    # A GPU fetches a few tens of kilobytes quickly; with the loop over 11 exits unrolled (112 KB) an H100 took twice as long.
    assert kernel.code < 40_000
    # Rows of 1000 in bf16: four times 16 bytes in each of 32 threads; beside them the label, its logits and three weights of an exit.
    assert kernel.per_sample["LDG.E.128"] == kernel.per_sample["STG.E.128"] == 4 * exits
    narrow = {
        name: n for name, n in kernel.per_sample.items() if name.startswith(("LDG", "STG")) and ".128" not in name
    }
    assert sum(narrow.values()) <= 4 * exits + 4, narrow
    # One exponential per logit and temperature, and the label's.
    assert kernel.per_sample["MUFU.EX2"] <= exits * 2 * (32 + 1) + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_the_gpu():
    from dist_train.config import LossConfig
    from dist_train.loss.objective import ExitDistillation

    torch.manual_seed(0)
    criterion = ExitDistillation.from_config(LossConfig(teachers="later", temperature=2.0), 5)
    results = {}
    logits = [3 * torch.randn(64, 1000) for _ in range(5)]
    labels = torch.randint(1000, (64,))
    for device in ("cpu", "cuda"):
        z = [layer.to(device).requires_grad_() for layer in logits]
        out = criterion.to(device)(z, labels.to(device), labeled=64.0)
        results[device] = [t.cpu() for t in (out.loss.detach(), out.stats.vector, *torch.autograd.grad(out.loss, z))]
    for ours, right in zip(results["cuda"], results["cpu"]):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
