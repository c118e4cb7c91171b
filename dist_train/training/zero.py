"""How DeepSpeed is set up: the ZeRO stage of a run, the sizes of its buffers, and all of its settings."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dist_train.config import Config, accumulation_steps, largest_zero_stage
from dist_train.distributed.group import Group, launcher_variables
from dist_train.training.optim import state_names

LARGEST_BUCKET = 25_000_000
"""Elements: 100 MB in float32.  What it costs in speed was never measured on a GPU."""

PARTITIONED_FROM = 2**30
"""Bytes of optimizer state from which ``zero_stage: auto`` is ZeRO 1, with more than one process."""


def chosen_stage(config: Config, model: nn.Module, world_size: int) -> int:
    """The ZeRO stage of a run; ``auto`` partitions the optimizer's state where the memory saved is worth the time.

    ZeRO 1 costs host time in every step for bookkeeping, which small networks cannot hide.
    """
    if config.train.zero_stage != "auto":
        return config.train.zero_stage
    state = 4 * sum(parameter.numel() for parameter in model.parameters()) * len(state_names(config.optim))
    return 1 if state >= PARTITIONED_FROM and world_size > 1 and largest_zero_stage(config) else 0


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


def initialize_deepspeed(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, stage: int, group: Group
) -> Any:
    """DeepSpeed's engine around a network and its optimizer, without what it would do by itself and nobody needs."""
    settings = deepspeed_settings(config, model, stage, group)
    if group.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What DeepSpeed calls there at every step of stage 3 has other names by now: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _without_mlflow():
            import deepspeed

        # DeepSpeed's destructor imports it.  Before Python 3.12, an import that collects an engine and with it begins another
        # import can end with a KeyError, so a second network in one process would fail at times.
        with contextlib.suppress(ImportError):
            import deepspeed.utils.pin_memory
        deepspeed.utils.logger.setLevel(logging.ERROR)
        # DeepSpeed would try out at start, with compilers, which of its own operators this machine can build; none is used here.
        # On a CPU it would then build one, a shared-memory reduction, which takes half a minute.
        deepspeed.ops.__compatible_ops__ = {}
        if stage:
            _import_muon()
        with launcher_variables(group.ranks):
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    # DeepSpeed would use torch's GradScaler for fp16, but never unscales at ZeRO 1 and 2; LossScale replaces it.
    engine.torch_autocast_z0_gradscaler = None
    if stage:
        engine.optimizer.torch_autocast_gradscaler = None
    return engine


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """DeepSpeed's autotuner, used by nobody here, imports MLflow where it is there: two fifths of what a start imports."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, which ZeRO does for whatever optimizer it is given, without torch's compiler.

    Its functions are compiled where they are defined, and the compiler takes every process two seconds to import.
    """
    from deepspeed.runtime import compiler

    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiled


def reduce_in_few_calls(engine: Any, parameters: Sequence[nn.Parameter], group: Group) -> None:
    """Have stage 0 average its gradients, and forget them, without a search of the modules and a copy for each parameter.

    Args:
        engine: DeepSpeed's, at stage 0.
        parameters: all that may train.
        group: the ranks; one alone has nothing to average.
    """

    def average(*_: Any, **__: Any) -> None:
        gradients = []
        for parameter in parameters:
            if parameter.requires_grad:
                # The ranks reduce the same sizes, and the optimizer decays a weight whose gradient is zero.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        if group.ranks.world_size == 1:
            return
        for bucket in in_buckets(gradients, LARGEST_BUCKET):
            flat = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]
            group.sum(flat).mul_(1 / group.ranks.world_size)
            torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))  # type: ignore[no-untyped-call]
            del flat  # before the next one is made

    def forget() -> None:
        for parameter in parameters:
            parameter.grad = None

    engine.buffered_allreduce_fallback, engine.zero_grad = average, forget


def in_buckets(tensors: Sequence[torch.Tensor], elements: int) -> list[list[torch.Tensor]]:
    """Tensors in their order, in lists of at most so many elements, or of one larger tensor."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size + tensor.numel() > elements:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets


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


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Parameters that stage 3 partitions, whole on every rank. All ranks must enter."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def whole_state(parameter: nn.Parameter, key: str) -> torch.Tensor:
    """The optimizer's state of a parameter at stages 1 to 3, whole. All ranks must call."""
    from deepspeed.utils import safe_get_full_optimizer_state

    trains = parameter.requires_grad
    # At stage 3 DeepSpeed gives no state of a frozen parameter.
    parameter.requires_grad_()
    try:
        state: torch.Tensor = safe_get_full_optimizer_state(parameter, key)
        return state
    finally:
        parameter.requires_grad_(trains)


def set_state(
    parameter: nn.Parameter,
    key: str,
    value: torch.Tensor,
    own_partition: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> None:
    """Set the optimizer's state of a parameter at stages 1 to 3 to the whole tensor ``value``.

    Args:
        own_partition: at stage 3 the function that gives this rank's partition of a whole tensor, of the size of another one.
    """
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if own_partition is None:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's full setter fails for a parameter whose size the ranks do not divide: the last partition is padded.
    partition = own_partition(value, safe_get_local_optimizer_state(parameter, key))
    safe_set_local_optimizer_state(parameter, partition, key)


def keep_batch_norms_from_cudnn(model: nn.Module) -> None:
    """Have batch norms computed by PyTorch's own kernels, not by cuDNN, in the forward passes from now on and their backward passes.

    ZeRO puts all parameters of a rank side by side into one buffer, so most begin at a multiple of 4 bytes only; cuDNN's batch
    norm, which PyTorch takes in float32 and fp16, reads 16 bytes at a time and ends the process with a misaligned address.
    """
    enabled: list[bool] = []

    def before(*_: Any) -> None:
        enabled.append(torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False

    def after(*_: Any) -> None:
        torch.backends.cudnn.enabled = enabled.pop()

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)
