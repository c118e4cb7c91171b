"""``dist-train compare``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from dist_train.arguments import Parser
from dist_train.compare.files import publish
from dist_train.compare.grouping import compare
from dist_train.compare.runs import read_folder, read_store
from dist_train.errors import ConfigError

EPILOG = """\
Runs that differ only in their seed are one group; differences are against the group of the first run, at equal seeds.

  dist-train compare runs/a runs/b
  dist-train compare --experiment dist_train --filter "params.loss.teachers = 'later'"
"""


def run(arguments: list[str]) -> int:
    """Compare and print; 0, or UserError."""
    parser = Parser(
        "dist-train compare",
        description="Compare runs: settings, accuracy per exit, cost, curves.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--experiment", metavar="NAME", help="instead of folders: the runs of this MLflow experiment")
    parser.add_argument("--filter", default="", metavar="TEXT", help="MLflow's search filter (default: all runs)")
    parser.add_argument("--uri", help="MLflow's store (default: MLFLOW_TRACKING_URI, or sqlite:///runs/mlflow.db)")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder that is written (default: comparison)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a comparison of other runs in that folder")
    parser.add_argument("--title", help="title of the comparison (default: the name of --out)")
    parser.add_argument("--no-track", action="store_true", help="do not log the comparison as a run in MLflow")
    known = parser.parse_args(arguments)
    if bool(known.runs) == bool(known.experiment):
        raise ConfigError(
            "give either run folders, or --experiment NAME; for instance dist-train compare runs/a runs/b"
        )
    if known.experiment:
        uri = known.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
        runs = read_store(uri, known.experiment, known.filter)
    elif known.filter or known.uri:
        raise ConfigError("--filter and --uri select runs in MLflow; give --experiment NAME instead of run folders")
    else:
        # A run that is given twice would count as two with its seed.
        runs = [read_folder(folder) for folder in dict.fromkeys(map(Path, known.runs))]
    command = shlex.join(["dist-train", "compare", *arguments])
    comparison = compare(runs, known.title or known.out.resolve().name)
    publish(comparison, known.out, command, tracked=not known.no_track, overwrite=known.overwrite)
    return 0
