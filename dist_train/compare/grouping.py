"""Runs grouped over seeds: what differs between the groups, means, and differences with their spread."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_train.compare.runs import RunData
from dist_train.errors import DataError

NEUTRAL = ("name", "runs", "seed", "tracking.", "checkpoint.", "faults.", "slurm.", "train.eval_every")
"""Fields, or starts of them, in which the runs of one group may differ: they do not change what is learned."""

LONGEST_LABEL = 40
"""Characters of a group's label; where the settings would make a longer one, the groups have the names of their runs."""

WIDTH_OF_LABELS = 80
"""Characters of all labels side by side, above which the groups are numbered."""


@dataclass(frozen=True)
class MeanStd:
    """Mean over ``n`` seeds and their standard deviation (n - 1; None for a single seed)."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanStd | None:
        """Of these values; None where there are none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class SeedGroup:
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

    def spread(self, exit_number: int | None, key: str = "top1") -> MeanStd | None:
        """One number of the report at an exit (from 1; None: the mean over all exits), over the seeds."""
        return self.over_runs(lambda run: at_exit(run, exit_number, key))

    def over_runs(self, number: Callable[[RunData], float | None]) -> MeanStd | None:
        """Any number of a run, over the seeds."""
        return MeanStd.of([value for run in self.runs if (value := number(run)) is not None])


# eq=False keeps the hash of the object, by which claims() caches: one by its fields would fail at their lists.
@dataclass(frozen=True, eq=False)
class Comparison:
    """Groups to compare; ``notes`` say what is missing or cannot be compared.

    ``bases`` has the label of the group that a group is set against; where it has none, that is the first group with an
    accuracy.
    """

    title: str
    groups: list[SeedGroup]
    notes: list[str] = field(default_factory=list)
    bases: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_exits(self) -> int:
        """Most exits of any group."""
        return max((group.num_exits for group in self.groups), default=0)

    @property
    def numbered(self) -> bool:
        """Whether the labels are too wide to stand side by side, so that the groups have numbers."""
        return sum(len(group.label) + 2 for group in self.groups) > WIDTH_OF_LABELS

    @property
    def names(self) -> dict[str, str]:
        """By label, what tables and figures call the group: the label, behind its number where the groups have some."""
        digits = len(str(len(self.groups)))
        return {
            group.label: f"{number:>{digits}}  {group.label}" if self.numbered else group.label
            for number, group in enumerate(self.groups, start=1)
        }

    @property
    def fields(self) -> list[str]:
        """Fields in which the groups differ."""
        return list(dict.fromkeys(key for group in self.groups for key in group.values))

    def base(self, group: SeedGroup) -> SeedGroup:
        """The group that a group is compared with; a base group is compared with itself."""
        label = self.bases.get(group.label)
        first = next((one for one in self.groups if one.finished), self.groups[0])
        return next((one for one in self.groups if one.label == label), first)

    def difference(self, group: SeedGroup, exit_number: int | None, key: str = "top1") -> MeanStd | None:
        """This group minus its base at an exit (see :func:`difference`); None if the two cannot be compared."""
        base = self.base(group)
        if group is base or not comparable(base, group) or (exit_number is None and base.num_exits != group.num_exits):
            return None
        return difference(by_seed(base, exit_number, key), by_seed(group, exit_number, key))


def difference(base: Mapping[str, float], other: Mapping[str, float]) -> MeanStd | None:
    """Other minus base, values by seed.

    Mean and standard deviation of the differences at the seeds that both have; where they have none in common, the
    difference of the means, with the root of the sum of both variances (None where a side has a single seed).
    """
    # Paired by seed: the same seed means the same initial weights and order, whose effect cancels.
    common = [seed for seed in base if seed in other]
    if common:
        return MeanStd.of([other[seed] - base[seed] for seed in common])
    left, right = MeanStd.of(list(base.values())), MeanStd.of(list(other.values()))
    if left is None or right is None:
        return None
    # Independent samples: variances add up.
    sd = math.hypot(left.sd, right.sd) if left.sd is not None and right.sd is not None else None
    return MeanStd(right.mean - left.mean, sd, min(left.n, right.n))


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
    members = list(found.values())
    values = [{key: same[0].fields.get(key, "") for key in differing} for same in members]
    names = [labels[same[0].name] for same in members] if labels else _names(values, members)
    groups = [SeedGroup(*group) for group in zip(names, members, values)]
    comparison = Comparison(title, groups, bases=bases or {})
    return replace(comparison, notes=_notes(comparison))


def comparable(first: SeedGroup, second: SeedGroup) -> bool:
    """Whether accuracies of two groups are of the same classes and evaluation images, as far as the runs say."""
    return not _data_differences(first, second)


