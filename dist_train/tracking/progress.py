"""What a run shows while it trains: a live line with the time left on a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.tracking.metrics import by_exit
from dist_train.tracking.watch import Watched

log = logging.getLogger("dist_train")

SLOW = 0.05
"""Fraction of the time above which the line names the slowest rank."""
BAR = 12
"""Characters of the bar."""
SHORT = 5
"""By how much the short form of a part is more important than the part."""
BLOCKS = "▁▂▃▄▅▆▇█"
"""Heights of a curve."""
FAULTS = ("skipped_steps", "failed_saves", "unreadable_images")
"""Metrics of training that are shown where they are not 0."""
IN_THE_LINE = "in_the_line"
"""Mark of a log record that the live line shows already."""


def set_up_logging(rank: int, folder: Path | None = None) -> None:
    """Send the log to standard output on rank 0, and on every rank to ``log/rankN.txt`` of a run folder."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers.clear()
    if rank == 0:
        terminal = logging.StreamHandler(sys.stdout)
        # Where nobody reads any more, such as behind `| head`, training goes on, and the file has the lines.
        terminal.handleError = lambda record: None  # type: ignore[method-assign]
        log.addHandler(terminal)
    if folder is not None:
        try:
            (folder / "log").mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(folder / "log" / f"rank{rank}.txt")
        except OSError as error:
            log.warning("%s: the log cannot be written (%s)", folder / "log", error.strerror)
            return
        # On a full disk lines of this file are lost; logging would print a traceback for each of them.
        file.handleError = lambda record: None  # type: ignore[method-assign]
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


class Part(NamedTuple):
    """A piece of the progress line; of what does not fit, the least important goes first, or becomes its short form."""

    importance: int
    text: str
    short: str = ""


def fit(parts: Sequence[Part], width: int) -> str:
    """The parts in their order, in at most so many characters."""
    texts = [part.text for part in parts]
    # A short form is worth more than what it stands for, and is given up later.
    losses = [(part.importance, number, part.short) for number, part in enumerate(parts)]
    losses += [(part.importance + SHORT, number, "") for number, part in enumerate(parts) if part.short]
    for _, number, left in sorted(losses):
        if len(_joined(texts)) <= width:
            break
        texts[number] = left
    return _joined(texts)[:width]


def _joined(texts: Sequence[str]) -> str:
    return "  ".join(filter(None, texts))


def parts_of(metrics: Mapping[str, float], epoch: float) -> list[Part]:
    """The parts of a line of training metrics."""
    top1 = [f"{100 * value:.1f}" for value in by_exit(metrics, "train", "top1")]
    return [
        Part(3, f"epoch {epoch:.1f}"),
        Part(8, f"loss {metrics['train/loss']:.3f}"),
        Part(5, f"top-1 % {' '.join(top1)}", f"top-1 % {top1[0]} … {top1[-1]}" if len(top1) > 1 else ""),
        Part(1, f"T {metrics['train/temperature']:.2f}"),
        Part(0, f"lr {metrics['train/learning_rate']:.2g}"),
        Part(6, f"{metrics['speed/images_per_second']:.0f} img/s"),
        Part(2, f"waiting {100 * metrics['speed/waiting_for_data']:.0f} %"),
        Part(1, f"{metrics['memory/peak_gib']:.1f} GiB"),
    ]


def bar_of(share: float, ascii_only: bool) -> str:
    """A bar of ``BAR`` characters, full to this share."""
    full, empty = ("#", ".") if ascii_only else ("━", "╌")
    return full * round(BAR * share) + empty * (BAR - round(BAR * share))


