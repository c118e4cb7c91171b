"""Budgets as people write them, and the thresholds of a report that keep to one."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import CheckpointError, ConfigError, UserError
from dist_train.prediction import Thresholds
from dist_train.prediction.budget import all_digits
from dist_train.prediction.risk import RISKS
from dist_train.prediction.shares import Reference
from dist_train.training import checkpoint

COSTS = ("multiply_adds_lazy", "multiply_adds", "multiply_adds_public")
"""Costs in multiply-adds, that of early-exit inference first."""

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "ms": 1.0}
_FORM = re.compile(r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)\s*(k|M|G|ms)?\s*")


class Budget(NamedTuple):
    """An average cost per image: multiply-adds, or milliseconds."""

    amount: float
    in_milliseconds: bool


def parse_budget(text: str, option: str = "--budget") -> Budget:
    """Read ``12e6``, ``12M``, ``1.5G`` (multiply-adds per image) or ``3.5ms``; raises ConfigError for anything else."""
    match = _FORM.fullmatch(text)
    amount = float(match[1]) * _UNITS[match[2] or ""] if match else math.nan
    if match is None or not math.isfinite(amount):
        raise ConfigError(
            f"{option} is {text!r}; give multiply-adds per image such as 12e6 or 12M, or milliseconds such as 3.5ms"
        )
    return Budget(amount, match[2] == "ms")


class OperatingPoint(NamedTuple):
    """Thresholds of a report, the share of its test images that took each exit by them, and what the report promises of them."""

    policy: Thresholds
    reference: Reference
    promise: dict[str, Any]


def parse_budgets(text: str | None) -> list[float]:
    """Read several budgets in multiply-adds, ``12e6,20M,1.5G``; raises ConfigError for anything else."""
    budgets = [parse_budget(word, "--budgets") for word in text.split(",")] if text else []
    if any(budget.in_milliseconds for budget in budgets):
        raise ConfigError(f"--budgets is {text!r}; give multiply-adds per image such as 12e6,20M,1.5G")
    return [budget.amount for budget in budgets]


def point_for_budget(path: str | Path, budget: str) -> OperatingPoint:
    """The point of report.json whose average cost on the tested images is within a budget, and whose promise is the best.

    Args:
        path: run folder or checkpoint.
        budget: as :func:`parse_budget` reads it.

    Raises:
        ConfigError: no number, or below the cheapest point.
        CheckpointError: the run has no report with such points, or one of another checkpoint.
    """
    amount, in_time = parse_budget(budget)
    remedy = f"make it with `dist-train eval {path}{' --milliseconds' if in_time else ''}`"
    file, report = _report(path, remedy)
    with _as_this_version_writes_it(file, remedy):
        sweeps = report.get("budgeted", [])
        costs = ("milliseconds",) if in_time else COSTS
        cost = next((cost for cost in costs if any(sweep["cost"] == cost for sweep in sweeps)), None)
        points = [(point, sweep) for sweep in sweeps if sweep["cost"] == cost for point in sweep["points"]]
        if not points:
            raise CheckpointError(f"{file}: has no thresholds for a budget in {costs[0]}; {remedy}")
        within = [entry for entry in points if entry[0]["cost"] <= amount]
        if not within:
            cheapest = min(point["cost"] for point, _ in points)
            raise ConfigError(
                f"--budget is {budget}, but the cheapest point of {file} costs {all_digits(cheapest)} {cost}; give at least that"
            )
        # What held-out images promise before what the images of the fit did, which is too good to be true.
        promised = [entry for entry in within if entry[0].get("expected_top1") is not None]
        key = "expected_top1" if promised else "calibration_top1"
        # Of points that promise the same the cheapest one.
        point, sweep = max(promised or within, key=lambda entry: (entry[0][key], -entry[0]["cost"]))
        promise = {name: value for name, value in point.items() if name != "thresholds"} | {
            "budget": amount,
            "unit": cost,
            "precision": report["precision"],
        }
        reference = Reference(point.get("shares", []), sweep.get("images", 0))
        return OperatingPoint(_thresholds(point, sweep), reference, promise)


def point_for_risk(path: str | Path, risk: str) -> OperatingPoint:
    """The certified thresholds of report.json that keep to a risk.

    Args:
        path: run folder or checkpoint.
        risk: one of those that the report's guarantee is about.

    Raises:
        ConfigError: no such risk.
        CheckpointError: the run has no report with such a guarantee, or one of another checkpoint.
    """
    if risk not in RISKS:
        raise ConfigError(f"--risk is {risk!r}; use one of {', '.join(RISKS)}")
    remedy = f"make it with `dist-train eval {path} --risk {risk} --epsilon 0.01 --delta 0.05`"
    file, report = _report(path, remedy)
    with _as_this_version_writes_it(file, remedy):
        found = report.get("guarantee")
        if found is None or risk not in [one["risk"] for one in found["risks"]]:
            raise CheckpointError(f"{file}: has no guarantee of {risk}; {remedy}")
        if found["thresholds"] is None:
            raise CheckpointError(f"{file}: {found['reason']}")
        promise = {name: value for name, value in found.items() if name not in ("thresholds", "weights", "shares")}
        promise["precision"] = report["precision"]
        return OperatingPoint(_thresholds(found, found), Reference(found["shares"], found["tested_images"]), promise)


@contextlib.contextmanager
def _as_this_version_writes_it(file: Path, remedy: str) -> Iterator[None]:
    """Another version, or the author of a published network, may have written something else."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{file}: is no report as this version writes it; {remedy}") from None


def _report(path: str | Path, remedy: str) -> tuple[Path, dict[str, Any]]:
    """report.json beside a checkpoint, and its content, which is of that checkpoint."""
    found = checkpoint.find(path)
    file = checkpoint.run_folder(found) / "report.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{file}: there is no report to take the thresholds from; {remedy}") from None
    meta, config = checkpoint.read_meta(found)
    step = meta.progress.step
    if not isinstance(report, dict):
        raise CheckpointError(f"{file}: is no report as this version writes it; {remedy}")
    # Thresholds that were fitted on other weights would promise what these do not keep.
    if report.get("step") != step:
        raise CheckpointError(f"{file}: is of step {report.get('step')}, the checkpoint of step {step}; {remedy}")
    # Reports of earlier versions do not say it: they were of the precision of the training.
    report.setdefault("precision", config.train.precision)
    return file, report


def _thresholds(point: dict[str, Any], measured: dict[str, Any]) -> Thresholds:
    # null stands for infinity, which JSON does not have: no image exits there.
    values = [math.inf if value is None else float(value) for value in point["thresholds"]]
    return Thresholds(values, measured["measure"], measured.get("temperatures"), measured.get("weights"))
