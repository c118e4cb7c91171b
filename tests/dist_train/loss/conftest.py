"""The objective in float64, written as plainly as its formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Reference(NamedTuple):
    """What the plain formula gives: all sums over samples."""

    loss: Tensor
    grads: list[Tensor]
    label_loss: Tensor
    kl: Tensor


def plain_objective(
    logits: Sequence[Tensor],
    distributions: Tensor,
    *,
    teachers: Tensor,
    label_weights: Tensor,
    distill_weights: Tensor,
    temperature: Tensor,
    labeled: float,
    smoothing: float = 0.0,
    cross_entropy: bool = True,
    weights: Tensor | None = None,
) -> Reference:
    """Loops over samples' exits and teachers; ``distributions`` [N, K] are the targets, rows of zeros are unlabeled."""
    exits, (samples, _classes) = len(logits), logits[0].shape
    z = [layer.detach().double().requires_grad_() for layer in logits]
    y = distributions.double()
    has_label = (y.sum(1) > 0).double()
    weights = torch.ones(samples).double() if weights is None else weights.double()
    loss = torch.zeros(()).double()
    label_loss, kl = torch.zeros(exits), torch.zeros(exits)
    for m in range(exits):
        plain = -(y * z[m].log_softmax(1)).sum(1)
        even = -z[m].log_softmax(1).mean(1) * has_label
        ce = (1 - smoothing) * plain + smoothing * even
        loss = loss + label_weights[m].double() * (weights * ce).sum() / labeled
        label_loss[m] = plain.detach().sum()
        student = (z[m] / temperature[m].double()).log_softmax(1)
        for t in range(exits):
            teacher = (z[t].detach() / temperature[t].double()).log_softmax(1)
            cross = -(teacher.exp() * student).sum(1)
            divergence = cross + (teacher.exp() * teacher).sum(1)
            kl[m] += teachers[m, t] * (weights * divergence.detach()).sum()
            value = cross if cross_entropy else divergence
            weight = distill_weights[m].double() * teachers[m, t].double() * temperature[m].double() ** 2
            loss = loss + weight * (weights * value).sum() / samples
    return Reference(loss.detach(), list(torch.autograd.grad(loss, z)), label_loss, kl)


@pytest.fixture
def plain() -> Callable[..., Reference]:
    """The objective in float64, written as plainly as its formula."""
    return plain_objective
