"""A real MLflow server that hangs and dies in the middle of a run: no step waits, and nothing is missing after `sync`."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from dist_train.config_file import dump_config, make_config
from dist_train.errors import TrackingError
from dist_train.tracking import mirror as mirror_module
from dist_train.tracking.metrics import MetricsFile, read_metrics
from dist_train.tracking.mirror import Mirror, SyncState, sync
from dist_train.tracking.mlflow import PARENT, connect, create_parent, experiment_name, log_points
from dist_train.tracking.tracker import Tracker
from tests.common import LIMIT, ROOT, SMALL_MODEL, MLflowServer


@pytest.fixture
def server(tmp_path):
    server = MLflowServer(tmp_path)
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

    # The server asks for none; what matters is who can read it.
    address = server.uri.replace("//", "//ada:secret@")
    fields = {
        "name": "tracked",
        "runs": str(tmp_path),
        "data": {"shards": str(digits), "flip": False},
        "model": SMALL_MODEL | {"step": 2},
        "train": {"global_batch": 16, "micro_batch": 16, "epochs": 6, "precision": "fp32", "eval_every": 6},
        "tracking": {"uri": address, "log_every": 1},
    }
    config = make_config(fields)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    parent = create_parent(config, "sweep", {"kind": "sweep"})
    state, metrics = SyncState(config.folder), config.folder / "metrics.jsonl"

    # A request may take ten minutes here: a step that waited for one would hold the run up for as long.
    environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600", PARENT: parent}
    words = [sys.executable, "-m", "dist_train", "train", str(path)]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    wait(lambda: state.read().get("offset", 0) > 0, process)
    server.signal(signal.SIGSTOP)
    before = len(read_metrics(metrics))
    wait(lambda: len(read_metrics(metrics)) > before + 30, process)
    server.signal(signal.SIGKILL)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 0, output
    assert f"dist-train sync {config.folder}" in output
    shown = server.uri.replace("//", "//***@")
    assert output.count(f"MLflow at {shown} cannot be used") == 1
    with pytest.raises(TrackingError, match="cannot be used") as said:
        sync(config.folder)
    assert "secret" not in output + str(said.value)

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
    assert run.data.params["tracking.uri"] == shown
    assert shown in Path(client.download_artifacts(run_id, "config.yaml", tmp_path)).read_text()
    assert "secret" not in "".join([*run.data.params.values(), *run.data.tags.values(), first.stdout])
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


@pytest.fixture
def tracked(tmp_path):
    """`tracked(lr)` starts a run in one folder, as the trainer does; a mirror in SQLite that is open."""
    folder = tmp_path / "run"
    folder.mkdir()

    def start(lr):
        fields = {"name": "run", "runs": str(tmp_path), "data": {"shards": "d"}, "optim": {"lr": lr}}
        config = make_config(fields | {"tracking": {"uri": f"sqlite:///{tmp_path}/store.db"}})
        (folder / "config.yaml").write_text(dump_config(config))
        state = SyncState(folder)
        tags = {"command": "dist-train train"}
        state.update(uri=config.tracking.uri, folder=str(folder), status="RUNNING", tags=tags, started=1000)
        mirror = Mirror(config, folder, config.tracking.uri, state)
        mirror.open()
        return mirror

    return start


def run_of(mirror):
    return mirror._client.get_run(mirror.state.read()["run_id"])


def test_a_field_with_its_first_value_again_is_not_marked_as_changed(tracked):
    tracked(0.1)
    assert run_of(tracked(0.2)).data.tags["changed.optim.lr"] == "0.2"
    tags = run_of(tracked(0.1)).data.tags
    assert not [tag for tag in tags if tag.startswith("changed.")]


def test_a_copy_of_a_finished_run_is_another_finished_run(tracked, tmp_path):
    mirror = tracked(0.1)
    mirror.state.update(status="FINISHED", ended=2000)
    mirror.finish()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    result = sync(tmp_path / "copy")
    copy = mirror._client.get_run(result.run_id)
    assert result.run_id != mirror.state.read()["run_id"]
    assert (result.status, copy.info.status, copy.info.end_time) == ("FINISHED", "FINISHED", 2000)
    assert copy.data.tags["command"] == "dist-train train"


def test_a_folder_under_another_name_is_no_copy(tracked, tmp_path):
    mirror = tracked(0.1)
    mirror.finish()
    inside = tmp_path / "inside"
    inside.mkdir()
    # A link that resolve() does not see is a mount; the stored name of one is here that of a link.
    mirror.state.update(folder=str(inside / "run"))
    (inside / "run").symlink_to(tmp_path / "run")
    assert sync(tmp_path / "run").run_id == mirror.state.read()["run_id"]


def test_metrics_that_were_rewound_after_the_mirror_began_are_sent(tracked, tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")

    def log(batches):
        for batch in batches:
            file.add(batch, batch, {"loss": float(batch)})
        file.flush()

    log(range(10))
    mirror = tracked(0.1)
    assert mirror.send() == 10
    file.rewind(4, evaluates=False)
    log(range(5, 40))
    mirror.send()
    run = run_of(mirror).info.run_id
    steps = {point.step for point in mirror._client.get_metric_history(run, "loss")}
    assert steps == set(range(40))
    assert mirror.send() == 0


@pytest.mark.parametrize("kind", ["late", "starts again", "killed while sending"])
def test_a_step_that_is_computed_twice_is_in_mlflow_once(tracked, tmp_path, monkeypatch, kind):
    """After a kill; but where its numbers are others, because a setting was changed, MLflow has both."""
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run" / "checkpoints" / "step-00000008").mkdir(parents=True)

    def log(batches, speed, changed=()):
        for batch in batches:
            loss = 0.1 if batch in changed else 1 / (batch + 1)
            more = {"norm": float("nan"), "largest": float("inf"), "speed/images_per_second": speed + batch}
            file.add(batch, batch, {"loss": loss} | more)
            if batch == 8:
                file.add(batch, batch, {"val/mean_top1": 0.5})
        file.flush()

    def killed(*arguments):
        log_points(*arguments)
        raise KeyboardInterrupt  # MLflow has the points, and the state does not say so

    mirror = tracked(0.1)
    if kind == "killed while sending":
        log(range(1, 4), speed=100)
        assert mirror.send() == 3
        log(range(4, 10), speed=100)
        with monkeypatch.context() as patch:
            patch.setattr(mirror_module, "log_points", killed)
            with pytest.raises(KeyboardInterrupt):
                mirror.send()
    else:
        log(range(1, 10), speed=100)
        assert mirror.send() == 10  # lines
    time.sleep(0.01)  # so that the same step has another time
    file.rewind(4, evaluates=False)
    tracker = Tracker(mirror.config, {"command": "dist-train train"}) if kind != "late" else None
    log(range(5, 13), speed=200, changed=[7])
    if tracker:
        tracker.close("FINISHED")
        assert mirror.state.read()["complete"]
    else:
        mirror.send()
        mirror.finish()
    run = run_of(mirror).info.run_id

    def found(key):
        return sorted((point.step, point.value) for point in mirror._client.get_metric_history(run, key))

    assert found("loss") == sorted([(7, 0.1), *((step, 1 / (step + 1)) for step in range(1, 13))])
    assert found("speed/images_per_second") == [(step, (100 if step < 10 else 200) + step) for step in range(1, 13)]
    assert [step for step, _ in found("norm")] == [step for step, _ in found("largest")] == list(range(1, 13))
    # The checkpoint of step 8 has it as well, which makes it no second point of the run.
    assert found("val/mean_top1") == [(8, 0.5)]


def test_a_state_that_cannot_be_written_at_the_start_is_written_later(tmp_path):
    """A file system that is away for a moment costs no run its mirror."""
    fields = {"name": "run", "runs": str(tmp_path), "data": {"shards": "d"}}
    config = make_config(fields | {"tracking": {"uri": f"sqlite:///{tmp_path}/store.db"}})
    (config.folder / "tracking.json").mkdir(parents=True)
    (config.folder / "config.yaml").write_text(dump_config(config))
    file = MetricsFile(config.folder / "metrics.jsonl")
    tracker = Tracker(config, {"command": "dist-train train"})
    for step in range(1, 4):
        file.add(step, step, {"loss": 1 / step})
    file.flush()
    assert tracker.run_id is None
    (config.folder / "tracking.json").rmdir()
    tracker.close("FINISHED")
    sent = sync(config.folder)
    assert (sent.status, sent.lines, sent.run_id) == ("FINISHED", 0, tracker.run_id)
    points = connect(sent.uri, experiment_name(config))[0].get_metric_history(sent.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, 1 / step) for step in range(1, 4)]


def test_what_two_threads_write_down_of_a_run_is_both_kept(tmp_path):
    fields = {"name": "run", "runs": str(tmp_path), "data": {"shards": "d"}, "tracking": {"uri": "http://127.0.0.1:9"}}
    config = make_config(fields)
    config.folder.mkdir()
    tracker = Tracker(config, {})
    barrier = threading.Barrier(2)
    lost = []

    def write(state, key):
        for number in range(100):
            barrier.wait()
            state.update(**{key: number})
            barrier.wait()
            if state.read()[key] != number:
                lost.append((key, number))

    threads = [
        threading.Thread(target=write, args=(tracker._state, "one")),
        threading.Thread(target=write, args=(tracker._mirror.state, "other")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost
    tracker.close("FINISHED")
    state = SyncState(config.folder).read()
    assert (state["one"], state["other"], state["status"]) == (99, 99, "FINISHED")


def test_what_cannot_be_synced_is_refused(tmp_path):
    with pytest.raises(TrackingError, match="is not a run folder"):
        sync(tmp_path)
    fields = {"data": {"shards": "nowhere"}, "tracking": {"uri": "off"}}
    (tmp_path / "config.yaml").write_text(dump_config(make_config(fields)))
    with pytest.raises(TrackingError, match=r"tracking\.uri off"):
        sync(tmp_path)


def test_a_damaged_report_is_said_to_be_the_fault_and_the_rest_is_sent(tracked, tmp_path):
    mirror, report = tracked(0.1), tmp_path / "run" / "report.json"
    mirror.state.update(status="FINISHED", ended=1)
    for content in ("{", '{"exits": [5]}', "[]"):
        report.write_text(content)
        with pytest.raises(
            TrackingError, match=r"report.json: is damaged, and not in MLflow; write it again with"
        ) as said:
            sync(tmp_path / "run")
        assert "cannot be used" not in str(said.value)
    assert run_of(mirror).info.status == "FINISHED"
    assert not mirror.state.read().get("complete")
    report.unlink()
    sync(tmp_path / "run")
    assert mirror.state.read()["complete"]


def update_often(folder, name):
    state = SyncState(folder)
    for number in range(120):
        state.update(**{f"{name}{number % 3}": number})


def test_processes_do_not_undo_each_others_updates(tmp_path):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(update_often, [tmp_path] * 2, ["training", "sync"]))
    last = {0: 117, 1: 118, 2: 119}
    assert SyncState(tmp_path).read() == {f"{name}{k}": last[k] for name in ("training", "sync") for k in last}
