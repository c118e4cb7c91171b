"""``dist-train study``: a grid of runs, trained one after the other or as a SLURM array, that goes on where it ended.

It ends in one comparison.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dist_train.arguments import Parser
from dist_train.compare.grouping import NEUTRAL
from dist_train.config import Natural, Positive, Section
from dist_train.config_file import changed_fields, explain, load_config, make_config, parse_yaml, plain
from dist_train.errors import ConfigError, DataError, SlurmError

STOPPED = 75
"""Exit code of a study that was asked to stop, as of a run: the same command goes on."""

EPILOG = """\
A study file:

  name: teachers                       # runs/teachers/CELL, MLflow's experiment
  config: quickstart.yaml              # beside the study file
  processes: 2
  prepare: [{makes: data/few, run: python -m shards make digits data/few --per-class 10}]
  set: {train.epochs: 40}              # fields of all cells
  axes:                                # differences are against the first variant of the last axis
    teachers:                          # named variants of one field or several
      labels alone: {loss.teachers: none}
      later exits: {loss.teachers: later}
    optim.lr: [0.05, 0.1]              # or values of the field that the axis is named after
  seeds: [0, 1, 2]
"""


class Prepared(Section):
    """A command that makes data, and the file or folder that is there once it has."""

    makes: Path
    """Where the command puts its result; while it is there, the command is not run."""
    run: str
    """The command line, run in the current folder."""


class StudyConfig(Section):
    """A grid: every combination of one variant per axis, with every seed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the study: its folder under `runs`, and the experiment in MLflow."""
    config: Path
    """Configuration that all cells start from, relative to the study file."""
    runs: Path = Path("runs")
    """Folder in which the study's folder lies."""
    processes: Positive = 1
    """Processes of every run on this machine; on a cluster the section slurm of the configuration says it."""
    prepare: tuple[Prepared, ...] = ()
    """Commands that make the data."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of all cells."""
    axes: dict[str, dict[str, dict[str, Any]]]
    """Axis: variant: fields.  A list is short for one field's values, the axis being named after the field."""
    baseline: str | None = None
    """Axis whose first variant the others are set against, the other axes being equal (default: the last axis)."""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    """Seeds that every combination is trained with."""

    @field_validator("axes", mode="before")
    @classmethod
    def _open_lists(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        opened = {}
        for axis, variants in given.items():
            if not variants:
                raise ValueError(f"{axis} has no variants")
            opened[axis] = {plain(v): {axis: v} for v in variants} if isinstance(variants, list) else variants
        return opened

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if not self.axes:
            raise ValueError("axes is empty; give at least one axis with its variants")
        if self.against not in self.axes:
            raise ValueError(f"baseline is {self.baseline!r}; it is one of the axes: {', '.join(self.axes)}")
        return self

    @property
    def against(self) -> str:
        """The axis of the baseline."""
        return self.baseline or list(self.axes)[-1]

    @property
    def folder(self) -> Path:
        """The study's own folder."""
        return self.runs / self.name


@dataclass(frozen=True)
class Cell:
    """One run of a study: ``label`` is that of its group, without the seed, ``base`` that of the group it is set against."""

    name: str
    label: str
    base: str
    seed: int
    overrides: tuple[str, ...]


def load_study(path: str | Path) -> StudyConfig:
    """Read a study file; raises ConfigError with one line for the first fault."""
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(), str(path))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a study file, see configs/study_*.yaml"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not a study; see configs/study_digits.yaml")
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, StudyConfig)}") from None
    return study.model_copy(update={"config": path.parent / study.config})


