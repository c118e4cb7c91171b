"""The report on a network: what ``report.json`` holds, and its accuracy at any budget.

``report.json``, format 2 (accuracies as shares of 1, costs per image)::

    format, step, split, data, images, unreadable    which checkpoint on what (data: the start of the split's fingerprint);
                every image was counted once
    exits       per exit: exit (from 1), multiply_adds, multiply_adds_public, multiply_adds_lazy, parameters, [milliseconds],
                top1, top5, loss, ece, top1_interval, top5_interval, loss_interval, ece_interval
    ensemble    per exit, of the mean probabilities of it and all before it: exit, top1, top5, loss, ece, intervals
    temperatures  per exit, fitted on the calibration images; null where there are none
    budgeted    per sweep: method, measure, temperatures (null: 1), cost, calibration, calibration_images, images, points;
                per point: budget, cost, top1, top1_interval, calibration_cost, calibration_top1, thresholds, shares
    diagnostics agreement, joint_errors, right_then_wrong (matrices by exit), right_alone (images per exit), confusions
    notes       what a reader has to know, in words

The file that training writes has format to exits alone, without ece and intervals.  The three counts of multiply-adds are
those of :func:`dist_train.models.cost.exit_costs`: convolutions and matrix products of a whole pass; the public
counter's; and, lazy, what an exit needs alone.  Thresholds: an image leaves at the first exit whose confidence reaches
the exit's, the last takes the rest; null is an exit where none leaves.  Intervals are of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist_train import budget
from dist_train.errors import ConfigError
from dist_train.evaluation import REPORT_FORMAT
from dist_train.policy import MEASURES, Measure
from dist_train.report.accuracy import ExitAccuracy, by_exit, interval, right
from dist_train.report.calibration import fit_temperatures, scaled_confidence, temperatures_at
from dist_train.report.diagnostics import Diagnostics, diagnose
from dist_train.report.samples import Samples
from shards.index import Index

Method = Literal["optimal", "geometric"]
COSTS = ("multiply_adds", "multiply_adds_public", "multiply_adds_lazy", "milliseconds")
SWEEP = 40
"""Budgets of a sweep, evenly from the first to the last exit's cost."""


@dataclass(frozen=True)
class BudgetPoint:
    """Thresholds fitted for a budget, and what they did on the test images."""

    budget: float
    cost: float
    top1: float
    top1_interval: tuple[float, float]
    calibration_cost: float
    calibration_top1: float
    thresholds: list[float | None]
    shares: list[float]


@dataclass(frozen=True)
class Sweep:
    """Points of rising budget, of one way to fit thresholds and one way to measure cost."""

    method: Method
    measure: Measure
    temperatures: list[float] | None
    cost: str
    calibration: str
    calibration_images: int
    images: int
    points: list[BudgetPoint]

    @property
    def confidence(self) -> str:
        """The measure in words."""
        return self.measure.replace("_", " ") + (", scaled" if self.temperatures else "")


