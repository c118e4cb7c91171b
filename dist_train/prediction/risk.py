"""Thresholds with a guarantee: a risk on new images stays at most epsilon, with probability at least 1 - delta.

The thresholds of every exit are one point of the way that :meth:`~dist_train.prediction.search.Search.curve` finds on one
part of the calibration images.  On the other part the points are tested one after another, from the safest on, until one
fails (fixed-sequence testing: Angelopoulos et al., "Learn then Test", 2021, section 3.2; for early exits Jazbec et al., "Fast yet
Safe", NeurIPS 2024).  All that pass keep to the risk, with probability at least 1 - delta over calibration images.

The p-value of ``consistency`` and ``error``, which are shares of images, is the binomial tail P(Bin(n, epsilon) <= k), exact
where Hoeffding-Bentkus bounds it (Bates et al., "Distribution-free, risk-controlling prediction sets", JACM 2021,
section 3.1).  Of ``gap``, a difference of two shares of the same images, it is that of an exact test for pairs
(:mod:`dist_train.prediction.paired`).  Of ``cost``, a share of the last exit's, it is one over the largest wealth of a bet
against the null hypothesis (Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2023,
section 4), which profits from a small variance.  All hold for any number of images that are drawn independently.  Calibration
images are as many of every class, and the risk is then that of equally frequent classes; such images scatter less, which is
proven for the binomial tail (Hoeffding, Annals of Mathematical Statistics 1956, theorem 4) and not for the other two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from dist_train.errors import ConfigError, DataError
from dist_train.prediction.confidence import exits_taken
from dist_train.prediction.paired import paired_p_value
from dist_train.prediction.search import Flags, Floats, Scores, Search

Risk = Literal["gap", "consistency", "error", "cost"]
RISKS: tuple[Risk, ...] = get_args(Risk)
Integers = NDArray[np.int64]

FIT_SHARE, FIT_IMAGES = 0.3, 500
"""Share of the calibration images that the way is fitted on, and how many at most: it has one parameter per exit, and testing
needs the rest."""
POINTS = 100
"""Of the way, evenly in cost; a fixed sequence pays nothing for many."""
LARGEST_BET = 0.75
"""Share of the wealth that a single image can take (Waudby-Smith & Ramdas, section 4.4)."""
DIFFERENCE_PRICE = 1.0
"""Hits that the way pays, for ``gap``, where an exit is right and the last one wrong or the other way round."""
MOST_IMAGES = 10**7
"""Beyond this many, no number of images is named."""


class Target(NamedTuple):
    """A risk that must be at most ``epsilon``: a share of the images, or for ``cost`` of the last exit's cost."""

    risk: Risk
    epsilon: float


class Outputs(NamedTuple):
    """What the exits say of N images: confidence float32 [N, M], predicted class int32 [N, M], label int64 [N]."""

    scores: Scores
    predictions: NDArray[np.int32]
    labels: Integers

    @property
    def correct(self) -> Flags:
        """Whether each exit is correct, bool [N, M]."""
        flags: Flags = self.predictions == self.labels[:, None]
        return flags

    def select(self, rows: Integers) -> Outputs:
        """These images only."""
        return Outputs(self.scores[rows], self.predictions[rows], self.labels[rows])

    def exits(self, thresholds: Scores) -> Integers:
        """The exit, from 0, that every image takes, [N]."""
        taken: Integers = exits_taken(torch.from_numpy(self.scores), torch.from_numpy(thresholds)).numpy()
        return taken


@dataclass(frozen=True)
class Bound:
    """One risk of a certificate: on new images at most ``epsilon``, with probability at least 1 - ``delta``.

    ``estimate`` is its mean on the images that it was tested on, and ``p_value`` the largest of their groups.
    """

    risk: Risk
    epsilon: float
    delta: float
    estimate: float
    p_value: float


@dataclass(frozen=True)
class Certificate:
    """What is guaranteed, all of it together with probability at least 1 - ``delta``.

    ``thresholds`` float32 [M] is None where nothing is; ``shares`` are of the tested images, per exit.  ``reason`` is one line
    where the images do not suffice, and ``needed`` about how many do, None where no number is known.  ``classes_left_out``
    have too few images for a guarantee of their own; None where none was asked for.
    """

    bounds: list[Bound]
    delta: float
    thresholds: Scores | None
    shares: list[float]
    fit_images: int
    tested_images: int
    reason: str = ""
    needed: int | None = None
    classes_left_out: list[int] | None = None


