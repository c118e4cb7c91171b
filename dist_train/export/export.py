"""From a run to a folder that predicts by itself, compared with the network before it gets its name."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.pipeline import Loader
from dist_train.data.split import open_split
from dist_train.errors import ConfigError, DataError
from dist_train.evaluation.thresholds import OperatingPoint
from dist_train.export import policy as policies
from dist_train.export import runner
from dist_train.export.formats import RUNTIMES, Form, Format, check_precision, open_export
from dist_train.export.parity import compare
from dist_train.export.programs import versions, write_programs
from dist_train.export.readme import exit_milliseconds, readme_text
from dist_train.files import draft_folder_of
from dist_train.hub import is_address
from dist_train.models.cost import exit_costs
from dist_train.models.stages import StagedNetwork
from dist_train.prediction.stopping import Thresholds
from dist_train.training import checkpoint
from shards.index import Index

IMAGES = 1000
"""Images of the split, evenly spaced, that the programs are compared on."""
CALIBRATION_IMAGES = 128
"""Others of them, evenly spaced, that int8 takes the ranges of activations from."""
BATCH = 50


def export(
    path: str | Path,
    point: OperatingPoint,
    form: Form,
    out: str | Path | None = None,
    shards: str | Path | None = None,
) -> Path:
    """Write the folder of a run's network as programs of another runtime, whole or not at all; the folder.

    Args:
        path: run folder (its best checkpoint) or checkpoint.
        point: when an image exits.
        form: format and precision of the programs.
        out: the folder (default: ``export`` in the run folder); an export that is there is replaced.
        shards: folder of the shards that images to compare are taken from, of the split data.val (default: the run's).

    Raises:
        UserError: the network cannot be cut or expressed, the thresholds do not fit it, the runtime does not have the precision, or
            the programs do not compute what the network computes.
    """
    check_precision(form.format, form.precision)
    folder = folder_for(path, out, policies.FOLDER)
    policies.check_folder(folder)
    path = checkpoint.find(path)
    meta, config = checkpoint.read_meta(path)
    data = DataConfig.model_validate(config.data.model_dump() | ({"shards": shards} if shards else {}))
    network = checkpoint.load_model(path)
    point.policy.check(network.num_exits)
    index = open_split(data, data.val)
    if list(index.classes) != meta.classes:
        raise DataError(f"{data.shards}/{data.val}: its classes are not those of {path}; give its own --shards")
    staged = network.staged(data.image_size)
    costs = [cost.macs for cost in exit_costs(network, data.image_size, lazy=True)]
    compared, others = _samples(len(index))
    try:
        with draft_folder_of(folder) as draft:
            images = _images(data, index, others) if form.precision == "int8" else None
            programs = _write(staged, data.image_size, point.policy, draft, form.format, images)
            programs |= {"precision": form.precision}
            policy = policies.content(point, costs, meta.classes, config, meta.progress.step, programs)
            # Once before the runner opens it, which checks all hashes, and once more with what it has measured.
            policies.write(draft, policy)
            exported = open_export(draft, threads=1)
            batches = _batches(data, index, compared)
            limit = None if form.precision == "fp32" else form.max_changed
            found = compare(network, point.policy, exported, batches, data.val, limit)
            policy |= {"parity": found.to_json(), "versions": versions(form.format)}
            times = exit_milliseconds(exported, np.zeros((1, 3, data.image_size, data.image_size), dtype=np.float32))
            (draft / "README.md").write_text(readme_text(policy, times), encoding="utf-8")
            policies.write(draft, policy)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); give another --out") from None
    return folder


@contextlib.contextmanager
def repackaged(
    folder: Path, path: str | Path, point: OperatingPoint, form: Form, shards: str | Path | None
) -> Iterator[tuple[Path, Path]]:
    """An export that is there for the time being, and a new folder for its content in another form, which appears whole or not at all.

    Args: ``folder`` is where the new one gets its name at the end, the others are those of :func:`export`.

    Raises:
        UserError: as :func:`export`.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, as all drafts are: a full /tmp is then not in the way, and a full disk is the one that is named.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as draft:
            exported = export(path, point, form, Path(draft) / policies.FOLDER, shards)
            with draft_folder_of(folder) as new:
                yield exported, new
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); give another --out") from None


