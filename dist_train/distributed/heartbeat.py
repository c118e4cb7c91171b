"""Signs of life between the ranks, through their store: a rank that was killed is noticed while the others wait on a GPU."""

from __future__ import annotations

import contextlib
import threading
import time

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but torch does not list it

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 60.0
"""Longer than any call that keeps the interpreter lock, and with it the thread that beats."""

_LEFT = -(10**12)
"""Added to the count of a rank that leaves: it is negative from then on, whatever it had come to."""


class Heartbeat:
    """Every rank counts in the store, and watches the count of the next one.

    One for each, because the store is one process: in a run of a thousand ranks, all of them watching all would keep it
    busy.  Who notices writes a report, which the others see; where a whole host is gone, the rank before it notices.
    It has a thread of its own, which waits forever where the store's process is stopped.

    Args:
        store: store that all ranks see; the heartbeat gets a connection of its own, since others wait on theirs for long.
        rank, world_size: this process, and how many there are.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]  # torch does not list it
        self._mine, self._next = f"beat/{rank}", f"beat/{(rank + 1) % world_size}"
        self._count, self._heard = 0, time.monotonic()
        self._stop = threading.Event()
        self._store.delete_key(self._mine)  # of an earlier run of these processes
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def is_next_silent(self) -> bool:
        """Whether the next rank has given no sign of life for SILENCE_SECONDS, although it has not left."""
        return self._count >= 0 and time.monotonic() - self._heard > SILENCE_SECONDS

    def leave(self) -> None:
        """Say that this rank ends by itself."""
        self._stop.set()
        self._thread.join(BEAT_SECONDS)

    def _work(self) -> None:
        # The store ends with its process, rank 0 as a rule: its silence is then noticed as that of any other.
        with contextlib.suppress(RuntimeError):
            while not self._stop.is_set():
                self._store.add(self._mine, 1)
                count = self._store.add(self._next, 0)
                if count != self._count:
                    self._count, self._heard = count, time.monotonic()
                self._stop.wait(BEAT_SECONDS)
            self._store.add(self._mine, _LEFT)
