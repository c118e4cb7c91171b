"""How long prediction takes to each exit: measured as :func:`predict` computes it, at the precision that is fastest here."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dist_train.errors import ConfigError, DataError
from dist_train.models.network import MultiExitNetwork
from dist_train.precision import autocast
from dist_train.prediction.stopping import Thresholds, predict

BUSY = 0.15
"""Share of the machine's processor time in the hands of other processes, above which times are called too long."""


@dataclass(frozen=True)
class Timing:
    """Times to each exit, and what they depend on."""

    milliseconds: list[float]
    """Per image, from the batch's tensor to the exit's decision: median over the repeats."""
    spread: list[float]
    """Half of the distance between the quartiles, in milliseconds per image."""
    precision: str
    threads: int
    batch: int
    device: str
    others: float
    """Share of the machine's processor time that other processes took meanwhile."""

    @property
    def conditions(self) -> str:
        """What the times depend on, in words."""
        return conditions(self.precision, self.threads, self.batch, self.device)

    @property
    def warning(self) -> str:
        """A line where the machine was busy; empty otherwise."""
        return busy_warning(self.others)


class OtherWork:
    """Processor time that other processes take from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Of the machine's processor time since then, 0 to 1."""
        busy, own, wall = (now - before for now, before in zip(self._now(), self._start))
        # busy and own are seconds summed over all cores, wall is not.
        return min(1.0, max(0.0, busy - own) / (max(wall, 1e-9) * (psutil.cpu_count() or 1)))

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guests' time is counted as users' time as well.
        whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own = os.times()
        return whole - idle, own.user + own.system, time.perf_counter()


def conditions(precision: str, threads: int, batch: int, device: str) -> str:
    """What a time depends on, in words, for instance ``bf16, 2 threads, batch 1, cpu``."""
    return f"{precision}, {threads} thread{'s' if threads != 1 else ''}, batch {batch}, {device}"


def busy_warning(others: float) -> str:
    """A line for times that were measured on a busy machine; empty where it was not."""
    if others <= BUSY:
        return ""
    return (
        f"other processes took {100 * others:.0f} % of the processor meanwhile: the times are too long, measure again"
    )


def fastest(network: MultiExitNetwork, images: Tensor, precisions: Sequence[str], repeats: int = 20) -> Timing:
    """Time every exit of a network in evaluation mode at each precision, in turns; those of the fastest to the last exit.

    Args:
        network: on the device of ``images``.
        images: a batch, float [N, 3, H, W].
        precisions: among fp32, bf16 and fp16; given twice, one is timed once.
        repeats: passes at each, after one that warms up.
    """
    work = OtherWork()
    passes: dict[str, list[list[float]]] = {precision: [] for precision in precisions}
    # In turns, so that what disturbs the machine disturbs all precisions alike.
    for number in range(repeats + 1):
        for precision, times in passes.items():
            taken = _times(network, images, precision)
            if number:
                times.append(taken)
    # By the time to the last exit, of which the times to the others are parts.
    precision = min(passes, key=lambda one: statistics.median(taken[-1] for taken in passes[one]))
    quartiles = [statistics.quantiles(exit_times, n=4) for exit_times in zip(*passes[precision])]
    return Timing(
        [middle for _, middle, _ in quartiles],
        [(upper - lower) / 2 for lower, _, upper in quartiles],
        precision,
        torch.get_num_threads(),
        len(images),
        images.device.type,
        work.share(),
    )


def exit_within(timing: Timing, deadline_ms: float) -> int:
    """The last exit, from 1, whose median time and half of the distance between its quartiles fit into a deadline in milliseconds.

    Raises:
        ConfigError: there is none, or the deadline is no number above 0.
    """
    if not deadline_ms > 0:
        raise ConfigError(f"the deadline is {deadline_ms} ms; it must be above 0")
    # Times are per image, but an image waits for all of its batch.
    times = [timing.batch * (middle + spread) for middle, spread in zip(timing.milliseconds, timing.spread)]
    within = [number for number, time_ in enumerate(times, start=1) if time_ <= deadline_ms]
    if not within:
        raise ConfigError(
            f"the deadline is {deadline_ms:g} ms, but exit 1 takes {times[0]:.3g} ms here ({timing.conditions}); allow more"
        )
    return within[-1]


def read_timing(path: str | Path, exits: int) -> Timing:
    """Times that ``dist-train bench predict --json`` wrote: of its smallest batch, fewest threads, and there the fastest runtime.

    Args:
        path: of the file.
        exits: of the network, M.

    Raises:
        DataError: it is no such file, or one of a network with another number of exits.
    """
    try:
        content = json.loads(Path(path).read_text())
        found = min(content["combinations"], key=lambda one: (one["batch"], one["threads"], _slowest(one["rows"])))
        rows = [row for row in found["rows"] if row["kind"] == "exit"]
        # An image that goes further never costs less, whatever the noise of the measurement says.
        times = list(itertools.accumulate((row["p50"] / found["batch"] for row in rows), max))
        spread = [row["spread"] / found["batch"] for row in rows]
        device = f"cpu, {found['runtime']}"
        timing = Timing(times, spread, found["precision"], found["threads"], found["batch"], device, found["others"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is not a file that `dist-train bench predict RUN --json {path}` writes") from None
    if len(times) != exits:
        raise DataError(f"{path}: has the times of {len(times)} exits, the network has {exits}; measure this network")
    return timing


def _slowest(rows: Sequence[dict[str, Any]]) -> float:
    """The time to the last exit."""
    return max(float(row["p50"]) for row in rows if row["kind"] == "exit")


@dataclass(frozen=True)
class _Stopwatch(Thresholds):
    """Thresholds that no image reaches, and when each exit had been decided on."""

    times: list[float] = field(default_factory=list)

    def should_exit(self, number: int, logits: Tensor, classes: Tensor) -> Tensor:
        decided = super().should_exit(number, logits, classes)
        decided.any().item()  # waits for the device
        self.times.append(time.perf_counter())
        return decided


def _times(network: MultiExitNetwork, images: Tensor, precision: str) -> list[float]:
    """Milliseconds per image from the batch to every exit in one pass, rising."""
    watch = _Stopwatch([float("inf")] * (network.num_exits - 1))
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    with autocast(precision, images.device):
        predict(network, images, watch)
    return [1000 * (moment - start) / len(images) for moment in [*watch.times, time.perf_counter()]]
