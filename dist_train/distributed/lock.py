"""One training at a time in a run folder, also when the processes are on several hosts."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dist_train.distributed.launcher import started_at
from dist_train.errors import DataError, StorageError

log = logging.getLogger("dist_train")

WAIT_SECONDS = 15.0
"""How long a start waits for the processes of an earlier start to exit: after a preemption they take a few seconds."""
_POLL_SECONDS = 0.25
# EACCES as well: over NFS, flock is made of fcntl's locks, which may answer so.
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


class RunLock:
    """The lock on a run folder: free when no process of any training in it is alive.

    The kernel releases it with the process that holds it, however that ends; over NFS the server does.  Rank 0 takes it
    exclusively, which proves that nobody else is there, and then every rank of the run shares it, so that a new start
    also waits for ranks whose rank 0 has died.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, wait_seconds: float = WAIT_SECONDS, say: Callable[[str], None] = log.info) -> None:
        """Take the lock for a new start; waits for processes that are just ending.

        Raises:
            DataError: another training holds it (names its host and process), or the folder cannot be written.
            StorageError: the disk is full, which a later try may find otherwise.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for appending, so that the holder's line survives until the lock is ours.
            self._file = self.path.open("ab+", buffering=0)
            if not self._held_alone(wait_seconds, say):
                holder = self.holder()
                self.release()
                raise DataError(
                    f"{self.path.parent}: {holder} is training in it; wait for it, stop it, or set another --name"
                )
            # Only with the exclusive lock, under which nobody else writes the line.
            self._file.truncate(0)
            self._file.write(json.dumps(_myself()).encode())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (StorageError if full else DataError)(
                f"{self.path.parent}: cannot be written ({error.strerror}); free space, or set another --runs"
            ) from None
        # Shared from here on, so that the other ranks can join; an exclusive start still has to wait for all.
        self._share()

    def join(self) -> None:
        """Share the lock that rank 0 has taken; on a file system without locks this does nothing."""
        try:
            self._file = self.path.open("ab+", buffering=0)
        except OSError:
            return
        self._share()

    def refuse_if_held(self, wait_seconds: float = WAIT_SECONDS, say: Callable[[str], None] = print) -> None:
        """Raise what :meth:`acquire` would raise, and let go again: for a launcher that starts the ranks afterwards."""
        if self.path.exists():
            self.acquire(wait_seconds, say)
            self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._file:
            self._file.close()
            self._file = None

    def holder(self) -> str:
        """The process that last wrote the lock file, as text for a message."""
        content = self._content()
        if content is None:
            return "another process"
        job = f", SLURM job {content['job']}" if content.get("job") else ""
        return f"process {content['pid']} on {content['host']} (since {content['since']}{job})"

    def holder_lives(self) -> bool | None:
        """Whether the process that last took the lock is alive; None where it is on another host.

        Takes no lock, not even for a moment: a start that found it taken would be refused.
        """
        content = self._content()
        if content is None:
            return False
        if content["host"] != socket.gethostname():
            return None
        # A number is given to another process some day, which began at another time.
        started = started_at(content["pid"])
        return started is not None and content.get("started", started) == started

    def _content(self) -> dict[str, Any] | None:
        """What the process that last took the lock has written into it; None where it is not whole."""
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and {"host", "pid", "since"} <= content.keys() else None

    def _held_alone(self, wait_seconds: float, say: Callable[[str], None]) -> bool:
        assert self._file
        # Tried again in a loop: a blocking flock would have no timeout, and would hang over a dead NFS server.
        deadline, said = time.monotonic() + wait_seconds, False
        while True:
            if locked_alone(self._file, self.path):
                return True
            if time.monotonic() > deadline:
                return False
            if not said:
                say(f"{self.path.parent}: waiting for {self.holder()} to exit")
            said = True
            time.sleep(_POLL_SECONDS)

    def _share(self) -> None:
        assert self._file
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            # flock converts a lock in two steps; another start can get in between them.
            if error.errno in _BUSY:
                holder = self.holder()
                self.release()
                raise DataError(f"{self.path.parent}: {holder} has just started training in it") from None


def locked_alone(file: IO[Any], path: Path) -> bool:
    """Take an exclusive lock now; false where another has it, true with a warning where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        # ENOLCK, ENOSYS: mounted without locks.
        log.warning(
            "%s: this file system has no locks (%s); a second training in this folder cannot be detected",
            path,
            error.strerror,
        )
    return True


def _myself() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),  # for people
        "started": started_at(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
