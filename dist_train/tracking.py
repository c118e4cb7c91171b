"""MLflow's mirror of a run: a thread of rank 0 sends metrics.jsonl, so that no training step ever waits for a server."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.compare.tables import run_note
from dist_train.config import Config
from dist_train.config_file import flat_fields, load_config
from dist_train.errors import TrackingError
from dist_train.metrics import parse_line

log = logging.getLogger("dist_train")

PARENT = "DIST_TRAIN_MLFLOW_PARENT"
"""Variable with the id of an MLflow run; a run that is started with it becomes that run's child (the members of a sweep)."""

KEY = "dist_train.key"
"""Tag with a run folder's own key, by which its MLflow run is found again if the answer to its creation was lost."""

SEND_SECONDS = 2.0
METRICS_PER_REQUEST = 1000
BYTES_PER_READ = 1 << 20


def tracking_uri(config: Config) -> str | None:
    """Where MLflow's data goes: the configuration, else MLFLOW_TRACKING_URI, else SQLite beside the runs; None when off."""
    if config.tracking.uri == "off":
        return None
    default = f"sqlite:///{config.runs.resolve() / 'mlflow.db'}"
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def ui_command(uri: str) -> str:
    """What to type to see the runs in a browser."""
    if not uri.startswith("sqlite"):
        return f"open {uri}"
    program = Path(sys.executable).with_name("mlflow")
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    return f"{program} ui --backend-store-uri {uri}"


def create_parent(config: Config, name: str, tags: dict[str, str]) -> str:
    """Create the MLflow run under which a sweep's runs are filed (see ``PARENT``) and return its id.

    Raises:
        TrackingError: tracking is off, or the server cannot be used.
    """
    uri = tracking_uri(config)
    if uri is None:
        raise TrackingError("tracking.uri is off, so that a sweep has no MLflow run of its own")
    try:
        client, experiment = _connect(uri, config.tracking.experiment, config.runs)
        return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
    except Exception as error:  # whatever MLflow raises
        raise TrackingError(_unusable(uri, error)) from None


@dataclass(frozen=True)
class Synced:
    """What :func:`sync` left: the MLflow run, its status there, and how many lines of metrics.jsonl were new to it."""

    uri: str
    run_id: str
    status: str
    lines: int


def sync(folder: Path) -> Synced:
    """Send what MLflow does not have yet of a run: tags, settings, metrics, report, status; again changes nothing.

    Raises:
        TrackingError: not a run folder, a run with tracking off, or a server that cannot be used.
    """
    if not (folder / "config.yaml").exists():
        raise TrackingError(f"{folder}: is not a run folder (no config.yaml); give one, such as runs/NAME")
    config = load_config(folder / "config.yaml")
    uri = State(folder).read().get("uri") or tracking_uri(config)
    if uri is None:
        raise TrackingError(f"{folder}: was trained with tracking.uri off, so that MLflow has no run of it")
    mirror = Mirror(config, folder, uri)
    try:
        mirror.open()
        lines = mirror.send()
        mirror.finish()
    except Exception as error:  # whatever MLflow raises
        raise TrackingError(_unusable(uri, error) + "; the same command again sends the rest") from None
    state = mirror.state.read()
    return Synced(uri, state["run_id"], state.get("status", "RUNNING"), lines)


