"""The verb `predict`: image files in, a class, its confidence, the exit and the time of each out."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dist_train import checkpoint
from dist_train.config import DataConfig
from dist_train.data.augment import parameters
from dist_train.data.decode import Decoder
from dist_train.dist import Ranks
from dist_train.engine import autocast
from dist_train.errors import CheckpointError, ConfigError, DataError
from dist_train.models.cost import exit_costs
from dist_train.policy import confidence
from dist_train.prediction import Patience, Policy, Predictions, Thresholds, at_exit, predict
from shards.images import Unreadable, encode

ENDINGS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
COSTS = ("multiply_adds_lazy", "multiply_adds", "multiply_adds_public")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "ms": 1.0}


@dataclass(frozen=True)
class FilePrediction:
    """One image file: its class, the probability of that class, the exit it left at (from 1), how long it waited."""

    image: str
    label: str
    confidence: float
    exit: int
    milliseconds: float


@dataclass(frozen=True)
class Saving:
    """What stopping saved, against running every image to the last exit."""

    shares: list[float]
    """Share of the images that left at each exit."""
    multiply_adds: float
    """Per image, on average, as ``iter_exits`` computes."""
    full_multiply_adds: int
    milliseconds: float
    """Per image, from a batch's tensor to its last result, divided by the batch; median over the batches."""
    full_milliseconds: float
    """The same of the whole network, on the 1st, 2nd, 4th, 8th, ... of these batches."""


def predict_files(known: argparse.Namespace) -> None:
    """Do what the parsed command line of `dist-train predict` asks for, and print it."""
    if known.measure and known.thresholds is None:
        raise ConfigError(f"--measure {known.measure} is what --thresholds are compared with; give them as well")
    if known.thresholds is not None:
        policy: Policy | None = Thresholds(_numbers(known.thresholds), known.measure or "max_probability")
    elif known.patience is not None:
        policy = Patience(known.patience)
    else:
        policy = policy_for_budget(known.run, known.budget) if known.budget is not None else None
    files = find_images(known.images)
    output = Path(known.output) if known.output else None
    if output and (output.is_dir() or not os.access(output.parent, os.W_OK)):  # said before the work, not after it
        raise DataError(f"{output}: cannot be written, it is a folder or in none; give another --output")
    predictor = Predictor(known.run, policy, known.batch)
    if known.exit is not None:
        predictor.policy = at_exit(known.exit, predictor.num_exits)
    done = []
    if not output:
        print(f"{'confidence':>10}  {'exit':>4}  {'ms':>8}  class  image")
    for p in predictor.run(files):
        done.append(p)
        if not output:
            print(f"{p.confidence:>10.4f}  {p.exit:>4}  {p.milliseconds:>8.2f}  {p.label}  {p.image}")
    for file, reason in predictor.unreadable:
        print(f"unreadable: {file}: {reason}", file=sys.stderr)
    if not done:
        raise DataError(f"none of the {len(files)} images can be read; see above")
    if output:
        write_csv(output, done)
    print(summary(predictor.saving(), len(done), len(predictor.unreadable)))


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if any(map(math.isnan, numbers)):
        raise ConfigError(f"--thresholds is {text!r}; give one number per exit, such as 0.9,0.8,0.7")
    return numbers


