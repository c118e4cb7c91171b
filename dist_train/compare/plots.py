"""The plots of a comparison, readable with colour blindness and in black and white."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from dist_train.compare.claims import Claim
from dist_train.compare.grouping import Comparison, SeedGroup
from dist_train.compare.runs import RunData
from dist_train.render.figure import MARKERS, color, legend_below, line_style, new_figure

POINTS = 300
"""Points that a training curve is thinned to."""
MAX_BANDS = 3
"""Up to so many groups show their seeds as shaded bands; more bands would hide each other, so thin lines are drawn."""


def accuracy_figure(comparison: Comparison) -> Figure:
    """Anytime (mean over seeds, range) and, beside it where runs have them, budgeted curves, on the same axes."""
    budgeted = any(_budgeted(run) for group in comparison.groups for run in group.finished)
    figure, panels = _figure(2 if budgeted else 1, comparison, shared=True)
    for index, group in enumerate(comparison.groups):
        _anytime(panels[0], comparison, group, index)
        if budgeted:
            _draw_budgeted(panels[1], group, index)
    for axes, title in zip(panels, ("anytime: all images leave at one exit", "budgeted batch: images leave when sure")):
        axes.set_xlabel("multiply-adds per image, millions")
        if budgeted:
            axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("top-1 accuracy, %")
    _finish(figure, panels[0])
    return figure


def training_figure(comparison: Comparison) -> Figure:
    """Mean accuracy over the exits in validation, and the training loss, over the steps; every seed a line."""
    figure, panels = _figure(2, comparison, shared=False)
    for axes, metric, factor, words in zip(
        panels,
        ("val/mean_top1", "train/loss"),
        (100.0, 1.0),
        ("validation top-1, mean over exits, %", "training loss (its scale depends on the objective)"),
    ):
        for index, group in enumerate(comparison.groups):
            for number, run in enumerate(group.runs):
                points = run.series.get(metric, [])
                points = points[:: max(1, len(points) // POINTS)]
                # One entry in the legend for all seeds of a group.
                label = {"label": comparison.names[group.label]} if not number else {}
                axes.plot(
                    [step for step, _ in points],
                    [factor * value for _, value in points],
                    **line_style(index, len(points)),
                    alpha=0.9 if len(group.runs) == 1 else 0.6,
                    **label,
                )
        axes.set_xlabel("step")
        axes.set_title(words, fontsize=10)
    _finish(figure, panels[0])
    return figure


def claim_figure(comparison: Comparison, claim: Claim) -> Figure:
    """The differences of a claim with their intervals, exit after exit, the groups side by side."""
    figure, (axes,) = _figure(1, comparison, shared=False)
    labels = list(dict.fromkeys(one.exits for one in claim.findings))
    groups = list(dict.fromkeys(one.group.label for one in claim.findings))
    for index, group in enumerate(comparison.groups):
        if group.label not in groups:
            continue
        style = {"color": color(index), "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        # For the legend, which would have an entry per point if these were labeled.
        axes.plot([], [], linestyle="none", label=comparison.names[group.label], **style)
        for one in claim.findings:
            if one.group is not group:
                continue
            # Side by side within 0.7 of an exit's room.
            x = labels.index(one.exits) + 0.7 * ((groups.index(group.label) + 0.5) / len(groups) - 0.5)
            if one.effect.over_images:
                low, high = (100 * end for end in one.effect.over_images)
                axes.vlines(x, low, high, color=color(index), linewidth=9, alpha=0.25)
            if one.effect.over_seeds:
                low, high = (100 * end for end in one.effect.over_seeds)
                axes.vlines(x, low, high, color=color(index), linewidth=1.4)
            axes.plot([x], [100 * one.effect.mean], markerfacecolor=None if one.significant else "white", **style)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylabel("difference of top-1, points")
    axes.set_title(claim.title, fontsize=10)
    _finish(figure, axes)
    return figure


def _anytime(axes: Any, comparison: Comparison, group: SeedGroup, index: int) -> None:
    numbers = range(1, group.num_exits + 1)
    costs = [group.spread(number, "multiply_adds") for number in numbers]
    tops = [group.spread(number) for number in numbers]
    x = [cost.mean / 1e6 for cost in costs if cost]
    y = [100 * top.mean for top in tops if top]
    if not x or len(x) != len(y):
        # Nothing to draw yet, but the legend must name all groups.
        axes.plot([], [], label=comparison.names[group.label], **line_style(index, 1))
        return
    axes.plot(x, y, label=comparison.names[group.label], **line_style(index, 1))
    if len(group.finished) > 1:
        values = [[100 * run.exits[number - 1]["top1"] for run in group.finished] for number in numbers]
        low, high = list(map(min, values)), list(map(max, values))
        # The range, not a standard deviation: with two or three seeds it shows exactly what was measured.
        if len(comparison.groups) <= MAX_BANDS:
            axes.fill_between(x, low, high, color=color(index), alpha=0.12, linewidth=0)
        else:
            axes.vlines(x, low, high, color=color(index), linewidth=1, alpha=0.6)


def _draw_budgeted(axes: Any, group: SeedGroup, index: int) -> None:
    """Mean over the seeds by budget; runs of a group have the same budgets unless somebody chose other ones."""
    curves = [curve for run in group.finished if (curve := _budgeted(run))]
    # One of the runs may have been evaluated at fewer budgets.
    length = min(map(len, curves), default=0)
    x = [statistics.fmean(curve[k]["cost"] for curve in curves) / 1e6 for k in range(length)]
    y = [100 * statistics.fmean(curve[k]["top1"] for curve in curves) for k in range(length)]
    axes.plot(x, y, **line_style(index, length))


def _budgeted(run: RunData) -> list[dict[str, Any]]:
    """The curve of the first sweep in multiply-adds, `optimal` before `geometric`; empty where there is none."""
    sweeps = [one for one in (run.report or {}).get("budgeted") or [] if one.get("cost") == "multiply_adds"]
    sweeps.sort(key=lambda one: one.get("method") != "optimal")
    return sorted(sweeps[0]["points"], key=lambda point: float(point["cost"])) if sweeps else []


def _figure(count: int, comparison: Comparison, shared: bool) -> tuple[Figure, list[Any]]:
    width = 9.6 if count > 1 else 6.8
    height = 3.7 + 0.19 * len(comparison.groups)
    return new_figure(height, 1, count, width=width, sharex=shared, sharey=shared)


def _finish(figure: Figure, axes: Any) -> None:
    for panel in figure.axes:
        if not panel.has_data():
            panel.text(0.5, 0.5, "nothing recorded", transform=panel.transAxes, ha="center", color="#555555")
    legend_below(figure, *axes.get_legend_handles_labels())


FIGURES: Sequence[tuple[str, Any, str]] = (
    ("accuracy", accuracy_figure, "Accuracy against cost: means, and the range of the seeds"),
    ("training", training_figure, "Training"),
)
"""(file name, function of a comparison, words) of every picture."""

CLAIM_WORDS = "{title}. Lines: 95 % over seeds (t). Bars: 95 % over images (bootstrap). Hollow: not significant at 5 % after Holm's adjustment"
"""What is below the picture of a claim."""
