"""What a comparison knows of one run, read from its folder or from MLflow.

Both give the same, but for the speed of steps that a kill made a run compute twice: MLflow keeps the first time's.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import yaml
from numpy.typing import NDArray

from dist_train.config_file import describe_fields, flatten, plain
from dist_train.errors import DataError
from dist_train.tracking.metrics import read_metrics
from dist_train.tracking.mirror import CHANGED, SyncState
from dist_train.tracking.mlflow import open_store, without_password
from dist_train.tracking.outcomes import unpack

COMPARISON_TAG = "dist_train.comparison"
"""Tag of an MLflow run that is a comparison, not a training."""

DATA_TAGS = ("classes", "train_images", "train_data", "val_data")
"""What identifies a run's data: written to env.json, and to MLflow as tags."""

Series = list[tuple[int, float]]
"""Points (step, value) of one metric, steps rising."""


@dataclass(frozen=True)
class RunData:
    """One run: ``fields`` is its configuration as text, ``report`` its report.json, None before its end."""

    name: str
    source: str
    fields: dict[str, str]
    report: dict[str, Any] | None = None
    series: dict[str, Series] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    store: str | None = None
    run_id: str | None = None

    @property
    def seed(self) -> str:
        """The seed, as text."""
        return self.fields.get("seed", "0")

    @property
    def exits(self) -> list[dict[str, Any]]:
        """The report's exits, empty before the run's end."""
        return list(self.report.get("exits", [])) if self.report else []

    @property
    def evaluated_later(self) -> bool:
        """Whether the report is of `dist-train eval`, which takes the best checkpoint; training's own is of the last step."""
        return any("ece" in one for one in self.exits)

    @property
    def evaluated_before_its_end(self) -> bool:
        """Whether the report is of a step before the last validation."""
        validations = self.series.get("val/mean_top1", [])
        return bool(self.report and validations and self.report.get("step", 0) < validations[-1][0])

    @cached_property
    def outcomes(self) -> NDArray[np.uint8] | None:
        """What every exit made of every image, [N, M], see :mod:`dist_train.tracking.outcomes`; None where the report has none.

        Raises:
            DataError: they are damaged.
        """
        if not self.report or "outcomes" not in self.report:
            return None
        try:
            return unpack(self.report["outcomes"])
        except DataError as error:
            raise DataError(f"{self.source}: its report.json has damaged {error}") from None

    @property
    def evaluated_on(self) -> str | None:
        """Which images its report is about, or will be about, as far as the run says."""
        report, val = self.report or {}, self.fields.get("data.val", "val")
        if (split := report.get("split", val)) != val and "data" not in report:
            return f"the split {split}"
        return report.get("data") or self.data.get("val_data")

    @property
    def seconds(self) -> float | None:
        """Training time from the logged speeds, so that pauses between a stop and its resume do not count."""
        seconds, before = 0.0, 0.0
        # Each speed holds for the images since the line before it.
        for images, speed in self._speeds:
            seconds += (images - before) / speed if speed > 0 else 0.0
            before = images
        return seconds or None

    @property
    def images_per_second(self) -> float | None:
        """Mean speed over the training, in images per second."""
        seconds = self.seconds
        return self._speeds[-1][0] / seconds if seconds else None

    @cached_property
    def _speeds(self) -> list[tuple[float, float]]:
        """The images that were consumed up to a line of metrics, and the speed that it says."""
        text = self.fields.get("train.global_batch", "0")
        try:
            batch = float(text)
        except ValueError:
            raise DataError(
                f"{self.source}: its train.global_batch is {text}, which is no number; correct its configuration"
            ) from None
        # Images of a skipped update were consumed as well.
        skipped = dict(self.series.get("train/skipped_steps", []))
        speeds = self.series.get("speed/images_per_second", [])
        return [((step + skipped.get(step, 0.0)) * batch, speed) for step, speed in speeds]


def wanted(metric: str) -> bool:
    """Whether a comparison uses this metric: its curves and its speed, not every statistic of every exit."""
    return metric in ("train/loss", "val/mean_top1", "speed/images_per_second", "train/skipped_steps")


