"""From a run to a folder that predicts by itself, compared with the network before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.pipeline import Loader
from dist_train.data.split import open_split
from dist_train.errors import ConfigError, DataError
from dist_train.evaluation.thresholds import OperatingPoint
from dist_train.export import policy as policies
from dist_train.export import runner
from dist_train.export.parity import compare
from dist_train.export.programs import versions, write_programs
from dist_train.export.readme import exit_milliseconds, readme_text
from dist_train.files import draft_folder_of
from dist_train.hub import is_address
from dist_train.models.cost import exit_costs
from dist_train.models.stages import StagedNetwork
from dist_train.training import checkpoint
from shards.index import Index

Format = Literal["onnx", "onnx-if"]
IMAGES = 1000
"""Images of the split, evenly spaced, that the programs are compared on."""
BATCH = 50


def export(
    path: str | Path,
    point: OperatingPoint,
    out: str | Path | None = None,
    shards: str | Path | None = None,
    format_: Format = "onnx",
) -> Path:
    """Write the folder of a run's network as ONNX programs, whole or not at all; the folder.

    Args:
        path: run folder (its best checkpoint) or checkpoint.
        point: when an image exits.
        out: the folder (default: ``export`` in the run folder); an export that is there is replaced.
        shards: folder of the shards that images to compare are taken from, of the split data.val (default: the run's).
        format_: ``onnx`` is a program per exit, ``onnx-if`` one graph that stops by itself.

    Raises:
        UserError: the network cannot be cut or expressed, the thresholds do not fit it, or the programs do
            not compute what the network computes.
    """
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
    try:
        with draft_folder_of(folder) as draft:
            programs = _write_programs(staged, point, data.image_size, draft, format_)
            policy = policies.content(point, costs, meta.classes, data, meta.progress.step, programs)
            shutil.copyfile(runner.__file__, draft / "predict.py")
            policies.write(draft, policy)
            exported = runner.EarlyExit(draft, threads=1)
            found = compare(network, point.policy, exported, _batches(data, index), data.val)
            policy |= {"parity": found.to_json(), "versions": versions()}
            times = exit_milliseconds(exported, np.zeros((1, 3, data.image_size, data.image_size), dtype=np.float32))
            (draft / "README.md").write_text(readme_text(policy, times), encoding="utf-8")
            policies.write(draft, policy)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); give another --out") from None
    return folder


def _write_programs(
    staged: StagedNetwork, point: OperatingPoint, image_size: int, folder: Path, format_: Format
) -> dict[str, Any]:
    """Their names, as in policy.json."""
    if format_ == "onnx":
        return {"stages": write_programs(staged, image_size, folder)}
    from dist_train.export.single_graph import write_single_graph  # imports onnx

    return {"graph": write_single_graph(staged, point.policy, image_size, folder)}


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


def _batches(data: DataConfig, index: Index) -> Iterator[tuple[Tensor, Tensor, list[bytes]]]:
    """Images as evaluation prepares them, their labels, and their files; raises DataError where a file cannot be read again."""
    samples = np.unique(np.linspace(0, len(index) - 1, min(IMAGES, len(index))).astype(np.int64))
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
            read = micro.ids >= 0
            if read.any():
                yield micro.images[read], micro.labels[read], [loader.encoded(one) for one in micro.ids[read].tolist()]
    except OSError as error:  # said here, where it is known to be about reading: export writes as well
        raise DataError(
            f"{data.shards}/{data.val}: an image cannot be read again ({error.strerror or error})"
        ) from None
    finally:
        loader.close()
