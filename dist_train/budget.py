"""Budgeted batch: thresholds that keep the average cost of an image within a budget (Huang et al., ICLR 2018, section 4).

Everything here sees only what a calibration split says: the confidence of every exit and whether it is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.errors import ConfigError
from dist_train.policy import exits_taken

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]
Flags = NDArray[np.bool_]

NEVER = math.inf
"""Threshold at which no image leaves."""
ALWAYS = -1.0
"""Threshold at which every image leaves: below every confidence."""
GEOMETRIC_SWEEP = range(1, 40)
"""The p of the public code's sweep: exit k is meant to take a share proportional to (p / 20)^k."""
MAX_ROUNDS = 20
PRICES = 24
"""Prices of a multiply-add, in accuracy, for which thresholds are sought."""


class Outcome(NamedTuple):
    """What thresholds do to a set of images: accuracy, average cost, and the share of images that leave at each exit [M]."""

    accuracy: float
    cost: float
    shares: Floats
    hits: int


def outcome(scores: Scores, right: Flags, costs: Floats, thresholds: Scores) -> Outcome:
    """Let every image leave at the first exit whose confidence reaches its threshold.

    Args:
        scores: confidence, float32 [N, M].
        right: whether the exit's prediction is right, bool [N, M].
        costs: of an image that leaves at an exit, float64 [M].
        thresholds: float32 [M]; the last is not used.
    """
    exits = _leave(scores, thresholds)
    hits = int(right[np.arange(len(exits)), exits].sum())
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