def cells(study: StudyConfig) -> list[Cell]:
    """All cells, seeds innermost; raises ConfigError where a cell's configuration is not valid or two have one name."""
    made = []
    for combination in itertools.product(*(variants.items() for variants in study.axes.values())):
        words = {axis: _label(axis, variant) for axis, (variant, _) in zip(study.axes, combination)}
        label = ", ".join(words.values())
        first = {study.against: _label(study.against, next(iter(study.axes[study.against])))}
        base = ", ".join((words | first).values())
        fields = dict(study.set)
        for _, settings in combination:
            fields |= settings
        short = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", variant).strip("_.") for variant, _ in combination)
        for seed in study.seeds:
            name = f"{short}-seed{seed}"
            given = fields | {"name": name, "runs": str(study.folder), "seed": seed, "tracking.experiment": study.name}
            overrides = [word for key, value in given.items() for word in (f"--{key}", _word(value))]
            made.append(Cell(name, label, base, seed, tuple(overrides)))
    names = [cell.name for cell in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{names.count(name)} cells would be called {name}; give the variants other names")
    for cell in made:
        _check(study, cell)
    return made


def finished(study: StudyConfig, cell: Cell) -> bool:
    """Whether a cell has been trained to its end with these settings."""
    return (study.folder / cell.name / "report.json").exists()


def run(arguments: list[str]) -> int:
    """Train or submit what is missing, then compare; 0, 1 where a cell failed, 75 when asked to stop, or UserError."""
    parser = Parser(
        "dist-train study", description="Train a grid of runs, and compare them; the same command goes on.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("study", metavar="STUDY", help="YAML file, see configs/study_*.yaml")
    parser.add_argument("--show", action="store_true", help="list the cells and what is missing; train nothing")
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="submit what is missing as one SLURM array, by the section slurm of the configuration; else compare",
    )
    known = parser.parse_args(arguments)
    study = load_study(known.study)
    grid = cells(study)
    if known.show:
        jobs = _jobs(study, grid)
        for cell in grid:
            waits = f"queued or running as job {jobs[cell.name]}" if cell.name in jobs else "missing"
            print(f"{'finished' if finished(study, cell) else waits:<8}  {cell.name}")
        return 0
    study.folder.mkdir(parents=True, exist_ok=True)
    with (study.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"{study.folder}: this study is running already (or a run that it started is); wait for it, or stop it"
            ) from None
        if known.slurm:
            if _submit(study, grid):
                return 0
            status = 0
        else:
            if jobs := _jobs(study, grid):
                name, job = next(iter(jobs.items()))
                raise SlurmError(f"cell {name}: job {job} works on it; give --slurm as well, or scancel {job}")
            _prepare(study)
            status = Trainings(study, lock.fileno()).all(grid)
    if status != STOPPED:
        _compare(study, grid, shlex.join(["dist-train", "study", *arguments]))
    return status


class Trainings:
    """The runs of a study, each in processes of its own, one run after the other; a signal stops the present one."""

    def __init__(self, study: StudyConfig, lock: int) -> None:
        self.study = study
        self.lock = lock
        self.child: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def all(self, grid: Sequence[Cell]) -> int:
        """Train every cell that is not finished; 0, 1 where one failed, 75 where a signal came."""
        for request in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(request, self._stop)
        failed = 0
        for number, cell in enumerate(grid, start=1):
            where = f"[{number}/{len(grid)}] {cell.label}, seed {cell.seed}"
            if finished(self.study, cell):
                print(f"{where}: finished before", flush=True)
                continue
            print(f"{where}: ", end="", flush=True)
            start = time.monotonic()
            status = self._one(cell)
            if self.stopping:
                print("stopped; the same command goes on", flush=True)
                return STOPPED
            if status or not finished(self.study, cell):
                failed += 1
                print(f"failed ({_last_line(_output(self.study, cell))}); see {_output(self.study, cell)}", flush=True)
            else:
                print(f"{_result(self.study, cell)}, {time.monotonic() - start:.0f} s", flush=True)
        return 1 if failed else 0

    def _one(self, cell: Cell) -> int:
        output = _output(self.study, cell)
        output.parent.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "launch.local", "-n", str(self.study.processes), str(self.study.config), *cell.overrides,
        ]  # fmt: skip
        # The run inherits the lock: should this process be killed, no second study starts while the run goes on.
        with output.open("ab") as file:
            self.child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, pass_fds=[self.lock], start_new_session=True
            )
        while True:
            try:
                return self.child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                # Before its ranks are there, launch.local has nobody to pass the signal on to.
                if self.stopping:
                    self.child.send_signal(signal.SIGTERM)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self.child and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)