def check_targets(targets: Sequence[Target], delta: float) -> None:
    """Raise ConfigError for a risk that is not known or given twice, and for an epsilon or delta out of (0, 1)."""
    for target in targets:
        if target.risk not in RISKS:
            raise ConfigError(f"--risk is {target.risk!r}; use one of {', '.join(RISKS)}")
        if not 0 < target.epsilon < 1:
            raise ConfigError(f"--epsilon of {target.risk} is {target.epsilon:g}; give a share above 0 and below 1")
    if not 0 < delta < 1:
        raise ConfigError(f"--delta is {delta:g}; give a probability above 0 and below 1, such as 0.05")
    if len({target.risk for target in targets}) < len(targets):
        raise ConfigError(f"--risk is given twice for {targets[0].risk}; give every risk once, each with its --epsilon")


def fit_rows(images: int) -> tuple[Integers, Integers]:
    """Which of N calibration images the way is fitted on, and which it is tested on, in a random order that N decides."""
    order = np.random.default_rng(images).permutation(images)
    count = min(math.ceil(FIT_SHARE * images), FIT_IMAGES)
    return order[:count], order[count:]


def losses(risk: Risk, outputs: Outputs, exits: Integers, costs: Floats) -> Floats:
    """The loss of every image that exits there, float64 [N], whose mean is the risk.

    In [0, 1], but for ``gap``, in {-1, 0, 1}: -1 where the exit is correct and the last one is not.

    Args:
        risk: see :class:`Target`.
        outputs: of N images.
        exits: that the images take, from 0, [N].
        costs: of an image by exit, [M].
    """
    taken, last = outputs.predictions[np.arange(len(exits)), exits], outputs.predictions[:, -1]
    found: Floats
    if risk == "cost":
        found = costs[exits] / costs[-1]
    elif risk == "consistency":
        found = (taken != last).astype(np.float64)
    elif risk == "error":
        found = (taken != outputs.labels).astype(np.float64)
    else:
        found = (taken != outputs.labels).astype(np.float64) - (last != outputs.labels)
    return found


def p_value(risk: Risk, loss: Floats, epsilon: float, delta: float) -> float:
    """Probability of such losses [N], at most, where the risk is above ``epsilon``; ``delta`` only tunes the tests."""
    if risk in ("consistency", "error"):
        # P(Bin(n, epsilon) <= k) of k losses: how probable so few are where the risk is epsilon.
        return float(binom.cdf(loss.sum(), len(loss), epsilon))
    if risk == "gap":
        return paired_p_value(int((loss > 0).sum()), int((loss < 0).sum()), len(loss), epsilon, delta)
    return _betting(loss, epsilon, delta)


def _betting(values: Floats, mean: float, delta: float) -> float:
    """One over the largest wealth of bets that values in [0, 1] lie below ``mean`` on average.

    Every bet is made before its value is seen, from the variance so far; where the mean is not below, the wealth is a
    nonnegative supermartingale from 1, which exceeds 1 / p with probability at most p (Ville's inequality).
    """
    if not len(values):  # nothing to bet on, as where no tested image has the class
        return 1.0
    count = np.arange(1, len(values) + 1)
    # As if a value of 1/2 with the largest variance, 1/4, had come before: the first bets are then finite.
    means = (0.5 + np.cumsum(values)) / (count + 1)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    # Waudby-Smith and Ramdas' bet for n values of this variance, cut off so that even a value of 1 leaves some wealth.
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(values) * before)), LARGEST_BET / (1 - mean))
    # ln K_t = sum over i up to t of ln(1 + bet_i * (mean - value_i)); the product itself could overflow.
    wealth = np.cumsum(np.log1p(bets * (mean - values)))
    return math.exp(-max(0.0, float(wealth.max(initial=0.0))))


