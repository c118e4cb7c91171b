"""What a run measures: sums on the device, one reduction per logged line, and metrics.jsonl, which is the truth."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_train.dist import Group

if TYPE_CHECKING:
    from dist_train.loss import ExitStats


class Meter:
    """Sums statistics of training steps on the device, and reduces them over ranks only when a line is due."""

    def __init__(self, num_exits: int, group: Group) -> None:
        self.num_exits = num_exits
        self.group = group
        self._sums: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._reset()

    def add(self, stats: torch.Tensor, loss: torch.Tensor, images: int, waited: float) -> None:
        """Add one micro batch: its statistics vector, its loss (a share of the global one), the seconds it was waited for."""
        self._sums = stats.double() if self._sums is None else self._sums.add_(stats)
        self._loss = loss.detach().double() if self._loss is None else self._loss.add_(loss.detach())
        self._images += images
        self._passes += 1
        self._waited += waited

    def take(self, own_seconds: float) -> dict[str, float]:
        """Means over all that was added on all ranks since the last call, as metrics; all ranks must call.

        ``own_seconds`` is what this rank took since then without waiting for others (see :class:`Stopwatch`).
        """
        from dist_train.loss import ExitStats

        assert self._sums is not None
        assert self._loss is not None
        seconds = time.perf_counter() - self._since
        host = torch.tensor([self._images, self._waited / seconds], dtype=torch.float64, device=self._sums.device)
        ranks = self.group.ranks.world_size
        own = torch.zeros(ranks, dtype=torch.float64, device=self._sums.device)
        own[self.group.ranks.rank] = own_seconds
        total = self.group.sum(torch.cat([own, self._sums, self._loss.reshape(1), host])).cpu()
        own, total = total[:ranks], total[ranks:]
        stats = ExitStats(total[:-3], self.num_exits)
        metrics = {"train/loss": float(total[-3]) / (ranks * self._passes)} | exit_metrics(stats, "train")
        metrics["train/teacher_confidence"] = float(stats.confidence / stats.samples)
        metrics["speed/images_per_second"] = float(total[-2]) / seconds
        metrics["speed/waiting_for_data"] = float(total[-1]) / ranks
        if ranks > 1:
            slowest = int(own.argmax())
            metrics["speed/slowest_rank"] = float(slowest)
            metrics["speed/seconds_for_slowest"] = float(own[slowest] - (own.sum() - own[slowest]) / (ranks - 1))
        self._reset()
        return metrics

    def state(self) -> torch.Tensor:
        """This rank's open sums, so that a resumed run logs what the uninterrupted one does; empty when there are none."""
        if self._sums is None or self._loss is None:
            return torch.zeros(0, dtype=torch.float64)
        counts = torch.tensor([self._images, self._passes], dtype=torch.float64)
        return torch.cat([self._sums.cpu(), self._loss.reshape(1).cpu(), counts])

    def load_state(self, state: torch.Tensor) -> None:
        """Take over what :meth:`state` gave."""
        if state.numel():
            self._sums = state[:-3].to(self.group.device)
            self._loss = state[-3].to(self.group.device)
            self._images, self._passes = int(state[-2]), int(state[-1])

    def _reset(self) -> None:
        self._sums = self._loss = None
        self._images = self._passes = 0
        self._waited = 0.0
        self._since = time.perf_counter()


class Stopwatch:
    """Seconds that this rank's device works between entering and leaving, summed; a GPU is not waited for until they are due.

    Forward passes and waits for data are timed: at ZeRO 0 to 2 they contain no collective, so that a slow rank is told
    from those that wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def __enter__(self) -> None:
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._events.append((start, end))
            self._events[-1][0].record()
        else:
            self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._start

    def add(self, seconds: float) -> None:
        """Add time that the host has measured."""
        self._seconds += seconds

    def take(self) -> float:
        """The sum since the last call."""
        seconds = self._seconds
        for start, end in self._events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


def exit_metrics(stats: ExitStats, prefix: str) -> dict[str, float]:
    """Cross-entropy and accuracy of every exit, exits counted from 1, as shares of the labeled samples."""
    labeled = stats.labeled.clamp(min=1)
    rows = {"loss": stats.label_loss / labeled, "top1": stats.top1 / labeled, "top5": stats.top5 / labeled}
    return {
        f"{prefix}/exit{number + 1}/{name}": float(values[number])
        for number in range(stats.num_exits)
        for name, values in rows.items()
    }


class MetricsFile:
    """``metrics.jsonl``: one line ``{"t": milliseconds, "step": N, "batch": N, "metrics": {...}}`` per logged step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, batch: int, evaluates: bool) -> None:
        """Drop what was logged after a global batch, since it will be done again; a torn last line goes too.

        With ``evaluates``, the evaluation at that batch goes as well: the checkpoint was written before it.
        """
        if not self.path.exists():
            return

        def stays(entry: dict[str, Any] | None) -> bool:
            if entry is None or entry["batch"] > batch:
                return False
            return not evaluates or entry["batch"] < batch or "val/mean_top1" not in entry["metrics"]

        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if stays(parse_line(line))]
        if len(kept) < len(lines):
            draft = self.path.with_suffix(".tmp")
            draft.write_text("".join(line + "\n" for line in kept))
            os.replace(draft, self.path)

    def append(self, step: int, batch: int, metrics: dict[str, float]) -> None:
        """Add a line; raises OSError where it cannot be written."""
        line = json.dumps({"t": int(time.time() * 1000), "step": step, "batch": batch, "metrics": metrics})
        with self.path.open("a") as file:
            file.write(line + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl."""
    return [entry for line in path.read_text().splitlines() if (entry := parse_line(line)) is not None]


def parse_line(line: str) -> dict[str, Any] | None:
    """One line's content; None for a torn or foreign line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "batch" in entry else None
