"""A study: a grid of runs, trained one after the other or as a SLURM array (resumable), then compared."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from dist_train import slurm
from dist_train.compare.files import publish
from dist_train.compare.grouping import NEUTRAL, compare
from dist_train.compare.runs import read_folder
from dist_train.config_file import changed_fields, load_config
from dist_train.distributed.lock import locked_alone
from dist_train.errors import FAILED, STOPPED, ConfigError, DataError, SlurmError
from dist_train.training.checkpoint import is_finished
from launch import submission
from launch.grid import Cell, StudyConfig, cells, config_of, load_study
from launch.node import stop_on_signals


def load(path: str | Path) -> tuple[StudyConfig, list[Cell]]:
    """Read a study file and its cells, each checked against what it was trained with, if it was.

    Raises:
        ConfigError: the first fault, in one line.
    """
    study = load_study(path)
    grid = cells(study)
    for cell in grid:
        _check(study, cell)
    return study, grid


def finished(study: StudyConfig, cell: Cell) -> bool:
    """Whether a cell has been trained to its end, as its newest checkpoint says."""
    return is_finished(study.folder / cell.name)


def status_lines(study: StudyConfig, grid: Sequence[Cell]) -> list[str]:
    """A line per cell: finished, queued or running on SLURM, or missing."""
    jobs = _jobs(study, grid)
    lines = []
    for cell in grid:
        waits = f"queued or running as job {jobs[cell.name]}" if cell.name in jobs else "missing"
        lines.append(f"{'finished' if finished(study, cell) else waits:<8}  {cell.name}")
    return lines


def complete(study: StudyConfig, grid: Sequence[Cell], *, on_slurm: bool, command: str) -> int:
    """Train or submit what is missing, then compare; 0, 1 where a cell failed, 75 when asked to stop.

    Args:
        study, grid: from :func:`load`.
        on_slurm: submit what is missing as one array; where nothing is, compare.
        command: what the user typed, for the comparison.

    Raises:
        UserError: the study is running already, or cannot be trained here.
    """
    with _lock_file(study) as lock:
        if not locked_alone(lock, study.folder / "lock"):
            raise DataError(
                f"{study.folder}: this study is running already (or a run that it started is); wait for it, or stop it"
            )
        # The lock is released on return: the jobs are protected by their comments.
        if on_slurm:
            if _submit(study, grid):
                return 0
            status = 0
        else:
            if jobs := _jobs(study, grid):
                name, job = next(iter(jobs.items()))
                raise SlurmError(f"cell {name}: job {job} is training it; add --slurm, or scancel {job}")
            _prepare(study)
            status = Trainings(study, lock.fileno()).all(grid)
    if status != STOPPED:
        _compare(study, grid, command)
    return status


def _lock_file(study: StudyConfig) -> IO[str]:
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        return (study.folder / "lock").open("w")
    except OSError as error:
        raise DataError(
            f"{study.folder}: cannot be written ({error.strerror}); free space, or set another runs in the study file"
        ) from None


class Trainings:
    """The runs of a study, each in processes of its own, one run after the other; a signal stops the present one."""

    def __init__(self, study: StudyConfig, lock: int) -> None:
        self.study = study
        self.lock = lock
        self._requests = 0
        """How many signals have come."""

    def all(self, grid: Sequence[Cell]) -> int:
        """Train every cell that is not finished; 0, 1 where one failed, 75 where a signal came."""
        stop_on_signals(self._stop)
        failed = 0
        for number, cell in enumerate(grid, start=1):
            where = f"[{number}/{len(grid)}] {cell.label}, seed {cell.seed}"
            if finished(self.study, cell):
                print(f"{where}: finished before", flush=True)
                continue
            print(f"{where}: ", end="", flush=True)
            start = time.monotonic()
            status = self._one(cell, where)
            if self._requests:
                print("stopped; run the same command again to resume", flush=True)
                return STOPPED
            # Exit code 0 alone is no proof: the state of the newest checkpoint decides, as everywhere.
            if status or not finished(self.study, cell):
                failed += 1
                print(f"failed ({_last_line(_output(self.study, cell))}); see {_output(self.study, cell)}", flush=True)
            else:
                print(f"{_result(self.study, cell)}, {time.monotonic() - start:.0f} s", flush=True)
        return FAILED if failed else 0

    def _one(self, cell: Cell, where: str) -> int:
        output = _output(self.study, cell)
        output.parent.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "launch.local",
            "-n",
            str(self.study.processes),
            str(self.study.config),
            *cell.overrides,
        ]
        # The run inherits the lock: if this process is killed, no second study can start while the run still trains.
        # It has a session of its own, so that Ctrl-C reaches it once, through here.
        with output.open("ab") as file:
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, pass_fds=[self.lock], start_new_session=True
            )
        forwarded = 0
        while True:
            # Here and not in the handler, for which there may be no child yet.  Every request is forwarded once: a second
            # one tells launch.local to kill the ranks, while they may still be saving.
            if self._requests > forwarded:
                child.send_signal(signal.SIGTERM)
                forwarded = self._requests
            try:
                status = child.wait(timeout=1)
                _show(f"{where}: ")
                return status
            except subprocess.TimeoutExpired:
                _show(f"{where}: {_last_line(output)}")

    def _stop(self) -> None:
        self._requests += 1


def _submit(study: StudyConfig, grid: Sequence[Cell]) -> bool:
    """Submit the cells that are neither finished nor queued or running; false when all are finished."""
    slurm.require("leave out --slurm to train here, or run the command on a machine with SLURM")
    jobs = _jobs(study, grid)
    missing = [cell for cell in grid if not finished(study, cell) and cell.name not in jobs]
    # Only a submitted cell has a link there: what is missing and has one has failed.
    failed = {
        cell.name: f"failed ({_last_line(output)}; see {output.resolve()}); "
        for cell in missing
        if (output := _output(study, cell)).is_symlink()
    }
    submitted: dict[str, str] = {}
    if missing:
        _prepare(study)
        configs = [config_of(study, cell) for cell in missing]
        configs = submission.check(configs)
        # No MLflow run is their parent yet: the comparison will be, as it is without SLURM.
        for cell, one in zip(missing, submission.submit(configs, study.folder, command=None)):
            submitted[cell.name] = one.job
            output = _output(study, cell)
            output.parent.mkdir(exist_ok=True)
            # A resubmitted cell has a new log.
            output.unlink(missing_ok=True)
            output.symlink_to(one.log)
    for number, cell in enumerate(grid, start=1):
        if cell.name in submitted:
            what = f"{failed.get(cell.name, '')}submitted as job {submitted[cell.name]}"
        else:
            what = f"queued or running as job {jobs[cell.name]}" if cell.name in jobs else "finished before"
        print(f"[{number}/{len(grid)}] {cell.label}, seed {cell.seed}: {what}")
    working = {job.partition("_")[0] for job in (*jobs.values(), *submitted.values())}
    if working:
        print(f"\nfollow      tail -F {study.folder / 'output'}/*.txt\ncancel      scancel {' '.join(sorted(working))}")
        print("then        run the same command again: it resubmits failed cells, and compares once all are finished")
    return bool(working)


def _jobs(study: StudyConfig, grid: Sequence[Cell]) -> dict[str, str]:
    """The SLURM jobs that the study's cells wait in or are trained by, by the cells' names."""
    # A study that was never submitted needs no answer of the controller.
    if not (study.folder / "slurm").exists() or not shutil.which("squeue"):
        return {}
    jobs = slurm.jobs()
    folders = {cell.name: (study.folder / cell.name).resolve() for cell in grid if not finished(study, cell)}
    return {name: jobs[folder] for name, folder in folders.items() if folder in jobs}


def _output(study: StudyConfig, cell: Cell) -> Path:
    """What the training of a cell has said: a file, or a link to the log of a SLURM job."""
    return study.folder / "output" / f"{cell.name}.txt"


def _compare(study: StudyConfig, grid: Sequence[Cell], command: str) -> None:
    started = [cell for cell in grid if (study.folder / cell.name / "config.yaml").exists()]
    if not started:
        raise DataError(f"{study.folder}: no cell has started, so there is nothing to compare; see its folder output/")
    labels = {cell.name: cell.label for cell in grid}
    bases = {cell.label: cell.base for cell in grid}
    comparison = compare([read_folder(study.folder / cell.name) for cell in started], study.name, labels, bases)
    missing = [f"{cell.label}, seed {cell.seed}: missing" for cell in grid if cell not in started]
    comparison = replace(comparison, notes=[*missing, *comparison.notes])
    print()
    publish(comparison, study.folder / "comparison", command, tracked=True, parent=True, overwrite=True)


def _prepare(study: StudyConfig) -> None:
    for step in study.prepare:
        if step.makes.exists():
            continue
        print(f"making {step.makes}: {step.run}", flush=True)
        words = shlex.split(step.run)
        # The Python of this environment, whichever comes first in PATH.
        words[:1] = [sys.executable] if words[0] in ("python", "python3") else words[:1]
        try:
            code = subprocess.run(words).returncode
        except OSError as error:
            raise DataError(
                f"{step.makes}: `{step.run}` cannot be started ({error.strerror}); correct prepare"
            ) from None
        if code:
            raise DataError(
                f"{step.makes}: could not be made by `{step.run}`; fix that, then run the same command again"
            )


def _check(study: StudyConfig, cell: Cell) -> None:
    """The settings of a finished cell are those that it was trained with."""
    config, before = config_of(study, cell), study.folder / cell.name / "config.yaml"
    if not finished(study, cell) or not before.exists():
        return
    changes = [one for one in changed_fields(load_config(before), config) if not one[0].startswith(NEUTRAL)]
    if changes:
        key, old, new = changes[0]
        raise ConfigError(
            f"cell {cell.name} was trained with {key} {old}, not {new}; give the study another name, or remove {before.parent}"
        )


def _result(study: StudyConfig, cell: Cell) -> str:
    report = json.loads((study.folder / cell.name / "report.json").read_text())
    return "top-1 % " + " ".join(f"{100 * one['top1']:.2f}" for one in report["exits"])


def _show(line: str) -> None:
    """Put a line in the place of the present one, on a terminal; elsewhere nothing."""
    if sys.stdout.isatty():
        print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)


def _last_line(path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
