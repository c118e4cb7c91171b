"""An exact test of how much more often one exit is wrong than another one on the same images."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.stats import binom

from dist_train.prediction.proportion import clopper_pearson
from dist_train.prediction.search import Floats

LEFT_OUT = 0.001
"""Share of the p-value's level that pays for not looking at shares of differing images that these images make implausible."""
SHARES = 50
"""Of differing images, from the smallest plausible one to the largest.  The probability is a smooth function of the share: of
p-values below 0.2, 3,000 shares made none greater by more than 0.0007, nor by more than half a percent of itself."""
TAIL = 1e-9
"""Probability of numbers of differing images that are not looked at, at each end; it is counted as if all of it were as good."""


@functools.lru_cache(maxsize=100_000)  # classes have few images each, of which the same few are wrong at most points
def paired_p_value(worse: int, better: int, images: int, epsilon: float, delta: float) -> float:
    """Probability of a result as good as this one, at most, where the difference of the two error rates is above ``epsilon``.

    The result is ordered by the score statistic (Tango, Statistics in Medicine 1998, section 2).  How often the exits differ at
    all is not known: of all shares, at the boundary of the hypothesis, where the largest p-value is (Hsueh, Liu and Chen,
    Biometrics 2001), the worst counts, within an interval that holds the true one (Berger and Boos, JASA 1994).

    Args:
        worse: images where the exit is wrong and the other one right.
        better: images where it is the other way round.
        images: all of them.
        epsilon: above 0 and below 1.
        delta: the level at which one tests; it only decides how sure the interval is.
    """
    differing = worse + better
    if not images:  # as where no tested image has the class
        return 1.0
    observed = float(_score(np.array(float(worse)), np.array(float(differing)), images, epsilon))
    if observed >= 0:
        return 1.0
    unsure = LEFT_OUT * delta
    # Of the share of differing images.  On the boundary it is epsilon at least.
    least, most = map(float, clopper_pearson(differing, images, unsure))
    if most <= epsilon:
        return unsure
    shares = np.linspace(max(epsilon, least), most, SHARES)[:, None]
    low, high = binom.ppf(TAIL, images, shares[0, 0]), binom.isf(TAIL, images, most)
    count = np.arange(low, high + 1)
    # Rounding must not leave out results that tie with this one.
    limit = _largest_as_good(count, images, epsilon, observed + 1e-9)
    # Of `count` differing images each is one of `worse` with this probability: (share + epsilon) / 2 of all images are.
    half = (1 + epsilon / shares) / 2
    tail: Floats = (binom.pmf(count, images, shares) * binom.cdf(limit, count, half)).sum(axis=1)
    return min(1.0, float(tail.max()) + unsure + 2 * TAIL)


def _score(worse: Floats, differing: Floats, images: int, epsilon: float) -> Floats:
    """The score statistic of a difference ``epsilon``: low where the exit is better than that."""
    better = differing - worse
    # The likelihood's maximum where the difference is epsilon, by the share of `better`: 2 n x^2 + b x = better epsilon (1 - epsilon).
    b = 2 * images * epsilon + 2 * better * epsilon - differing * (1 + epsilon)
    share = (np.sqrt(b * b + 8 * images * better * epsilon * (1 - epsilon)) - b) / (4 * images)
    statistic: Floats = (worse - better - images * epsilon) / np.sqrt(images * (2 * share + epsilon * (1 - epsilon)))
    return statistic


def _largest_as_good(differing: Floats, images: int, epsilon: float, observed: float) -> Floats:
    """For each number of differing images the largest number of ``worse`` with a score of at most ``observed``; -1 for none."""
    low, high = np.full(len(differing), -1.0), differing.copy()
    # The score rises with `worse`, so halving finds it.
    for _ in range(math.ceil(math.log2(differing[-1] + 2)) + 1):
        middle = np.ceil((low + high) / 2)
        good = _score(middle, differing, images, epsilon) <= observed
        low, high = np.where(good, middle, low), np.where(good, high, np.minimum(high, middle - 1))
    return low
