"""The dtypes of mixed precision, and autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *AUTOCAST)


def emulation_warning(precision: str, device_type: str) -> str | None:
    """A line where a precision costs time here instead of saving it; None elsewhere.

    An x86 CPU without AVX-512 has no instructions for 16-bit floats: torch converts every operand back and forth.
    """
    if precision == "fp32" or device_type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return None
    return f"this CPU (AVX2) has to emulate {precision}, several times slower than fp32; set train.precision fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast of a configured precision; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])
