"""Work shared out among processes that end with this one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple, Protocol, TypeVar

from dist_train.errors import DataError


class Work(NamedTuple):
    """What a piece of work took: images, bytes read, and seconds, of which some were spent waiting for either disk."""

    images: int
    bytes: int
    seconds: float
    reading: float
    writing: float


class ProgressCallback(Protocol):
    """Called as shards are finished."""

    def __call__(self, part: str, done: int, total: int, work: Work | None = None, /) -> None:
        """Images of a split that are done and that there are, and what the latest of them took."""


T = TypeVar("T")
R = TypeVar("R")


def in_processes(work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Yield ``work(task)`` of every task in order, computed by processes that end with this one, however it ends.

    Raises:
        DataError: one of the processes was killed.
    """
    if min(workers, len(tasks)) <= 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context(_start_method())
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        any_done = False
        try:
            for result in pool.map(work, tasks):
                any_done = True
                yield result
        except BrokenProcessPool:
            if not any_done and context.get_start_method() == "spawn":
                raise DataError(
                    "a worker process ended before it had done anything; where the script that was run has no "
                    "`if __name__ == '__main__':` above its work, add it (workers import the script), else use fewer workers"
                ) from None
            raise DataError(
                "a worker process was killed, perhaps for want of memory; run the same command again to resume, "
                "with fewer --workers"
            ) from None
        except BaseException:
            # Without it, leaving the pool would wait for every task in its queue, also after Ctrl-C.
            pool.shutdown(cancel_futures=True)
            raise


def _start_method() -> str:
    """How processes are started: forked, at once, where this one has no other threads, which do not survive that; else anew.

    Starting anew takes each worker as long as packing a thousand images.
    """
    return "fork" if threading.active_count() == 1 else "spawn"


def _end_with(parent: int) -> None:
    """Leave interrupts from the keyboard, which reach all processes, to the parent, and die when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # It died before the signal was asked for, and would send none.
    if os.getppid() != parent:
        os._exit(1)
