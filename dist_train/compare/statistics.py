"""The statistics of a comparison: intervals of a difference, its significance, and the seeds that would show it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
"""Level of all intervals; what is significant is so at 1 - LEVEL."""
RESAMPLES = 2000
POWER = 0.8
"""Share of studies that are to find an effect of which :func:`seeds_needed` speaks."""
MOST_SEEDS = 1000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Effect:
    """A difference between two arms: its mean over the seeds that both have, its intervals, its p-value.

    Attributes:
        seeds: the seeds of the pairs.
        sd: standard deviation of the differences over the seeds (n - 1); None for a single seed, as are all that need it.
        over_seeds: t interval: what other seeds would give, on the same images.
        over_images: bootstrap interval: what the same networks would give on other images; None without outcomes.
        over_both: what other seeds would give on other images.
        p: of the two-sided paired t-test over the seeds.
    """

    mean: float
    seeds: tuple[str, ...]
    sd: float | None = None
    over_seeds: Interval | None = None
    over_images: Interval | None = None
    over_both: Interval | None = None
    p: float | None = None


def effect(
    differences: Mapping[str, float], by_image: NDArray[np.float64] | None = None, tested: int | None = None
) -> Effect:
    """The effect behind paired differences of accuracies.

    Args:
        differences: by seed, at least one.
        by_image: [N] for every image the difference of its outcomes (1 right, 0 wrong), averaged over the seeds.
        tested: number of images behind every accuracy; None treats the differences as exact.
    """
    values = list(differences.values())
    mean = math.fsum(values) / len(values)
    images = None if by_image is None else bootstrap_interval(by_image)
    if len(values) < 2:
        return Effect(mean, tuple(differences), over_images=images)
    sd = float(np.std(values, ddof=1))
    seeds, p = t_interval(values, tested), t_test(values, tested)
    both = None if images is None else combined_interval(mean, seeds, images)
    return Effect(mean, tuple(differences), sd, seeds, images, both, p)


def t_interval(values: Sequence[float], tested: int | None = None) -> Interval:
    """Student's interval of the mean of at least two independent values; ``tested`` as for :func:`effect`."""
    mean = float(np.mean(values))
    # mean ± t(0.975, n - 1) * s / sqrt(n)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * _standard_error(values, tested)
    return mean - reach, mean + reach


def t_test(values: Sequence[float], tested: int | None = None) -> float:
    """Two-sided p-value of the hypothesis that the mean of at least two independent values is 0."""
    error, mean = _standard_error(values, tested), abs(float(np.mean(values)))
    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(mean / error, len(values) - 1))


def _standard_error(values: Sequence[float], tested: int | None) -> float:
    """Of the mean: the spread over the seeds, and that of rounding to whole images.

    Accuracies on few images are often equal by chance, and differences of two such shares agree at two seeds as often: without
    the variance of rounding, a uniform distribution of one image's width for each share, they would be certain.
    """
    # A uniform distribution of width 1 / n has the variance 1 / (12 n^2), and a difference is of two shares.
    rounding = 2 / (12 * tested**2) if tested else 0.0
    return math.sqrt((float(np.var(values, ddof=1)) + rounding) / len(values))


def bootstrap_interval(by_image: NDArray[np.float64]) -> Interval:
    """Percentile interval of the mean over images drawn again with replacement; the same values give the same interval.

    Efron, Annals of Statistics 1979.
    """
    # Few values are different (but for rounding), and images of equal value are interchangeable: how many of each are drawn
    # is multinomial.
    values, counts = np.unique(by_image.round(9), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(by_image), counts / len(by_image), size=RESAMPLES)
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.quantile(drawn @ values / len(by_image), tails).tolist()
    return low, high


def combined_interval(mean: float, over_seeds: Interval, over_images: Interval) -> Interval:
    """For other seeds and other images at once: the reaches of both intervals, added as independent errors are.

    It covers at least what each of them covers (Banerjee, Sankhya 1960), and a little more, because what is particular to a
    network on an image is in both.
    """
    below = math.hypot(mean - over_seeds[0], mean - over_images[0])
    return mean - below, mean + math.hypot(over_seeds[1] - mean, over_images[1] - mean)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number: those up to 5 % are jointly significant at 5 %.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        # Never below that of a smaller p-value.
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def power(seeds: int, difference: float, sd: float) -> float:
    """Probability that a two-sided paired t-test over so many seeds finds a difference, given its spread over seeds."""
    # The square of t is F; scipy's noncentral t is not a number for some arguments.
    limit = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) ** 2
    return float(stats.ncf.sf(limit, 1, seeds - 1, seeds * (difference / sd) ** 2))


def seeds_needed(difference: float, sd: float) -> int | None:
    """Fewest seeds, at least 2, whose :func:`power` is at least POWER; None where MOST_SEEDS are too few."""
    # A spread of a hundredth or less needs 2 seeds, and scipy's numbers end somewhere below.
    sd = max(sd, difference / 100)
    counts = range(2, MOST_SEEDS + 1)
    index = bisect.bisect_left(counts, POWER, key=lambda seeds: power(seeds, difference, sd))
    return counts[index] if index < len(counts) else None
