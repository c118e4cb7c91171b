"""A comparison as tables: aligned text for the terminal, Markdown, HTML and CSV from the same cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dist_train.compare.claims import SHOWN, Claim, claims
from dist_train.compare.grouping import Comparison, MeanStd
from dist_train.compare.statistics import Interval
from dist_train.render.table import Table, csv_text, duration, millions


def tables(comparison: Comparison) -> list[Table]:
    """All non-empty tables of a comparison, in reading order."""
    claimed = [claim_table(comparison, claim) for claim in claims(comparison)]
    made = [_fields(comparison), _accuracy(comparison), _differences(comparison), *claimed, _cost(comparison)]
    return [table for table in made if table.rows]


def claim_table(comparison: Comparison, claim: Claim) -> Table:
    """A line per group and exit: the difference with its intervals and its p-values."""
    several = len({one.base.label for one in claim.findings}) > 1
    header = ["", *["against"] * several, "", "seeds", "difference", "seeds 95 %", "images 95 %", "both 95 %"]
    rows = []
    for one in claim.findings:
        found = one.effect
        names = [comparison.names[group.label] for group in (one.group, *[one.base] * several)]
        intervals = [_interval(each) for each in (found.over_seeds, found.over_images, found.over_both)]
        p_holm = _p_value(one.p_holm) + ("" if one.significant or one.p_holm is None else " n.s.")
        numbers = [str(len(found.seeds)), f"{100 * found.mean:+.2f}", *intervals, _p_value(found.p), p_holm]
        rows.append([*names, one.exits, *numbers])
    against = "" if several else f" against {claim.findings[0].base.label}"
    title = f"{claim.title}{against}: points of top-1, paired by seed"
    return Table(title, [*header, "p", "p (Holm)"], rows, names=2 + several, words=claim.words)


def claims_csv(comparison: Comparison) -> str:
    """One line per finding of every claim, as shares of 1; ``seeds_needed`` would show a difference of SHOWN."""
    ends = [f"{name}_{end}" for name in ("over_seeds", "over_images", "over_both") for end in ("low", "high")]
    header = ["claim", "group", "against", "exit", "against_exit", "seeds", "difference", "sd", *ends]
    header += ["p", "p_holm", "significant", f"seeds_needed_for_{SHOWN:g}"]
    lines: list[list[object]] = []
    for claim in claims(comparison):
        for one in claim.findings:
            found = one.effect
            start = [claim.name, one.group.label, one.base.label, one.exit, one.base_exit, " ".join(found.seeds)]
            bounds = [
                end for each in (found.over_seeds, found.over_images, found.over_both) for end in each or (None, None)
            ]
            tested = one.significant if found.p is not None else None
            lines.append([*start, found.mean, found.sd, *bounds, found.p, one.p_holm, tested, one.seeds_needed])
    return csv_text([header, *lines])


def accuracy_csv(comparison: Comparison) -> str:
    """One line per group and exit: mean, standard deviation and number of seeds, and the difference to the base group."""
    header = [
        "group",
        "exit",
        "seeds",
        "top1",
        "top1_sd",
        "against",
        "difference",
        "difference_sd",
        "top5",
        "loss",
        "ece",
    ]
    lines: list[list[object]] = []
    for group in comparison.groups:
        for number in range(1, group.num_exits + 1):
            top1, change = group.spread(number), comparison.difference(group, number)
            others = [group.spread(number, key) for key in ("top5", "loss", "ece")]
            against = comparison.base(group).label if change else None
            means = [one.mean if one else None for one in others]
            seeds = top1.n if top1 else 0
            lines.append([group.label, number, seeds, *_pair(top1), against, *_pair(change), *means])
    return csv_text([header, *lines])


def runs_csv(comparison: Comparison) -> str:
    """One line per run and exit, as measured, with the fields in which the groups differ."""
    numbers = ("top1", "top5", "loss", "ece", "multiply_adds", "parameters")
    header = [
        "group",
        "run",
        "source",
        "seed",
        *comparison.fields,
        "step",
        "seconds",
        "images_per_second",
        "exit",
        *numbers,
    ]
    lines: list[list[object]] = []
    for group in comparison.groups:
        for run in group.runs:
            values = [run.fields.get(key) for key in comparison.fields]
            step = run.report.get("step") if run.report else None
            start = [group.label, run.name, run.source, run.seed, *values, step, run.seconds, run.images_per_second]
            # A run without a report has a line as well, for its settings.
            for number, one in enumerate(run.exits or [{}], start=1):
                lines.append([*start, number if run.exits else None, *(one.get(key) for key in numbers)])
    return csv_text([header, *lines])


def _fields(comparison: Comparison) -> Table:
    """The settings in which the groups differ, a row each; nothing where nothing differs."""
    groups = comparison.groups
    header = [str(n) if comparison.numbered else group.label for n, group in enumerate(groups, start=1)]
    rows = [[key, *(group.values.get(key, "") for group in groups)] for key in comparison.fields]
    return Table("What differs", ["", *header], rows)


def _accuracy(comparison: Comparison) -> Table:
    rows = [
        [
            comparison.names[group.label],
            f"{len(group.finished)}/{len(group.runs)}",
            *_by_exit(comparison, group.spread, False),
        ]
        for group in comparison.groups
    ]
    return Table("Top-1, %: mean ± standard deviation over seeds", ["", "seeds", *_exits(comparison)], rows)


def _differences(comparison: Comparison) -> Table:
    bases = {comparison.names[comparison.base(group).label] for group in comparison.groups}
    rows = [
        [
            comparison.names[group.label],
            comparison.names[comparison.base(group).label],
            *_by_exit(comparison, partial(comparison.difference, group), True),
        ]
        for group in comparison.groups
        if comparison.base(group) is not group
    ]
    header = ["", "against", *_exits(comparison)]
    # A single base stands in the title, and not in every row.
    if len(bases) == 1:
        rows, header = [[row[0], *row[2:]] for row in rows], [header[0], *header[2:]]
    against = f" against {bases.pop()}" if len(bases) == 1 else ""
    return Table(
        f"Difference of top-1{against}, percentage points at equal seeds: mean ± standard deviation", header, rows
    )


def _cost(comparison: Comparison) -> Table:
    rows = []
    for group in comparison.groups:
        costs = [group.spread(number, "multiply_adds") for number in range(1, comparison.num_exits + 1)]
        time, speed = group.over_runs(lambda run: run.seconds), group.over_runs(lambda run: run.images_per_second)
        steps = group.over_runs(lambda run: run.report.get("step") if run.report else None)
        rows.append(
            [
                comparison.names[group.label],
                *(millions(cost.mean) if cost else "–" for cost in costs),
                millions(size.mean) if (size := group.spread(group.num_exits or 1, "parameters")) else "–",
                f"{steps.mean:.0f}" if steps else "–",
                duration(time.mean) if time else "–",
                f"{speed.mean:.0f}" if speed else "–",
            ]
        )
    header = ["", *_exits(comparison)[:-1], "weights", "steps", "time", "images/s"]
    return Table("Cost: multiply-adds up to each exit, training time (pauses left out)", header, rows)


def _by_exit(comparison: Comparison, spread: Callable[[int | None], MeanStd | None], signed: bool) -> list[str]:
    """Cells of all exits and of their mean."""
    return [_percent(spread(number), signed) for number in (*range(1, comparison.num_exits + 1), None)]


def _exits(comparison: Comparison) -> list[str]:
    return [*(f"exit {number}" for number in range(1, comparison.num_exits + 1)), "mean"]


def _percent(spread: MeanStd | None, signed: bool) -> str:
    if spread is None:
        return "–"
    value = round(100 * spread.mean, 2)
    # What rounds to 0 has no sign: neither +0.00 nor -0.00.
    mean = f"{value:{'+' if signed and value else ''}.2f}" if value else "0.00"
    return mean if spread.sd is None else f"{mean} ± {100 * spread.sd:.2f}"


def _interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def _p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _pair(spread: MeanStd | None) -> tuple[float | None, float | None]:
    return (spread.mean, spread.sd) if spread else (None, None)
