"""``dist-train doctor``: what is installed, and what this machine can do with it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import comm

from dist_train.arguments import Parser
from dist_train.config import DataConfig, LossConfig
from dist_train.data.augment import parameters
from dist_train.data.decode import Decoder
from dist_train.distributed.group import Group, Ranks
from dist_train.errors import FAILED
from dist_train.loss import ExitDistillation
from dist_train.tracking.environment import installed_versions

REQUIRED = ("torch", "deepspeed", "nvidia-dali-cuda130", "webdataset", "mlflow", "submitit")


def run(arguments: list[str]) -> int:
    """Print what this machine can do; 1 where no run can start on it."""
    Parser("dist-train doctor", description="Show what is installed and what this machine can do.").parse_args(
        arguments
    )
    lines, healthy = examine()
    print("\n".join(lines))
    return 0 if healthy else FAILED


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
    if count == 0:
        lines.append(f"{'not tried':<20} {', '.join(TRIALS)}: they need a GPU")
    else:
        worked, failed = try_all(torch.device("cuda", 0))
        lines += worked
        problems += failed
    lines.append(f"{'SLURM':<20} {shutil.which('sbatch') or 'no sbatch; use launch.local or launch.nodes'}")
    lines += [f"PROBLEM: {problem}" for problem in problems] or ["A run can start here."]
    return lines, not problems


def _why_no_gpu() -> str:
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return " seen, because torch is a CPU build: see the README on choosing the CUDA build"
    return ""


def try_all(device: torch.device) -> tuple[list[str], list[str]]:
    """Lines about what works on a GPU, and one about each thing that does not."""
    worked, failed = [], []
    for name, trial in TRIALS.items():
        try:
            worked.append(f"{name:<20} {trial(device)}")
        except Exception as error:  # any: whatever it is, the rest is worth knowing as well
            failed.append(f"{name} does not work: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return worked, failed


def try_driver(device: torch.device) -> str:
    """A number that has been on the GPU, and the driver's version."""
    torch.ones(1, device=device).add_(1).item()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    return f"works, CUDA {torch.version.cuda}, driver {(said.splitlines() or ['of unknown version'])[0].strip()}"


def try_compiler(device: torch.device) -> str:
    """A function compiled by torch.compile, which needs a C compiler."""
    numbers = torch.linspace(0, 1, 1000, device=device)
    torch.testing.assert_close(torch.compile(lambda x: (x.sin() + 1).sum())(numbers), (numbers.sin() + 1).sum())
    return "works"


def try_kernel(device: torch.device) -> str:
    """Loss and gradient of the objective on the device and on the CPU."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(64, 1000, generator=generator) for _ in range(5)]
    labels = torch.randint(1000, (64,), generator=generator)
    results = []
    for place in (device, torch.device("cpu")):
        # New leaves, also where the place is the CPU.
        leaves = [z.to(place, copy=True).requires_grad_() for z in logits]
        loss, _ = ExitDistillation.from_config(LossConfig(), 5).to(place)(leaves, labels.to(place))
        loss.backward()
        results.append([loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    return "works, equals the CPU's"


def try_decoder(device: torch.device) -> str:
    """A JPEG decoded on the device and on the CPU."""
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2)).save(file, "JPEG", quality=95)
    data = DataConfig(shards="none", image_size=64)
    columns = parameters(data, False, 0, 0, np.zeros(1, dtype=np.int64), np.array([[64, 64]]))
    images = []
    for place in (device, torch.device("cpu")):
        decoder = Decoder(data, tuple(columns), 1, place, threads=1, depth=1)
        (image,) = decoder.run([{"raw": [np.frombuffer(file.getvalue(), dtype=np.uint8)], **columns}])
        if isinstance(image, RuntimeError):
            raise image
        images.append(image.cpu())
    # In standard deviations of a colour: decoders round differently.
    difference = float((images[0] - images[1]).abs().mean())
    if difference > 0.05:
        raise ValueError(f"its pixels differ from the CPU's by {difference:.3f} standard deviations on average")
    return f"works, its pixels differ from the CPU's by {difference:.4f} standard deviations on average"


def try_reduction(device: torch.device) -> str:
    """A sum over a process group of this process, and over all GPUs that it sees."""
    Group(Ranks(0, 1, 0, 1), timeout_minutes=1)
    total = torch.ones(1000, device=device)
    dist.all_reduce(total)
    assert float(total.sum()) == 1000
    if device.type == "cpu":
        return f"works, {dist.get_backend()}"
    gpus = torch.cuda.device_count()
    # The group above is of this process alone, so the way from GPU to GPU is tried apart from it.
    if gpus > 1:
        total = comm.reduce_add([torch.ones(1000, device=f"cuda:{n}") for n in range(gpus)])  # type: ignore[no-untyped-call]
        assert float(total.sum()) == 1000 * gpus
    return f"works over {gpus} GPUs, version {'.'.join(map(str, torch.cuda.nccl.version()))}"  # type: ignore[no-untyped-call]


TRIALS: dict[str, Callable[[torch.device], str]] = {
    "driver": try_driver,
    "compiler": try_compiler,
    "loss kernel": try_kernel,
    "GPU decoder": try_decoder,
    "NCCL": try_reduction,
}
"""What a run on a GPU needs, each tried for real."""
