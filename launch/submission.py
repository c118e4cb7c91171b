"""A run, or a sweep of runs, as a SLURM job: checked against the cluster, then submitted through submitit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dist_train.config import Config, SlurmConfig
from dist_train.config_file import dump_config, load_config
from dist_train.errors import ConfigError, SlurmError, TrackingError, UserError
from launch import allocation, cluster

NODE_LOCAL = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Submitted:
    """One run of a job: the job's number (``123``, or ``123_4`` in an array), its configuration, its log."""

    job: str
    config: Config
    log: Path


def configs_of(path: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[Config]:
    """The run of a configuration; with ``KEY=A,B`` words of a sweep, one run for each combination of values.

    Raises:
        ConfigError: a word is no sweep, or two combinations would have the same name.
    """
    base = load_config(path, *overrides)
    axes: list[list[tuple[str, str]]] = []
    for word in sweep:
        key, equals, values = word.partition("=")
        if not equals or not all(values.split(",")):
            raise ConfigError(f"--sweep {word}: write --sweep KEY=VALUE,VALUE, for instance --sweep seed=0,1,2")
        axes.append([(key, value) for value in values.split(",")])
    if not axes:
        return [base]
    found: dict[str, Config] = {}
    for point in itertools.product(*axes):
        words = [f"--{key}={value}" for key, value in point]
        name = "-".join([base.name, *(f"{key.rpartition('.')[2]}_{value}" for key, value in point)])
        config = load_config(path, *overrides, *words, "--name", re.sub(r"[^A-Za-z0-9._-]", "_", name))
        if config.name in found:
            raise ConfigError(f"--sweep: two of the runs would be named {config.name}; give each value once")
        found[config.name] = config
    return list(found.values())


def check(configs: Sequence[Config]) -> None:
    """Check the runs as preflight does, and the job against the cluster; raises UserError for the first thing wrong."""
    slurm = configs[0].slurm
    partition = _check_partition(slurm)
    jobs = cluster.jobs()
    for config in configs:
        if config.slurm != slurm:
            raise ConfigError(
                f"{configs[0].name} and {config.name} differ in the section slurm; the runs of an array share one, "
                "submit them one by one"
            )
        try:
            _check_run(config, partition, jobs)
        except UserError as error:
            raise type(error)(f"{config.name}: {error}") if len(configs) > 1 else error from None


def _check_run(config: Config, partition: cluster.Partition, jobs: Mapping[Path, str]) -> None:
    from dist_train.dist import Ranks
    from dist_train.preflight import preflight

    slurm, folder = config.slurm, config.folder.resolve()
    # What a GPU can do is found out on the nodes: here there may be none.
    train = config.train.model_copy(update={"precision": "fp32", "sync_bn": False} if slurm.gpus_per_node else {})
    preflight(config.model_copy(update={"train": train}), Ranks(0, slurm.nodes * slurm.tasks, 0, slurm.tasks))
    if folder in jobs:
        raise SlurmError(f"job {jobs[folder]} works on {config.folder}; scancel {jobs[folder]}, or set another --name")
    _check_folder(folder, partition)


def script(configs: Sequence[Config], folder: Path) -> str:
    """The batch script that :func:`submit` gives to sbatch."""
    executor = _executor(configs, folder)
    if len(configs) > 1:
        executor.parameters["map_count"] = len(configs)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def submit(configs: Sequence[Config], folder: Path, command: str | None) -> list[Submitted]:
    """Submit one job, an array where there are several runs; the configurations are kept.

    Args:
        folder: the run's own, or that of several runs, which is named after them all; the log goes there.
        command: what the user typed, a tag of the MLflow run that the runs of an array are children of; None: no such run.

    Raises:
        SlurmError: sbatch refuses the job; its words are in the message.
    """
    executor = _executor(configs, folder)
    parent = _parent(configs, folder.name, command) if command and len(configs) > 1 else None
    if len(configs) > 1:
        elements = Path(executor.parameters["comment"])
        elements.parent.mkdir(parents=True, exist_ok=True)
        elements.write_text(_elements(configs))
    kept = []
    for config in configs:
        path = config.folder.resolve() / "slurm" / "submitted.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_config(config))  # what is edited while the job waits must not change it
        kept.append(path)
    jobs = start(executor, allocation.run_job, [(str(path), parent) for path in kept])
    return [Submitted(job.job_id, config, job.paths.stdout) for job, config in zip(jobs, configs)]


def start(executor: Any, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Submit calls of a function through a submitit executor, several as an array; gives submitit's jobs.

    Raises:
        SlurmError: sbatch refuses the job; its words are in the message.
    """
    from submitit.core.utils import FailedJobError

    try:
        # submitit shows what sbatch says while it raises it as well.
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            return [executor.submit(function, *call) for call in calls]
    except FailedJobError as error:
        raise SlurmError(cluster.last_line(str(error)).replace("error: ", "")) from None


def _executor(configs: Sequence[Config], folder: Path) -> Any:
    import submitit

    slurm = configs[0].slurm
    options = {"requeue": True}
    if slurm.reservation:
        options["reservation"] = slurm.reservation  # type: ignore[assignment]
    wanted = {
        "job_name": folder.name, "nodes": slurm.nodes, "ntasks_per_node": slurm.tasks, "time": max(1, round(60 * slurm.hours)),
        "gpus_per_node": slurm.gpus_per_node, "cpus_per_task": slurm.cpus_per_task, "partition": slurm.partition,
        "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint, "dependency": slurm.dependency,
        "mem": f"{round(1024 * slurm.memory_gb)}M" if slurm.memory_gb else None, "exclusive": slurm.exclusive or None,
        "setup": list(slurm.setup) or None, "signal_delay_s": slurm.signal_seconds,
        "comment": str(_comment(configs, folder)), "array_parallelism": slurm.array_parallelism,
        # The batch step starts the ranks itself, and is there to requeue the job whatever becomes of them.
        "use_srun": False, "stderr_to_stdout": True, "additional_parameters": options,
    }  # fmt: skip
    executor = submitit.SlurmExecutor(folder.resolve() / "slurm")
    executor.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    return executor


def _comment(configs: Sequence[Config], folder: Path) -> Path:
    """What tells on which run folders a job works, see cluster.jobs; another array has another file."""
    if len(configs) == 1:
        return configs[0].folder.resolve()
    name = hashlib.sha256(_elements(configs).encode()).hexdigest()[:16]
    return folder.resolve() / "slurm" / f"{name}{cluster.ELEMENTS}"


def _elements(configs: Sequence[Config]) -> str:
    return "".join(f"{config.folder.resolve()}\n" for config in configs)


def _parent(configs: Sequence[Config], name: str, command: str) -> str | None:
    from dist_train.tracking import create_parent, tracking_uri

    try:
        parent = create_parent(configs[0], name, {"command": command})
    except TrackingError as error:
        print(f"launch.slurm: warning: the runs of this sweep have no MLflow run in common ({error})")
        return None
    from mlflow.tracking import MlflowClient

    # It stands for the submission, which is done; no process of its own would end it later.
    MlflowClient(tracking_uri=tracking_uri(configs[0])).set_terminated(parent)
    return parent


def _check_partition(slurm: SlurmConfig) -> cluster.Partition:
    cluster.ask("sbatch", "--version")
    offered = cluster.partitions()
    names = ", ".join(offered) or "none"
    default = next((partition.name for partition in offered.values() if partition.default), None)
    wanted = slurm.partition or default
    if wanted not in offered:
        what = f"partition '{wanted}' does not exist" if wanted else "the cluster has no default partition"
        raise SlurmError(f"{what}; sinfo offers {names}; set --partition")
    found = offered[wanted]
    tasks = slurm.tasks * (slurm.cpus_per_task or 1)
    for given, most, flag, what in (
        (slurm.nodes, found.nodes, "--nodes", "nodes"),
        (slurm.gpus_per_node or 0, found.gpus, "--gpus-per-node", "GPUs on a node"),
        (tasks, found.cores, "--tasks-per-node x --cpus-per-task", "cores on a node"),
        (slurm.hours, found.hours, "--hours", "hours at most"),
    ):
        if given > most:
            raise SlurmError(
                f"{flag} is {given:g}, but partition {found.name} has {most:g} {what}; sinfo offers {names}"
            )
    return found


def _check_folder(folder: Path, partition: cluster.Partition) -> None:
    """Refuse a run folder that certainly only this machine sees; others are tried out by the job on its nodes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    mounts = [mount for mount in psutil.disk_partitions(all=True) if existing.is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    local = kind in NODE_LOCAL or any(folder.is_relative_to(place) for place in ("/tmp", "/var/tmp", "/dev/shm"))
    if local and not _only_this_machine(partition):
        raise SlurmError(
            f"{folder}: is on this machine alone, the nodes do not see it; set --runs to a shared file system"
        )


def _only_this_machine(partition: cluster.Partition) -> bool:
    words = ("sinfo", "--noheader", "--Node", f"--partition={partition.name}", "--Format=NodeHost:200")
    return set(cluster.ask(*words).split()) <= {"localhost", "127.0.0.1", socket.gethostname()}
