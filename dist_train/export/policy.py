"""``policy.json``: when an image exits, what that costs and promises, how images are prepared, and the hashes of the files."""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dist_train.config import Config
from dist_train.errors import ConfigError
from dist_train.evaluation.thresholds import OperatingPoint
from dist_train.files import sha256, write_whole
from dist_train.prediction.shares import ShareMonitor

FORMAT = 1
NAME = "policy.json"
FOLDER = "export"
"""Folder of an export, where nothing else is chosen."""


def content(
    point: OperatingPoint,
    costs: Sequence[int],
    classes: Sequence[str],
    config: Config,
    step: int,
    programs: Mapping[str, Any],
) -> dict[str, Any]:
    """All of policy.json but what is known when the programs have been compared.

    ``thresholds`` has one number per exit (null: no image leaves there; the last is not used), which ``measure`` of the logits,
    divided by ``temperatures`` where there are any, must reach. ``promise`` is what report.json says of these thresholds:
    budget and expected accuracy, or the guarantee, of the network in the ``precision`` in which it was evaluated, whatever
    that of the programs.  ``shares`` are the intervals that the shares of images per exit stay in while the images
    are of the same kind.  ``programs`` has ``runtime``, ``precision``, and ``stages``, the programs in order, or ``graph``, the one
    that stops by itself.
    """
    policy, data = point.policy, config.data
    # The last exit takes every image, so its threshold is null even where the policy has one.
    values = [*policy.values][: len(costs) - 1]
    return {
        "format": FORMAT,
        "step": step,
        **programs,
        "classes": list(classes),
        "measure": policy.measure,
        "thresholds": [_number(value) for value in values] + [None],
        "temperatures": policy.temperatures,
        "weights": policy.weights,
        "promise": point.promise or None,
        "shares": _shares(point),
        "costs": {"unit": "multiply_adds_lazy", "exits": list(costs)},
        "preprocessing": {
            "color": "RGB",
            "orientation": "as stored",
            "resize": data.eval_resize or data.image_size,
            "interpolation": "bilinear, antialiased",
            "crop": data.image_size,
            "scale": "0 to 1",
            "mean": data.mean,
            "std": data.std,
            "layout": "NCHW",
        },
    }


def write(folder: Path, policy: dict[str, Any]) -> None:
    """Write policy.json with the hashes of all other files of the folder, and its own over what it says."""
    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != NAME}
    unsigned = {key: value for key, value in policy.items() if key != "sha256"} | {"files": files}
    # As it will be read, with lists for tuples: the hash has to be that of the file's content.
    policy = json.loads(json.dumps(unsigned, allow_nan=False))
    # Sorted, as the runner does it too: the hash must not hang on the order of the keys.
    signed = hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()
    write_whole(folder / NAME, json.dumps(policy | {"sha256": signed}, indent=1) + "\n")


def _number(value: float) -> float | None:
    if value == math.inf:
        return None
    if value == -math.inf:  # JSON has no infinity, and no measure is below -1
        return -1.0
    return float(value)


def _shares(point: OperatingPoint) -> dict[str, Any] | None:
    if not point.reference.images:
        return None
    monitor = ShareMonitor(point.reference)
    return {
        "images": point.reference.images,
        "reference": list(point.reference.shares),
        "low": monitor.low.tolist(),
        "high": monitor.high.tolist(),
        "level": monitor.level,
    }


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's policy.json; raises ConfigError where there is none that can be read."""
    file = folder / NAME
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ConfigError(f"{file}: is damaged ({error}); export again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: is damaged; export again")
    return with_defaults(content)


def with_defaults(policy: Mapping[str, Any]) -> dict[str, Any]:
    """A policy with what exports were before they had a choice of it, and did not write down."""
    return {"runtime": "onnxruntime", "precision": "fp32", **policy}


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds something else than an export, which would be lost."""
    try:
        # Escaped: the names come from a file, and one that is * would let all of the folder be replaced.
        ours = {NAME, *map(glob.escape, json.loads((folder / NAME).read_bytes())["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    check_replaceable(folder, ours, "export")


def check_replaceable(folder: Path, ours: Iterable[str], kind: str) -> None:
    """Raise ConfigError for a folder that holds something else than what is replaced, which would be lost.

    Args:
        folder: which need not exist.
        ours: patterns of the names that may be in it.
        kind: what messages call a folder of these.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: exists and is no folder; give another --out")
    # Python leaves a __pycache__ behind where a file is imported.
    patterns = [*ours, "__pycache__"]
    for path in sorted(folder.iterdir()):
        if not any(fnmatchcase(path.name, pattern) for pattern in patterns):
            raise ConfigError(
                f"{folder}: exists and is no {kind} alone, {path.name} in it would be lost; give another --out"
            )
