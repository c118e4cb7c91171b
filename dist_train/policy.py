"""When a sample may leave: how sure an exit is of it, and the first exit that is sure enough."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

Measure = Literal["max_probability", "entropy", "margin"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


def confidence(logits: torch.Tensor, measure: Measure = "max_probability") -> torch.Tensor:
    """How sure an exit is of its predictions, float32 [N], larger is surer.

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
        return torch.ones_like(log_probabilities[:, 0])
    if measure == "margin":
        first, second = log_probabilities.topk(2, dim=1).values.exp().unbind(dim=1)
        return first - second
    probabilities = log_probabilities.exp()
    negative_entropy = torch.special.xlogy(probabilities, probabilities).sum(dim=1)
    return torch.add(negative_entropy / math.log(classes), 1)


def exits_taken(scores: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The exit that each sample takes, counted from 0, int64 [N]: the first whose score reaches its threshold, or the last.

    Args:
        scores: confidence of each sample at each exit, [N, M].
        thresholds: one per exit, [M]; the last is not used, because there every sample leaves.
    """
    sure = scores >= thresholds.to(scores)
    sure[:, -1] = True
    return sure.int().argmax(dim=1)
