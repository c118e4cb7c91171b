"""The verb `predict`: image files in, a class, its confidence, the exit and the time of each out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.checks import check_choice, check_count, check_kind
from dist_train.config import DataConfig
from dist_train.data.augment import parameters
from dist_train.data.decode import Decoder, is_out_of_memory, machine_fault, words_of
from dist_train.distributed.group import Ranks
from dist_train.errors import ConfigError, DataError, DeviceError
from dist_train.models.cost import exit_costs
from dist_train.precision import PRECISIONS, autocast
from dist_train.prediction.confidence import confidence
from dist_train.prediction.shares import Reference, ShareMonitor
from dist_train.prediction.stopping import Policy, Predictions, at_exit, check_policy, for_inference, predict
from dist_train.prediction.timing import OtherWork, Timing, busy_warning, conditions, exit_within, fastest
from dist_train.training import checkpoint
from shards.images import Unreadable, encode
from shards.source import read_path, shown
from shards.tree import IMAGE_ENDINGS, is_image, look


@dataclass(frozen=True)
class FilePrediction:
    """One image file: its class, the probability of that class, the exit it took (from 1), how long it waited."""

    image: str
    label: str
    confidence: float
    exit: int
    milliseconds: float


@dataclass(frozen=True)
class Saving:
    """What stopping saved, against running every image to the last exit."""

    shares: list[float]
    """Share of the images that exited at each exit."""
    multiply_adds: float
    """Per image, on average, as ``iter_exits`` computes."""
    full_multiply_adds: int
    milliseconds: float
    """Per image, from a batch's tensor to its last result, divided by the batch; median over the batches."""
    full_milliseconds: float
    """The same of the whole network, on the 1st, 2nd, 4th, 8th, ... of these batches."""
    spread: float
    """Half of the distance between the quartiles of the milliseconds."""
    conditions: str
    """What the milliseconds depend on: precision, threads, batch, device."""
    warning: str
    """A line where other processes kept the machine busy meanwhile; empty otherwise."""


