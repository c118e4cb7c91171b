"""What a SLURM job does around its ranks, where SLURM itself is played by two scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.config_file import dump_config, make_config
from dist_train.errors import SlurmError, StorageError
from launch import allocation
from tests.common import LIMIT, ROOT


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config({"data": {"shards": "d"}, "runs": str(tmp_path / "runs")})))
    return path


@pytest.fixture
def job(tmp_path):
    """`job(code, *arguments)` starts a Python program, or without code a command, in job 7; its squeue makes the file `asked` and takes 2 seconds."""
    scripts = {
        "squeue": f"touch {tmp_path}/asked; sleep 2",
        "scontrol": f'echo "$@" >> {tmp_path}/said; [ $2 = hostnames ] && echo n1 || echo JobId=7 JobState=RUNNING BatchFlag=1',
        "srun": 'echo "the ranks were started: $@"; exit 3',
        "sbatch": f"cp $1 {tmp_path}/batch.sh; echo Submitted batch job 7",
    }
    (tmp_path / "bin").mkdir()
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_CPUS_PER_NODE": "1",
    }

    def start(code, *arguments):
        words = [sys.executable, "-c", code] if code else []
        return subprocess.Popen(
            [*words, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


def test_a_signal_before_the_ranks_exist_requeues_the_job(config, job, tmp_path):
    process = job("import sys; from launch import allocation; sys.exit(allocation.run(sys.argv[1]))", config)
    while not (tmp_path / "asked").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 75, output
    assert "the ranks were started" not in output
    assert "requeue 7" in (tmp_path / "said").read_text()


SUBMIT = """
import os, sys
from pathlib import Path
from dist_train import slurm
from launch import allocation
slurm.submit(slurm.executor(Path(sys.argv[2]), holds_signals=True, use_srun=False), allocation.run_job, [(sys.argv[1], None)])
"""


@pytest.mark.parametrize("way", ["submitted", "sbatch"])
def test_a_signal_while_the_batch_step_imports_requeues_the_job(config, job, tmp_path, way):
    if way == "submitted":
        submission = job(SUBMIT, config, tmp_path / "jobs")
        assert submission.wait() == 0, submission.communicate()[0]
        process = job(None, "bash", tmp_path / "batch.sh")
    else:
        process = job(None, sys.executable, "launch/slurm.py", config)
    status = Path(f"/proc/{process.pid}/status")
    held = 1 << (signal.SIGUSR2 - 1)
    while not int(status.read_text().partition("SigBlk:")[2].split()[0], 16) & held:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    assert not (tmp_path / "asked").exists()
    os.killpg(process.pid, signal.SIGUSR2)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 75, output
    assert "the ranks were started" not in output
    assert "requeue 7" in (tmp_path / "said").read_text()


def test_a_full_disk_does_not_keep_a_job_from_being_requeued(config, job):
    code = """
import resource, sys
from launch import allocation
from dist_train.config_file import load_config
config = load_config(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # a write to a file fails; Python ignores the signal
assert allocation._may_try_again(config, "7", 74)
"""
    process = job(code, config)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 0, output
    assert "failures.json: cannot be written" in output
    assert "the ranks ended with exit code 74 after the checkpoint of step 0 (1 of 3)" in output


def test_gpus_on_a_node_start_a_process_each_that_sees_all_of_them(config, job):
    variables = ["SLURM_GPUS_ON_NODE=2", "SLURM_TASKS_PER_NODE=1", "SLURM_JOB_CPUS_PER_NODE=2"]  # of --gres=gpu:2
    process = job(None, "env", *variables, sys.executable, "launch/slurm.py", config)
    output = process.communicate(timeout=LIMIT)[0]
    assert "launch.slurm: nodes: 1, processes on each: 2\n" in output
    assert "--ntasks=2 --ntasks-per-node=2" in output
    assert "--gpu-bind=none" in output


@pytest.fixture
def asked(monkeypatch):
    """`asked(NTASKS=8)` is an allocation of 2 nodes with these variables; gives its tasks on each node."""

    def tasks(**variables):
        for name, value in {"JOB_CPUS_PER_NODE": "64(x2)", "TASKS_PER_NODE": "1(x2)", **variables}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        return allocation._tasks_per_node(2)

    return tasks


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, 1),
        ({"NTASKS_PER_NODE": "2", "GPUS_PER_NODE": "8"}, 2),
        ({"NTASKS": "16", "TASKS_PER_NODE": "8(x2)", "GPUS_ON_NODE": "4"}, 8),
        ({"GPUS_PER_NODE": "a100:6,h100:2"}, 8),
        ({"GPUS_ON_NODE": "8"}, 8),  # --gres=gpu:8
        ({"GPUS": "a100:16", "GPUS_ON_NODE": "8"}, 8),
        ({"GPUS": "16"}, 8),  # salloc
        ({"NTASKS": "1", "TASKS_PER_NODE": "1", "STEP_ID": "0", "GPUS_PER_NODE": "8"}, 8),  # in a shell by srun --pty
        ({"GPUS_PER_NODE": "a100"}, 1),
    ],
)
def test_each_node_gets_the_processes_that_were_asked_for(asked, variables, tasks):
    assert asked(**variables) == tasks


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NTASKS": "9", "TASKS_PER_NODE": "8,1"}, "unlike numbers of tasks on its nodes, 8,1; ask for the same"),
        ({"GPUS": "5", "GPUS_ON_NODE": "4"}, "has 5 GPUs, but not the same number on each of its 2 nodes"),
        ({"GPUS": "5"}, "has 5 GPUs, but not the same number"),
        ({"GPUS_ON_NODE": "65"}, "has 64 cores on a node for 65 tasks"),
    ],
)
def test_nodes_with_unlike_numbers_of_processes_are_refused(asked, variables, said):
    with pytest.raises(SlurmError, match=said):
        asked(**variables)


def test_a_run_folder_that_cannot_be_written_is_tried_again_later(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written \(Not a directory\)") as refused:
        allocation._check_shared(tmp_path / "file" / "run", ["n1", "n2"])
    assert refused.value.exit_code == 1