class Predictor:
    """A trained network, and the preparation of images that it was evaluated with.

    Args:
        path: run folder or checkpoint.
        policy: when an image may leave; None: at the last exit.
        batch: images that are computed together.
    """

    def __init__(self, path: str | Path, policy: Policy | None = None, batch: int = 1) -> None:
        if batch < 1:
            raise ConfigError(f"--batch is {batch}; it must be at least 1")
        path = checkpoint.resolve(path)
        state, config = checkpoint.read_state(path)
        ranks = Ranks.from_env()
        if ranks.device.type == "cpu":
            torch.set_num_threads(ranks.threads)
        self.network: nn.Module = checkpoint.load_model(path).to(ranks.device)
        self.num_exits = cast(int, self.network.num_exits)
        self.policy = policy or at_exit(self.num_exits, self.num_exits)
        self.policy.check(self.num_exits)
        self.unreadable: list[tuple[Path, str]] = []
        self._classes = state.classes
        self._data = config.data
        self._precision = config.train.precision
        self._batch = batch
        self._device = ranks.device
        self._decoder = _decoder(config.data, batch, ranks)
        self._single = _decoder(config.data, 1, ranks)
        self._costs = [cost.macs for cost in exit_costs(self.network, config.data.image_size, lazy=True)]
        self._full: list[float] = []
        self._times: list[float] = []
        self._exits: list[int] = []

    def run(self, files: Iterable[Path]) -> Iterator[FilePrediction]:
        """Predict file after file; those that cannot be read are left out and noted in ``unreadable``."""
        everything = at_exit(self.num_exits, self.num_exits)
        for number, (names, images) in enumerate(self._read(files), start=1):
            if number == 1:
                self._timed(images, everything)  # warms up
            result, milliseconds = self._timed(images, self.policy)
            self._times.append(milliseconds)
            if number & (number - 1) == 0:
                self._full.append(self._timed(images, everything)[1])
            self._exits += result.exits.tolist()
            rows = zip(
                names,
                result.classes.tolist(),
                confidence(result.logits).tolist(),
                result.exits.tolist(),
                result.milliseconds.tolist(),
            )
            for name, label, sure, exit_, waited in rows:
                yield FilePrediction(str(name), self._classes[label], sure, exit_ + 1, waited)

    def saving(self) -> Saving:
        """What was saved so far; some image must have been predicted."""
        counts = np.bincount(self._exits, minlength=self.num_exits)
        images = len(self._exits)
        return Saving(
            shares=(counts / images).tolist(),
            multiply_adds=float(counts @ np.array(self._costs, dtype=np.float64)) / images,
            full_multiply_adds=self._costs[-1],
            milliseconds=statistics.median(self._times),
            full_milliseconds=statistics.median(self._full),
        )

    def _timed(self, images: Tensor, policy: Policy) -> tuple[Predictions, float]:
        """The prediction for a batch, and its milliseconds per image."""
        start = time.perf_counter()
        with autocast(self._precision, self._device):
            result = predict(self.network, images, policy)
        return result, 1000 * (time.perf_counter() - start) / len(images)

    def _read(self, files: Iterable[Path]) -> Iterator[tuple[list[Path], Tensor]]:
        """Batches of the files that can be read, as evaluation prepares them."""
        names: list[Path] = []
        columns: list[dict[str, Any]] = []
        for file in files:
            try:
                columns.append(_prepare(file, self._data))
                names.append(file)
            except (OSError, Unreadable) as error:
                self._note(file, error)
            if len(names) == self._batch:
                yield from self._decode(names, columns)
                names, columns = [], []
        yield from self._decode(names, columns)

    def _decode(self, names: list[Path], columns: list[dict[str, Any]]) -> Iterator[tuple[list[Path], Tensor]]:
        if not names:
            return
        (images,) = self._decoder.run([_join(columns)])
        if not isinstance(images, Tensor):
            # One of them is damaged behind its header: the decoder refuses the batch, so it is taken image by image.
            singles = []
            for name, column in zip(list(names), columns):
                (image,) = self._single.run([_join([column])])
                if isinstance(image, Tensor):
                    singles.append((name, image.clone()))
                else:
                    self._note(name, "the decoder cannot read it")
            if not singles:
                return
            names, images = [name for name, _ in singles], torch.cat([image for _, image in singles])
        yield names, images.contiguous(memory_format=torch.channels_last)

    def _note(self, file: Path, reason: object) -> None:
        text = reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)
        self.unreadable.append((file, text))


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files that are named, and in named folders all images by their ending, in the order of their names.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and not file.is_dir())
            if not inside:
                raise DataError(f"{path}: holds no image; images end in {', '.join(ENDINGS)}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file; give images, or folders of images")
    return found


