"""MLflow: its stores, its runs, and what is logged to them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.config import Config
from dist_train.errors import DataError, TrackingError

PARENT = "DIST_TRAIN_MLFLOW_PARENT"
"""Variable with the id of an MLflow run; a run that is started with it becomes that run's child (the members of a sweep)."""

# MLflow refuses more in one request.
METRICS_PER_REQUEST = 1000


def tracking_uri(config: Config) -> str | None:
    """Where MLflow's data goes: the configuration, else MLFLOW_TRACKING_URI, else SQLite beside the runs; None if off."""
    if config.tracking.uri == "off":
        return None
    default = f"sqlite:///{config.runs.resolve() / 'mlflow.db'}"
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def experiment_name(config: Config) -> str:
    """MLflow's experiment of a run: the configuration, else MLFLOW_EXPERIMENT_NAME, else dist_train."""
    return config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dist_train"


def without_password(text: str) -> str:
    """A text in which every address hides the user and password that it may hold: logs and MLflow are read by others."""
    return re.sub(r"://[^/\s]+@", "://***@", text)


def ui_command(uri: str) -> str:
    """What to type to see the runs in a browser, with the password put back where the address has one."""
    if uri.startswith(("http", "databricks")):
        return f"open {without_password(uri)}"
    program = Path(sys.executable).with_name("mlflow")
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), "ui", "--backend-store-uri", without_password(uri)])


def load() -> None:
    """Import MLflow, which takes seconds; raises what the import raises."""
    import mlflow.tracking  # noqa: F401


def connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client of a server or store, and the id of an experiment there, which is created if it is missing.

    Raises whatever MLflow raises.
    """
    with _first_use(uri):
        client = _client(uri)
        found = client.get_experiment_by_name(experiment)
        # It keeps its name: MLflow would neither take a run for it, nor create another experiment of this name.
        if found and found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the experiment '{experiment}' is deleted; restore it (mlflow experiments restore -x {found.experiment_id}), or "
                "set another tracking.experiment"
            )
        if found:
            return client, str(found.experiment_id)
        store = Path(uri.removeprefix("sqlite:///")).resolve()
        # Beside the store, because MLflow's default is mlruns in whatever folder the command runs in.
        artifacts = (store.parent / "mlflow-artifacts").as_uri() if uri.startswith("sqlite") else None
        # Without the tag MLflow's pages take it for one of language models, and show the runs as "evaluations".
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return client, str(client.create_experiment(experiment, artifact_location=artifacts, tags=kind))


def open_store(uri: str) -> Any:
    """An MLflow client of a tracking store; raises DataError, one line, for one that is not there or of an older schema."""
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).exists():
        raise DataError(f"{uri}: there is no such file; give --uri, for instance sqlite:///runs/mlflow.db")
    try:
        client = _client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow raises its own, SQLAlchemy's, alembic's and urllib3's
        shown, text = without_password(uri), without_password(" ".join(str(error).split()))
        remedy = "copy the file, then run: mlflow db upgrade " + shown if "schema" in text else "is it running?"
        raise DataError(f"{shown}: MLflow's store cannot be opened ({text[:160]}); {remedy}") from None
    return client


def create_parent(config: Config, name: str, tags: dict[str, str]) -> str:
    """Create the MLflow run under which a sweep's runs are filed (see ``PARENT``) and return its id.

    It stands for the submission, which is done, so it is ended at once: no process of its own would end it later.

    Raises:
        TrackingError: tracking is off, or the server cannot be used.
    """
    uri = tracking_uri(config)
    if uri is None:
        raise TrackingError("tracking.uri is off, so that a sweep has no MLflow run of its own")
    try:
        client, experiment = connect(uri, experiment_name(config))
        run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        client.set_terminated(run_id)
    except Exception as error:  # whatever MLflow raises
        raise TrackingError(unusable(uri, error)) from None
    return run_id


def reopened(client: Any, run_id: str) -> bool:
    """Set a run of MLflow to RUNNING; false where it was deleted, or the server, perhaps a new one, does not know it."""
    try:
        if client.get_run(run_id).info.lifecycle_stage == "deleted":
            return False
        client.update_run(run_id, status="RUNNING")
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


class Data(NamedTuple):
    """A split that a run reads, for MLflow's column Dataset: ``use`` is training or validation."""

    name: str
    fingerprint: str
    images: int
    classes: int
    use: str


def columns(tags: Mapping[str, str]) -> dict[str, str]:
    """MLflow's own tags, which its pages show as the columns User, Source and Version, from those of the environment."""
    given = {
        "mlflow.user": tags.get("user"),
        "mlflow.source.name": tags.get("command"),
        "mlflow.source.type": "JOB" if "slurm_job" in tags else "LOCAL",
        "mlflow.source.git.commit": tags.get("commit"),
    }
    return {name: value for name, value in given.items() if value}


