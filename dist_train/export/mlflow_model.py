"""An export as a model of MLflow, in a folder and in the MLflow run of its training."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

from PIL import Image

from dist_train.errors import TrackingError
from dist_train.evaluation.thresholds import OperatingPoint
from dist_train.export import mlflow_loader
from dist_train.export import policy as policies
from dist_train.export.export import folder_for, repackaged
from dist_train.export.formats import RUNTIMES, Form
from dist_train.tracking.mirror import SyncState
from dist_train.tracking.mlflow import log_report, register_model, save_model, unusable
from dist_train.training import checkpoint

DATA = "data"
"""Where MLflow puts the export in a model's folder."""
FILES = ("MLmodel", "*.yaml", "*.json", "requirements.txt", "code", DATA)
"""Patterns of what MLflow writes into a model's folder."""
ARTIFACTS = "early_exit_model"
"""Folder of the model among the artifacts of its run."""
NEEDS = {"numpy": "numpy", "pandas": "pandas", "pillow": "PIL"}
"""What pip has to install beside the runtime, and its modules."""


def export_model(
    path: str | Path,
    point: OperatingPoint,
    form: Form,
    out: str | Path | None = None,
    shards: str | Path | None = None,
) -> Path:
    """Write the folder of a model that ``mlflow models serve`` serves, whole or not at all; the folder.

    Args: as of :func:`~dist_train.export.export.export`; the folder is ``mlflow-model`` in the run folder by default.

    Raises:
        UserError: as there.
    """
    folder = folder_for(path, out, "mlflow-model")
    _check_folder(folder)
    runtime = RUNTIMES[form.format]
    with repackaged(folder, path, point, form, shards) as (exported, model):
        size = policies.read(exported)["preprocessing"]["crop"]
        requirements = [f"{name}=={_version(module)}" for name, module in (NEEDS | {runtime: runtime}).items()]
        save_model(model, Path(mlflow_loader.__file__), exported, _grey_image(size), requirements)
    return folder


def _version(module: str) -> str:
    """As pip knows it: OpenVINO's own goes on with its build."""
    return str(importlib.import_module(module).__version__).partition("-")[0]


def log_model(path: str | Path, folder: Path, name: str | None = None) -> str:
    """Log a model's folder to the MLflow run of the training that it comes from; what came of it, in words.

    MLflow being away is no error, because the folder is there, unless a registered model is asked for.

    Args:
        path: run folder or checkpoint.
        folder: of the model.
        name: of the registered model whose next version it becomes; None for none.

    Raises:
        TrackingError: it cannot be registered.
    """
    found = checkpoint.find(path)
    run = checkpoint.run_folder(found)
    state = SyncState(run)
    known = state.read()
    uri, run_id = known.get("uri"), known.get("run_id")
    if uri is None or run_id is None or not state.belongs_to(run):
        if name is not None:
            raise TrackingError(f"{path}: not registered as {name}, because the run is not tracked in MLflow")
        return "not in MLflow: the run is not tracked there"
    files = [
        (file, (Path(ARTIFACTS) / file.parent.relative_to(folder)).as_posix())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    step = checkpoint.read_meta(found)[0].progress.step
    try:
        log_report(uri, run_id, {}, step, {ARTIFACTS: f"step {step}"}, files)
        registered = (
            "" if name is None else f"\nregistered  models:/{name}/{register_model(uri, run_id, ARTIFACTS, name)}"
        )
    except Exception as error:  # whatever MLflow raises
        if name is not None:
            raise TrackingError(f"{unusable(uri, error)}; not registered as {name}, the model is in {folder}") from None
        return f"{unusable(uri, error)}; the model is in its folder only"
    return f"in MLflow  runs:/{run_id}/{ARTIFACTS}{registered}"


def _check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds something else than such a model, which would be lost."""
    ours = FILES if (folder / DATA / policies.FOLDER / policies.NAME).is_file() else ()
    policies.check_replaceable(folder, ours, "model of an export")


def _grey_image(size: int) -> bytes:
    """An image file that shows nothing: an example of a request, and none of the data."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()