def at_exit(run: RunData, exit_number: int | None, key: str) -> float | None:
    """One number of a run's report at an exit (from 1; None: the mean over all exits); None where it has none."""
    if exit_number is None:
        values = [one[key] for one in run.exits if key in one]
        # A mean over some of the exits would not be comparable.
        return statistics.fmean(values) if values and len(values) == len(run.exits) else None
    value: float | None = run.exits[exit_number - 1].get(key) if exit_number <= len(run.exits) else None
    return value


def by_seed(group: SeedGroup, exit_number: int | None, key: str) -> dict[str, float]:
    """By seed, the mean over its runs: usually one, several if a run is compared with its repetition."""
    values: dict[str, list[float]] = {}
    for run in group.finished:
        if (value := at_exit(run, exit_number, key)) is not None:
            values.setdefault(run.seed, []).append(value)
    return {seed: statistics.fmean(found) for seed, found in values.items()}


def _order(runs: Sequence[RunData]) -> Callable[[str], int]:
    place = {key: number for number, key in enumerate(key for run in runs for key in run.fields)}
    return lambda key: place[key]


def _names(values: Sequence[Mapping[str, str]], members: Sequence[Sequence[RunData]]) -> list[str]:
    """A name for each group, short and different from the others: its variant's, its settings, or that of its runs."""
    firsts = [runs[0] for runs in members]
    settings = [
        [_settings(one, short) or _without_seed(run) for one, run in zip(values, firsts)] for short in (True, False)
    ]
    variants = [_variant(runs) for runs in members]
    # Shortened paths can collide, such as a/train and b/train; so can names without their seed.
    for names in (variants, *settings, [_without_seed(run) for run in firsts]):
        if len(set(names)) == len(names) and all(0 < len(name) <= LONGEST_LABEL for name in names):
            return names
    cut = [_cut(run.name) for run in firsts]
    return cut if len(set(cut)) == len(cut) else [f"{_cut(run.name)} {n}" for n, run in enumerate(firsts, start=1)]


def _variant(runs: Sequence[RunData]) -> str:
    """The name that a study gave to all of these runs; empty where there is none."""
    # null is what a field without a value is as text.
    names = {run.fields.get("tracking.group", "null") for run in runs} - {"null"}
    return names.pop() if len(names) == 1 else ""


def _settings(values: Mapping[str, str], short: bool) -> str:
    """The differing settings by short names where they are clear, `teachers later, alpha 0.3`; of a path only its end, where ``short``."""
    leaves = [key.rpartition(".")[2] for key in values]
    names = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(values, leaves)}
    return ", ".join(f"{names[key]} {value.rpartition('/')[2] if short else value}" for key, value in values.items())


def _without_seed(run: RunData) -> str:
    """A run's name without the seed that studies and sweeps put into it."""
    return re.sub(r"[-_.]?seed[-_]?\d+", "", run.name) or run.name


def _cut(name: str) -> str:
    """A name whose middle is left out where it is too long: both ends tell runs apart."""
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[: half - 3]}…{name[-half + 2 :]}"


def _data_differences(first: SeedGroup, second: SeedGroup) -> list[str]:
    lines = []
    for known, what in ((_classes, "classes"), (_evaluated_on, "evaluation images")):
        a, b = known(first), known(second)
        # Even the same ones: where a group has several, its means are over different images.
        if a and b and (a != b or len(a) > 1):
            lines.append(f"{what} ({_join(a)} and {_join(b)})")
    counts = [{run.report.get("images") for run in group.finished if run.report} for group in (first, second)]
    if not lines and all(counts) and counts[0] != counts[1]:
        lines.append(f"number of evaluation images ({_join(counts[0])} and {_join(counts[1])})")
    runs = [run for group in (first, second) for run in group.finished]
    if any(not run.evaluated_later for run in runs) and any(run.evaluated_before_its_end for run in runs):
        lines.append("weights (some of the last step, some of the best validation: run dist-train eval on all of them)")
    return lines


def _classes(group: SeedGroup) -> set[object]:
    return {run.data["classes"] for run in group.runs if "classes" in run.data}


def _evaluated_on(group: SeedGroup) -> set[object]:
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
        elif base is not group:
            notes += _pairing_notes(base, group)
        if group.finished and base.finished and group.num_exits != base.num_exits:
            notes.append(f"{group.label}: {group.num_exits} exits, {base.label} has {base.num_exits}")
    return notes


def _pairing_notes(base: SeedGroup, group: SeedGroup) -> list[str]:
    """What keeps a group and its base from being compared at equal seeds."""
    ours, theirs = (list(dict.fromkeys(run.seed for run in one.finished)) for one in (group, base))
    if not ours or not theirs:
        return []
    common = [seed for seed in ours if seed in theirs]
    if not common:
        return [
            f"{group.label}: no seed in common with {base.label} ({', '.join(ours)} and {', '.join(theirs)}); its differences "
            "are of means, without intervals and tests"
        ]
    return [
        f"{one.label}: seed {seed} has no partner in {other.label}, and is left out of the differences"
        for one, seeds, other in ((group, ours, base), (base, theirs, group))
        for seed in seeds
        if seed not in common
    ]
