"""Shows the logs of submitted runs until the last of them has ended, through requeues."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dist_train import slurm
from dist_train.errors import INTERRUPTED
from launch.submission import Submitted

POLL_SECONDS = 2.0


class _Tail:
    """Prints what is new in a growing log; lines carry the run's name if there are several runs."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label, self.offset = path, label, 0

    def show(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        # Whole lines only; the rest is shown once it is complete.
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        for line in data.decode(errors="replace").splitlines():
            print(f"{self.label}{line}", flush=True)


def _state(number: str) -> str:
    try:
        return slurm.job(number).get("JobState", "GONE")
    except slurm.Unanswered:  # the controller will come back; the job runs meanwhile
        return "UNKNOWN"


def follow(jobs: Sequence[Submitted]) -> int:
    """Print the logs; 0 when all runs completed, 1 when one did not, 130 after Ctrl-C, which leaves the jobs alone."""
    tails = {job.job: _Tail(job.log, f"{job.config.name}: " if len(jobs) > 1 else "") for job in jobs}
    ended: dict[str, str] = {}
    try:
        while len(ended) < len(jobs):
            time.sleep(POLL_SECONDS)
            # Queried before the log is read, so that nothing can be written after the last read.
            states = {number: _state(number) for number in tails if number not in ended}
            for tail in tails.values():
                tail.show()
            ended |= {number: state for number, state in states.items() if state in {*slurm.ENDED, "GONE"}}
    except KeyboardInterrupt:
        print(f"\nstopped following; job {jobs[0].job} keeps running")
        return INTERRUPTED
    for number, state in ended.items():
        print(f"job {number}: {state}")
    return 0 if set(ended.values()) == {"COMPLETED"} else 1
