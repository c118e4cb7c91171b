"""``dist-train shards``: makes, checks and indexes shards; ``python -m shards`` under the one name."""

from __future__ import annotations

from shards.__main__ import main


def run(arguments: list[str]) -> int:
    """Run one command of shards; its exit code."""
    return main(arguments)
