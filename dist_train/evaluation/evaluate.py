"""From a checkpoint to a report: every image of a split once, on all ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.checks import check_choice, check_kind
from dist_train.config import Config, DataConfig
from dist_train.data.pipeline import Loader
from dist_train.data.split import open_index, open_split
from dist_train.distributed.group import Group, Ranks
from dist_train.errors import CheckpointError, ConfigError, DataError, UserError
from dist_train.evaluation.corruptions import SEVERITIES, TABLE, corrupt
from dist_train.evaluation.guarantee import Request, guarantee
from dist_train.evaluation.report import Report
from dist_train.evaluation.samples import SampleCollector, Samples
from dist_train.evaluation.scores import fit_scoring
from dist_train.evaluation.shift import Shifted, shifted
from dist_train.evaluation.split import Ids, Images, balanced, check_disjoint, copies, without_copies
from dist_train.models import MultiExitNetwork
from dist_train.models.cost import cost_columns
from dist_train.precision import PRECISIONS, autocast
from dist_train.prediction.budget import check_budgets
from dist_train.prediction.risk import check_targets
from dist_train.prediction.stopping import for_inference
from dist_train.prediction.timing import Timing, fastest, read_timing
from dist_train.training import checkpoint
from shards.index import Index

log = logging.getLogger("dist_train")


@dataclass(frozen=True)
class _Calibration:
    """Where thresholds are fitted: on ``ids`` of ``split``, whose index is None where half of the test split is held out;
    ``fingerprint`` is the split's.
    """

    name: str
    split: str
    index: Index | None
    ids: Ids
    notes: list[str]
    fingerprint: str


def evaluate(
    path: str | Path,
    split: str | None = None,
    shards: str | Path | None = None,
    calibration: str | None = None,
    *,
    milliseconds: bool = False,
    cost: str | Path | None = None,
    budgets: Sequence[float] = (),
    clamp: bool = False,
    request: Request | None = None,
    shift: bool = False,
    precision: str | None = None,
) -> Report:
    """Evaluate a run (its best checkpoint), a checkpoint or a folder of weights on all ranks of the environment.

    Args:
        path: run folder, a folder ``checkpoints/step-N``, or one with model.safetensors, config.yaml and state.json.
        split, shards: split of the shards, and their folder (default: the run's ``data.val`` and its shards).
        calibration: split on which thresholds and temperatures are fitted, on as many images of every class.  Default: the
            run's ``data.val`` where another split is tested, else that split.  Of the split that is tested it is half, chosen
            by the SHA-256 of their names; budgets are then tested on the other ones, exits on all.
        milliseconds: also measure the time per image and exit, one image at a time, as prediction computes it.
        cost: take the times from this file of ``dist-train bench predict --json`` instead.
        budgets, clamp: what :meth:`Report.budgeted` will be asked for: where it would refuse, that is before any image is read.
        request, shift: risks to guarantee, on the calibration images; whether to measure the split under corruptions as well.
        precision: of the arithmetic, fp32, bf16 or fp16 (default: that of the training); thresholds and guarantees hold for it.

    Returns: the same report on every rank.

    Raises:
        UserError: no such checkpoint, split or precision, a budget out of range, shards of other classes, a calibration split that is the
            training split or shares images with the split, a guarantee that cannot be, or a network that gives no numbers.
    """
    path, folder = checkpoint.find(path), checkpoint.run_folder(checkpoint.find(path))
    meta, trained = checkpoint.read_meta(path)
    config = _as_asked(trained, shards, precision)
    data, split = config.data, split or config.data.val
    index = _open(data, split, meta.classes, path)
    fitting = _choose_calibration(data, trained.data, split, index, calibration, meta.classes, path)
    model = checkpoint.load_model(path)
    costs: dict[str, list[float]] = cost_columns(model, data.image_size)
    check_budgets(budgets, np.array(costs["multiply_adds"]), "multiply_adds", clamp)
    timing = _given_times(cost, milliseconds, model.num_exits)
    fitted_on = Images(index if fitting.index is None else fitting.index, data, fitting.split)
    _check_calibration(fitting, bool(budgets) or shift, request, meta.fingerprint, fitted_on, trained.data)
    group = Group(Ranks.from_env(), config.faults.group_minutes)
    model = model.to(group.device).eval()
    samples = _measure(model, index, split, config, group)
    fitted, test = _parts(samples, fitting, model, config, group)
    timing = _time(model, config, group) if milliseconds else timing
    if timing is not None:
        costs["milliseconds"] = timing.milliseconds
    report = Report(
        folder=folder, checkpoint=path, step=meta.progress.step, split=split, index=index, costs=costs, samples=samples,
        test=test, calibration=fitted if len(fitted) else None, calibration_name=fitting.name, notes=fitting.notes, timing=timing,
        precision=config.train.precision,
    )  # fmt: skip
    if request:
        report = replace(report, guarantee=guarantee(request, fitted, test, costs, meta.classes, fitting.name))
    return replace(report, shift=_under_shift(report, model, config, group)) if shift else report


def _as_asked(trained: Config, shards: str | Path | None, precision: str | None) -> Config:
    """The configuration of the training with other shards and another precision, where they are given."""
    check_choice("precision", precision, (None, *PRECISIONS))
    data = DataConfig.model_validate(trained.data.model_dump() | ({"shards": shards} if shards else {}))
    train = trained.train.model_copy(update={"precision": precision or trained.train.precision})
    return trained.model_copy(update={"data": data, "train": train})


def _parts(
    samples: Samples, fitting: _Calibration, model: MultiExitNetwork, config: Config, group: Group
) -> tuple[Samples, Samples]:
    """The images that thresholds are fitted on, and those that they are tested on."""
    if fitting.index is None:
        held = np.isin(samples.ids, fitting.ids)
        return samples.select(held), samples.select(~held)
    fitted = _measure(model, fitting.index, fitting.split, config, group)
    return fitted.select(np.isin(fitted.ids, fitting.ids)), samples


def _under_shift(report: Report, model: MultiExitNetwork, config: Config, group: Group) -> list[Shifted]:
    """The test images as they are and under every corruption, by the guaranteed thresholds or those of half the range of costs."""
    assert report.calibration is not None
    if report.guarantee is not None and report.guarantee.certificate.thresholds is not None:
        scoring, thresholds = report.guarantee.scoring, report.guarantee.certificate.thresholds
        costs, targets = report.costs[report.guarantee.cost], report.guarantee.request.targets
    else:
        costs, targets = report.costs["multiply_adds"], []
        (point,) = report.budgeted([(costs[0] + costs[-1]) / 2])
        scoring = fit_scoring(report.calibration, "max_probability")
        thresholds = np.array([np.inf if value is None else value for value in point.thresholds], dtype=np.float32)
    found = [shifted("none", 0, report.test, scoring, thresholds, np.array(costs), targets)]
    for corruption in TABLE:
        for severity in SEVERITIES:
            samples = _measure(model, report.index, report.split, config, group, (corruption, severity))
            # Where half of the split calibrates, that half stays out here as well.
            tested = samples.select(np.isin(samples.ids, report.test.ids))
            found.append(shifted(corruption, severity, tested, scoring, thresholds, np.array(costs), targets))
    return found


def _check_calibration(
    fitting: _Calibration, wanted: bool, request: Request | None, fingerprint: str, images: Images, trained: DataConfig
) -> None:
    """Refuse, before any image is evaluated, what cannot be calibrated: without images, or on those of the training."""
    if (wanted or request is not None) and not len(fitting.ids):
        raise DataError(f"budgets, guarantees and --shift need calibration images; {fitting.notes[0]}")
    if request is not None:
        check_targets(request.targets, request.delta)
        if fitting.fingerprint == fingerprint:  # whatever their split is called
            raise DataError(
                f"{fitting.name} has the images that the network was trained on (fingerprint {fingerprint[:12]}), which say "
                "nothing about new ones; give another --calibration"
            )
    fitting.notes.extend(_trained_on(fitting, images, trained, refuse=request is not None))


def _trained_on(fitting: _Calibration, images: Images, trained: DataConfig, refuse: bool) -> list[str]:
    """A note about images that thresholds are fitted on and the network was trained on; a guarantee on such images is refused.

    Shards made anew, of a part or of more, have another fingerprint.
    """
    seen: set[int] = set()
    for data, split in trained.training_splits:
        try:
            seen |= set(copies(images, fitting.ids, Images(open_index(data, split), data, split)).tolist())
        except UserError as error:
            # The note becomes part of the report, which may be published; the reason names places of this machine.
            unknown = f"whether {fitting.name} has images that the network was trained on is not known"
            if refuse:
                log.warning("%s: %s", unknown, error)
            return [unknown] if refuse else []
    if not seen:
        return []
    said = (
        f"{len(seen)} of the {len(fitting.ids)} images of {fitting.name} that thresholds are fitted on were trained on"
    )
    if refuse:
        raise DataError(f"{said}, which say nothing about new ones; give another --calibration")
    return [f"budgets: {said}, where the network is surer than on new ones"]


def _exists(data: DataConfig, split: str) -> bool:
    place = data.location(split)
    if isinstance(place, Path):
        return (place / "index.json").exists()
    try:
        open_index(data, split)
    except DataError:
        # Not for a StorageError: a store that is down says nothing about what it has.
        return False
    return True


def _given_times(cost: str | Path | None, milliseconds: bool, exits: int) -> Timing | None:
    if milliseconds and cost is not None:
        raise ConfigError("milliseconds and cost are both given; one measures times, the other reads them")
    return None if cost is None else read_timing(cost, exits)


def _open(data: DataConfig, split: str, classes: list[str], path: Path) -> Index:
    check_kind("split", split, str, "give the name of a split")
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
    if name is None or name == split:
        half = balanced(index, share=0.5)
        ids = without_copies(Images(index, data, split), half)
        note = (
            f"budgets: thresholds fitted on {len(ids)} images of {split}, as many of every class, tested on the others"
        )
        if len(ids) < len(half):
            note += f"; {len(half) - len(ids)} were left out, of which the others have copies"
        if not len(ids):
            note = f"no budgets: {split} has a class with fewer than two labeled images; give --calibration a split"
        return _Calibration(f"half of {split}", split, None, ids, [note], index.fingerprint)
    # Resolved: another way to the same folder leads to the same images.
    if os.path.realpath(data.location(name)) in map(os.path.realpath, trained.training_locations):
        raise DataError(
            f"--calibration {name} is what the network was trained on, where it is surer than on new images; give another "
            f"one, or --calibration {split} to hold out half of it"
        )
    other = _open(data, name, classes, path)
    check_disjoint(Images(other, data, name), Images(index, data, split))
    ids = balanced(other)
    note = f"budgets: thresholds fitted on {len(ids)} images of {name}, as many of every class"
    if not len(ids):
        raise DataError(f"{data.shards}/{name}: has a class without labeled images; give another --calibration")
    return _Calibration(name, name, other, ids, [note], other.fingerprint)


@torch.inference_mode()
def _measure(
    model: MultiExitNetwork,
    index: Index,
    split: str,
    config: Config,
    group: Group,
    corruption: tuple[str, int] | None = None,
) -> Samples:
    """Every image of a split once, corrupted where a corruption and its severity are given, reduced to its rows; all ranks must
    call.
    """
    loader = Loader.of_run(config, index, group, split=split)
    table = SampleCollector(len(index))
    try:
        for micro in loader.evaluation():
            images = (
                micro.images if corruption is None else _corrupted(micro.images, micro.ids, config.data, corruption)
            )
            with autocast(config.train.precision, group.device):
                logits = model(images)
            table.add(micro.ids, micro.labels, logits)
        samples = table.join(group, model.num_exits, len(loader.bad))
    finally:
        loader.close()
    # No comparison with NaN is true: such an image would have rank 0, and count as right at that exit.
    lost = int((~torch.from_numpy(samples["loss"]).isfinite()).any(dim=1).sum())
    if lost:
        raise CheckpointError(
            f"the network gives logits that are not finite for {lost} of {len(samples)} images of {split}; "
            "evaluate an earlier checkpoint"
        )
    return samples


def _corrupted(images: Tensor, ids: Tensor, data: DataConfig, corruption: tuple[str, int]) -> Tensor:
    """Normalised images, made worse as what they were before."""
    mean, deviation = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (data.mean, data.std))
    worse = corrupt(images.float() * deviation + mean, ids.tolist(), *corruption)
    # In the layout in which the loader gives images.
    return ((worse - mean) / deviation).to(images.dtype).contiguous(memory_format=torch.channels_last)


def _time(model: MultiExitNetwork, config: Config, group: Group) -> Timing:
    """As rank 0 measures it; all ranks must call."""
    timing = None
    if group.ranks.rank == 0:
        size = config.data.image_size
        image = torch.zeros(1, 3, size, size, device=group.device).contiguous(memory_format=torch.channels_last)
        timing = fastest(for_inference(model, size), image, ("fp32", config.train.precision))
    timing = group.broadcast(timing)
    assert timing is not None
    return timing
