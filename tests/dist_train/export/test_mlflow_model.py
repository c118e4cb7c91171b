"""Exports as models of MLflow: loaded from their run, and served by MLflow's own server."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas
import pytest

from dist_train.distributed.launcher import free_port
from dist_train.errors import TrackingError
from dist_train.export.mlflow_model import log_model
from dist_train.export.runner import EarlyExit
from dist_train.tracking.mirror import SyncState
from dist_train.tracking.mlflow import connect
from tests.common import LIMIT


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory):
    """The folder of a model whose run is tracked, the store, and what the command said."""
    root = tmp_path_factory.mktemp("tracked")
    run, uri = root / "resnet", f"sqlite:///{root}/mlflow.db"
    shutil.copytree(runs["resnet"], run, symlinks=True)
    client, experiment = connect(uri, "export")
    run_id = client.create_run(experiment).info.run_id
    SyncState(run).update(uri=uri, run_id=run_id, folder=str(run.resolve()))
    words = ["-m", "dist_train", "export", run, "--thresholds", "0.5,0.4", "--mlflow"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in root.iterdir()} == {"resnet", "mlflow.db", "mlflow.lock", "mlflow-artifacts"}
    return run / "mlflow-model", uri, done.stdout


@pytest.fixture(scope="module")
def images(digits):
    """Ten files of digits, read."""
    from shards.index import Index

    index = Index.load(digits / "val")
    tar = (digits / "val" / index.shards[0].name).read_bytes()
    starts = index.offset[:10].tolist()
    return [tar[start : start + size] for start, size in zip(starts, index.size[:10].tolist())]


def expected_of(folder, images, tmp_path):
    network = EarlyExit(folder / "data/export")
    for number, data in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
    result = network.predict(np.stack([network.load(tmp_path / f"{number}.png") for number in range(len(images))]))
    return [network.policy["classes"][one] for one in result.classes], result.confidence, result.exits


def test_a_model_is_in_its_run_and_holds_no_pickle(model, images, tmp_path, monkeypatch):
    import mlflow

    folder, uri, said = model
    address = said.split("in MLflow  ")[1].strip()
    assert address.startswith("runs:/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # set_tracking_uri would set it for all tests that follow
    loaded = mlflow.pyfunc.load_model(address)
    found = loaded.predict(pandas.DataFrame({"image": images}))
    classes, confidence, exits = expected_of(folder, images, tmp_path)
    assert found["class"].tolist() == classes
    assert found["exit"].tolist() == exits.tolist()
    assert len(set(exits.tolist())) > 1
    np.testing.assert_allclose(found["confidence"], confidence, rtol=1e-6)
    assert [one.name for one in loaded.metadata.get_input_schema().inputs] == ["image"]
    assert len(loaded.predict(loaded.input_example)) == 1
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "code/mlflow_loader.py", "data/export/policy.json", "data/export/predict.py"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle"))]
    for name in files:
        assert str(folder.parent).encode() not in (folder / name).read_bytes()
    with pytest.raises(ValueError, match="image 2 of the request cannot be read"):
        loaded.predict(pandas.DataFrame({"image": [images[0], b"text"]}))


def test_every_registration_is_a_version_that_loads(model, images, runs, refused, tmp_path, monkeypatch):
    import mlflow

    folder, uri, _ = model
    for version in ("1", "2"):
        said = log_model(folder.parent, folder, "digit exits")
        assert said.splitlines()[1] == f"registered  models:/digit exits/{version}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.pyfunc.load_model("models:/digit exits/2")
    classes, _, exits = expected_of(folder, images, tmp_path)
    found = loaded.predict(pandas.DataFrame({"image": images}))
    assert (found["class"].tolist(), found["exit"].tolist()) == (classes, exits.tolist())
    with pytest.raises(TrackingError, match=r"MLflow at .*; not registered as a/b, the model is in "):
        log_model(folder.parent, folder, "a/b")
    with pytest.raises(TrackingError, match="not registered as digits, because the run is not tracked in MLflow"):
        log_model(runs["resnet"], folder, "digits")
    words = ("export", runs["resnet"], "--thresholds", "1,1", "--register", "digits")
    assert "--register is for a model of MLflow; give it with --mlflow" in refused(*words)


@pytest.mark.slow
def test_mlflow_serves_it(model, images, tmp_path):
    folder, port = model[0], free_port()
    words = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-m", folder, "-p", port]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": path}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            list(map(str, words)), cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        assert answers(f"http://127.0.0.1:{port}/ping", server), (tmp_path / "log").read_text()
        status, content = ask(port, images)
        assert status == 200
        classes, confidence, exits = expected_of(folder, images, tmp_path)
        found = content["predictions"]
        assert [(one["class"], one["exit"]) for one in found] == list(zip(classes, exits.tolist()))
        assert [one["confidence"] for one in found] == pytest.approx(confidence.tolist(), rel=1e-6)
        status, content = ask(port, [images[0], b"text"])
        assert status == 400
        assert "image 2 of the request cannot be read" in content["stack_trace"]
        assert ask(port, images[:1])[0] == 200
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url, server):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def ask(port, images):
    rows = [[base64.b64encode(data).decode()] for data in images]
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_folder_of_something_else_is_not_replaced(runs, refused, tmp_path):
    (tmp_path / "file").touch()
    words = ("export", runs["resnet"], "--thresholds", "1,1", "--mlflow", "--out", tmp_path)
    assert "exists and is no model of an export" in refused(*words)
    assert (tmp_path / "file").exists()
    # Nor one that holds a file of somebody beside such a model.
    policy = tmp_path / "data/export/policy.json"
    policy.parent.mkdir(parents=True)
    policy.write_text("{}")
    assert "file in it would be lost" in refused(*words)
    assert (tmp_path / "file").exists()
