"""A rank's eye on its own progress: when one rank hangs or dies, every rank leaves a report and the run ends."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dist_train.config import FaultConfig
from dist_train.errors import UserError

log = logging.getLogger("dist_train")

TICK_SECONDS = 1.0
GRACE_SECONDS = 4.0
"""How long a rank waits for the reports of the others."""

JOIN = "process group"
"""What a rank does until all others are there as well."""


@dataclass(frozen=True)
class Report:
    """The head of ``faults/rankN.txt``: where a rank was.  The stacks of all its threads follow it."""

    rank: int
    step: int
    batch: int
    phase: int
    """Number of the phase in its step; every rank goes through the same ones."""
    doing: str
    seconds: float
    """Time since it began to do that."""
    error: str | None
    """The exception that the rank itself failed with."""


class Watch:
    """Watches one rank from a thread of its own; a context manager.

    ``step`` and ``enter`` are a few assignments, made all over the training loop.  The thread looks at them once a
    second: a phase that takes too long, or a report of another rank, ends this rank as well, with its own report.
    """

    def __init__(self, faults: FaultConfig, folder: Path, rank: int, world_size: int) -> None:
        self.faults = faults
        self.folder = folder / "faults"
        self.rank = rank
        self.world_size = world_size
        self._steps = self._batch = self._phase = 0
        self._doing, self._since = "checks", time.monotonic()
        self._joined = False
        self._start = {"imports": time.time() - psutil.Process().create_time()}
        self._limit = 60 * faults.first_step_minutes
        self.at_end: Callable[[], None] | None = None
        """What is left to do, briefly, when the watch ends the process."""
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        # Every rank takes its report of an earlier start away before the process group is made, so that what is there
        # afterwards is new.
        self._path(self.rank).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError) and self.world_size > 1:
            self.fail(error)
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def step(self, step: int, batch: int) -> None:
        """Note that a global batch is done; from the first one on, ``faults.timeout_minutes`` holds."""
        if self._batch == 0:
            self.enter("first step")
            parts = ", ".join(f"{doing} {seconds:.2f} s" for doing, seconds in self._start.items() if seconds > 0.005)
            log.info("first step after %.2f s: %s", sum(self._start.values()), parts)
        self._steps, self._batch, self._phase = step, batch, 0
        self._limit = 60 * self.faults.timeout_minutes

    def enter(self, doing: str) -> None:
        """Note what this rank begins to do, or does again: a wait for data, a pass, a collective."""
        now = time.monotonic()
        if self._batch == 0:
            self._start[self._doing] = self._start.get(self._doing, 0.0) + now - self._since
        self._joined |= self._doing == JOIN
        self._phase += doing != self._doing
        self._doing, self._since = doing, now

    def fail(self, error: Exception) -> None:
        """Report the exception of this rank; does not return where it only follows from the end of another one."""
        if self.world_size == 1 or self._stop.is_set():
            return
        if _peer_is_gone(error):
            self._end()
        with self._ending:
            self._write(error)
            if self.rank:  # what all ranks fail with is shown once
                time.sleep(1)
                first = self._reports().get(0)
                if first and first.error == _first_line(error):
                    os._exit(1)
            # Leaving the process group can wait for ranks that will never come.
            timer = threading.Timer(5 * GRACE_SECONDS, os._exit, [1])
            timer.daemon = True
            timer.start()
            self._stop.set()

    def _work(self) -> None:
        while not self._stop.wait(min(TICK_SECONDS, self._limit / 4)):
            # Should some extension hold the interpreter for ever, this thread stands still, and these stacks are left.
            faulthandler.dump_traceback_later(self._limit + 60, exit=True)
            late = time.monotonic() - self._since > self._limit
            if late or (self._joined and self._reports().keys() - {self.rank}):
                self._end()

    def _end(self) -> None:
        """Report, say who is to blame when the other reports are there, and leave without waiting for anybody."""
        with self._ending:
            if self._stop.is_set():
                return
            self._write(None)
            deadline = time.monotonic() + GRACE_SECONDS
            while len(self._reports()) < self.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
            reports = self._reports()
            if any(report.error for report in reports.values()):
                time.sleep(GRACE_SECONDS / 2)  # its own traceback first
            text = f"{verdict(reports, self.world_size)}; see {self.folder}"
            log.error("%s", text)  # on the screen by rank 0, else in this rank's log
            if self.rank and self.rank == min(
                (rank for rank, report in reports.items() if not report.error), default=0
            ):
                print(f"dist-train: {text}", file=sys.stderr)
            if self.at_end:
                self.at_end()
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    # ---------------------------------------------------------------------------------------------- the reports

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.txt"

    def _write(self, error: Exception | None) -> None:
        seconds = round(time.monotonic() - self._since, 1)
        report = Report(self.rank, self._steps, self._batch, self._phase, self._doing, seconds,
                        _first_line(error) if error else None)  # fmt: skip
        path, draft = self._path(self.rank), self.folder / f"rank{self.rank}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with draft.open("w") as file:
                file.write(json.dumps(asdict(report)) + "\n\n")
                if error:
                    file.writelines([*traceback.format_exception(error), "\n"])
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            os.replace(draft, path)
        except OSError as failure:
            log.error("%s: cannot be written (%s)", path, failure.strerror)

    def _reports(self) -> dict[int, Report]:
        """All reports; listing the folder shows those of other nodes even over NFS."""
        reports = {}
        with contextlib.suppress(OSError, ValueError, TypeError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".txt"):
                    with open(entry.path) as file:
                        report = Report(**json.loads(file.readline()))
                    if report.rank < self.world_size:
                        reports[report.rank] = report
        return reports


def verdict(reports: dict[int, Report], world_size: int) -> str:
    """Who is to blame, in one line: a rank that failed, else one without a report, else the one that is furthest behind."""
    failed = [report for report in reports.values() if report.error]
    if failed:
        return "; ".join(f"rank {r.rank} failed at step {r.step} ({r.doing}): {r.error}" for r in failed)
    silent = [str(rank) for rank in range(world_size) if rank not in reports]
    if silent:
        return f"rank {', '.join(silent)} has left no report: killed from outside, stopped, or out of memory"
    place = {rank: (report.batch, report.phase) for rank, report in reports.items()}
    last = min(place.values())
    behind = [reports[rank] for rank in sorted(place) if place[rank] == last]
    if len(behind) == world_size:
        return f"all ranks hang at step {behind[0].step} ({behind[0].doing})"
    names = "; ".join(f"rank {r.rank} hangs at step {r.step} ({r.doing}, for {r.seconds:.0f} s)" for r in behind)
    others = sorted({report.doing for rank, report in reports.items() if place[rank] != last})
    return f"{names}; the others wait for it ({', '.join(others)})"


def _peer_is_gone(error: Exception) -> bool:
    """Whether an exception of a collective says that another rank has closed its connection, or timed out."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
