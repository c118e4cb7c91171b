"""What is read from SLURM's words, without a SLURM."""

import math
import os
from pathlib import Path

import pytest

from dist_train import slurm
from dist_train.errors import DataError, SlurmError


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


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """`submitted(variables, **parameters)` submits a job where these variables are set; gives those that sbatch gets."""
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/variables\necho Submitted batch job 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def submit(variables, **parameters):
        for name in variables:
            monkeypatch.setenv(name, "1")
        slurm.submit(slurm.executor(tmp_path / "jobs", use_srun=False, **parameters), print, [("job",)])
        assert all(os.environ[name] == "1" for name in variables)
        return set(variables) & {line.partition("=")[0] for line in (tmp_path / "variables").read_text().splitlines()}

    return submit


def test_the_variables_of_a_job_are_away_while_another_is_submitted(submitted):
    users = {"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "SBATCH_PARTITION"}
    assert submitted(["SLURM_JOB_ID", "SLURM_CONFIG", "PMI_RANK", *users]) == users


def test_what_a_job_sets_counts_against_the_variables_of_sbatch(submitted):
    own = ["TIMELIMIT", "REQUEUE", "NO_REQUEUE", "SIGNAL", "OPEN_MODE", "OUTPUT", "ERROR", "JOB_NAME", "ARRAY_INX"]
    own += ["PARTITION", "GPUS_PER_NODE", "MEM_PER_NODE", "MEM_PER_CPU", "WAIT"]
    others = {"SBATCH_ACCOUNT", "SBATCH_QOS", "SBATCH_EXPORT"}
    parameters = {"time": 5, "partition": "p", "gpus_per_node": 1, "mem": "1M", "stderr_to_stdout": True}
    variables = [*(f"SBATCH_{name}" for name in own), *others]
    assert submitted(variables, additional_parameters={"requeue": True}, **parameters) == others


@pytest.fixture
def sinfo(monkeypatch, tmp_path):
    """`sinfo(*lines)` is a cluster with these partitions, which tells them apart and in full where it is asked to."""

    def say(*lines):
        program = tmp_path / "sinfo"
        asked = '[ -z "$SINFO_PARTITION" ] && echo "$@" | grep -q -- --exact || exit 1'
        program.write_text(f"#!/bin/sh\n{asked}\n" + "".join(f"echo '{line}'\n" for line in lines))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("SINFO_PARTITION", "cpu")

    return say


def test_the_cores_of_a_gpu_are_those_of_the_nodes_that_have_gpus(sinfo):
    sinfo(
        "gpu*|1:00:00|4|64|gpu:a100:8(S:0-1)",
        "gpu*|1:00:00|2|96|gpu:h100:4",
        "gpu*|1:00:00|9|128|(null)",
        "cpu|infinite|3|32|(null)",
        "cpu|infinite|1|64|(null)",
    )
    found = slurm.partitions()
    assert (found["gpu"].cores_per_gpu, found["gpu"].cores, found["gpu"].gpus, found["gpu"].nodes) == (8, 128, 8, 15)
    assert (found["cpu"].cores_per_gpu, found["cpu"].cores, found["cpu"].hours) == (0, 64, math.inf)


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


def test_all_jobs_of_this_user_are_seen_whatever_view_the_user_has_set(monkeypatch, tmp_path):
    program = tmp_path / "squeue"
    program.write_text(
        '#!/bin/sh\n[ -z "$SQUEUE_STATES" ] && echo "$@" | grep -q -- "--user=$(id -u) " && echo "7|/runs/a"\n'
    )
    program.chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SQUEUE_STATES": "R", "LOGNAME": "another"}.items():
        monkeypatch.setenv(name, value)
    assert slurm.jobs() == {Path("/runs/a"): "7"}


def test_memory_is_never_zero_which_would_be_all_of_it():
    from dist_train.config import SlurmConfig

    assert [SlurmConfig(memory_gb=given).megabytes for given in (None, 0.0001, 4)] == [None, 1, 4096]


def test_a_server_without_a_usable_port_is_a_warning(capsys):
    from launch.slurm import _warn_unreachable

    for uri in ("http://host:port", "http://[host"):
        _warn_unreachable(uri)
        assert f"warning: MLflow at {uri} cannot be reached" in capsys.readouterr().out


def test_run_folders_that_cannot_be_written_are_one_line(tmp_path):
    from dist_train.config_file import make_config
    from launch.submission import submit

    (tmp_path / "runs").write_text("")
    config = make_config({"name": "a", "data": {"shards": "d"}, "runs": str(tmp_path / "runs")})
    with pytest.raises(DataError, match=r"runs.*: cannot be written \(Not a directory\); free space"):
        submit([config], config.folder, None)