class Predictor:
    """A trained network, and the preparation of images that it was evaluated with.

    Args:
        path: run folder or checkpoint.
        policy: when an image may exit; None: at the last exit.
        batch: images that are computed together.
        reference: share of images that took each exit when the policy was tried out; where what comes differs from it,
            ``monitor`` says so.
        precision: fp32, bf16 or fp16; None: of fp32 and that of the training the one that is faster here.
        deadline_ms: instead of a policy: every image exits at the last exit that a batch reaches within so many
            milliseconds, as measured here at the start.
        expected: how many images will come, where that is known; for few of them the network is not cut, which takes seconds.

    Attributes:
        network: on its device, in evaluation mode, cut into stages where it can be (:func:`~dist_train.prediction.for_inference`).
        classes: names of the classes, in the order of the logits.
        unreadable: files that could not be read, and why.
    """

    def __init__(
        self,
        path: str | Path,
        policy: Policy | None = None,
        batch: int = 1,
        reference: Reference | None = None,
        precision: str | None = None,
        deadline_ms: float | None = None,
        expected: int | None = None,
    ) -> None:
        check_count("batch", batch)
        check_count("expected", expected or 0, least=0)
        check_kind("reference", reference, Reference | None, "give that of a point of a report, or None")
        check_kind("deadline_ms", deadline_ms, Real | None, "give milliseconds")
        batch = min(batch, expected or batch)  # the decoder and the timing allocate whole batches
        if deadline_ms is not None and policy is not None:
            raise ConfigError(f"a policy and a deadline of {deadline_ms:g} ms are given; give one of them")
        path = checkpoint.find(path)
        state, config = checkpoint.read_meta(path)
        ranks = Ranks.from_env()
        if ranks.device.type == "cpu":
            ranks.compute_on_cores()
        network = checkpoint.load_model(path).to(ranks.device)
        self.num_exits = network.num_exits
        self.policy = at_exit(self.num_exits, self.num_exits) if policy is None else policy
        check_policy(self.policy, self.num_exits)
        self.monitor = ShareMonitor(reference) if reference is not None and reference.images else None
        self.unreadable: list[tuple[Path, str]] = []
        self.classes: list[str] = list(state.classes)
        self._data = config.data
        self._batch = batch
        self._device = ranks.device
        self._decoder = _decoder(config.data, batch, ranks)
        self._single = _decoder(config.data, 1, ranks)
        self._costs = [cost.macs for cost in exit_costs(network, config.data.image_size, lazy=True)]
        self.network = for_inference(network, config.data.image_size, expected if deadline_ms is None else None)
        self._full: list[float] = []
        self._times: list[float] = []
        self._exits: list[int] = []
        check_choice("precision", precision, (None, *PRECISIONS))
        self.precision = precision or config.train.precision
        precisions = {precision or "fp32", self.precision}
        if len(precisions) > 1 or deadline_ms is not None:
            timing = self._fastest(sorted(precisions), repeats=5 if deadline_ms is None else 20)
            self.precision = timing.precision
            if deadline_ms is not None:
                self.policy = at_exit(exit_within(timing, deadline_ms), self.num_exits)
        self._others = OtherWork()

    def _fastest(self, precisions: Sequence[str], repeats: int) -> Timing:
        size = self._data.image_size
        images = torch.zeros(self._batch, 3, size, size, device=self._device)
        return fastest(self.network, images.contiguous(memory_format=torch.channels_last), precisions, repeats)

    def images(self, files: Iterable[str | Path]) -> Tensor:
        """What the network sees of files, as evaluation prepares it: float32 [N, 3, H, W], on the network's device.

        Files that cannot be read are left out and noted in ``unreadable``.
        """
        size = self._data.image_size
        # The decoder uses its memory again for the next batch.
        batches = [images.clone() for _, images in self._read(files)]
        return torch.cat(batches) if batches else torch.empty(0, 3, size, size, device=self._device)

    def run(self, files: Iterable[str | Path]) -> Iterator[FilePrediction]:
        """Predict file after file; those that cannot be read are left out and noted in ``unreadable``."""
        everything = at_exit(self.num_exits, self.num_exits)
        for number, (names, images) in enumerate(self._read(files), start=1):
            if number == 1:
                self._timed(images, everything)  # warms up
            result, milliseconds = self._timed(images, self.policy)
            self._times.append(milliseconds)
            # At the batches 1, 2, 4, 8, ...: to measure what was saved must not cost what was saved.
            if number & (number - 1) == 0:
                self._full.append(self._timed(images, everything)[1])
            self._exits += result.exits.tolist()
            if self.monitor is not None:
                self.monitor.add(result.exits.tolist())
            rows = zip(
                names,
                result.classes.tolist(),
                confidence(result.logits).tolist(),
                result.exits.tolist(),
                result.milliseconds.tolist(),
            )
            for name, label, confidence_, exit_, waited in rows:
                yield FilePrediction(shown(str(name)), self.classes[label], confidence_, exit_ + 1, waited)

    def saving(self) -> Saving:
        """What was saved so far; raises DataError where no image has been predicted."""
        counts = np.bincount(self._exits, minlength=self.num_exits)
        images = len(self._exits)
        if not images:
            raise DataError(
                "no image has been predicted yet, so nothing is known of what was saved; iterate over run()"
            )
        return Saving(
            shares=(counts / images).tolist(),
            multiply_adds=float(counts @ np.array(self._costs, dtype=np.float64)) / images,
            full_multiply_adds=self._costs[-1],
            milliseconds=statistics.median(self._times),
            full_milliseconds=statistics.median(self._full),
            spread=float(np.subtract(*np.percentile(self._times, [75, 25]))) / 2,
            conditions=conditions(self.precision, torch.get_num_threads(), self._batch, self._device.type),
            warning=busy_warning(self._others.share()),
        )

    def _timed(self, images: Tensor, policy: Policy) -> tuple[Predictions, float]:
        """The prediction for a batch, and its milliseconds per image."""
        start = time.perf_counter()
        with autocast(self.precision, self._device):
            result = predict(self.network, images, policy)
        return result, 1000 * (time.perf_counter() - start) / len(images)

    def _read(self, files: Iterable[str | Path]) -> Iterator[tuple[list[Path], Tensor]]:
        """Batches of the files that can be read, as evaluation prepares them."""
        if isinstance(files, str | Path) or not isinstance(files, Iterable):
            raise ConfigError(f"files is {files!r}; give a list of paths")
        names: list[Path] = []
        columns: list[dict[str, Any]] = []
        for given in files:
            check_kind("a file", given, str | Path, "give its path")
            file = Path(given)
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
                elif is_out_of_memory(image):  # the size is what the file itself says
                    raise DeviceError(machine_fault(image))
                else:
                    self._note(name, f"the decoder cannot read it ({words_of(image)})")
            if not singles:
                return
            names, images = [name for name, _ in singles], torch.cat([image for _, image in singles])
        yield names, images.contiguous(memory_format=torch.channels_last)

    def _note(self, file: Path, reason: object) -> None:
        text = reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)
        self.unreadable.append((file, text))


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files that are named, and in named folders those that shards would be made of, in the order of their names.

    Raises:
        DataError: a path does not exist, or a folder holds no image, or a link that leads nowhere or in a circle.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path / item.name for item in look(path).top.all_files() if is_image(item.name))
            if not inside:
                raise DataError(f"{path}: holds no image; images end in {', '.join(sorted(IMAGE_ENDINGS))}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file; give images, or folders of images")
    return found


def _decoder(data: DataConfig, batch: int, ranks: Ranks) -> Decoder:
    return Decoder(data, ("size", "anchor"), batch, ranks.device, data.decode_threads or ranks.threads, depth=1)


def _prepare(file: Path, data: DataConfig) -> dict[str, Any]:
    """The decoder's columns for one file; what shards would store of it is what is decoded."""
    image = encode(read_path(file))
    size = np.array([[image.height, image.width]], dtype=np.int64)
    # Not for training: seed, epoch and id, here 0, have no effect.
    steps = parameters(data, False, 0, 0, np.zeros(1, dtype=np.int64), size)
    return {"raw": [np.frombuffer(image.data, dtype=np.uint8)], **steps}


def _join(columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    raw = [array for column in columns for array in column["raw"]]
    return {"raw": raw} | {name: np.concatenate([c[name] for c in columns]) for name in columns[0] if name != "raw"}
