"""The watchdog of a rank: when one rank hangs or dies, every rank writes a report and the run ends."""

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
from typing import TextIO

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but torch does not list it

from dist_train.config import FaultConfig
from dist_train.distributed.heartbeat import Heartbeat
from dist_train.distributed.launcher import started_at
from dist_train.errors import FAILED, USER_ERROR, UserError
from dist_train.files import draft_of

log = logging.getLogger("dist_train")

TICK_SECONDS = 1.0
GRACE_SECONDS = 4.0
"""How long a rank waits for the reports of the others."""

JOIN = "process group"
"""The phase of a rank until all others have joined."""


@dataclass(frozen=True)
class FaultReport:
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
    exit_code: int = FAILED
    """What the run ends with for it: another try helps against some failures, and not against others."""


class Watchdog:
    """Watches one rank from a thread of its own; a context manager.

    ``step`` and ``phase`` are a few assignments, made all over the training loop.  The thread looks at them once a
    second: a phase that takes too long, or a report of another rank, ends this rank as well, with its own report.
    """

    def __init__(self, faults: FaultConfig, folder: Path, rank: int, world_size: int) -> None:
        self.faults = faults
        self.report_folder = folder / "faults"
        self.rank = rank
        self.world_size = world_size
        self._steps = self._batch = self._phases = 0
        self._doing, self._since = "checks", time.monotonic()
        self._joined = False
        self._start = {"imports": _seconds_of_imports()}
        self._limit = 60 * faults.first_step_minutes
        self.at_end: Callable[[], None] | None = None
        """What remains to be done, briefly, before the watchdog ends the process."""
        self._heartbeat: Heartbeat | None = None
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        # Every rank removes its report of an earlier start before the process group is made: what exists afterwards is
        # new.
        self._path(self.rank).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if isinstance(error, Exception):
            self.fail(error)
        self._stop.set()
        self._thread.join()
        if self._heartbeat:
            self._heartbeat.leave()
        faulthandler.cancel_dump_traceback_later()

    def step(self, step: int, batch: int) -> None:
        """Note that a global batch is done; from the first one on, ``faults.timeout_minutes`` holds."""
        if self._batch == 0:
            self.phase("first step")
            parts = ", ".join(f"{doing} {seconds:.2f} s" for doing, seconds in self._start.items() if seconds > 0.005)
            log.info("first step after %.2f s: %s", sum(self._start.values()), parts)
        self._steps, self._batch, self._phases = step, batch, 0
        self._limit = 60 * self.faults.timeout_minutes

    def phase(self, doing: str) -> None:
        """Note what this rank begins to do, or does again: a wait for data, a pass, a collective."""
        # Before the first step the phases are summed: they become the line on how long the start took.
        now = time.monotonic()
        if self._batch == 0:
            self._start[self._doing] = self._start.get(self._doing, 0.0) + now - self._since
        self._joined |= self._doing == JOIN
        self._phases += doing != self._doing
        self._doing, self._since = doing, now

    def exchange_heartbeats(self, store: Store) -> None:
        """Notice from here on, through a store that all ranks see, the death of a rank that leaves no report."""
        if self.world_size > 1:
            self._heartbeat = Heartbeat(store, self.rank, self.world_size)

    def fail(self, error: Exception) -> None:
        """Report the exception of this rank; does not return where it only follows from the end of another one."""
        # What all ranks find out together, each of them says or is silent about by itself.
        known_to_all = isinstance(error, UserError) and (error.on_all_ranks or not self._joined)
        if self.world_size == 1 or self._stop.is_set() or known_to_all:
            return
        if _peer_is_gone(error):
            self._end()
        with self._ending:
            self._write(error)
            # Ranks other than 0 wait for the report of rank 0, and are silent if it failed in the same way.
            if self.rank:  # an error that all ranks share is shown once
                time.sleep(1)
                first = self._reports().get(0)
                if first and first.error == _first_line(error):
                    os._exit(_exit_code(error))
            # Leaving the process group can wait for ranks that never arrive.
            timer = threading.Timer(5 * GRACE_SECONDS, os._exit, [_exit_code(error)])
            timer.daemon = True
            timer.start()
            self._stop.set()

    def _work(self) -> None:
        while not self._stop.wait(min(TICK_SECONDS, self._limit / 4)):
            # If an extension never releases the interpreter lock, this thread is stuck; faulthandler still dumps the stacks.
            if (file := _real_stderr()) is not None:
                faulthandler.dump_traceback_later(self._limit + 60, exit=True, file=file)
            # Reports count only after this rank has joined: before that, they can be those of an earlier start.
            late = time.monotonic() - self._since > self._limit
            if late or (self._joined and self._reports().keys() - {self.rank}) or self._is_next_dead():
                self._end()

    def _is_next_dead(self) -> bool:
        return self._heartbeat is not None and self._heartbeat.is_next_silent

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
            failed = [report.exit_code for report in reports.values() if report.error]
            if failed:
                time.sleep(GRACE_SECONDS / 2)  # its own traceback first
            # A mistake that the user can fix is said by the rank that found it, in a line of its own.
            if USER_ERROR not in failed:
                self._blame(reports)
            if self.at_end:
                self.at_end()
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(max(failed, default=FAILED))

    def _blame(self, reports: dict[int, FaultReport]) -> None:
        text = f"{verdict(reports, self.world_size)}; see {self.report_folder}"
        log.error("%s", text)  # on the screen by rank 0, else in this rank's log
        if self.rank and self.rank == min((rank for rank, report in reports.items() if not report.error), default=0):
            print(f"dist-train: {text}", file=sys.stderr)

    # ---------------------------------------------------------------------------------------------- the reports

    def _path(self, rank: int) -> Path:
        return self.report_folder / f"rank{rank}.txt"

    def _write(self, error: Exception | None) -> None:
        seconds = round(time.monotonic() - self._since, 1)
        report = FaultReport(
            self.rank,
            self._steps,
            self._batch,
            self._phases,
            self._doing,
            seconds,
            _first_line(error) if error else None,
            _exit_code(error),
        )
        path = self._path(self.rank)
        try:
            self.report_folder.mkdir(parents=True, exist_ok=True)
            with draft_of(path) as draft, draft.open("w") as file:
                file.write(json.dumps(asdict(report)) + "\n\n")
                if error:
                    file.writelines([*traceback.format_exception(error), "\n"])
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as failure:
            log.error("%s: cannot be written (%s)", path, failure.strerror)

    def _reports(self) -> dict[int, FaultReport]:
        """All reports; listing the folder shows those of other nodes even over NFS."""
        reports = {}
        with contextlib.suppress(OSError, ValueError, TypeError), os.scandir(self.report_folder) as entries:
            for entry in entries:
                if entry.name.endswith(".txt"):
                    with open(entry.path) as file:
                        report = FaultReport(**json.loads(file.readline()))
                    if report.rank < self.world_size:
                        reports[report.rank] = report
        return reports


