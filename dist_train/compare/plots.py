"""A comparison as pictures, told apart by colour-blind eyes and in black and white."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_train.compare.grouping import Comparison, Group
from dist_train.compare.runs import RunData

# Okabe and Ito's colours without the yellow, which print loses; markers and dashes carry the same information.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
POINTS = 300
"""Points that a training curve is thinned to."""
MAX_BANDS = 3
"""Groups whose seeds are shown as shaded bands; more of them would hide each other, and get thin lines."""


def accuracy_figure(comparison: Comparison) -> Figure:
    """Anytime (mean over seeds, range) and, beside it where runs have them, budgeted curves, on the same axes."""
    budgeted = any(_budgeted(run) for group in comparison.groups for run in group.finished)
    figure, panels = _figure(2 if budgeted else 1, comparison, shared=True)
    for place, group in enumerate(comparison.groups):
        _anytime(panels[0], comparison, group, place)
        if budgeted:
            _draw_budgeted(panels[1], group, place)
    for axes, title in zip(panels, ("anytime: all images leave at one exit", "budgeted batch: images leave when sure")):
        axes.set_xlabel("multiply-adds per image, millions")
        if budgeted:
            axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("top-1 accuracy, %")
    _finish(figure, panels[0], comparison)
    return figure


def training_figure(comparison: Comparison) -> Figure:
    """Mean accuracy over the exits in validation, and the training loss, over the steps; every seed a line."""
    figure, panels = _figure(2, comparison, shared=False)
    for axes, metric, factor, words in zip(
        panels, ("val/mean_top1", "train/loss"), (100.0, 1.0),
        ("validation top-1, mean over exits, %", "training loss (its scale depends on the objective)"),
    ):  # fmt: skip
        for place, group in enumerate(comparison.groups):
            for number, run in enumerate(group.runs):
                points = run.series.get(metric, [])
                points = points[:: max(1, len(points) // POINTS)]
                label = {"label": group.label} if not number else {}
                axes.plot(
                    [step for step, _ in points], [factor * value for _, value in points], **_style(place, len(points)),
                    alpha=0.9 if len(group.runs) == 1 else 0.6, **label,
                )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_title(words, fontsize=10)
    _finish(figure, panels[0], comparison)
    return figure


def _anytime(axes: Any, comparison: Comparison, group: Group, place: int) -> None:
    numbers = range(1, group.num_exits + 1)
    costs = [group.spread(number, "multiply_adds") for number in numbers]
    tops = [group.spread(number) for number in numbers]
    x = [cost.mean / 1e6 for cost in costs if cost]
    y = [100 * top.mean for top in tops if top]
    if not x or len(x) != len(y):
        axes.plot([], [], label=group.label, **_style(place, 1))
        return
    axes.plot(x, y, label=group.label, **_style(place, 1))
    if len(group.finished) > 1:
        values = [[100 * run.exits[number - 1]["top1"] for run in group.finished] for number in numbers]
        low, high = list(map(min, values)), list(map(max, values))
        if len(comparison.groups) <= MAX_BANDS:
            axes.fill_between(x, low, high, color=_color(place), alpha=0.12, linewidth=0)
        else:
            axes.vlines(x, low, high, color=_color(place), linewidth=1, alpha=0.6)


def _draw_budgeted(axes: Any, group: Group, place: int) -> None:
    """Mean over the seeds by budget; runs of a group have the same budgets unless somebody chose other ones."""
    curves = [curve for run in group.finished if (curve := _budgeted(run))]
    length = min(map(len, curves), default=0)
    x = [statistics.fmean(curve[place_]["cost"] for curve in curves) / 1e6 for place_ in range(length)]
    y = [100 * statistics.fmean(curve[place_]["top1"] for curve in curves) for place_ in range(length)]
    axes.plot(x, y, **_style(place, length))


def _budgeted(run: RunData) -> list[dict[str, Any]]:
    """The curve of the first sweep in multiply-adds, `optimal` before `geometric`; empty where there is none."""
    sweeps = [one for one in (run.report or {}).get("budgeted") or [] if one.get("cost") == "multiply_adds"]
    sweeps.sort(key=lambda one: one.get("method") != "optimal")
    return sorted(sweeps[0]["points"], key=lambda point: float(point["cost"])) if sweeps else []


def _figure(count: int, comparison: Comparison, shared: bool) -> tuple[Figure, list[Any]]:
    width = 9.6 if count > 1 else 6.8
    rows = -(-len(comparison.groups) // _columns(comparison, width))
    figure = Figure(figsize=(width, 3.7 + 0.19 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, count, squeeze=False, sharex=shared, sharey=shared)[0].tolist()
    return figure, panels


def _finish(figure: Figure, axes: Any, comparison: Comparison) -> None:
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if not panel.has_data():
            panel.text(0.5, 0.5, "nothing recorded", transform=panel.transAxes, ha="center", color="#555555")
    handles, labels = axes.get_legend_handles_labels()
    columns = _columns(comparison, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _columns(comparison: Comparison, width: float) -> int:
    """Columns of the legend that fit below a figure of this width, in inches."""
    longest = max(len(group.label) for group in comparison.groups)
    return max(1, min(3, int(width / (0.5 + 0.068 * longest))))


def _style(place: int, points: int) -> dict[str, Any]:
    marker = MARKERS[place % len(MARKERS)]
    dash = DASHES[(place // len(COLORS) + place) % len(DASHES)]
    every = max(1, points // 8)
    return {
        "color": _color(place), "marker": marker, "linestyle": dash, "markersize": 4.5, "linewidth": 1.4, "markevery": every,
    }  # fmt: skip


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def save(figure: Figure) -> bytes:
    """A figure as PNG."""
    import io

    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


FIGURES: Sequence[tuple[str, Any, str]] = (
    ("accuracy", accuracy_figure, "Accuracy against cost: means, and the range of the seeds"),
    ("training", training_figure, "Training"),
)
"""(file name, function of a comparison, words) of every picture."""
