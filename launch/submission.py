"""A run, or a sweep of runs, as a SLURM job: checked against the cluster, then submitted through submitit."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dist_train import slurm
from dist_train.config import Config, SlurmConfig
from dist_train.config_file import dump_config
from dist_train.distributed.group import Ranks
from dist_train.errors import ConfigError, DataError, SlurmError, TrackingError, UserError
from dist_train.tracking.mlflow import create_parent, without_password
from dist_train.training.preflight import check_processes
from launch import allocation

NODE_LOCAL = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Submitted:
    """One run of a job: the job's number (``123``, or ``123_4`` in an array), its configuration, its log."""

    job: str
    config: Config
    log: Path


def check(configs: Sequence[Config]) -> list[Config]:
    """Check the runs as preflight does, and the job against the cluster; gives them with the cores of their GPUs.

    Raises:
        UserError: the first thing that is wrong.
    """
    job = configs[0].slurm
    partition = _check_partition(job)
    if len(configs) > (most := slurm.max_array_size()):
        raise SlurmError(
            f"the sweep has {len(configs)} runs, but this cluster's arrays have at most {most}; submit it in parts"
        )
    jobs = slurm.jobs()
    for config in configs:
        if config.slurm != job:
            raise ConfigError(
                f"{configs[0].name} and {config.name} differ in the section slurm; the runs of an array share one, "
                "submit them one by one"
            )
        try:
            _check_run(config, partition, jobs)
        except UserError as error:
            # Of the same class, because that decides on the exit code.
            raise type(error)(f"{config.name}: {error}") if len(configs) > 1 else error from None
    cores = _cores(job, partition)
    return [config.model_copy(update={"slurm": job.model_copy(update={"cpus_per_task": cores})}) for config in configs]


def _cores(job: SlurmConfig, partition: slurm.Partition) -> int | None:
    """The cores of each task: where none are asked for, those that a node of the partition has for each GPU."""
    if job.cpus_per_task or not job.gpus_per_node:
        return job.cpus_per_task
    if partition.cores_per_gpu < 2:
        print(
            f"launch.slurm: warning: partition {partition.name} does not tell how many cores a GPU has, and SLURM often gives one "
            "to a task, which decodes some hundred photos a second; set --cpus-per-task"
        )
        return None
    return partition.cores_per_gpu


def _check_run(config: Config, partition: slurm.Partition, jobs: Mapping[Path, str]) -> None:
    check_training(config)
    folder = config.folder.resolve()
    if folder in jobs:
        raise SlurmError(
            f"job {jobs[folder]} is training in {config.folder}; scancel {jobs[folder]}, or set another --name"
        )
    _check_folder(folder, partition)


def check_training(config: Config) -> None:
    """Check a run as preflight does, but for what only its nodes can tell.

    Raises:
        UserError: the first thing that is wrong.
    """
    job = config.slurm
    # What the GPUs support is checked on the nodes: this machine may have none.
    if job.gpus_per_node:
        train = config.train.model_copy(update={"precision": "fp32", "sync_bn": False})
        data = config.data.model_copy(update={"decoder": "auto"})
        config = config.model_copy(update={"train": train, "data": data})
    check_processes(config, Ranks(0, job.nodes * job.tasks, 0, job.tasks))


def script(configs: Sequence[Config], folder: Path) -> str:
    """The batch script that :func:`submit` gives to sbatch."""
    return slurm.script(_executor(configs, folder), len(configs))


def submit(configs: Sequence[Config], folder: Path, command: str | None) -> list[Submitted]:
    """Submit one job, an array where there are several runs; the configurations are kept.

    Args:
        folder: the run's own, or that of several runs, which is named after them all; the log goes there.
        command: what the user typed, a tag of the MLflow run that the runs of an array are children of; None: no such run.

    Raises:
        SlurmError: sbatch refuses the job; its words are in the message.
        DataError: the run folders cannot be written.
    """
    executor = _executor(configs, folder)
    parent = _parent(configs, folder.name, command) if command and len(configs) > 1 else None
    try:
        kept = _keep(configs, executor)
        jobs = slurm.submit(executor, allocation.run_job, [(str(path), parent) for path in kept])
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); free space, or set another folder of runs"
        ) from None
    return [Submitted(job.job_id, config, job.paths.stdout) for job, config in zip(jobs, configs)]


def _keep(configs: Sequence[Config], executor: Any) -> list[Path]:
    """Write what the jobs will read: their configurations, whose paths these are, and what an array works on."""
    # Named in the job's comment before the array exists, so that a second submission finds its folders taken.
    if len(configs) > 1:
        elements = Path(executor.parameters["comment"])
        elements.parent.mkdir(parents=True, exist_ok=True)
        elements.write_text(_elements(configs))
    # Kept before the jobs exist: a job can start while the others are still being submitted.
    kept = []
    for config in configs:
        path = config.folder.resolve() / "slurm" / "submitted.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_config(config))  # what is edited while the job waits must not change it
        kept.append(path)
    return kept


