"""One rank hangs, fails, is killed or is slow: the run says which, ends in time, and leaves no process behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_train.config_file import dump_config, make_config
from dist_train.distributed.fault_report import FaultReport
from dist_train.tracking.metrics import read_metrics
from tests.common import LIMIT, ROOT


@pytest.fixture
def train(digits, tmp_path):
    """`train(fault)` runs two ranks of which one has the fault; gives the exit code and what was said."""
    path = tmp_path / "faulty.yaml"
    fields = {
        "name": "faulty",
        "runs": str(tmp_path),
        "data": {"shards": str(digits), "flip": False},
        "model": {"name": "faulty:network", "exits": ["body"]},
        "train": {"global_batch": 32, "micro_batch": 16, "epochs": 1, "max_steps": 12, "precision": "fp32"},
        "faults": {"timeout_minutes": 0.05},
        "tracking": {"uri": "off", "log_every": 4},
    }
    path.write_text(dump_config(make_config(fields)))

    def run(fault):
        words = [sys.executable, "-m", "launch.local", "-n", "2", str(path)]
        environment = os.environ | {"FAULT": fault, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        result = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT
        )
        left = [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]
        assert not left, "processes were left behind"
        return result.returncode, result.stdout

    return run


def reports(folder):
    return {
        path.name: (FaultReport(**json.loads(path.read_text().splitlines()[0])), path.read_text())
        for path in (folder / "faulty" / "faults").iterdir()
    }


def test_a_rank_that_hangs_is_named_and_every_rank_reports_its_stacks(train, tmp_path):
    code, said = train("hang:1:3")
    assert code == 1, said
    assert "rank 1 hangs at step 2 (forward pass" in said
    found = reports(tmp_path)
    assert found.keys() == {"rank0.txt", "rank1.txt"}
    (waiting, _), (hanging, stacks) = found["rank0.txt"], found["rank1.txt"]
    assert (waiting.step, hanging.step) == (2, 2)
    assert hanging.doing == "forward pass"
    assert "in fail" in stacks
    assert "faulty.py" in stacks
    assert "Traceback" not in said


def test_a_rank_that_fails_is_named_and_its_error_is_the_only_one_shown(train, tmp_path):
    code, said = train("raise:1:3")
    assert code == 1, said
    assert said.count("Traceback") == 1, said
    assert said.index("the network is broken") < said.index("rank 1 failed at step 2")
    assert "ArithmeticError: the network is broken" in reports(tmp_path)["rank1.txt"][1]


def test_a_rank_without_memory_ends_the_run_in_one_line_that_no_retry_follows(train, tmp_path):
    code, said = train("memory:1:3")
    assert code == 2, said
    [line] = [line for line in said.splitlines() if "out of memory" in line]
    assert line.startswith(
        "dist-train train: rank 1: out of memory at train.micro_batch 16: set train.micro_batch to 8"
    )
    assert "Traceback" not in said
    assert reports(tmp_path)["rank1.txt"][0].exit_code == 2


def test_a_rank_that_is_killed_is_named(train, tmp_path):
    code, said = train("kill:0:3")
    assert code == 137, said
    assert "rank 0 left no report" in said
    assert "Traceback" not in said
    assert reports(tmp_path).keys() == {"rank1.txt"}


def test_the_slowest_rank_is_in_the_log(train, tmp_path):
    code, said = train("slow:1:0")
    assert code == 0, said
    assert "rank 1 is slow, the others waited" in said
    lines = [e["metrics"] for e in read_metrics(tmp_path / "faulty" / "metrics.jsonl") if "train/loss" in e["metrics"]]
    assert [line["speed/slowest_rank"] for line in lines] == [1, 1, 1]
    # Four steps, each held up for 0.3 s by rank 1 alone.
    assert all(line["speed/seconds_for_slowest"] > 0.3 for line in lines)
    assert all(0.1 < line["memory/peak_gib"] < 10 for line in lines)
    assert not (tmp_path / "faulty" / "faults").exists()
