"""``dist-train launch``: starts the processes of a run here, over ssh, or on SLURM."""

from __future__ import annotations

import importlib

from dist_train.arguments import Parser

WAYS = ("local", "nodes", "slurm")
"""Each is a module of launch with a function main(arguments), which gives the exit code."""


def run(arguments: list[str]) -> int:
    """Start a run in one of the ways; its exit code."""
    parser = Parser(
        "dist-train launch",
        usage="dist-train launch WAY CONFIG [--section.key value ...]",
        description="Start the processes of a run; dist-train launch WAY --help says what each way takes.",
    )
    parser.add_argument(
        "way", metavar="WAY", choices=WAYS, help="local: this machine; nodes: several over ssh; slurm: a cluster"
    )
    # The rest is for the parser of that way, its --help too.
    known = parser.parse_args(arguments[:1])
    code: int = importlib.import_module(f"launch.{known.way}").main(arguments[1:])
    return code
