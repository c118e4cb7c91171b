"""A guarantee in a report: what was asked for, what is certified, and what the test images say about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.evaluation.accuracy import interval
from dist_train.evaluation.samples import Samples
from dist_train.evaluation.scores import Scoring, fit_scoring
from dist_train.prediction.confidence import AnyMeasure
from dist_train.prediction.risk import Certificate, Risk, Target, certify, fit_rows, losses


@dataclass(frozen=True)
class Request:
    """Risks to guarantee, all of them with probability at least 1 - ``delta``; see :mod:`dist_train.prediction.risk`."""

    targets: Sequence[Target]
    delta: float
    per_class: bool = False
    measure: AnyMeasure = "max_probability"


@dataclass(frozen=True)
class Measured:
    """A risk on images that had no part in the thresholds, with its interval of 95 %."""

    risk: Risk
    epsilon: float
    value: float
    value_interval: tuple[float, float]

    @property
    def broken(self) -> bool:
        """Whether the risk is above epsilon beyond what chance explains."""
        return self.value_interval[0] > self.epsilon


@dataclass(frozen=True)
class Guarantee:
    """A certificate, how confidence was measured for it, and its risks on the test images.

    ``saved`` is the share of the last exit's cost that the test images did not take.
    """

    request: Request
    certificate: Certificate
    scoring: Scoring
    cost: str
    calibration: str
    classes_left_out: list[str] | None
    images: int
    measured: list[Measured]
    top1: float
    saved: float

    def to_json(self) -> dict[str, Any]:
        """As in report.json."""
        found = self.certificate
        return {
            "delta": found.delta,
            "measure": self.scoring.measure,
            "temperatures": self.scoring.temperatures,
            "weights": self.scoring.weights,
            "cost": self.cost,
            "calibration": self.calibration,
            "fit_images": found.fit_images,
            "tested_images": found.tested_images,
            "images": self.images,
            "thresholds": None if found.thresholds is None else finite(found.thresholds),
            "shares": found.shares,
            "top1": self.top1,
            "saved": self.saved,
            "reason": found.reason,
            "needed": found.needed,
            "classes_left_out": self.classes_left_out,
            "risks": [
                {**asdict(bound), "value": one.value, "value_interval": one.value_interval}
                for bound, one in zip(found.bounds, self.measured)
            ],
        }

    def lines(self) -> list[str]:
        """In words: every risk, what is saved, and what there were too few images for."""
        found = self.certificate
        lines = [found.reason] if found.reason else []
        if found.thresholds is not None:
            bounds = "; ".join(
                f"{one.risk} at most {one.epsilon:g} (test images: {one.value:.4f}, 95 % {one.value_interval[0]:.4f} to "
                f"{one.value_interval[1]:.4f})"
                for one in self.measured
            )
            lines.append(
                f"guaranteed with probability {1 - found.delta:g} on images like those of {self.calibration}: {bounds}"
            )
            lines.append(
                f"which saves {100 * self.saved:.1f} % of the last exit's multiply-adds, top-1 {100 * self.top1:.2f} %"
            )
        if self.classes_left_out:
            shown = ", ".join(self.classes_left_out[:10]) + (", ..." if len(self.classes_left_out) > 10 else "")
            lines.append(
                f"too few images for a guarantee of their own have {len(self.classes_left_out)} classes: {shown}"
            )
        return lines


def guarantee(
    request: Request,
    calibration: Samples,
    test: Samples,
    costs: dict[str, list[float]],
    classes: Sequence[str],
    name: str,
) -> Guarantee:
    """Certify on the calibration images, and measure on the test images; a learned measure sees only the fit's part.

    Args:
        request: what to guarantee.
        calibration: images, from ``name``, that the network was not trained on.
        test: others.
        costs: columns of report.json.
        classes: names.
        name: of the calibration images, in words.
    """
    cost = "multiply_adds_lazy" if "multiply_adds_lazy" in costs else "multiply_adds"
    column = np.array(costs[cost], dtype=np.float64)
    # As certify divides them: a test on images that the measure was fitted on would promise too much.
    rows, _ = fit_rows(len(calibration))
    scoring = fit_scoring(calibration.select(rows), request.measure)
    found = certify(
        scoring.outputs(calibration),
        column,
        request.targets,
        request.delta,
        len(classes) if request.per_class else None,
    )
    thresholds = found.thresholds
    if thresholds is None:  # nothing is certified: what the last exit does is shown
        thresholds = np.full(len(column), math.inf, dtype=np.float32)
    measured = measure(request.targets, scoring, thresholds, test, column)
    # An epsilon is asked for, and plays no part in what is measured.
    top1, spent = (
        measure([Target(risk, 0.5)], scoring, thresholds, test, column)[0].value for risk in ("error", "cost")
    )
    names = None if found.classes_left_out is None else [classes[label] for label in found.classes_left_out]
    return Guarantee(request, found, scoring, cost, name, names, len(test), measured, 1 - top1, 1 - spent)


def measure(
    targets: Sequence[Target],
    scoring: Scoring,
    thresholds: NDArray[np.float32],
    samples: Samples,
    costs: NDArray[np.float64],
) -> list[Measured]:
    """The risks of these thresholds on some images: shares with exact intervals, differences and costs with normal ones."""
    outputs = scoring.outputs(samples)
    exits = outputs.exits(thresholds)
    found = []
    for risk, epsilon in targets:
        loss = losses(risk, outputs, exits, costs)
        value, images = float(loss.mean()), len(loss)
        if risk in ("consistency", "error"):
            # Losses of 0 or 1: exact, where a normal interval of images without a loss would have no width.
            low, high = interval(int(loss.sum()), images)
        else:
            # 1.96 is the 97.5 % quantile of the normal distribution.
            reach = 1.96 * float(loss.std()) / math.sqrt(images)
            low, high = value - reach, value + reach
        found.append(Measured(risk, epsilon, value, (low, high)))
    return found


def finite(thresholds: NDArray[np.float32]) -> list[float | None]:
    """Thresholds as JSON has them: null where no image exits."""
    return [None if math.isinf(value) else float(value) for value in thresholds]
