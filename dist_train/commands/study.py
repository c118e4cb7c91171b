"""``dist-train study``: a grid of runs, trained here or as a SLURM array, and compared."""

from __future__ import annotations

import argparse
import shlex

from dist_train.arguments import Parser
from launch import study

EPILOG = """\
A study file:

  name: teachers                       # runs/teachers/CELL, MLflow's experiment
  config: quickstart.yaml              # beside the study file
  processes: 2
  prepare: [{makes: data/few, run: python -m shards make digits data/few --per-class 10}]
  set: {train.epochs: 40}              # fields of all cells
  axes:                                # differences are against the first variant of the last axis
    teachers:                          # named variants of one field or several
      labels alone: {loss.teachers: none}
      later exits: {loss.teachers: later}
    optim.lr: [0.05, 0.1]              # or values of the field that the axis is named after
  seeds: [0, 1, 2]
"""


def run(arguments: list[str]) -> int:
    """Train or submit what is missing, then compare; 0, 1 where a cell failed, 75 when asked to stop."""
    parser = Parser(
        "dist-train study",
        description="Train a grid of runs, and compare them; run the same command again to resume.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", metavar="STUDY", help="YAML file, see configs/study_*.yaml")
    parser.add_argument("--show", action="store_true", help="list the cells and what is missing; train nothing")
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="submit what is missing as one SLURM array, by the section slurm of the configuration; else compare",
    )
    known = parser.parse_args(arguments)
    grid = study.load(known.study)
    if known.show:
        print("\n".join(study.status_lines(*grid)))
        return 0
    return study.complete(*grid, on_slurm=known.slurm, command=shlex.join(["dist-train", "study", *arguments]))
