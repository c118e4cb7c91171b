"""An exit's confidence, and the first exit whose confidence suffices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

Measure = Literal["max_probability", "entropy", "margin"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""Measures of one exit's logits."""
HistoryMeasure = Literal["agreement", "patience", "learned"]
HISTORY_MEASURES: tuple[HistoryMeasure, ...] = get_args(HistoryMeasure)
"""Measures that look at what earlier exits predicted as well."""
AnyMeasure = Literal["max_probability", "entropy", "margin", "agreement", "patience", "learned"]
FEATURES = (*MEASURES, "agreement", "patience")
"""What the learned measure weighs, in this order, and then a constant."""


def confidence(logits: torch.Tensor, measure: Measure = "max_probability") -> torch.Tensor:
    """An exit's confidence in its predictions, float32 [N], larger is more confident.

    Args:
        logits: of one exit, [N, K], divided by the exit's temperature beforehand where probabilities are to be scaled.
        measure: ``max_probability``, the largest softmax probability; ``entropy``, 1 - H(p) / log K, so 1 for a one-hot
            prediction and 0 for a uniform one; ``margin``, the largest probability minus the second largest.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=1)
    classes = logits.shape[1]
    if measure == "max_probability":
        return log_probabilities.amax(dim=1).exp()
    if classes == 1:
        # No second class for a margin, and an entropy divided by log 1.
        return torch.ones_like(log_probabilities[:, 0])
    if measure == "margin":
        first, second = log_probabilities.topk(2, dim=1).values.exp().unbind(dim=1)
        return first - second
    probabilities = log_probabilities.exp()
    # xlogy, because 0 log 0 is 0, and not NaN.
    negative_entropy = torch.special.xlogy(probabilities, probabilities).sum(dim=1)
    # 1 - H(p) / log K, where -H(p) = sum of p log p. It is 1 where one class has all, and 0 where all have the same.
    return torch.add(negative_entropy / math.log(classes), 1)


def agreement(classes: torch.Tensor) -> torch.Tensor:
    """Share of the exits before that predict the class of the last one given, float32 [N]; 0 at the first exit.

    Args:
        classes: predicted by each exit so far, int [N, m], m at least 1.
    """
    before = classes.shape[1] - 1
    return (classes[:, :-1] == classes[:, -1:]).sum(dim=1).float() / max(before, 1)


def patience(classes: torch.Tensor) -> torch.Tensor:
    """Share of the exits before that, without a break, predict the class of the last one given, float32 [N]; 0 at the first.

    The counter of Zhou et al., "BERT Loses Patience", NeurIPS 2020, section 3.2, by the largest that it can be.

    Args:
        classes: predicted by each exit so far, int [N, m], m at least 1.
    """
    before = classes.shape[1] - 1
    breaks = (classes[:, :-1] != classes[:, -1:]).int().flip(1).cumsum(dim=1)  # ONNX has no cumprod
    return (breaks == 0).sum(dim=1).float() / max(before, 1)


def learned(features: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Probability of being correct by logistic regression, float32 [N].

    EENet (Ilhan et al., WACV 2024) learns scores of such features too.

    Args:
        features: :data:`FEATURES` of one exit, float32 [N, 5].
        weights: one per feature, then the constant.
    """
    weighted = features * torch.tensor(weights[:-1], dtype=torch.float32, device=features.device)
    return torch.sigmoid(weighted.sum(dim=1) + weights[-1])


def confidence_with_history(
    logits: torch.Tensor, classes: torch.Tensor, measure: AnyMeasure, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """Confidence by any measure, float32 [N].

    Args:
        logits: of one exit, [N, K].
        classes: predicted by each exit so far, int [N, m], the last column by this one.
        measure: see :func:`confidence`, :func:`agreement`, :func:`patience`, :func:`learned`.
        weights: of this exit, for ``learned``.
    """
    if measure == "agreement":
        return agreement(classes)
    if measure == "patience":
        return patience(classes)
    if measure != "learned":
        return confidence(logits, measure)
    assert weights is not None, "a policy with a learned measure has weights"
    columns = [*(confidence(logits, one) for one in MEASURES), agreement(classes), patience(classes)]
    return learned(torch.stack(columns, dim=1), weights)


def exits_taken(scores: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The exit that each sample takes, counted from 0, int64 [N]: the first whose score reaches its threshold, or the last.

    Args:
        scores: confidence of each sample at each exit, [N, M].
        thresholds: one per exit, [M]; the last is not used, because there every sample exits.
    """
    confident = scores >= thresholds.to(scores)
    confident[:, -1] = True
    # argmax gives the first of equal values.
    return confident.int().argmax(dim=1)