def _submit(study: StudyConfig, grid: Sequence[Cell]) -> bool:
    """Submit the cells that are neither finished nor queued or running; false when all are finished."""
    from launch import cluster, submission

    cluster.require("leave out --slurm to train here, or give the command where SLURM is")
    jobs = _jobs(study, grid)
    missing = [cell for cell in grid if not finished(study, cell) and cell.name not in jobs]
    failed = {
        cell.name: f"failed ({_last_line(output)}; see {output.resolve()}); "
        for cell in missing
        if (output := _output(study, cell)).is_symlink()
    }
    submitted: dict[str, str] = {}
    if missing:
        _prepare(study)
        configs = [load_config(study.config, *cell.overrides) for cell in missing]
        submission.check(configs)
        # No MLflow run is their parent yet: the comparison will be, as it is without SLURM.
        for cell, one in zip(missing, submission.submit(configs, study.folder, command=None)):
            submitted[cell.name] = one.job
            output = _output(study, cell)
            output.parent.mkdir(exist_ok=True)
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
        print("then        the same command submits what has failed, and compares the cells when all are finished")
    return bool(working)


def _jobs(study: StudyConfig, grid: Sequence[Cell]) -> dict[str, str]:
    """The SLURM jobs that the study's cells wait in or are trained by, by the cells' names."""
    if not (study.folder / "slurm").exists() or not shutil.which("squeue"):
        return {}
    from launch import cluster

    jobs = cluster.jobs()
    folders = {cell.name: (study.folder / cell.name).resolve() for cell in grid if not finished(study, cell)}
    return {name: jobs[folder] for name, folder in folders.items() if folder in jobs}


def _output(study: StudyConfig, cell: Cell) -> Path:
    """What the training of a cell has said: a file, or a link to the log of a SLURM job."""
    return study.folder / "output" / f"{cell.name}.txt"


def _compare(study: StudyConfig, grid: Sequence[Cell], command: str) -> None:
    from dist_train.compare.command import publish
    from dist_train.compare.grouping import compare
    from dist_train.compare.runs import read_folder

    started = [cell for cell in grid if (study.folder / cell.name / "config.yaml").exists()]
    if not started:
        raise DataError(f"{study.folder}: no cell has started, so there is nothing to compare; see its folder output/")
    labels = {cell.name: cell.label for cell in grid}
    bases = {cell.label: cell.base for cell in grid}
    comparison = compare([read_folder(study.folder / cell.name) for cell in started], study.name, labels, bases)
    missing = [f"{cell.label}, seed {cell.seed}: missing" for cell in grid if cell not in started]
    comparison = replace(comparison, notes=[*missing, *comparison.notes])
    print()
    publish(comparison, study.folder / "comparison", command, tracked=True, parent=True)


def _prepare(study: StudyConfig) -> None:
    for step in study.prepare:
        if step.makes.exists():
            continue
        print(f"making {step.makes}: {step.run}", flush=True)
        words = shlex.split(step.run)
        words[:1] = [sys.executable] if words[0] in ("python", "python3") else words[:1]
        if subprocess.run(words).returncode:
            raise DataError(f"{step.makes}: could not be made by `{step.run}`; mend that, then give the same command")


def _check(study: StudyConfig, cell: Cell) -> None:
    """A cell's settings are valid, and are those that it was trained with, if it was."""
    try:
        config = load_config(study.config, *cell.overrides)
    except ConfigError as error:
        raise ConfigError(f"cell {cell.name}: {error}") from None
    before = study.folder / cell.name / "config.yaml"
    if before.exists() and finished(study, cell):
        tree = yaml.safe_load(before.read_text())
        changes = [one for one in changed_fields(make_config(tree), config) if not one[0].startswith(NEUTRAL)]
        if changes:
            key, old, new = changes[0]
            raise ConfigError(
                f"cell {cell.name} was trained with {key} {old}, not {new}; give the study another name, or remove {before.parent}"
            )


def _label(axis: str, variant: str) -> str:
    """A variant with a name speaks for itself; a number or a boolean wants its field."""
    named = re.search(r"[A-Za-z]{2}", variant) and variant not in ("true", "false", "null")
    return variant if named else f"{axis.rpartition('.')[2]} {variant}"


def _word(value: Any) -> str:
    """A value as load_config reads it from an override."""
    return value if isinstance(value, str) else json.dumps(value)


def _result(study: StudyConfig, cell: Cell) -> str:
    report = json.loads((study.folder / cell.name / "report.json").read_text())
    return "top-1 % " + " ".join(f"{100 * one['top1']:.2f}" for one in report["exits"])


def _last_line(path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
