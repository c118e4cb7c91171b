"""`dist-train watch`: a run that has not started, trains, is resumed, is killed, has ended."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from dist_train.config_file import dump_config, make_config
from dist_train.distributed.lock import RunLock
from dist_train.tracking import live, watch
from dist_train.tracking.live import LivePage
from dist_train.tracking.metrics import MetricsFile, read_metrics
from dist_train.tracking.watch import Watched, follow
from tests.common import ROOT, on_a_terminal

HOLDER = """
import sys, time
from pathlib import Path
from dist_train.distributed.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def config(tmp_path):
    """Of a run of 4 epochs, 10 batches each."""
    train = {"epochs": 4, "global_batch": 20, "micro_batch": 20}
    return make_config({"name": "r", "runs": str(tmp_path), "data": {"shards": "x"}, "train": train})


def begin(config):
    """What a start writes before its first step."""
    config.folder.mkdir(exist_ok=True)
    (config.folder / "config.yaml").write_text(dump_config(config))


def training(batch, loss):
    metrics = {f"train/exit{m}/{name}": 0.1 * m for m in (1, 2) for name in ("top1", "top5", "loss")}
    metrics |= {"train/loss": loss, "train/epoch": batch / 10, "train/temperature": 1.5, "train/learning_rate": 0.1}
    metrics |= {"train/teacher_confidence": 0.7, "train/gradient_norm": 2.0, "speed/images_per_second": 100.0}
    return metrics | {"speed/waiting_for_data": 0.25, "memory/peak_gib": 1.0, "train/skipped_steps": 3.0}


def validation(top1):
    return {"val/exit1/top1": top1, "val/exit2/top1": top1, "val/mean_top1": top1}


def log(config, *lines):
    file = MetricsFile(config.folder / "metrics.jsonl")
    for batch, metrics in lines:
        file.add(batch, batch, metrics)
    file.flush()


def test_a_run_is_followed_from_before_its_start_over_a_resume_to_its_end(config, monkeypatch):
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.0)
    looks = follow(config.folder)
    assert next(looks)[0].state == "has not started"
    with RunLock(config.folder) as lock:
        lock.acquire()
        begin(config)
        run, entries = next(looks)
        assert (run.state, entries) == ("starting", [])
        log(config, (5, training(5, 2.0)), (10, training(10, 1.5)), (10, validation(0.5)), (15, training(15, 1.0)))
        with (config.folder / "metrics.jsonl").open("a") as file:
            file.write('{"t": 1, "st')  # being written
        run, entries = next(looks)
        assert (run.state, run.losses, run.best, len(entries)) == ("training", [2.0, 1.5, 1.0], 0.5, 4)
        # 25 batches of 20 images, at 100 images a second.
        assert (run.total, run.seconds_left) == (40, 5.0)
        # A resume drops what it will measure again, and has other numbers there.
        MetricsFile(config.folder / "metrics.jsonl").rewind(10, False)
        log(config, (15, training(15, 1.25)))
        run, _ = next(looks)
        kept = [entry["metrics"] for entry in read_metrics(config.folder / "metrics.jsonl")]
        assert run.losses == [one["train/loss"] for one in kept if "train/loss" in one] == [2.0, 1.5, 1.25]
        log(config, (40, training(40, 0.5)))
        assert next(looks)[0].state == "training"
        log(config, (40, validation(0.9)))
        run, _ = next(looks)
        assert (run.state, run.best, run.seconds_left) == ("finished", 0.9, 0.0)
    assert list(looks) == []


def test_skipped_steps_do_not_count_towards_max_steps(config):
    begin(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 20})}))
    file = MetricsFile(config.folder / "metrics.jsonl")
    for step, batch in ((17, 20), (20, 23)):  # three were skipped
        file.add(step, batch, training(batch, 1.0))
        file.add(step, batch, validation(0.5))
        file.flush()
        run = watch.Watched(config.folder)
        run.look()
        assert (run.total, run.finished) == (23, batch == 23)


def test_a_run_that_is_killed_is_waited_for_and_then_left(config, monkeypatch):
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.0)
    begin(config)
    log(config, (5, training(5, 2.0)))
    # Nobody trains in it, and nobody did while we looked.
    assert [run.state for run, _ in follow(config.folder)] == [
        "stopped at step 5; the command that started it resumes it"
    ]
    words = [sys.executable, "-c", HOLDER, str(config.folder)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    looks = follow(config.folder)
    assert next(looks)[0].state == "training"
    process.kill()
    process.wait()
    assert next(looks)[0].state.startswith("stopped at step 5")
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 0.0)
    assert list(looks) == []


