#!/usr/bin/env python3
# sbatch accepts #SBATCH only without a space, which the formatter would insert.
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
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from dist_train import slurm
from dist_train.arguments import OVERRIDES, Parser
from dist_train.errors import INTERRUPTED, SlurmError, UserError

if TYPE_CHECKING:
    from launch import submission


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit, or start the ranks if this already runs inside an allocation; returns the exit code."""
    try:
        known, overrides = _parser().parse_known_args(arguments)
        asked = _as_overrides(known)
        # The same file submits and is submitted: inside a job it starts the ranks.
        if "SLURM_JOB_ID" not in os.environ:
            words = sys.argv[1:] if arguments is None else list(arguments)
            return _submit(known, [*asked, *overrides], shlex.join(["python", "-m", "launch.slurm", *words]))
        if asked or known.sweep or known.dry_run or known.follow:
            raise SlurmError(
                f"this is inside job {os.environ['SLURM_JOB_ID']}, where the ranks start immediately: leave out the job's "
                "flags, or unset SLURM_JOB_ID to submit another job"
            )
        slurm.hold_signals()
        # Imported here, since it takes seconds, in which Ctrl-C is no traceback either.
        from launch import allocation

        return allocation.run(known.config, *overrides)
    except UserError as error:
        print(f"launch.slurm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> Parser:
    from dist_train.config import SlurmConfig  # not at the top: Ctrl-C in a slow import is no traceback here

    parser = Parser(
        "python -m launch.slurm",
        description="Train on a SLURM cluster. A job that is preempted or reaches its time limit saves, is requeued and resumes.",
        epilog=f"All flags of the job can also be set in the section slurm of CONFIG. {OVERRIDES}",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, submit nothing")
    parser.add_argument("--follow", action="store_true", help="show the log until the job ends, through requeues")
    parser.add_argument(
        "--sweep", action="append", metavar="KEY=A,B", help="one run per value, as an array; repeatable"
    )
    job = parser.add_argument_group("the job")
    for name, field in SlurmConfig.model_fields.items():
        kind = {"exclusive": {"action": "store_true"}, "setup": {"action": "append", "metavar": "LINE"}}
        kind |= {one: {"action": "append", "metavar": "KEY=VALUE"} for one in ("sbatch", "srun")}
        words = kind.get(name, {"metavar": "X"})
        job.add_argument(f"--{name.replace('_', '-')}", dest=f"slurm.{name}", help=field.description, **words)  # type: ignore[arg-type]
    return parser


def _as_overrides(known: argparse.Namespace) -> list[str]:
    """The job's flags as overrides of the section slurm; text is quoted, so that YAML reads a partition named 1 or on as a word."""
    from dist_train.config import SlurmConfig

    texts = {f"slurm.{name}" for name, field in SlurmConfig.model_fields.items() if _holds_text(field.annotation)}
    return [
        f"--{key}={json.dumps(value) if key in texts else value}"
        for key, value in vars(known).items()
        if key.startswith("slurm.") and value not in (None, False)
    ]


def _holds_text(annotation: Any) -> bool:
    return annotation is str or any(map(_holds_text, get_args(annotation)))


def _submit(known: argparse.Namespace, overrides: list[str], command: str) -> int:
    from dist_train.config_file import load_config
    from launch import follow, grid, submission

    configs = grid.sweep(known.config, overrides, known.sweep or [])
    folder = load_config(known.config, *overrides).folder
    if known.dry_run and not slurm.is_here():
        print("launch.slurm: sbatch is not on this machine: the job is not checked against a cluster", file=sys.stderr)
        for config in configs:
            submission.check_training(config)
    else:
        # Also for a dry run: its script should be one that would be accepted.
        configs = submission.check(configs)
    if known.dry_run:
        print(submission.script(configs, folder))
        return 0
    jobs = submission.submit(configs, folder, command)
    _announce(jobs)
    return follow.follow(jobs) if known.follow else 0


def _warn_unreachable(uri: str) -> None:
    from dist_train.tracking.mlflow import without_password

    try:
        place = urlsplit(uri)
        if place.scheme not in ("http", "https") or not place.hostname:
            return
        socket.create_connection((place.hostname, place.port or {"http": 80, "https": 443}[place.scheme]), 3).close()
    except (OSError, ValueError) as error:  # ValueError: the port is no number, and the job is submitted all the same
        print(
            f"launch.slurm: warning: MLflow at {without_password(uri)} cannot be reached ({error}); the run keeps its metrics, and "
            "dist-train sync RUN sends them later"
        )


def _announce(jobs: Sequence[submission.Submitted]) -> None:
    from dist_train.tracking.mlflow import experiment_name, tracking_uri, ui_command

    for job in jobs:
        print(f"job         {job.job}\nrun folder  {job.config.folder}\nlog         {job.log}")
    config = jobs[0].config
    if uri := tracking_uri(config):
        _warn_unreachable(uri)
        print(f"in MLflow   {ui_command(uri)}  (experiment {experiment_name(config)}, run {config.name})")
    print(f"cancel      scancel {jobs[0].job.partition('_')[0]}")


if __name__ == "__main__":
    sys.exit(main())
