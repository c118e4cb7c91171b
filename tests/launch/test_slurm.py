"""On a real SLURM a run loses no step: signalled, preempted, out of time, on a node that dies; and bad requests are refused."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_train.config_file import dump_config, make_config
from dist_train.tracking.metrics import read_metrics
from tests.common import LIMIT, ROOT

STEPS = 88  # two epochs of the digits


class Runs:
    """Starts runs that differ in their names alone, and looks at what became of them."""

    def __init__(self, slurm, folder, digits):
        self.slurm = slurm
        self.folder = folder
        self.config = folder / "slow.yaml"
        fields = {
            "runs": str(folder),
            "data": {"shards": str(digits), "flip": False},
            "model": {"name": "slow:network", "exits": ["body"]},
            "train": {"global_batch": 32, "micro_batch": 16, "epochs": 2, "precision": "fp32"},
            "checkpoint": {"every_steps": 10},
            "tracking": {"log_every": 1},
        }
        self.config.write_text(dump_config(make_config(fields)))

    def command(self, words, slow=0.0, **more):
        environment = self.slurm.environment | {
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "SLOW": str(slow),
            **more,
        }
        return subprocess.run(
            list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
        )

    def launch(self, name, *flags, **more):
        words = [sys.executable, "-m", "launch.slurm", "--cpus-per-task", "1", self.config, *flags, "--name", name]
        return self.command(words, **more)

    def submit(self, name, *flags, **more):
        result = self.launch(name, *flags, **more)
        assert result.returncode == 0, result.stderr
        assert "scancel" in result.stdout
        return re.search(r"job +(\d+)", result.stdout)[1]

    def steps(self, name):
        path = self.folder / name / "metrics.jsonl"
        return [e["batch"] for e in read_metrics(path) if "train/loss" in e["metrics"]] if path.exists() else []

    def wait_for_steps(self, name, number=3):
        self.wait(lambda: len(self.steps(name)) >= number, name)

    def wait_for_end(self, name, job):
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait(lambda: self.slurm.job(job).get("JobState") in ended, name)
        return self.slurm.job(job)

    def wait(self, done, name, seconds=LIMIT):
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.2)

    def log(self, name):
        return "\n".join(path.read_text() for path in self.folder.glob(f"{name}/slurm/*.out"))

    def weights(self, name):
        return load_file(self.folder / name / "checkpoints" / "latest" / "model.safetensors")

    def check_whole(self, name):
        """The run is the uninterrupted one: every step once, every evaluation once, and the same weights bit for bit."""
        assert self.steps(name) == list(range(1, STEPS + 1)), self.log(name)
        lines = read_metrics(self.folder / name / "metrics.jsonl")
        assert [e["batch"] for e in lines if "val/mean_top1" in e["metrics"]] == [STEPS // 2, STEPS]
        expected, found = self.weights("reference"), self.weights(name)
        assert all(expected[key].equal(found[key]) for key in expected)

    def mlflow(self, name):
        """The MLflow run of that name, of which there is one only."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("dist_train").experiment_id
        found = client.search_runs([experiment], filter_string=f"tags.mlflow.runName = '{name}'")
        assert len(found) == 1, self.log(name)
        return client, found[0]


