"""The mirror of a run folder in MLflow: sends what MLflow does not have yet; sending again changes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.config import Config
from dist_train.config_file import flat_fields, load_config
from dist_train.errors import TrackingError
from dist_train.files import write_whole
from dist_train.render.table import Table, millions
from dist_train.tracking.metrics import OF_THE_MACHINE, read_metrics, read_new
from dist_train.tracking.mlflow import (
    Data,
    columns,
    connect,
    experiment_name,
    forget_checkpoint,
    log_checkpoint,
    log_data,
    log_params,
    log_points,
    logged_points,
    reopened,
    tracking_uri,
    unusable,
    without_password,
)

log = logging.getLogger("dist_train")


KEY = "dist_train.key"
"""Tag with a run folder's own key, by which its MLflow run is found again if the answer to its creation was lost."""
CHANGED = "changed."
"""Begins the tags of fields that a later start has changed: MLflow's parameters are forever."""

BYTES_PER_READ = 1 << 20

Point = tuple[str, float, int, int]
"""Of a metric: name, value, milliseconds, step."""


@dataclass(frozen=True)
class Synced:
    """What :func:`sync` left: the MLflow run, its status there, and how many lines of metrics.jsonl were new to it."""

    uri: str
    run_id: str
    status: str
    lines: int


def sync(folder: Path) -> Synced:
    """Send what MLflow does not have yet of a run: tags, settings, metrics, report, status; idempotent.

    Raises:
        TrackingError: not a run folder, a run with tracking off, a damaged report, or a server that cannot be used.
    """
    if not (folder / "config.yaml").exists():
        raise TrackingError(f"{folder}: is not a run folder (no config.yaml); give one, such as runs/NAME")
    config = load_config(folder / "config.yaml")
    state = SyncState(folder)
    # Where the run was sent before: MLFLOW_TRACKING_URI may name another store by now.
    uri = state.read().get("uri") or tracking_uri(config)
    if uri is None:
        raise TrackingError(f"{folder}: was trained with tracking.uri off, so MLflow has no run for it")
    if not state.belongs_to(folder):
        state.forget_run()
    mirror = Mirror(config, folder, uri, state)
    try:
        mirror.open()
        lines = mirror.send()
        mirror.finish()
    except TrackingError:
        raise
    except Exception as error:  # whatever MLflow raises
        raise TrackingError(unusable(uri, error) + "; run the same command again to send the rest") from None
    sent = state.read()
    return Synced(uri, sent["run_id"], sent.get("status", "RUNNING"), lines)


def end(folder: Path, status: str) -> None:
    """Give a run that nobody trains any more its status in MLflow; nothing where it is not tracked.

    Raises:
        TrackingError: as :func:`sync`.
    """
    state = SyncState(folder)
    if "uri" in state.read():
        state.update(status=status, ended=int(time.time() * 1000), complete=False)
        sync(folder)


