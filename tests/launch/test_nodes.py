"""Several nodes over a real sshd on loopback addresses: the same run as on one machine, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_train.config_file import dump_config, make_config
from dist_train.errors import ConfigError
from dist_train.tracking.metrics import read_metrics
from launch import nodes
from launch.nodes import read_hostfile
from tests.common import LIMIT, ROOT, processes_of
from tests.launch.sshd import ssh_nodes


@pytest.fixture
def hosts(tmp_path):
    """Two host names, node1 and node2, that ssh finds at 127.0.0.1 and 127.0.0.2, in a hostfile of one process each."""
    # A core for each node, as the ranks of one machine have: two threads would sum in another order than one.
    cores = sorted(os.sched_getaffinity(0))
    nodes = {f"127.0.0.{n + 1}": ["taskset", "-c", str(cores[n % len(cores)])] for n in range(2)}
    with ssh_nodes(tmp_path, nodes) as (hostfile, environment):
        # FAULT must arrive on the nodes: rank 1 is slow by it.
        yield hostfile, environment | {"FAULT": "slow:1:0"}


@pytest.fixture
def config(digits, tmp_path):
    path = tmp_path / "over nodes.yaml"
    fields = {
        "name": "nodes",
        "runs": str(tmp_path),
        "data": {"shards": str(digits), "flip": False},
        "model": {"name": "faulty:network", "exits": ["body"]},
        "train": {"global_batch": 32, "micro_batch": 16, "epochs": 1, "max_steps": 6},
        "tracking": {"uri": "off", "log_every": 2},
    }
    path.write_text(dump_config(make_config(fields)))
    return path


def run(words, environment):
    return subprocess.run(
        [*map(str, words)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )


def weights(folder):
    return load_file(folder / "checkpoints" / "latest" / "model.safetensors")


def test_two_nodes_train_what_one_machine_trains_bit_for_bit(hosts, config, tmp_path):
    hostfile, environment = hosts
    python = [sys.executable, "-m"]
    runs = {
        "local": [*python, "launch.local", "-n", 2, config],
        "nodes": [*python, "launch.nodes", "--hostfile", hostfile, config],
    }
    if shutil.which("pdsh"):  # which DeepSpeed's own launcher wants
        launcher = [Path(sys.executable).with_name("deepspeed"), "--hostfile", hostfile, "--master_addr", "127.0.0.1"]
        (tmp_path / "plain.yaml").write_text(config.read_text())
        runs["deepspeed"] = [*launcher, "--module", "dist_train", "train", tmp_path / "plain.yaml"]
    for name, words in runs.items():
        result = run([*words, "--name", name], environment)
        assert result.returncode == 0, result.stdout
        assert "360 images, each once" in result.stdout
        assert "rank 1 is slow" in result.stdout or name == "deepspeed", result.stdout
        got, expected = weights(tmp_path / name), weights(tmp_path / "local")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected), name


def test_the_end_of_the_launcher_reaches_every_node(hosts, config, tmp_path):
    hostfile, environment = hosts
    words = [sys.executable, "-m", "launch.nodes", "--hostfile", str(hostfile), str(config)]
    metrics = tmp_path / "nodes" / "metrics.jsonl"
    for number, steps in ((signal.SIGINT, 300), (signal.SIGKILL, 301)):
        words += ["--train.max_steps", str(steps), "--train.epochs", "20"]
        before = len(read_metrics(metrics)) if metrics.exists() else 0
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        while not (metrics.exists() and len(read_metrics(metrics)) > before):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        output = process.communicate(timeout=LIMIT)[0]
        if number == signal.SIGINT:
            assert process.returncode == 75, output
            assert "Traceback" not in output
        saved = (tmp_path / "nodes" / "checkpoints" / "latest").resolve()
        deadline = time.monotonic() + LIMIT
        while processes_of(config) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes_of(config), "processes were left behind"
        assert int((tmp_path / "nodes" / "checkpoints" / "latest").resolve().name[5:]) >= int(saved.name[5:])


def test_a_node_that_cannot_be_reached_is_named_and_nothing_starts(hosts, config, tmp_path):
    hostfile, environment = hosts
    hostfile.write_text("node1 slots=1\nsilent slots=1\n")
    words = [sys.executable, "-m", "launch.nodes", "--hostfile", hostfile, config]
    result = run(words, environment)
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1, result.stdout
    assert "node silent cannot be reached" in result.stdout
    assert not (tmp_path / "nodes").exists()


def test_odd_names_reach_a_nodes_shell_as_they_are(tmp_path, monkeypatch):
    folder = tmp_path / "a folder's $HOME"
    folder.mkdir()
    (folder / "it's mine.yaml").write_text("")
    python = folder / "my python"
    python.symlink_to(sys.executable)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(nodes, "SSH", ["sh", "-c", 'eval "$2"', "ssh"])  # HOST and the command follow
    monkeypatch.setattr(sys, "executable", str(python))
    nodes._check_nodes({"node1": 1}, "it's mine.yaml")
    with pytest.raises(ConfigError, match=r"node node1 has no it's yours.yaml in .*/a folder's \$HOME; all nodes"):
        nodes._check_nodes({"node1": 1}, "it's yours.yaml")


def test_a_byte_order_mark_is_no_part_of_a_hosts_name(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=2\n", encoding="utf-8-sig")
    assert read_hostfile(tmp_path / "hosts") == {"node1": 2}


def test_what_belongs_to_one_node_or_login_is_not_forwarded():
    names = ["TMP", "TEMP", "KRB5CCNAME", "PMIX_RANK", "SLURMD_NODENAME", "SLURM_JOB_ID", "TMPFS", "NCCL_DEBUG"]
    assert [name for name in names if not nodes.OWN.fullmatch(name)] == ["TMPFS", "NCCL_DEBUG"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1 slots=2\nnode2 4\n", "line 2: is 'node2 4'; write HOST slots=N"),
        ("node1 slots=0\n", "line 1"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("node1 slots=1\nnode1 slots=1\n", "line 2: node1 is listed twice"),
        ("# nothing\n\n", "names no host"),
        (None, "cannot be read"),
    ],
)
def test_hostfiles_that_say_nothing_usable_are_refused(tmp_path, text, said):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_hostfile(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
