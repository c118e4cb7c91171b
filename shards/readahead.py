"""Reads the images of a shard, and where that takes most of the time, as from a cold disk, several at once and ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shards.source import Item

_THREADS = 4
_BATCH_BYTES, _BATCH_ITEMS = 1 << 20, 128
"""Read by one thread at a time: single small files are handed over slower than they are read."""

Contents = bytes | OSError


class ReadAhead:
    """Iterates over the items with their bytes, or the error that reading them raised, in their order.

    ``waited`` has the seconds for which nothing was read yet, ``bytes`` what was read.
    """

    def __init__(self, items: Sequence[Item], read: Callable[[Item], bytes]) -> None:
        self._items = items
        self._read = read
        self.waited = 0.0
        self.bytes = 0

    def __iter__(self) -> Iterator[tuple[Item, Contents]]:
        """Read on; leaving the loop ends the threads."""
        parts, start = _parts(self._items), time.perf_counter()
        for part in parts:
            yield from self._counted(part, self._read_part)
            # What is in memory is read sooner than threads hand it over.
            if self.waited > (time.perf_counter() - start) / 2:
                break
        yield from self._ahead(parts)

    def _ahead(self, parts: Iterator[Sequence[Item]]) -> Iterator[tuple[Item, Contents]]:
        waiting: deque[tuple[Sequence[Item], Future[list[Contents]]]] = deque()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="read") as pool:
            try:
                for part in parts:
                    waiting.append((part, pool.submit(self._read_part, part)))
                    # One part more than there are threads, so that a thread that is done finds the next one.
                    if len(waiting) > _THREADS:
                        yield from self._next(waiting)
                while waiting:
                    yield from self._next(waiting)
            finally:
                # Where the loop is left midway, `with` alone would wait for all that was handed over.
                pool.shutdown(cancel_futures=True)

    def _next(self, waiting: deque[tuple[Sequence[Item], Future[list[Contents]]]]) -> Iterator[tuple[Item, Contents]]:
        part, future = waiting.popleft()
        return self._counted(part, lambda _: future.result())

    def _counted(
        self, part: Sequence[Item], result: Callable[[Sequence[Item]], list[Contents]]
    ) -> Iterator[tuple[Item, Contents]]:
        start = time.perf_counter()
        contents = result(part)
        self.waited += time.perf_counter() - start
        for item, data in zip(part, contents):
            self.bytes += len(data) if isinstance(data, bytes) else 0
            yield item, data

    def _read_part(self, part: Sequence[Item]) -> list[Contents]:
        contents: list[Contents] = []
        for item in part:
            try:
                contents.append(self._read(item))
            except OSError as error:
                contents.append(error)
        return contents


def _parts(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    first, filled = 0, 0
    for number, item in enumerate(items):
        filled += item.size
        if filled >= _BATCH_BYTES or number - first + 1 >= _BATCH_ITEMS:
            yield items[first : number + 1]
            first, filled = number + 1, 0
    if first < len(items) or not items:
        yield items[first:]
