"""What a person sees of long work: done, rate and time left, live on a terminal and now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from shards.processes import Work

_LIVE, _PLAIN = 0.2, 30.0
"""Seconds between two lines on a terminal, and in a pipe or a file."""


class Progress:
    """Prints ``train: 1200 of 5000 images, 830/s, 91 MB/s, waits for reading, 0:05 left`` to standard error.

    It is called as :class:`~shards.processes.ProgressCallback` says.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._part: str | None = None
        self._begun = self._printed = time.perf_counter()
        self._first = 0
        self._works: list[Work] = []

    def __call__(self, part: str, done: int, total: int, work: Work | None = None, /) -> None:
        """Say that ``done`` of ``total`` images of a part are finished; what the first call says was so before."""
        now = time.perf_counter()
        if part != self._part:
            # What an earlier command had finished took no time now, and is no part of the rate.
            first = done - work.images if work else done if done < total else 0
            self._begun = now - work.seconds if work else now
            self._part, self._first, self._works = part, first, []
        if work:
            self._works.append(work)
        if now - self._printed < (_LIVE if self._live else _PLAIN) and (done < total or not self._live):
            return
        self._printed = now
        text = f"{part}: {done} of {total} images"
        if now > self._begun and done > self._first:
            rate = (done - self._first) / (now - self._begun)
            text += f", {rate:.0f}/s{self._limit(now)}, {_clock((total - done) / rate)} left"
        # \033[K clears what is left of a longer line.
        ending = "\n" if done == total or not self._live else ""
        print(f"\r{text}\033[K" if self._live else text, end=ending, file=sys.stderr, flush=True)

    def _limit(self, now: float) -> str:
        """Megabytes per second, and what they wait for most."""
        if not self._works:
            return ""
        megabytes = sum(work.bytes for work in self._works) / 1e6 / (now - self._begun)
        return f", {megabytes:.0f} MB/s, {limit(self._works)}"


def limit(works: Sequence[Work]) -> str:
    """What pieces of work waited for during more than half of their time, if for anything."""
    seconds = sum(work.seconds for work in works)
    if sum(work.reading for work in works) > seconds / 2:
        return "waits for reading"
    return "waits for writing" if sum(work.writing for work in works) > seconds / 2 else "limited by the processor"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
