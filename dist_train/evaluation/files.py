"""A report written down: report.json, tables, pictures and a page in the run folder, the same in MLflow, and words to print."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import DataError
from dist_train.evaluation.page import html_page, shift_table, timing_lines
from dist_train.evaluation.plots import pictures
from dist_train.evaluation.report import BudgetPoint, Report
from dist_train.files import write_whole
from dist_train.hub import is_address
from dist_train.render.table import csv_of_dicts
from dist_train.tracking.mirror import SyncState
from dist_train.tracking.mlflow import log_report, unusable
from dist_train.training import checkpoint


def check_writable(run: str | Path, out: str | Path | None) -> None:
    """Refuse a folder that cannot be written to, before the work of an evaluation; raises DataError."""
    if is_address(run) and not out:
        raise DataError(f"{run}: a report cannot be written there; give a folder of your own with --out")
    folder = Path(out) if out else checkpoint.run_folder(checkpoint.find(run))
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise DataError(f"{folder}: cannot be written; give another folder with --out")


def write(report: Report, out: str | Path | None = None) -> list[Path]:
    """Write all files into the run folder or ``out``, each whole or not at all, and return them.

    report.json and report.html in the folder itself; exits.csv, budgeted.csv, classes.csv and the pictures in ``report/``.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = Path(out) if out else report.folder
    images = pictures(report)
    content = report.to_json()
    files = {f"report/{name}": text.encode() for name, text in tables(report).items()}
    files |= {f"report/{picture.name}.png": picture.png for picture in images}
    files["report.html"] = html_page(report, images).encode()
    # NaN is no JSON: other programs could not read the report.
    files["report.json"] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    try:
        (folder / "report").mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_whole(folder / name, data)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another folder with --out") from None
    return [folder / name for name in files]


def tables(report: Report) -> dict[str, str]:
    """CSV files by name: exits and ensembles, every point of every sweep, accuracy by class."""
    content, exits = report.to_json(), range(1, len(report.exits) + 1)
    rows = []
    for kind, entries in (("exit", content["exits"]), ("ensemble", content["ensemble"])):
        for entry in entries:
            flat: dict[str, Any] = {"kind": kind}
            for name, value in entry.items():
                if isinstance(value, tuple):
                    flat |= dict(zip((name.replace("interval", "low"), name.replace("interval", "high")), value))
                else:
                    flat[name] = value
            rows.append(flat)
    points = [
        {
            "method": sweep.method,
            "confidence": sweep.confidence,
            "cost_in": sweep.cost,
            "budget": point.budget,
            "cost": point.cost,
            "top1": point.top1,
            "top1_low": point.top1_interval[0],
            "top1_high": point.top1_interval[1],
            "calibration_cost": point.calibration_cost,
            "calibration_top1": point.calibration_top1,
            "expected_cost": point.expected_cost,
            "expected_top1": point.expected_top1,
            **{f"threshold{m}": point.thresholds[m - 1] for m in exits},
            **{f"share{m}": point.shares[m - 1] for m in exits},
        }
        for sweep in report.sweeps
        for point in sweep.points
    ]
    found = report.diagnostics
    classes = [
        {"class": name, "images": int(images), **{f"exit{m}": top1[m - 1] for m in exits}}
        for name, images, top1 in zip(report.index.classes, found.class_images, found.class_top1.tolist())
    ]
    written = {"exits.csv": rows, "classes.csv": classes} | ({"budgeted.csv": points} if points else {})
    return {name: csv_of_dicts(lines) for name, lines in written.items()}


def summary(report: Report, shown: Sequence[BudgetPoint] | None = None) -> str:
    """For a terminal: every exit, some budgets (by default those nearest to the exits' costs), and what to know."""
    lines = [
        f"{report.checkpoint}, step {report.step}, on {report.split}, in {report.precision}",
        f"{'exit':>4}  {'multiply-adds':>13}  {'top-1 %':>7}  {'95 %':>15}  {'top-5 %':>7}  {'loss':>6}  {'ECE %':>5}  "
        f"{'with all before: top-1 %':>24}",
    ]
    for m, (one, joint) in enumerate(zip(report.exits, report.ensemble)):
        low, high = one.top1_interval
        lines.append(
            f"{m + 1:>4}  {report.costs['multiply_adds'][m] / 1e6:>11.2f} M  {100 * one.top1:>7.2f}  "
            f"{f'{100 * low:.2f} to {100 * high:.2f}':>15}  {100 * one.top5:>7.2f}  {one.loss:>6.4f}  {100 * one.ece:>5.2f}  "
            f"{100 * joint.top1:>24.2f}"
        )
    lost = f"; {report.unreadable} unreadable ones not counted" if report.unreadable else ""
    lines.append(f"{report.images} images, each once{lost}")
    if shown is None and report.calibration is not None:
        shown = report.budgeted(report.costs["multiply_adds"])
    if shown:
        lines += ["", f"{'budget':>13}  {'spent':>11}  {'top-1 %':>7}  {'95 %':>15}  leave at each exit %"]
        for point in shown:
            low, high = point.top1_interval
            lines.append(
                f"{point.budget / 1e6:>11.2f} M  {point.cost / 1e6:>9.2f} M  {100 * point.top1:>7.2f}  "
                f"{f'{100 * low:.2f} to {100 * high:.2f}':>15}  " + " ".join(f"{100 * one:.0f}" for one in point.shares)
            )
    if report.timing is not None:
        times = zip(report.timing.milliseconds, report.timing.spread)
        each = "  ".join(f"exit {m}: {time:.2f} ± {spread:.2f}" for m, (time, spread) in enumerate(times, start=1))
        lines += ["", f"milliseconds  {each}", *timing_lines(report)]
    lines += report.notes
    if report.guarantee is not None:
        lines += ["", *report.guarantee.lines()]
    if report.shift:
        lines += ["", shift_table(report).text()]
    return "\n".join(lines)


def log_to_run(report: Report, files: Sequence[Path], out: str | Path | None = None) -> list[str]:
    """Log the files and the exits' numbers to the run in MLflow that the folder belongs to; what happened, in lines.

    Files written elsewhere with ``out`` are not logged.  MLflow being away is said, and no error.
    """
    html = next(file for file in files if file.suffix == ".html")
    lines = ["", f"report     {html}"]
    state = SyncState(report.folder)
    known = state.read()
    uri, run_id = known.get("uri"), known.get("run_id")
    if uri is None or run_id is None or out is not None:
        return lines
    # In the MLflow run of the original this report would take the place of the original's own.
    if not state.belongs_to(report.folder):
        return [
            *lines,
            f"not in MLflow: the folder is a copy; `dist-train sync {report.folder}` gives it a run of its own",
        ]
    try:
        _log(report, files, uri, run_id)
    except Exception as error:  # whatever MLflow raises: the files are written
        return [*lines, f"{unusable(uri, error)}; the report is in the run folder only"]
    return [*lines, f"in MLflow  run {run_id}, artifacts"]


def _log(report: Report, files: Sequence[Path], uri: str, run_id: str) -> None:
    values = {
        f"report/exit{m}/{name}": value
        for m, one in enumerate(report.exits, start=1)
        for name, value in (("top1", one.top1), ("top5", one.top5), ("loss", one.loss), ("ece", one.ece))
    }
    placed = [(file, None if file.parent == report.folder else "report") for file in files]
    log_report(uri, run_id, values, report.step, {"report.split": report.split}, placed)
