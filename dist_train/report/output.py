"""A report written down: report.json, tables, pictures and a page in the run folder, the same in MLflow, and words to print."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train import checkpoint
from dist_train.errors import ConfigError, DataError
from dist_train.report.report import BudgetPoint, Report

UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


def parse_budgets(text: str | None) -> list[float]:
    """Budgets from the command line: ``12e6,20M,1.5G`` multiply-adds per image; raises ConfigError for no number."""
    budgets = []
    for word in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?)([kMG]?)\s*", word)
        if match is None:
            raise ConfigError(f"--budgets has {word!r}; give multiply-adds per image such as 12e6,20M,1.5G")
        budgets.append(float(match[1]) * UNITS[match[2]])
    return budgets


def check_writable(run: str | Path, out: str | Path | None) -> None:
    """Refuse a folder that cannot be written to, before the work of an evaluation; raises DataError."""
    folder = Path(out) if out else checkpoint.run_folder(checkpoint.resolve(run))
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise DataError(f"{folder}: cannot be written; give another folder with --out")


def write(report: Report, out: str | Path | None = None) -> list[Path]:
    """Write all files into the run folder or ``out``, each whole or not at all, and return them.

    report.json and report.html in the folder itself; exits.csv, budgeted.csv, classes.csv and the pictures in ``report/``.

    Raises:
        DataError: the folder cannot be written.
    """
    from dist_train.report.page import page
    from dist_train.report.plots import pictures

    folder = Path(out) if out else report.folder
    images = pictures(report)
    content = report.to_json()
    files = {f"report/{name}": text.encode() for name, text in tables(report).items()}
    files |= {f"report/{picture.name}.png": picture.png for picture in images}
    files["report.html"] = page(report, images).encode()
    files["report.json"] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    try:
        (folder / "report").mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            draft = (folder / name).with_suffix(f".{os.getpid()}.tmp")
            try:
                draft.write_bytes(data)
                draft.replace(folder / name)
            finally:
                draft.unlink(missing_ok=True)
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
            "method": sweep.method, "confidence": sweep.confidence, "cost_in": sweep.cost, "budget": point.budget,
            "cost": point.cost, "top1": point.top1, "top1_low": point.top1_interval[0], "top1_high": point.top1_interval[1],
            "calibration_cost": point.calibration_cost, "calibration_top1": point.calibration_top1,
            **{f"threshold{m}": point.thresholds[m - 1] for m in exits}, **{f"share{m}": point.shares[m - 1] for m in exits},
        }
        for sweep in report.sweeps for point in sweep.points
    ]  # fmt: skip
    found = report.diagnostics
    classes = [
        {"class": name, "images": int(images), **{f"exit{m}": top1[m - 1] for m in exits}}
        for name, images, top1 in zip(report.index.classes, found.class_images, found.class_top1.tolist())
    ]
    written = {"exits.csv": rows, "classes.csv": classes} | ({"budgeted.csv": points} if points else {})
    return {name: _csv(lines) for name, lines in written.items()}


def summary(report: Report, shown: Sequence[BudgetPoint] | None = None) -> str:
    """For a terminal: every exit, some budgets (by default those nearest to the exits' costs), and what to know."""
    lines = [
        f"{report.checkpoint}, step {report.step}, on {report.split}",
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
    return "\n".join([*lines, *report.notes])


def log_to_run(report: Report, files: Sequence[Path], out: str | Path | None = None) -> list[str]:
    """Log the files and the exits' numbers to the run in MLflow that the folder belongs to; what happened, in lines.

    Files written elsewhere with ``out`` are not logged.  MLflow being away is said, and no error.
    """
    page = next(file for file in files if file.suffix == ".html")
    lines = ["", f"report     {page}"]
    try:
        state = json.loads((report.folder / "tracking.json").read_text())
        uri, run_id = state["uri"], state["run_id"]
    except (OSError, ValueError, KeyError):
        return lines
    if out is not None:
        return lines
    try:
        _log(report, files, uri, run_id)
    except Exception as error:  # whatever MLflow raises: the files are written
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return [*lines, f"MLflow at {uri} cannot be used ({reason}); the report is in the run folder only"]
    return [*lines, f"in MLflow  run {run_id}, artifacts"]


def _log(report: Report, files: Sequence[Path], uri: str, run_id: str) -> None:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import time

    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client, now = MlflowClient(tracking_uri=uri), int(time.time() * 1000)
    values = {
        f"report/exit{m}/{name}": value
        for m, one in enumerate(report.exits, start=1)
        for name, value in (("top1", one.top1), ("top5", one.top5), ("loss", one.loss), ("ece", one.ece))
    }
    client.log_batch(run_id, metrics=[Metric(key, value, now, report.step) for key, value in values.items()])
    client.set_tag(run_id, "report.split", report.split)
    for file in files:
        folder = None if file.parent == report.folder else "report"
        client.log_artifact(run_id, str(file), folder)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
