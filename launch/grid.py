"""A grid of runs: the study file, its cells, and the sweep of one command line."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from dist_train.config import Config, Positive, Section, Seed, UserPath
from dist_train.config_file import explain, fields_of, flatten, load_config, parse_yaml, plain, read_text
from dist_train.errors import ConfigError

OWN = {
    "seed": "list the seeds under seeds",
    "name": "it is made of the variants' names",
    "runs": "set the study's own runs",
    "tracking.experiment": "it is the study's name",
    "tracking.group": "it is made of the variants' names",
}
"""Fields that a study sets for every cell, and what to do instead of setting them."""


class Prepared(Section):
    """A command that makes data, and the file or folder that is there once it has."""

    makes: UserPath
    """Where the command puts its result; if it exists, the command is not run."""
    run: str
    """The command line, run in the current folder."""

    @field_validator("run")
    @classmethod
    def _check_run(cls, given: str) -> str:
        try:
            words = shlex.split(given)
        except ValueError as error:
            raise ValueError(f"`{given}` is no command line ({error})") from None
        if not words:
            raise ValueError("run is empty; give a command line")
        return given


class StudyConfig(Section):
    """A grid: every combination of one variant per axis, with every seed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the study: its folder under `runs`, and the experiment in MLflow."""
    config: Path
    """Configuration that all cells start from, relative to the study file."""
    runs: UserPath = Path("runs")
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
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds that every combination is trained with."""

    @field_validator("axes", mode="before")
    @classmethod
    def _open_lists(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        opened = {}
        for axis, variants in given.items():
            if not isinstance(variants, list | dict) or not variants:
                raise ValueError(f"axes.{axis} is {variants!r}; give a list of values, or variants with their fields")
            opened[axis] = {plain(v): {axis: v} for v in variants} if isinstance(variants, list) else variants
            if len(opened[axis]) < len(variants):
                raise ValueError(f"{axis} has values that are written alike; give each once, or name them")
        return opened

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        for seed in given:
            if given.count(seed) > 1:
                raise ValueError(f"{seed} is given twice; give each seed once")
        return given

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if not self.axes:
            raise ValueError("axes is empty; give at least one axis with its variants")
        given = [self.set, *(fields for variants in self.axes.values() for fields in variants.values())]
        for field in (key for fields in given for key in flatten(fields)):
            if field in OWN:
                raise ValueError(f"{field} is given in axes or set, but the study sets it itself: {OWN[field]}")
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
    tree = parse_yaml(read_text(path, "give a study file, see configs/study_*.yaml"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not a study; see configs/study_digits.yaml")
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, StudyConfig)}") from None
    # Relative to the study file, so that a study can be started from any folder.
    return study.model_copy(update={"config": path.parent / study.config})


def cells(study: StudyConfig) -> list[Cell]:
    """All cells, seeds innermost; raises ConfigError where a cell's configuration is not valid or two have one name."""
    made = []
    # The last axis varies fastest, so that a group and its baseline are trained close together.
    for numbered in itertools.product(*(enumerate(variants.items(), start=1) for variants in study.axes.values())):
        combination = [variant for _, variant in numbered]
        words = {axis: _label(axis, variant) for axis, (variant, _) in zip(study.axes, combination)}
        label = ", ".join(words.values())
        first = {study.against: _label(study.against, next(iter(study.axes[study.against])))}
        # The same combination with the first variant of that axis; | leaves the axes in their order.
        base = ", ".join((words | first).values())
        fields: dict[str, Any] = {}
        for settings in (study.set, *(settings for _, settings in combination)):
            for key, value in settings.items():
                fields |= fields_of(key, value)
        # It becomes the name of a folder and of a run, where a variant in other letters has its number.
        short = "-".join(_ascii(variant) or str(number) for number, (variant, _) in numbered)
        for seed in study.seeds:
            name = f"{short}-seed{seed}"
            given = fields | {"name": name, "runs": str(study.folder), "seed": seed}
            given |= {"tracking.experiment": study.name, "tracking.group": label}
            overrides = [word for key, value in given.items() for word in (f"--{key}", _word(value))]
            made.append(Cell(name, label, base, seed, tuple(overrides)))
    names = [cell.name for cell in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{names.count(name)} cells would be called {name}; give the variants other names")
    # All configurations are checked before the first one is trained: a typo in the last cell is found now.
    return [_in_the_store_of_all(study, cell) for cell in made]


def _in_the_store_of_all(study: StudyConfig, cell: Cell) -> Cell:
    """The cell with MLflow's store beside all runs, which would be in the study's folder otherwise; checks its configuration."""
    if config_of(study, cell).tracking.uri is not None or os.environ.get("MLFLOW_TRACKING_URI"):
        return cell
    store = f"sqlite:///{study.runs.resolve() / 'mlflow.db'}"
    return replace(cell, overrides=(*cell.overrides, "--tracking.uri", store))


def config_of(study: StudyConfig, cell: Cell) -> Config:
    """The configuration of a cell; raises ConfigError, which names the cell."""
    try:
        return load_config(study.config, *cell.overrides)
    except ConfigError as error:
        raise ConfigError(f"cell {cell.name}: {error}") from None


def _label(axis: str, variant: str) -> str:
    """A named variant needs no explanation; a number or a boolean is shown with its field."""
    named = re.search(r"[A-Za-z]{2}", variant) and variant not in ("true", "false", "null")
    return variant if named else f"{axis.rpartition('.')[2]} {variant}"


def _ascii(variant: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", variant).strip("_.")


def _word(value: Any) -> str:
    """A value as load_config reads it from an override."""
    # JSON is YAML; str() of a list or None would not be, and a word such as "run #1" or "1" means something else bare.
    return json.dumps(value, ensure_ascii=False)


def sweep(path: str, overrides: Sequence[str], words: Sequence[str]) -> list[Config]:
    """The run of a configuration; with ``KEY=A,B`` words of a sweep, one run for each combination of values.

    Raises:
        ConfigError: a word is no sweep, or two combinations would have the same name.
    """
    base = load_config(path, *overrides)
    axes: list[list[tuple[str, str]]] = []
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not all(values.split(",")):
            raise ConfigError(f"--sweep {word}: write --sweep KEY=VALUE,VALUE, for instance --sweep seed=0,1,2")
        axes.append([(key, value) for value in values.split(",")])
    if not axes:
        return [base]
    found: dict[str, Config] = {}
    for point in itertools.product(*axes):
        name = "-".join([base.name, *(f"{key.rpartition('.')[2]}_{value}" for key, value in point)])
        config = load_config(
            path,
            *overrides,
            *(f"--{key}={value}" for key, value in point),
            "--name",
            re.sub(r"[^A-Za-z0-9._-]", "_", name),
        )
        if config.name in found:
            raise ConfigError(f"--sweep: two of the runs would be named {config.name}; give each value once")
        found[config.name] = config
    return list(found.values())
