"""The watchdog of a rank: when one rank hangs or dies, every rank that still can writes a report, and the run ends."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but torch does not list it

from dist_train.config import FaultConfig
from dist_train.distributed.fault_report import FaultReport, FaultReports, exit_code_for, first_line, verdict
from dist_train.distributed.heartbeat import Heartbeat
from dist_train.distributed.launcher import is_command_line, started_at
from dist_train.errors import FAILED, USER_ERROR, UserError

log = logging.getLogger("dist_train")

TICK_SECONDS = 1.0
GRACE_SECONDS = 4.0
"""How long a rank waits for the reports of the others."""
SILENT_LOOKS = 5
"""How often in a row the next rank has to be found silent: a job scheduler suspends all ranks together, and they wake up one after the
other, each to a silence that was its own."""

JOIN = "process group"
"""The phase of a rank until all others have joined."""


class Watchdog:
    """Watches one rank from a thread of its own; a context manager.

    ``step`` and ``phase`` are a few assignments, made all over the training loop.  The thread looks at them once a
    second: a phase that takes too long, a report of another rank, or silence of the next rank's heartbeat ends this rank as
    well, with its own report.

    A rank ends in one of these ways:

    - without an error;
    - by an exception of its own, which :meth:`fail` reports first.  It reports none in a run of one rank, nor a user error
      that all ranks know.  If rank 0 has failed alike, the rank exits silently; if it cannot leave the process group, a timer
      ends it;
    - by :meth:`_end_process`, because it hangs or another rank has ended;
    - by faulthandler, where it hangs and the thread is stuck as well.
    """

    def __init__(self, faults: FaultConfig, folder: Path, rank: int, world_size: int) -> None:
        self.faults = faults
        self.reports = FaultReports(folder / "faults", world_size)
        self.rank = rank
        self.world_size = world_size
        self._steps = self._batch = self._phases = 0
        self._doing, self._since = "checks", time.monotonic()
        self._joined = False
        self._start = {"imports": _seconds_of_imports()}
        self._limit = 60 * faults.first_step_minutes
        self.at_end: Callable[[], None] | None = None
        """Last action before the watchdog ends the process; it must be brief."""
        self._heartbeat: Heartbeat | None = None
        self._silent_looks = 0
        self._stop = threading.Event()
        self._ending = threading.Lock()
        """Held by whichever thread ends the process, the main one or the watching one, so that there is one exit code."""
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        # Every rank removes its report of an earlier start before the process group is made: what exists afterwards is new.
        self.reports.path(self.rank).unlink(missing_ok=True)
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
        """Note that a global batch is done.

        A phase may take ``faults.first_step_minutes`` up to the first one, and ``faults.timeout_minutes`` from then on.
        """
        if self._batch == 0:
            # Ends the last phase of the start, which is summed up here.
            self.phase("after the first step")
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
        """Report the exception of this rank; then it goes its way.

        Does not return where the exception only follows from the end of another rank (unless this process is ending
        already), nor where rank 0 has failed alike: the process ends here.
        """
        # A user error that all ranks find is printed by the command line; no report is needed.
        known_to_all = isinstance(error, UserError) and (error.on_all_ranks or not self._joined)
        if self.world_size == 1 or self._stop.is_set() or known_to_all:
            return
        # The cause is on the rank that is gone: this one's traceback would only hide it.
        if _peer_is_gone(error):
            self._end_process()
        with self._ending:
            self.reports.write(self._report(error), error)
            if self.rank:
                self._leave_it_to_rank0(error)
            # Leaving the process group can wait for ranks that never arrive.
            timer = threading.Timer(5 * GRACE_SECONDS, os._exit, [exit_code_for(error)])
            timer.daemon = True
            timer.start()
            # The exception ends this process, with its traceback: the thread must not end it before that is printed.
            self._stop.set()

    def _leave_it_to_rank0(self, error: Exception) -> None:
        """Exit silently if rank 0 has failed in the same way: an error that all ranks share is shown once."""
        time.sleep(1)
        first = self.reports.read().get(0)
        if first and first.error == first_line(error):
            os._exit(exit_code_for(error))

    def _work(self) -> None:
        while not self._stop.wait(min(TICK_SECONDS, self._limit / 4)):
            # Set anew in every round, so it fires only where this thread is stuck as well: an extension that never releases
            # the interpreter lock stops all threads of Python, but not faulthandler's.
            if (file := _real_stderr()) is not None:
                faulthandler.dump_traceback_later(self._limit + 60, exit=True, file=file)
            if self._is_late() or self._has_other_report() or self._is_next_dead():
                self._end_process()

    def _is_late(self) -> bool:
        return time.monotonic() - self._since > self._limit

    def _has_other_report(self) -> bool:
        # Reports count only after this rank has joined: before that, they can be those of an earlier start.
        return self._joined and bool(self.reports.read().keys() - {self.rank})

    def _is_next_dead(self) -> bool:
        is_silent = self._heartbeat is not None and self._heartbeat.is_next_silent
        self._silent_looks = self._silent_looks + 1 if is_silent else 0
        return self._silent_looks >= SILENT_LOOKS

    def _end_process(self) -> None:
        """Report, say who is to blame when the other reports are there, and leave without waiting for the process group.

        Takes a few seconds, for the reports of the others, and those of ``at_end``.
        Returns only where the exception of this rank is ending the process already.
        """
        with self._ending:
            if self._stop.is_set():
                return
            # The report comes first: the others end when they see it, and wait for it.
            self.reports.write(self._report(None), None)
            reports = self._wait_for_reports()
            failed = [report.exit_code for report in reports.values() if report.error]
            if failed:
                # The failed rank prints its traceback first.
                time.sleep(GRACE_SECONDS / 2)
            # A mistake that the user can fix is said by the rank that found it, in a line of its own.
            if USER_ERROR not in failed:
                self._blame(reports)
            if self.at_end:
                self.at_end()
            # os._exit flushes nothing.  sys.exit would end this thread alone, and the main one may hang forever.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            # A mistake of the user (2) outweighs a failure (1): another try would not help.
            os._exit(max(failed, default=FAILED))

    def _wait_for_reports(self) -> dict[int, FaultReport]:
        """The reports of all ranks, or after GRACE_SECONDS of those that still could write one."""
        deadline = time.monotonic() + GRACE_SECONDS
        while len(self.reports.read()) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.reports.read()

    def _blame(self, reports: dict[int, FaultReport]) -> None:
        text = f"{verdict(reports, self.world_size)}; see {self.reports.folder}"
        log.error("%s", text)  # on the screen by rank 0, else in this rank's log
        # Where rank 0 is the one that failed or is gone, the first of the others speaks for it.
        if self.rank and self.rank == min((rank for rank, report in reports.items() if not report.error), default=0):
            print(f"dist-train: {text}", file=sys.stderr)

    def _report(self, error: Exception | None) -> FaultReport:
        return FaultReport(
            rank=self.rank,
            step=self._steps,
            batch=self._batch,
            phase=self._phases,
            doing=self._doing,
            seconds=round(time.monotonic() - self._since, 1),
            error=first_line(error) if error else None,
            exit_code=exit_code_for(error),
        )


def _real_stderr() -> TextIO | None:
    """Standard error, if it is a file of the system: in a notebook it is not."""
    for stream in (sys.stderr, sys.__stderr__):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if stream is not None and stream.fileno() >= 0:
                return stream
    return None


def _seconds_of_imports() -> float:
    """Age of a process that is a command; 0 in a notebook or a program, which may have done anything before."""
    if not is_command_line():
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (started_at(os.getpid()) or 0.0)


def _peer_is_gone(error: Exception) -> bool:
    """Whether an exception says that another rank has closed its connection, or timed out.

    Any DistError counts, and any RuntimeError with "gloo" in its text.
    """
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
