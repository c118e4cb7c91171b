"""The report as one HTML file with everything inside, which opens without a network."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.evaluation.accuracy import ExitAccuracy
from dist_train.evaluation.guarantee import Guarantee
from dist_train.evaluation.plots import Picture
from dist_train.evaluation.report import Report
from dist_train.render.page import page, paragraph, picture, section
from dist_train.render.table import Table, millions

COST_WORDS = (
    "Per image, the exits before it included: multiply-adds of convolutions and matrix products; the public counter's, behind "
    "the published axes; lazy, what the exit needs alone."
)


def html_page(report: Report, pictures: Sequence[Picture]) -> str:
    """The whole page: exits, budgets, pictures, confusions."""
    lost = f", {report.unreadable} unreadable ones not counted" if report.unreadable else ""
    facts = f"{report.checkpoint.name}, step {report.step}, {report.images} images of {report.split}, each once{lost}"
    parts = [
        paragraph(facts),
        *map(paragraph, report.notes),
        section("Every exit", "All images leave at the exit; in brackets the 95 % interval.", _exits(report)),
        section("What an exit costs", " ".join([COST_WORDS, *timing_lines(report)]), _costs(report)),
    ]
    if report.calibration is not None:
        words = (
            "Optimal thresholds on the largest probability; a budget is multiply-adds per image on average. Promised is "
            "what calibration images say that were held out from the fit, in brackets the 95 % interval."
        )
        parts.append(section("At a budget", words, _budgets(report)))
    if report.guarantee is not None:
        words = " ".join(report.guarantee.lines())
        parts.append(section("Guarantees", words, _guarantee(report.guarantee)))
    if report.shift:
        words = (
            "The test images under corruptions, by thresholds that were fitted without them: accuracy of the thresholds and "
            "of the last exit, what they cost of the last exit, and the guarantees that do not hold any more."
        )
        parts.append(section("Under shift", words, shift_table(report).html()))
    words = (
        "How well confidence tells right from wrong on the test images: AUROC (1 is perfect, 0.5 is chance), the area "
        "under the risk-coverage curve (AURC, lower is better), and EEFP, the AUROC for whether an image should exit."
    )
    parts.append(section("Failure prediction", words, _failure(report)))
    parts += [section(one.title, one.words, picture(one.png, one.title)) for one in pictures]
    if report.diagnostics.confusions:
        words = "Images of a class that the exit takes for another; most at the last exit first."
        parts.append(section("Classes confused most", words, _confusions(report)))
    return page(f"{report.folder.name}: {report.split}", parts)


def _exits(report: Report) -> str:
    rows = [
        [
            m,
            _share(one.top1, one.top1_interval),
            f"{100 * one.top5:.2f}",
            _loss(one),
            _share(one.ece, one.ece_interval),
            _share(joint.top1, joint.top1_interval),
            _share(joint.ece, joint.ece_interval),
        ]
        for m, (one, joint) in enumerate(zip(report.exits, report.ensemble), start=1)
    ]
    return _table(["exit", "top-1 %", "top-5 %", "loss", "ECE %", "with all before: top-1 %", "ECE %"], rows)


def _costs(report: Report) -> str:
    names = {
        "multiply_adds": "multiply-adds",
        "multiply_adds_public": "public count",
        "multiply_adds_lazy": "lazy",
        "parameters": "parameters",
    }
    rows = [[m + 1, *(millions(report.costs[name][m]) for name in names)] for m in range(len(report.exits))]
    if report.timing is not None:
        for row, milliseconds, spread in zip(rows, report.timing.milliseconds, report.timing.spread):
            row.append(f"{milliseconds:.2f} ± {spread:.2f}")
    return _table(["exit", *names.values(), *(["milliseconds"] if report.timing else [])], rows)


def timing_lines(report: Report) -> list[str]:
    """What the milliseconds depend on, and whether the machine was busy; nothing where none were measured."""
    timing = report.timing
    if timing is None:
        return []
    said = f"Milliseconds as prediction takes them: {timing.conditions}; median ± half the quartiles' distance."
    return [said, *([f"Warning: {timing.warning}."] if timing.warning else [])]


def _budgets(report: Report) -> str:
    points = report.sweeps[0].points
    # Ten of a sweep are enough for a table.
    chosen = sorted({round(index * (len(points) - 1) / 9) for index in range(10)})
    rows = [
        [
            millions(point.budget),
            millions(point.cost),
            _share(point.top1, point.top1_interval),
            "" if point.expected_top1 is None else _share(point.expected_top1, point.expected_top1_interval),
            " | ".join(f"{100 * share:.1f}" for share in point.shares),
        ]
        for point in (points[index] for index in chosen)
    ]
    return _table(["budget", "spent", "top-1 %", "promised", "images that exit at exit 1 | 2 | ... %"], rows)


def _guarantee(found: Guarantee) -> str:
    rows = [
        [
            bound.risk,
            f"{bound.epsilon:g}",
            f"{1 - bound.delta:g}",
            f"{bound.estimate:.4f}",
            f"{bound.p_value:.2g}",
            f"{one.value:.4f} ({one.value_interval[0]:.4f} to {one.value_interval[1]:.4f})",
        ]
        for bound, one in zip(found.certificate.bounds, found.measured)
    ]
    return _table(["risk", "at most", "with probability", "on calibration images", "p-value", "on test images"], rows)


def shift_table(report: Report) -> Table:
    """A row per corruption and severity."""
    header = ["corruption", "severity", "top-1 %", "last exit %", "cost %", "ECE %", *_risks(report), "broken"]
    rows = [
        [
            one.corruption,
            str(one.severity),
            f"{100 * one.top1:.2f}",
            f"{100 * one.exits[-1]:.2f}",
            f"{100 * one.cost:.1f}",
            f"{100 * one.ece:.2f}",
            *(f"{risk.value:.4f}" for risk in one.risks),
            ", ".join(one.broken),
        ]
        for one in report.shift
    ]
    return Table("", header, rows)


def _risks(report: Report) -> list[str]:
    return [one.risk for one in report.shift[0].risks]


def _failure(report: Report) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows = [
        [one.measure.replace("_", " "), one.exit, number(one.auroc), number(one.aurc), number(one.eefp)]
        for one in report.failure_prediction
    ]
    return _table(["measure", "exit", "AUROC", "AURC", "EEFP"], rows)


def _confusions(report: Report) -> str:
    classes = report.index.classes
    rows = [[classes[true], classes[taken], *images] for true, taken, images in report.diagnostics.confusions]
    return _table(["class", "taken for", *(f"exit {m}" for m in range(1, len(report.exits) + 1))], rows, names=2)


def _share(value: float, interval: tuple[float, float] | None) -> str:
    assert interval is not None
    return f"{100 * value:.2f} ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"


def _loss(one: ExitAccuracy) -> str:
    return f"{one.loss:.4f} ({one.loss_interval[0]:.4f} to {one.loss_interval[1]:.4f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], names: int = 1) -> str:
    return Table("", header, [[str(cell) for cell in row] for row in rows], names).html()
