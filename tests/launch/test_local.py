"""Processes on this machine: all of them train one run, and none outlives the others."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from dist_train.config_file import dump_config, make_config
from dist_train.errors import ConfigError
from dist_train.tracking.metrics import read_metrics
from launch.node import Node, Place, _environment, _glibc
from tests.common import LIMIT, ROOT, SMALL_MODEL


@pytest.fixture
def config(digits, tmp_path):
    path = tmp_path / "launched.yaml"
    fields = {
        "name": "launched",
        "runs": str(tmp_path),
        "data": {"shards": str(digits), "flip": False},
        "model": SMALL_MODEL | {"step": 2},
        "train": {"global_batch": 32, "micro_batch": 16, "epochs": 2},
        "tracking": {"uri": "off", "log_every": 2},
    }
    path.write_text(dump_config(make_config(fields)))
    return path


def ranks_of(config):
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if str(config) in words and "RANK" in environment:
            found.append(process)
    return found


def wait_for_training(process, folder):
    metrics = folder / "launched" / "metrics.jsonl"
    while not (metrics.exists() and read_metrics(metrics)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def start(config):
    words = [sys.executable, "-m", "launch.local", "-n", "2", str(config)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(_glibc() < (2, 35), reason="settings of glibc 2.35 and later")
def test_ranks_keep_the_memory_that_a_step_frees(monkeypatch):
    """A buffer taken again and again costs page faults once."""
    program = (
        "import resource\n"
        "for _ in range(9): bytearray(b'1') * 2**26; kept = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "bytearray(b'1') * 2**26; print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - kept)"
    )
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def faults(environment):
        words = [sys.executable, "-c", program]
        return int(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)

    assert faults(os.environ | _environment(1)) < 100
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert "GLIBC_TUNABLES" not in _environment(1), "what the user has set holds"


def test_an_older_glibc_is_left_as_it_is(monkeypatch):
    """It would refuse one of the settings and take the other, and then give every tensor back at once."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for said in ("glibc 2.34", "musl 1.2", None):
        monkeypatch.setattr(os, "confstr", lambda _, said=said: said)
        assert "GLIBC_TUNABLES" not in _environment(1)


def test_a_rank_that_dies_ends_the_others_and_the_launcher_says_so(config, tmp_path):
    process = start(config)
    wait_for_training(process, tmp_path)
    ranks = ranks_of(config)
    assert len(ranks) == 2
    ranks[1].kill()
    process.communicate(timeout=LIMIT)
    assert process.returncode not in (0, 75)
    assert not ranks_of(config)


def test_ctrl_c_saves_and_ends_all(config, tmp_path):
    process = start(config)
    wait_for_training(process, tmp_path)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert (tmp_path / "launched" / "checkpoints" / "latest" / "manifest.json").exists()
    assert not ranks_of(config)


def test_the_plain_deepspeed_launcher_works_as_well(config, tmp_path):
    words = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--module", "dist_train", "train", config]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        [*map(str, words), "--train.max_steps", "3"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 processes" in result.stdout
    assert "360 images, each once" in result.stdout


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(config):
    process = start(config)
    while not psutil.Process(process.pid).children():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    launcher = psutil.Process(process.pid).children()[0]
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode not in (0, 75)
    assert "Traceback" not in output
    assert not launcher.is_running()
    assert not ranks_of(config)


def test_a_request_to_stop_while_the_launcher_still_starts_ends_it(tmp_path):
    """While it is imported, DeepSpeed's launcher runs other programs, which are no ranks: it would start those afterwards."""
    code = (
        f"import subprocess, pathlib; subprocess.run(['sleep', '30']); pathlib.Path({str(tmp_path)!r}, 'ranks').touch()"
    )
    node = Node(Place({"localhost": 1}, 0, "127.0.0.1", 1), "dist_train", [])
    node._command = [sys.executable, "-c", code]

    def stop():
        while not (node._child and psutil.Process(node._child.pid).children()):
            time.sleep(0.01)
        node.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    assert node.run() == 128 + signal.SIGKILL
    thread.join()
    assert not (tmp_path / "ranks").exists()


def shares(_):
    before = sorted(os.sched_getaffinity(0))
    from dist_train.distributed.group import Ranks

    ranks = Ranks.from_env()
    ranks.pin()
    return before, sorted(os.sched_getaffinity(0)), ranks.threads


def test_the_ranks_of_a_machine_divide_its_cores_and_keep_what_a_launcher_gave(ranks):
    cores = sorted(os.sched_getaffinity(0))
    for processes in (1, 2, len(cores) + 1):
        found = ranks(shares, processes, None)
        size = len(cores) // processes
        assert all(before == cores and threads == max(1, size) for before, _, threads in found)
        if size:
            mine = [core for _, share, _ in found for core in share]
            assert len(mine) == len(set(mine)) == size * processes
        else:
            assert all(share == cores for _, share, _ in found)


def test_a_run_asked_to_stop_in_an_evaluation_stops_there_and_evaluates_when_it_goes_on(config, tmp_path):
    flags = ["--model.name", "slow:network", "--model.exits", "[body]", "--train.epochs", "1", "--train.max_steps", "4"]
    fields = yaml.safe_load(config.read_text())
    fields["model"] = {}
    config.write_text(yaml.safe_dump(fields))
    marker = tmp_path / "evaluating"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        "SLOW_EVALUATION": "0.5",
        "EVALUATING": str(marker),
    }
    words = [sys.executable, "-m", "launch.local", "-n", "2", str(config), *flags]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not marker.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 75, output
    evaluated = [
        entry for entry in read_metrics(tmp_path / "launched" / "metrics.jsonl") if "val/images" in entry["metrics"]
    ]
    assert not evaluated
    again = subprocess.run(
        words, cwd=ROOT, env=environment | {"SLOW_EVALUATION": "0"}, capture_output=True, text=True, timeout=LIMIT
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "360 images, each once" in again.stdout


@pytest.mark.parametrize("module", ["launch.local", "launch.nodes", "launch.slurm", "dist_train"])
def test_ctrl_c_while_everything_is_imported_is_no_traceback(config, module):
    flags = {"launch.nodes": ["--hostfile", "nowhere"], "dist_train": ["train"]}.get(module, [])
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags, str(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # The shell of a job in the background has its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    # Python itself is up by then, and most is still to be imported.
    while process.poll() is None and "pydantic_core" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=LIMIT)[0]
    assert "Traceback" not in output, output
    # Ended by the signal itself is what a shell calls 130.
    assert process.returncode in (2, 75, 130, -signal.SIGINT), output


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1]),
        ("", ["-1", "-1"]),
        ("4,5", ["4", "5"]),
        ("4,5,6", ["4", "5"]),
        ("MIG-a, GPU-b", ["MIG-a", "GPU-b"]),
        ("-1", ["-1", "-1"]),
        ("4,5,-1,6", ["4", "5"]),
    ],
)
def test_the_ranks_get_the_gpus_that_were_chosen(monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    words = Place({"a": 3, "b": 2}, 1, "127.0.0.1", 1).command("dist_train", [])
    (world,) = [word.partition("=")[2] for word in words if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"a": [0, 1, 2], "b": expected}


def test_fewer_gpus_chosen_than_processes_is_one_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is 4, 1 GPUs for 2 processes"):
        Place({"a": 2}, 0, "127.0.0.1", 1).command("dist_train", [])
