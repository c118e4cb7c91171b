"""The section ``slurm``: the job of a run on a cluster."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated

from pydantic import Field, model_validator

from dist_train.config.base import Positive, Section

FLAG = re.compile(r"[a-z][a-z-]+(=.+)?")
"""A long flag of sbatch or srun, without its dashes."""

OWN_SBATCH = (
    "array",
    "comment",
    "error",
    "gpus",
    "gpus-per-task",
    "job-name",
    "mem",
    "no-requeue",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
    "signal",
    "time",
)
"""Flags of sbatch by which the job and its logs are found again, or that have a field of another name."""

OWN_SRUN = ("export", "mpi", "nodes", "ntasks", "ntasks-per-node", "wait")
"""Flags of srun that a start sets."""


class SlurmConfig(Section):
    """The job of a run on a SLURM cluster, as `python -m launch.slurm` submits it; each field is a flag there."""

    nodes: Positive = 1
    """Nodes."""
    gpus_per_node: Positive | None = None
    """GPUs on each node, with one task per GPU (default: none asked for)."""
    tasks_per_node: Positive | None = None
    """Processes on each node without GPUs (default: one per GPU, or one)."""
    cpus_per_task: Positive | None = None
    """Cores for each process (default: with GPUs those that a node has for each of them, else the cluster's, often one)."""
    hours: Annotated[float, Field(gt=0)] = 24.0
    """Time limit of one start; a job that reaches it saves, is requeued and resumes."""
    partition: str | None = None
    """Partition (default: the cluster's)."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Required node features."""
    reservation: str | None = None
    """Reservation to use."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of each node, in GB (default: the cluster's)."""
    exclusive: bool = False
    """Do not share the nodes with other jobs."""
    dependency: str | None = None
    """Job dependency, for instance afterok:1234."""
    setup: tuple[str, ...] = ()
    """Shell lines to run first: modules, containers, variables."""
    sbatch: tuple[str, ...] = ()
    """Other flags of sbatch, KEY=VALUE or KEY without dashes, for instance mail-type=END."""
    srun: tuple[str, ...] = ()
    """Flags of the srun that starts the ranks, KEY=VALUE or KEY without dashes, for instance container-image=IMAGE."""
    signal_seconds: Positive = 90
    """Seconds before the time limit at which the job is told to save."""
    array_parallelism: Positive = 256
    """Largest number of runs of a sweep at the same time."""

    @model_validator(mode="after")
    def _check(self) -> SlurmConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node is {self.tasks_per_node}; with GPUs there is one task for each of them, leave it out"
            )
        # Told to save as soon as it starts, the job would be requeued again and again.
        if self.signal_seconds >= 60 * self.minutes:
            raise ValueError(
                f"signal_seconds is {self.signal_seconds}, but the time limit (hours) is {60 * self.minutes} seconds; "
                "raise hours, or set fewer signal_seconds"
            )
        fields = {name.replace("_", "-") for name in SlurmConfig.model_fields}
        _check_flags("sbatch", self.sbatch, {*OWN_SBATCH, *fields})
        _check_flags("srun", self.srun, OWN_SRUN)
        return self

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def minutes(self) -> int:
        """The time limit as SLURM takes it, in whole minutes."""
        return max(1, round(60 * self.hours))

    @property
    def megabytes(self) -> int | None:
        """Memory of each node as SLURM takes it; at least one, because zero stands for all that a node has."""
        return max(1, round(1024 * self.memory_gb)) if self.memory_gb else None


def _check_flags(program: str, flags: Collection[str], own: Collection[str]) -> None:
    for flag in flags:
        if not FLAG.fullmatch(flag):
            raise ValueError(
                f"{program} {flag!r}: write a long flag of {program} without its dashes, such as KEY=VALUE"
            )
        name, _, value = flag.partition("=")
        # Other resources than GPUs have no field.
        if name in own or (name == "gres" and "gpu" in value):
            raise ValueError(
                f"{program} {flag}: is set by launch.slurm; the section slurm has fields for what can be chosen"
            )
