"""Runs grouped over seeds: what differs between the groups, means, and differences with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_train.compare.runs import RunData
from dist_train.errors import DataError

NEUTRAL = ("name", "runs", "seed", "tracking.", "checkpoint.", "faults.", "slurm.", "train.eval_every")
"""Fields, or starts of them, in which the runs of one group may differ: they do not change what is learned."""


@dataclass(frozen=True)
class Spread:
    """Mean over ``n`` seeds and their standard deviation (n - 1; None for a single seed)."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of these values; None where there are none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; ``values`` are the fields in which this group differs from the others."""

    label: str
    runs: list[RunData]
    values: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> list[RunData]:
        """The runs that have a report."""
        return [run for run in self.runs if run.exits]

    @property
    def num_exits(self) -> int:
        """Exits that all finished runs have."""
        return min((len(run.exits) for run in self.finished), default=0)

    def spread(self, exit_number: int | None, key: str = "top1") -> Spread | None:
        """One number of the report at an exit (from 1; None: the mean over all exits), over the seeds."""
        return self.over_runs(lambda run: at_exit(run, exit_number, key))

    def over_runs(self, number: Callable[[RunData], float | None]) -> Spread | None:
        """Any number of a run, over the seeds."""
        return Spread.of([value for run in self.runs if (value := number(run)) is not None])


@dataclass(frozen=True)
class Comparison:
    """Groups side by side; ``notes`` say what is missing or cannot be compared.

    ``bases`` has the label of the group that a group is set against; where it has none, that is the first group with an
    accuracy.
    """

    title: str
    groups: list[Group]
    notes: list[str] = field(default_factory=list)
    bases: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_exits(self) -> int:
        """Most exits of any group."""
        return max((group.num_exits for group in self.groups), default=0)

    @property
    def fields(self) -> list[str]:
        """Fields in which the groups differ."""
        return list(dict.fromkeys(key for group in self.groups for key in group.values))

    def base(self, group: Group) -> Group:
        """The group that a group is set against, itself for a base."""
        label = self.bases.get(group.label)
        first = next((one for one in self.groups if one.finished), self.groups[0])
        return next((one for one in self.groups if one.label == label), first)

    def difference(self, group: Group, exit_number: int | None, key: str = "top1") -> Spread | None:
        """This group minus its base at an exit (see :func:`difference`); None where it means nothing."""
        base = self.base(group)
        if group is base or not comparable(base, group) or (exit_number is None and base.num_exits != group.num_exits):
            return None
        return difference(_by_seed(base, exit_number, key), _by_seed(group, exit_number, key))


def difference(base: Mapping[str, float], other: Mapping[str, float]) -> Spread | None:
    """Other minus base, values by seed.

    Mean and standard deviation of the differences at the seeds that both have; where they have none in common, the
    difference of the means, with the root of the sum of both variances (None where a side has a single seed).
    """
    common = [seed for seed in base if seed in other]
    if common:
        return Spread.of([other[seed] - base[seed] for seed in common])
    left, right = Spread.of(list(base.values())), Spread.of(list(other.values()))
    if left is None or right is None:
        return None
    sd = math.hypot(left.sd, right.sd) if left.sd is not None and right.sd is not None else None
    return Spread(right.mean - left.mean, sd, min(left.n, right.n))


def compare(
    runs: Sequence[RunData],
    title: str = "comparison",
    labels: Mapping[str, str] | None = None,
    bases: Mapping[str, str] | None = None,
) -> Comparison:
    """Group runs that differ only in fields of NEUTRAL, or by a given label of each run's name, in the order given.

    Raises:
        DataError: there is no run.
    """
    if not runs:
        raise DataError("there is no run to compare; give run folders, such as runs/NAME")
    keys = sorted({key for run in runs for key in run.fields if not key.startswith(NEUTRAL)}, key=_order(runs))
    differing = [key for key in keys if len({run.fields.get(key) for run in runs}) > 1]
    found: dict[tuple[str, ...], list[RunData]] = {}
    for run in runs:
        place = (labels[run.name],) if labels else tuple(run.fields.get(key, "") for key in differing)
        found.setdefault(place, []).append(run)
    values = [{key: members[0].fields.get(key, "") for key in differing} for members in found.values()]
    firsts = [members[0] for members in found.values()]
    names = [_label(one, run) for one, run in zip(values, firsts)]
    if len(set(names)) < len(names):
        names = [_label(one, run, short=False) for one, run in zip(values, firsts)]
    if labels:
        names = [labels[run.name] for run in firsts]
    groups = [Group(*group) for group in zip(names, found.values(), values)]
    comparison = Comparison(title, groups, bases=bases or {})
    return replace(comparison, notes=_notes(comparison))


