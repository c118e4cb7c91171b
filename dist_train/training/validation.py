"""Validation during training: sums over every image of a split exactly once, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dist_train.data.pipeline import Loader
from dist_train.distributed.group import Group
from dist_train.errors import TrainingError
from dist_train.loss import ExitDistillation, ExitStats
from dist_train.precision import autocast
from dist_train.render.table import Table, millions
from dist_train.tracking.outcomes import RIGHT, WRONG, pack
from dist_train.training.meter import exit_metrics

REPORT_FORMAT = 2


@dataclass(frozen=True)
class ExitResult:
    """One exit on a split: accuracies and cross-entropy over its labeled images, accuracies from 0 to 1."""

    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class Validation:
    """All exits on a split: ``images`` were counted, each once; ``unreadable`` could not be read.

    ``outcomes`` [N, M] are those of :mod:`dist_train.tracking.outcomes`; None where they are not known.
    """

    exits: list[ExitResult]
    images: int
    unreadable: int = 0
    outcomes: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> Validation:
        """The exits that a report.json has."""
        exits = [ExitResult(one["top1"], one["top5"], one["loss"]) for one in report["exits"]]
        return cls(exits, report["images"], report["unreadable"])

    @property
    def mean_top1(self) -> float:
        """Mean top-1 over the exits, which chooses the best checkpoint, as in the authors' code."""
        return sum(result.top1 for result in self.exits) / len(self.exits)

    def metrics(self, prefix: str) -> dict[str, float]:
        """As metrics, grouped by exit (from 1)."""
        by_exit = {
            f"{prefix}/exit{number}/{name}": value
            for number, result in enumerate(self.exits, start=1)
            for name, value in asdict(result).items()
        }
        return by_exit | {f"{prefix}/mean_top1": self.mean_top1, f"{prefix}/images": float(self.images)}

    def line(self) -> str:
        """Top-1 of all exits in percent."""
        return " ".join(f"{100 * result.top1:.2f}" for result in self.exits)


class Validator:
    """Runs a plain copy of the network, so that evaluation is independent of ZeRO and cannot disturb training."""

    def __init__(
        self, model: nn.Module, loader: Loader, group: Group, criterion: ExitDistillation, precision: str
    ) -> None:
        self.model = model.to(group.device).eval()
        self.loader = loader
        self.group = group
        self.criterion = criterion
        self.precision = precision

    @torch.inference_mode()
    def run(
        self, weights: dict[str, torch.Tensor] | None = None, stop: Callable[[], bool] | None = None
    ) -> Validation | None:
        """Evaluate the split with these weights (or those that the network has); all ranks must call.

        None where ``stop``, asked at every micro batch, was true on any rank: all of them leave together.
        """
        if weights is not None:
            self.model.load_state_dict(weights)
        # In float64, so that the order of summation does not show in the logged digits.
        totals = ExitStats.zeros(self.criterion.num_exits, self.group.device).vector.double()
        # One row more, at index -1, for images without an id: to look for them would wait for the device.
        rows = (self.loader.images + 1, self.criterion.num_exits)
        outcomes = torch.zeros(rows, dtype=torch.uint8, device=self.group.device)
        self.group.phase("evaluation")
        for number, micro in enumerate(self.loader.evaluation()):
            # Ranks can have different numbers of batches; a collective is safe only in those that all of them have.
            if stop and number < self.loader.common_batches and self.group.any_rank(stop())[0]:
                return None
            self.group.phase("evaluation")
            with autocast(self.precision, self.group.device):
                logits = self.model(micro.images)
            totals += self.criterion(logits, micro.labels).stats.vector
            correct = torch.stack([one.argmax(1) for one in logits], 1) == micro.labels[:, None]
            outcomes[micro.ids] = torch.where(correct, RIGHT, WRONG).byte() * (micro.labels >= 0)[:, None]
        unreadable = torch.tensor([len(self.loader.bad)], dtype=torch.float64, device=self.group.device)
        # Sums, not means: ranks can have different numbers of images, and each image counts once.
        totals = self.group.sum(torch.cat([totals, unreadable])).cpu()
        stats = ExitStats(totals[:-1], self.criterion.num_exits)
        if stats.nonfinite:  # they are in no other sum: the accuracies would be those of the others alone
            raise TrainingError(
                f"validation: the network gives logits that are not finite for {int(stats.nonfinite)} of {int(stats.samples)} "
                "images; the last checkpoint is from before; lower optim.lr, or try train.precision fp32"
            )
        metrics = exit_metrics(stats, "")
        results = [
            ExitResult(*(metrics[f"/exit{number + 1}/{name}"] for name in ("top1", "top5", "loss")))
            for number in range(stats.num_exits)
        ]
        # Every image was on one rank, and is zero on the others.
        outcomes = self.group.sum(outcomes)[:-1].cpu()
        return Validation(results, int(stats.labeled), int(totals[-1]), outcomes.numpy())


def table(validation: Validation, multiply_adds: Sequence[float], num_classes: int) -> str:
    """A text table with one line per exit: multiply-adds, top-1, and top-5 where there are more than five classes."""
    rows = [
        [str(number), millions(macs), f"{100 * result.top1:.2f}", f"{100 * result.top5:.2f}"]
        for number, (result, macs) in enumerate(zip(validation.exits, multiply_adds), start=1)
    ]
    lost = f"; {validation.unreadable} unreadable ones not counted" if validation.unreadable else ""
    header = ["exit", "multiply-adds", "top-1 %", "top-5 %"]
    if num_classes <= 5:  # among which the label always is
        header, rows = header[:-1], [row[:-1] for row in rows]
    return f"{Table('', header, rows, names=0).text()}\n{validation.images} images, each once{lost}"


def report_json(validation: Validation, costs: Mapping[str, Sequence[float]], step: int, split: str, data: str) -> str:
    """Training's ``report.json``; :mod:`dist_train.evaluation.report` describes its format.

    Args:
        validation: what was measured, on ``split``, whose fingerprint is ``data``, after ``step`` updates.
        costs: per kind of cost, that of every exit, see :func:`dist_train.models.cost.cost_columns`.
    """
    exits = [
        {"exit": number, **{name: values[number - 1] for name, values in costs.items()}, **asdict(result)}
        for number, result in enumerate(validation.exits, start=1)
    ]
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "step": step,
        "split": split,
        "data": data[:12],
        "images": validation.images,
        "unreadable": validation.unreadable,
        "exits": exits,
    }
    if validation.outcomes is not None:
        report["outcomes"] = pack(validation.outcomes)
    return json.dumps(report, indent=1)
