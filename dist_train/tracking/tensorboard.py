"""A run for TensorBoard: event files with the scalars of ``metrics.jsonl``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import DataError
from dist_train.files import draft_folder_of
from dist_train.tracking.metrics import read_metrics

FOLDER = "tensorboard"
"""In the run folder."""


@dataclass(frozen=True)
class Written:
    """What :func:`write_events` left: the folder, and how many points of how many metrics are in it."""

    folder: Path
    points: int
    metrics: int


def write_events(run: Path) -> Written:
    """Write the event files of a run, in place of earlier ones, at the steps and times of metrics.jsonl.

    Args:
        run: run folder; it may be of a run that trains.

    Raises:
        DataError: tensorboard is not installed, there are no metrics, or the folder cannot be written.
    """
    try:
        import tensorboard  # noqa: F401  # torch's writer needs it, and says so in its own words
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DataError(
            f"tensorboard cannot be imported ({error}); install it with pip install dist-train[tensorboard]"
        ) from None
    path = run / "metrics.jsonl"
    try:
        entries = read_metrics(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a run folder, such as runs/NAME") from None
    points, names = 0, set()
    try:
        with draft_folder_of(run / FOLDER) as draft:
            # Closed before the folder gets its name, so that every point is in the file.
            with SummaryWriter(str(draft)) as writer:
                for entry in entries:
                    for name, value in entry["metrics"].items():
                        if math.isfinite(value):  # its charts would have holes in any case
                            writer.add_scalar(name, value, entry["step"], entry["t"] / 1000)
                            points += 1
                            names.add(name)
    except OSError as error:
        raise DataError(
            f"{run / FOLDER}: cannot be written ({error.strerror}); free space, or ask for the rights"
        ) from None
    return Written(run / FOLDER, points, len(names))
