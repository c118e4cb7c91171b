"""The optimizer's side of training: parameter groups, the learning rate as a function of the step, averaged weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from dist_train.config import OptimConfig
from dist_train.models.parts import BACKBONE, part_of

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def _without_compiler(kind: type[_Optimizer]) -> type[_Optimizer]:
    """The same optimizer without torch's decorators that keep it out of compiled regions, where it never is here.

    At their first call they import the compiler, which takes every process of a run more than a second.
    """
    names = ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    # What the decorator of this one does besides.
    methods["step"] = torch.no_grad()(methods["step"])
    return type(kind.__name__, (kind,), methods)


SGD, AdamW = _without_compiler(torch.optim.SGD), _without_compiler(torch.optim.AdamW)


def build_optimizer(
    model: nn.Module, config: OptimConfig, parts: Mapping[str, str] | None = None
) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that train; norms and biases are not decayed unless ``decay_all``.

    With ``parts``, from :func:`dist_train.models.parts.exit_parts`, every part of the network is a group of its own, named
    ``part``, whose ``decay`` is its weight decay while it trains.
    """
    groups: list[dict[str, Any]] = []
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = parts or {}
    for part in dict.fromkeys((*parts.values(), BACKBONE)):
        chosen = [parameter for name, parameter in named if part_of(name, parts) == part]
        # Scales and shifts of norms, and biases, are the one-dimensional parameters: decay would only shrink outputs.
        decayed = [parameter for parameter in chosen if config.decay_all or parameter.ndim > 1]
        plain = [parameter for parameter in chosen if not (config.decay_all or parameter.ndim > 1)]
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "part": part, "decay": decay})
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    assert config.name == "sgd", config.name
    return SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0, fused=True
    )


def state_names(config: OptimConfig) -> tuple[str, ...]:
    """Names under which the optimizer keeps its tensors per parameter."""
    if config.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum else ()


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of update number ``step`` (from 0) of ``total_steps``: linear warm-up, then the schedule over the rest.

    Of a run in two stages (``model.first_epochs``) each has its own steps, and so a warm-up and a schedule of its own.
    """
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        # step + 1: at a learning rate of 0 the first update would be lost.
        return config.lr * (step + 1) / warmup
    if config.schedule == "multistep":
        # Rounded, since 0.55 * 220 is more than 121 in floats.
        return config.lr * config.gamma ** sum(step >= round(share * total_steps, 6) for share in config.milestones)
    if config.schedule == "cosine":
        # Half a cosine, from lr down to final_lr * lr.
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)
    return config.lr


class AveragedWeights:
    """Exponential moving average of all floating-point weights and buffers, by name, in float32.

    The decay grows as (1 + n) / (10 + n) until it reaches the configured one, so that the random start is forgotten.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # The very tensors that training changes: to look them up in every step would take longer than to average them.
        self._weights = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights after an update."""
        # Early on the decay is small: 1 / 10, 2 / 11, ...
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = list(self.tensors.values())
        # average <- decay * average + (1 - decay) * weight
        torch._foreach_lerp_(averages, [self._weights[name].detach().float() for name in self.tensors], 1 - decay)
