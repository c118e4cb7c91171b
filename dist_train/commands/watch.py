"""``dist-train watch``: how a run is doing, while it trains or after it has ended."""

from __future__ import annotations

from pathlib import Path

from dist_train.arguments import Parser
from dist_train.errors import DataError


def run(arguments: list[str]) -> int:
    """Show the run until it ends."""
    parser = Parser(
        "dist-train watch",
        description="Show how a run is doing until it ends: loss, exits, temperature, throughput, time left. It reads the run "
        "folder alone, needs no MLflow, and changes nothing; a run that has not started is waited for. Ctrl-C leaves.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/NAME")
    known = parser.parse_args(arguments)
    from dist_train.tracking.progress import Board
    from dist_train.tracking.watch import follow

    # A start makes the folder with its lock; what exists and has neither is no run that will start.
    if known.run.exists() and not any((known.run / name).exists() for name in ("config.yaml", "lock")):
        raise DataError(f"{known.run}: is no run folder (no config.yaml); give one, such as runs/NAME")
    with Board() as board:
        for watched, entries in follow(known.run):
            for line in board.show(watched, entries):
                print(line, flush=True)
    return 0