def test_a_start_is_not_disturbed_by_those_who_look_on(config, monkeypatch):
    with RunLock(config.folder) as lock:
        lock.acquire(wait_seconds=0)
        assert RunLock(config.folder).holder_lives()
        RunLock(config.folder).join()
        lock.join()
    text = (config.folder / "lock").read_text()
    for zone in ("Asia/Tokyo", "America/New_York"):  # somebody elsewhere looks on
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert RunLock(config.folder).holder_lives()
    content = json.loads(text)
    # Of an earlier process of this number.
    (config.folder / "lock").write_text(json.dumps(content | {"started": content["started"] - 1}))
    assert RunLock(config.folder).holder_lives() is False
    (config.folder / "lock").write_text(text.replace('"host": "', '"host": "another-'))
    assert RunLock(config.folder).holder_lives() is None


def test_a_run_whose_lines_have_less_is_shown_with_what_they_have(config, command):
    begin(config)
    log(config, (5, training(5, 1.8)), (10, {"train/loss": 1.5, "train/exit2/top1": 0.5}), (10, validation(0.5)))
    log(config, (15, {"train/loss": 1.25, "train/epoch": math.nan, "train/skipped_steps": math.nan}))
    piped = command("dist_train", "watch", config.folder, "--html")
    assert (piped.returncode, piped.stderr) == (0, "")
    assert "loss 1.500  top-1 % nan  T nan" in piped.stdout
    text = "\n".join(on_a_terminal(100, "-m", "dist_train", "watch", config.folder))
    assert "1.2500" in text
    assert "Traceback" not in text


def test_what_is_no_run_folder_is_refused_and_not_waited_for(tmp_path, refused):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        assert f"{path}: is no run folder" in refused("watch", path)


def test_the_page_follows_the_run_refreshes_itself_and_stops_with_it(config, monkeypatch):
    begin(config)
    page, run = LivePage(config.folder), Watched(config.folder)
    with RunLock(config.folder) as lock:
        lock.acquire()
        run.look()
        page.show(run)
        assert "starting" in page.path.read_text()
        log(config, *((step, training(step, 2 - 0.04 * step)) for step in (5, 10)), (10, validation(0.5)))
        run.look()
        page.show(run)
        assert "starting" in page.path.read_text(), "written again within the time that a browser waits"
        monkeypatch.setattr(live, "REFRESH_SECONDS", 0)
        page.show(run)
        text = page.path.read_text()
        for part in (
            "training, step 10 of 40, 6 s left",
            "25 % waiting for data",
            "50.00",
            "data:image/png",
            "refresh",
        ):
            assert part in text, part
    log(config, (40, training(40, 0.4)), (40, validation(0.9)))
    run.look()
    page.show(run)
    text = page.path.read_text()
    assert "finished" in text
    assert "http-equiv" not in text


def test_a_page_that_is_left_while_the_run_goes_on_says_so(config):
    begin(config)
    page = config.folder / "live.html"
    with RunLock(config.folder) as lock:
        lock.acquire()
        # A shell that starts the tests in its background lets them, and what they start, ignore SIGINT.
        words = ["env", "--default-signal=INT", sys.executable, "-m", "dist_train", "watch", config.folder, "--html"]
        watching = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
        while not page.exists():
            assert watching.poll() is None
            time.sleep(0.1)
        watching.send_signal(signal.SIGINT)
        watching.communicate()
    text = page.read_text()
    assert "starting when `dist-train watch --html` was left" in text
    assert "http-equiv" not in text


def test_a_page_that_cannot_be_written_is_one_line_and_the_watching_goes_on(config, command):
    begin(config)
    log(config, (40, training(40, 0.5)), (40, validation(0.9375)))
    (config.folder / "live.html").mkdir()
    result = command("dist_train", "watch", config.folder, "--html")
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert "live.html: cannot be written" in result.stderr
    assert result.stdout.endswith("r: finished\n")


@pytest.mark.parametrize("width", [60, 120])
def test_an_ended_run_is_shown_on_a_terminal_and_in_a_pipe(config, command, width):
    begin(config)
    steps = range(5, 45, 5)
    log(config, *((step, training(step, 2 - 0.04 * step)) for step in steps), (40, validation(0.9375)))
    log(config, (40, training(40, math.nan) | {"train/loss": 0.4}))
    log(config, (40, validation(0.9375)))
    shown = on_a_terminal(width, "-m", "dist_train", "watch", config.folder)
    assert max(map(len, shown)) <= width
    text = "\n".join(shown)
    for part in ("finished", "0.4000  █", "▁", "1.500", "25 % waiting for data", "93.75", "3 skipped steps"):
        assert part in text, part
    piped = command("dist_train", "watch", config.folder).stdout.splitlines()
    assert piped[0].startswith("step 5/40  epoch 0.5  loss 1.800  top-1 % 10.0 20.0  T 1.50")
    assert piped[-1].endswith("r: finished")
