"""The model card: the README.md of a repository, made of the report of a run and its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from dist_train.config import Config
from dist_train.hub import PREFIX
from dist_train.render.table import Table, millions
from dist_train.training.checkpoint import CheckpointMeta

BUDGETS = (0.5, 0.75, 1.0)
"""Shares of the last exit's cost that the table of budgets asks for."""
OF_ANOTHER = (
    "Accuracy and guarantees below are of the network in {}; `export/README.md` has the accuracy of these programs."
)
CITATION = """@inproceedings{phuong2019distillation,
  title     = {Distillation-Based Training for Multi-Exit Architectures},
  author    = {Phuong, Mary and Lampert, Christoph H.},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {1355--1364},
  year      = {2019},
  doi       = {10.1109/ICCV.2019.00144}
}"""


def card_text(
    address: str,
    config: Config,
    meta: CheckpointMeta,
    report: Mapping[str, Any] | None,
    exported: Mapping[str, Any] | None,
) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        address: by which the network is loaded: ``hf://ORG/NAME`` or a folder.
        config: as it is published.
        meta: of the checkpoint.
        report: content of report.json of the same step; None where there is none.
        exported: content of the export's policy.json; None where there is none.
    """
    evaluated = (report or {}).get("precision", config.train.precision)
    tags = ["image-classification", "early-exit", "multi-exit", "anytime-prediction", "knowledge-distillation"]
    matter = {"library_name": "dist_train", "pipeline_tag": "image-classification", "tags": tags}
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---",
        f"# {config.name}",
        f"An image classifier with several exits ({config.model.name}, step {meta.progress.step}): an image that an early exit is "
        "confident of stops there, and skips the rest of the computation.",
        _use(address, report),
        *(_export(address, exported["runtime"], exported["precision"], evaluated) if exported else ()),
        "## Accuracy",
        *(_accuracy(report) if report else ("It has not been evaluated.",)),
        _data(config, meta, report),
        _limits(config, report),
        _training(config, meta),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _use(address: str, report: Mapping[str, Any] | None) -> str:
    points = _points(report) if report else []
    install = ".[hub]" if address.startswith(PREFIX) else "."
    # Rounded up: below the cheapest point there are no thresholds.
    budget = f" --budget {math.ceil(points[len(points) // 2]['budget'] / 1e4) / 100:g}M" if points else ""
    return f"""## Use

```bash
pip install "{install}"    # in a clone of the repository of dist_train
dist-train predict {address} IMAGES{budget}
```

```python
from dist_train import load_model

model = load_model("{address}")  # a torch module
for logits in model.iter_exits(images):  # prepared as config.yaml says; computes no further than you iterate
    ...
```"""


def _export(address: str, runtime: str, precision: str, evaluated: str) -> tuple[str, ...]:
    fetch = f"hf download {address.removeprefix(PREFIX)} --include 'export/*' --local-dir .\n"
    return (
        f"Without torch and without dist_train, in {precision} in {runtime} by `export/predict.py`, which is short enough to be read before it is run:",
        f"```bash\n{fetch if address.startswith(PREFIX) else ''}pip install numpy pillow {runtime}\npython export/predict.py IMAGES\n```",
        *((OF_ANOTHER.format(evaluated),) if precision != evaluated else ()),
    )


def _accuracy(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            str(one["exit"]),
            millions(one["multiply_adds_lazy"]),
            _with_interval(one, "top1"),
            _with_interval(one, "top5"),
            f"{100 * one['ece']:.2f}" if "ece" in one else "",
        ]
        for one in report["exits"]
    ]
    exits = Table(
        f"All images stop at one exit: {report['images']} images of {report['split']}",
        ["exit", "multiply-adds", "top-1 % (95 % interval)", "top-5 % (95 % interval)", "ECE %"],
        rows,
    )
    parts = [exits.markdown()]
    if points := _points(report):
        rows = [
            [
                millions(point["budget"]),
                millions(point["cost"]),
                _with_interval(point, "top1"),
                ", ".join(f"{100 * share:.0f}" for share in point["shares"]),
            ]
            for point in points
        ]
        header = ["budget per image", "cost", "top-1 % (95 % interval)", "images that stop at exit 1, 2, ..., %"]
        parts.append(Table("Images stop early, by thresholds for a budget", header, rows).markdown())
    guarantee = report.get("guarantee")
    if guarantee and guarantee["thresholds"] is not None:
        risks = "; ".join(f"{risk['risk']} at most {risk['epsilon']:g}" for risk in guarantee["risks"])
        parts.append(
            f"Thresholds with a guarantee (`--risk`): {risks}, with probability {1 - guarantee['delta']:g}, on images like those of "
            f"{guarantee['calibration']}; they save {100 * guarantee['saved']:.1f} % of the last exit's cost."
        )
    return parts


def _points(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of a sweep of budgets, one per share of the last exit's cost that it reaches; none where the report has no thresholds."""
    sweeps = [
        sweep for sweep in report.get("budgeted", ()) if sweep["cost"] == "multiply_adds_lazy" and sweep["points"]
    ]
    optimal = [sweep for sweep in sweeps if sweep["method"] == "optimal"] or sweeps
    if not optimal:
        return []
    last = report["exits"][-1]["multiply_adds_lazy"]
    found: list[Mapping[str, Any]] = []
    for share in BUDGETS:
        # A budget may miss the share that it equals by rounding.
        within = [point for point in optimal[0]["points"] if point["budget"] <= share * last * (1 + 1e-9)]
        if within and within[-1] not in found:
            found.append(within[-1])
    return found