def policy_for_budget(path: str | Path, budget: str) -> Thresholds:
    """The thresholds of report.json whose average cost is within a budget, and that were best on the calibration images.

    Args:
        path: run folder or checkpoint.
        budget: multiply-adds per image such as ``12e6`` or ``12M``, or milliseconds such as ``3.5ms``.

    Raises:
        ConfigError: no number, or below the cheapest point.
        CheckpointError: the run has no report with such points, or one of another checkpoint.
    """
    match = re.fullmatch(r"([0-9.]+(?:[eE][-+]?\d+)?)(k|M|G|ms)?", budget)
    try:
        wanted = float(match[1]) * _UNITS[match[2] or ""] if match else -1.0
    except ValueError:
        wanted = -1.0
    if match is None or wanted < 0:
        raise ConfigError(
            f"--budget is {budget}; give multiply-adds per image such as 12e6 or 12M, or milliseconds such as 3.5ms"
        )
    checkpoint_path = checkpoint.resolve(path)
    file = checkpoint_path.parent.parent / "report.json"
    in_time = match[2] == "ms"
    remedy = f"make it with `dist-train eval {path}{' --milliseconds' if in_time else ''}`"
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{file}: there is no report to take the thresholds from; {remedy}") from None
    step = checkpoint.read_state(checkpoint_path)[0].position.step
    if report.get("step") != step:
        raise CheckpointError(f"{file}: is of step {report.get('step')}, the checkpoint of step {step}; {remedy}")
    groups = report.get("budgeted", [])
    kinds = ("milliseconds",) if in_time else COSTS
    kind = next((kind for kind in kinds if any(group["cost"] == kind for group in groups)), None)
    points = [(point, group) for group in groups if group["cost"] == kind for point in group["points"]]
    if not points:
        raise CheckpointError(f"{file}: has no thresholds for a budget in {kinds[0]}; {remedy}")
    within = [entry for entry in points if entry[0]["cost"] <= wanted]
    if not within:
        cheapest = min(point["cost"] for point, _ in points)
        raise ConfigError(
            f"--budget is {budget}, but the cheapest point of {file} costs {cheapest:.4g} {kind}; give at least that"
        )
    point, group = max(within, key=lambda entry: (entry[0]["calibration_top1"], -entry[0]["cost"]))
    values = [float("inf") if value is None else value for value in point["thresholds"]]
    return Thresholds(values, group["measure"], group.get("temperatures"))


def write_csv(path: Path, predictions: Sequence[FilePrediction]) -> None:
    """Write one line per image, whole or not at all; raises DataError where it cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", "class", "confidence", "exit", "milliseconds"])
    for p in predictions:
        writer.writerow([p.image, p.label, f"{p.confidence:.6f}", p.exit, f"{p.milliseconds:.3f}"])
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text.getvalue(), newline="")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another --output") from None


def summary(saving: Saving, images: int, unreadable: int) -> str:
    """Three lines: where the images left, what that saved, and what could not be read."""
    exits = "  ".join(f"{number}: {100 * share:.1f} %" for number, share in enumerate(saving.shares, start=1))
    less = 100 * (1 - saving.multiply_adds / saving.full_multiply_adds)
    return "\n".join(
        [
            f"{images} images" + (f", {unreadable} unreadable" if unreadable else "") + f"; left at exit  {exits}",
            f"{saving.multiply_adds / 1e6:.2f} M multiply-adds per image instead of {saving.full_multiply_adds / 1e6:.2f} M "
            f"with all exits: {less:.1f} % saved",
            f"{saving.milliseconds:.2f} ms per image instead of {saving.full_milliseconds:.2f} ms",
        ]
    )


def _decoder(data: DataConfig, batch: int, ranks: Ranks) -> Decoder:
    return Decoder(data, ("size", "anchor"), batch, ranks.device, data.threads or ranks.threads, depth=1)


def _prepare(file: Path, data: DataConfig) -> dict[str, Any]:
    """The decoder's columns for one file; what shards would store of it is what is decoded."""
    image = encode(file.read_bytes())
    size = np.array([[image.height, image.width]], dtype=np.int64)
    steps = parameters(data, False, 0, 0, np.zeros(1, dtype=np.int64), size)
    return {"raw": [np.frombuffer(image.data, dtype=np.uint8)], **steps}


def _join(columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    raw = [array for column in columns for array in column["raw"]]
    return {"raw": raw} | {name: np.concatenate([c[name] for c in columns]) for name in columns[0] if name != "raw"}
