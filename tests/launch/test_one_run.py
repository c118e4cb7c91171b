"""One training at a time in a run folder, and none that outlives what started it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dist_train.config_file import dump_config, load_config, make_config
from dist_train.distributed.lock import RunLock
from dist_train.errors import DataError
from dist_train.tracking.metrics import read_metrics
from tests.common import LIMIT, ROOT, SMALL_MODEL, processes_of


@pytest.fixture
def config(digits, tmp_path):
    """A run that goes on until it is stopped."""
    path = tmp_path / "long.yaml"
    fields = {
        "name": "long",
        "runs": str(tmp_path),
        "data": {"shards": str(digits), "flip": False},
        "model": SMALL_MODEL,
        "train": {"global_batch": 32, "micro_batch": 16, "epochs": 1000, "precision": "fp32", "eval_every": 1000},
        "checkpoint": {"every_steps": 5, "every_epochs": None},
        "tracking": {"uri": "off", "log_every": 2},
    }
    path.write_text(dump_config(make_config(fields)))
    return path


def start(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@contextlib.contextmanager
def training(config, *words, **options):
    """A run that has written metrics; whatever becomes of it, no process is left afterwards."""
    metrics = config.parent / "long" / "metrics.jsonl"
    process = start(*words, **options)
    try:
        while not (metrics.exists() and read_metrics(metrics)):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        yield process
    finally:
        for left in processes_of(config):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def wait_until_gone(config):
    deadline = time.monotonic() + LIMIT
    while processes_of(config):
        assert time.monotonic() < deadline, [p.info["cmdline"] for p in processes_of(config)]
        time.sleep(0.1)


LOCAL = ("launch.local", "-n", "2")


def test_a_second_training_in_the_same_folder_is_refused_and_the_first_is_not_touched(config):
    with training(config, *LOCAL, config) as first:
        before = len(read_metrics(config.parent / "long" / "metrics.jsonl"))
        report = config.parent / "long" / "faults" / "rank0.txt"
        report.parent.mkdir(exist_ok=True)
        report.write_text("what the first training has to say")
        second = start("dist_train", "train", config)
        said = second.communicate(timeout=LIMIT)[0]
        assert second.returncode == 2, said
        assert "waiting for process" in said
        last = said.strip().splitlines()[-1]
        assert "is training in it; wait for it, stop it, or set another --name" in last, said
        assert first.poll() is None
        assert report.exists()
        assert len(read_metrics(config.parent / "long" / "metrics.jsonl")) > before


def test_the_lock_says_who_holds_it_and_dies_with_the_holder(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from dist_train.distributed.lock import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
print("held", flush=True)
time.sleep(1000)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(DataError, match=rf"process {holder.pid} on .* is training in it"):
        RunLock(tmp_path).acquire(wait_seconds=0.3, say=lambda text: None)
    holder.kill()
    holder.wait()
    with RunLock(tmp_path) as lock:
        lock.acquire(wait_seconds=0.3)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_rank_that_outlives_rank_0_keeps_the_folder(tmp_path):
    first, other = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    other.join()
    first.release()
    with pytest.raises(DataError, match="is training in it"):
        RunLock(tmp_path).acquire(wait_seconds=0.3, say=lambda text: None)
    other.release()
    RunLock(tmp_path).acquire(wait_seconds=0.3)


def test_a_closed_terminal_stops_as_sigterm_does(config):
    with training(config, *LOCAL, config) as process:
        process.send_signal(signal.SIGHUP)
        said = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 75, said
    assert "stopped by" in said
    assert "saved; run the same command again to resume" in said


def test_nohup_outlives_the_terminal(config):
    with training(
        config, "dist_train", "train", config, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert process.poll() is None


def launcher_of_deepspeed(process):
    return psutil.Process(process.pid).children()[0]


@pytest.mark.parametrize(
    "which", [lambda process: psutil.Process(process.pid), launcher_of_deepspeed], ids=["launch.local", "deepspeed"]
)
def test_ranks_whose_launcher_is_killed_save_and_end(config, which):
    with training(config, *LOCAL, config) as process:
        which(process).kill()
        wait_until_gone(config)
        process.wait()
        log = (config.parent / "long" / "log" / "rank0.txt").read_text()
        assert "stopped by the end of its launcher" in log or "stopped by a request on another rank" in log
        # What it saved is resumed by the same command at once.
        again = start(*LOCAL, config, "--train.max_steps", "1")
        said = again.communicate(timeout=LIMIT)[0]
        assert again.returncode == 0, said
        assert "resumed from" in said


def test_ranks_of_torchrun_whose_agent_is_killed_save_and_end(config):
    words = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "dist_train", "train", config)
    with training(config, *words) as process:
        process.kill()
        wait_until_gone(config)


def test_mpirun_is_told_how_to_start(config, command):
    result = command(
        "dist_train", "train", config, env=os.environ | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "OMPI_COMM_WORLD_SIZE is 2" in result.stderr
    assert "python -m launch.local" in result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(kilobytes)` mounts a file system of that size."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True
        ).returncode:
            pytest.skip("mounting a file system needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def short(config, disk):
    return ["dist_train", "train", config, "--runs", disk, "--train.max_steps", 12, "--checkpoint.every_steps", 2]


def test_a_disk_that_is_full_at_the_start_is_one_line(config, command, small_disk):
    disk = small_disk(64)
    fill(disk)
    result = command(*short(config, disk))
    # As a failure that a retry may cure: a job in a queue is started again when there may be space.
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1), result
    assert "cannot be written (No space left on device)" in result.stderr


def test_what_a_run_is_is_written_once_there_is_space(config, command, small_disk):
    """A run whose start could write neither its configuration nor its metrics has both by its first checkpoint."""
    disk = small_disk(2000)
    folder = disk / "long"
    folder.mkdir()
    # The name is taken by a folder, which no file can replace: as a full disk, but for as long as the test wants.
    (folder / "config.yaml").mkdir()
    (folder / "config.yaml" / "in the way").touch()
    process = start(*short(config, disk), "--checkpoint.every_steps", 6, "--tracking.log_every", 1)
    said = ""
    while "step 3/" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    assert not (folder / "metrics.jsonl").exists()
    shutil.rmtree(folder / "config.yaml")
    said += process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 0, said
    assert said.count("cannot be written (Is a directory); training continues") == 1
    assert load_config(folder / "config.yaml").name == "long"
    assert {"env.json", "quarantine.json"} <= {path.name for path in folder.iterdir()}
    logged = [entry["batch"] for entry in read_metrics(folder / "metrics.jsonl") if "train/loss" in entry["metrics"]]
    assert logged == list(range(1, 13))


def test_a_disk_that_fills_up_costs_no_silence(config, command, small_disk):
    """The last checkpoint cannot be written: another exit code, what is lost, no traceback; with space, the run resumes."""
    disk = small_disk(300)
    result = command(*short(config, disk), "--checkpoint.keep", 1000)
    said = result.stdout + result.stderr
    assert result.returncode == 74, said
    assert "Traceback" not in said
    assert "Logging error" not in said
    assert said.count("a checkpoint could not be written") == 1
    assert "could not be written (No space left on device); what remains is step" in result.stderr
    assert result.stderr.count("\n") == 1
    kept = len(list((disk / "long" / "checkpoints").glob("step-*")))
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    again = command(*short(config, disk), "--checkpoint.keep", 1000)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from" in again.stdout
    assert len(list((disk / "long" / "checkpoints").glob("step-*"))) > kept
    steps = [
        entry["step"] for entry in read_metrics(disk / "long" / "metrics.jsonl") if "train/loss" in entry["metrics"]
    ]
    assert steps == [2, 4, 6, 8, 10, 12]