def clock(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Display:
    """Progress of training on rank 0, a context manager; silent on the other ranks."""

    def __init__(self, total_steps: int, rank: int) -> None:
        self.total = total_steps
        self._live: Any = None
        self._step = 0
        self._parts: list[Part] = []
        self._start = self._line = time.perf_counter()
        self._first: int | None = None
        self._shows = rank == 0

    def __enter__(self) -> Display:
        if self._shows and sys.stdout.isatty():
            from rich.highlighter import NullHighlighter
            from rich.live import Live
            from rich.logging import RichHandler

            # Log lines must be printed above the line, not through it.  It replaces sys.stdout, so the handler is
            # identified by its type, not by its stream.
            self._plain = next(handler for handler in log.handlers if type(handler) is logging.StreamHandler)
            # Transient: the line goes at the end. log/rank0.txt has every line of metrics.
            self._live = Live(self, transient=True)
            self._live.start()
            console = self._live.console
            self._above = RichHandler(
                console=console, show_time=False, show_level=False, show_path=False, highlighter=NullHighlighter()
            )
            self._above.addFilter(lambda record: not getattr(record, IN_THE_LINE, False))
            log.removeHandler(self._plain)
            log.addHandler(self._above)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None
            log.removeHandler(self._above)
            log.addHandler(self._plain)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield Text(self.line(options.max_width, options.ascii_only), no_wrap=True, overflow="crop")

    def line(self, width: int, ascii_only: bool = False) -> str:
        """The live line in so many characters."""
        done = min(1.0, self._step / self.total) if self.total else 1.0
        bar = bar_of(done, ascii_only)
        first = [Part(20, f"step {self._step}/{self.total}"), Part(7, bar), Part(19, self._left() or "starting")]
        return fit([*first, *self._parts], width)

    def step(self, step: int) -> None:
        """Show that a step is done."""
        if self._first is None:
            self._first, self._start = step, time.perf_counter()
        self._step = step

    def metrics(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Show a line of training metrics; in a pipe or a file it is a line of its own, which the log has in any case."""
        if not self._shows:
            return
        self._step = step
        since, self._line = self._line, time.perf_counter()
        slow = ""
        if (seconds := metrics.get("speed/seconds_for_slowest", 0.0)) > max(0.1, SLOW * (self._line - since)):
            slow = f"rank {metrics['speed/slowest_rank']:.0f} is slow, the others waited {seconds:.1f} s"
        self._parts = [
            *parts_of(metrics, epoch),
            Part(4, slow, f"rank {metrics['speed/slowest_rank']:.0f} slow" if slow else ""),
        ]
        text = _joined([part.text for part in self._parts] + [self._left()])
        log.info("step %d/%d  %s", step, self.total, text, extra={IN_THE_LINE: self._live is not None})

    def _left(self) -> str:
        if self._first is None or self._step <= self._first:
            return ""
        # Counted from the first step of this start: compiling and loading must not lengthen the estimate.
        seconds = (time.perf_counter() - self._start) / (self._step - self._first) * (self.total - self._step)
        return f"left {clock(seconds)}"


EXIT_COLUMNS = ("exit", "train top-1 %", "train loss", "val top-1 %", "val loss")


def exit_rows(run: Watched) -> list[list[str]]:
    """A row of ``EXIT_COLUMNS`` for every exit, of the newest lines."""
    columns = [
        by_exit(metrics, group, name)
        for metrics, group in ((run.training, "train"), (run.validation, "val"))
        for name in ("top1", "loss")
    ]
    rows = []
    for number in range(len(columns[0])):
        cells = [column[number] if number < len(column) else None for column in columns]
        texts = [
            "–" if cell is None else f"{cell:.3f}" if k % 2 else f"{100 * cell:.2f}" for k, cell in enumerate(cells)
        ]
        rows.append([str(number + 1), *texts])
    return rows


def facts_of(run: Watched) -> list[tuple[str, str]]:
    """What the newest line of training metrics says besides the exits, by name."""
    one = run.training
    facts = [
        ("loss", f"{one['train/loss']:.4f}"),
        (
            "temperature",
            f"{one['train/temperature']:.3f}, teacher's confidence {one['train/teacher_confidence']:.3f}",
        ),
        ("learning rate", f"{one['train/learning_rate']:.3g}, gradient norm {one['train/gradient_norm']:.3g}"),
        (
            "throughput",
            f"{one['speed/images_per_second']:.0f} images/s, {100 * one['speed/waiting_for_data']:.0f} % waiting for data",
        ),
        ("memory", f"{one['memory/peak_gib']:.1f} GiB at most"),
    ]
    if faults := {name: int(one[f"train/{name}"]) for name in FAULTS if one.get(f"train/{name}", 0.0) > 0}:
        facts.append(("faults", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in faults.items())))
    if run.best is not None:
        facts.append(("best", f"{100 * run.best:.2f} % mean top-1 of the validations"))
    return facts


class Board:
    """What ``dist-train watch`` shows of a run: a live picture on a terminal, a line per line of metrics elsewhere.

    A context manager.
    """

    def __init__(self) -> None:
        self._run: Watched | None = None
        self._live: Any = None
        self._state = ""

    def __enter__(self) -> Board:
        if sys.stdout.isatty():
            from rich.live import Live

            # Asked for at every change alone, and left standing at the end.
            self._live = Live(self, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, run: Watched, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Take what a run says now; the lines to print where there is no terminal."""
        self._run = run
        if self._live:
            self._live.refresh()
            return
        for entry in entries:
            metrics, start = entry["metrics"], f"step {entry['batch']}/{run.total or '?'}"
            if "train/loss" in metrics:
                yield _joined([start, *(part.text for part in parts_of(metrics, metrics["train/epoch"]))])
            elif top1 := by_exit(metrics, "val", "top1"):
                yield f"{start}  val top-1 %  {' '.join(f'{100 * value:.2f}' for value in top1)}"
        if run.state != self._state:
            yield f"{run.folder}: {run.state}"
        self._state = run.state

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        run = self._run
        if run is None:
            return
        yield Text(fit(self._head(run, options.ascii_only), options.max_width))
        if not run.training:
            return
        facts = Table.grid(padding=(0, 2))
        curve = "" if options.ascii_only else curve_of(run.losses, max(8, options.max_width - 40))
        for name, value in facts_of(run):
            facts.add_row(Text(name, style="dim"), f"{value}  {curve}" if name == "loss" else value)
        yield facts
        exits = Table(*EXIT_COLUMNS, box=None, pad_edge=False)
        for column in exits.columns[1:]:
            column.justify = "right"
        for row in exit_rows(run):
            exits.add_row(*row)
        yield exits

    def _head(self, run: Watched, ascii_only: bool) -> list[Part]:
        parts = [Part(4, str(run.folder), run.folder.name), Part(20, run.state)]
        if run.total:
            done = min(1.0, run.batch / run.total)
            left = run.seconds_left if run.running and not run.finished else None
            parts += [
                Part(10, f"step {run.batch}/{run.total}"),
                Part(3, f"epoch {run.training['train/epoch']:.1f}"),
                Part(5, bar_of(done, ascii_only)),
                Part(15, f"left {clock(left)}" if left is not None else ""),
            ]
        return parts


def curve_of(values: Sequence[float], width: int) -> str:
    """Values over time as blocks of eight heights, means where there are more values than characters."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    bounds = [len(finite) * k // count for k in range(count + 1)]
    means = [statistics.fmean(finite[start:end]) for start, end in itertools.pairwise(bounds)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (mean - low) / span)] for mean in means)
