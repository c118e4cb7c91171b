"""A real MLflow server that hangs and dies in the middle of a run: no step waits, and nothing is missing after `sync`."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dist_train.config_file import dump_config, make_config
from dist_train.dist import free_port
from dist_train.errors import TrackingError
from dist_train.metrics import read_metrics
from dist_train.tracking import PARENT, State, create_parent, sync

ROOT = Path(__file__).parents[2]


class Server:
    """`mlflow server` on loopback over one SQLite file; may be started again after it was killed."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        words = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
            "--default-artifact-root", f"{self.folder}/artifacts", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            words, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while True:
            assert self.process.poll() is None
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)

    def signal(self, number):
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.signal(signal.SIGKILL)


def wait(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_server_that_hangs_and_dies_in_a_run_has_everything_once_after_sync(server, digits, tmp_path, command):
    from mlflow.tracking import MlflowClient

    fields = {
        "name": "tracked",
        "runs": str(tmp_path),
        "data": {"shards": str(digits), "flip": False},
        "model": {"exits": 2, "base": 1, "scales": 2, "growth": 2, "initial_channels": 4, "head_width": 8,
                  "growth_factors": [1, 2], "bottleneck_factors": [1, 2]},
        "train": {"global_batch": 16, "micro_batch": 16, "epochs": 6, "precision": "fp32", "eval_every": 6},
        "tracking": {"uri": server.uri, "log_every": 1},
    }  # fmt: skip
    config = make_config(fields)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    parent = create_parent(config, "sweep", {"kind": "sweep"})
    state, metrics = State(config.folder), config.folder / "metrics.jsonl"

    # A request may take ten minutes here: a step that waited for one would hold the run up for as long.
    environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600", PARENT: parent}
    words = [sys.executable, "-m", "dist_train", "train", str(path)]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    wait(lambda: state.read().get("offset", 0) > 0, process)
    server.signal(signal.SIGSTOP)
    before = len(read_metrics(metrics))
    wait(lambda: len(read_metrics(metrics)) > before + 30, process)
    server.signal(signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert f"dist-train sync {config.folder}" in output
    assert output.count(f"MLflow at {server.uri} cannot be used") == 1
    with pytest.raises(TrackingError, match="cannot be used"):
        sync(config.folder)

    server.start()
    client = MlflowClient(server.uri)
    run_id = state.read()["run_id"]
    assert client.get_run(run_id).info.status == "RUNNING"
    first, second = command("dist_train", "sync", config.folder), command("dist_train", "sync", config.folder)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "FINISHED" in first.stdout
    assert ": 0 lines sent" in second.stdout
    assert ": 0 lines sent" not in first.stdout

    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", state.read()["ended"])
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["nodes"] == "1"
    assert run.data.params["train.epochs"] == "6"
    children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert [child.info.run_id for child in children] == [run_id]
    expected = {}
    for entry in read_metrics(metrics):
        for key, value in entry["metrics"].items():
            expected.setdefault(key, []).append((entry["t"], entry["step"], value))
    assert len(expected) > 10
    for key in ("train/loss", "val/exit2/top1", "train/gradient_norm"):
        history = [(point.timestamp, point.step, point.value) for point in client.get_metric_history(run_id, key)]
        assert sorted(history) == sorted(expected[key]), key


def test_what_cannot_be_synced_is_refused(tmp_path):
    with pytest.raises(TrackingError, match="is not a run folder"):
        sync(tmp_path)
    fields = {"data": {"shards": "nowhere"}, "tracking": {"uri": "off"}}
    (tmp_path / "config.yaml").write_text(dump_config(make_config(fields)))
    with pytest.raises(TrackingError, match=r"tracking\.uri off"):
        sync(tmp_path)
