"""Draws accuracy against cost per exit from the report.json of finished runs.

python tests/benchmarks/plot_exits.py OUT.png LABEL=RUN[,RUN...] ...     (several runs of a label: mean and range)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe and Ito's colours, told apart by colour-blind eyes; the markers tell the lines apart in print.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")]


def main(out: str, *lines: str) -> None:
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=150)
    for (color, marker), line in zip(STYLES, lines):
        label, runs = line.split("=", 1)
        reports = [json.loads((Path(run) / "report.json").read_text())["exits"] for run in runs.split(",")]
        costs = [one["multiply_adds"] / 1e6 for one in reports[0]]
        tops = [[100 * report[number]["top1"] for report in reports] for number in range(len(costs))]
        means = [sum(top) / len(top) for top in tops]
        axes.plot(costs, means, color=color, marker=marker, label=label)
        if len(reports) > 1:
            axes.fill_between(
                costs, [min(top) for top in tops], [max(top) for top in tops], color=color, alpha=0.15, linewidth=0
            )
        for number, (cost, mean) in enumerate(zip(costs, means), start=1):
            axes.annotate(
                f"exit {number}\n{mean:.1f} %",
                (cost, mean),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_xlabel("multiply-adds up to the exit, millions")
    axes.set_ylabel("top-1 accuracy, %")
    axes.margins(x=0.1, y=0.35)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
