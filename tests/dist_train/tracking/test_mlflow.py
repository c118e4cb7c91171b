"""What MLflow shows of a run that was resumed, copied, moved or deleted there."""

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_train.config_file import dump_config, load_config, make_config
from dist_train.distributed.group import Ranks
from dist_train.errors import TrackingError
from dist_train.tracking.environment import describe_environment
from dist_train.tracking.mirror import SyncState, sync
from dist_train.tracking.mlflow import ui_command, watch_machine
from dist_train.tracking.tracker import Tracker
from tests.common import LIMIT, ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(name, **fields)` tracks a start of a run, as training does, and gives its folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")

    def start(name, tags=None, **optim):
        config = make_config({"name": name, "runs": str(tmp_path / "runs"), "data": {"shards": "x"}, "optim": optim})
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "config.yaml").write_text(dump_config(config))
        with (config.folder / "metrics.jsonl").open("a") as file:
            number = len((config.folder / "metrics.jsonl").read_text().splitlines())
            file.write(
                json.dumps({"t": 1000 + number, "step": number, "batch": number, "metrics": {"a": float(number)}})
                + "\n"
            )
        tracker = Tracker(config, tags or {"command": "x"})
        tracker.close("FINISHED")
        return config.folder

    return start


@pytest.fixture
def client(tmp_path, run):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{tmp_path}/store.db")


def run_id(folder):
    return json.loads((folder / "tracking.json").read_text())["run_id"]


def points(client, folder):
    return [point.value for point in client.get_metric_history(run_id(folder), "a")]


def test_settings_that_changed_on_resume_are_shown(run, client):
    folder = run("r", lr=0.1)
    assert client.get_run(run_id(folder)).data.params["optim.lr"] == "0.1"
    assert run("r", lr=0.05) == folder
    data = client.get_run(run_id(folder)).data
    assert (data.params["optim.lr"], data.tags["changed.optim.lr"]) == ("0.1", "0.05")
    assert [name for name in data.tags if name.startswith("changed.")] == ["changed.optim.lr"]


def test_a_copied_folder_has_a_run_of_its_own_and_a_moved_one_keeps_it(run, client, tmp_path):
    folder = run("r")
    before = run_id(folder)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    assert run("copy") == copy
    assert run_id(copy) != before
    assert (points(client, folder), points(client, copy)) == ([0.0], [0.0, 1.0])
    second = folder.with_name("second")
    shutil.copytree(folder, second)
    assert sync(second).run_id not in (before, run_id(copy))
    assert sync(second).lines == 0
    moved = folder.rename(folder.with_name("moved"))
    assert run("moved") == moved
    assert run_id(moved) == before
    assert points(client, moved) == [0.0, 1.0]


def test_a_run_that_was_deleted_in_mlflow_is_sent_anew(run, client):
    folder = run("r")
    deleted = run_id(folder)
    client.delete_run(deleted)
    result = sync(folder)
    assert result.run_id != deleted
    assert points(client, folder) == [0.0]


def test_a_deleted_experiment_is_named_with_what_restores_it(run, client):
    folder = run("r")
    experiment = client.get_experiment_by_name("dist_train").experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(
        TrackingError, match=rf"'dist_train' is deleted; restore it \(mlflow experiments restore -x {experiment}\)"
    ):
        sync(folder)


def test_the_variable_of_the_experiment_is_heard_and_the_configuration_wins(run, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    folder = run("r")
    assert client.get_run(run_id(folder)).info.experiment_id == client.get_experiment_by_name("mine").experiment_id


def test_the_command_that_shows_a_store_can_be_typed_and_has_no_password():
    for uri, ending in (
        ("sqlite:////a b/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"),
        ("/nfs/mlruns", "mlflow ui --backend-store-uri /nfs/mlruns"),
        ("postgresql://me:secret@db/x", "mlflow ui --backend-store-uri 'postgresql://***@db/x'"),
        ("https://me:secret@host/x", "open https://***@host/x"),
        ("https://me:se@cret@host/x@y", "open https://***@host/x@y"),
    ):
        assert ui_command(uri).endswith(ending)


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/v/bin/dist-train", "dist-train --name 'a b'"),
        ("/s/dist_train/__main__.py", "dist-train --name 'a b'"),
        ("my script.py", "'my script.py' --name 'a b'"),
        ("/s/other/__main__.py", "/s/other/__main__.py --name 'a b'"),
    ],
)
def test_the_command_of_a_run_is_the_one_that_was_typed(monkeypatch, program, command):
    monkeypatch.setattr(sys, "argv", [program, "--name", "a b"])
    assert describe_environment(Ranks(0, 1, 0, 1), ["here"]).tags["command"] == command


def test_columns_data_and_checkpoints_are_there_once_however_often_they_are_sent(run, client, tmp_path):
    tags = {"command": "dist-train train x.yaml", "user": "ada", "commit": "abc", "classes": "3"}
    tags |= {"train_images": "30", "val_images": "6", "train_data": "0123456789ab", "val_data": "ba9876543210"}
    folder = run("r", tags=tags)

    def checkpoint(step, *top1):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        metrics = {f"val/exit{m}/top1": value for m, value in enumerate(top1, start=1)}
        metrics |= {"val/mean_top1": sum(top1) / len(top1)}
        line = {"t": step, "step": step, "batch": step, "metrics": metrics}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    checkpoint(10, 0.5, 0.9)
    lines = (folder / "metrics.jsonl").read_text()
    checkpoint(20, 0.7, 0.6)
    validated = (folder / "metrics.jsonl").read_text()
    # A checkpoint of a stop is there before its validation, which the start that resumes from it makes.
    (folder / "metrics.jsonl").write_text(lines)
    sync(folder)
    (folder / "metrics.jsonl").write_text(validated)
    for _ in range(2):
        sync(folder)
    data = client.get_run(run_id(folder))
    assert {
        key: data.data.tags[f"mlflow.{key}"] for key in ("user", "source.name", "source.type", "source.git.commit")
    } == {
        "user": "ada",
        "source.name": "dist-train train x.yaml",
        "source.type": "LOCAL",
        "source.git.commit": "abc",
    }
    inputs = {one.tags[0].value: one.dataset for one in data.inputs.dataset_inputs}
    assert {use: (one.name, one.digest, json.loads(one.profile)) for use, one in inputs.items()} == {
        "training": ("x/train", "0123456789ab", {"num_rows": 30, "classes": 3}),
        "validation": ("x/val", "ba9876543210", {"num_rows": 6, "classes": 3}),
    }
    assert len(data.inputs.dataset_inputs) == 2

    def models(metric):
        order = [{"field_name": f"metrics.{metric}", "ascending": False}]
        found = client.search_logged_models([data.info.experiment_id], order_by=order)
        return [Path(one.tags["checkpoint"]) for one in found]

    first, second = (folder / "checkpoints" / f"step-{step:08d}" for step in (10, 20))
    assert models("val/exit1/top1") == [second, first]
    assert models("val/mean_top1") == [first, second]
    # One that the run keeps no longer is no model any more, also where the answer to its deletion was lost.
    shutil.rmtree(first)
    state = SyncState(folder)
    before = state.read()["models"]
    sync(folder)
    assert models("val/mean_top1") == [second]
    state.update(models=before)
    sync(folder)
    state.update(models={})
    sync(folder)
    assert models("val/mean_top1") == [second]


def test_the_machine_is_logged_while_a_run_is_tracked_and_goes_on_with_it(run, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    name = "system/cpu_utilization_percentage"
    folder = run("r")

    def steps():
        return [point.step for point in client.get_metric_history(run_id(folder), name)]

    for _ in range(2):
        before = steps()
        tracker = Tracker(load_config(folder / "config.yaml"), {"command": "x"})
        while len(steps()) < len(before) + 2:
            time.sleep(0.05)
        tracker.close("FINISHED")
        after = steps()
        assert after == sorted(set(after)), "a resume goes on behind the last point"
    assert client.get_run(run_id(folder)).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    assert watch_machine("sqlite:///nowhere", "none") is None


def test_the_end_of_a_run_is_sent_again_where_another_run_held_the_store(run, client, tmp_path, caplog):
    folder = run("r")
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    tracker = Tracker(load_config(folder / "config.yaml"), {"command": "x"})
    closing = threading.Thread(target=tracker.close, args=["FAILED"])
    closing.start()
    while "cannot be used" not in caplog.text:
        assert closing.is_alive()
        time.sleep(0.05)
    other.execute("ROLLBACK")
    closing.join()
    assert client.get_run(run_id(folder)).info.status == "FAILED"
    assert "database is locked" in caplog.text
    assert "does not have the whole run" not in caplog.text


def test_a_new_store_is_made_and_a_machine_watched_without_a_word(tmp_path):
    code = """
import sys
import threading
from dist_train.tracking.mlflow import connect, watch_machine
client, experiment = connect(sys.argv[1], "e")
watch_machine(sys.argv[1], client.create_run(experiment).info.run_id).finish()
"""
    words = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/new.db"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
