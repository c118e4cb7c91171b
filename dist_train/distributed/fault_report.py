"""What the ranks leave behind when a fault ends a run, and which of them is to blame."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_train.errors import FAILED, UserError
from dist_train.files import draft_of

log = logging.getLogger("dist_train")


@dataclass(frozen=True)
class FaultReport:
    """The head of ``faults/rankN.txt``: where a rank was.  The stacks of all its threads follow."""

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


class FaultReports:
    """The reports of all ranks: files in the run folder, the one place that ranks of a broken process group still share."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        self._world_size = world_size

    def path(self, rank: int) -> Path:
        """Where the report of a rank is."""
        return self.folder / f"rank{rank}.txt"

    def write(self, report: FaultReport, error: Exception | None) -> None:
        """Write the report of this rank, with the traceback of its exception and the stacks of all its threads."""
        path = self.path(report.rank)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Whole or absent: the other ranks read it the moment that it is there.
            with draft_of(path) as draft, draft.open("w") as file:
                file.write(json.dumps(asdict(report)) + "\n\n")
                if error:
                    file.writelines([*traceback.format_exception(error), "\n"])
                # faulthandler writes to the descriptor, past the buffer of the file.
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as failure:
            log.error("%s: cannot be written (%s)", path, failure.strerror)

    def read(self) -> dict[int, FaultReport]:
        """All reports that can be read, by rank."""
        reports = {}
        # Listed, not looked for by name: over NFS a listing asks the server, while a missing name may be remembered.
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            paths = [entry.path for entry in entries if entry.name.endswith(".txt")]
            for path in paths:
                # Another version's, or damaged: it must not hide those of the other ranks.
                with contextlib.suppress(OSError, ValueError, TypeError), open(path) as file:
                    report = FaultReport(**json.loads(file.readline()))
                    # An earlier start may have had more ranks.
                    if report.rank < self._world_size:
                        reports[report.rank] = report
        return reports


def verdict(reports: dict[int, FaultReport], world_size: int) -> str:
    """Which rank is to blame, in one line: one that failed, else one without a report, else the one furthest behind."""
    failed = [report for report in reports.values() if report.error]
    if failed:
        return "; ".join(f"rank {r.rank} failed at step {r.step} ({r.doing}): {r.error}" for r in failed)
    silent = [str(rank) for rank in range(world_size) if rank not in reports]
    if silent:
        ranks = "ranks" if len(silent) > 1 else "rank"
        return f"{ranks} {', '.join(silent)} left no report: killed from outside, stopped, or out of memory"
    # Ranks meet in every collective, so the one that hangs is behind, and the others wait for it in the next collective.
    place = {rank: (report.batch, report.phase) for rank, report in reports.items()}
    last = min(place.values())
    behind = [reports[rank] for rank in sorted(place) if place[rank] == last]
    if len(behind) == world_size:
        return f"all ranks hang at step {behind[0].step} ({behind[0].doing})"
    names = "; ".join(f"rank {r.rank} hangs at step {r.step} ({r.doing}, for {r.seconds:.0f} s)" for r in behind)
    others = sorted({report.doing for rank, report in reports.items() if place[rank] != last})
    them = "them" if len(behind) > 1 else "it"
    return f"{names}; the others wait for {them} ({', '.join(others)})"


def exit_code_for(error: Exception | None) -> int:
    """What a run ends with for an exception; a hang, which has none, is a failure."""
    return error.exit_code if isinstance(error, UserError) else FAILED


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