def optimal(scores: Scores, right: Flags, costs: Floats, budgets: Sequence[float]) -> Scores:
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
        right: whether the exit's prediction is right, bool [N, M].
        costs: of an image that leaves at an exit, float64 [M], rising.
        budgets: largest average costs, each at least ``costs[0]``.
    """
    search = _Search(scores, right, costs)
    pool = search.pool()
    found: dict[float, Scores] = {}
    best = min(pool, key=lambda candidate: candidate.spent)
    for budget in sorted(set(budgets)):
        limit = len(scores) * budget * (1 + 1e-9)
        within = [one for one in [*pool, best] if one.spent <= limit]
        starts = [max(within, key=lambda one: (one.hits, -one.spent))]
        above = [one for one in pool if one.spent > limit]
        starts += [min(above, key=lambda one: one.spent)] if above else []
        climbed = [search.climb(start, search.within(limit)) for start in starts]
        best = max(climbed, key=lambda one: (one.spent <= limit, one.hits, -one.spent))
        found[budget] = search.settled(best.thresholds)
    return np.stack([found[budget] for budget in budgets])


def check_budgets(budgets: Sequence[float], costs: Floats, unit: str, clamp: bool) -> list[float]:
    """The budgets, moved into the range from the first to the last exit's cost where ``clamp`` allows it.

    Raises:
        ConfigError: a budget outside of that range, or no number.
    """
    low, high = float(costs[0]), float(costs[-1])
    for budget in budgets:
        if not (low <= budget <= high or (clamp and not math.isnan(budget))):
            side = f"below the first exit's {low:.6g}" if budget < low else f"above the last exit's {high:.6g}"
            raise ConfigError(
                f"budget {budget:.6g} {unit} is {side}; allowed is {low:.6g} to {high:.6g}, or clamp it (--clamp)"
            )
    return [min(max(budget, low), high) for budget in budgets]


class _Candidate(NamedTuple):
    """Thresholds and, on the calibration split, how many images they get right and what they spend in all."""

    thresholds: Scores
    hits: float
    spent: float


_Objective = Callable[[Floats, Floats], Floats]
"""Value of (hits, spent), elementwise; -inf where it is not allowed."""


class _Search:
    """Search for thresholds on one calibration split."""

    def __init__(self, scores: Scores, right: Flags, costs: Floats) -> None:
        self.scores, self.right, self.costs = scores, right, costs
        self.images, self.exits = scores.shape
        self.order = [np.argsort(-scores[:, k], kind="stable") for k in range(self.exits)]

    def pool(self) -> list[_Candidate]:
        """Geometric thresholds, all images at the first exit, and the best found for a range of prices."""
        early = np.full(self.exits, ALWAYS, dtype=np.float32)
        late = np.full(self.exits, NEVER, dtype=np.float32)
        late[-1] = ALWAYS
        pool = [self.candidate(thresholds) for thresholds in [*geometric(self.scores), early, late]]
        span = float(self.costs[-1] - self.costs[0]) or 1.0
        prices = np.geomspace(30, 0.003, PRICES) / span
        for start, path in ((pool[-2], prices), (pool[-1], prices[::-1])):
            for price in path:
                start = self.climb(start, self.priced(float(price)))
                pool.append(start)
        return pool

    def climb(self, start: _Candidate, objective: _Objective) -> _Candidate:
        """Move one exit's threshold to its best place after another, until none gets better."""
        best, value = start, float(objective(np.float64(start.hits), np.float64(start.spent)))
        for _ in range(MAX_ROUNDS):
            before = value
            for k in reversed(range(self.exits - 1)):
                places, hits, spent = self.cuts(best.thresholds, k)
                values = objective(hits, spent)
                place = int(values.argmax())
                if values[place] > value + 1e-9:
                    thresholds = best.thresholds.copy()
                    thresholds[k] = self.threshold(places, place)
                    best, value = _Candidate(thresholds, float(hits[place]), float(spent[place])), float(values[place])
            if value == before:
                break
        return best

    def cuts(self, thresholds: Scores, k: int) -> tuple[Scores, Floats, Floats]:
        """Everywhere that exit k's threshold can go, the other exits' staying: the confidences of the images that reach it,
        falling, and (hits, spent) if none, the first, the first two, ... of them leave there; -inf hits inside of a tie.
        """
        reached: Flags = np.all(self.scores[:, :k] < thresholds[:k], axis=1)
        rows = self.order[k][reached[self.order[k]]]
        later = k + 1 + _leave(self.scores[rows, k + 1 :], thresholds[k + 1 :])
        others = np.flatnonzero(~reached)
        earlier = _leave(self.scores[others, : k + 1], thresholds[: k + 1])
        hits, spent = np.empty(len(rows) + 1), np.empty(len(rows) + 1)
        hits[0] = self.right[rows, later].sum() + self.right[others, earlier].sum()
        spent[0] = self.costs[later].sum() + self.costs[earlier].sum()
        np.cumsum(self.right[rows, k].astype(np.float64) - self.right[rows, later], out=hits[1:])
        np.cumsum(self.costs[k] - self.costs[later], out=spent[1:])
        hits[1:] += hits[0]
        spent[1:] += spent[0]
        confidences = self.scores[rows, k]
        hits[1:-1][np.diff(confidences) == 0] = -np.inf
        return confidences, hits, spent

    def settled(self, thresholds: Scores) -> Scores:
        """The same decisions by thresholds that are halfway between two confidences."""
        moved: Scores = thresholds.copy()
        waiting = np.ones(self.images, dtype=bool)
        for k in range(self.exits - 1):
            confidences = self.scores[self.order[k][waiting[self.order[k]]], k]
            waiting &= self.scores[:, k] < thresholds[k]
            moved[k] = self.threshold(confidences, int((confidences >= thresholds[k]).sum()))
        return moved

    def threshold(self, confidences: Scores, leaving: int) -> float:
        """A threshold that lets the first ``leaving`` images of :meth:`cuts` leave and no other."""
        if leaving == 0:
            return NEVER
        if leaving == len(confidences):
            return ALWAYS
        stays, leaves = confidences[leaving], confidences[leaving - 1]
        middle = np.float32((np.float64(stays) + np.float64(leaves)) / 2)
        return float(middle if middle > stays else leaves)

    def candidate(self, thresholds: Scores) -> _Candidate:
        result = outcome(self.scores, self.right, self.costs, thresholds)
        return _Candidate(thresholds, result.hits, float((result.shares * self.images).round() @ self.costs))

    def priced(self, price: float) -> _Objective:
        """Accuracy less cost at this price."""
        return lambda hits, spent: hits - price * spent

    def within(self, limit: float) -> _Objective:
        """Accuracy within a budget; of the same accuracy, the cheaper is better."""
        scale = 0.5 / max(limit, np.finfo(float).tiny)
        return lambda hits, spent: np.where(spent <= limit, hits - scale * spent, -np.inf)


def _leave(scores: Scores, thresholds: Scores) -> NDArray[np.int64]:
    exits: NDArray[np.int64] = exits_taken(torch.from_numpy(scores), torch.from_numpy(thresholds)).numpy()
    return exits