def _data(config: Config, meta: CheckpointMeta, report: Mapping[str, Any] | None) -> str:
    data = config.data
    classes = ", ".join(meta.classes[:20]) + (", ..." if len(meta.classes) > 20 else "")
    tested = f"\nTested on {report['images']} images of its split `{report['split']}`." if report else ""
    return (
        f"## Data\n\nTrained on `{data.train_name}`, {len(meta.classes)} classes: {classes}.{tested}\n\n"
        f"Images: RGB, shorter side {data.eval_resize or data.image_size} pixels, centre crop of {data.image_size}, scaled to 0 to 1, "
        f"minus {list(data.mean)}, divided by {list(data.std)}."
    )


def _limits(config: Config, report: Mapping[str, Any] | None) -> str:
    notes = [
        "It knows these classes alone: every image gets one of them, whatever it shows.",
        "Accuracy, thresholds and guarantees hold for images like those that were tested; `dist-train predict` warns where "
        "another share of the images stops at an exit.",
    ]
    if report is not None:
        notes += [f"{note[:1].upper()}{note[1:]}." for note in report.get("notes", ())]
        if report.get("shift"):
            notes.append("Accuracy under corruptions of the images is in `report.json`, under `shift`.")
        else:
            notes.append("Its accuracy on blurred, noisy or darker images has not been measured.")
    if config.data.flip:
        notes.append("It was trained on mirrored images as well, so it does not tell left from right.")
    return "## Limits\n\n" + "\n".join(f"- {note}" for note in notes)


def _training(config: Config, meta: CheckpointMeta) -> str:
    loss, optim, train = config.loss, config.optim, config.train
    teachers = [f"other exits (teachers: {loss.teachers})"] if loss.teachers != "none" else []
    if count := len(loss.outside_teachers):
        teachers.append(f"{count} teacher{'s' if count > 1 else ''} outside of the network")
    taught = f"the labels, and from {' and '.join(teachers)}" if teachers else "the labels alone"
    together = (
        f" An exit predicts together with those before it (`model.ensemble: {config.model.ensemble}`)."
        if config.model.ensemble
        else ""
    )
    return (
        f"## How it was trained\n\nEvery exit learns from {taught} (Phuong & Lampert, 2019).{together} {train.epochs} epochs, of which this is "
        f"step {meta.progress.step}; {optim.name}, learning rate {optim.lr:g}, batches of {train.global_batch} images, "
        f"{train.precision}, {meta.world_size} process{'es' if meta.world_size > 1 else ''}, seed {config.seed}. `config.yaml` has all settings; a run of one's own starts from it:\n"
        "`dist-train train config.yaml --data.shards SHARDS`."
    )


def _with_interval(entry: Mapping[str, Any], name: str) -> str:
    low, high = entry.get(f"{name}_interval") or (None, None)
    between = "" if low is None or high is None else f" ({100 * low:.2f} to {100 * high:.2f})"
    return f"{100 * entry[name]:.2f}{between}"
