"""Whether the images that come are like those that thresholds were chosen by: a running share of images per exit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, xlog1py, xlogy

from dist_train.prediction.proportion import clopper_pearson

ALPHA = 0.001
"""Probability of an alarm, ever, while the images are like those of the reference."""


@dataclass(frozen=True)
class Reference:
    """Share of the ``images`` that took each exit when the thresholds were tried out, [M]."""

    shares: Sequence[float]
    images: int


class ShareMonitor:
    """Counts the exits that images take, and says which share has left its interval.

    The reference's shares have Clopper-Pearson intervals.  The running share is compared with them by a confidence sequence,
    which holds at every number of images at once, so that it can be looked at after each (beta-binomial mixture: Robbins, Annals
    of Mathematical Statistics 1970); the exits divide ALPHA among them.

    Attributes:
        low, high: ends of the intervals, [M].
        level: evidence of 1 / level against a share is an alarm.
    """

    def __init__(self, reference: Reference) -> None:
        exits = len(reference.shares)
        hits = np.rint(np.array(reference.shares) * reference.images)
        # Half of an exit's part of ALPHA is for the interval, the other half for the sequence.
        self.level = ALPHA / (2 * exits)
        self.low, self.high = clopper_pearson(hits, reference.images, self.level)
        self._reference = reference
        self._counts = np.zeros(exits)

    def add(self, exits: NDArray[np.int64] | Sequence[int]) -> None:
        """Count the exits, from 0, of more images."""
        self._counts += np.bincount(np.asarray(exits, dtype=np.int64), minlength=len(self._counts))

    @property
    def left(self) -> list[int]:
        """Exits, from 0, whose share is not in its interval any more."""
        images = self._counts.sum()
        if not images:
            return []
        nearest = np.clip(self._counts / images, self.low, self.high)
        others = images - self._counts
        # Likelihood ratio: of the counts averaged over all shares, the integral of p^k (1 - p)^(n - k), to that at the share of
        # the interval that fits them best.
        evidence = betaln(self._counts + 1, others + 1) - xlogy(self._counts, nearest) - xlog1py(others, -nearest)
        return [int(k) for k in np.flatnonzero(evidence >= math.log(1 / self.level))]

    def warning(self) -> str:
        """A line about the exit whose share is farthest from its interval; empty while all are in theirs."""
        left = self.left
        if not left:
            return ""
        shares = self._counts / self._counts.sum()
        worst = max(left, key=lambda k: max(shares[k] - self.high[k], self.low[k] - shares[k]))
        return (
            f"after {int(self._counts.sum()):,} images {100 * shares[worst]:.1f} % exit at exit {worst + 1}, outside of "
            f"{100 * self.low[worst]:.1f} to {100 * self.high[worst]:.1f} % of the {self._reference.images:,} images of the report: "
            "these images are of another kind, so its costs, accuracies and guarantees may not hold"
        )
