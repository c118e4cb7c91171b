"""The options by which `predict` and `export` are told when an image exits."""

from __future__ import annotations

import argparse
import math

from dist_train.errors import ConfigError
from dist_train.evaluation.thresholds import OperatingPoint, point_for_budget, point_for_risk
from dist_train.prediction.confidence import MEASURES
from dist_train.prediction.shares import Reference
from dist_train.prediction.stopping import Thresholds


def add_policy_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add ``--thresholds``, ``--budget``, ``--risk``, of which one can be given, and ``--measure``."""
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--thresholds", metavar="T,T,...", help="stop at the first exit whose confidence reaches its threshold"
    )
    policy.add_argument(
        "--budget", metavar="B", help="thresholds of report.json for a cost per image: 12e6, 12M, 3.5ms"
    )
    policy.add_argument(
        "--risk",
        metavar="NAME",
        help="the certified thresholds of report.json for a risk: gap, consistency, error or cost",
    )
    parser.add_argument(
        "--measure",
        # Not learned, whose weights only a report has.
        choices=(*MEASURES, "agreement", "patience"),
        help="what --thresholds are compared with (default: max_probability)",
    )
    return policy


def chosen_point(known: argparse.Namespace) -> OperatingPoint | None:
    """What these options choose for the run ``known.run``; None where none of them is given.

    Raises:
        UserError: values that do not fit together, or a report that has no such thresholds.
    """
    if known.measure and known.thresholds is None:
        raise ConfigError(f"--measure {known.measure} is what --thresholds are compared with; give them as well")
    if known.thresholds is not None:
        policy = Thresholds(_numbers(known.thresholds), known.measure or "max_probability")
        return OperatingPoint(policy, Reference([], 0), {})
    if known.budget is not None:
        return point_for_budget(known.run, known.budget)
    if known.risk is not None:
        return point_for_risk(known.run, known.risk)
    return None


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if any(map(math.isnan, numbers)):
        raise ConfigError(f"--thresholds is {text!r}; give one number per exit, such as 0.9,0.8,0.7")
    return numbers
