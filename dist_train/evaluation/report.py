"""The report on a network: what ``report.json`` holds, and its accuracy at any budget.

``report.json``, format 2 (accuracies as shares of 1, costs per image)::

    format, step, split, data, images, unreadable, precision    which checkpoint on what (data: the start of the split's
                fingerprint), computed in which precision; every image was counted once
    exits       per exit: exit (from 1), multiply_adds, multiply_adds_public, multiply_adds_lazy, parameters, [milliseconds],
                top1, top5, loss, ece, top1_interval, top5_interval, loss_interval, ece_interval
    ensemble    per exit, of the mean probabilities of it and all before it: exit, top1, top5, loss, ece, intervals
    temperatures  per exit, fitted on the calibration images; null where there are none
    budgeted    per sweep: method, measure, temperatures (null: 1), cost, calibration, calibration_images, images, points;
                (weights: of the measure learned, a row per exit, else null); per point: budget, cost, top1, top1_interval,
                calibration_cost, calibration_top1, thresholds, shares, and what held-out calibration images promise:
                expected_cost, expected_top1 and their intervals (null for geometric)
    failure_prediction  per measure and exit, on the test images: auroc, aurc, eefp
    guarantee   null, or risks that new images keep to with probability 1 - delta, and the thresholds (:mod:`.guarantee`)
    shift       per corruption and severity: accuracies, cost, and which guarantees broke (:mod:`.shift`)
    diagnostics agreement, joint_errors, correct_then_wrong (matrices by exit), uniquely_correct (images per exit), confusions
    timing      null, or of the milliseconds: milliseconds and spread per exit, precision, threads, batch, device, and others, the
                share of the processor that other processes took meanwhile
    notes       what a reader has to know, in words
    outcomes    which images every exit got right (:mod:`dist_train.tracking.outcomes`)

The file that training writes has format to exits and outcomes alone, without ece and intervals.  The three counts of multiply-adds are
those of :func:`dist_train.models.cost.exit_costs`: convolutions and matrix products of a whole pass; the public
counter's; and, lazy, what an exit needs alone.  Thresholds: an image exits at the first exit whose confidence reaches
the exit's, the last takes the rest; null is an exit where none does.  Intervals are of 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import ConfigError
from dist_train.evaluation.accuracy import ExitAccuracy, by_exit, correct, interval
from dist_train.evaluation.calibration import fit_temperatures, temperatures_at
from dist_train.evaluation.diagnostics import Diagnostics, diagnose
from dist_train.evaluation.failure import FailurePrediction, failure_prediction
from dist_train.evaluation.guarantee import Guarantee, finite
from dist_train.evaluation.samples import Samples
from dist_train.evaluation.scores import Scoring, fit_scoring
from dist_train.evaluation.shift import Shifted
from dist_train.prediction import budget, crossfit
from dist_train.prediction.confidence import HISTORY_MEASURES, MEASURES, AnyMeasure
from dist_train.prediction.search import ALWAYS
from dist_train.prediction.timing import Timing
from dist_train.render.table import Table, millions
from dist_train.tracking.outcomes import RIGHT, UNCOUNTED, WRONG, pack
from dist_train.training.validation import REPORT_FORMAT
from shards.index import Index

Method = Literal["optimal", "geometric"]
COSTS = ("multiply_adds", "multiply_adds_public", "multiply_adds_lazy", "milliseconds")
SWEEP = 40
"""Budgets of a sweep, evenly from the first to the last exit's cost."""


