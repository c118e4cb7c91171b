"""Outside teachers in the objective: the plain formula over exits and teachers, and the matrix by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.config import LossConfig
from dist_train.errors import ConfigError, DataError
from dist_train.loss.objective import ExitDistillation
from dist_train.loss.teachers import with_outside


def logits(count: int, *, seed: int, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(6, 9, generator=generator)).requires_grad_(grad) for _ in range(count)]


def criterion(**fields: Any) -> ExitDistillation:
    return ExitDistillation.from_config(LossConfig(outside_teachers=("runs/a", "runs/b"), **fields), 3)


def test_the_share_of_outside_teachers() -> None:
    inside = torch.tensor([[0, 0.5, 0.5], [0, 0, 1], [0, 0, 0]])
    expected = [[0, 0.4, 0.4, 0.1, 0.1], [0, 0, 0.8, 0.1, 0.1], [0, 0, 0, 0.5, 0.5], [0] * 5, [0] * 5]
    torch.testing.assert_close(with_outside(inside, 2, 0.2), torch.tensor(expected))


@pytest.mark.parametrize(
    "fields",
    [
        {"teachers": "later", "temperature": 2.0},
        {"teachers": "last", "distill_loss": "kl", "outside_share": 0.25},
        {"teachers": "none"},
        {"teachers": "ensemble", "temperature": [1.0, 2.0, 3.0], "label_smoothing": 0.1},
        {"teachers": "better", "outside_share": 1.0},
    ],
    ids=str,
)
def test_loss_gradient_and_statistics_are_those_of_the_formula(plain: Callable[..., Any], fields: Any) -> None:
    loss, exits, outside = criterion(**fields), logits(3, seed=0, grad=True), logits(2, seed=1)
    labels = torch.tensor([0, 3, -100, 8, 2, 2])
    targets = torch.nn.functional.one_hot(labels.clamp(min=0), 9) * (labels >= 0)[:, None]
    out = loss(exits, labels, outside=outside)
    teachers = loss._teachers(out.stats.label_loss, 2)
    expected = plain(
        [*exits, *outside],
        targets,
        teachers=teachers,
        label_weights=loss.label_weights,
        distill_weights=loss.distill_weights,
        temperature=torch.cat([loss.temperature, loss.temperature[-1:].expand(2)]),
        labeled=5,
        smoothing=loss.config.label_smoothing,
        cross_entropy=loss.config.distill_loss == "cross_entropy",
    )
    assert teachers[:3, 3:].sum() > 0
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for gradient, right in zip(torch.autograd.grad(out.loss, exits), expected.grads):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-6)
    assert out.stats.num_exits == 3
    torch.testing.assert_close(out.stats.label_loss, expected.label_loss[:3].float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.stats.kl, expected.kl[:3].float(), rtol=1e-5, atol=1e-4)
    assert int(out.stats.samples) == 6
    assert int(out.stats.labeled) == 5


def test_the_temperature_follows_the_outside_teacher_of_the_last_exit() -> None:
    loss, outside = criterion(teachers="last"), logits(2, seed=1)
    out = loss(logits(3, seed=0), torch.zeros(6, dtype=torch.int64), outside=outside)
    torch.testing.assert_close(out.stats.confidence, torch.stack(outside).softmax(-1).mean(0).amax(-1).sum())
    assert criterion(teachers="none").needs_confidence


def test_statistics_of_the_exits_need_no_teachers() -> None:
    exits, labels = logits(3, seed=0), torch.arange(6)
    with torch.no_grad():
        alone = criterion(teachers="last")(exits, labels).stats
    expected = ExitDistillation.from_config(LossConfig(), 3)(exits, labels).stats
    torch.testing.assert_close(alone.vector, expected.vector)


def test_while_the_last_exit_trains_alone_there_are_no_teachers() -> None:
    loss, plain = criterion(teachers="last"), ExitDistillation.from_config(LossConfig(), 3)
    exits, labels = logits(3, seed=0, grad=True), torch.arange(6)
    for one in (loss, plain):
        one.use_last_exit_alone()
    assert not loss.needs_outside
    torch.testing.assert_close(loss(exits, labels).loss, plain(exits, labels).loss)


def test_what_does_not_fit_is_one_line() -> None:
    exits, labels = logits(3, seed=0, grad=True), torch.arange(6)
    with pytest.raises(DataError, match="outside has 0 tensors; this loss has 2 outside teachers"):
        criterion()(exits, labels)
    with pytest.raises(DataError, match=r"outside\[1\] is \[6, 4\] in float32"):
        criterion()(exits, labels, outside=[exits[0].detach(), torch.zeros(6, 4)])
    with pytest.raises(ConfigError, match="the network has 15 exits; the loss takes 1 to 14 beside 2 outside teachers"):
        ExitDistillation.from_config(LossConfig(outside_teachers=("a", "b")), 15)
    with pytest.raises(ValueError, match="name each teacher once"):
        LossConfig(outside_teachers=("a", "a"))
