"""Which ZeRO stage a run has, and how large the buffers are in which it reduces and gathers."""

from __future__ import annotations

from torch import nn

from dist_train.config import Config
from dist_train.training.optim import state_names

LARGEST_BUCKET = 25_000_000
"""Elements: 100 MB in float32, enough for full speed on every network."""

PARTITIONED_FROM = 2**30
"""Bytes of optimizer state from which ``zero_stage: auto`` is ZeRO 1."""


def chosen_stage(config: Config, model: nn.Module, world_size: int) -> int:
    """The ZeRO stage of a run; ``auto`` partitions the optimizer's state where that saves memory worth its time.

    ZeRO 1 costs host time in every step for bookkeeping, which small networks cannot hide.  PCGrad needs stage 0.
    """
    if config.train.zero_stage != "auto":
        return config.train.zero_stage
    if config.optim.exit_gradients == "pcgrad":
        return 0
    state = 4 * sum(parameter.numel() for parameter in model.parameters()) * len(state_names(config.optim))
    return 1 if state >= PARTITIONED_FROM and world_size > 1 else 0


def bucket_elements(parameters: int) -> int:
    """Elements of the buffers in which gradients are reduced and weights gathered: a multiple of DeepSpeed's alignment."""
    # DeepSpeed's default (5e8) would take gigabytes beside networks of a few million parameters.
    return min(-(-parameters // 1024) * 1024, LARGEST_BUCKET)
