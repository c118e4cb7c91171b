"""What is read from SLURM's words, without a SLURM."""

import math
import os

import pytest

from dist_train import slurm
from dist_train.errors import SlurmError


@pytest.mark.parametrize(
    ("limit", "hours"),
    [
        ("2-00:00:00", 48),
        ("12:00:00", 12),
        ("30:00", 0.5),
        ("infinite", math.inf),
        ("1-12:30:36", 36.51),
        ("n/a", math.inf),
    ],
)
def test_hours_of_a_time_limit(limit, hours):
    assert slurm.hours_of(limit) == pytest.approx(hours)


def test_the_variables_of_a_job_are_away_while_another_is_submitted(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/s", "PMI_RANK": "0", "SBATCH_PARTITION": "p"}.items():
        monkeypatch.setenv(name, value)
    with slurm.outside_of_jobs():
        assert {"SLURM_JOB_ID", "PMI_RANK"}.isdisjoint(os.environ)
        assert (os.environ["SLURM_CONF"], os.environ["SBATCH_PARTITION"]) == ("/etc/s", "p")
    assert os.environ["SLURM_JOB_ID"] == "1"


@pytest.fixture
def sinfo(monkeypatch, tmp_path):
    """`sinfo(*lines)` is a cluster with these partitions."""

    def say(*lines):
        program = tmp_path / "sinfo"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return say


def test_the_cores_of_a_gpu_are_those_of_the_nodes_that_have_gpus(sinfo):
    sinfo(
        "gpu*|1:00:00|4|64|gpu:a100:8(S:0-1)",
        "gpu*|1:00:00|2|96|gpu:h100:4",
        "gpu*|1:00:00|9|128|(null)",
        "cpu|infinite|3|32+|(null)",
    )
    found = slurm.partitions()
    assert (found["gpu"].cores_per_gpu, found["gpu"].cores, found["gpu"].gpus, found["gpu"].nodes) == (8, 128, 8, 15)
    assert (found["cpu"].cores_per_gpu, found["cpu"].cores, found["cpu"].hours) == (0, 32, math.inf)


def test_a_job_on_gpus_asks_for_their_cores_unless_it_says_how_many(sinfo, capsys):
    from dist_train.config import SlurmConfig
    from launch.submission import _cores

    sinfo("gpu*|1:00:00|4|64|gpu:8", "alone|1:00:00|4|4|gpu:4")
    gpu, alone = slurm.partitions().values()
    assert _cores(SlurmConfig(gpus_per_node=2), gpu) == 8
    assert _cores(SlurmConfig(gpus_per_node=2, cpus_per_task=3), gpu) == 3
    assert _cores(SlurmConfig(tasks_per_node=2), gpu) is None
    assert capsys.readouterr().out == ""
    assert _cores(SlurmConfig(gpus_per_node=2), alone) is None
    assert "set --cpus-per-task" in capsys.readouterr().out


def test_a_command_that_is_not_there_or_fails_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sinfo is not on this machine"):
        slurm.partitions()
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\necho first >&2\necho 'slurm_load_jobs error: away' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(slurm.Unanswered, match=r"squeue .*: slurm_load_jobs error: away$"):
        slurm.jobs()
