"""From a checkpoint to a report: every image of a split once, on all ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from dist_train import checkpoint
from dist_train.budget import check_budgets
from dist_train.config import Config, DataConfig
from dist_train.dist import Group, Ranks
from dist_train.engine import autocast
from dist_train.errors import CheckpointError, DataError
from dist_train.models.cost import cost_columns, measure_exits
from dist_train.report.report import Report
from dist_train.report.samples import Samples, Table
from dist_train.report.split import Ids, balanced, check_disjoint
from shards.index import Index


@dataclass(frozen=True)
class _Calibration:
    """Where thresholds are fitted: on ``ids`` of ``split``, whose index is None where half of the test split is held out."""

    name: str
    split: str
    index: Index | None
    ids: Ids
    notes: list[str]


def evaluate(
    path: str | Path,
    split: str | None = None,
    shards: str | Path | None = None,
    calibration: str | None = None,
    milliseconds: bool = False,
    budgets: Sequence[float] = (),
    clamp: bool = False,
) -> Report:
    """Evaluate a run (its best checkpoint), a checkpoint or a folder of weights on all ranks of the environment.

    Args:
        path: run folder, a folder ``checkpoints/step-N``, or one with model.safetensors, config.yaml and state.json.
        split: split of the shards (default: the run's ``data.val``).
        shards: folder of the shards (default: the run's).
        calibration: split on which thresholds and temperatures are fitted, on as many images of every class.  Default: the
            run's ``data.val`` where another split is tested, else half of the split's images, as many of every class, chosen
            by the SHA-256 of their names; budgets are then tested on the other ones, exits on all.
        milliseconds: also measure the time per image and exit, on rank 0, one image at a time.
        budgets: what :meth:`Report.budgeted` will be asked for: where it would refuse, that is before any image is read.
        clamp: as it will be given there.

    Returns:
        The same report on every rank.

    Raises:
        UserError: no such checkpoint or split, a budget out of range, shards of other classes, a calibration split that is
            the training split or shares images with the split, or a network that gives no numbers.
    """
    path, folder = checkpoint.resolve(path), checkpoint.run_folder(checkpoint.resolve(path))
    state, trained = checkpoint.read_state(path)
    data = DataConfig.model_validate(trained.data.model_dump() | ({"shards": shards} if shards else {}))
    config = trained.model_copy(update={"data": data})
    split = split or data.val
    index = _open(data, split, state.classes, path)
    fitting = _choose_calibration(data, trained.data, split, index, calibration, state.classes, path)
    ranks = Ranks.from_env()
    model = checkpoint.load_model(path)
    costs: dict[str, list[float]] = cost_columns(model, data.image_size)
    check_budgets(budgets, np.array(costs["multiply_adds"]), "multiply_adds", clamp)
    if budgets and not len(fitting.ids):
        raise DataError(f"budgets need calibration images; {fitting.notes[0]}")
    group = Group(ranks, config.faults.group_minutes)
    model = model.to(group.device).eval()
    samples = _measure(model, index, split, config, group)
    if fitting.index is None:
        held = np.isin(samples.ids, fitting.ids)
        fitted, test = samples.select(held), samples.select(~held)
    else:
        fitted = _measure(model, fitting.index, fitting.split, config, group)
        fitted, test = fitted.select(np.isin(fitted.ids, fitting.ids)), samples
    if milliseconds:
        costs["milliseconds"] = group.broadcast(_times(model, data.image_size) if ranks.rank == 0 else [])
    return Report(
        folder=folder, checkpoint=path, step=state.position.step, split=split, index=index, costs=costs, samples=samples,
        test=test, calibration=fitted if len(fitted) else None, calibration_name=fitting.name, notes=fitting.notes,
    )  # fmt: skip


def _exists(data: DataConfig, split: str) -> bool:
    folder = data.location(split)
    return isinstance(folder, Path) and (folder / "index.json").exists()


def _open(data: DataConfig, split: str, classes: list[str], path: Path) -> Index:
    from dist_train.preflight import open_split

    index = open_split(data, split)
    if list(index.classes) != classes:
        raise DataError(
            f"{data.shards}/{split}: its classes are not those of {path}; evaluate on shards of the same classes"
        )
    if not (index.label >= 0).any():
        raise DataError(f"{data.shards}/{split}: none of its images has a label; evaluate on a split with labels")
    return index


def _choose_calibration(
    data: DataConfig, trained: DataConfig, split: str, index: Index, given: str | None, classes: list[str], path: Path
) -> _Calibration:
    name = given
    if name is None and split != data.val and _exists(data, data.val):
        name = data.val
    if name is None:
        ids = balanced(index, share=0.5)
        note = (
            f"budgets: thresholds fitted on {len(ids)} images of {split}, as many of every class, tested on the others"
        )
        if not len(ids):
            note = f"no budgets: {split} has a class with fewer than two labeled images; give --calibration a split"
        return _Calibration(f"half of {split}", split, None, ids, [note])
    if name == split:
        raise DataError(
            f"--calibration {name} is the split that is tested; give another one, or none to hold out half of it"
        )
    if name == trained.train and os.path.realpath(data.location(name)) == os.path.realpath(trained.location(name)):
        raise DataError(
            f"--calibration {name} is what the network was trained on, where it is surer than on new images; give another "
            f"one, or none to hold out half of {split}"
        )
    other = _open(data, name, classes, path)
    check_disjoint(other, index, (name, split))
    ids = balanced(other)
    note = f"budgets: thresholds fitted on {len(ids)} images of {name}, as many of every class"
    if not len(ids):
        raise DataError(f"{data.shards}/{name}: has a class without labeled images; give another --calibration")
    return _Calibration(name, name, other, ids, [note])


@torch.inference_mode()
def _measure(model: nn.Module, index: Index, split: str, config: Config, group: Group) -> Samples:
    """Every image of a split once, reduced to its rows; all ranks must call."""
    from dist_train.data.pipeline import Loader

    loader = Loader.of_run(config, index, split, group, train=False)
    table = Table(len(index))
    try:
        for micro in loader.evaluation():
            with autocast(config.train.precision, group.device):
                logits = model(micro.images)
            table.add(micro.ids, micro.labels, logits)
        samples = table.join(group, cast(int, cast(Any, model).num_exits), len(loader.bad))
    finally:
        loader.close()
    lost = int((~torch.from_numpy(samples["loss"]).isfinite()).any(dim=1).sum())
    if lost:
        raise CheckpointError(
            f"the network gives logits that are not finite for {lost} of {len(samples)} images of {split}; "
            "evaluate an earlier checkpoint"
        )
    return samples


def _times(model: nn.Module, image_size: int) -> list[float]:
    return [time.milliseconds for time in measure_exits(model, image_size, batch=1)]
