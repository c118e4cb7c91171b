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

    def take(self) -> dict[str, float]:
        """Means over all that was added on all ranks since the last call, as metrics; all ranks must call."""
        from dist_train.loss import ExitStats

        assert self._sums is not None
        assert self._loss is not None
        seconds = time.perf_counter() - self._since
        host = torch.tensor([self._images, self._waited / seconds], dtype=torch.float64, device=self._sums.device)
        total = self.group.sum(torch.cat([self._sums, self._loss.reshape(1), host])).cpu()
        ranks = self.group.ranks.world_size
        stats = ExitStats(total[:-3], self.num_exits)
        metrics = {"train/loss": float(total[-3]) / (ranks * self._passes)} | exit_metrics(stats, "train")
        metrics["train/teacher_confidence"] = float(stats.confidence / stats.samples)
        metrics["speed/images_per_second"] = float(total[-2]) / seconds
        metrics["speed/waiting_for_data"] = float(total[-1]) / ranks
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

    def rewind(self, batch: int) -> None:
        """Drop what was logged after a global batch, since it will be done again; a torn last line goes too."""
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if (entry := parse_line(line)) is not None and entry["batch"] <= batch]
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
