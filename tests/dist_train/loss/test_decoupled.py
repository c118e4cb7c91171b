"""Decoupled distillation: the paper's formula in float64, and the divergence that it takes apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.config import LossConfig
from dist_train.errors import DataError
from dist_train.loss.objective import ExitDistillation, LabelMix

LABELS = torch.tensor([0, 3, 6, 2, 5, 5])


def logits(seed: int = 0, classes: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(6, classes, generator=generator)).to(dtype).requires_grad_() for _ in range(3)]


def criterion(**fields: Any) -> ExitDistillation:
    return ExitDistillation.from_config(LossConfig(**{"distill_loss": "dkd", "alpha": 1.0, **fields}), 3)


def parts(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of every image, as equations 5 and 6 write them, of two softmaxes [N, K]."""
    is_label = F.one_hot(labels, student.shape[1]).bool()

    def two(p: Tensor) -> Tensor:
        return torch.stack([p[is_label], 1 - p[is_label]], 1)

    def rest(p: Tensor) -> Tensor:
        return p[~is_label].view(len(p), -1) / (1 - p[is_label])[:, None]

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(1)

    return divergence(two(teacher), two(student)), divergence(rest(teacher), rest(student))


def formula(exits: list[Tensor], loss: ExitDistillation, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    z = [one.detach().double().requires_grad_() for one in exits]
    alpha, beta = loss.config.dkd_weights
    total = torch.zeros(()).double()
    for m, student in enumerate(z):
        for t, teacher in enumerate(z):
            scale = float(loss.temperature[m])
            of_label, of_others = parts((student / scale).softmax(1), (teacher.detach() / scale).softmax(1), labels)
            weight = float(loss.distill_weights[m]) * float(loss.teachers[m, t]) * scale**2
            total = total + weight * (alpha * of_label + beta * of_others).mean()
    return total.detach(), list(torch.autograd.grad(total, z))


@pytest.mark.parametrize("teachers", ["last", "later", "ensemble"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradient_are_those_of_the_formula(teachers: Any, dtype: torch.dtype) -> None:
    exits, loss = logits(dtype=dtype), criterion(teachers=teachers, temperature=2.5, dkd_weights=(0.7, 3.0))
    out = loss(exits, LABELS)
    value, gradients = formula(exits, loss, LABELS)
    torch.testing.assert_close(out.loss.double(), value, rtol=1e-5, atol=1e-6)
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    largest = max(float(one.abs().max()) for one in gradients)
    for gradient, right in zip(torch.autograd.grad(out.loss, exits, materialize_grads=True), gradients):
        torch.testing.assert_close(gradient.double(), right, rtol=rtol, atol=rtol / 10 * largest)


def test_with_the_teachers_probability_of_the_others_it_is_the_divergence() -> None:
    """Equation 3, by which the formula of this test is one."""
    student, teacher = (one.detach().double().softmax(1) for one in logits()[:2])
    of_label, of_others = parts(student, teacher, LABELS)
    others = 1 - teacher.gather(1, LABELS[:, None]).squeeze(1)
    whole = (teacher * (teacher / student).log()).sum(1)
    torch.testing.assert_close(of_label + others * of_others, whole)


def test_labels_and_statistics_are_as_without() -> None:
    apart, whole = criterion(alpha=0.5, dkd_weights=(0.0, 0.0)), criterion(alpha=0.5, distill_loss="kl")
    labels = torch.tensor([0, -100, 6, 2, -100, 5])
    torch.testing.assert_close(apart(logits(), labels).stats.vector, whole(logits(), labels).stats.vector)
    alone = criterion(alpha=0.5, distill_loss="kl", distill_weights=0.0)
    torch.testing.assert_close(apart(logits(), labels).loss, alone(logits(), labels).loss)


def test_without_a_label_the_teachers_class_is_taken() -> None:
    exits, loss = logits(), criterion(teachers="last")
    predicted = exits[-1].argmax(1)
    unlabeled = loss(exits, torch.full((6,), -100)).loss
    torch.testing.assert_close(unlabeled, loss(exits, predicted).loss)


def test_mixed_images_without_one_of_their_labels_have_none() -> None:
    exits, loss = logits(), criterion(teachers="last")
    unlabeled = torch.full((6,), -100)
    expected = loss(exits, unlabeled).loss
    for pair in ((LABELS, unlabeled), (unlabeled, LABELS)):
        for share in (0.2, 0.8):
            torch.testing.assert_close(loss(exits, LabelMix(*pair, torch.full((6,), share))).loss, expected)


def test_mixed_and_soft_targets_count_by_their_larger_share() -> None:
    exits, loss = logits(), criterion(teachers="last")
    expected = loss(exits, LABELS).loss
    other = (LABELS + 1) % 7
    mixed = LabelMix(torch.where(torch.arange(6) < 3, LABELS, other), torch.where(torch.arange(6) < 3, other, LABELS),
                     torch.tensor([0.8, 0.6, 0.5, 0.4, 0.3, 0.1]))  # fmt: skip
    torch.testing.assert_close(loss(exits, mixed).loss, expected)
    soft = 0.7 * F.one_hot(LABELS, 7) + 0.3 * F.one_hot(other, 7)
    torch.testing.assert_close(loss(exits, soft).loss, expected)


@pytest.mark.parametrize("masking", [range(3), [1]], ids=["everywhere", "in one exit"])
def test_a_sample_whose_other_classes_are_all_masked_adds_nothing(masking: Any) -> None:
    """As with kl, where no exit has another class; among the others, of which there are none, where one exit has none."""
    alone, weights = torch.arange(7) != LABELS[2], (1.0 if len(masking) == 3 else 0.0, 8.0)
    exits = [one.detach() for one in logits()]
    for m in masking:
        exits[m][2, alone] = -torch.inf
    exits = [one.requires_grad_() for one in exits]
    loss = criterion(teachers="last", dkd_weights=weights)
    found = loss(exits, LABELS)
    gradients = torch.autograd.grad(found.loss, exits, materialize_grads=True)
    kept = torch.tensor([0, 1, 3, 4, 5])
    rest = [one.detach()[kept].requires_grad_() for one in exits]
    right = loss(rest, LABELS[kept]).loss * 5 / 6
    torch.testing.assert_close(found.loss, right)
    for gradient, expected in zip(gradients, torch.autograd.grad(right, rest, materialize_grads=True)):
        torch.testing.assert_close(gradient[kept], expected)
        assert not gradient[2].any()


def test_one_class_is_one_line() -> None:
    with pytest.raises(DataError, match="dkd, which needs two classes"):
        criterion()(logits(classes=1), torch.zeros(6, dtype=torch.int64))
