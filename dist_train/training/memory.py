"""The memory of a run: how much it will need, how much it has used, and what to do when there is not enough."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from dist_train.config import Config, largest_zero_stage
from dist_train.distributed.group import Group
from dist_train.errors import DeviceError
from dist_train.models.parts import exits_behind
from dist_train.training.optim import state_names
from dist_train.training.zero import bucket_elements


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at a ZeRO stage, at most."""

    weights: int
    """With running statistics and averaged weights."""
    evaluator: int
    """The plain copy of the network that is evaluated."""
    gradients: int
    optimizer: int
    buffers: int
    """In which gradients are reduced and, at stage 3, weights gathered."""
    activations: int
    teachers: int = 0
    """Weights of ``loss.outside_teachers``."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


def estimate(
    model: nn.Module, config: Config, stage: int, world_size: int, activations: int, teachers: int = 0
) -> Memory:
    """What a process of so many will need; counted allocations of DeepSpeed agree within 10 % (``test_memory.py``)."""
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    network, bucket = sum(sizes), 4 * bucket_elements(sum(sizes) // 4)
    statistics = sum(buffer.nbytes for buffer in model.buffers())
    states, part = len(state_names(config.optim)), network // world_size
    share = [part if stage >= needed else network for needed in (3, 2, 1)]
    # Stage 0 flattens a bucket of gradients where there are ranks to sum with, or PCGrad keeps each exit's; 1 flattens a bucket;
    # 2 has two buckets, and then the flat gradient of its own part; 3 has a bucket for gradients, what it has gathered and what
    # it gathers ahead, at least one layer.
    live = max(bucket, network // 4)
    first = max([bucket, *sizes]) if world_size > 1 else 0
    if config.optim.exit_gradients == "pcgrad":
        first = _gradients_by_exit(model, config)
    buffers = (first, bucket, max(part, 2 * bucket - bucket // world_size), bucket + 2 * live + max(sizes, default=0))
    averages = network if config.optim.ema_decay is not None else 0
    return Memory(
        weights=share[0] + statistics + (averages // world_size if stage == 3 else averages),
        evaluator=network + statistics,
        gradients=share[1],
        # ZeRO keeps a second float32 copy of this rank's part of the weights beside the optimizer's state.
        optimizer=(states + (stage > 0)) * share[2],
        buffers=buffers[stage],
        activations=activations,
        teachers=teachers,
    )


def _gradients_by_exit(model: nn.Module, config: Config) -> int:
    """Bytes of one gradient per exit, of what the exit depends on."""
    exits = exits_behind(model, config.data.image_size)
    return sum(4 * parameter.numel() * len(exits[name]) for name, parameter in model.named_parameters())


# What torch, cuDNN, cuBLAS and the CPU's allocator say; only the first of them has a type of its own.
_EXHAUSTED = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", re.IGNORECASE)


@contextlib.contextmanager
def explain_out_of_memory(config: Config, group: Group) -> Iterator[None]:
    """Turn an error that says that memory is exhausted into one line with the remedies that this run has.

    Raises:
        DeviceError: in its place; another try would end in the same way.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _EXHAUSTED.search(str(error)):
            raise
        raise DeviceError(
            f"out of memory at train.micro_batch {config.train.micro_batch}: {_remedies(config, group)}"
        ) from None


def _remedies(config: Config, group: Group) -> str:
    micro = config.train.micro_batch
    ways = (
        [f"set train.micro_batch to {micro // 2} (train.global_batch and the result stay as they are)"]
        if micro > 1
        else []
    )
    # A network that is recorded as CUDA graphs computes nothing again.
    if getattr(config.model, "activation_checkpointing", True) is False and config.train.cuda_graphs is not True:
        ways.append("set model.activation_checkpointing to true")
    # ZeRO takes away what several processes hold of the same.
    stage, largest = config.train.zero_stage, largest_zero_stage(config)
    if group.ranks.world_size > 1 and (0 if stage == "auto" else stage) < largest:
        ways.append(f"raise train.zero_stage, up to {largest}")
    if group.device.type == "cuda" and config.data.decoder != "cpu":
        ways.append("set data.decoder to cpu")
    ways = ways or ["train on a device with more memory"]
    return f"{', or '.join(ways)}; `dist-train plan` shows what takes how much"


def peak_memory(device: torch.device) -> float:
    """GiB at most in use so far: of the GPU by torch, or on the CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU that is visible here; None without one."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))
