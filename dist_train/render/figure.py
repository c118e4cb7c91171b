"""Figures as PNG, readable in print and without colour."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00")
"""Okabe and Ito's palette without the yellow, which print loses; markers and dashes carry the same information."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
WIDTH = 8.4
"""Inches of a figure that fills a page."""


def new_figure(
    height: float, rows: int = 1, columns: int = 1, *, width: float = WIDTH, **shared: Any
) -> tuple[Figure, list[Any]]:
    """A figure of this size in inches, and its panels, row by row; ``shared`` goes to matplotlib's ``subplots``."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    # A canvas of its own instead of pyplot, which would pick a backend by the display and keep every figure alive.
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, **shared).flatten().tolist()
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def line_style(index: int, points: int = 8) -> dict[str, Any]:
    """Colour, marker and dash of the line number ``index``, with about eight markers on its points."""
    return {
        "color": color(index),
        "marker": MARKERS[index % len(MARKERS)],
        # 7 colours and 4 dashes, shifted against each other, so that 28 lines differ.
        "linestyle": DASHES[(index // len(COLORS) + index) % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.4,
        "markevery": max(1, points // 8),
    }


def color(index: int) -> str:
    """Colour of the line number ``index``."""
    return COLORS[index % len(COLORS)]


def legend_below(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """A legend under the panels, where it hides no point, in as many columns as fit."""
    longest = max(map(len, labels), default=0)
    columns = max(1, min(6, len(labels), int(figure.get_figwidth() / (0.5 + 0.068 * longest))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    data = io.BytesIO()
    # Names of classes and of runs are drawn as they are: with two dollar signs they would be taken for formulas.
    with rc_context({"text.parse_math": False}):  # for labels that are made while drawing
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        figure.savefig(data, format="png")
    return data.getvalue()