def log_data(client: Any, run_id: str, splits: Iterable[Data]) -> None:
    """Log what a run reads as its dataset inputs; logged twice it is there once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=split.name,
                digest=split.fingerprint,
                source_type="local",
                source=json.dumps({"uri": split.name}),
                profile=json.dumps({"num_rows": split.images, "classes": split.classes}),
            ),
            [InputTag("mlflow.data.context", split.use)],
        )
        for split in splits
    ]
    client.log_inputs(run_id, datasets=inputs)


def log_checkpoint(
    client: Any, run_id: str, path: Path, step: int, points: Iterable[tuple[str, float, int, int]]
) -> str:
    """Log a checkpoint as a LoggedModel of its run, with the metrics of its step; returns its id.

    The weights stay where they are, and the model has their path as a tag.  Logged twice it is there once.
    """
    from mlflow.entities import Metric

    experiment = client.get_run(run_id).info.experiment_id
    # Its creation may have been answered to a process that was killed.
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{path.name}'")
    if found:
        model = found[0]
    else:
        tags = {"checkpoint": str(path), "step": str(step)}
        model = client.create_logged_model(experiment, path.name, run_id, tags, model_type="multi-exit")
    client.log_batch(run_id, metrics=[Metric(*point, model_id=model.model_id) for point in points])
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def forget_checkpoint(client: Any, model_id: str) -> None:
    """Delete the LoggedModel of a checkpoint that is not kept any more; nothing where it is deleted already."""
    try:
        client.delete_logged_model(model_id)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
            raise


def watch_machine(uri: str, run_id: str) -> Any:
    """Let a thread of MLflow log this machine's processor, memory, disk, network and GPUs to a run; its ``finish`` ends that.

    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL are the seconds between two points (10).  None where
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false.
    """
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in ("false", "0"):
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # resume_logging: steps go on from those of an earlier start, and do not begin at 0 again.
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def is_watching(monitor: Any) -> bool:
    """Whether the thread of :func:`watch_machine` still runs."""
    # MLflow's own; under another name in another version it counts as alive, not as dead at every look.
    thread = getattr(monitor, "_process", None)
    return thread is None or bool(thread.is_alive())


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Log a run's settings, which MLflow lets nobody change later."""
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])


def log_points(client: Any, run_id: str, points: Iterable[tuple[str, float, int, int]]) -> None:
    """Log (metric, value, milliseconds, step), in requests of a size that every server takes; a point sent twice is one."""
    from mlflow.entities import Metric

    metrics = [Metric(*point) for point in points]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])


def logged_points(client: Any, run_id: str, key: str) -> list[tuple[int, float, int]]:
    """(step, value, milliseconds) of all points of a metric that a run has."""
    return [(point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, key)]


def log_report(
    uri: str,
    run_id: str,
    values: Mapping[str, float],
    step: int,
    tags: Mapping[str, str],
    files: Sequence[tuple[Path, str | None]],
) -> None:
    """Log an evaluation: numbers at a step, tags, and files, each with the artifact folder it goes to."""
    client, now = _client(uri), int(time.time() * 1000)
    log_points(client, run_id, [(key, value, now, step) for key, value in values.items()])
    for name, value in tags.items():
        client.set_tag(run_id, name, value)
    for file, folder in files:
        client.log_artifact(run_id, str(file), folder)


def register_model(uri: str, run_id: str, folder: str, name: str) -> str:
    """Make the model in an artifact folder of a run the newest version of a registered model, which is made if missing; the version."""
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
    return str(client.create_model_version(name, source, run_id).version)


def save_model(folder: Path, loader: Path, data: Path, image: bytes, requirements: Sequence[str]) -> None:
    """Write a pyfunc model of MLflow into an empty folder; nothing in it is a pickle.

    Args:
        folder: to write into.
        loader: a Python file with ``_load_pyfunc(folder)``; its copy in the model is what MLflow imports.
        data: folder that is copied into the model, for the loader.
        image: an image file, the example of a request.
        requirements: what pip has to install for it.
    """
    import mlflow.pyfunc
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    _quieten()  # only now: the import sets a level of its own
    outputs = [("class", DataType.string), ("confidence", DataType.double), ("exit", DataType.long)]
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module=loader.stem,
        code_paths=[str(loader)],
        data_path=str(data),
        signature=ModelSignature(
            Schema([ColSpec(DataType.binary, "image")]), Schema([ColSpec(kind, name) for name, kind in outputs])
        ),
        input_example=pandas.DataFrame({"image": [image]}),
        pip_requirements=list(requirements),
    )


def reason(error: Exception) -> str:
    """What MLflow raised, as one line; a long one keeps its end, where MLflow puts the remedy."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}"


def unusable(uri: str, error: Exception) -> str:
    """One line that says which store cannot be used, and why."""
    return f"MLflow at {without_password(uri)} cannot be used ({reason(error)})"


def _client(uri: str) -> Any:
    # MLflow's own retries block for minutes; the callers retry, or report the failure.
    bounds = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    quiet = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    for name, value in (bounds | quiet).items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    _quieten()  # only now: the import sets a level of its own
    return MlflowClient(tracking_uri=uri)


def _quieten() -> None:
    """Both log an error and raise it as well; the caller that catches it reports it once."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Let only one process at a time create a SQLite store: MLflow's migrations fail when two of them run together."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Closing the file lets go of the lock, as does the end of the process, however it ends.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
