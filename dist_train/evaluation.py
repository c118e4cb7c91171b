"""Evaluation: every image of a split exactly once on any number of ranks, every exit on every image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dist_train.dist import Group, Ranks
from dist_train.engine import autocast
from dist_train.loss import ExitDistillation, ExitStats
from dist_train.metrics import exit_metrics

if TYPE_CHECKING:
    from dist_train.data.pipeline import Loader
    from dist_train.models.cost import ExitCost

REPORT_FORMAT = 1


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


def evaluate(path: str | Path, split: str | None = None, shards: str | Path | None = None) -> Evaluation:
    """Evaluate a run (its best checkpoint) or one checkpoint on all ranks of the environment.

    Args:
        path: run folder, or a folder ``checkpoints/step-N``.
        split: split of the shards (default: the run's ``data.val``).
        shards: folder of the shards (default: the run's).

    Raises:
        UserError: no such checkpoint or split, or shards of other classes.
    """
    from dist_train import checkpoint
    from dist_train.data.pipeline import Loader
    from dist_train.errors import DataError
    from dist_train.preflight import open_split

    path = checkpoint.resolve(path)
    state, config = checkpoint.read_state(path)
    data = config.data.model_copy(update={"shards": Path(shards)} if shards else {})
    split = split or data.val
    index = open_split(data, split)
    if list(index.classes) != state.classes:
        raise DataError(
            f"{data.shards}/{split}: its classes are not those of {path}; evaluate on shards of the same classes"
        )
    ranks = Ranks.from_env()
    model = checkpoint.load_model(path)
    group = Group(ranks, config.faults.group_minutes)
    loader = Loader(
        index, data.shards / split, data, train=False, seed=config.seed, global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch, rank=ranks.rank, world_size=ranks.world_size, device=group.device,
        threads=data.threads or ranks.threads,
    )  # fmt: skip
    try:
        criterion = ExitDistillation.from_config(config.loss, cast(int, model.num_exits)).to(group.device)
        result = Evaluator(model, loader, group, criterion, config.train.precision).run()
        assert result is not None
        return result
    finally:
        loader.close()


def table(evaluation: Evaluation, costs: Sequence[ExitCost]) -> str:
    """A text table with one line per exit: multiply-adds, top-1, top-5."""
    lines = [f"{'exit':>4}  {'multiply-adds':>13}  {'top-1 %':>7}  {'top-5 %':>7}"]
    for number, (result, cost) in enumerate(zip(evaluation.exits, costs), start=1):
        lines.append(
            f"{number:>4}  {f'{cost.macs / 1e6:.2f} M':>13}  {100 * result.top1:>7.2f}  {100 * result.top5:>7.2f}"
        )
    return "\n".join([*lines, f"{evaluation.images} images, each once" + _unreadable(evaluation)])


def write_report(path: Path, evaluation: Evaluation, costs: Iterable[ExitCost], step: int) -> None:
    """Write ``report.json``: one object per exit, with its cost in multiply-adds, whole or not at all."""
    exits = [
        {"exit": number, "multiply_adds": cost.macs, "parameters": cost.params, **asdict(result)}
        for number, (result, cost) in enumerate(zip(evaluation.exits, costs), start=1)
    ]
    report = {"format": REPORT_FORMAT, "step": step, "images": evaluation.images, "unreadable": evaluation.unreadable}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(report | {"exits": exits}, indent=1))
    os.replace(draft, path)


def _unreadable(evaluation: Evaluation) -> str:
    return f"; {evaluation.unreadable} unreadable ones not counted" if evaluation.unreadable else ""