def read_folder(folder: str | Path) -> RunData:
    """A run from its folder; raises DataError where there is none."""
    folder = Path(folder)
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):  # ValueError: another encoding
        tree = None
    if not isinstance(tree, dict):
        raise DataError(f"{folder}: holds no readable config.yaml; give run folders, such as runs/NAME")
    series: dict[str, Series] = {}
    if (folder / "metrics.jsonl").exists():
        for entry in read_metrics(folder / "metrics.jsonl"):
            for metric, value in entry["metrics"].items():
                if wanted(metric):
                    series.setdefault(metric, []).append((entry["step"], value))
    state = SyncState(folder)
    # What a copied folder has is the MLflow run of the one that it was copied from.
    tracking = state.read() if state.belongs_to(folder) else {}
    store, run_id = (one if isinstance(one := tracking.get(key), str) else None for key in ("uri", "run_id"))
    data = (_json(folder / "env.json") or {}).get("data")
    data = data if isinstance(data, dict) else {}
    report = _json(folder / "report.json")
    if report is not None and not _is_report(report):
        raise DataError(
            f"{folder}/report.json: is no report as this version writes it; make it with `dist-train eval {folder}`"
        )
    fields = _defaults() | {key: plain(value) for key, value in flatten(tree).items()}
    return RunData(
        name=fields["name"],
        source=str(folder),
        fields=fields,
        report=report,
        series={metric: _one_per_step(points) for metric, points in series.items()},
        data={key: str(data[key]) for key in DATA_TAGS if key in data},
        store=store,
        run_id=run_id,
    )


def read_store(uri: str, experiment: str, query: str) -> list[RunData]:
    """The training runs of an MLflow experiment that a filter selects, oldest first.

    Raises:
        DataError: no such store or experiment, a filter that MLflow does not understand, or no run that it selects.
    """
    client = open_store(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(one.name for one in client.search_experiments()) or "none"
        raise DataError(f"{without_password(uri)}: has no experiment '{experiment}'; it has: {names}")
    runs: list[Any] = []
    token = None
    while True:
        try:
            page = client.search_runs(
                [found.experiment_id], query, order_by=["attributes.start_time"], page_token=token
            )
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            raise DataError(f"--filter {query!r}: {text}; write for instance params.loss.teachers = 'later'") from None
        # Comparisons live in the same experiment as the runs they compare, and so do the parents of sweeps, which trained nothing.
        runs += [run for run in page if COMPARISON_TAG not in run.data.tags and run.data.params]
        token = page.token
        if not token:
            break
    if not runs:
        names = ", ".join(one.name for one in client.search_experiments())
        what = f"no run matches {query!r}" if query else "there is no run"
        raise DataError(
            f"{without_password(uri)}: {what} in the experiment '{experiment}'; the experiments here: {names}"
        )
    # A history is a request per metric, and most of the time is spent waiting for the server.
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda run: _from_store(client, uri, run), runs))


def _from_store(client: Any, uri: str, run: Any) -> RunData:
    series = {}
    for metric in run.data.metrics:
        if wanted(metric):
            # By time: where two starts have logged a step, the later one counts.
            history = sorted(client.get_metric_history(run.info.run_id, metric), key=lambda point: point.timestamp)
            series[metric] = _one_per_step([(point.step, point.value) for point in history])
    tags = run.data.tags
    # Parameters cannot be changed in MLflow: what a later start has set is in tags.
    changed = {key.removeprefix(CHANGED): value for key, value in tags.items() if key.startswith(CHANGED)}
    fields = _defaults() | dict(run.data.params) | changed
    report = _artifact(client, run, "report.json")
    if report is not None and not _is_report(report):
        raise DataError(
            f"MLflow run {run.info.run_id}: its report.json is no report as this version writes it; leave it out by --filter"
        )
    return RunData(
        name=run.info.run_name,
        source=f"MLflow run {run.info.run_id}",
        fields=fields,
        report=report,
        series=series,
        data={key: tags[key] for key in DATA_TAGS if key in tags},
        store=uri,
        run_id=run.info.run_id,
    )


def _artifact(client: Any, run: Any, name: str) -> dict[str, Any] | None:
    place = urlparse(run.info.artifact_uri)
    # Artifacts on this machine are read directly: a download would copy them.
    if place.scheme in ("", "file"):
        return _json(Path(place.path) / name)
    if name not in [entry.path for entry in client.list_artifacts(run.info.run_id)]:
        return None
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return _json(Path(client.download_artifacts(run.info.run_id, name, folder)))


def _one_per_step(points: Series) -> Series:
    """The last value logged for every step: a resumed run logs the steps after its checkpoint again."""
    return sorted(dict(points).items())


def _defaults() -> dict[str, str]:
    """Fields that did not exist when a run was written get their default, which is how the run behaved."""
    return {key: default for key, default, _ in describe_fields() if default != "required"}


def _is_report(content: dict[str, Any]) -> bool:
    """Whether what a comparison reads of a report is of the right kind."""
    exits = content.get("exits")
    if not isinstance(exits, list) or not all(isinstance(one, dict) and _is_number(one.get("top1")) for one in exits):
        return False
    numbers = [
        one[key] for one in exits for key in ("top5", "loss", "ece", "multiply_adds", "parameters") if key in one
    ]
    numbers += [content[key] for key in ("step", "images") if key in content]
    return all(map(_is_number, numbers)) and all(isinstance(content.get(key, ""), str) for key in ("split", "data"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