@dataclass(frozen=True)
class BudgetPoint:
    """Thresholds fitted for a budget, what they did on the test images, and what they promised before.

    The promise, ``expected_*``, is from calibration images that were held out from the fit, with intervals of 95 %.
    """

    budget: float
    cost: float
    top1: float
    top1_interval: tuple[float, float]
    calibration_cost: float
    calibration_top1: float
    thresholds: list[float | None]
    shares: list[float]
    expected_cost: float | None = None
    expected_cost_interval: tuple[float, float] | None = None
    expected_top1: float | None = None
    expected_top1_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sweep:
    """Points of rising budget, of one way to fit thresholds and one way to measure cost."""

    method: Method
    measure: AnyMeasure
    temperatures: list[float] | None
    weights: list[list[float]] | None
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
    precision: str
    guarantee: Guarantee | None = field(default=None, repr=False)
    shift: list[Shifted] = field(default_factory=list, repr=False)
    timing: Timing | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        top1 = " ".join(f"{100 * one.top1:.2f}" for one in self.exits)
        return f"Report({self.checkpoint}, {self.images} images of {self.split}: top-1 % {top1})"

    def _repr_html_(self) -> str:
        rows = [
            [str(m), millions(cost), f"{100 * one.top1:.2f}", f"{one.loss:.4f}", f"{100 * one.ece:.2f}"]
            for m, (one, cost) in enumerate(zip(self.exits, self.costs["multiply_adds"]), start=1)
        ]
        title = f"{self.folder.name}: {self.images} images of {self.split}"
        return Table(title, ["exit", "multiply-adds", "top-1 %", "loss", "ECE %"], rows).html()

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
        measure: AnyMeasure = "max_probability",
        scaled: bool = False,
        cost: str = "multiply_adds",
        clamp: bool = False,
    ) -> list[BudgetPoint]:
        """Accuracy when an average image may cost no more than each of ``budgets`` (default: a sweep over the whole range).

        Args:
            budgets: average cost per image, from the first exit's to the last one's.
            method: ``optimal`` (:mod:`dist_train.prediction.crossfit`) or ``geometric`` (:mod:`dist_train.prediction.budget`), which knows no budgets, so the
                most expensive thresholds that keep to it on the calibration images are taken.
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
        measure: AnyMeasure = "max_probability",
        scaled: bool = False,
        cost: str = "multiply_adds",
        clamp: bool = False,
    ) -> Sweep:
        """:meth:`budgeted` with what it was made by; without budgets geometric thresholds are those of the public sweep."""
        for name, given, known in (
            ("method", method, ("optimal", "geometric")),
            ("measure", measure, (*MEASURES, *HISTORY_MEASURES)),
            ("cost", cost, self.kinds),
        ):
            if given not in known:
                raise ConfigError(f"{name} is {given!r}; use one of {', '.join(known)}")
        if scaled and measure != "max_probability":
            raise ConfigError(f"measure is {measure!r}; temperatures scale max_probability only")
        if self.calibration is None:
            raise ConfigError(f"budgets need calibration images, and there are none: {'; '.join(self.notes)}")
        calibration, costs = self.calibration, np.array(self.costs[cost], dtype=np.float64)
        scoring = fit_scoring(calibration, measure, scaled)
        scores = scoring(calibration), scoring(self.test)
        if budgets is not None:
            budgets = budget.check_budgets(budgets, costs, cost, clamp)
        if method == "optimal":
            budgets = np.linspace(costs[0], costs[-1], SWEEP).tolist() if budgets is None else budgets

            def scorer(rows: NDArray[np.int64]) -> NDArray[np.float32]:
                # The measure too is fitted on these rows alone: images of the promise have no part in any fit.
                return fit_scoring(calibration.select(rows), measure, scaled)(calibration)

            fitted = crossfit.fit(scorer, correct(calibration), costs, budgets)
            points = [self._point(given, one.thresholds, costs, scores, one) for given, one in zip(budgets, fitted)]
        else:
            thresholds = budget.geometric(scores[0])
            # The public sweep knows no budgets: what a p spends on the calibration images stands for one.
            spent = [budget.outcome(scores[0], correct(calibration), costs, row).cost for row in thresholds]
            if budgets is None:
                budgets = spent
            else:
                thresholds = np.stack([_most_expensive(thresholds, spent, given) for given in budgets])
            points = [self._point(given, row, costs, scores) for given, row in zip(budgets, thresholds)]
        return Sweep(
            method,
            measure,
            scoring.temperatures,
            scoring.weights,
            cost,
            self.calibration_name,
            len(calibration),
            len(self.test),
            points,
        )

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """What report.json holds: every measure over multiply-adds, and the other costs by the largest probability."""
        if self.calibration is None:
            return []
        ways: list[tuple[AnyMeasure, bool, str]] = [("max_probability", False, cost) for cost in self.kinds]
        others = [measure for measure in (*MEASURES, *HISTORY_MEASURES) if measure != "max_probability"]
        # Behind the first way, whose sweeps the page and the pictures take by their place.
        ways[1:1] = [("max_probability", True, "multiply_adds")]
        ways[2:2] = [(measure, False, "multiply_adds") for measure in others]
        methods: tuple[Method, ...] = ("optimal", "geometric")
        return [
            self.sweep(method=method, measure=measure, scaled=scaled, cost=cost)
            for measure, scaled, cost in ways
            for method in methods
        ]

    @cached_property
    def failure_prediction(self) -> list[FailurePrediction]:
        """Every measure at every exit, on the test images; the learned one where there are calibration images."""
        measures: list[AnyMeasure] = [*MEASURES, *HISTORY_MEASURES]
        scorings = [
            Scoring(measure) if self.calibration is None else fit_scoring(self.calibration, measure)
            for measure in measures
            if measure != "learned" or self.calibration is not None
        ]
        return [
            one for scoring in scorings for one in failure_prediction(scoring.measure, scoring(self.test), self.test)
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
            # By it a comparison knows which images the report is about.
            "data": self.index.fingerprint[:12],
            "images": self.images,
            "unreadable": self.unreadable,
            "precision": self.precision,
            "exits": numbered,
            "ensemble": [{"exit": m, **asdict(one)} for m, one in enumerate(self.ensemble, start=1)],
            "temperatures": None if self.calibration is None else temperatures_at(self._temperatures),
            "budgeted": [asdict(sweep) for sweep in self.sweeps],
            "failure_prediction": [asdict(one) for one in self.failure_prediction],
            "guarantee": None if self.guarantee is None else self.guarantee.to_json(),
            "shift": [one.to_json() for one in self.shift],
            "diagnostics": {
                "agreement": found.agreement.tolist(),
                "joint_errors": found.joint_errors.tolist(),
                "correct_then_wrong": found.correct_then_wrong.tolist(),
                "uniquely_correct": found.uniquely_correct_images,
                "confusions": [
                    {"class": self.index.classes[true], "taken_for": self.index.classes[taken], "images": images}
                    for true, taken, images in found.confusions
                ],
            },
            "timing": None if self.timing is None else asdict(self.timing),
            "notes": self.notes,
            "outcomes": pack(self.outcomes),
        }

    @property
    def outcomes(self) -> NDArray[np.uint8]:
        """[N, M] of all N images of the split by their ids, see :mod:`dist_train.tracking.outcomes`."""
        outcomes = np.full((len(self.index), len(self.exits)), UNCOUNTED, dtype=np.uint8)
        # Images without a label, and unreadable ones, are no samples, and stay uncounted.
        outcomes[self.samples.ids] = np.where(correct(self.samples), RIGHT, WRONG)
        return outcomes

    @cached_property
    def _temperatures(self) -> NDArray[np.int64]:
        assert self.calibration is not None
        return fit_temperatures(self.calibration)

    def _point(
        self,
        given: float,
        thresholds: NDArray[np.float32],
        costs: NDArray[np.float64],
        scores: tuple[NDArray[np.float32], NDArray[np.float32]],
        promise: crossfit.Fitted | None = None,
    ) -> BudgetPoint:
        """``scores`` are those of the calibration and of the test images."""
        assert self.calibration is not None
        fitted = budget.outcome(scores[0], correct(self.calibration), costs, thresholds)
        tested = budget.outcome(scores[1], correct(self.test), costs, thresholds)
        expected: dict[str, Any] = {}
        if promise is not None:
            # Every image is held out in one fold, so the hits of all folds are out of all images.
            images, reach = len(self.calibration), 1.96 * promise.deviation
            expected = {
                "expected_cost": promise.cost,
                "expected_cost_interval": (promise.cost - reach, promise.cost + reach),
                "expected_top1": promise.hits / images,
                "expected_top1_interval": interval(promise.hits, images),
            }
        return BudgetPoint(
            budget=float(given),
            cost=tested.cost,
            top1=tested.accuracy,
            top1_interval=interval(tested.hits, len(self.test)),
            calibration_cost=fitted.cost,
            calibration_top1=fitted.accuracy,
            thresholds=finite(thresholds),
            shares=tested.shares.tolist(),
            **expected,
        )


def _most_expensive(thresholds: NDArray[np.float32], spent: list[float], limit: float) -> NDArray[np.float32]:
    """The most expensive thresholds within a limit; all images at the first exit, where none keeps to it."""
    # A sum of costs may miss by rounding a limit that it equals.
    within = [index for index, cost in enumerate(spent) if cost <= limit * (1 + 1e-9)]
    if not within:
        return np.full(thresholds.shape[1], ALWAYS, dtype=np.float32)
    row: NDArray[np.float32] = thresholds[max(within, key=lambda index: spent[index])]
    return row
