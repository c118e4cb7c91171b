"""A comparison written down: one folder of tables, pictures and a self-contained page, and the same as an MLflow run."""

from __future__ import annotations

import base64
import html
import os
import time
from collections import Counter
from pathlib import Path

from dist_train.compare.grouping import Comparison
from dist_train.compare.runs import COMPARISON_TAG, open_store
from dist_train.compare.tables import accuracy_csv, runs_csv, tables
from dist_train.errors import DataError

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d8d8d8; white-space: nowrap }
th { border-bottom: 2px solid #777 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
img { max-width: min(100%, 54rem); height: auto; display: block; margin-top: 1rem } p.words, footer { color: #555; font-size: .85rem }
li { margin: .2rem 0 } tr, img, li { break-inside: avoid }
@media print { body { margin: 0; max-width: none; font-size: 10pt } .scroll { overflow: visible } td, th { padding: .15rem .4rem; white-space: normal } }
"""


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


def page(comparison: Comparison, pictures: dict[str, tuple[bytes, str]]) -> str:
    """One HTML file with the pictures inside: it opens without a network."""
    title = html.escape(comparison.title)
    runs = sum(len(group.runs) for group in comparison.groups)
    parts = [f"<h1>{title}</h1><p class=words>{runs} runs in {len(comparison.groups)} groups</p>"]
    made = tables(comparison)
    for table in made:
        parts.append(f"<div class=scroll>{table.html()}</div>")
        if table is made[min(1, len(made) - 1)]:
            parts += [
                f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
                f"<p class=words>{html.escape(words)}</p>"
                for data, words in pictures.values()
            ]
    if comparison.notes:
        parts.append(f"<h2>Notes</h2>{_list(comparison.notes)}")
    sources = [f"{run.name}: {run.source}" for group in comparison.groups for run in group.runs]
    parts.append(f"<details><summary>The runs</summary>{_list(sources)}</details>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.html, .md, .txt, accuracy.csv, runs.csv and the pictures; every file is whole or absent."""
    from dist_train.compare.plots import FIGURES, save

    pictures = {name: (save(draw(comparison)), words) for name, draw, words in FIGURES}
    files: dict[str, bytes] = {
        "comparison.html": page(comparison, pictures).encode(),
        "comparison.md": markdown(comparison).encode(),
        "comparison.txt": (text(comparison) + "\n").encode(),
        "accuracy.csv": accuracy_csv(comparison).encode(),
        "runs.csv": runs_csv(comparison).encode(),
    } | {f"{name}.png": data for name, (data, _) in pictures.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            draft = folder / f".{name}.tmp"
            draft.write_bytes(data)
            os.replace(draft, folder / name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another folder with --out") from None
    return [folder / name for name in files]


def track(comparison: Comparison, files: list[Path], command: str, parent: bool = False) -> str | None:
    """Log a comparison as an MLflow run beside the runs it compares, with ``parent`` as their parent; returns the store's URI.

    The store is that of most runs; None where no run was tracked.
    """
    runs = [run for group in comparison.groups for run in group.runs if run.store and run.run_id]
    stores = Counter(run.store for run in runs)
    if not stores:
        return None
    uri = str(stores.most_common(1)[0][0])
    client = open_store(uri)
    runs = [run for run in runs if run.store == uri]
    experiment = client.get_run(runs[0].run_id).info.experiment_id
    tags = {COMPARISON_TAG: "true", "mlflow.note.content": f"`{command}`\n\n{markdown(comparison)}"}
    made = client.create_run(experiment, run_name=comparison.title, tags=tags, start_time=int(time.time() * 1000))
    for file in files:
        client.log_artifact(made.info.run_id, str(file))
    for group in comparison.groups if parent else ():
        for run in group.runs:
            if run in runs:
                client.set_tag(run.run_id, "mlflow.parentRunId", made.info.run_id)
                client.set_tag(run.run_id, "group", group.label)
    client.set_terminated(made.info.run_id)
    return uri
