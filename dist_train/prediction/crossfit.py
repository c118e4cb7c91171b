"""Thresholds for a budget that are chosen, and promised, by what they do on images they were not fitted on.

Candidates are the points of :meth:`~dist_train.prediction.search.Search.curve`, by their number, and the thresholds of
:func:`~dist_train.prediction.budget.geometric`, by their p: fitted on all images but a fold, each is tried on the fold (cross-
validation: Stone, JRSS B 1974).  A candidate's number means the same in every fold, so the best one is known by its sums over
the folds, and is then fitted on all images.  The accuracy that it promises is counted fold by fold, each time of the
candidate that the other folds would have chosen, because the best of many has been lucky.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.prediction.budget import geometric
from dist_train.prediction.confidence import exits_taken
from dist_train.prediction.search import Flags, Floats, Scores, Search

FOLDS = 5
POINTS = 150
"""Points of the curve among which a budget chooses, so 0.7 % of the range of costs apart."""

Scorer = Callable[[NDArray[np.int64]], Scores]
"""Confidence of all N images, float32 [N, M], learned on these rows of them alone where it is learned."""


class Fitted(NamedTuple):
    """Thresholds for one budget, and what they promise on new images.

    ``thresholds`` float32 [M]; ``hits`` of the images were correct when they were held out, which then cost ``cost`` on
    average, with a standard error of ``deviation``.
    """

    thresholds: Scores
    hits: int
    cost: float
    deviation: float


def fit(scorer: Scorer, correct: Flags, costs: Floats, budgets: Sequence[float]) -> list[Fitted]:
    """The thresholds whose accuracy on held-out images is the highest with an average cost there within each budget.

    Args:
        scorer: gives confidence on the N calibration images.
        correct: whether the exit's prediction is correct, bool [N, M].
        costs: of an image by exit, float64 [M], rising.
        budgets: largest average costs, each at least ``costs[0]``.
    """
    images, everything = len(correct), np.arange(len(correct))
    folds = min(FOLDS, images)
    fold_of = np.random.default_rng(images).permutation(images) % folds
    held = [everything[fold_of == fold] for fold in range(folds)]
    # Per fold and candidate: how many are correct, and how many take each exit.
    hits, counts = [], []
    for rows in held:
        # A single image is all there is, to fit on and to hold out.
        others = everything[fold_of != fold_of[rows[0]]] if folds > 1 else rows
        scores = scorer(others)
        candidates = _candidates(scores[others], correct[others], costs)
        outcomes = [_outcome(scores[rows], correct[rows], row) for row in candidates]
        hits.append([found for found, _ in outcomes])
        counts.append([found for _, found in outcomes])
    held_hits, held_counts = np.array(hits), np.array(counts)  # [folds, C], [folds, C, M]
    scores = scorer(everything)
    candidates = _candidates(scores, correct, costs)
    seen = np.array([_outcome(scores, correct, row)[1] @ costs for row in candidates]) / images
    return [_best(budget, candidates, seen, held_hits, held_counts, costs) for budget in budgets]


def _best(
    budget: float, candidates: Scores, seen: Floats, hits: NDArray[np.int64], counts: NDArray[np.int64], costs: Floats
) -> Fitted:
    """The candidate for a budget, and the promise; ``seen`` [C] is what the candidates cost on the images of the fit."""

    def choose(folds: NDArray[np.int64]) -> int:
        spent = (counts[folds].sum(axis=0) @ costs) / counts[folds].sum(axis=(0, 2))
        value = np.where((spent <= budget * (1 + 1e-9)) & (seen <= budget * (1 + 1e-9)), hits[folds].sum(axis=0), -1)
        # Most hits first, and of these the cheapest.
        return int(np.lexsort((spent, -value))[0])

    folds = np.arange(len(hits))
    # What is counted on a fold is chosen without it.
    others = [choose(folds[folds != fold]) if len(folds) > 1 else choose(folds) for fold in folds]
    chosen = choose(folds)
    taken = counts[:, chosen].sum(axis=0)
    images = int(taken.sum())
    cost = float(taken @ costs) / images
    # The mean over the held-out images scatters, and about as much do the thresholds, which are fitted on as many.
    deviation = math.sqrt(2 * float(taken @ (costs - cost) ** 2)) / images
    return Fitted(candidates[chosen], int(hits[folds, others].sum()), cost, deviation)


def _candidates(scores: Scores, correct: Flags, costs: Floats) -> Scores:
    """Thresholds of all kinds, float32 [C, M], the cheapest first: all images at the first exit."""
    return np.concatenate([Search(scores, correct, costs).curve(POINTS), geometric(scores)])


def _outcome(scores: Scores, correct: Flags, thresholds: Scores) -> tuple[int, NDArray[np.int64]]:
    exits = exits_taken(torch.from_numpy(scores), torch.from_numpy(thresholds)).numpy()
    return int(correct[np.arange(len(exits)), exits].sum()), np.bincount(exits, minlength=scores.shape[1])