def images_needed(risk: Risk, loss: Floats, epsilon: float, delta: float) -> int | None:
    """How many images with losses like these make the p-value ``delta``; None where none of up to MOST_IMAGES do."""

    def enough(count: int) -> bool:
        if risk in ("consistency", "error"):  # by their rate: a rounding of few losses would decide
            return float(binom.cdf(math.floor(loss.mean() * count), count, epsilon)) <= delta
        if risk == "gap":
            # Without the noise of a product of floats: 0.07 * 100 is above 7.
            worse = math.ceil(round((loss > 0).mean() * count, 9))
            better = min(math.floor(round((loss < 0).mean() * count, 9)), count - worse)
            return paired_p_value(worse, better, count, epsilon, delta) <= delta
        # np.resize repeats the losses up to this number.
        return p_value(risk, np.resize(loss, count), epsilon, delta) <= delta

    if not len(loss) or loss.mean() >= epsilon:
        return None
    high = 1
    while not enough(high):
        high *= 2
        if high > MOST_IMAGES:
            return None
    low = high // 2
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def certify(
    outputs: Outputs, costs: Floats, targets: Sequence[Target], delta: float, classes: int | None = None
) -> Certificate:
    """The cheapest thresholds on the way that keep to all risks; where ``cost`` is the only one, the most accurate.

    Each of R risks is tested at delta / R, so all hold together.  With ``classes`` each of them is tested for every class
    that has enough images as well, by the largest of their p-values, which needs no further division: a point that breaks
    one class's bound passes with a probability of at most delta / R, whatever the other classes do.

    Args:
        outputs: of the calibration images, none of which the network was trained on; where their scores are learned,
            on the first part of :func:`fit_rows`.
        costs: of an image by exit, float64 [M], rising.
        targets: risks and what they may be.
        delta: probability with which anything guaranteed may be untrue.
        classes: how many there are, for a guarantee of every one; None for one over all images.

    Raises:
        ConfigError: epsilon or delta out of (0, 1), or a cost below the first exit's.
        DataError: fewer than two images, or a class without any where ``classes`` is given.
    """
    check_targets(targets, delta)
    least = float(costs[0] / costs[-1])
    for target in targets:
        if target.risk == "cost" and target.epsilon < least:
            raise ConfigError(
                f"--epsilon of cost is {target.epsilon:g}, but the first exit alone costs {math.ceil(1e4 * least) / 1e4:g} of the last; give more"
            )
    if len(outputs.labels) < 2:
        raise DataError(f"a guarantee needs calibration images, and there are {len(outputs.labels)}; give more of them")
    if classes is not None:
        empty = np.flatnonzero(np.bincount(outputs.labels, minlength=classes) == 0)
        if len(empty):
            raise DataError(
                f"class {empty[0]} has no calibration image; give images of every class, or leave out --per-class"
            )
    return _Test(outputs, costs, targets, delta, classes).certificate()


def _worth(outputs: Outputs, targets: Sequence[Target]) -> Flags | Floats:
    """What the way counts as a hit, [N, M]: agreement with the last exit, the right class, or something of both."""
    risks = {target.risk for target in targets}
    if "consistency" in risks:
        same: Flags = outputs.predictions == outputs.predictions[:, -1:]
        return same
    if "gap" not in risks:
        return outputs.correct
    # An exit that is right where the last is wrong makes up for one that is wrong where the last is right, but both add to
    # the variance of the gap, and so to the images that its test needs: of the same gap, fewer differences are better.
    # At a price of 1 the first is worth nothing, and the second counts twice.
    correct = outputs.correct.astype(np.float64)
    worth: Floats = correct - DIFFERENCE_PRICE * (correct != correct[:, -1:])
    return worth


