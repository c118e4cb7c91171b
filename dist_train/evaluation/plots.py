"""The pictures of a report, as PNG: told apart without colour, readable in print."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from dist_train.data.reader import ShardReader
from dist_train.errors import StorageError
from dist_train.evaluation.accuracy import correct, interval
from dist_train.evaluation.calibration import reliability
from dist_train.evaluation.diagnostics import SHOWN
from dist_train.evaluation.report import Report, Sweep
from dist_train.render.figure import COLORS, DASHES, legend_below, line_style, new_figure, to_png

CLASSES_NAMED = 30


@dataclass(frozen=True)
class Picture:
    """A picture, its title on the page, and what it shows."""

    name: str
    title: str
    words: str
    png: bytes


def pictures(report: Report) -> list[Picture]:
    """All pictures that the report has data for."""
    drawn: list[tuple[str, str, str, Callable[[Report], Figure | None]]] = [
        (
            "accuracy",
            "Accuracy against cost",
            "On the images that budgets are tested on: every exit with its 95 % "
            "interval, the mean probabilities of every exit and all before it, and budgeted batch by two ways of fitting "
            "thresholds.",
            _accuracy,
        ),
        (
            "measures",
            "Measures of confidence",
            "Budgeted batch with optimal thresholds, by the measure that decides who leaves.",
            _measures,
        ),
        (
            "shares",
            "Where images leave",
            "Share of the test images that leave at each exit, by budget, with optimal "
            "thresholds on the largest probability.",
            _shares,
        ),
        (
            "reliability",
            "Calibration",
            "Accuracy against confidence, in 15 bins of as many images; on the diagonal the "
            "confidence can be taken at its word.",
            _reliability,
        ),
        ("exits", "Exits compared", "Percent of all images: the row's exit against the column's.", _matrices),
        ("classes", "Accuracy by class", "Percent at every exit.", _classes),
        (
            "images",
            "Right at one exit alone",
            "Images that this exit and no other got right, with the image's class and what "
            "the last exit took it for (the last exit's row: the exit before).",
            _images,
        ),
    ]
    made = []
    for name, title, words, draw in drawn:
        figure = draw(report)
        if figure is not None:
            made.append(Picture(name, title, words, to_png(figure)))
    return made


def _accuracy(report: Report) -> Figure:
    figure, (axes,) = new_figure(4.4)
    costs = np.array(report.costs["multiply_adds"]) / 1e6
    hits, images = correct(report.test).sum(axis=0), len(report.test)
    top1 = hits / images
    intervals = np.array([interval(int(number), images) for number in hits])
    # Matplotlib wants the distances from the value, [2, M], and not the ends.
    errors = np.abs(intervals - top1[:, None]).T
    axes.errorbar(costs, 100 * top1, 100 * errors, **line_style(0), capsize=3, label="exit, all images leave there")
    axes.plot(
        costs,
        100 * (report.test["ensemble_rank"] == 0).mean(axis=0),
        **line_style(1),
        label="mean of it and all before",
    )
    for index, sweep in enumerate(report.sweeps[:2], start=2):  # the largest probability against multiply-adds
        _curve(axes, sweep, index, f"budgeted batch, {sweep.method} thresholds")
    _label(axes, "multiply-adds per image, in millions", "top-1 %")
    handles, labels = axes.get_legend_handles_labels()  # error bars come last
    legend_below(figure, [handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]])
    return figure


def _measures(report: Report) -> Figure | None:
    sweeps = [one for one in report.sweeps if one.method == "optimal" and one.cost == "multiply_adds"]
    if not sweeps:
        return None
    figure, (axes,) = new_figure(3.8)
    for index, sweep in enumerate(sweeps):
        _curve(axes, sweep, index, sweep.confidence)
    _label(axes, "multiply-adds per image, in millions", "top-1 %")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _shares(report: Report) -> Figure | None:
    # A network with one exit has one budget.
    if not report.sweeps or len(report.exits) < 2:
        return None
    figure, (axes,) = new_figure(3.4)
    points = report.sweeps[0].points
    budgets = [point.budget / 1e6 for point in points]
    exits = len(report.exits)
    colors = colormaps["cividis"](np.linspace(0.05, 0.95, exits))
    bands = axes.stackplot(
        budgets, 100 * np.array([point.shares for point in points]).T, colors=colors, edgecolor="white", linewidth=0.6
    )
    _label(axes, "budget in multiply-adds per image, in millions", "images %")
    axes.set(xlim=(budgets[0], budgets[-1]), ylim=(0, 100))
    axes.grid(False)
    # Backwards in the legend: bands are stacked from below, and the first entry of a legend is at the top.
    names = [f"exit {m}" for m in range(1, exits + 1)]
    axes.legend(
        bands[::-1], names[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + exits // 12
    )
    return figure


def _reliability(report: Report) -> Figure:
    exits, hits = len(report.exits), correct(report.samples)
    columns = min(4, exits)
    rows = -(-exits // columns)
    figure, panels = new_figure(0.4 + 2.2 * rows, rows, columns, sharex=True, sharey=True)
    for m, axes in enumerate(panels):
        if m >= exits:
            axes.set_visible(False)
            continue
        bins = reliability(report.samples["max_probability"][:, m], hits[:, m])
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        axes.plot(bins.confidence, bins.accuracy, color=COLORS[0], marker="o", markersize=4, linewidth=1.2)
        axes.set_title(f"exit {m + 1}: ECE {100 * bins.error:.2f} %", fontsize=9)
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03))
        axes.set_aspect("equal")
    figure.supxlabel("largest probability", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    return figure


def _matrices(report: Report) -> Figure:
    found = report.diagnostics
    figure, panels = new_figure(3.1 if len(report.exits) <= 8 else 3.4, 1, 3)
    titles = ("give the same class", "both wrong", "row right, column wrong")
    for axes, matrix, title in zip(panels, (found.agreement, found.joint_errors, found.correct_then_wrong), titles):
        _heat(axes, 100 * matrix, annotate=len(matrix) <= 8)
        ticks = np.arange(0, len(matrix), max(1, len(matrix) // 8))
        axes.set_xticks(ticks, ticks + 1)
        axes.set_yticks(ticks, ticks + 1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("exit", fontsize=9)
    panels[0].set_ylabel("exit", fontsize=9)
    return figure


def _classes(report: Report) -> Figure:
    found, exits = report.diagnostics, len(report.exits)
    # A class without images has no accuracy: it is NaN, which sorts as if it were the best.
    present = np.flatnonzero(found.class_images > 0)
    values = 100 * found.class_top1[present]
    order = np.argsort(values[:, -1], kind="stable")
    if len(present) <= CLASSES_NAMED:
        figure, (axes,) = new_figure(0.9 + 0.26 * len(present))
        _heat(axes, values[order], annotate=exits <= 16)
        axes.set_yticks(range(len(present)), [_short(report.index.classes[present[k]], 24) for k in order])
        axes.set_xticks(range(exits), range(1, exits + 1))
        axes.set_xlabel("exit", fontsize=9)
        return figure
    figure, (axes,) = new_figure(3.6)
    for m in range(exits):
        axes.plot(
            np.sort(values[:, m]),
            color=colormaps["cividis"](0.95 * m / max(1, exits - 1)),
            linestyle=DASHES[m % len(DASHES)],
            label=f"exit {m + 1}",
        )
    _label(axes, "classes, every exit's from its worst to its best", "top-1 %")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _images(report: Report) -> Figure | None:
    found, exits = report.diagnostics, len(report.exits)
    rows = [m for m in range(exits) if found.uniquely_correct[m]]
    if not rows or exits < 2:
        return None
    figure, panels = new_figure(0.3 + 1.35 * len(rows), len(rows), SHOWN)
    classes, samples = report.index.classes, report.samples
    row_of = {int(sample): row for row, sample in enumerate(samples.ids)}
    for row, m in enumerate(rows):
        images = _read_images(report, found.uniquely_correct[m])
        # The last exit itself is right on the images of its row, so these show the exit before it.
        other = exits - 1 if m < exits - 1 else exits - 2
        for column in range(SHOWN):
            axes = panels[row * SHOWN + column]
            axes.set_axis_off()
            if column >= len(images) or images[column] is None:
                continue
            sample = row_of[found.uniquely_correct[m][column]]
            true, taken = samples.labels[sample], samples["prediction"][sample, other]
            axes.imshow(images[column])
            axes.set_title(f"{_short(classes[true], 12)}\nnot {_short(classes[taken], 12)}", fontsize=6.5, pad=2)
        panels[row * SHOWN].text(
            -0.12,
            0.5,
            f"exit {m + 1}: {found.uniquely_correct_images[m]}",
            transform=panels[row * SHOWN].transAxes,
            rotation=90,
            va="center",
            ha="right",
            fontsize=8,
        )
    return figure


def _read_images(report: Report, ids: list[int]) -> list[Any]:
    """The images as stored; None for one that cannot be read any more."""
    assert report.index.folder is not None
    reader = ShardReader(report.index, Path(report.index.folder))
    images: list[Any] = []
    for sample in ids:
        try:
            image = Image.open(io.BytesIO(reader.read(sample).tobytes())).convert("RGB")
            image.thumbnail((160, 160))
            images.append(np.asarray(image))
        except (OSError, StorageError):
            images.append(None)
    reader.close()
    return images


def _curve(axes: Any, sweep: Sweep, index: int, label: str) -> None:
    points = sorted(sweep.points, key=lambda point: point.cost)
    x = [point.cost / 1e6 for point in points]
    axes.plot(x, [100 * point.top1 for point in points], **line_style(index, len(points)), label=label)


def _heat(axes: Any, values: Any, annotate: bool) -> None:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    axes.imshow(values, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if not annotate:
        return
    for row, column in np.ndindex(values.shape):
        # The low end of cividis is dark.
        dark = values[row, column] < low + 0.6 * (high - low)
        axes.text(
            column,
            row,
            f"{values[row, column]:.1f}",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "black",
        )


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