@dataclass(frozen=True)
class Report:
    """A network on a split, made by :func:`dist_train.evaluate`.

    ``samples`` are all images of the split; thresholds are fitted on ``calibration`` and applied to ``test``, which are
    all images of the split or, where half of it is held out for calibration, the others.  ``costs`` has per exit the columns
    of report.json before the accuracies.  ``calibration`` is None where there was nothing to calibrate on.
    """

    folder: Path
    checkpoint: Path
    step: int
    split: str
    index: Index = field(repr=False)
    costs: dict[str, list[float]]
    samples: Samples = field(repr=False)
    test: Samples = field(repr=False)
    calibration: Samples | None = field(repr=False)
    calibration_name: str
    notes: list[str]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Costs that a budget can be given in."""
        return tuple(name for name in COSTS if name in self.costs)

    @property
    def images(self) -> int:
        """Images counted, each once."""
        return len(self.samples)

    @property
    def unreadable(self) -> int:
        """Images that could not be read, and were not counted."""
        return self.samples.unreadable

    @cached_property
    def exits(self) -> list[ExitAccuracy]:
        """Every exit on all images."""
        return by_exit(self.samples)

    @cached_property
    def ensemble(self) -> list[ExitAccuracy]:
        """The mean probabilities of every exit and all before it, on all images."""
        return by_exit(self.samples, ensemble=True)

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """The exits compared, on all images."""
        return diagnose(self.samples, len(self.index.classes))

    def budgeted(
        self,
        budgets: Sequence[float] | None = None,
        *,
        method: Method = "optimal",
        measure: Measure = "max_probability",
        scaled: bool = False,
        cost: str = "multiply_adds",
        clamp: bool = False,
    ) -> list[BudgetPoint]:
        """Accuracy when an average image may cost no more than each of ``budgets`` (default: a sweep over the whole range).

        Args:
            budgets: average cost per image, from the first exit's to the last one's.
            method: ``optimal`` or ``geometric``, see :mod:`dist_train.budget`; geometric thresholds know no budgets, so the
                dearest that keep to it on the calibration images are taken.
            measure: of confidence.
            scaled: largest probability at the exit's fitted temperature.
            cost: kind of cost, one of ``kinds``.
            clamp: move budgets outside of the range to its ends, instead of refusing them.

        Raises:
            ConfigError: a budget out of range, an unknown measure, method or cost, or nothing to calibrate on.
        """
        return self.sweep(budgets, method=method, measure=measure, scaled=scaled, cost=cost, clamp=clamp).points

    def sweep(
        self,
        budgets: Sequence[float] | None = None,
        *,
        method: Method = "optimal",
        measure: Measure = "max_probability",
        scaled: bool = False,
        cost: str = "multiply_adds",
        clamp: bool = False,
    ) -> Sweep:
        """:meth:`budgeted` with what it was made by; without budgets geometric thresholds are those of the public sweep."""
        for name, given, known in (
            ("method", method, ("optimal", "geometric")), ("measure", measure, MEASURES), ("cost", cost, self.kinds),
        ):  # fmt: skip
            if given not in known:
                raise ConfigError(f"{name} is {given!r}; use one of {', '.join(known)}")
        if scaled and measure != "max_probability":
            raise ConfigError(f"measure is {measure!r}; temperatures scale max_probability only")
        if self.calibration is None:
            raise ConfigError(f"budgets need calibration images, and there are none: {'; '.join(self.notes)}")
        costs = np.array(self.costs[cost], dtype=np.float64)
        scores = self._scores(self.calibration, measure, scaled)
        hits = right(self.calibration)
        if budgets is not None:
            budgets = budget.check_budgets(budgets, costs, cost, clamp)
        if method == "optimal":
            budgets = np.linspace(costs[0], costs[-1], SWEEP).tolist() if budgets is None else budgets
            thresholds = budget.optimal(scores, hits, costs, budgets)
        else:
            thresholds = budget.geometric(scores)
            spent = [budget.outcome(scores, hits, costs, row).cost for row in thresholds]
            if budgets is None:
                budgets = spent
            else:
                thresholds = np.stack([_dearest(thresholds, spent, one) for one in budgets])
        fitted = temperatures_at(self._temperatures) if scaled else None
        points = [self._point(one, row, costs, measure, scaled) for one, row in zip(budgets, thresholds)]
        return Sweep(
            method, measure, fitted, cost, self.calibration_name, len(self.calibration), len(self.test), points
        )

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """What report.json holds: every measure over multiply-adds, and the other costs by the largest probability."""
        if self.calibration is None:
            return []
        ways: list[tuple[Measure, bool, str]] = [("max_probability", False, cost) for cost in self.kinds]
        ways[1:1] = [("max_probability", True, "multiply_adds")]
        ways[2:2] = [(measure, False, "multiply_adds") for measure in MEASURES if measure != "max_probability"]
        methods: tuple[Method, ...] = ("optimal", "geometric")
        return [
            self.sweep(method=method, measure=measure, scaled=scaled, cost=cost)
            for measure, scaled, cost in ways
            for method in methods
        ]

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        columns = [{name: values[m] for name, values in self.costs.items()} for m in range(len(self.exits))]
        numbered = [{"exit": m + 1, **costs, **asdict(one)} for m, (one, costs) in enumerate(zip(self.exits, columns))]
        found = self.diagnostics
        return {
            "format": REPORT_FORMAT,
            "step": self.step,
            "split": self.split,
            "data": self.index.fingerprint[:12],
            "images": self.images,
            "unreadable": self.unreadable,
            "exits": numbered,
            "ensemble": [{"exit": m, **asdict(one)} for m, one in enumerate(self.ensemble, start=1)],
            "temperatures": None if self.calibration is None else temperatures_at(self._temperatures),
            "budgeted": [asdict(sweep) for sweep in self.sweeps],
            "diagnostics": {
                "agreement": found.agreement.tolist(),
                "joint_errors": found.joint_errors.tolist(),
                "right_then_wrong": found.right_then_wrong.tolist(),
                "right_alone": found.alone_images,
                "confusions": [
                    {"class": self.index.classes[true], "taken_for": self.index.classes[taken], "images": images}
                    for true, taken, images in found.confusions
                ],
            },
            "notes": self.notes,
        }

    @cached_property
    def _temperatures(self) -> NDArray[np.int64]:
        assert self.calibration is not None
        return fit_temperatures(self.calibration)

    def _scores(self, samples: Samples, measure: Measure, scaled: bool) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = samples[measure]
        return scaled_confidence(samples, self._temperatures) if scaled else scores

    def _point(
        self, given: float, thresholds: NDArray[np.float32], costs: NDArray[np.float64], measure: Measure, scaled: bool
    ) -> BudgetPoint:
        assert self.calibration is not None
        fitted = budget.outcome(
            self._scores(self.calibration, measure, scaled), right(self.calibration), costs, thresholds
        )
        tested = budget.outcome(self._scores(self.test, measure, scaled), right(self.test), costs, thresholds)
        return BudgetPoint(
            budget=float(given),
            cost=tested.cost,
            top1=tested.accuracy,
            top1_interval=interval(tested.hits, len(self.test)),
            calibration_cost=fitted.cost,
            calibration_top1=fitted.accuracy,
            thresholds=[None if math.isinf(one) else float(one) for one in thresholds],
            shares=tested.shares.tolist(),
        )


def _dearest(thresholds: NDArray[np.float32], spent: list[float], limit: float) -> NDArray[np.float32]:
    """The thresholds that spend most within a limit; all images at the first exit, where none keeps to it."""
    within = [place for place, cost in enumerate(spent) if cost <= limit * (1 + 1e-9)]
    if not within:
        return np.full(thresholds.shape[1], budget.ALWAYS, dtype=np.float32)
    row: NDArray[np.float32] = thresholds[max(within, key=lambda place: spent[place])]
    return row