@pytest.fixture(scope="module")
def runs(slurm, digits, tmp_path_factory):
    """Runs that start together, since most of their time is waiting; "reference" is that of launch.local."""
    runs = Runs(slurm, tmp_path_factory.mktemp("runs"), digits)
    local = runs.command([sys.executable, "-m", "launch.local", "-n", "2", runs.config, "--name", "reference"])
    assert local.returncode == 0, local.stdout + local.stderr
    two_minutes = ("--hours", 2 / 60, "--signal-seconds", "20")
    runs.limited = runs.submit("limited", "--nodes", "2", *two_minutes, slow=1.2)
    runs.signalled = runs.submit("signalled", "--nodes", "2", slow=0.4)
    sbatch = runs.command(
        [
            "sbatch",
            "--parsable",
            "--partition=low",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
            f"--output={runs.folder}/batch.out",
            ROOT / "launch" / "slurm.py",
            runs.config,
            "--name",
            "batch",
        ],
        slow=0.8,
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert sbatch.returncode == 0, sbatch.stderr
    runs.batch = sbatch.stdout.strip()
    runs.wait_for_steps("signalled")
    runs.twice = runs.launch("signalled")
    slurm("scancel", "--signal=USR2", runs.signalled)
    runs.wait_for_steps("batch")
    idle = int(slurm("sinfo", "-h", "-n", "x1", "-p", "keep", "-O", "CPUsState").split("/")[1])
    wanted = f"--cpus-per-task={idle + 1}"  # which takes the preemption of a job of one core
    slurm("sbatch", "--nodes=2", "--ntasks-per-node=1", wanted, "--output=/dev/null", "--wrap", "sleep 1")
    (runs.folder / "die").touch()
    runs.dying = runs.submit("dying", "--tasks-per-node", "2", DIE=str(runs.folder / "die"))
    return runs


def test_a_signalled_job_saves_is_requeued_once_and_goes_on_as_the_same_run(runs):
    assert runs.twice.returncode == 2
    assert f"job {runs.signalled} is training in" in runs.twice.stderr
    job = runs.wait_for_end("signalled", runs.signalled)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), runs.log("signalled")
    assert runs.log("signalled").count("stopped by SIGUSR2") == 1
    runs.check_whole("signalled")
    client, run = runs.mlflow("signalled")
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == list(
        range(1, STEPS + 1)
    )
    assert (run.data.tags["slurm_job"], run.data.tags["nodes"]) == (runs.signalled, "2")
    assert {"hosts", "commit", "command"} <= run.data.tags.keys()


def test_the_file_is_a_batch_script_and_survives_a_preemption(runs):
    job = runs.wait_for_end("batch", runs.batch)
    said = (runs.folder / "batch.out").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count("stopped by SIGTERM") == 1
    runs.check_whole("batch")
    runs.mlflow("batch")


def test_a_sweep_is_an_array_of_runs_with_one_mlflow_parent(runs):
    result = runs.launch(
        "sweep", "--sweep", "seed=0,1", "--sweep", "optim.lr=0.1,0.2", "--follow", "--train.max_steps", "2"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    names = [f"sweep-seed_{seed}-lr_{lr}" for seed in (0, 1) for lr in (0.1, 0.2)]
    numbers = re.findall(r"job +(\d+_\d) *$", result.stdout, re.MULTILINE)
    assert [number.partition("_")[2] for number in numbers] == ["0", "1", "2", "3"]
    assert len({number.partition("_")[0] for number in numbers}) == 1
    _, parent = runs.mlflow("sweep")
    for name in names:
        assert f"{name}: 360 images, each once" in result.stdout
        assert runs.steps(name) == [1, 2]
        assert runs.mlflow(name)[1].data.tags["mlflow.parentRunId"] == parent.info.run_id
    for other in names[1:]:
        assert any(not tensor.equal(runs.weights(other)[key]) for key, tensor in runs.weights(names[0]).items())


def test_a_run_that_dies_three_times_at_one_step_is_given_up_with_a_report(runs):
    job = runs.wait_for_end("dying", runs.dying)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "2"), runs.log("dying")
    assert "3 failures after the checkpoint of step 0, not requeued again" in runs.log("dying")
    assert len(json.loads((runs.folder / "dying" / "slurm" / "failures.json").read_text())) == 3


