"""Draws the README's first picture: distillation against the exit-wise baseline, from the table in RESULTS.md.

python tests/benchmarks/plot_few_labels.py [OUT.png]           (default: .github/few_labels_cifar10.png)
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

from scipy import stats

from dist_train.render.figure import line_style, new_figure, to_png

ROOT = Path(__file__).parent.parent.parent
TABLE = "few_labels.py cifar10"
"""The words in RESULTS.md after which the table follows."""
SEEDS = 5


def main(out: str = str(ROOT / ".github" / "few_labels_cifar10.png")) -> None:
    rows = read_table((ROOT / "tests" / "benchmarks" / "RESULTS.md").read_text())
    figure, (accuracy, gain) = new_figure(3.4, columns=2, width=8.4)
    for index, (label, name) in enumerate(
        [
            ("exit-wise baseline (labels alone)", "labels alone"),
            ("distillation (last exit teaches)", "labels, distilled"),
        ]
    ):
        # Side by side, so that the bars of the two arms do not cover each other.
        draw(accuracy, rows[name], label, index, shift=0.08 * (2 * index - 1))
    draw(gain, rows["gain: labels, distilled"], "", 2, shift=0.0)
    # From zero: on a cut axis two points look like ten.
    accuracy.set_ylim(0, 60)
    accuracy.set_ylabel("test accuracy, %")
    accuracy.legend(frameon=False, fontsize=8, loc="lower center")
    gain.axhline(0, color="black", linewidth=0.8)
    gain.set_ylim(-4, 8)
    gain.set_ylabel("gain by distillation, points")
    for axes in (accuracy, gain):
        axes.set_xticks(range(1, 5), [f"exit {number}" for number in range(1, 5)])
        axes.set_xlim(0.5, 4.5)
    accuracy.set_title("Accuracy of every exit", fontsize=9)
    gain.set_title("The same seed with and without distillation", fontsize=9)
    Path(out).write_bytes(to_png(figure))


def read_table(text: str) -> dict[str, list[tuple[float, float]]]:
    """Mean and standard deviation per exit, by the first column of the table."""
    lines = text[text.index(TABLE) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| arm"))
    rows: dict[str, list[tuple[float, float]]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = [tuple(map(float, re.findall(r"-?\d+\.\d+", cell))) for cell in cells]  # type: ignore[misc]
    return rows


def draw(axes: object, row: list[tuple[float, float]], label: str, index: int, *, shift: float) -> None:
    """Means with their 95 % confidence intervals over the seeds (Student's t: five seeds are few)."""
    factor = stats.t.ppf(0.975, SEEDS - 1) / math.sqrt(SEEDS)
    style = line_style(index, len(row))
    axes.errorbar(  # type: ignore[attr-defined]
        [number + shift for number in range(1, len(row) + 1)],
        [mean for mean, _ in row],
        yerr=[factor * deviation for _, deviation in row],
        color=style["color"],
        marker=style["marker"],
        linestyle="none",
        markersize=5,
        capsize=3,
        linewidth=1.4,
        label=label,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
