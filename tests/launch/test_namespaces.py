"""Hosts with networks of their own, whose link is cut in mid-run: who is lost is said, all end, and the rest goes on."""

import contextlib
import os
import subprocess
import sys
import time

import pytest

from dist_train.config_file import dump_config, make_config
from dist_train.tracking.metrics import read_metrics
from tests.common import LIMIT, ROOT, processes_of
from tests.launch.sshd import ssh_nodes

BRIDGE = f"dt{os.getpid() % 100_000}"
NETWORK = "198.18.7"
"""Of the addresses that are set aside for tests of networks."""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces():
    """Two network namespaces that a bridge on this machine connects; by address, what starts a command inside."""
    names = [f"{BRIDGE}n{number}" for number in (1, 2)]
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here ({getattr(error, 'stderr', error)}); they want root and iproute2")
    try:
        ip("addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(names, start=1):
            ip("netns", "add", name)
            ip("link", "add", f"{BRIDGE}v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{BRIDGE}v{number}", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield {f"{NETWORK}.{n}": ["ip", "netns", "exec", name] for n, name in enumerate(names, start=1)}
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
        ip("link", "delete", BRIDGE)


@pytest.fixture
def config(digits, tmp_path):
    path = tmp_path / "cut.yaml"
    fields = {
        "name": "cut",
        "runs": str(tmp_path),
        "data": {"shards": str(digits), "flip": False},
        "model": {"name": "faulty:network", "exits": ["body"]},
        "train": {"global_batch": 32, "micro_batch": 16, "epochs": 20, "max_steps": 400},
        "checkpoint": {"every_steps": 2},
        "tracking": {"uri": "off", "log_every": 1},
        "faults": {"timeout_minutes": 0.5},
    }
    path.write_text(dump_config(make_config(fields)))
    return path


def test_a_host_whose_link_is_cut_is_named_all_end_and_the_other_one_goes_on(namespaces, config, tmp_path):
    with ssh_nodes(tmp_path, namespaces) as (hostfile, environment):
        words = [sys.executable, "-m", "launch.nodes", "--hostfile", str(hostfile), str(config)]
        slow = environment | {"FAULT": "slow:1:0"}
        process = subprocess.Popen(
            words, cwd=ROOT, env=slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        metrics = tmp_path / "cut" / "metrics.jsonl"
        while not (metrics.exists() and len(read_metrics(metrics)) > 4):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        ip("link", "set", f"{BRIDGE}v2", "down")
        output = process.communicate(timeout=LIMIT)[0]
        assert process.returncode in (1, 255), output
        assert "rank 1" in output or "the connection to node2 is lost" in output, output
        # Also on the host that nobody reaches any more.
        deadline = time.monotonic() + LIMIT
        while processes_of(config):
            assert time.monotonic() < deadline, "processes were left behind"
            time.sleep(0.1)
        done = len(read_metrics(metrics))
        hostfile.write_text("node1 slots=1\n")
        words += ["--train.max_steps", str(done + 10)]
        result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "resumed from" in result.stdout
