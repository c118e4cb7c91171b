"""The report as one HTML file with everything inside, which opens without a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from dist_train.report.accuracy import ExitAccuracy
from dist_train.report.plots import Picture
from dist_train.report.report import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d8d8d8; white-space: nowrap }
th { border-bottom: 2px solid #777 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
td.name, th.name { text-align: left } img { width: 100%; max-width: 56rem; height: auto; display: block; margin: .6rem 0 }
p.words, footer { color: #505050; font-size: .88rem; margin: .2rem 0 } section { break-inside: avoid }
@media print { body { margin: 0; max-width: none; font-size: 10pt } .scroll { overflow: visible } td, th { padding: .15rem .4rem } }
"""

COST_WORDS = (
    "Per image, the exits before it included: multiply-adds of convolutions and matrix products; the public counter's, behind "
    "the published axes; lazy, what the exit needs alone."
)


def page(report: Report, pictures: Sequence[Picture]) -> str:
    """The whole page: exits, budgets, pictures, confusions."""
    title = html.escape(f"{report.folder.name}: {report.split}")
    lost = f", {report.unreadable} unreadable ones not counted" if report.unreadable else ""
    facts = f"{report.checkpoint.name}, step {report.step}, {report.images} images of {report.split}, each once{lost}"
    parts = [
        f"<h1>{title}</h1><p class=words>{html.escape(facts)}</p>",
        *(f"<p class=words>{html.escape(note)}</p>" for note in report.notes),
        _section("Every exit", "All images leave at the exit; in brackets the 95 % interval.", _exits(report)),
        _section("What an exit costs", COST_WORDS, _costs(report)),
    ]
    if report.calibration is not None:
        words = (
            "Optimal thresholds on the largest probability; a budget is multiply-adds per image on average. Where "
            "accuracy is much higher on the calibration images, they are too few for the choice among thresholds."
        )
        parts.append(_section("At a budget", words, _budgets(report)))
    for picture in pictures:
        source = base64.b64encode(picture.png).decode()
        image = f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{source}">'
        parts.append(_section(picture.title, picture.words, image))
    if report.diagnostics.confusions:
        words = "Images of a class that the exit takes for another; most at the last exit first."
        parts.append(_section("Classes confused most", words, _confusions(report)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _exits(report: Report) -> str:
    rows = [
        [
            m, _share(one.top1, one.top1_interval), f"{100 * one.top5:.2f}", _loss(one), _share(one.ece, one.ece_interval),
            _share(joint.top1, joint.top1_interval), _share(joint.ece, joint.ece_interval),
        ]
        for m, (one, joint) in enumerate(zip(report.exits, report.ensemble), start=1)
    ]  # fmt: skip
    return _table(["exit", "top-1 %", "top-5 %", "loss", "ECE %", "with all before: top-1 %", "ECE %"], rows)


def _costs(report: Report) -> str:
    names = {
        "multiply_adds": "multiply-adds", "multiply_adds_public": "public count", "multiply_adds_lazy": "lazy",
        "parameters": "parameters",
    }  # fmt: skip
    rows = [[m + 1, *(f"{report.costs[name][m] / 1e6:.2f} M" for name in names)] for m in range(len(report.exits))]
    times = report.costs.get("milliseconds", [])
    for row, milliseconds in zip(rows, times):
        row.append(f"{milliseconds:.2f}")
    return _table(["exit", *names.values(), *(["milliseconds"] if times else [])], rows)


def _budgets(report: Report) -> str:
    points = report.sweeps[0].points
    # Ten of a sweep are enough for a table.
    chosen = sorted({round(place * (len(points) - 1) / 9) for place in range(10)})
    rows = [
        [
            f"{point.budget / 1e6:.2f} M", f"{point.cost / 1e6:.2f} M", _share(point.top1, point.top1_interval),
            f"{100 * point.calibration_top1:.2f}", " | ".join(f"{100 * share:.1f}" for share in point.shares),
        ]
        for point in (points[place] for place in chosen)
    ]  # fmt: skip
    return _table(["budget", "spent", "top-1 %", "on calibration", "images that leave at exit 1 | 2 | ... %"], rows)


def _confusions(report: Report) -> str:
    classes = report.index.classes
    rows = [[classes[true], classes[taken], *images] for true, taken, images in report.diagnostics.confusions]
    return _table(["class", "taken for", *(f"exit {m}" for m in range(1, len(report.exits) + 1))], rows, names=2)


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.2f} ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"


def _loss(one: ExitAccuracy) -> str:
    return f"{one.loss:.4f} ({one.loss_interval[0]:.4f} to {one.loss_interval[1]:.4f})"


def _section(title: str, words: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p class=words>{html.escape(words)}</p>{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], names: int = 1) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        kinds = ["class=name" if place < names else "" for place in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag} {kind}>{html.escape(str(c))}</{tag}>" for kind, c in zip(kinds, cells)) + "</tr>"
        )

    body = "".join(line("td", row) for row in rows)
    return f"<div class=scroll><table>{line('th', head)}{body}</table></div>"
