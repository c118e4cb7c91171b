"""MLflow's mirror of a run: a thread of rank 0 ships metrics.jsonl, so that no training step ever waits for a server."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.compare.tables import run_note
from dist_train.config import Config
from dist_train.config_file import flat_fields
from dist_train.metrics import parse_line

log = logging.getLogger("dist_train")

SHIP_SECONDS = 2.0
LINES_PER_REQUEST = 1000


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


class Tracker:
    """Mirrors one run folder into one MLflow run, the same one after a resume.

    ``tracking.json`` in the run folder holds the run's id and how far metrics.jsonl has been shipped.  MLflow keeps
    one point per (key, time, step, value), so shipping a line twice changes nothing.
    """

    def __init__(self, config: Config, tags: dict[str, str]) -> None:
        self.config = config
        self.folder = config.folder
        self.uri = tracking_uri(config)
        self.tags = tags
        self._state_file = self.folder / "tracking.json"
        self._client: Any = None
        self._warned = False
        self._stop = threading.Event()
        self._status = "RUNNING"
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if self.uri is not None:
            self._rewind()
            self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once there is one."""
        return self._state().get("run_id")

    def close(self, status: str, timeout: float = 30.0) -> None:
        """Ship what is left, set MLflow's status (FINISHED, FAILED, or RUNNING for a run that will go on), and leave."""
        if self.uri is None:
            return
        self._status = status
        self._stop.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(f"no answer in {timeout:.0f} s")

    def _work(self) -> None:
        while True:
            last = self._stop.wait(SHIP_SECONDS)
            try:
                if self._client is None:
                    self._open()
                self._ship()
                if last:
                    self._finish()
            except Exception as error:  # whatever MLflow raises: the mirror must never end the run
                self._client = None
                self._warn(str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
            if last:
                return

    def _open(self) -> None:
        # MLflow's own retries block for minutes; this thread tries again by itself.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        assert self.uri is not None
        with _first_use(self.uri):
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=self.uri)
            experiment = client.get_experiment_by_name(self.config.tracking.experiment)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(
                    self.config.tracking.experiment,
                    artifact_location=(self.config.runs.resolve() / "mlflow-artifacts").as_uri()
                    if self.uri.startswith("sqlite")
                    else None,
                    # Else MLflow's pages take it for one of language models, and show the runs as "evaluations".
                    tags={"mlflow.experimentKind": "custom_model_development"},
                )
            )
        state = self._state()
        if state.get("uri") == self.uri and "run_id" in state:
            client.update_run(state["run_id"], status="RUNNING")
        else:
            run = client.create_run(experiment_id, run_name=self.config.name, tags=self.tags)
            state = {"uri": self.uri, "run_id": run.info.run_id, "offset": 0}
            self._write(state)
            self._describe(client, state["run_id"])
        for key, value in self.tags.items():
            client.set_tag(state["run_id"], key, value)
        self._client = client

    def _describe(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Param

        fields = flat_fields(self.config)
        client.log_batch(run_id, params=[Param(key, value) for key, value in fields.items()])
        client.log_artifact(run_id, str(self.folder / "config.yaml"))

    def _ship(self) -> None:
        from mlflow.entities import Metric

        state = self._state()
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(state["offset"])
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        entries = [entry for line in data.decode().splitlines() if (entry := parse_line(line)) is not None]
        metrics = [Metric(k, v, e["t"], e["step"]) for e in entries for k, v in e["metrics"].items()]
        for start in range(0, len(metrics), LINES_PER_REQUEST):
            self._client.log_batch(state["run_id"], metrics=metrics[start : start + LINES_PER_REQUEST])
        if data:
            self._write({**state, "offset": state["offset"] + len(data)})

    def _rewind(self) -> None:
        # A resume cuts metrics.jsonl back to its checkpoint; what is left of it was shipped before.
        state = self._state()
        path = self.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if state.get("offset", 0) > size:
            self._write({**state, "offset": size})

    def _finish(self) -> None:
        run_id = self._state()["run_id"]
        report = self.folder / "report.json"
        if report.exists():
            self._client.log_artifact(run_id, str(report))
            note = run_note(self.tags.get("command", ""), json.loads(report.read_text()))
            self._client.set_tag(run_id, "mlflow.note.content", note)
        if self._status != "RUNNING":
            self._client.set_terminated(run_id, self._status)

    def _state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _write(self, state: dict[str, Any]) -> None:
        draft = self._state_file.with_suffix(".tmp")
        draft.write_text(json.dumps(state))
        os.replace(draft, self._state_file)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning(
                "MLflow at %s cannot be used (%s); metrics.jsonl has everything, and the run goes on", self.uri, reason
            )
        self._warned = True


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
