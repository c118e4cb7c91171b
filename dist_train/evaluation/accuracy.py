"""Accuracy, cross-entropy and calibration of every exit and of the running ensemble of exits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from dist_train.evaluation.calibration import BINS, bin_indices, reliability
from dist_train.evaluation.samples import Samples

TAILS = (0.025, 0.975)
"""Quantiles at the ends of the intervals, which are of 95 %."""
RESAMPLES = 1000
RESAMPLES_AT_A_TIME = 50
"""So that the draws of 50,000 images take 10 MB."""


@dataclass(frozen=True)
class ExitAccuracy:
    """One exit, or the ensemble of it and all before it, on a split; shares of 1, ``loss`` in nats."""

    top1: float
    top5: float
    loss: float
    ece: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]
    loss_interval: tuple[float, float]
    ece_interval: tuple[float, float]


def by_exit(samples: Samples, ensemble: bool = False) -> list[ExitAccuracy]:
    """Every exit, or the running ensemble at every exit."""
    prefix = "ensemble_" if ensemble else ""
    rank, loss = samples[f"{prefix}rank"], samples[f"{prefix}loss"]
    confidence = samples[f"{prefix}max_probability"]
    loss_intervals, ece_intervals = _resampled(loss, confidence, rank == 0)
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
                loss_interval=loss_intervals[m],
                ece_interval=ece_intervals[m],
            )
        )
    return results


def interval(hits: int, images: int) -> tuple[float, float]:
    """Interval of an accuracy for other images of the same kind, which holds what it promises near 0 and 1 as well.

    Clopper & Pearson, Biometrika 1934.
    """
    found = binomtest(hits, images).proportion_ci(TAILS[1] - TAILS[0], method="exact")
    return float(found.low), float(found.high)


def _resampled(
    loss: NDArray[np.float32], confidence: NDArray[np.float32], hits: NDArray[np.bool_]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Bootstrap intervals of the mean loss and of the calibration error, per exit, from columns [N, M].

    Percentiles (Efron, Annals of Statistics 1979).  The calibration error, a sum of absolute values, comes out too large by
    noise, and with images drawn again by that of both draws: the second part, the mean of their errors less the error of all
    images, is taken off.  Its bins stay those of all images.  A fixed seed: the same images give the same intervals.
    """
    images, exits = loss.shape
    gaps = np.zeros((images, exits, BINS), dtype=np.float32)
    for m in range(exits):
        # The mean over all images of what stands in a bin is its share of the images times (confidence - accuracy).
        gaps[np.arange(images), m, bin_indices(confidence[:, m])] = confidence[:, m] - hits[:, m]
    columns = torch.from_numpy(np.concatenate([loss, gaps.reshape(images, -1)], axis=1))
    generator = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES // RESAMPLES_AT_A_TIME):
        drawn = generator.integers(images, size=(RESAMPLES_AT_A_TIME, images), dtype=np.int32)
        # How often each image is drawn: the means of a draw are a product with these counts.
        times = np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(np.float32)
        # By torch, whose product of such flat matrices is ten times as fast as numpy's.
        means.append((torch.from_numpy(times) @ columns / images).numpy())
    losses, by_bin = np.split(np.concatenate(means), [exits], axis=1)
    errors = np.abs(by_bin.reshape(RESAMPLES, exits, BINS)).sum(axis=2)
    # error of a draw - (mean error of all draws - error of all images)
    errors -= errors.mean(axis=0) - np.abs(gaps.mean(axis=0)).sum(axis=1)
    ends = [np.quantile(values, TAILS, axis=0).T for values in (losses, errors.clip(min=0))]
    loss_ends, error_ends = ([(float(low), float(high)) for low, high in pairs] for pairs in ends)
    return loss_ends, error_ends


def correct(samples: Samples) -> NDArray[np.bool_]:
    """Whether every exit is correct, bool [N, M]."""
    flags: NDArray[np.bool_] = samples["rank"] == 0
    return flags
