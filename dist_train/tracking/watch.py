"""A run as its folder shows it to somebody who looks on, while it is written and after it has ended."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from dist_train.config import Config
from dist_train.config_file import load_config
from dist_train.distributed.lock import RunLock
from dist_train.errors import ConfigError
from dist_train.tracking.metrics import by_exit, read_new

LOOK_SECONDS = 1.0
"""Between two looks into the folder."""
PATIENCE_SECONDS = 60.0
"""How long a run that has stopped before our eyes is waited for: a scheduler may start it again."""
RECENT = 10
"""Lines of metrics that the time left is estimated from."""


class Moment(NamedTuple):
    """What a line of training metrics says, of all that change over time.

    ``top1`` is that of every exit, ``waiting`` the share of the time that was spent waiting for data.
    """

    batch: int
    loss: float
    top1: list[float]
    temperature: float
    images_per_second: float
    waiting: float


class Metrics(dict[str, float]):
    """Those of a line; what it does not have, as in a run of another version, is not a number."""

    def __missing__(self, name: str) -> float:
        return math.nan


class Watched:
    """What ``config.yaml`` and ``metrics.jsonl`` of a run say so far; :meth:`look` reads what is new.

    Attributes:
        config: None before the run has started.
        training: the newest line of training metrics, by name; empty before the first.
        validation: likewise, of the validation.
        best: highest ``val/mean_top1`` so far.
        moments: every line of training metrics.
        validations: the batch and the top-1 of every exit, of every validation.
        batch: global batches consumed, of the newest line.
        skipped: how many of them were skipped.
        running: whether a process trains in the folder, as far as can be seen from here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config | None = None
        self.running = False
        self._file: int | None = None
        self._config_written: int | None = None
        self._forget()

    def _forget(self) -> None:
        self.training = Metrics()
        self.validation = Metrics()
        self.best: float | None = None
        self.moments: list[Moment] = []
        self.validations: list[tuple[int, list[float]]] = []
        self.batch = 0
        self.skipped = 0
        self._of_training = 0
        self._last = Metrics()
        self._offset = 0

    def look(self) -> list[dict[str, Any]]:
        """Read what the run has written since the last look; the new lines of metrics.

        Raises:
            ConfigError: config.yaml is not one of a run.
        """
        # Before the file: a run that ends in between has written its last line by then.
        # On another host it is taken to run until its last line says otherwise.
        self.running = RunLock(self.folder).holder_lives() is not False
        self._look_at_config()
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                return self._take(file)
        except FileNotFoundError:
            return []

    def _look_at_config(self) -> None:
        """Every start of the run writes it, and may have changed the number of epochs."""
        path = self.folder / "config.yaml"
        try:
            written = path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if written != self._config_written:
            try:
                self.config, self._config_written = load_config(path), written
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None

    def _take(self, file: IO[bytes]) -> list[dict[str, Any]]:
        status = os.fstat(file.fileno())
        # A resume writes the file anew, without the lines after its checkpoint.
        if status.st_ino != self._file or status.st_size < self._offset:
            self._forget()
        self._file = status.st_ino
        entries, self._offset = read_new(file, self._offset)
        for entry in entries:
            entry["metrics"] = Metrics(entry["metrics"])
            self._add(entry)
        return entries

    def _add(self, entry: dict[str, Any]) -> None:
        self.batch, self._last = entry["batch"], entry["metrics"]
        self.skipped = self.batch - entry["step"]
        metrics = self._last
        if "train/loss" in metrics:
            self.training, self._of_training = metrics, self.batch
            self.moments.append(
                Moment(
                    self.batch,
                    metrics["train/loss"],
                    by_exit(metrics, "train", "top1"),
                    metrics["train/temperature"],
                    metrics["speed/images_per_second"],
                    metrics["speed/waiting_for_data"],
                )
            )
        if "val/mean_top1" in metrics:
            self.validation = metrics
            self.validations.append((self.batch, by_exit(metrics, "val", "top1")))
            self.best = max(metrics["val/mean_top1"], self.best or 0.0)

    @property
    def losses(self) -> list[float]:
        """``train/loss`` of every line."""
        return [one.loss for one in self.moments]

    @property
    def total(self) -> int | None:
        """Global batches of the whole run; None before the first line of training metrics."""
        if self.config is None or not self.training.get("train/epoch", 0.0) > 0:
            return None
        train = self.config.train
        # The steps of an epoch are not written down, but a line has its batch and its epoch.
        batches = round(train.epochs * self._of_training / self.training["train/epoch"])
        # A skipped step does not count towards max_steps.
        return min(batches, train.max_steps + self.skipped) if train.max_steps else batches

    @property
    def finished(self) -> bool:
        """Whether the run has written its last line, the validation at its end."""
        return self.total is not None and self.batch >= self.total and "val/mean_top1" in self._last

    @property
    def seconds_left(self) -> float | None:
        """By the speed of the last lines, without validations; None where nothing was measured yet."""
        speeds = [one.images_per_second for one in self.moments[-RECENT:] if one.images_per_second > 0]
        if not speeds or self.total is None or self.config is None:
            return None
        images = (self.total - self.batch) * self.config.train.global_batch
        # Seconds per image are averaged, not the rates, since every line is over about as many images.
        return images * sum(1 / speed for speed in speeds) / len(speeds)

    @property
    def state(self) -> str:
        """In words."""
        if self.finished:
            return "finished"
        if self.config is None:
            return "has not started"
        if not self.running:
            return f"stopped at step {self.batch}; the command that started it resumes it"
        return "training" if self.training else "starting"


def follow(folder: Path) -> Iterator[tuple[Watched, list[dict[str, Any]]]]:
    """Look into a run folder again and again until the run has ended: what it says so far, and its new lines.

    A folder that is not there yet is waited for, and so is, for a while, a run that stops meanwhile.

    Raises:
        ConfigError: as :meth:`Watched.look`.
    """
    watched, seen_running = Watched(folder), -math.inf
    while True:
        entries = watched.look()
        now = time.monotonic()
        yield watched, entries
        if watched.running:
            seen_running = now
        if watched.finished or (watched.config and now - seen_running > PATIENCE_SECONDS):
            return
        time.sleep(LOOK_SECONDS)