def _executor(configs: Sequence[Config], folder: Path) -> Any:
    job = configs[0].slurm
    options = {"requeue": True, **slurm.flags(job.sbatch)}
    if job.reservation:
        options["reservation"] = job.reservation
    wanted = {
        "job_name": folder.name,
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks,
        "time": job.minutes,
        "gpus_per_node": job.gpus_per_node,
        "cpus_per_task": job.cpus_per_task,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "dependency": job.dependency,
        "mem": f"{job.megabytes}M" if job.megabytes else None,
        "exclusive": job.exclusive or None,
        "setup": _setup(job),
        "signal_delay_s": job.signal_seconds,
        "comment": str(_comment(configs, folder)),
        "array_parallelism": job.array_parallelism,
        # The batch step starts the ranks itself, and survives them to requeue the job.
        "use_srun": False,
        "stderr_to_stdout": True,
        "additional_parameters": options,
    }
    return slurm.executor(
        folder.resolve() / "slurm",
        holds_signals=True,
        **{key: value for key, value in wanted.items() if value is not None},
    )


def _setup(job: SlurmConfig) -> list[str] | None:
    """The lines that run first; one that fails ends the job, which would otherwise train in another environment."""
    if not job.setup:
        return None
    trap = 'echo "launch.slurm: the setup line failed: $BASH_COMMAND" >&2; exit 2'
    return [f"trap '{trap}' ERR", *job.setup, "trap - ERR"]


def _comment(configs: Sequence[Config], folder: Path) -> Path:
    """What tells on which run folders a job works, see slurm.jobs; another array has another file."""
    if len(configs) == 1:
        return configs[0].folder.resolve()
    name = hashlib.sha256(_elements(configs).encode()).hexdigest()[:16]
    return folder.resolve() / "slurm" / f"{name}{slurm.ELEMENTS}"


def _elements(configs: Sequence[Config]) -> str:
    return "".join(f"{config.folder.resolve()}\n" for config in configs)


def _parent(configs: Sequence[Config], name: str, command: str) -> str | None:
    try:
        return create_parent(configs[0], name, {"command": without_password(command)})
    except TrackingError as error:
        print(f"launch.slurm: warning: the runs of this sweep get no common parent run in MLflow ({error})")
        return None


def _check_partition(job: SlurmConfig) -> slurm.Partition:
    # First, because without SLURM on this machine it says so in one line.
    slurm.ask("sbatch", "--version")
    offered = slurm.partitions()
    default = next((partition.name for partition in offered.values() if partition.default), "")
    # As sbatch will: where the job says the partition itself, slurm.submit hides the variable from it.
    wanted = job.partition or os.environ.get("SBATCH_PARTITION") or default
    if not wanted:
        raise SlurmError(f"the cluster has no default partition; sinfo offers {_names(offered)}; set --partition")
    problems = []
    # SLURM takes the first of several partitions that the job fits in.
    for name in wanted.split(","):
        try:
            return _check_fits(job, name, offered)
        except SlurmError as error:
            problems.append(error)
    raise problems[0]


def _names(offered: Mapping[str, slurm.Partition]) -> str:
    return ", ".join(offered) or "none"


def _check_fits(job: SlurmConfig, name: str, offered: Mapping[str, slurm.Partition]) -> slurm.Partition:
    """The partition of this name, in which a job fits."""
    if name not in offered:
        raise SlurmError(f"partition '{name}' does not exist; sinfo offers {_names(offered)}; set --partition")
    found = offered[name]
    tasks = job.tasks * (job.cpus_per_task or 1)
    for given, most, flag, what in (
        (job.nodes, found.nodes, "--nodes", "nodes"),
        (job.gpus_per_node or 0, found.gpus, "--gpus-per-node", "GPUs on a node"),
        (tasks, found.cores, "--tasks-per-node x --cpus-per-task", "cores on a node"),
        (job.hours, found.hours, "--hours", "hours at most"),
    ):
        if given > most:
            raise SlurmError(
                f"{flag} is {given:g}, but partition {found.name} has {most:g} {what}; sinfo offers {_names(offered)}"
            )
    return found


def _check_folder(folder: Path, partition: slurm.Partition) -> None:
    """Refuse a run folder that only this machine can see; the job itself checks the others on its nodes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    mounts = [mount for mount in psutil.disk_partitions(all=True) if existing.is_relative_to(mount.mountpoint)]
    # The innermost mount is the one that the folder is on.
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    local = kind in NODE_LOCAL or any(folder.is_relative_to(place) for place in ("/tmp", "/var/tmp", "/dev/shm"))
    if local and not _only_this_machine(partition):
        raise SlurmError(
            f"{folder}: exists on this machine only, the nodes cannot see it; set --runs to a folder on a shared file system"
        )


def _only_this_machine(partition: slurm.Partition) -> bool:
    words = ("sinfo", "--noheader", "--Node", f"--partition={partition.name}", "--Format=NodeHost:200")
    return set(slurm.ask(*words).split()) <= {"localhost", "127.0.0.1", socket.gethostname()}
