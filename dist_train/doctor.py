"""What is installed, and what this machine can do with it."""

from __future__ import annotations

import os
import shutil

import torch

from dist_train.environment import installed_versions

REQUIRED = ("torch", "deepspeed", "nvidia-dali-cuda130", "webdataset", "mlflow", "submitit")


def examine() -> tuple[list[str], bool]:
    """Lines that describe this machine, and whether a run can start on it."""
    versions = installed_versions()
    lines = [f"{name:<20} {version}" for name, version in versions.items()]
    problems = [f"{name} is not installed: pip install -e ." for name in REQUIRED if versions[name] == "missing"]
    cores, count = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    lines.append(f"{'cores':<20} {cores}")
    lines.append(f"{'memory':<20} {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        bf16 = (
            "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: use train.precision fp16"
        )
        lines.append(f"{f'GPU {number}':<20} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}")
    if count == 0:
        lines.append(f"{'GPU':<20} none{_why_no_gpu()}; training runs on the CPU")
    if count > 1:
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        lines.append(f"{'NCCL':<20} {'.'.join(map(str, nccl))}")
    lines.append(f"{'SLURM':<20} {shutil.which('sbatch') or 'no sbatch; use launch.local or launch.nodes'}")
    lines += [f"PROBLEM: {problem}" for problem in problems] or ["A run can start here."]
    return lines, not problems


def _why_no_gpu() -> str:
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return " seen, because torch is a CPU build: see the README on choosing the CUDA build"
    return ""
