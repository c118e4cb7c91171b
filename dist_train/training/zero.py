"""How DeepSpeed is set up: the ZeRO stage of a run, the sizes of its buffers, and all of its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_train.config import Config, accumulation_steps
from dist_train.distributed.group import Group
from dist_train.training.optim import state_names

LARGEST_BUCKET = 25_000_000
"""Elements: 100 MB in float32.  What it costs in speed was never measured on a GPU."""

PARTITIONED_FROM = 2**30
"""Bytes of optimizer state from which ``zero_stage: auto`` is ZeRO 1, with more than one process."""


def chosen_stage(config: Config, model: nn.Module, world_size: int) -> int:
    """The ZeRO stage of a run; ``auto`` partitions the optimizer's state where the memory saved is worth the time.

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


def deepspeed_settings(config: Config, model: nn.Module, stage: int, group: Group) -> dict[str, Any]:
    """DeepSpeed's configuration of a run, by the names of its own documentation."""
    train = config.train
    steps = accumulation_steps(train, group.ranks.world_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bucket = bucket_elements(parameters)
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": steps,
        # The other stages clip with the norm that is read from the device anyway.
        "gradient_clipping": config.optim.max_grad_norm or 0.0 if stage == 3 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Copying every gradient into one buffer saves nothing at stage 1, and took 6 ms beside a step of 260 ms.
            "contiguous_gradients": stage > 1,
            # At stages 1 and 2 DeepSpeed's overlap stops the host until the device is idle, for every bucket and every
            # backward pass: the host then queues nothing ahead, and DALI's decoding is waited for as well.
            "overlap_comm": stage == 3 and group.device.type == "cuda",
            "stage3_prefetch_bucket_size": bucket,
            # DeepSpeed's defaults (1e9 and 1e5 elements) would keep most of a network of this size whole on every rank.
            "stage3_max_live_parameters": max(bucket, parameters // 4),
            "stage3_max_reuse_distance": max(bucket, parameters // 4),
            "stage3_param_persistence_threshold": parameters // 1000,
        },
        # The timers would wait for the device at the beginning and at the end of every step.
        "timers": {"throughput": {"enabled": False}},
        "torch_autocast": {
            "enabled": train.precision != "fp32",
            "dtype": "float16" if train.precision == "fp16" else "bfloat16",
            # Gradients are reduced in float32 at every stage; what the stages end at differs by rounding alone.
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**12,  # never: the trainer logs
    }


def wait_once_per_update(optimizer: Any, max_grad_norm: float | None, scale_of_loss: Callable[[], float]) -> None:
    """Have ZeRO 1 and 2 wait for the device once per update, for the gradient's norm, instead of three times.

    Args:
        optimizer: DeepSpeed's optimizer of stage 1 or 2.
        max_grad_norm: largest norm, to which gradients are clipped (None: no clipping).
        scale_of_loss: function that returns the factor by which the loss is multiplied at that time.
    """
    device_norm = optimizer.scaled_global_norm

    def unscale_and_clip(gradients: list[torch.Tensor], norm: float) -> None:
        scale = scale_of_loss()
        if max_grad_norm is not None:
            # The norm is that of the scaled gradient; 1e-6 as in DeepSpeed and torch.
            scale *= max(1.0, (norm / scale + 1e-6) / max_grad_norm)
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1 / scale)

    # DeepSpeed also skips on a non-finite norm (the weights are float32), so its separate scan is redundant.
    optimizer.check_grad_overflow = False
    optimizer.scaled_global_norm = lambda: float(device_norm())
    optimizer.unscale_and_clip_grads = unscale_and_clip
