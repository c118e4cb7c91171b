"""A comparison as tables: aligned text for the terminal, Markdown, HTML and CSV from the same cells."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dist_train.compare.grouping import Comparison, Spread


@dataclass(frozen=True)
class Table:
    """Cells of text under a header; the first column is aligned to the left, the others to the right."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """Aligned columns."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        padded = [
            "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(zip(line, widths)))
            for line in lines
        ]  # fmt: skip
        return "\n".join([self.title, *(line.rstrip() for line in padded)])

    def markdown(self) -> str:
        """A Markdown table under its title."""
        ruler = ["---", *["--:"] * (len(self.header) - 1)]
        lines = [self.header, ruler, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """An HTML table with its title as caption."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(cell).replace(' ± ', '&nbsp;±&nbsp;') or '&nbsp;'}</td>" for cell in row)
            + "</tr>"
            for row in self.rows
        )
        title = html.escape(self.title)
        return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def tables(comparison: Comparison) -> list[Table]:
    """All tables of a comparison that have something to say, in reading order."""
    made = [_fields(comparison), _accuracy(comparison), _differences(comparison), _cost(comparison)]
    return [table for table in made if table.rows]


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
    return _csv([header, *lines])


def runs_csv(comparison: Comparison) -> str:
    """One line per run and exit, as measured, with the fields in which the groups differ."""
    numbers = ("top1", "top5", "loss", "ece", "multiply_adds", "parameters")
    header = ["group", "run", "seed", *comparison.fields, "step", "seconds", "images_per_second", "exit", *numbers]
    lines: list[list[object]] = []
    for group in comparison.groups:
        for run in group.runs:
            values = [run.fields.get(key) for key in comparison.fields]
            step = run.report.get("step") if run.report else None
            start = [group.label, run.name, run.seed, *values, step, run.seconds, run.images_per_second]
            for number, one in enumerate(run.exits or [{}], start=1):
                lines.append([*start, number if run.exits else None, *(one.get(key) for key in numbers)])
    return _csv([header, *lines])


def run_note(command: str, report: Mapping[str, Any]) -> str:
    """What MLflow shows of a finished run: its command, and its table of exits, as Markdown."""
    rows = [
        [str(one["exit"]), _millions(one["multiply_adds"]), f"{100 * one['top1']:.2f}", f"{100 * one['top5']:.2f}", f"{one['loss']:.4f}"]
        for one in report["exits"]
    ]  # fmt: skip
    title = f"After {report['step']} steps, {report['images']} images, each once"
    table = Table(title, ["exit", "multiply-adds", "top-1 %", "top-5 %", "cross-entropy"], rows)
    return f"`{command}`\n\n{table.markdown()}\n"


def _fields(comparison: Comparison) -> Table:
    """The differing fields of every group; nothing where nothing differs."""
    fields = comparison.fields
    rows = (
        [[group.label, *(group.values.get(key, "") for key in fields)] for group in comparison.groups] if fields else []
    )
    return Table("What differs", ["", *fields], rows)


def _accuracy(comparison: Comparison) -> Table:
    rows = [
        [group.label, f"{len(group.finished)}/{len(group.runs)}", *_by_exit(comparison, group.spread, False)]
        for group in comparison.groups
    ]
    return Table("Top-1, %: mean ± standard deviation over seeds", ["", "seeds", *_exits(comparison)], rows)


def _differences(comparison: Comparison) -> Table:
    bases = {comparison.base(group).label for group in comparison.groups}
    rows = [
        [group.label, comparison.base(group).label, *_by_exit(comparison, partial(comparison.difference, group), True)]
        for group in comparison.groups
        if comparison.base(group) is not group
    ]
    header = ["", "against", *_exits(comparison)]
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
        rows.append([
            group.label,
            *(_millions(cost.mean) if cost else "–" for cost in costs),
            _millions(size.mean) if (size := group.spread(group.num_exits or 1, "parameters")) else "–",
            f"{steps.mean:.0f}" if steps else "–",
            _duration(time.mean) if time else "–",
            f"{speed.mean:.0f}" if speed else "–",
        ])  # fmt: skip
    header = ["", *_exits(comparison)[:-1], "weights", "steps", "time", "images/s"]
    return Table("Cost: multiply-adds up to each exit, training time (pauses left out)", header, rows)


def _by_exit(comparison: Comparison, spread: Callable[[int | None], Spread | None], signed: bool) -> list[str]:
    """Cells of all exits and of their mean."""
    return [_percent(spread(number), signed) for number in (*range(1, comparison.num_exits + 1), None)]


def _exits(comparison: Comparison) -> list[str]:
    return [*(f"exit {number}" for number in range(1, comparison.num_exits + 1)), "mean"]


def _percent(spread: Spread | None, signed: bool) -> str:
    if spread is None:
        return "–"
    value = round(100 * spread.mean, 2)
    mean = f"{value:{'+' if signed and value else ''}.2f}" if value else "0.00"
    return mean if spread.sd is None else f"{mean} ± {100 * spread.sd:.2f}"


def _pair(spread: Spread | None) -> tuple[float | None, float | None]:
    return (spread.mean, spread.sd) if spread else (None, None)


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
