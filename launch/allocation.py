"""A run inside a SLURM allocation: starts the ranks with srun, and requeues the job when they were stopped or died."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

from dist_train.config import Config
from dist_train.config_file import load_config
from dist_train.errors import SlurmError, UserError
from launch import cluster

STOPPED = 75
"""Exit code of ranks that were asked to stop and have saved; the same as dist_train.cli.STOPPED."""

USER_ERROR = 2
"""Exit code of ranks that cannot run as configured: trying again would not help."""

PAUSES = (5, 15, 60, 240)
"""Seconds between the tries of a requeue while SLURM's controller does not answer."""

ATTEMPTS = 3
"""Failures at the same step after which a job is not requeued any more."""


def run_job(config: str, parent: str | None) -> NoReturn:
    """What a job that launch.slurm has submitted runs in its batch step; ``parent`` is a sweep's MLflow run."""
    if parent:
        from dist_train.tracking import PARENT

        os.environ[PARENT] = parent
    # By SystemExit, submitit writes no result and the job ends with this code.
    sys.exit(run(config))


def run(path: str, *overrides: str) -> int:
    """Train in this allocation, once; returns the ranks' exit code after having requeued the job where that helps."""
    job = _job()
    try:
        config = load_config(path, *overrides)
        code = _train(config, job, [path, *overrides])
    except cluster.Unanswered as error:
        _say(str(error))
        code = 1
    except UserError as error:
        print(f"launch.slurm: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    if code in (0, USER_ERROR):
        return code
    if code != STOPPED and not _may_try_again(config, job, code):
        return code
    _requeue(job)
    return code


def _train(config: Config, job: str, arguments: list[str]) -> int:
    """Start the ranks and wait for them; 128 + N where signal N ended them."""
    _claim(config, job)
    ranks = _start(config, arguments)

    def forward(number: int, frame: object) -> None:
        # srun passes USR2 on to every rank; a signal meant for the batch step alone arrives at the ranks as well.
        ranks.send_signal(signal.SIGUSR2)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, forward)
    code = ranks.wait()
    return 128 - code if code < 0 else code


def _job() -> str:
    """This job's number; in an array that of the element, since the number alone may stand for all of them."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array else os.environ["SLURM_JOB_ID"]


def _claim(config: Config, job: str) -> None:
    """Say in the job's comment on which run folder it works; refuse where another job does."""
    folder = config.folder.resolve()
    other = cluster.job_on(folder)
    if other is not None and other != job:
        raise SlurmError(f"{config.folder}: job {other} works on it; wait, scancel {other}, or set another --name")
    cluster.ask("scontrol", "update", f"JobId={job}", f"Comment={folder}")


def _start(config: Config, arguments: list[str]) -> subprocess.Popen[bytes]:
    nodes = cluster.hosts(os.environ["SLURM_JOB_NODELIST"])
    tasks = _tasks_per_node()
    if len(nodes) > 1:
        _check_shared(config.folder, nodes)
    words = ["srun", "--mpi=none", f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks}"]
    words.append(f"--ntasks-per-node={tasks}")
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # which srun does not take over from the allocation
        words.append(f"--cpus-per-task={cpus}")
    if "SLURM_GPUS_PER_NODE" in os.environ:  # every rank takes the GPU of its local rank
        words.append("--gpu-bind=none")
    with socket.create_server(("", 0)) as probe:  # the batch step runs on the first node
        environment = {"MASTER_ADDR": _address(nodes[0]), "MASTER_PORT": str(probe.getsockname()[1])}
    # In a session of their own, Ctrl-C in an interactive allocation reaches the ranks through here, once.
    return subprocess.Popen(
        [*words, sys.executable, "-m", "dist_train", "train", *arguments],
        env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def _tasks_per_node() -> int:
    """As the allocation was asked for: by tasks, else one for every GPU, else one."""
    wanted = os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("SLURM_GPUS_PER_NODE", "1").rpartition(":")[2]
    tasks = int(re.match(r"\d+", wanted)[0])  # type: ignore[index]
    cores = min(int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", os.environ["SLURM_JOB_CPUS_PER_NODE"]))
    if tasks > cores:
        raise SlurmError(
            f"the allocation has {cores} cores on a node for {tasks} tasks; ask for --ntasks-per-node {tasks} "
            "--cpus-per-task N, or for --exclusive"
        )
    return tasks


def _check_shared(folder: Path, nodes: list[str]) -> None:
    """Refuse a run folder that is another one on some node of the allocation."""
    token = folder.resolve() / f".shared-{uuid.uuid4().hex}"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch()
    script = f"test -e {shlex.quote(str(token))} || echo missing on $SLURMD_NODENAME"
    try:
        words = ["srun", "--mpi=none", "--overcommit", f"--nodes={len(nodes)}", "--ntasks-per-node=1"]
        said = cluster.ask(*words, f"--ntasks={len(nodes)}", "sh", "-c", script)
    finally:
        token.unlink()
    missing = re.findall(r"missing on (\S+)", said)
    if missing:
        raise SlurmError(
            f"{folder}: is not shared between the nodes, {', '.join(sorted(missing))} cannot see it; set --runs to a folder "
            "on a shared file system"
        )


def _address(node: str) -> str:
    """The name or address at which the other nodes find a node."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        match = re.search(r"NodeAddr=(\S+)", cluster.ask("scontrol", "--oneliner", "show", "node", node))
        return match[1] if match else node
    return node


def _requeue(job: str) -> None:
    """Queue this job again, unless SLURM does that by itself (a preemption without grace time) or the user ended it."""
    for pause in (*PAUSES, 0):
        try:
            fields = cluster.job(job)
            if fields.get("BatchFlag") == "0":
                return _say("an interactive allocation cannot be requeued; the same command goes on")
            if fields.get("JobState") != "RUNNING":
                return _say(f"job {job} is {fields.get('JobState', 'gone')}: it is left to SLURM")
            cluster.ask("scontrol", "requeue", job)
        except cluster.Unanswered as error:
            _say(f"not requeued yet ({error})")
            time.sleep(pause)
        else:
            return _say(f"job {job} is requeued and goes on from the last checkpoint")
    return _say(f"job {job} could not be requeued; scontrol requeue {job} does it by hand")


def _may_try_again(config: Config, job: str, code: int) -> bool:
    """Note a failure in the run folder; false, with a report, after too many of this job at the same step."""
    file = config.folder / "slurm" / "failures.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    failures: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    nodes = os.environ["SLURM_JOB_NODELIST"]
    step = _saved_step(config.folder)
    failures.append({"job": job, "step": step, "code": code, "nodes": nodes, "time": time.strftime("%F %T")})
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(failures, indent=1))
    draft.replace(file)
    mine = [failure for failure in failures if failure["job"] == job and failure["step"] == step]
    if len(mine) < ATTEMPTS:
        _say(f"the ranks ended with exit code {code} after the checkpoint of step {step} ({len(mine)} of {ATTEMPTS})")
        return True
    _say(f"{len(mine)} failures after the checkpoint of step {step}, not requeued again; resubmit when it is mended:")
    for failure in mine:
        _say(f"  {failure['time']}  exit code {failure['code']}  nodes {failure['nodes']}")
    _say(f"what the ranks said: {config.folder}/log/rank*.txt and above; all failures: {file}")
    return False


def _saved_step(folder: Path) -> int:
    latest = folder / "checkpoints" / "latest"
    return int(latest.resolve().name.removeprefix("step-")) if latest.exists() else 0


def _say(text: str) -> None:
    print(f"launch.slurm: {text}", flush=True)
