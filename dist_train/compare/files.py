"""Writes a comparison: a folder of tables, pictures and a self-contained page, and the same as an MLflow run."""

from __future__ import annotations

import csv
import sys
import time
from collections import Counter
from pathlib import Path

from dist_train.compare.claims import CLAIM_NAMES, claims
from dist_train.compare.grouping import Comparison
from dist_train.compare.plots import CLAIM_WORDS, FIGURES, claim_figure
from dist_train.compare.runs import COMPARISON_TAG
from dist_train.compare.tables import accuracy_csv, claims_csv, runs_csv, tables
from dist_train.errors import DataError
from dist_train.files import write_whole
from dist_train.render.figure import to_png
from dist_train.render.page import bullets, page, paragraph, picture
from dist_train.tracking.mlflow import open_store, reason, without_password


def text(comparison: Comparison) -> str:
    """For a terminal."""
    parts = [table.text() for table in tables(comparison)]
    if comparison.notes:
        parts.append("\n".join(f"note: {note}" for note in comparison.notes))
    return "\n\n".join(parts)


def markdown(comparison: Comparison) -> str:
    """For a README, an issue, or MLflow's description."""
    parts = [table.markdown() for table in tables(comparison)]
    notes = "\n".join(f"- {note}" for note in comparison.notes)
    return "\n\n".join([f"## {comparison.title}", *parts, *([notes] if notes else [])]) + "\n"


def html_page(comparison: Comparison, pictures: dict[str, tuple[bytes, str]]) -> str:
    """One HTML file with the pictures inside: it opens without a network."""
    runs = sum(len(group.runs) for group in comparison.groups)
    parts = [paragraph(f"{runs} runs in {len(comparison.groups)} groups")]
    made = tables(comparison)
    for table in made:
        parts.append(table.html())
        if table is made[min(1, len(made) - 1)]:
            parts += [picture(data, words) + paragraph(words) for data, words in pictures.values()]
    if comparison.notes:
        parts.append(f"<h2>Notes</h2>{bullets(comparison.notes)}")
    sources = [f"{run.name}: {run.source}" for group in comparison.groups for run in group.runs]
    parts.append(f"<details><summary>The runs</summary>{bullets(sources)}</details>")
    return page(comparison.title, parts)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.html, .md, .txt, the tables as CSV and the pictures; every file is whole or absent."""
    pictures = {name: (to_png(draw(comparison)), words) for name, draw, words in FIGURES}
    pictures |= {
        claim.name: (to_png(claim_figure(comparison, claim)), CLAIM_WORDS.format(title=claim.title))
        for claim in claims(comparison)
    }
    files: dict[str, bytes] = {
        "comparison.html": html_page(comparison, pictures).encode(),
        "comparison.md": markdown(comparison).encode(),
        "comparison.txt": (text(comparison) + "\n").encode(),
        "accuracy.csv": accuracy_csv(comparison).encode(),
        "claims.csv": claims_csv(comparison).encode(),
        "runs.csv": runs_csv(comparison).encode(),
    } | {f"{name}.png": data for name, (data, _) in pictures.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_whole(folder / name, data)
        for name in CLAIM_NAMES - pictures.keys():
            (folder / f"{name}.png").unlink(missing_ok=True)  # of the comparison that was here before
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another folder with --out") from None
    return [folder / name for name in files]


def refuse_other(comparison: Comparison, folder: Path) -> None:
    """Refuse a folder that has a comparison of other runs; raises DataError, which names the first of them."""
    try:
        with (folder / "runs.csv").open(newline="") as file:
            before = {row["source"]: row["run"] for row in csv.DictReader(file)}
    except (OSError, KeyError, csv.Error):
        return
    now = {run.source for group in comparison.groups for run in group.runs}
    if before.keys() != now:
        name = next(iter(before[source] for source in before if source not in now), "fewer runs")
        raise DataError(f"{folder}: has a comparison of other runs ({name}); give another --out, or --overwrite")


def track(comparison: Comparison, files: list[Path], command: str, parent: bool = False) -> str | None:
    """Log a comparison as an MLflow run beside the runs it compares, with ``parent`` as their parent; returns the store's URI.

    A folder has one such run: made again, the comparison is put in its place.  The store is that of most runs; None
    where no run was tracked.
    """
    runs = [run for group in comparison.groups for run in group.runs if run.store and run.run_id]
    stores = Counter(run.store for run in runs)
    if not stores:
        return None
    # Runs of several stores cannot be linked; the largest group gets the comparison.
    uri = str(stores.most_common(1)[0][0])
    client = open_store(uri)
    runs = [run for run in runs if run.store == uri]
    experiment = client.get_run(runs[0].run_id).info.experiment_id
    place = str(files[0].parent.resolve())
    note = {
        "mlflow.note.content": f"`{without_password(command)}`\n\n{markdown(comparison)}",
        "mlflow.runName": comparison.title,
    }
    # MLflow's filters have no escapes: a quote in the path is left to a wildcard.
    pattern = place.replace("'", "_").replace("%", "_")
    query = f"tags.`{COMPARISON_TAG}` LIKE '{pattern}'"
    found = [run for run in client.search_runs([experiment], query) if run.data.tags[COMPARISON_TAG] == place]
    if found:
        run_id = found[0].info.run_id
        for key, value in note.items():
            client.set_tag(run_id, key, value)
    else:
        tags = {COMPARISON_TAG: place, **note}
        run_id = client.create_run(experiment, tags=tags, start_time=int(time.time() * 1000)).info.run_id
    for file in files:
        client.log_artifact(run_id, str(file))
    for group in comparison.groups if parent else ():
        for run in group.runs:
            if run in runs:
                client.set_tag(run.run_id, "mlflow.parentRunId", run_id)
    client.set_terminated(run_id)
    return uri


def publish(
    comparison: Comparison, out: Path, command: str, *, tracked: bool, parent: bool = False, overwrite: bool = False
) -> None:
    """Print a comparison, write its files, log it; with ``parent`` its MLflow run becomes the parent of its runs.

    Raises:
        DataError: ``out`` has a comparison of other runs, and is not to be overwritten.
    """
    if not overwrite:
        refuse_other(comparison, out)
    print(text(comparison))
    files = write(comparison, out)
    print(f"\nopen      {files[0]}")
    if tracked:
        try:
            uri = track(comparison, files, command, parent)
        # The files are written by now: a store that is away must not turn the comparison into a failure.
        except Exception as error:  # whatever MLflow raises
            print(f"dist-train: the comparison is not in MLflow: {reason(error)}", file=sys.stderr)
        else:
            if uri:
                print(f"in MLflow {without_password(uri)}")