class SyncState:
    """``tracking.json`` in the run folder: where the run is in MLflow, how far it was sent, how it ended.

    A lock keeps threads and processes (a training, and `dist-train sync` beside it) from undoing each other's updates.

    ``uri``; ``folder``, where the run lives; ``key``, the folder's own; ``run_id``; ``described``, whether MLflow has the settings; ``offset``, the
    bytes of metrics.jsonl that it has, and ``inode``, of which file they are; ``newest``, the largest step that it has, and ``repeated``, the
    one up to which lines may tell of steps that it has already; ``models``, MLflow's ids of the checkpoints by their names; ``tags``; ``started`` and ``ended``, ms; ``status``; ``complete``.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tracking.json"
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """All fields; none where the file is missing or damaged."""
        try:
            state = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def update(self, **fields: Any) -> None:
        """Set some fields, whole or not at all."""
        with self._alone():
            write_whole(self._path, json.dumps(self.read() | fields))

    def forget_run(self) -> None:
        """Forget the MLflow run, but not how the training that it was about began and ended."""
        kept = ("tags", "started", "ended", "status")
        with self._alone():
            write_whole(self._path, json.dumps({key: value for key, value in self.read().items() if key in kept}))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            # The folder is locked: an update renames a new file over the old one, and its lock goes with it.
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                # Where the file system has no locks, threads at least are kept apart.
                with contextlib.suppress(OSError):
                    fcntl.flock(folder, fcntl.LOCK_EX)
                yield
            finally:
                os.close(folder)

    def belongs_to(self, folder: Path) -> bool:
        """Whether this is the state of a run that still lives in ``folder``, and not that of the run it was copied from.

        A folder that was moved keeps its MLflow run; of two folders with one key, the copy is the one at another path.
        """
        before = self.read()
        home, key = before.get("folder"), before.get("key")
        if not isinstance(home, str) or Path(home) == folder.resolve():
            return True
        # Under two names, as by a bind mount.
        with contextlib.suppress(OSError):
            if Path(home).samefile(folder):
                return True
        return key is None or SyncState(Path(home)).read().get("key") != key


class Mirror:
    """Sends one run folder to one MLflow run, the same one after a resume; its methods raise whatever MLflow raises.

    MLflow keeps one point per (key, time, step, value), so sending a line twice changes nothing.  A step that was computed
    twice has its first points there, and others only where their values differ.
    """

    def __init__(self, config: Config, folder: Path, uri: str, state: SyncState) -> None:
        self.config = config
        self.folder = folder
        self.uri = uri
        self.state = state
        self._client: Any = None

    def open(self) -> None:
        """Find or create the MLflow run, and give it its tags and, once, its settings."""
        client, experiment = connect(self.uri, experiment_name(self.config))
        state = self.state.read()
        run_id = state.get("run_id")
        if run_id is None or not reopened(client, run_id):
            key = state.get("key") or uuid.uuid4().hex
            self.state.update(
                uri=self.uri,
                folder=str(self.folder.resolve()),
                key=key,
                offset=0,
                newest=0,
                repeated=0,
                described=False,
                models={},
            )
            # The server may have created the run although its answer was lost: it is found by its key.
            found = client.search_runs([experiment], filter_string=f"tags.`{KEY}` = '{key}'", max_results=1)
            run_id = found[0].info.run_id if found else self._create(client, experiment, key, state.get("started"))
            self.state.update(run_id=run_id)
        tags = state.get("tags", {})
        for name, value in (tags | columns(tags)).items():
            client.set_tag(run_id, name, value)
        self._describe(client, run_id, first=not self.state.read().get("described"))
        self._client = client

    def _create(self, client: Any, experiment: str, key: str, started: int | None) -> str:
        tags = {KEY: key}
        if parent := self.state.read().get("parent"):
            tags["mlflow.parentRunId"] = parent
        run = client.create_run(experiment, start_time=started, run_name=self.config.name, tags=tags)
        return str(run.info.run_id)

    def _describe(self, client: Any, run_id: str, first: bool) -> None:
        """Log the settings.  MLflow keeps the first value of a parameter forever: what changes later is a tag beside it."""
        fields = {key: without_password(value) for key, value in flat_fields(self.config).items()}
        if not first:
            data = client.get_run(run_id).data
            changed = {key: value for key, value in fields.items() if data.params.get(key, value) != value}
            for key, value in changed.items():
                client.set_tag(run_id, f"{CHANGED}{key}", value)
            for tag in data.tags:
                if tag.startswith(CHANGED) and tag.removeprefix(CHANGED) not in changed:
                    client.delete_tag(run_id, tag)  # the field has its first value again
            if changed:
                self._send_config(client, run_id)
            return
        log_params(client, run_id, fields)
        log_data(client, run_id, self._splits())
        self._send_config(client, run_id)
        self.state.update(described=True)

    def _send_config(self, client: Any, run_id: str) -> None:
        client.log_text(run_id, without_password((self.folder / "config.yaml").read_text()), "config.yaml")

    def _splits(self) -> Iterator[Data]:
        tags, data = self.state.read().get("tags", {}), self.config.data
        for use, split, name in (
            ("training", "train", data.train_name),
            ("validation", "val", f"{data.shards}/{data.val}"),
        ):
            if f"{split}_data" in tags and f"{split}_images" in tags:
                images, classes = int(tags[f"{split}_images"]), int(tags["classes"])
                # MLflow takes names of at most 500 characters.
                yield Data(without_password(name)[:500], tags[f"{split}_data"], images, classes, use)

    def send(self) -> int:
        """Send the whole lines of metrics.jsonl that MLflow does not have yet; returns how many."""
        sent = 0
        state = self.state.read()
        known = _Known(self._client, state)
        path = self.folder / "metrics.jsonl"
        while path.exists():
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                inode = found.st_ino
                # A run that resumed has dropped lines, perhaps late, after a full disk.  All is sent again.
                if not is_same_file(found, state):
                    state |= {"inode": inode, "offset": 0, "repeated": state.get("newest", 0)}
                    known = _Known(self._client, state)
                entries, offset = read_new(file, state["offset"], BYTES_PER_READ)
            if offset == state["offset"]:
                break
            points = [(k, v, e["t"], e["step"]) for e in entries for k, v in e["metrics"].items()]
            newest = max([state.get("newest", 0), *(entry["step"] for entry in entries)])
            if newest > state.get("newest", 0):
                # Before they are sent: a run that is killed just then computes steps again that MLflow has.
                self.state.update(newest=newest)
            log_points(self._client, state["run_id"], [point for point in points if known.lacks(point)])
            sent += len(entries)
            state |= {"offset": offset, "newest": newest}
            # After every request, so that a kill repeats one of them at most; MLflow ignores what comes twice.
            self.state.update(offset=offset, inode=inode, repeated=state.get("repeated", 0))
        return sent

    def finish(self) -> None:
        """Send the report, the checkpoints that are kept, and how the run ended, if it has."""
        state = self.state.read()
        self._send_checkpoints()
        if (status := state.get("status", "RUNNING")) != "RUNNING":
            self._client.set_terminated(state["run_id"], status, end_time=state.get("ended"))
        self._send_report(state)
        self.state.update(complete=True)

    def _send_report(self, state: Mapping[str, Any]) -> None:
        report = self.folder / "report.json"
        if not report.exists():
            return
        try:
            note = run_note(state.get("tags", {}).get("command", ""), json.loads(report.read_text()))
        except (ValueError, LookupError, TypeError):
            raise TrackingError(
                f"{report}: is damaged, and not in MLflow; write it again with `dist-train eval {self.folder}`"
            ) from None
        self._client.log_artifact(state["run_id"], str(report))
        self._client.set_tag(state["run_id"], "mlflow.note.content", note)

    def _send_checkpoints(self) -> None:
        """Let MLflow have the checkpoints that are kept, each with the validation of its step, and no others."""
        state = self.state.read()
        models: dict[str, str] = state.get("models", {})
        kept = {path.name: path for path in sorted((self.folder / "checkpoints").glob("step-*"))}
        file = self.folder / "metrics.jsonl"
        validations = {
            entry["step"]: [(key, value, entry["t"], entry["step"]) for key, value in entry["metrics"].items()]
            for entry in (read_metrics(file) if file.exists() else [])
            if "val/mean_top1" in entry["metrics"]
        }
        for name in models.keys() - kept.keys():
            forget_checkpoint(self._client, models[name])
        sent = {}
        known = _Known(self._client, state)
        # Those that are there already as well: a checkpoint of a stop is validated by the start that resumes from it.
        for name, path in kept.items():
            step = int(name.rpartition("-")[2])
            # MLflow makes them points of the run as well, so they have the times that it knows.
            points = [known.as_logged(point) for point in validations.get(step, [])]
            sent[name] = log_checkpoint(self._client, state["run_id"], path.resolve(), step, points)
        self.state.update(models=sent)


def is_same_file(found: os.stat_result, state: Mapping[str, Any]) -> bool:
    """Whether metrics.jsonl is the file that a state tells of: one that has lost lines is not, though it may keep its inode."""
    return found.st_ino == state.get("inode") and found.st_size >= state.get("offset", 0)


class _Known:
    """The points that MLflow has of steps that may be told of twice: a run that was killed computes those after its checkpoint again.

    MLflow cannot delete the points of the first time, which are the same but for their time, and for what is of the machine.
    """

    def __init__(self, client: Any, state: Mapping[str, Any]) -> None:
        self._client, self._run_id, self._repeated = client, state["run_id"], state.get("repeated", 0)
        self._points: dict[str, dict[int, dict[str, int]]] = {}

    def lacks(self, point: Point) -> bool:
        """Whether MLflow does not have a point."""
        key, value, _, step = point
        known = self._times(key, step)
        return not known if key.startswith(OF_THE_MACHINE) else _text(value) not in known

    def as_logged(self, point: Point) -> Point:
        """A point with the time at which MLflow has it, where it does."""
        key, value, milliseconds, step = point
        return key, value, self._times(key, step).get(_text(value), milliseconds), step

    def _times(self, key: str, step: int) -> dict[str, int]:
        """Of the points of a metric at a step: when each value was logged."""
        if step > self._repeated:
            return {}
        if key not in self._points:  # asked for once: a long run has long histories
            found: dict[int, dict[str, int]] = {}
            for logged, value, milliseconds in logged_points(self._client, self._run_id, key):
                found.setdefault(logged, {})[_text(value)] = milliseconds
            self._points[key] = found
        return self._points[key].get(step, {})


def _text(value: float) -> str:
    """A value as it comes back from MLflow, whose databases have no infinity; as text, because NaN is no equal of its own."""
    most = sys.float_info.max
    return repr(min(max(float(value), -most), most))


def run_note(command: str, report: Mapping[str, Any]) -> str:
    """The note of a finished run in MLflow, as Markdown: its command and its table of exits."""
    rows = [
        [
            str(one["exit"]),
            millions(one["multiply_adds"]),
            f"{100 * one['top1']:.2f}",
            f"{100 * one['top5']:.2f}",
            f"{one['loss']:.4f}",
        ]
        for one in report["exits"]
    ]
    title = f"After {report['step']} steps, {report['images']} images, each once"
    table = Table(title, ["exit", "multiply-adds", "top-1 %", "top-5 %", "cross-entropy"], rows)
    return f"`{command}`\n\n{table.markdown()}\n"
