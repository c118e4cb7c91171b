"""``dist-train tensorboard``: event files for TensorBoard, from what runs have written down."""

from __future__ import annotations

from pathlib import Path

from dist_train.arguments import Parser


def run(arguments: list[str]) -> int:
    """Write the event files, and say how to look at them."""
    parser = Parser(
        "dist-train tensorboard",
        description="Write TensorBoard's event files of runs, from their metrics.jsonl, into RUN/tensorboard; again, to bring "
        "them up to date.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, such as runs/NAME")
    known = parser.parse_args(arguments)
    from dist_train.tracking.tensorboard import write_events

    for folder in known.runs:
        result = write_events(folder)
        print(f"{result.folder}: {result.points} points of {result.metrics} metrics")
    print(f"tensorboard --logdir {known.runs[0].parent}")
    return 0
