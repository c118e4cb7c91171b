"""Budgeted batch: thresholds that keep the average cost of an image within a budget (Huang et al., ICLR 2018, section 4).

Everything here sees only what a calibration split says: the confidence of every exit and whether it is correct.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dist_train.errors import ConfigError
from dist_train.prediction.confidence import exits_taken
from dist_train.prediction.search import ALWAYS, NEVER, Flags, Floats, Scores, Search

GEOMETRIC_SWEEP = range(1, 40)
"""The p of the public code's sweep: exit k is meant to take a share proportional to (p / 20)^k."""


class Outcome(NamedTuple):
    """What thresholds do to a set of images: accuracy, average cost, and the share of images that leave at each exit [M]."""

    accuracy: float
    cost: float
    shares: Floats
    hits: int


def outcome(scores: Scores, correct: Flags, costs: Floats, thresholds: Scores) -> Outcome:
    """Let every image leave at the first exit whose confidence reaches its threshold.

    Args:
        scores: confidence, float32 [N, M].
        correct: whether the exit's prediction is correct, bool [N, M].
        costs: of an image that leaves at an exit, float64 [M].
        thresholds: float32 [M]; the last is not used.
    """
    exits = exits_taken(torch.from_numpy(scores), torch.from_numpy(thresholds)).numpy()
    hits = int(correct[np.arange(len(exits)), exits].sum())
    counts = np.bincount(exits, minlength=len(costs))
    return Outcome(hits / len(exits), float(counts @ costs) / len(exits), counts / len(exits), hits)


def geometric(scores: Scores, sweep: Iterable[int] = GEOMETRIC_SWEEP) -> Scores:
    """Thresholds by the public code of MSDNet, float32 [P, M], one row per p; labels are not looked at.

    Exit k wants floor(N q_k) images, q_k proportional to (p/20)^k, of those that no earlier exit took: the threshold is
    the confidence of the last of them.  Its quirks are kept: an exit that wants none, or more than are left, takes
    none; all images that tie with the threshold leave; what the floors leave over goes to the last exit; shares
    are computed in float32.

    Args:
        scores: confidence on the calibration split, float32 [N, M].
        sweep: values of p.
    """
    images, exits = scores.shape
    order = [np.argsort(-scores[:, k], kind="stable") for k in range(exits)]
    rows = []
    for p in sweep:
        # q_k ~ (p / 20)^k in float32, in the order of the public code: other rounding can change a floor below.
        weights = torch.exp(torch.log(torch.tensor([p / 20])) * torch.arange(1, exits + 1, dtype=torch.float32))
        wanted = [math.floor(images * share) for share in weights / weights.sum()]
        thresholds = np.full(exits, NEVER, dtype=np.float32)
        waiting = np.ones(images, dtype=bool)
        for k in range(exits - 1):
            queue = order[k][waiting[order[k]]]
            if 0 < wanted[k] <= len(queue):
                thresholds[k] = scores[queue[wanted[k] - 1], k]
                waiting &= scores[:, k] < thresholds[k]
        thresholds[-1] = ALWAYS
        rows.append(thresholds)
    return np.stack(rows)


def optimal(scores: Scores, correct: Flags, costs: Floats, budgets: Sequence[float]) -> Scores:
    """Thresholds of the highest accuracy that is found within each budget, float32 [B, M].

    For a price of cost in accuracy, the best threshold of one exit, the others given, is found exactly by one sum over
    the images in the order of their confidence; exits take turns until none moves.  This is done for prices from high
    to low and back, and the thresholds of :func:`geometric` are added.  For a budget, exits take turns once more from the best of
    all these results within it, and from the cheapest above it.  So on these images the accuracy is never below that of geometric
    thresholds of no higher cost, and never falls from a budget to a larger one of the same call.

    A threshold lies halfway between the confidences of the last image that leaves and the first that stays, so images
    that tie are treated alike, and rounding in another pass does not move them.

    Args:
        scores: confidence on the calibration split, float32 [N, M].
        correct: whether the exit's prediction is correct, bool [N, M].
        costs: of an image that leaves at an exit, float64 [M], rising.
        budgets: largest average costs, each at least ``costs[0]``.
    """
    return np.stack(Search(scores, correct, costs).within(budgets, geometric(scores)))


def all_digits(number: float) -> str:
    """A number for a message that advises it: rounded, it could be refused itself."""
    return np.format_float_positional(number, trim="-")


def check_budgets(budgets: Sequence[float], costs: Floats, unit: str, clamp: bool) -> list[float]:
    """The budgets, moved into the range from the first to the last exit's cost where ``clamp`` allows it.

    Raises:
        ConfigError: a budget outside of that range, or no number.
    """
    low, high = float(costs[0]), float(costs[-1])
    for budget in budgets:
        if not (low <= budget <= high or (clamp and not math.isnan(budget))):
            given, least, most = map(all_digits, (budget, low, high))
            side = f"below the first exit's {least}" if budget < low else f"above the last exit's {most}"
            raise ConfigError(f"budget {given} {unit} is {side}; allowed is {least} to {most}, or clamp it (--clamp)")
    return [min(max(budget, low), high) for budget in budgets]
