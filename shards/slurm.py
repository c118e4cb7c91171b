"""Shards written by the tasks of a SLURM array, for ``python -m shards make --slurm N``."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dist_train import slurm
from dist_train.errors import DataError, SlurmError, UserError
from shards.pack import Task, write_shard
from shards.processes import ProgressCallback, in_processes

POLL_SECONDS = 2.0
OWN = ("array", "comment", "error", "output")
"""Flags of sbatch that cannot be chosen: by them the job and its logs are found again."""


@dataclass(frozen=True)
class Array:
    """An array to be submitted: how many tasks, processes in each (default: its cores), other flags of sbatch."""

    tasks: int
    workers: int | None = None
    flags: Sequence[str] = ()
    """``KEY=VALUE``, or ``KEY`` alone, as sbatch has them without the dashes."""

    def __post_init__(self) -> None:
        """Refuse flags that sbatch does not have in this form, and a machine without SLURM; raises SlurmError."""
        for flag in self.flags:
            key, _, value = flag.partition("=")
            if not re.fullmatch(r"[a-z][a-z-]+", key) or ("=" in flag and not value) or key in OWN:
                raise SlurmError(
                    f"--sbatch {flag}: write a long flag of sbatch without its dashes, such as partition=NAME, but none of "
                    + ", ".join(OWN)
                )
        slurm.require("leave out --slurm to make the shards here, or give the command where SLURM is")

    def write(self, draft: Path, tasks: Sequence[Task], report: ProgressCallback | None) -> None:
        """Write the shards that are not finished, as an array whose end is waited for.

        Should this process be killed, the array continues, and the next call waits for it before it submits what is missing.

        Raises:
            SlurmError: sbatch refuses the array, or some of its tasks failed, for instance on a node that does not see the source.
        """
        draft = draft.resolve()
        if job := slurm.job_on(draft):
            _wait(draft, tasks, job.partition("_")[0], report)
        if todo := [task for task in tasks if not task.done_file.exists()]:
            self._write(draft, tasks, todo, report)

    def _write(self, draft: Path, tasks: Sequence[Task], todo: Sequence[Task], report: ProgressCallback | None) -> None:
        parts = [todo[first :: self.tasks] for first in range(min(self.tasks, len(todo)))]
        jobs = self._submit(draft, parts)
        _wait(draft, tasks, jobs[0].job_id.partition("_")[0], report)
        failed = [job for job, part in zip(jobs, parts) if not all(task.done_file.exists() for task in part)]
        if failed:
            log = failed[0].paths.stdout
            why = slurm.last_line(log.read_text(errors="replace"))[:200] if log.exists() else "no log"
            raise SlurmError(
                f"{len(failed)} of {len(jobs)} tasks did not finish, the first is job {failed[0].job_id} ({why}); see {log}, "
                "and run the same command again to resume"
            )

    def _submit(self, draft: Path, parts: Sequence[Sequence[Task]]) -> list[Any]:
        folder = draft / "slurm"
        flags = {"requeue": True, **slurm.flags(self.flags)}
        first = not folder.exists()
        executor = slurm.executor(
            folder,
            job_name="shards",
            comment=str(draft),
            cpus_per_task=self.workers,
            # submitit's own default is five minutes; None leaves the limit to the partition.
            time=None,
            array_parallelism=len(parts),
            use_srun=False,
            stderr_to_stdout=True,
            additional_parameters=flags,
        )
        try:
            jobs = slurm.submit(executor, write_shards, [(part, self.workers) for part in parts])
        except SlurmError:
            # The logs of an earlier array stay.
            if first:
                shutil.rmtree(folder)
            raise
        job = jobs[0].job_id.partition("_")[0]
        print(
            f"job {job}: {len(parts)} tasks write {sum(map(len, parts))} shards, logs in {folder}; it continues without this "
            f"command, which can be given again; cancel: scancel {job}",
            file=sys.stderr,
            flush=True,
        )
        return jobs


def write_shards(tasks: Sequence[Task], workers: int | None) -> NoReturn:
    """What a task of the array runs, again from the start when it is requeued: those of its shards that are missing."""
    code = 0
    try:
        todo = [task for task in tasks if not task.done_file.exists()]
        for _ in in_processes(write_shard, todo, workers or int(os.environ["SLURM_CPUS_ON_NODE"])):
            pass
    except (UserError, OSError) as error:
        print(f"shards: {error}", file=sys.stderr)
        code = 2
    # By SystemExit, submitit writes no result and the job ends with this code.
    sys.exit(code)


def refuse_jobs(drafts: Path, own: Path | None) -> None:
    """Refuse a folder of drafts in which an array still writes, unless it is the one that makes ``own``.

    Raises:
        DataError: it is so.
    """
    if shutil.which("squeue") is None:
        return
    for folder, job in slurm.jobs().items():
        if folder.parent == drafts.resolve() and not (own and folder == own.resolve()):
            raise DataError(
                f"{drafts.parent}: job {job} is making shards there; its own command, with --slurm, waits for it, "
                f"scancel {job.partition('_')[0]} ends it"
            )


def _wait(draft: Path, tasks: Sequence[Task], job: str, report: ProgressCallback | None) -> None:
    """Return when no task of the array is queued or running any more."""
    total = sum(len(task.items) for task in tasks)
    working = True
    while working:
        with contextlib.suppress(slurm.Unanswered):  # the controller comes back; the array runs meanwhile
            working = slurm.job_on(draft) is not None
        done = sum(len(task.items) for task in tasks if task.done_file.exists())
        if report:
            report(f"job {job}", done, total)
        if working:
            time.sleep(POLL_SECONDS)
