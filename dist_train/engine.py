"""The only file that knows DeepSpeed: ZeRO, mixed precision and accumulation around a multi-exit network."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from dist_train.config import Config, accumulation
from dist_train.dist import Group, launcher_variables
from dist_train.errors import ConfigError
from dist_train.models.parts import exit_parts, is_in
from dist_train.optim import AveragedWeights, build_optimizer, state_names

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Update:
    """What became of one update: whether it was applied, and the norm of the global gradient before clipping."""

    applied: bool
    gradient_norm: float


class Engine:
    """Forward, backward and update of one network on all ranks, and its whole state by name.

    Weights, optimizer state and averaged weights come out (and go in) as full float32 tensors by parameter name, so
    that nothing outside of this class depends on the ZeRO stage or on the number of ranks.
    """

    def __init__(self, model: nn.Module, config: Config, group: Group) -> None:
        self.config = config
        self.group = group
        self.stage = config.train.zero
        model = model.to(group.device)
        if config.train.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        # Parts that may train alone: decided here once, so that what ZeRO shares out is the same in every epoch.
        self._exits = exit_parts(model) if config.model.regime != "joint" else ()
        optimizer = build_optimizer(model, config.optim, self._exits)
        self._deepspeed = _initialize(model, optimizer, config, group)
        self.model = model
        self._names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._frozen = False
        self._materialize_optimizer_state()
        if config.train.compile:
            self._deepspeed.compile()
        self.averages: AveragedWeights | None = None
        if config.optim.ema is not None:
            with self._whole_parameters():
                self.averages = AveragedWeights(model.state_dict(), config.optim.ema)

    def train_mode(self, epoch: int) -> None:
        """Training mode for an epoch: all of the network, or by ``model.regime`` its exits alone.

        A backbone that is frozen gets no gradient, no weight decay and no momentum, and its batch norms and dropouts are
        in evaluation mode.
        """
        self.model.train()
        if not self._exits:
            return
        regime, heads_epochs = self.config.model.regime, self.config.model.heads_epochs
        self._frozen = regime == "heads_only" or epoch < heads_epochs
        for name, module in self.model.named_modules():
            if name and not is_in(name, self._exits):
                module.training = not self._frozen
        for name, parameter in self._names.items():
            if not is_in(name, self._exits):
                parameter.requires_grad_(not self._frozen)
        for optimizer in (self._deepspeed.optimizer, self._deepspeed.basic_optimizer):
            for parameters in optimizer.param_groups:
                if "backbone_decay" in parameters:
                    parameters["weight_decay"] = 0.0 if self._frozen else parameters["backbone_decay"]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of all exits, M tensors [N, K] in the autocast dtype, for images [N, 3, H, W]."""
        # The weights stay contiguous (ZeRO cannot flatten others); convolutions follow the format of the images.
        format = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        return tuple(self._deepspeed(images.contiguous(memory_format=format)))

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro batch, averaged over passes and ranks; once per forward."""
        self._deepspeed.backward(loss)

    def update(self, learning_rate: float | None) -> Update | None:
        """End a micro batch; with a learning rate it was the last of its global batch, and the update is made.

        An update with a gradient that is not finite is refused: neither weights nor optimizer state change.
        """
        if learning_rate is None:
            self._deepspeed.step()
            return None
        for optimizer in (self._deepspeed.optimizer, self._deepspeed.basic_optimizer):
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate
        if self.stage == 0:
            update = self._plain_update()
        else:
            self._deepspeed.step()
            norm = self._deepspeed.get_global_grad_norm()
            applied = bool(self._deepspeed.was_step_applied())
            update = Update(applied, float(norm) if applied and norm is not None else float("nan"))
        if update.applied and self.averages is not None:
            with self._whole_parameters():
                self.averages.update(self.model.state_dict())
        return update

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of training, for forward passes outside of it."""
        return autocast(self.config.train.precision, self.group.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole weights and buffers by name; running statistics are averaged over the ranks. All ranks must call."""
        with self._whole_parameters():
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self._average_buffers(weights)
        return weights

    def averaged_weights(self) -> dict[str, torch.Tensor] | None:
        """The moving average of :meth:`weights`, where one is kept. All ranks must call."""
        if self.averages is None:
            return None
        weights = {name: tensor.detach().clone() for name, tensor in self.averages.tensors.items()}
        self._average_buffers(weights)
        return weights | {n: b.detach().clone() for n, b in self.model.named_buffers() if n not in weights}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Whole tensors ``KEY/PARAMETER`` of the optimizer, on the CPU on rank 0, empty elsewhere. All ranks must call."""
        state = {}
        for key in state_names(self.config.optim):
            for name, parameter in self._names.items():
                tensor = self._get_state(parameter, key)
                if self.group.ranks.rank == 0:
                    state[f"{key}/{name}"] = tensor.detach().float().cpu().clone()
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        """Take over what :meth:`optimizer_state` gave after ``updates`` updates, at any stage and number of ranks."""
        for key in state_names(self.config.optim):
            for name, parameter in self._names.items():
                self._set_state(parameter, key, state[f"{key}/{name}"].to(self.group.device))
        for entry in self._deepspeed.basic_optimizer.state.values():
            if "step" in entry:
                entry["step"].fill_(float(updates))

    def rank_state(self) -> dict[str, torch.Tensor]:
        """What differs between the ranks: running statistics, of the network and of its averages."""
        state = {f"model/{name}": buffer.detach().cpu().clone() for name, buffer in self.model.named_buffers()}
        if self.averages is not None:
            for name, _ in self.model.named_buffers():
                if name in self.averages.tensors:
                    state[f"averages/{name}"] = self.averages.tensors[name].cpu().clone()
        return state

    def load_rank_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`rank_state` gave on this rank."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state[f"model/{name}"])
            if self.averages is not None and name in self.averages.tensors:
                self.averages.tensors[name].copy_(state[f"averages/{name}"])

    def load_averages(self, weights: dict[str, torch.Tensor], updates: int) -> None:
        """Take over averaged weights and the number of updates behind them."""
        assert self.averages is not None
        for name, tensor in self.averages.tensors.items():
            tensor.copy_(weights[name])
        self.averages.updates = updates

    def _plain_update(self) -> Update:
        if self._frozen:
            # As at the other stages: a parameter without a gradient counts the update, and nothing else.
            for parameter in self._names.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        # Without ZeRO, DeepSpeed would write a gradient that is not finite into the weights.
        gradients = [p.grad for p in self._names.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        value = float(norm)
        applied = value - value == 0
        if not applied:
            for parameter in self._names.values():
                parameter.grad = None  # an optimizer passes over parameters without a gradient
        elif self.config.optim.clip is not None:
            nn.utils.clip_grads_with_norm_(list(self._names.values()), self.config.optim.clip, norm)
        self._deepspeed.step()
        return Update(applied, value)

    def _average_buffers(self, weights: dict[str, torch.Tensor]) -> None:
        names = [n for n, _ in self.model.named_buffers() if n in weights and weights[n].is_floating_point()]
        if not names or self.group.ranks.world_size == 1:
            return
        flat = torch.cat([weights[name].flatten() for name in names])
        self.group.sum(flat).div_(self.group.ranks.world_size)
        for name, mean in zip(names, torch.split(flat, [weights[name].numel() for name in names])):
            weights[name].copy_(mean.view_as(weights[name]))

    @contextlib.contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            yield

    def _flat_parameters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer really steps: parameters, or this rank's flat shares of them."""
        optimizer = self._deepspeed.optimizer
        if self.stage == 0:
            return [p for parameters in optimizer.param_groups for p in parameters["params"]]
        return list(
            optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        )

    def _materialize_optimizer_state(self) -> None:
        # torch makes the state in the first update; made here, it can be read and written at any time.  DeepSpeed
        # links state to parameters once, after the first group's update, and so misses that of later groups.
        state = self._deepspeed.basic_optimizer.state
        names = state_names(self.config.optim)
        for parameter in self._flat_parameters():
            for key in names:
                state[parameter][key] = torch.zeros_like(parameter, requires_grad=False)
            if self.config.optim.name == "adamw":
                state[parameter]["step"] = torch.zeros((), device=parameter.device)
        if self.stage in (1, 2) and names:
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _get_state(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        if self.stage == 0:
            return cast(torch.Tensor, self._deepspeed.basic_optimizer.state[parameter][key])
        from deepspeed.utils import safe_get_full_optimizer_state

        trains = parameter.requires_grad
        parameter.requires_grad_()  # at stage 3 DeepSpeed has no state of a parameter that is frozen for now
        try:
            return cast(torch.Tensor, safe_get_full_optimizer_state(parameter, key))
        finally:
            parameter.requires_grad_(trains)

    def _set_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if self.stage == 0:
            self._deepspeed.basic_optimizer.state[parameter][key].copy_(value)
            return
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # The full setter cuts past the end of a parameter that does not divide by the ranks: the last share is padded.
        size = safe_get_local_optimizer_state(parameter, key).numel()
        padded = value.new_zeros(size * self.group.ranks.world_size)
        padded[: value.numel()] = value.flatten()
        start = size * self.group.ranks.rank
        safe_set_local_optimizer_state(parameter, padded[start : start + size], key)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast of a configured precision; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


def check_device(config: Config, device: torch.device) -> None:
    """Raise ConfigError for a precision, ZeRO stage or option that the device cannot do."""
    train = config.train
    if train.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision is fp16, which needs a GPU; use bf16 or fp32 on a CPU")
    if train.precision == "fp16" and train.zero not in (1, 2):
        raise ConfigError(
            f"train.precision fp16 works with train.zero 1 or 2, not {train.zero}; use bf16 or another stage"
        )
    if (
        train.precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError("train.precision is bf16, which this GPU does not have; use fp16 or fp32")
    if train.sync_bn and device.type == "cpu":
        raise ConfigError("train.sync_bn is true, which needs a GPU; set it to false")


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, group: Group) -> Any:
    train = config.train
    passes = accumulation(train, group.ranks.world_size)
    # The default buckets (5e8 elements) would take gigabytes beside networks of a few million parameters; DeepSpeed wants
    # a multiple of its alignment.
    size = -(-sum(parameter.numel() for parameter in model.parameters()) // 1024) * 1024
    bucket = min(size, 500_000_000)
    settings = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": passes,
        # Stage 0 clips in _plain_update, where the norm is known already.
        "gradient_clipping": config.optim.clip or 0.0 if train.zero else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": train.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Copying every gradient into one buffer saves nothing at stage 1, and costs 4 % of a step of 200 ms.
            "contiguous_gradients": train.zero > 1,
            "overlap_comm": group.device.type == "cuda",
        },
        "torch_autocast": {
            "enabled": train.precision != "fp32",
            "dtype": "float16" if train.precision == "fp16" else "bfloat16",
            # Gradients are reduced in float32: then stages 0, 1 and 2 give the same weights bit for bit.
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**12,
    }
    if group.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        # On a CPU DeepSpeed would compile a shared-memory reduction at start: half a minute, and a compiler needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with launcher_variables(group.ranks):
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