class State:
    """``tracking.json`` in the run folder: where the run is in MLflow, how far it was sent, how it ended.

    ``uri``; ``key``, the folder's own; ``run_id``; ``described``, whether MLflow has the settings; ``offset``, the
    bytes of metrics.jsonl that it has; ``tags``; ``started`` and ``ended``, ms; ``status``; ``complete``.
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
        with self._lock:
            draft = self._path.with_suffix(".tmp")
            draft.write_text(json.dumps(self.read() | fields))
            os.replace(draft, self._path)

    def clear(self) -> None:
        """Forget everything."""
        self._path.unlink(missing_ok=True)


class Mirror:
    """Sends one run folder to one MLflow run, the same one after a resume; its methods raise whatever MLflow raises.

    MLflow keeps one point per (key, time, step, value), so sending a line twice changes nothing.
    """

    def __init__(self, config: Config, folder: Path, uri: str) -> None:
        self.config = config
        self.folder = folder
        self.uri = uri
        self.state = State(folder)
        self._client: Any = None

    def open(self) -> None:
        """Find or create the MLflow run, and give it its tags and, once, its settings."""
        client, experiment = _connect(self.uri, self.config.tracking.experiment, self.folder.parent)
        state = self.state.read()
        run_id = state.get("run_id")
        if run_id is None or not _reopened(client, run_id):
            key = state.get("key") or uuid.uuid4().hex
            self.state.update(uri=self.uri, key=key, offset=0, described=False)
            found = client.search_runs([experiment], filter_string=f"tags.`{KEY}` = '{key}'", max_results=1)
            run_id = found[0].info.run_id if found else self._create(client, experiment, key, state.get("started"))
            self.state.update(run_id=run_id)
        for name, value in state.get("tags", {}).items():
            client.set_tag(run_id, name, value)
        if not self.state.read().get("described"):
            self._describe(client, run_id)
        self._client = client

    def _create(self, client: Any, experiment: str, key: str, started: int | None) -> str:
        tags = {KEY: key}
        if parent := self.state.read().get("parent"):
            tags["mlflow.parentRunId"] = parent
        run = client.create_run(experiment, start_time=started, run_name=self.config.name, tags=tags)
        return str(run.info.run_id)

    def _describe(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Param

        fields = flat_fields(self.config)
        client.log_batch(run_id, params=[Param(key, value) for key, value in fields.items()])
        client.log_artifact(run_id, str(self.folder / "config.yaml"))
        self.state.update(described=True)

    def send(self) -> int:
        """Send the whole lines of metrics.jsonl that MLflow does not have yet; returns how many."""
        from mlflow.entities import Metric

        sent = 0
        state = self.state.read()
        path = self.folder / "metrics.jsonl"
        while path.exists():
            with path.open("rb") as file:
                file.seek(state["offset"])
                data = file.read(BYTES_PER_READ)
            data = data[: data.rfind(b"\n") + 1]
            if not data:
                break
            entries = [entry for line in data.decode().splitlines() if (entry := parse_line(line)) is not None]
            metrics = [Metric(k, v, e["t"], e["step"]) for e in entries for k, v in e["metrics"].items()]
            for start in range(0, len(metrics), METRICS_PER_REQUEST):
                self._client.log_batch(state["run_id"], metrics=metrics[start : start + METRICS_PER_REQUEST])
            sent += len(entries)
            state["offset"] += len(data)
            self.state.update(offset=state["offset"])
        return sent

    def finish(self) -> None:
        """Send the report and how the run ended, if it has."""
        state = self.state.read()
        report = self.folder / "report.json"
        if report.exists():
            self._client.log_artifact(state["run_id"], str(report))
            note = run_note(state.get("tags", {}).get("command", ""), json.loads(report.read_text()))
            self._client.set_tag(state["run_id"], "mlflow.note.content", note)
        if (status := state.get("status", "RUNNING")) != "RUNNING":
            self._client.set_terminated(state["run_id"], status, end_time=state.get("ended"))
        self.state.update(complete=True)


class Tracker:
    """The thread that keeps the mirror of a running run; a server that does not answer is said once and tried again."""

    def __init__(self, config: Config, tags: dict[str, str]) -> None:
        self.folder = config.folder
        self.uri = tracking_uri(config)
        self._state = State(config.folder)
        self._open = False
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if self.uri is None:
            return
        self._mirror = Mirror(config, config.folder, self.uri)
        try:
            self._begin(tags)
        except OSError as error:
            self._warn(f"tracking.json cannot be written: {error.strerror}")
            return
        self._thread.start()

    def _begin(self, tags: dict[str, str]) -> None:
        before = self._state.read()
        if before.get("uri") not in (None, self.uri):
            self._state.clear()
            before = {}
        # A resume cuts metrics.jsonl back to its checkpoint; what is left of it was sent before.
        path = self.folder / "metrics.jsonl"
        offset = min(before.get("offset", 0), path.stat().st_size if path.exists() else 0)
        self._state.update(
            uri=self.uri, offset=offset, tags=tags, status="RUNNING", complete=False,
            started=before.get("started") or int(time.time() * 1000), parent=os.environ.get(PARENT),
        )  # fmt: skip

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once there is one."""
        return self._state.read().get("run_id")

    def close(self, status: str, timeout: float = 30.0) -> None:
        """Send what is left, set MLflow's status (FINISHED, FAILED, or RUNNING for a run that will go on), and leave."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(OSError):
            self._state.update(status=status, ended=int(time.time() * 1000))
        self._stop.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(f"no answer in {timeout:.0f} s")
        if not self._state.read().get("complete"):
            log.warning("MLflow does not have the whole run; when it can be reached: dist-train sync %s", self.folder)

    def _work(self) -> None:
        while True:
            last = self._stop.wait(SEND_SECONDS)
            try:
                if not self._open:
                    self._mirror.open()
                    self._open = True
                self._mirror.send()
                if last:
                    self._mirror.finish()
            except Exception as error:  # whatever MLflow raises: the mirror must never end the run
                self._open = False
                self._warn(_reason(error))
            if last:
                return

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning(
                "MLflow at %s cannot be used (%s); metrics.jsonl has everything, and the run goes on", self.uri, reason
            )
        self._warned = True


def _connect(uri: str, experiment: str, runs: Path) -> tuple[Any, str]:
    """A client of a server or store, and the id of an experiment there, which is made where there is none."""
    # MLflow's own retries block for minutes; who calls this tries again by itself.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with _first_use(uri):
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found:
            return client, str(found.experiment_id)
        artifacts = (runs.resolve() / "mlflow-artifacts").as_uri() if uri.startswith("sqlite") else None
        # Without the tag MLflow's pages take it for one of language models, and show the runs as "evaluations".
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return client, str(client.create_experiment(experiment, artifact_location=artifacts, tags=kind))


@contextlib.contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Let one process at a time make a new SQLite store: MLflow's migrations fail when two of them run together."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _reopened(client: Any, run_id: str) -> bool:
    """Set a run of MLflow to RUNNING; false where the server, perhaps a new one at an old address, does not know it."""
    try:
        client.update_run(run_id, status="RUNNING")
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _unusable(uri: str, error: Exception) -> str:
    return f"MLflow at {uri} cannot be used ({_reason(error)})"