def _write(
    staged: StagedNetwork,
    image_size: int,
    policy: Thresholds,
    folder: Path,
    format_: Format,
    images: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Write the programs and their runner; runtime and programs, as in policy.json.

    Args:
        staged: in float32.
        image_size: in pixels.
        policy: which the graph that stops by itself decides by.
        folder: to write into.
        format_: of the programs.
        images: [N, 3, S, S] to find ranges for int8; None: float32.
    """
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        # The other formats are made of the ONNX programs, which do not belong to them.
        place = folder if format_ == "onnx" else Path(draft)
        names = write_programs(staged, image_size, place)
        stages = [place / name for name in names]
        if images is not None:
            from dist_train.export.int8 import quantize  # imports onnxruntime's tools

            quantize(stages, images)
        text = Path(runner.__file__).read_text(encoding="utf-8")
        programs: dict[str, Any] = {"stages": names}
        if format_ == "onnx-if":
            from dist_train.export.single_graph import write_single_graph  # imports onnx

            programs = {"graph": write_single_graph(stages, policy, folder)}
        elif format_ == "openvino":
            from dist_train.export.openvino_runtime import runner_text, write_openvino

            programs, text = {"stages": write_openvino(stages, folder)}, runner_text()
    (folder / "predict.py").write_text(text, encoding="utf-8")
    return {"runtime": RUNTIMES[format_], **programs}


def folder_for(path: str | Path, out: str | Path | None, name: str) -> Path:
    """The folder to write: ``out``, else one of this name in the run folder; raises ConfigError where it may not be."""
    if out is None:
        if is_address(path):
            raise ConfigError(f"{path}: an export cannot be written there; give a folder of your own with --out")
        return checkpoint.run_folder(checkpoint.find(path)) / name
    folder = Path(out).resolve()
    if folder == Path.cwd():
        raise ConfigError(f"--out is {out}, the current folder, which an export would replace; give one of its own")
    return folder


def _samples(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which samples of a split are compared, and which are for calibration: others, but where there are too few."""
    every = np.arange(count)
    compared = _evenly(every, IMAGES)
    others = np.setdiff1d(every, compared)
    return compared, _evenly(others if len(others) >= CALIBRATION_IMAGES else every, CALIBRATION_IMAGES)


def _evenly(samples: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    chosen: NDArray[np.int64] = samples[
        np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(np.int64))
    ]
    return chosen


def _images(data: DataConfig, index: Index, samples: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images as evaluation prepares them, [N, 3, S, S]; raises DataError where none can be read."""
    found = [images.contiguous().numpy().copy() for images, _, _ in _batches(data, index, samples)]
    if not found:
        raise DataError(f"{data.shards}/{data.val}: none of its images can be read, so int8 has no ranges")
    return np.concatenate(found)


def _batches(
    data: DataConfig, index: Index, samples: NDArray[np.int64]
) -> Iterator[tuple[Tensor, Tensor, list[bytes]]]:
    """Images as evaluation prepares them, their labels, and their files; raises DataError where a file cannot be read again."""
    loader = Loader(
        index,
        data.location(data.val),
        data,
        train=False,
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        threads=1,
    )
    try:
        for micro in loader.evaluation(samples):
            # -1 is an image that could not be read.
            read = micro.ids >= 0
            if read.any():
                yield micro.images[read], micro.labels[read], [loader.encoded(one) for one in micro.ids[read].tolist()]
    except OSError as error:  # said here, where it is known to be about reading: export writes as well
        raise DataError(
            f"{data.shards}/{data.val}: an image cannot be read again ({error.strerror or error})"
        ) from None
    finally:
        loader.close()
