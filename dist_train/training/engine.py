"""The network under DeepSpeed: ZeRO, mixed precision and accumulation around a multi-exit network.

DeepSpeed itself, its settings and the patches of it are in :mod:`dist_train.training.zero`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from dist_train.config import Config
from dist_train.distributed.group import Group
from dist_train.models import MSDNet
from dist_train.models.parts import ALL, WITHOUT_EARLY_EXITS, exit_parts, exits_behind, part_of
from dist_train.precision import autocast
from dist_train.training.cuda_graph import NetworkGraphs, record, takes_cuda_graphs
from dist_train.training.exit_gradients import ProjectedGradients, balance_gradients
from dist_train.training.loss_scale import LossScale
from dist_train.training.optim import AveragedWeights, build_optimizer, state_names
from dist_train.training.running_statistics import RunningStatistics, average_buffers
from dist_train.training.zero import (
    chosen_stage,
    initialize_deepspeed,
    keep_batch_norms_from_cudnn,
    reduce_in_few_calls,
    set_state,
    wait_once_per_update,
    whole_parameters,
    whole_state,
)


@dataclass(frozen=True)
class Update:
    """The outcome of one update: whether it was applied, and the norm of the global gradient before clipping."""

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
        self.stage = chosen_stage(config, model, group.ranks.world_size)
        model = model.to(group.device)
        if config.train.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        # Which parts may train alone is decided once, so that ZeRO partitions the same parameters in every epoch.
        self._parts = exit_parts(model) if config.model.regime != "joint" else {}
        optimizer = build_optimizer(model, config.optim, self._parts)
        rule = config.optim.exit_gradients
        # The exits are found here, while the parameters are whole and the network is not compiled.
        exits = exits_behind(model, config.data.image_size) if rule in ("equilibrium", "pcgrad") else {}
        self._balances_coarsest = rule == "equilibrium_coarsest"
        self.loss_scale = LossScale() if config.train.precision == "fp16" else None
        self._deepspeed = initialize_deepspeed(model, optimizer, config, self.stage, group)
        if self.stage in (1, 2):
            wait_once_per_update(self._deepspeed.optimizer, config.optim.max_grad_norm, self._scale)
        if self.stage and group.device.type == "cuda" and not config.train.compile:
            keep_batch_norms_from_cudnn(model)
        if self.stage == 3:
            # DeepSpeed reads it in every forward pass.  Without RANK it does not make child processes think they are ranks.
            os.environ.setdefault("LOCAL_RANK", str(group.ranks.local_rank))
        self.model = model
        self._names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if self.stage == 0:
            reduce_in_few_calls(self._deepspeed, list(self._names.values()), group)
        self._partitioned: dict[str, Any] = {
            name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if hasattr(tensor, "ds_tensor")
        }
        """The weights that stage 3 partitions over the ranks."""
        self._statistics = RunningStatistics(model)
        self._trained = ALL
        if rule == "equilibrium":
            # While the network trains by its last exit alone there is no other gradient to balance it with.
            balance_gradients(self._names, exits, lambda: self._trained != WITHOUT_EARLY_EXITS)
        self.projected_gradients: ProjectedGradients | None = None
        if rule == "pcgrad":
            self.projected_gradients = ProjectedGradients(self._names, exits, config.seed, group)
        self._materialize_optimizer_state()
        if config.train.compile:
            self._deepspeed.compile()
        self._takes_graphs = takes_cuda_graphs(config, self.stage, group.device)
        self._graphs: NetworkGraphs | None = None
        self.averages: AveragedWeights | None = None
        if config.optim.ema_decay is not None:
            self.averages = AveragedWeights(self._averaged_tensors(), config.optim.ema_decay)

    def train_mode(self, trained: frozenset[str] = ALL) -> None:
        """Training mode for some parts of the network (:func:`dist_train.models.parts.trained_parts`).  All ranks must call.

        A part that is frozen gets no gradient, no weight decay and no momentum, and its batch norms and dropouts are in
        evaluation mode.
        """
        self.model.train()
        if self._balances_coarsest:
            # As below: while the last exit trains alone there is nothing to balance.
            cast(MSDNet, self.model).balance_coarsest = trained != WITHOUT_EARLY_EXITS
        if not self._parts:
            return
        for name, module in self.model.named_modules():
            if name:
                module.training = part_of(name, self._parts) in trained
        for name, parameter in self._names.items():
            part = part_of(name, self._parts)
            # The momentum that a part gathered while it trained would go on moving it.
            if part in self._trained - trained:
                for key in state_names(self.config.optim):
                    self._set_state(parameter, key, torch.zeros_like(self._get_state(parameter, key)))
            parameter.requires_grad_(part in trained)
        # AdamW's step count ran on while the part was frozen.  With a large count there is no bias correction, so the first
        # updates would be several times too large.
        self._set_updates(dict.fromkeys(trained - self._trained, 0))
        for optimizer in (self._deepspeed.optimizer, self._deepspeed.basic_optimizer):
            for group in optimizer.param_groups:
                group["weight_decay"] = group["decay"] if group["part"] in trained else 0.0
        self._trained = trained

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of all exits, M tensors [N, K] in the autocast dtype, for images [N, 3, H, W]."""
        self.group.phase("forward pass")
        # The weights stay contiguous (ZeRO cannot flatten others); convolutions follow the format of the images.
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        images = images.contiguous(memory_format=layout)
        # A graph holds for images of one shape.
        if self._takes_graphs and len(images) == self.config.train.micro_batch:
            if self._graphs is None:
                self._graphs = record(self.model, images, self.autocast, self.config.train.cuda_graphs)
                self._takes_graphs = self._graphs is not None
            if self._graphs is not None:
                return self._graphs(images)
        if self.projected_gradients is None:
            return tuple(self._deepspeed(images))
        # DeepSpeed refuses backward passes that it does not run itself.
        with self.autocast():
            return self.projected_gradients.detach(self.model(images))

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro batch, averaged over the ranks, to that of the others; once per forward."""
        self.group.phase("backward pass")
        if self.loss_scale is not None and self.stage == 0:
            loss = loss * self.loss_scale.value
        elif self.loss_scale is not None:
            # ZeRO scales the loss by this value, and norm and clipping by its inverse.
            self._deepspeed.optimizer.override_loss_scale(self.loss_scale.value)
        if self.projected_gradients is not None:
            self.projected_gradients.backward(loss)
            return
        # The loss is divided by the accumulation steps already.
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if self._graphs is not None and not self._deepspeed.is_gradient_accumulation_boundary():
            self._graphs.keep_gradients()

    def next_micro_batch(self) -> None:
        """Go on to another micro batch of the same global batch; after the last one :meth:`update` is called instead."""
        self.group.phase("update")
        # DeepSpeed counts micro batches itself, to know at which one it updates.
        self._deepspeed.step()

    def update(self, learning_rate: float, batch: int = 0) -> Update:
        """Update the weights with the gradient of a whole global batch.

        With a non-finite gradient the step is skipped: neither weights nor optimizer state nor running statistics change.
        ``batch`` is the number of the global batch, which decides the order in which gradients are projected
        (``optim.exit_gradients: pcgrad``).
        """
        self.group.phase("update")
        # ZeRO wraps the optimizer and keeps parameter groups of its own; which of the two is read depends on the stage.
        for optimizer in (self._deepspeed.optimizer, self._deepspeed.basic_optimizer):
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate
        if self.projected_gradients is not None:
            self.projected_gradients.finish(batch)
        if self.stage == 0:
            update = self._plain_update()
        else:
            self._deepspeed.step()
            norm = self._deepspeed.get_global_grad_norm()
            applied = bool(self._deepspeed.was_step_applied())
            update = Update(applied, float(norm) if applied and norm is not None else float("nan"))
        if self.loss_scale is not None:
            self.loss_scale.count(update.applied)
        if not update.applied:
            # The forward passes have moved them already, perhaps by what made the gradient not finite.
            self._statistics.take_back()
            return update
        self._statistics.keep()
        if self.averages is not None:
            self.averages.update()
        return update

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the precision of training, for forward passes outside of it."""
        return autocast(self.config.train.precision, self.group.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole weights and buffers by name; running statistics are averaged over the ranks. All ranks must call."""
        with self._whole_parameters():
            # Cloned within: at stage 3 the parameters are taken apart again at its end.
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        average_buffers(self.model, weights, self.group)
        return weights

    def averaged_weights(self) -> dict[str, torch.Tensor] | None:
        """The moving average of :meth:`weights`, where one is kept. All ranks must call."""
        if self.averages is None:
            return None
        weights = {name: self._whole_average(name).clone() for name in self.averages.tensors}
        average_buffers(self.model, weights, self.group)
        # Integer buffers have no average: they are the network's own.  Buffers that are not saved are in neither.
        saved = self.model.state_dict()
        return weights | {
            n: b.detach().clone() for n, b in self.model.named_buffers() if n in saved.keys() - weights.keys()
        }

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Whole tensors ``KEY/PARAMETER`` of the optimizer, on the CPU on rank 0, empty elsewhere. All ranks must call."""
        state = {}
        for key in state_names(self.config.optim):
            for name, parameter in self._names.items():
                # At stages 1 to 3 a collective, so every rank asks for it; rank 0 alone keeps the result.
                tensor = self._get_state(parameter, key)
                if self.group.ranks.rank == 0:
                    state[f"{key}/{name}"] = tensor.detach().float().cpu().clone()
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor], updates: Mapping[str, int]) -> None:
        """Load what :meth:`optimizer_state` returned, at any stage and number of ranks.

        Args:
            state: the tensors.
            updates: the updates of every part of the network since it began to train.
        """
        for key in state_names(self.config.optim):
            for name, parameter in self._names.items():
                # Momentum that was switched on after the checkpoint starts from 0.
                if f"{key}/{name}" in state:
                    self._set_state(parameter, key, state[f"{key}/{name}"].to(self.group.device))
        self._set_updates(updates)

    def rank_state(self) -> dict[str, torch.Tensor]:
        """What differs between the ranks: running statistics, of the network and of its averages."""
        state = {f"model/{name}": buffer.detach().cpu().clone() for name, buffer in self.model.named_buffers()}
        if self.averages is not None:
            for name, _ in self.model.named_buffers():
                if name in self.averages.tensors:
                    state[f"averages/{name}"] = self.averages.tensors[name].cpu().clone()
        return state

    def load_rank_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load what :meth:`rank_state` returned on this rank."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state[f"model/{name}"])
            if self.averages is not None and f"averages/{name}" in state:
                self.averages.tensors[name].copy_(state[f"averages/{name}"])
        # A skipped step is to go back to these, and not to the statistics that the network was built with.
        self._statistics.keep()

    def load_averages(self, weights: dict[str, torch.Tensor], updates: int) -> None:
        """Load averaged weights and the number of updates behind them."""
        assert self.averages is not None
        for name, tensor in self.averages.tensors.items():
            tensor.copy_(self._own_partition(weights[name], tensor) if name in self._partitioned else weights[name])
        self.averages.updates = updates

    def _scale(self) -> float:
        """The factor by which the loss is multiplied now."""
        return self.loss_scale.value if self.loss_scale is not None else 1.0

    def _averaged_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors behind the weights and buffers, by name; at stage 3 this rank's partitions of the weights."""
        tensors = self.model.state_dict(keep_vars=True)
        return {name: getattr(tensor, "ds_tensor", tensor) for name, tensor in tensors.items()}

    def _whole_average(self, name: str) -> torch.Tensor:
        assert self.averages is not None
        tensor = self.averages.tensors[name]
        if name not in self._partitioned:
            return tensor
        parameter = self._partitioned[name]
        whole = tensor.new_empty(tensor.numel() * self.group.ranks.world_size)
        self.group.gather_flat(whole, tensor)
        # The last rank's partition is padded to the size of the others.
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def _own_partition(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This rank's partition of a tensor at stage 3, of the size of ``like``; the last partition is padded."""
        padded = like.new_zeros(like.numel() * self.group.ranks.world_size)
        padded[: whole.numel()] = whole.flatten()
        start = like.numel() * self.group.ranks.rank
        return padded[start : start + like.numel()]

    def _plain_update(self) -> Update:
        if self._trained != ALL:
            # The other stages do the same: a frozen parameter takes part with a gradient of zero.
            for parameter in self._names.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        # Without ZeRO, DeepSpeed would write a gradient that is not finite into the weights.
        gradients = [p.grad for p in self._names.values() if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
        norm = nn.utils.get_total_norm(gradients)
        value = float(norm)
        applied = math.isfinite(value)
        if not applied:
            for parameter in self._names.values():
                parameter.grad = None  # optimizers skip parameters without a gradient
        elif self.config.optim.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self._names.values()), self.config.optim.max_grad_norm, norm)
        # Also where nothing is applied: DeepSpeed counts the micro batches in it.
        self._deepspeed.step()
        return Update(applied, value)

    @contextlib.contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        with whole_parameters(self.model):
            yield

    def _flat_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """What the optimizer actually steps, each with its part of the network: parameters, or this rank's flat partitions."""
        optimizer = self._deepspeed.optimizer
        groups = optimizer.param_groups
        if self.stage == 0:
            return [(group["part"], parameter) for group in groups for parameter in group["params"]]
        if self.stage == 3:
            flat = enumerate(optimizer.fp32_partitioned_groups_flat)
            return [(groups[optimizer.sub_group_to_group_id[i]]["part"], tensor) for i, tensor in flat]
        return [(group["part"], tensor) for group, tensor in zip(groups, optimizer.single_partition_of_fp32_groups)]

    def _set_updates(self, updates: Mapping[str, int]) -> None:
        """Set how many updates AdamW has made of some parts of the network."""
        if self.config.optim.name == "adamw":
            for part, parameter in self._flat_parameters():
                if part in updates:
                    self._deepspeed.basic_optimizer.state[parameter]["step"].fill_(float(updates[part]))

    def _materialize_optimizer_state(self) -> None:
        # torch creates the state in the first update; created here, it can be saved and restored at any time.
        # DeepSpeed links state to parameters once, after the first group's update, and so misses that of later groups.
        state = self._deepspeed.basic_optimizer.state
        names = state_names(self.config.optim)
        for _, parameter in self._flat_parameters():
            for key in names:
                state[parameter][key] = torch.zeros_like(parameter, requires_grad=False)
            if self.config.optim.name == "adamw":
                state[parameter]["step"] = torch.zeros((), device=parameter.device)
        if self.stage in (1, 2) and names:
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _get_state(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        if self.stage == 0:
            return cast(torch.Tensor, self._deepspeed.basic_optimizer.state[parameter][key])
        return whole_state(parameter, key)

    def _set_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if self.stage == 0:
            self._deepspeed.basic_optimizer.state[parameter][key].copy_(value)
            return
        set_state(parameter, key, value, self._own_partition if self.stage == 3 else None)
