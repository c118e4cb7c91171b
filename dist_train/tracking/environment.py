"""The environment of a run: versions, machine, command, the user's commit."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field

import torch

from dist_train.distributed.group import Ranks
from dist_train.distributed.launcher import is_command_line
from dist_train.tracking.mlflow import without_password
from shards.index import Index

PACKAGES = ("dist-train", "torch", "deepspeed", "nvidia-dali-cuda130", "webdataset", "mlflow", "submitit", "triton")


@dataclass(frozen=True)
class Environment:
    """Kept as ``env.json`` in the run folder."""

    command: list[str]
    versions: dict[str, str]
    hosts: list[str]
    """Of every process, in the order of the ranks."""
    processes: int
    device: str
    nodes: int
    commit: str | None
    user: str
    job: str | None
    array_job: str | None
    data: dict[str, str] = field(default_factory=dict)

    def json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1)

    @property
    def tags(self) -> dict[str, str]:
        """As tags of an MLflow run: what may change from one start of a run to the next."""
        tags = {
            "command": without_password(shlex.join(self.command)),
            "hosts": ", ".join(dict.fromkeys(self.hosts)),
            "nodes": str(self.nodes),
            "processes": str(self.processes),
            "device": self.device,
            "user": self.user,
        }
        optional = {"commit": self.commit, "slurm_job": self.job, "slurm_array_job": self.array_job}
        return tags | self.data | {key: value for key, value in optional.items() if value}


def describe_environment(ranks: Ranks, hosts: list[str]) -> Environment:
    """The environment of this process, among those on these hosts."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    )
    return Environment(
        # As the user would type it, whatever launcher has added before it; of a program of the user's, that program.
        command=["dist-train" if is_command_line() else sys.argv[0], *sys.argv[1:]],
        versions={"python": platform.python_version()} | installed_versions(),
        hosts=hosts,
        processes=ranks.world_size,
        device=device,
        nodes=max(1, ranks.world_size // ranks.local_world_size),
        commit=_commit(),
        user=_user(),
        job=os.environ.get("SLURM_JOB_ID"),
        array_job=os.environ.get("SLURM_ARRAY_JOB_ID"),
    )


def describe_data(train: Index, val: Index) -> dict[str, str]:
    """What distinguishes the data of two runs: classes, size, and a prefix of both splits' fingerprints."""
    return {
        "classes": str(len(train.classes)),
        "train_images": str(len(train)),
        "val_images": str(len(val)),
        "train_data": train.fingerprint[:12],
        "val_data": val.fingerprint[:12],
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter, "missing" where one is not installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, whose user may have no name
        return str(os.getuid())


def _commit() -> str | None:
    try:
        # Of the current folder: the commit of the user's code, not of this package.
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
