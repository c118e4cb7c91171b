"""``metrics.jsonl``, the record of a run: everything else displays or copies it."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dist_train.files import write_whole

OF_THE_MACHINE = ("speed/", "memory/", "train/failed_saves")
"""Begin the names of metrics that say how a step was computed: the same step, computed again, has others."""


class MetricsFile:
    """``metrics.jsonl``: one line ``{"t": milliseconds, "step": N, "batch": N, "metrics": {...}}`` per logged step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[str] = []
        """Lines that could not be written yet."""

    def rewind(self, batch: int, evaluates: bool) -> None:
        """Drop what was logged after a global batch, which will be trained again; drop a torn last line, too.

        With ``evaluates``, drop the evaluation at that batch as well: the checkpoint was written before it.
        """
        if not self.path.exists():
            return

        def is_kept(entry: dict[str, Any] | None) -> bool:
            if entry is None or entry["batch"] > batch:
                return False
            return not evaluates or entry["batch"] < batch or "val/mean_top1" not in entry["metrics"]

        # A kill can cut a line within a character; what is left of the line is no JSON, and goes.
        text = self.path.read_text(errors="replace")
        kept = "".join(f"{line}\n" for line in text.splitlines() if is_kept(parse_line(line)))
        # Also where only the last line's end is missing: what comes next would be appended to it.
        if kept != text:
            write_whole(self.path, kept)

    def add(self, step: int, batch: int, metrics: dict[str, float]) -> None:
        """Take a line, which :meth:`flush` writes."""
        line = json.dumps({"t": int(time.time() * 1000), "step": step, "batch": batch, "metrics": metrics})
        self._unwritten.append(f"{line}\n")

    def flush(self) -> None:
        """Append the lines that are not written yet; raises OSError, and keeps them, if that fails.

        On a full disk nothing is lost while the process lives, and no line is torn.
        """
        if not self._unwritten:
            return
        with self.path.open("ab", buffering=0) as file:
            # Unbuffered, and cut back on failure: a full disk can take part of a line.
            size = file.seek(0, os.SEEK_END)
            data = "".join(self._unwritten).encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(size)
                raise
        self._unwritten.clear()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl."""
    return [entry for line in path.read_text(errors="replace").splitlines() if (entry := parse_line(line)) is not None]


def read_new(file: IO[bytes], offset: int, most: int = -1) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of an open metrics.jsonl from ``offset`` on, at most ``most`` bytes, and the offset behind them."""
    file.seek(offset)
    data = file.read(most)
    # Up to the last whole line: the run may be writing the next one.
    data = data[: data.rfind(b"\n") + 1]
    entries = [entry for line in data.decode(errors="replace").splitlines() if (entry := parse_line(line)) is not None]
    return entries, offset + len(data)


def parse_line(line: str) -> dict[str, Any] | None:
    """One line's content; None for a torn or foreign line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not all(_is_integer(entry.get(key)) for key in ("t", "step", "batch")):
        return None
    metrics = entry.get("metrics")
    numbers = isinstance(metrics, dict) and all(isinstance(one, float) or _is_integer(one) for one in metrics.values())
    return entry if numbers else None


def _is_integer(value: object) -> bool:
    """One of 64 bits, as MLflow and TensorBoard take them."""
    return isinstance(value, int) and abs(value) < 2**63


def by_exit(metrics: Mapping[str, float], group: str, name: str) -> list[float]:
    """``group/exitN/name`` for N = 1, 2, ..."""
    exits = sum(re.fullmatch(rf"{group}/exit\d+/{name}", key) is not None for key in metrics)
    return [metrics[f"{group}/exit{number}/{name}"] for number in range(1, exits + 1)]
