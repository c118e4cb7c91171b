"""``dist-train bench``: measure this machine."""

from __future__ import annotations

import importlib

from dist_train.arguments import Parser

BENCHES = ("compare", "data", "eval", "loss", "model", "order", "predict", "shards", "start", "step")
"""What can be measured: each is a module of dist_train.bench with a function run(arguments), which gives the exit code."""


def run(arguments: list[str]) -> int:
    """Run one benchmark; its exit code."""
    parser = Parser(
        "dist-train bench",
        usage="dist-train bench WHAT [--json PATH ...]",
        description="Measure this machine; dist-train bench WHAT --help says what is measured, and how it can be changed.",
    )
    parser.add_argument("what", metavar="WHAT", choices=BENCHES, help=", ".join(BENCHES))
    # The rest is for the parser of that benchmark, its --help too.
    known = parser.parse_args(arguments[:1])
    status: int = importlib.import_module(f"dist_train.bench.{known.what}").run(arguments[1:])
    return status
