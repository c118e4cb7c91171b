"""``dist-train sync``: send MLflow what it does not have yet of a run."""

from __future__ import annotations

from pathlib import Path

from dist_train.arguments import Parser


def run(arguments: list[str]) -> int:
    """Send, and say what was sent."""
    parser = Parser(
        "dist-train sync", description="Send MLflow what it missed of a run; sending again changes nothing."
    )
    parser.add_argument("run", type=Path, help="run folder")
    known = parser.parse_args(arguments)
    from dist_train.tracking.mirror import sync
    from dist_train.tracking.mlflow import without_password

    result = sync(known.run)
    where = f"MLflow at {without_password(result.uri)}"
    print(f"{known.run}: {result.lines} lines sent; {where} has run {result.run_id}, {result.status}")
    return 0
