"""Failure prediction: how well an exit's confidence tells the images that it gets right from those it gets wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from dist_train.evaluation.samples import Samples


@dataclass(frozen=True)
class FailurePrediction:
    """One measure of confidence at one exit, from 1.

    ``auroc`` is the probability that a correct image is more confident than a wrong one; None where all are the same.
    ``aurc`` is the mean error of the most confident share of images, over all shares (Geifman et al., "Bias-reduced
    uncertainty estimation", ICLR 2019).  ``eefp`` is the AUROC for telling the images that should exit here, because the exit
    is correct or no later one is, from those that going on would put right; None at the last exit.  It follows the
    thought of Kubaty et al., arXiv 2508.21495: that an image stops is no failure where going on is in vain; it is not
    their formula to the letter.
    """

    measure: str
    exit: int
    auroc: float | None
    aurc: float
    eefp: float | None


def failure_prediction(measure: str, scores: NDArray[np.float32], samples: Samples) -> list[FailurePrediction]:
    """Every exit by one measure, whose scores are float32 [N, M]."""
    correct = samples["rank"] == 0
    found = []
    for m in range(samples.exits):
        later = correct[:, m + 1 :].any(axis=1)
        eefp = auroc(scores[:, m], correct[:, m] | ~later) if m + 1 < samples.exits else None
        found.append(
            FailurePrediction(
                measure, m + 1, auroc(scores[:, m], correct[:, m]), aurc(scores[:, m], correct[:, m]), eefp
            )
        )
    return found


def auroc(scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve, by ranks (Mann-Whitney); ties count half; None where there is only one kind."""
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return None
    ranks = rankdata(scores, method="average")
    # The sum of the ranks of the positive ones less the least that it can be, of all pairs of a positive and another one.
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def aurc(scores: NDArray[np.float32], correct: NDArray[np.bool_]) -> float:
    """Area under the risk-coverage curve; images that tie share their errors."""
    _, group = np.unique(-scores, return_inverse=True)
    counts = np.bincount(group)
    # From the most confident on; of those that tie each has the mean error of all.
    errors = (np.bincount(group, weights=~correct) / counts)[np.sort(group)]
    # AURC = 1 / N * sum over k of (errors among the k most confident images) / k.
    return float((np.cumsum(errors) / np.arange(1, len(errors) + 1)).mean())
