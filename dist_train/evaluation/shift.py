"""What is left of a report where the images are worse than the calibration images: accuracy, cost, and broken guarantees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.evaluation.calibration import reliability
from dist_train.evaluation.guarantee import Measured, measure
from dist_train.evaluation.samples import Samples
from dist_train.evaluation.scores import Scoring
from dist_train.prediction.risk import Target


@dataclass(frozen=True)
class Shifted:
    """The test images under one corruption, by thresholds that were fitted without it; severity 0: as they are.

    ``exits`` are accuracies of every exit; ``ece`` is the last exit's; ``top1`` and ``cost`` (a share of the last exit's) are
    those of the thresholds, ``shares`` of the images that exit at each exit; ``risks`` those that were guaranteed.
    """

    corruption: str
    severity: int
    exits: list[float]
    ece: float
    top1: float
    cost: float
    shares: list[float]
    risks: list[Measured]

    @property
    def broken(self) -> list[str]:
        """Guarantees that do not hold here, beyond what chance explains."""
        return [one.risk for one in self.risks if one.broken]

    def to_json(self) -> dict[str, Any]:
        """As in report.json."""
        return {
            "corruption": self.corruption,
            "severity": self.severity,
            "exits": self.exits,
            "ece": self.ece,
            "top1": self.top1,
            "cost": self.cost,
            "shares": self.shares,
            "broken": self.broken,
            "risks": [
                {"risk": one.risk, "epsilon": one.epsilon, "value": one.value, "value_interval": one.value_interval}
                for one in self.risks
            ],
        }


def shifted(
    corruption: str,
    severity: int,
    samples: Samples,
    scoring: Scoring,
    thresholds: NDArray[np.float32],
    costs: NDArray[np.float64],
    targets: Sequence[Target],
) -> Shifted:
    """Measure thresholds on corrupted images.

    Args:
        corruption: its name.
        severity: 1 to 5.
        samples: the test images, corrupted.
        scoring: how confidence is measured.
        thresholds: float32 [M].
        costs: of an image by exit, [M].
        targets: what was guaranteed, if anything.
    """
    correct = samples["rank"] == 0
    exits = scoring.outputs(samples).exits(thresholds)
    counts = np.bincount(exits, minlength=len(costs))
    return Shifted(
        corruption=corruption,
        severity=severity,
        exits=correct.mean(axis=0).tolist(),
        ece=reliability(samples["max_probability"][:, -1], correct[:, -1]).error,
        top1=float(correct[np.arange(len(exits)), exits].mean()),
        # A share of the last exit's cost, as the risk of that name is.
        cost=float(counts @ costs) / len(exits) / float(costs[-1]),
        shares=(counts / len(exits)).tolist(),
        risks=measure(targets, scoring, thresholds, samples, costs),
    )
