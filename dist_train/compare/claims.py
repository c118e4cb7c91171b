"""What a comparison is made for: the claims of the method, each as differences at equal seeds with intervals and tests.

Phuong & Lampert, "Distillation-Based Training for Multi-Exit Architectures", ICCV 2019, claim that distillation makes every exit
more accurate, most of all the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dist_train.compare.grouping import Comparison, SeedGroup, by_seed, comparable
from dist_train.compare.statistics import LEVEL, MOST_SEEDS, POWER, Effect, effect, holm, seeds_needed
from dist_train.tracking.outcomes import RIGHT, UNCOUNTED

SHOWN = 0.005
"""The difference for which the seeds are counted that would show it: half a point of accuracy."""

GAINS, FIRST_EXIT = "gains", "first_exit"
CLAIM_NAMES = frozenset({GAINS, FIRST_EXIT})
"""Names of all claims."""


@dataclass(frozen=True)
class Finding:
    """Top-1 of an exit of a group minus that of an exit of its base; exits count from 1.

    ``p_holm`` is the p-value adjusted for all findings of the comparison; None where there was no test.
    """

    group: SeedGroup
    base: SeedGroup
    exit: int
    base_exit: int
    effect: Effect
    p_holm: float | None = None

    @property
    def exits(self) -> str:
        """The exits in words."""
        return f"exit {self.exit}" + (f" − exit {self.base_exit}" if self.base_exit != self.exit else "")

    @property
    def significant(self) -> bool:
        """Whether the difference is not 0, at 5 % over all findings of the comparison."""
        return self.p_holm is not None and self.p_holm <= 1 - LEVEL

    @property
    def seeds_needed(self) -> str:
        """Seeds that would show half a point with this spread; empty where the spread is not known."""
        if self.effect.sd is None:
            return ""
        return str(seeds_needed(SHOWN, self.effect.sd) or f"> {MOST_SEEDS}")


@dataclass(frozen=True)
class Claim:
    """A sentence, and every group's part in it; ``name`` is that of its files, ``tests`` counts those of all claims."""

    name: str
    title: str
    findings: Sequence[Finding]
    tests: int = 0

    @property
    def words(self) -> str:
        """What was tested, what is not significant, how many seeds would have been, and what is missing."""
        tested = [one for one in self.findings if one.effect.sd is not None]
        said = []
        if tested:
            missed = sum(not one.significant for one in tested)
            widest = max(tested, key=lambda one: one.effect.sd or 0.0)
            said += [
                f"Paired t-tests over seeds, two-sided, adjusted for all {self.tests} of this comparison (Holm): {missed} of these "
                f"{len(tested)} differences are not significant at {100 * (1 - LEVEL):.0f} % (n.s.).",
                f"With the largest spread of them, a standard deviation of {100 * (widest.effect.sd or 0.0):.2f} points, "
                f"{widest.seeds_needed} seeds would show {100 * SHOWN:g} points in {100 * POWER:.0f} % of studies.",
            ]
        if len(tested) < len(self.findings):
            said.append("A single seed has no interval over seeds, and no test.")
        if any(one.effect.over_images is None for one in self.findings):
            said.append(
                "Reports without the outcomes of their images have no intervals over images; dist-train eval adds them."
            )
        return " ".join(said)


@lru_cache(maxsize=1)  # tables, figures and files of one comparison ask for them one after the other
def claims(comparison: Comparison) -> list[Claim]:
    """All claims for which the comparison has pairs of runs with the same seed."""
    pairs = [
        (group, base)
        for group in comparison.groups
        if (base := comparison.base(group)) is not group and comparable(base, group)
    ]
    gains = [
        _finding(group, number, base, number)
        for group, base in pairs
        for number in range(1, min(group.num_exits, base.num_exits) + 1)
    ]
    firsts = [
        _finding(group, 1, base, base.num_exits)
        for group, base in pairs
        # Sets, because a group whose runs differ in it is neither the one nor the other.
        if _is_exitwise(base) == {True} and _is_exitwise(group) == {False} and group.num_exits and base.num_exits > 1
    ]
    found = [
        Claim(GAINS, "Gain of each exit", [one for one in gains if one]),
        Claim(FIRST_EXIT, "First exit distilled, minus last exit exit-wise", [one for one in firsts if one]),
    ]
    return _adjusted([claim for claim in found if claim.findings])


def _adjusted(found: Sequence[Claim]) -> list[Claim]:
    """The claims with p-values adjusted for the number of all tests."""
    tested = [one.effect.p for claim in found for one in claim.findings if one.effect.p is not None]
    adjusted = iter(holm(tested))
    return [
        replace(
            claim,
            tests=len(tested),
            findings=[
                replace(one, p_holm=next(adjusted)) if one.effect.p is not None else one for one in claim.findings
            ],
        )
        for claim in found
    ]


def _finding(group: SeedGroup, number: int, base: SeedGroup, base_number: int) -> Finding | None:
    """None where no seed has both."""
    ours, theirs = by_seed(group, number, "top1"), by_seed(base, base_number, "top1")
    differences = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
    if not differences:
        return None
    by_image = _by_image((group, number), (base, base_number), list(differences))
    reports = [run.report or {} for one in (group, base) for run in one.finished]
    # The fewest: with them the rounding of accuracies is coarsest.
    tested = min((int(report["images"]) for report in reports if "images" in report), default=None)
    return Finding(group, base, number, base_number, effect(differences, by_image, tested))


def _by_image(
    ours: tuple[SeedGroup, int], theirs: tuple[SeedGroup, int], seeds: Sequence[str]
) -> NDArray[np.float64] | None:
    """[N] per image the share of runs that are right, ours minus theirs, mean over the seeds; None where a run does not say.

    Of the images that all runs have counted.
    """
    total: NDArray[np.float64] | None = None
    counted: NDArray[np.bool_] | None = None
    for sign, (group, number) in ((1, ours), (-1, theirs)):
        for seed in seeds:
            runs = [run for run in group.finished if run.seed == seed]
            for run in runs:
                outcomes = run.outcomes
                if outcomes is None or (total is not None and len(outcomes) != len(total)):
                    return None
                column = outcomes[:, number - 1]
                # A seed counts once, however many runs it has.
                right = sign * (column == RIGHT) / (len(runs) * len(seeds))
                total = right if total is None else total + right
                counted = column != UNCOUNTED if counted is None else counted & (column != UNCOUNTED)
    return None if total is None or counted is None or not counted.any() else total[counted]


def _is_exitwise(group: SeedGroup) -> set[bool]:
    """Of each run, whether its exits learned from labels alone."""
    return {
        run.fields.get("loss.teachers") == "none" and run.fields.get("loss.outside_teachers", "[]") == "[]"
        for run in group.runs
    }
