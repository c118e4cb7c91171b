"""200 damaged or hostile inputs: each gives what is right or one line, in time and in less than 2 GB of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.common import ROOT

SEEDS, BATCH = 200, 50


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_every_input_is_right_or_one_line(first: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.shards.hostile", str(first), str(first + BATCH), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {results[-1:]}: {done.stderr[-2000:]}"
    assert [result["seed"] for result in results] == list(range(first, first + BATCH))
    wrong = [result for result in results if not is_right(result)]
    assert wrong == []
    codes = Counter(result["code"] for result in results)
    assert codes[2] > BATCH / 4, codes
    assert codes[0] > BATCH / 10, codes


def is_right(result: dict[str, object]) -> bool:
    said = str(result["said"])
    lines = said.splitlines()
    if result["code"] == 0:
        return bool(result["right"]) and not lines
    # A check names every fault that it finds.
    one_line = len(lines) == 1 or (
        str(result["what"]).startswith("check") and all(line.startswith("shards: ") for line in lines)
    )
    return result["code"] == 2 and one_line and "Traceback" not in said
