"""A run as an HTML page that a browser loads again and again while the run trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dist_train.files import write_whole
from dist_train.render.figure import legend_below, line_style, new_figure, to_png
from dist_train.render.page import page, paragraph, picture, section
from dist_train.render.table import Table, duration
from dist_train.tracking.progress import EXIT_COLUMNS, exit_rows, facts_of
from dist_train.tracking.watch import Moment, Watched

T = TypeVar("T")
REFRESH_SECONDS = 5
"""Between two versions of the page; a version takes about half a second of a core."""
POINTS = 300
"""Points that a curve is thinned to."""


class LivePage:
    """``live.html`` of a run folder; it is written by who looks on, so that training has no work with it.

    A context manager: when it is left and the run goes on, the page says that nobody writes it any more.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "live.html"
        self._run: Watched | None = None
        self._shown: tuple[object, ...] = ()
        self._written = float("-inf")

    def show(self, run: Watched) -> None:
        """Write the page where the run has something new to say, and at most every ``REFRESH_SECONDS`` while it trains.

        Raises:
            OSError: it cannot be written; the next call tries again.
        """
        self._run = run
        now = (run.state, run.batch, len(run.moments), len(run.validations))
        if run.config is None or now == self._shown:
            return
        # At once where it has ended: that version is the last.
        if run.running and not run.finished and time.monotonic() - self._written < REFRESH_SECONDS:
            return
        self._written = time.monotonic()
        write_whole(self.path, html_page(run))
        self._shown = now

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, *_: object) -> None:
        if self._run is not None and self._run.config is not None and not self._run.finished:
            with contextlib.suppress(OSError):
                write_whole(self.path, html_page(self._run, current=False))


def html_page(run: Watched, current: bool = True) -> str:
    """The page: how far the run is, what its newest line says, its exits, and its curves.

    Args:
        run: what is shown.
        current: whether the page will be written again, so that a browser is to load it again.
    """
    head = [run.state]
    if run.running and not current:
        head = [f"{run.state} when `dist-train watch --html` was left, which keeps this page current"]
    if run.total:
        head.append(f"step {run.batch} of {run.total}")
        if run.running and not run.finished and run.seconds_left is not None:
            head.append(f"{duration(run.seconds_left)} left")
    parts = [paragraph(f"{', '.join(head)} ({time.strftime('%Y-%m-%d %H:%M:%S')})")]
    if run.training:
        facts = Table("", ["", ""], [list(fact) for fact in facts_of(run)], names=2)
        parts.append(facts.html())
        exits = Table("", EXIT_COLUMNS, exit_rows(run))
        parts.append(
            section("Exits", "The newest lines; training is over the steps since the line before.", exits.html())
        )
    if run.moments or run.validations:
        parts.append(section("Over the steps", "", picture(_curves(run), "metrics over the steps")))
    return page(str(run.folder), parts, refresh_seconds=REFRESH_SECONDS if current and not run.finished else None)


def _spread(entries: Sequence[T]) -> list[T]:
    """At most ``POINTS`` of them, the first and the newest included."""
    steps = max(1, len(entries) - 1)
    count = min(POINTS, len(entries))
    return [entries[round(number * steps / max(1, count - 1))] for number in range(count)]


def _curves(run: Watched) -> bytes:
    figure, panels = new_figure(7.5, rows=3, columns=2, sharex=True)
    moments, validations = _spread(run.moments), _spread(run.validations)

    def single(axes: Any, title: str, value: Callable[[Moment], float]) -> None:
        # Without markers: hundreds of them would hide the line.
        axes.plot([one.batch for one in moments], [value(one) for one in moments], **line_style(0) | {"marker": ""})
        axes.set_title(title, fontsize=10)

    def by_exit(axes: Any, title: str, points: Sequence[tuple[int, list[float]]]) -> None:
        for number in range(min((len(top1) for _, top1 in points), default=0)):
            steps, values = [batch for batch, _ in points], [100 * top1[number] for _, top1 in points]
            axes.plot(steps, values, **line_style(number, len(points)), label=f"exit {number + 1}")
        axes.set_title(title, fontsize=10)

    single(panels[0], "training loss", lambda one: one.loss)
    single(panels[1], "temperature", lambda one: one.temperature)
    by_exit(panels[2], "training top-1, %", [(one.batch, one.top1) for one in moments])
    by_exit(panels[3], "validation top-1, %", validations)
    single(panels[4], "images per second", lambda one: one.images_per_second)
    single(panels[5], "time spent waiting for data, %", lambda one: 100 * one.waiting)
    for axes in panels[4:]:
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    # Of the panels by exit the one with lines: before the first validation the other has none.
    legend_below(
        figure, *max((axes.get_legend_handles_labels() for axes in panels[2:4]), key=lambda pair: len(pair[0]))
    )
    return to_png(figure)
