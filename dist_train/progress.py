"""What a person sees of a run: a live line with the time left on a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("dist_train")

SLOW = 0.05
"""Share of the time from which on it is said that the others wait for the slowest rank."""


def set_up_logging(rank: int, folder: Path | None = None) -> None:
    """Send the log to standard output on rank 0, and on every rank to ``log/rankN.txt`` of a run folder."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers.clear()
    if rank == 0:
        log.addHandler(logging.StreamHandler(sys.stdout))
    if folder is not None:
        try:
            (folder / "log").mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(folder / "log" / f"rank{rank}.txt")
        except OSError as error:
            log.warning("%s: the log cannot be written (%s)", folder / "log", error.strerror)
            return
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


class Display:
    """Progress of training on rank 0, a context manager; silent on the other ranks."""

    def __init__(self, total_steps: int, rank: int) -> None:
        self.total = total_steps
        self._bar: Any = None
        self._task: Any = None
        self._start = self._line = time.perf_counter()
        self._first: int | None = None
        self._live = rank == 0 and sys.stdout.isatty()

    def __enter__(self) -> Display:
        if self._live:
            from rich.highlighter import NullHighlighter
            from rich.logging import RichHandler
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            # Lines of the log must go above the bar instead of through it.  The bar takes standard output over, so the
            # handler is looked for by its kind.
            self._plain = next(handler for handler in log.handlers if type(handler) is logging.StreamHandler)
            columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(TextColumn("step"), *columns)
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
            self._above = RichHandler(
                console=self._bar.console,
                show_time=False,
                show_level=False,
                show_path=False,
                highlighter=NullHighlighter(),
            )
            log.removeHandler(self._plain)
            log.addHandler(self._above)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()
            log.removeHandler(self._above)
            log.addHandler(self._plain)

    def step(self, step: int) -> None:
        """Show that a step is done."""
        if self._first is None:
            self._first, self._start = step, time.perf_counter()
        if self._live:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Show a line of training metrics."""
        exits = sum(key.endswith("/top1") for key in metrics)
        accuracy = " ".join(f"{100 * metrics[f'train/exit{m + 1}/top1']:.1f}" for m in range(exits))
        text = (
            f"epoch {epoch:.1f}  loss {metrics['train/loss']:.3f}  top-1 % {accuracy}  T {metrics['train/temperature']:.2f}  "
            f"lr {metrics['train/learning_rate']:.2g}  {metrics['speed/images_per_second']:.0f} img/s  "
            f"waiting {100 * metrics['speed/waiting_for_data']:.0f} %"
        )
        since, self._line = self._line, time.perf_counter()
        if (seconds := metrics.get("speed/seconds_for_slowest", 0.0)) > max(0.1, SLOW * (self._line - since)):
            text += f"  rank {metrics['speed/slowest_rank']:.0f} is slow, the others waited {seconds:.1f} s"
        if self._live:
            self._bar.update(self._task, description=text)
        else:
            log.info("step %d/%d  %s%s", step, self.total, text, self._left(step))

    def _left(self, step: int) -> str:
        if self._first is None or step <= self._first:
            return ""
        seconds = (time.perf_counter() - self._start) / (step - self._first) * (self.total - step)
        hours, rest = divmod(int(seconds), 3600)
        return f"  left {hours}:{rest // 60:02d}:{rest % 60:02d}"
