"""Evaluation during training: sums over every image of a split exactly once, on any number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dist_train.dist import Group
from dist_train.engine import autocast
from dist_train.loss import ExitDistillation, ExitStats
from dist_train.metrics import exit_metrics

if TYPE_CHECKING:
    from dist_train.data.pipeline import Loader
    from dist_train.models.cost import ExitCost

REPORT_FORMAT = 2


@dataclass(frozen=True)
class ExitResult:
    """One exit on a split: accuracies and cross-entropy over its labeled images, accuracies as shares of 1."""

    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """All exits on a split; ``images`` were counted, each once, ``unreadable`` could not be."""

    exits: list[ExitResult]
    images: int
    unreadable: int = 0

    @property
    def mean_top1(self) -> float:
        """Mean top-1 over the exits: by this the best checkpoint is chosen, as the method's authors do."""
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


class Evaluator:
    """Runs a plain copy of the network, so that evaluation knows nothing of ZeRO and leaves training untouched."""

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
    ) -> Evaluation | None:
        """Evaluate the split with these weights (or those that the network has); all ranks must call.

        None where ``stop``, asked at every micro batch, was true on any rank: all of them leave together.
        """
        if weights is not None:
            self.model.load_state_dict(weights)
        totals = ExitStats.zeros(self.criterion.num_exits, self.group.device).vector.double()
        self.group.enter("evaluation")
        for number, micro in enumerate(self.loader.evaluation()):
            if stop and number < self.loader.common_batches and self.group.agree(stop())[0]:
                return None
            self.group.enter("evaluation")
            with autocast(self.precision, self.group.device):
                logits = self.model(micro.images)
            totals += self.criterion(logits, micro.labels).stats.vector
        unreadable = torch.tensor([len(self.loader.bad)], dtype=torch.float64, device=self.group.device)
        totals = self.group.sum(torch.cat([totals, unreadable])).cpu()
        stats = ExitStats(totals[:-1], self.criterion.num_exits)
        metrics = exit_metrics(stats, "")
        results = [
            ExitResult(*(metrics[f"/exit{number + 1}/{name}"] for name in ("top1", "top5", "loss")))
            for number in range(stats.num_exits)
        ]
        return Evaluation(results, int(stats.labeled), int(totals[-1]))


def table(evaluation: Evaluation, costs: Sequence[ExitCost]) -> str:
    """A text table with one line per exit: multiply-adds, top-1, top-5."""
    lines = [f"{'exit':>4}  {'multiply-adds':>13}  {'top-1 %':>7}  {'top-5 %':>7}"]
    for number, (result, cost) in enumerate(zip(evaluation.exits, costs), start=1):
        lines.append(
            f"{number:>4}  {f'{cost.macs / 1e6:.2f} M':>13}  {100 * result.top1:>7.2f}  {100 * result.top5:>7.2f}"
        )
    return "\n".join([*lines, f"{evaluation.images} images, each once" + _unreadable(evaluation)])


def write_report(
    path: Path, evaluation: Evaluation, costs: Mapping[str, Sequence[float]], step: int, split: str, data: str
) -> None:
    """Write training's ``report.json``, whole or not at all; :mod:`dist_train.report.report` describes its format.

    Args:
        path: the file.
        evaluation: what was measured, on ``split``, whose fingerprint is ``data``, after ``step`` updates.
        costs: per kind of cost, that of every exit, see :func:`dist_train.models.cost.cost_columns`.
    """
    exits = [
        {"exit": number, **{name: values[number - 1] for name, values in costs.items()}, **asdict(result)}
        for number, result in enumerate(evaluation.exits, start=1)
    ]
    report = {
        "format": REPORT_FORMAT, "step": step, "split": split, "data": data[:12],
        "images": evaluation.images, "unreadable": evaluation.unreadable, "exits": exits,
    }  # fmt: skip
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1))
    os.replace(draft, path)


def _unreadable(evaluation: Evaluation) -> str:
    return f"; {evaluation.unreadable} unreadable ones not counted" if evaluation.unreadable else ""
