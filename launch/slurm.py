#!/usr/bin/env python3
# sbatch wants its lines without a space.
# fmt: off
#SBATCH --signal=USR2@90
#SBATCH --requeue
#SBATCH --open-mode=append
# fmt: on
"""Train on a SLURM cluster: submit a run or a sweep; inside an allocation, start the ranks there.

python -m launch.slurm --nodes 4 --gpus-per-node 8 --hours 24 CONFIG [--section.key value ...]
sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 --cpus-per-task 8 launch/slurm.py CONFIG [--section.key value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dist_train.arguments import Parser
from dist_train.config import SlurmConfig
from dist_train.errors import SlurmError, UserError

if TYPE_CHECKING:
    from launch import submission


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit, or start the ranks where this is inside an allocation already; returns the exit code."""
    try:
        known, overrides = _parser().parse_known_args(arguments)
        asked = _as_overrides(known)
        if "SLURM_JOB_ID" not in os.environ:
            return _submit(known, [*asked, *overrides])
        if asked or known.sweep or known.dry_run or known.follow:
            raise SlurmError(
                f"this is inside job {os.environ['SLURM_JOB_ID']}, where the ranks start at once: leave the job's flags "
                "out, or unset SLURM_JOB_ID to submit another job"
            )
        from launch import allocation

        return allocation.run(known.config, *overrides)
    except UserError as error:
        print(f"launch.slurm: {error}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(
        "python -m launch.slurm",
        description="Train on a SLURM cluster. A job that is preempted or reaches its time limit saves and goes on.",
        epilog="Every other flag can stand in the section slurm of CONFIG as well.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, submit nothing")
    parser.add_argument("--follow", action="store_true", help="show the log to the end, through requeues")
    parser.add_argument(
        "--sweep", action="append", metavar="KEY=A,B", help="one run per value, as an array; repeatable"
    )
    job = parser.add_argument_group("the job")
    for name, field in SlurmConfig.model_fields.items():
        kind = {"exclusive": {"action": "store_true"}, "setup": {"action": "append", "metavar": "LINE"}}
        words = kind.get(name, {"metavar": "X"})
        job.add_argument(f"--{name.replace('_', '-')}", dest=f"slurm.{name}", help=field.description, **words)  # type: ignore[arg-type]
    return parser


def _as_overrides(known: argparse.Namespace) -> list[str]:
    """The job's flags as overrides of the section slurm; a partition named 1 or on stays a word in YAML."""
    words = ("partition", "account", "qos", "constraint", "reservation", "dependency", "setup", "exclusive")
    return [
        f"--{key}={json.dumps(value) if key.removeprefix('slurm.') in words else value}"
        for key, value in vars(known).items()
        if key.startswith("slurm.") and value not in (None, False)
    ]


def _submit(known: argparse.Namespace, overrides: list[str]) -> int:
    from dist_train.config_file import load_config
    from launch import follow, submission

    configs = submission.configs_of(known.config, overrides, known.sweep or [])
    folder = load_config(known.config, *overrides).folder
    submission.check(configs)
    if known.dry_run:
        print(submission.script(configs, folder))
        return 0
    command = shlex.join(["python", "-m", "launch.slurm", *sys.argv[1:]])
    jobs = submission.submit(configs, folder, command)
    _announce(jobs)
    return follow.follow(jobs) if known.follow else 0


def _warn_unreachable(uri: str) -> None:
    place = urlsplit(uri)
    if place.scheme not in ("http", "https") or not place.hostname:
        return
    try:
        socket.create_connection((place.hostname, place.port or {"http": 80, "https": 443}[place.scheme]), 3).close()
    except OSError as error:
        print(
            f"launch.slurm: warning: MLflow at {uri} cannot be reached ({error}); the run keeps its metrics, and "
            "dist-train sync RUN sends them later"
        )


def _announce(jobs: Sequence[submission.Submitted]) -> None:
    from dist_train.tracking import tracking_uri, ui_command

    for job in jobs:
        print(f"job         {job.job}\nrun folder  {job.config.folder}\nlog         {job.log}")
    config = jobs[0].config
    if uri := tracking_uri(config):
        _warn_unreachable(uri)
        print(f"in MLflow   {ui_command(uri)}  (experiment {config.tracking.experiment}, run {config.name})")
    print(f"cancel      scancel {jobs[0].job.partition('_')[0]}")


if __name__ == "__main__":
    sys.exit(main())
