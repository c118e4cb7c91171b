"""Accuracy, cross-entropy and calibration of every exit and of the running ensemble of exits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from dist_train.report.calibration import reliability
from dist_train.report.samples import Samples

LEVEL = 0.95


@dataclass(frozen=True)
class ExitAccuracy:
    """One exit, or the ensemble of it and all before it, on a split; shares of 1, ``loss`` in nats."""

    top1: float
    top5: float
    loss: float
    ece: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]


def by_exit(samples: Samples, ensemble: bool = False) -> list[ExitAccuracy]:
    """Every exit, or the running ensemble at every exit."""
    prefix = "ensemble_" if ensemble else ""
    rank, loss = samples[f"{prefix}rank"], samples[f"{prefix}loss"]
    confidence = samples[f"{prefix}max_probability"]
    results = []
    for m in range(samples.exits):
        top1, top5 = int((rank[:, m] == 0).sum()), int((rank[:, m] < 5).sum())
        results.append(
            ExitAccuracy(
                top1=top1 / len(samples),
                top5=top5 / len(samples),
                loss=float(loss[:, m].mean(dtype=np.float64)),
                ece=reliability(confidence[:, m], rank[:, m] == 0).error,
                top1_interval=interval(top1, len(samples)),
                top5_interval=interval(top5, len(samples)),
            )
        )
    return results


def interval(hits: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """Bootstrap percentile interval of an accuracy: images drawn again with replacement, infinitely often.

    So many draws have a binomial number of hits, whose quantiles need no draws (Efron, Annals of Statistics 1979, section 3).
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = (binom.ppf(tails, images, hits / images) / images).tolist()
    return float(low), float(high)


def right(samples: Samples) -> NDArray[np.bool_]:
    """Whether every exit is right, bool [N, M]."""
    flags: NDArray[np.bool_] = samples["rank"] == 0
    return flags
