"""``dist-train watch``: how a run is doing, while it trains or after it has ended."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from dist_train.arguments import Parser
from dist_train.errors import DataError
from dist_train.hub import is_address


def run(arguments: list[str]) -> int:
    """Show the run until it ends."""
    parser = Parser(
        "dist-train watch",
        description="Show how a run is doing until it ends: loss, exits, temperature, throughput, time left. It reads the run "
        "folder alone, needs no MLflow, and leaves the run as it is; a run that has not started is waited for. Ctrl-C leaves.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/NAME")
    parser.add_argument(
        "--html", action="store_true", help="write RUN/live.html as well, a page that a browser keeps current by itself"
    )
    known = parser.parse_args(arguments)
    from dist_train.tracking.progress import Board
    from dist_train.tracking.watch import follow

    if is_address(known.run):
        raise DataError(
            f"{known.run}: is a network on the Hub, where nothing trains; give a run folder, such as runs/NAME"
        )
    # A start makes the folder with its lock; what exists and has neither is no run that will start.
    if known.run.exists() and not any((known.run / name).exists() for name in ("config.yaml", "lock")):
        raise DataError(f"{known.run}: is no run folder (no config.yaml); give one, such as runs/NAME")
    live = None
    if known.html:
        # Matplotlib takes half a second to load.
        from dist_train.tracking.live import LivePage

        live = LivePage(known.run)
        print(f"page: {live.path}", flush=True)
    said = False
    with Board() as board, live or contextlib.nullcontext():
        for watched, entries in follow(known.run):
            for line in board.show(watched, entries):
                print(line, flush=True)
            if live is None:
                continue
            try:
                live.show(watched)
            except OSError as error:
                # Said once; a disk that is full now may have room later.
                if not said:
                    print(f"{live.path}: cannot be written ({error.strerror}); looking on", file=sys.stderr, flush=True)
                said = True
    return 0