def comparable(first: Group, second: Group) -> bool:
    """Whether accuracies of two groups are of the same classes and evaluation images, as far as the runs say."""
    return not _data_differences(first, second)


def at_exit(run: RunData, exit_number: int | None, key: str) -> float | None:
    """One number of a run's report at an exit (from 1; None: the mean over all exits); None where it has none."""
    if exit_number is None:
        values = [one[key] for one in run.exits if key in one]
        return statistics.fmean(values) if values and len(values) == len(run.exits) else None
    value: float | None = run.exits[exit_number - 1].get(key) if exit_number <= len(run.exits) else None
    return value


def _by_seed(group: Group, exit_number: int | None, key: str) -> dict[str, float]:
    """By seed, the mean over its runs: there is one, unless somebody compares a run with its repetition."""
    values: dict[str, list[float]] = {}
    for run in group.finished:
        if (value := at_exit(run, exit_number, key)) is not None:
            values.setdefault(run.seed, []).append(value)
    return {seed: statistics.fmean(found) for seed, found in values.items()}


def _order(runs: Sequence[RunData]) -> Callable[[str], int]:
    place = {key: number for number, key in enumerate(key for run in runs for key in run.fields)}
    return lambda key: place[key]


def _label(values: Mapping[str, str], run: RunData, short: bool = True) -> str:
    """Short names where they are clear: `teachers later, mix 0.3`; the run's name where nothing differs.

    Of a path only its end, where it is ``short``.
    """
    leaves = [key.rpartition(".")[2] for key in values]
    names = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(values, leaves)}
    return (
        ", ".join(f"{names[key]} {value.rpartition('/')[2] if short else value}" for key, value in values.items())
        or run.name
    )


def _data_differences(first: Group, second: Group) -> list[str]:
    lines = []
    for known, what in ((_classes, "classes"), (_evaluated_on, "evaluation images")):
        a, b = known(first), known(second)
        if a and b and (a != b or len(a) > 1):
            lines.append(f"{what} ({_join(a)} and {_join(b)})")
    counts = [{run.report.get("images") for run in group.finished if run.report} for group in (first, second)]
    if not lines and all(counts) and counts[0] != counts[1]:
        lines.append(f"number of evaluation images ({_join(counts[0])} and {_join(counts[1])})")
    return lines


def _classes(group: Group) -> set[object]:
    return {run.data["classes"] for run in group.runs if "classes" in run.data}


def _evaluated_on(group: Group) -> set[object]:
    """Of the finished runs, or of all where none is."""
    return {run.evaluated_on for run in group.finished or group.runs if run.evaluated_on}


def _join(values: set[object]) -> str:
    return "/".join(sorted(map(str, values)))


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    for group in comparison.groups:
        base = comparison.base(group)
        for run in group.runs:
            if not run.exits:
                notes.append(
                    f"{run.name}: no finished evaluation (no report.json); its curves are shown, its accuracy not"
                )
        seeds = [run.seed for run in group.runs]
        for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            notes.append(f"{group.label}: {seeds.count(seed)} runs with seed {seed}; their spread is none over seeds")
        if len(images := _evaluated_on(group)) > 1:
            notes.append(
                f"{group.label}: its runs are evaluated on different images ({_join(images)}), its means are of both"
            )
        differences = _data_differences(base, group) if base is not group else []
        if differences:
            notes.append(f"{group.label}: other {', '.join(differences)} than {base.label}; no differences are given")
        if group.finished and base.finished and group.num_exits != base.num_exits:
            notes.append(f"{group.label}: {group.num_exits} exits, {base.label} has {base.num_exits}")
    return notes
