"""A run inside a SLURM allocation: starts the ranks with srun, and requeues the job after they were stopped or died."""

from __future__ import annotations

import contextlib
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

from dist_train import slurm
from dist_train.config import Config
from dist_train.config_file import load_config
from dist_train.distributed.launcher import free_port
from dist_train.distributed.lock import RunLock
from dist_train.errors import FAILED, STOPPED, USER_ERROR, SlurmError, StorageError, UserError
from dist_train.files import write_whole
from dist_train.tracking.mirror import end
from dist_train.tracking.mlflow import PARENT
from dist_train.training.checkpoint import newest_step

PAUSES = (5, 15, 60, 240)
"""Pauses in seconds between attempts to requeue while SLURM's controller does not answer."""

ATTEMPTS = 3
"""Failures at the same step after which a job is no longer requeued."""


def run_job(config: str, parent: str | None) -> NoReturn:
    """What a job that launch.slurm has submitted runs in its batch step; ``parent`` is a sweep's MLflow run."""
    if parent:
        os.environ[PARENT] = parent
    # By SystemExit, submitit writes no result and the job ends with this code.
    sys.exit(run(config))


def run(path: str, *overrides: str) -> int:
    """Train in this allocation, once; requeues the job where that helps, and returns the ranks' exit code."""
    job = _job()
    # Of a job that was submitted with --export=NONE.  Every srun would follow it, and start its tasks without any variable.
    os.environ.pop("SLURM_EXPORT_ENV", None)
    try:
        config = load_config(path, *overrides)
        code = _train(config, job, [path, *overrides])
    except slurm.Unanswered as error:
        _say(str(error))
        code = FAILED
    except UserError as error:
        print(f"launch.slurm: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    # Neither gets better by another try.
    if code in (0, USER_ERROR):
        return code
    if code != STOPPED and not _may_try_again(config, job, code):
        return code
    _requeue(job, config.folder)
    return code


def _train(config: Config, job: str, arguments: list[str]) -> int:
    """Start the ranks and wait for them; 128 + N where signal N ended them, STOPPED where they were asked to stop."""
    ranks: subprocess.Popen[bytes] | None = None
    asked = False

    def forward(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        # srun passes USR2 on to every rank; a signal meant for the batch step alone arrives at the ranks as well.
        if ranks:
            ranks.send_signal(signal.SIGUSR2)

    # Before anything that takes time: a signal would end this process, and nobody would requeue the job.
    slurm.take_signals(forward)
    _claim(config, job)
    # Here as well as in rank 0, whose exit code is lost where srun has to kill the ranks that wait for it.
    RunLock(config.folder).refuse_if_held(say=_say)
    if asked:
        return STOPPED
    ranks = _start(config, arguments)
    if asked:
        ranks.send_signal(signal.SIGUSR2)
    code = ranks.wait()
    code = 128 - code if code < 0 else code
    # Where the signal came before the ranks could take it, they had nothing to save.
    return STOPPED if asked and code == 128 + signal.SIGUSR2 else code


def _job() -> str:
    """This job's number; in an array that of the element, since the number alone may stand for all of them."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array else os.environ["SLURM_JOB_ID"]


def _claim(config: Config, job: str) -> None:
    """Record the run folder in the job's comment; refuse if another job trains in that folder."""
    folder = config.folder.resolve()
    other = slurm.job_on(folder)
    if other is not None and other != job:
        raise SlurmError(
            f"{config.folder}: job {other} is training in it; wait, scancel {other}, or set another --name"
        )
    slurm.ask("scontrol", "update", f"JobId={job}", f"Comment={folder}")


def _start(config: Config, arguments: list[str]) -> subprocess.Popen[bytes]:
    nodes = slurm.hosts(os.environ["SLURM_JOB_NODELIST"])
    tasks = _tasks_per_node(len(nodes))
    _say(f"nodes: {len(nodes)}, processes on each: {tasks}")
    # Tried for real: the name of a file system does not tell whether all nodes mount it.
    if len(nodes) > 1:
        _check_shared(config.folder, nodes)
    words = ["srun", "--mpi=none", f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks}"]
    # When a rank dies the others write their reports; those that cannot notice it are ended a minute later.
    words += [f"--ntasks-per-node={tasks}", "--export=ALL", "--wait=60"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not inherit it from the allocation
        words.append(f"--cpus-per-task={cpus}")
    # Every rank takes the GPU of its local rank.
    if {"SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_ON_NODE"} & os.environ.keys():
        words.append("--gpu-bind=none")
    words += [f"--{flag}" for flag in config.slurm.srun]
    # A free port of this machine: the batch step runs on the first node, which is rank 0's.
    environment = {"MASTER_ADDR": _address(nodes[0]), "MASTER_PORT": str(free_port())}
    # In a session of their own, Ctrl-C in an interactive allocation reaches the ranks through here, once.
    return subprocess.Popen(
        [*words, sys.executable, "-m", "dist_train", "train", *arguments],
        env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def _tasks_per_node(nodes: int) -> int:
    """As the allocation was asked for: by tasks, else one for every GPU, else one."""
    asked = os.environ.get
    # SLURM counts the tasks of each node also where nobody has asked for any; then they are one on each.
    # In a step, such as a shell by srun --pty, they are the step's own.
    counted = asked("SLURM_TASKS_PER_NODE") if asked("SLURM_NTASKS") and not asked("SLURM_STEP_ID") else None
    if wanted := asked("SLURM_NTASKS_PER_NODE") or counted:
        # Such as 8(x2),4: two nodes with 8 tasks and one with 4.
        counts = set(re.sub(r"\(x\d+\)", "", wanted).split(","))
        if len(counts) > 1:
            raise SlurmError(
                f"the allocation has unlike numbers of tasks on its nodes, {wanted}; ask for the same on each, with "
                "--ntasks-per-node"
            )
        tasks = int(counts.pop())
    else:
        tasks = _gpus_per_node(nodes) or 1
    cores = min(int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", os.environ["SLURM_JOB_CPUS_PER_NODE"]))
    if tasks > cores:
        raise SlurmError(
            f"the allocation has {cores} cores on a node for {tasks} tasks; ask for --ntasks-per-node {tasks} "
            "--cpus-per-task N, or for --exclusive"
        )
    return tasks


def _gpus_per_node(nodes: int) -> int:
    total = _gpus("SLURM_GPUS")
    # Of this node, the first one, where they were asked for by --gres or --gpus; salloc tells the total alone.
    gpus = _gpus("SLURM_GPUS_PER_NODE") or _gpus("SLURM_GPUS_ON_NODE") or total // nodes
    if total not in (0, gpus * nodes):
        raise SlurmError(
            f"the allocation has {total} GPUs, but not the same number on each of its {nodes} nodes; ask for "
            "--gpus-per-node"
        )
    return gpus


def _gpus(name: str) -> int:
    """GPUs that a variable tells, such as 8, a100:8 or a100:4,v100:4; 0 where it is not set."""
    counts = re.findall(r"(?:^|[:,])(\d+)(?=,|$)", os.environ.get(name, ""))
    return sum(map(int, counts))


def _check_shared(folder: Path, nodes: list[str]) -> None:
    """Refuse a run folder that is not the same folder on every node of the allocation."""
    token = folder.resolve() / f".shared-{uuid.uuid4().hex}"
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        # Of a class that is requeued: a file system that is full or away now may be there for the next start.
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror}); free space, or set another --runs"
        ) from None
    script = f"test -e {shlex.quote(str(token))} || echo missing on $SLURMD_NODENAME"
    try:
        words = ["srun", "--mpi=none", "--overcommit", f"--nodes={len(nodes)}", "--ntasks-per-node=1"]
        said = slurm.ask(*words, f"--ntasks={len(nodes)}", "sh", "-c", script)
    finally:
        # What is left there harms nobody.
        with contextlib.suppress(OSError):
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
        match = re.search(r"NodeAddr=(\S+)", slurm.ask("scontrol", "--oneliner", "show", "node", node))
        return match[1] if match else node
    return node


def _requeue(job: str, folder: Path) -> None:
    """Requeue this job, unless SLURM does so itself (preemption without grace time) or the user cancelled it."""
    for pause in (*PAUSES, 0):
        try:
            fields = slurm.job(job)
            if fields.get("BatchFlag") == "0":
                return _say("an interactive allocation cannot be requeued; run the same command again to resume")
            if fields.get("JobState") != "RUNNING":
                _end_in_mlflow(folder)
                return _say(f"job {job} is {fields.get('JobState', 'gone')}: SLURM decides what happens to it")
            slurm.ask("scontrol", "requeue", job)
        except slurm.Unanswered as error:
            _say(f"not requeued yet ({error})")
            time.sleep(pause)
        else:
            return _say(f"job {job} is requeued and resumes from the last checkpoint")
    return _say(f"job {job} could not be requeued; to do it by hand: scontrol requeue {job}")


def _end_in_mlflow(folder: Path) -> None:
    """Nobody may ever resume this run: it must not look as if it were running.  A resume sets it to RUNNING again."""
    try:
        end(folder, "KILLED")
    except (OSError, UserError) as error:
        _say(str(error))


def _may_try_again(config: Config, job: str, code: int) -> bool:
    """Record a failure in the run folder; false, with a report, after too many by this job at the same step."""
    file = config.folder / "slurm" / "failures.json"
    try:
        failures: list[dict[str, Any]] = json.loads(file.read_text())
    except (OSError, ValueError):  # none so far, or damaged: a job that could be requeued is not to end by it
        failures = []
    nodes = os.environ["SLURM_JOB_NODELIST"]
    step = newest_step(config.folder)
    failures.append({"job": job, "step": step, "code": code, "nodes": nodes, "time": time.strftime("%F %T")})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(failures, indent=1))
    except OSError as error:
        # Perhaps the full disk that the ranks have ended for (exit code 74), where a requeue is what helps.
        _say(f"{file}: cannot be written ({error.strerror}), so that later starts will not know of this failure")
    # Only failures of this job: a resubmitted one has its own attempts.
    mine = [failure for failure in failures if failure["job"] == job and failure["step"] == step]
    # Progress between failures starts the count again: a flaky node must not end a long run.
    if len(mine) < ATTEMPTS:
        _say(f"the ranks ended with exit code {code} after the checkpoint of step {step} ({len(mine)} of {ATTEMPTS})")
        return True
    _say(f"{len(mine)} failures after the checkpoint of step {step}, not requeued again; fix the cause, then resubmit:")
    for failure in mine:
        _say(f"  {failure['time']}  exit code {failure['code']}  nodes {failure['nodes']}")
    _say(f"logs of the ranks: {config.folder}/log/rank*.txt and above; all failures: {file}")
    return False


def _say(text: str) -> None:
    # The log may be on the full disk that is reported, which must not keep the job from being requeued.
    with contextlib.suppress(OSError):
        print(f"launch.slurm: {text}", flush=True)
