"""The Triton kernel without a GPU: run in the interpreter, compiled for two architectures; with one, run on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
CASES = Path(__file__).with_name("kernel_cases.py")


def test_in_the_interpreter():
    """In a process of its own, because Triton looks at the variable when it is imported."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-8000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 30


def resources(compiled, path):
    """Registers, and bytes of stack, of a compiled kernel."""
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack


def compile_for(architecture, kernel, types, constants, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {name: None for name, kind in types.items() if kind is None}
    types = {name: kind or "constexpr" for name, kind in types.items()} | dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize(
    ("exits", "classes", "dtype"),
    [(5, 1000, "bf16"), (7, 1000, "bf16"), (11, 100, "fp32"), (5, 21_841, "bf16"), (3, 10, "fp16")],
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiled_without_spilled_registers(tmp_path, monkeypatch, architecture, exits, classes, dtype):
    from dist_train.kernels.gpu import exit_loss_kernel, launch_settings

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    warps, settings = launch_settings(exits, classes)
    options = {name: settings.pop(name) for name in ("maxnreg", "enable_fp_fusion") if name in settings}
    floats = ["row_sums", "reader", "label_weights", "temperature", "rates", "labeled", "partials", "teachers"]
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("second", "share", "weights"))
    types |= {
        "logits": (f"*{dtype}",) * exits,
        "grads": f"*{dtype}",
        "targets": "*i64",
        "stride": "i32",
        "samples": "i32",
        "headroom": "i32",
    }
    constants = {"M": exits, "K": classes, "SOFT": False, "SMOOTHING": 0.0} | settings
    compiled = compile_for(architecture, exit_loss_kernel, types, constants, num_warps=warps, **options)
    registers, stack = resources(compiled, tmp_path / "kernel.cubin")
    assert stack == 0, f"{registers} registers and {stack} bytes of stack"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_the_gpu():
    from dist_train.config import LossConfig
    from dist_train.loss import ExitDistillation

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