class _Test:
    """The way fitted on one part of the images, and its points, from the cheapest on, tested on the other."""

    def __init__(
        self, outputs: Outputs, costs: Floats, targets: Sequence[Target], delta: float, classes: int | None
    ) -> None:
        fit, test = fit_rows(len(outputs.labels))
        self.fit, self.test, self.costs = outputs.select(fit), outputs.select(test), costs
        self.targets, self.delta = targets, delta
        self.share = delta / len(targets)
        self.points = Search(self.fit.scores, _worth(self.fit, targets), costs).curve(POINTS)
        self._exits: dict[int, Integers] = {}
        groups = [np.flatnonzero(self.test.labels == label) for label in range(classes or 0)]
        allowed = [all(self._can_pass(target, len(rows)) for target in targets) for rows in groups]
        self.groups = [np.arange(len(test)), *(rows for rows, enough in zip(groups, allowed) if enough)]
        self.left_out = None if classes is None else [label for label, enough in enumerate(allowed) if not enough]

    def certificate(self) -> Certificate:
        """Test all risks, and choose among the points that pass every one of them."""
        passed = [self._passed(target) for target in self.targets]
        common = sorted(set.intersection(*map(set, passed)))
        point = self._choose(common) if common else None
        # The last exit never differs from itself, which needs no test.
        trivial = POINTS - 1 if all(target.risk in ("gap", "consistency") for target in self.targets) else None
        reason, needed = "", None
        if point is None or point == trivial:
            reason, needed = self._reason(passed, trivial)
            point = trivial
        exits = None if point is None else self._taken(point)
        return Certificate(
            bounds=[self._bound(target, point) for target in self.targets],
            delta=self.delta,
            thresholds=None if point is None else self.points[point],
            shares=[] if exits is None else (np.bincount(exits, minlength=len(self.costs)) / len(exits)).tolist(),
            fit_images=len(self.fit.labels),
            tested_images=len(self.test.labels),
            reason=reason,
            needed=needed,
            classes_left_out=self.left_out,
        )

    def _passed(self, target: Target) -> list[int]:
        """The points of the sequence before the first one that fails."""
        passed = []
        for point in self._sequence(target):
            if self._p_value(target, point) > self.share:
                break
            passed.append(point)
        return passed

    def _sequence(self, target: Target) -> range:
        """From a safe point to ever cheaper ones: the last exit, for ``error`` the point of the fewest errors on the images
        of the fit; for ``cost`` from the first exit to ever dearer ones.
        """
        if target.risk == "cost":
            return range(POINTS)
        first = POINTS - 1
        if target.risk == "error":
            # Reversed, argmin takes the dearest of equal ones.
            first -= int(np.argmin(self._fit_errors()[::-1]))
        return range(first, -1, -1)

    def _choose(self, points: list[int]) -> int:
        if all(target.risk == "cost" for target in self.targets):
            return points[int(np.argmin(self._fit_errors()[points]))]
        # In rising order, and the points go from cheap to dear.
        return points[0]

    def _fit_errors(self) -> Floats:
        """Share of errors at every point on the images of the fit, [POINTS]."""
        return np.array([losses("error", self.fit, self.fit.exits(row), self.costs).mean() for row in self.points])

    def _p_value(self, target: Target, point: int) -> float:
        loss = losses(target.risk, self.test, self._taken(point), self.costs)
        return max(p_value(target.risk, loss[rows], target.epsilon, self.share) for rows in self.groups)

    def _bound(self, target: Target, point: int | None) -> Bound:
        shown = POINTS - 1 if point is None else point
        loss = losses(target.risk, self.test, self._taken(shown), self.costs)
        return Bound(target.risk, target.epsilon, self.share, float(loss.mean()), self._p_value(target, shown))

    def _taken(self, point: int) -> Integers:
        if point not in self._exits:
            self._exits[point] = self.test.exits(self.points[point])
        return self._exits[point]

    def _can_pass(self, target: Target, images: int) -> bool:
        """Whether so many images could pass a test if none of them had a loss."""
        best = float(self.costs[0] / self.costs[-1]) if target.risk == "cost" else 0.0
        return p_value(target.risk, np.full(images, best), target.epsilon, self.share) <= self.share

    def _reason(self, passed: list[list[int]], trivial: int | None) -> tuple[str, int | None]:
        """Why nothing but the last exit, or nothing, is guaranteed, and how many images would do."""
        for target, points in zip(self.targets, passed):
            if set(points) - {trivial}:
                continue
            point = next(k for k in self._sequence(target) if k not in points and k != trivial)
            loss = losses(target.risk, self.test, self._taken(point), self.costs)
            tested = images_needed(target.risk, loss, target.epsilon, self.share)
            start = (
                f"{target.risk} at most {target.epsilon:g} is guaranteed for {'no thresholds' if trivial is None else 'the last exit alone'}: "
                f"{len(loss)} tested images do not suffice"
            )
            if tested is None:
                return (
                    f"{start}, nor would more, because it is {loss.mean():.4g} even at the safest; raise --epsilon",
                    None,
                )
            # The others are for the fit.
            tested = max(tested, len(loss) + 1)
            needed = min(math.ceil(tested / (1 - FIT_SHARE)), tested + FIT_IMAGES)
            return f"{start}; give about {needed:,} calibration images, or raise --epsilon or --delta", needed
        return "no thresholds keep to all of the risks at once; raise an --epsilon, or give fewer risks", None