def test_a_job_that_the_user_cancels_does_not_come_back(runs):
    flags = ["--tasks-per-node", "2", "--sbatch", "nice=10", "--srun", "label"]
    job = runs.submit("cancelled", *flags, slow=0.5)
    runs.wait_for_steps("cancelled")
    assert runs.slurm.job(job)["Nice"] == "10"
    assert re.search(r"^0: step 1/", runs.log("cancelled"), re.MULTILINE)
    runs.slurm("scancel", job)
    assert runs.wait_for_end("cancelled", job)["Restarts"] == "0"
    # SLURM calls the job cancelled at once; its batch step then still has its grace time to tell MLflow.
    runs.wait(lambda: runs.mlflow("cancelled")[1].info.status == "KILLED", "cancelled")
    # COMPLETING is what SLURM calls it as long as the batch step runs.
    said = re.compile(rf"job {job} is (CANCELLED|COMPLETING): SLURM decides what happens to it")
    runs.wait(lambda: said.search(runs.log("cancelled")), "cancelled")
    runs.wait(lambda: runs.slurm.job(job)["JobState"] == "CANCELLED", "cancelled")


def test_a_job_at_its_time_limit_saves_and_goes_on(runs):
    job = runs.wait_for_end("limited", runs.limited)
    assert job["JobState"] == "COMPLETED", runs.log("limited")
    assert int(job["Restarts"]) >= 1  # the limit hits again where the machine is slow
    runs.check_whole("limited")
    runs.mlflow("limited")


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint_only(runs):
    number = runs.submit("widowed", "--nodes", "2", slow=0.2)
    runs.wait_for_steps("widowed", 14)
    runs.slurm.kill_node("x2")
    runs.wait(lambda: runs.slurm.job(number)["Restarts"] == "1", "widowed")
    runs.slurm.start_node("x2")
    job = runs.wait_for_end("widowed", number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), runs.log("widowed")
    assert re.search(r"resumed from .*step [1-9]", runs.log("widowed"))
    runs.check_whole("widowed")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--partition", "fast"], "partition 'fast' does not exist; sinfo offers keep, low, far, reserved"),
        (["--partition", "far", "--gpus-per-node", "8"], "far has 4 GPUs on a node"),
        (["--partition", "far", "--hours", "3"], "far has 1 hours at most"),
        (["--nodes", "3"], "keep has 2 nodes"),
        (["--partition", "far", "--hours", "1"], "exists on this machine only"),
        (["--constraint", "gold"], "sbatch: "),
        (["--sweep", "seed"], "write --sweep KEY=VALUE,VALUE"),
        (["--train.global_batch", "33"], "train.global_batch is 33"),
        (["--sbatch", "--mail-type=END"], "expected one argument"),
        (["--sbatch", "output=x"], "sbatch output=x: is set by launch.slurm"),
        (["--srun", "Image"], "write a long flag of srun without its dashes"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_in_one_line(runs, flags, said):
    before = runs.slurm("squeue", "-h", "-o", "%i")
    result = runs.launch("refused", *flags)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert set(runs.slurm("squeue", "-h", "-o", "%i").split()) <= set(before.split())


def test_without_slurm_the_local_launcher_is_named(runs):
    result = runs.launch("nowhere", PATH="/nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "launch.slurm: sbatch is not on this machine; to train here use python -m launch.local"
    )
    dry = runs.launch("nowhere", "--dry-run", "--sbatch", "mail-type=END", PATH="/nowhere")
    assert dry.returncode == 0, dry.stderr
    assert "is not checked against a cluster" in dry.stderr
    assert "#SBATCH --mail-type=END\n" in dry.stdout


def test_a_dry_run_prints_the_batch_script_and_submits_nothing(runs):
    flags = ["--nodes", "2", "--exclusive", "--memory-gb", "4", "--qos", "normal", "--dependency", "afterok:1"]
    result = runs.launch("dry", *flags, "--setup", "module load cuda", "--dry-run")
    assert result.returncode == 0, result.stderr
    for line in ("--nodes=2", "--exclusive", "--mem=4096M", "--qos=normal", "--dependency=afterok:1", "--requeue"):
        assert f"#SBATCH {line}\n" in result.stdout
    assert "\nmodule load cuda\ntrap - ERR\n" in result.stdout
    assert "dry" not in runs.slurm("squeue", "-h", "-o", "%j").split()


def test_partitions_are_understood_as_sbatch_does(runs):
    for flags, environment, wanted in (
        (["--partition", "far,keep", "--hours", "2"], {}, "--partition=far,keep"),  # only the second one is long enough
        ([], {"SBATCH_PARTITION": "low"}, None),
    ):
        result = runs.launch("partitions", *flags, "--dry-run", **environment)
        assert result.returncode == 0, result.stderr
        assert wanted is None or f"#SBATCH {wanted}\n" in result.stdout
    refused = runs.launch("partitions", "--gpus-per-node", "1", "--dry-run", SBATCH_PARTITION="keep")
    assert "partition keep has 0 GPUs on a node" in refused.stderr
    hidden = runs.launch("partitions", "--partition", "reserved", "--hours", "3", "--dry-run")
    assert "reserved has 1 hours at most" in hidden.stderr


def test_a_sweep_beyond_the_limit_of_arrays_leaves_nothing_behind(runs):
    seeds = ",".join(map(str, range(1002)))
    result = runs.launch("many", "--sweep", f"seed={seeds}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "has 1002 runs, but this cluster's arrays have at most 1001" in result.stderr
    assert not list(runs.folder.glob("many*"))


def test_a_job_without_the_users_variables_or_from_inside_a_job_trains_all_the_same(runs):
    inside = {"SLURM_NTASKS": "7", "SLURM_NNODES": "3", "SLURM_CPUS_PER_TASK": "2", "SLURM_EXPORT_ENV": "NONE"}
    # The job finds no module of the tests, since PYTHONPATH is one of the variables that it lacks.
    network = ("--model", "{name: resnet, exits: [stages.0], blocks: [1, 1], width: 4}")
    job = runs.submit("exported", "--nodes", "2", *network, "--train.max_steps", "4", SBATCH_EXPORT="NONE", **inside)
    assert runs.wait_for_end("exported", job)["JobState"] == "COMPLETED", runs.log("exported")
    assert runs.steps("exported") == [1, 2, 3, 4]


def test_a_setup_line_that_fails_ends_the_job_and_is_named(runs):
    job = runs.submit("setup", "--setup", "true", "--setup", "load_no_such_module", "--train.max_steps", "2")
    fields = runs.wait_for_end("setup", job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), runs.log("setup")
    assert "launch.slurm: the setup line failed: load_no_such_module" in runs.log("setup")
    assert not runs.steps("setup")


def test_srun_without_our_launcher_names_it(runs):
    words = [
        "srun",
        "--mpi=none",
        "--ntasks=2",
        "--cpus-per-task=1",
        "--time=3",
        sys.executable,
        "-m",
        "dist_train",
        "train",
    ]
    result = runs.command([*words, runs.config, "--name", "bare"])
    assert "start with sbatch launch/slurm.py or python -m launch.slurm" in result.stderr, result.stderr


def test_plan_warns_where_the_signal_comes_too_late_for_a_step_and_a_save(runs):
    plan = [sys.executable, "-m", "dist_train", "plan", runs.config, "--name", "limited", "--processes", "2"]
    assert "raise slurm.signal_seconds" in runs.command([*plan, "--slurm.signal_seconds", "1"]).stdout
    enough = runs.command(plan)
    assert enough.returncode == 0
    assert "signal_seconds" not in enough.stdout


def test_a_server_that_is_away_is_said_at_submission(runs):
    result = runs.launch("away", "--tracking.uri", "http://127.0.0.1:9", "--train.max_steps", "1")
    assert result.returncode == 0, result.stderr
    assert "warning: MLflow at http://127.0.0.1:9 cannot be reached" in result.stdout
    runs.slurm("scancel", "--name=away")