def verdict(reports: dict[int, FaultReport], world_size: int) -> str:
    """Which rank is to blame, in one line: one that failed, else one without a report, else the one furthest behind."""
    failed = [report for report in reports.values() if report.error]
    if failed:
        return "; ".join(f"rank {r.rank} failed at step {r.step} ({r.doing}): {r.error}" for r in failed)
    silent = [str(rank) for rank in range(world_size) if rank not in reports]
    if silent:
        return f"rank {', '.join(silent)} left no report: killed from outside, stopped, or out of memory"
    place = {rank: (report.batch, report.phase) for rank, report in reports.items()}
    last = min(place.values())
    behind = [reports[rank] for rank in sorted(place) if place[rank] == last]
    if len(behind) == world_size:
        return f"all ranks hang at step {behind[0].step} ({behind[0].doing})"
    names = "; ".join(f"rank {r.rank} hangs at step {r.step} ({r.doing}, for {r.seconds:.0f} s)" for r in behind)
    others = sorted({report.doing for rank, report in reports.items() if place[rank] != last})
    return f"{names}; the others wait for it ({', '.join(others)})"


def _real_stderr() -> TextIO | None:
    """Standard error, if it is a file of the system: in a notebook it is not."""
    for stream in (sys.stderr, sys.__stderr__):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if stream is not None and stream.fileno() >= 0:
                return stream
    return None


def _seconds_of_imports() -> float:
    """Age of a process that is a command; 0 in a notebook or a program, which may have done anything before."""
    if Path(sys.argv[0]).name not in ("dist-train", "__main__.py"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (started_at(os.getpid()) or 0.0)


def _peer_is_gone(error: Exception) -> bool:
    """Whether an exception of a collective says that another rank has closed its connection, or timed out."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _exit_code(error: Exception | None) -> int:
    return error.exit_code if isinstance(error, UserError) else FAILED


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
