"""The search for thresholds on one set of images: coordinate ascent on a Lagrangian relaxation of accuracy within a cost.

:meth:`Search.within`, :meth:`Search.settle` and the objective :func:`_within` serve ``budget.optimal`` only, and
:meth:`Search.curve` the other ways of fitting; the rest serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.prediction.confidence import exits_taken

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]
Flags = NDArray[np.bool_]

NEVER = math.inf
"""Threshold at which no image exits."""
ALWAYS = -1.0
"""Threshold at which every image exits: below every confidence."""
MAX_ROUNDS = 20
MULTIPLIERS = 24
"""Number of Lagrange multipliers, prices of cost in hits, for which thresholds are sought."""


class Candidate(NamedTuple):
    """Thresholds float32 [M] and, on the images searched, how many are correct and what they cost in all."""

    thresholds: Scores
    hits: float
    spent: float


Objective = Callable[[Floats, Floats], Floats]
"""Value of (hits, spent), elementwise; -inf where that cost is not allowed."""


class Search:
    """Thresholds for one set of images.

    Args:
        scores: confidence at each exit, float32 [N, M].
        correct: whether stopping there is a hit, bool [N, M]: the prediction equals the label or, for some risks, the last
            exit's prediction; or how many hits it is worth, float64.
        costs: cost of an image that stops there, float64 [M], rising.
    """

    def __init__(self, scores: Scores, correct: Flags | Floats, costs: Floats) -> None:
        self.scores, self.correct, self.costs = scores, correct, costs
        self.images, self.exits = scores.shape
        # One row per exit is contiguous; the sorted rows go from the most to the least confident image.
        self._scores = np.ascontiguousarray(scores.T)
        self._correct = np.ascontiguousarray(correct.T).astype(np.float64)
        self._order = [np.argsort(-column, kind="stable") for column in self._scores]
        self._sorted_scores = [column[order] for column, order in zip(self._scores, self._order)]
        self._sorted_correct = [column[order] for column, order in zip(self._correct, self._order)]

    def path(self, multipliers: int = MULTIPLIERS) -> list[Candidate]:
        """Best thresholds per multiplier, sweeping the price down from 'all at the first exit' and up from 'all at the last'."""
        # A network with a single exit has no range of costs.
        span = float(self.costs[-1] - self.costs[0]) or 1.0
        # Price of cost: hits that moving one image from the first to the last exit must gain, 30 (never) to 0.003.
        prices = np.geomspace(30, 0.003, multipliers) / span
        found = []
        # Two sweeps, because each step starts from the one before and may stay in a local optimum.
        for current, order in ((self.candidate(self.early), prices), (self.candidate(self.late), prices[::-1])):
            for price in order:
                current = self.climb(current, _lagrangian(float(price)))
                found.append(current)
        return found

    def curve(self, points: int) -> Scores:
        """Thresholds from 'all exit first' to 'all exit last' at evenly spaced costs, float32 [points, M].

        They are the candidates of :meth:`path` and, between two neighbours, a linear interpolation over the cost of how many
        images reach each threshold.
        """
        knots = sorted((self.candidate(self.early), *self.path(), self.candidate(self.late)), key=lambda c: c.spent)
        knots = [knot for knot, after in pairwise(knots) if knot.spent < after.spent] + [knots[-1]]
        # Images whose confidence reaches the threshold, [M - 1, knots]; infinity none, ALWAYS all.
        above = np.array(
            [
                np.searchsorted(-column, [-knot.thresholds[k] for knot in knots], side="right")
                for k, column in enumerate(self._sorted_scores[:-1])
            ]
        )
        spent = np.array([knot.spent for knot in knots])
        wanted = np.linspace(spent[0], spent[-1], points)
        rows = np.tile(self.early, (points, 1))
        for k in range(self.exits - 1):
            counts = np.rint(np.interp(wanted, spent, above[k])).astype(np.int64)
            rows[:, k] = [_midpoint(self._sorted_scores[k], count) for count in counts.tolist()]
        return rows

    def within(self, budgets: Sequence[float], start_points: Iterable[Scores]) -> list[Scores]:
        """The thresholds of the highest accuracy that is found within each average cost, float32 [M] each.

        Coordinate ascent starts from the best of :meth:`path` and the ``start_points`` within a budget, and from the cheapest
        above it; so the accuracy is never below that of those within the budget, and never falls from a budget to a larger one.
        """
        edges = (self.early, self.late)
        pool = [self.candidate(thresholds) for thresholds in (*start_points, *edges)] + self.path()
        found: dict[float, Scores] = {}
        best = min(pool, key=lambda candidate: candidate.spent)
        for budget in sorted(set(budgets)):
            # A sum of costs may miss by rounding a budget that it equals.
            limit = self.images * budget * (1 + 1e-9)
            allowed = [candidate for candidate in [*pool, best] if candidate.spent <= limit]
            starts = [max(allowed, key=lambda candidate: (candidate.hits, -candidate.spent))]
            # A climb that starts above the budget may end elsewhere than one from below.
            above = [candidate for candidate in pool if candidate.spent > limit]
            starts += [min(above, key=lambda candidate: candidate.spent)] if above else []
            climbed = [self.climb(start, _within(limit)) for start in starts]
            best = max(climbed, key=lambda c: (c.spent <= limit, c.hits, -c.spent))
            found[budget] = self.settle(best.thresholds)
        return [found[budget] for budget in budgets]

    @property
    def early(self) -> Scores:
        """All images at the first exit."""
        return np.full(self.exits, ALWAYS, dtype=np.float32)

    @property
    def late(self) -> Scores:
        """All images at the last exit."""
        late = np.full(self.exits, NEVER, dtype=np.float32)
        late[-1] = ALWAYS
        return late

    def climb(self, start: Candidate, objective: Objective) -> Candidate:
        """Coordinate ascent: set one threshold after another to its best value, until a round gains nothing; at most MAX_ROUNDS."""
        best, value = start, float(objective(np.float64(start.hits), np.float64(start.spent)))
        for _ in range(MAX_ROUNDS):
            before = value
            best, value = self._round(best, value, objective)
            if value == before:
                break
        return best

    def _round(self, best: Candidate, value: float, objective: Objective) -> tuple[Candidate, float]:
        """One round, from the last exit to the first, so that what an image gains by going on is updated exit by exit."""
        thresholds = best.thresholds.copy()
        reached = [np.ones(self.images, dtype=np.bool_)]
        for k in range(self.exits - 2):
            reached.append(reached[-1] & (self._scores[k] < thresholds[k]))
        later_correct = self._correct[-1]
        later_cost = np.full(self.images, self.costs[-1])
        hits, spent = best.hits, best.spent
        for k in reversed(range(self.exits - 1)):
            arrived = reached[k][self._order[k]]
            rows = self._order[k][arrived]
            confidences = self._sorted_scores[k][arrived]
            # At place i: what changes if the i most confident of those that arrive here exit, and the others go on as before.
            gained = _cumulative(self._sorted_correct[k][arrived] - later_correct[rows])
            saved = _cumulative(self.costs[k] - later_cost[rows])
            exiting = int(np.searchsorted(-confidences, -thresholds[k], side="right"))
            all_hits = gained + (hits - gained[exiting])
            all_spent = saved + (spent - saved[exiting])
            values = objective(all_hits, all_spent)
            values[1:-1][np.diff(confidences) == 0] = -np.inf  # images that tie must not be split
            index = int(values.argmax())
            # A gain must exceed rounding errors, or the rounds would not end.
            if values[index] > value + 1e-9:
                thresholds[k] = _midpoint(confidences, index)
                hits, spent, value = float(all_hits[index]), float(all_spent[index]), float(values[index])
            leave = self._scores[k] >= thresholds[k]
            later_correct = np.where(leave, self._correct[k], later_correct)
            later_cost = np.where(leave, self.costs[k], later_cost)
        return Candidate(thresholds, hits, spent), value

    def settle(self, thresholds: Scores) -> Scores:
        """Thresholds that decide the same and are halfway between two confidences."""
        moved: Scores = thresholds.copy()
        waiting = np.ones(self.images, dtype=np.bool_)
        for k in range(self.exits - 1):
            confidences = self._sorted_scores[k][waiting[self._order[k]]]
            waiting &= self._scores[k] < thresholds[k]
            moved[k] = _midpoint(confidences, int((confidences >= thresholds[k]).sum()))
        return moved

    def candidate(self, thresholds: Scores) -> Candidate:
        """These thresholds and what they do."""
        exits = exits_taken(torch.from_numpy(self.scores), torch.from_numpy(thresholds)).numpy()
        hits = float(self.correct[np.arange(self.images), exits].sum())
        return Candidate(thresholds, hits, float(np.bincount(exits, minlength=self.exits) @ self.costs))


def _cumulative(changes: Floats) -> Floats:
    """[0, the first, the first two, ...]."""
    sums = np.zeros(len(changes) + 1)
    np.cumsum(changes, out=sums[1:])
    return sums


def _midpoint(confidences: Scores, exiting: int) -> float:
    """A threshold at which the first ``exiting`` images, by falling confidence, exit and no other."""
    if exiting == 0:
        return NEVER
    if exiting == len(confidences):
        return ALWAYS
    stays, exits = confidences[exiting], confidences[exiting - 1]
    # Two neighbours in float32 have nothing in between; the threshold is then the upper one, which still exits.
    middle = np.float32((np.float64(stays) + np.float64(exits)) / 2)
    return float(middle if middle > stays else exits)


def _lagrangian(price: float) -> Objective:
    return lambda hits, spent: hits - price * spent


def _within(limit: float) -> Objective:
    """Accuracy within a budget; of the same accuracy, the cheaper is better."""
    # The whole budget is worth half a hit: cost decides among equal accuracies only.
    scale = 0.5 / max(limit, np.finfo(float).tiny)
    return lambda hits, spent: np.where(spent <= limit, hits - scale * spent, -np.inf)
