"""What training steps measure: sums on the device, reduced over the ranks once per logged line, and where time is spent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from dist_train.distributed.group import Group
from dist_train.loss import ExitStats

T = TypeVar("T")


class StepClock:
    """Where this rank's training steps spend their time; waits for the GPU only when a line is due.

    Only forward passes and waits for data are timed: at ZeRO 0 to 2 they contain no collective, which tells a slow rank
    from those that wait for it.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._cuda = group.device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._busy = self._data = 0.0

    def waiting_for(self, batch: Iterable[T]) -> Iterator[T]:
        """Yield the micro batches of a batch; the time until each is there counts as waiting for data."""
        micro_batches = iter(batch)
        while True:
            self._group.phase("wait for data")
            start = time.perf_counter()
            micro = next(micro_batches, None)
            if micro is None:
                return
            self._data += time.perf_counter() - start
            yield micro

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Time a forward pass."""
        if self._cuda:
            # Measured on the GPU: the host runs ahead of it, and would time the launches.
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._events.append((start, end))
            start.record()
            yield
            end.record()
        else:
            since = time.perf_counter()
            yield
            self._busy += time.perf_counter() - since

    def read_and_reset(self) -> tuple[float, float]:
        """Seconds since the last call: busy (computing, and waiting for data), and waiting for data alone."""
        busy, data = self._busy + self._data, self._data
        for start, end in self._events:
            end.synchronize()
            busy += start.elapsed_time(end) / 1000
        self._busy = self._data = 0.0
        self._events = []
        return busy, data


class Meter:
    """Sums statistics of training steps on the device, and reduces them over ranks only when a line is due."""

    def __init__(self, num_exits: int, group: Group) -> None:
        self.num_exits = num_exits
        self.group = group
        self._sums: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._reset()

    def add(self, stats: torch.Tensor, loss: torch.Tensor, images: int) -> None:
        """Add one micro batch: its statistics vector, and its loss (its part of the global loss)."""
        # In float64: a resumed run continues these sums, and must round as the uninterrupted one does.
        self._sums = stats.double() if self._sums is None else self._sums.add_(stats)
        self._loss = loss.detach().double() if self._loss is None else self._loss.add_(loss.detach())
        self._images += images
        self._micro_batches += 1

    def reduce_and_reset(self, clock: StepClock) -> dict[str, float]:
        """Means over all that was added on all ranks since the last call, as metrics; all ranks must call."""
        assert self._sums is not None
        assert self._loss is not None
        busy_seconds, data_seconds = clock.read_and_reset()
        seconds = time.perf_counter() - self._since
        host = torch.tensor([self._images, data_seconds / seconds], dtype=torch.float64, device=self._sums.device)
        ranks = self.group.ranks.world_size
        # Zeros but for this rank's own place: the sum over the ranks then gathers them.
        busy = torch.zeros(ranks, dtype=torch.float64, device=self._sums.device)
        busy[self.group.ranks.rank] = busy_seconds
        # One reduction and one copy to the host for everything: each of them waits for the device.
        total = self.group.sum(torch.cat([busy, self._sums, self._loss.reshape(1), host])).cpu()
        busy, total = total[:ranks], total[ranks:]
        stats = ExitStats(total[:-3], self.num_exits)
        metrics = {"train/loss": float(total[-3]) / (ranks * self._micro_batches)} | exit_metrics(stats, "train")
        # How far every exit is from its teachers; 0 for an exit that has none.
        metrics |= {f"train/exit{m}/kl": float(kl) for m, kl in enumerate(stats.kl / stats.samples, start=1)}
        metrics["train/teacher_confidence"] = float(stats.confidence / stats.samples)
        metrics["speed/images_per_second"] = float(total[-2]) / seconds
        metrics["speed/waiting_for_data"] = float(total[-1]) / ranks
        if ranks > 1:
            slowest = int(busy.argmax())
            metrics["speed/slowest_rank"] = float(slowest)
            # How much longer than the mean of the other ranks.
            metrics["speed/seconds_for_slowest"] = float(busy[slowest] - (busy.sum() - busy[slowest]) / (ranks - 1))
        self._reset()
        return metrics

    def state(self) -> torch.Tensor:
        """This rank's unreported sums, so that a resumed run logs what the uninterrupted one does; empty if there are none."""
        if self._sums is None or self._loss is None:
            return torch.zeros(0, dtype=torch.float64)
        # Not the images: their number is divided by the time of this start.
        count = torch.tensor([self._micro_batches], dtype=torch.float64)
        return torch.cat([self._sums.cpu(), self._loss.reshape(1).cpu(), count])

    def load_state(self, state: torch.Tensor) -> None:
        """Load what :meth:`state` returned."""
        if state.numel():
            self._sums = state[:-2].to(self.group.device)
            self._loss = state[-2].to(self.group.device)
            self._micro_batches = int(state[-1])

    def _reset(self) -> None:
        self._sums = self._loss = None
        self._images = self._micro_batches = 0
        self._since = time.perf_counter()


def exit_metrics(stats: ExitStats, prefix: str) -> dict[str, float]:
    """Cross-entropy and accuracy of every exit, exits counted from 1, as fractions of the labeled samples."""
    # Without any labeled sample the means are 0, and not 0 / 0.
    labeled = stats.labeled.clamp(min=1)
    rows = {"loss": stats.label_loss / labeled, "top1": stats.top1 / labeled, "top5": stats.top5 / labeled}
    return {
        f"{prefix}/exit{number + 1}/{name}": float(values[number])
        for number in range(stats.num_exits)
        for name, values in rows.items()
    }
