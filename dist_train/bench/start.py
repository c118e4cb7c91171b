"""How long a run takes from the command to its first step, and where that time goes."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dist_train.arguments import Parser, positive
from dist_train.bench import writable

PART = re.compile(r"([a-zA-Z ]+) ([\d.]+) s")


def run(arguments: list[str]) -> int:
    """``dist-train bench start [--json PATH] [--processes N] [--runs N] [--section.key value]``; medians over the runs."""
    parser = Parser("dist-train bench start", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the figures there as well")
    parser.add_argument("--processes", type=positive, default=2, metavar="N")
    parser.add_argument("--runs", type=positive, default=3, metavar="N", help="timed runs, after one that is not timed")
    known, overrides = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = _prepare(Path(folder), known.processes)
        runs = []
        for number in range(known.runs + 1):
            found = _one_start([str(config), "--name", f"start{number}", *overrides], known.processes)
            if found is None:
                return 2
            runs.append(found)
    # The first run reads from disk what the others find in the page cache.
    parts = {name: round(statistics.median(found.get(name, 0.0) for found in runs[1:]), 2) for name in runs[0]}
    print(f"{known.processes} processes, medians of {known.runs} runs")
    print("\n".join(f"{name:<32} {seconds:6.2f} s" for name, seconds in parts.items()))
    if known.json:
        result = {"machine": platform.processor() or platform.machine(), "processes": known.processes, "seconds": parts}
        known.json.write_text(json.dumps(result, indent=1))
    return 0


def _prepare(folder: Path, processes: int) -> Path:
    shards = folder / "digits"
    subprocess.run([sys.executable, "-m", "shards", "make", "digits", shards], check=True, stdout=subprocess.DEVNULL)
    fields = {
        "runs": str(folder),
        "data": {"shards": str(shards), "flip": False},
        "train": {"global_batch": 16 * processes, "micro_batch": 16, "max_steps": 1},
        "tracking": {"uri": "off"},
        "checkpoint": {"every_epochs": None},
    }
    config = folder / "start.yaml"
    config.write_text(json.dumps(fields))
    return config


def _one_start(arguments: list[str], processes: int) -> dict[str, float] | None:
    """Seconds by part of one start, from what rank 0 says of it; None where it does not start."""
    command = [sys.executable, "-m", "launch.local", "-n", str(processes), *arguments]
    begin, total, parts = time.perf_counter(), 0.0, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("first step after"):
                total, parts = time.perf_counter() - begin, line.partition(": ")[2]
    if not parts:
        return None
    rank = {name.strip(): float(seconds) for name, seconds in PART.findall(parts)}
    return {"launch": total - sum(rank.values())} | rank | {"from command to first step": total}
