"""What a run shows on a real terminal of any width, and what its log has."""

import os
import re
import subprocess
import sys

import pytest

from dist_train.tracking.progress import Part, fit
from tests.common import ROOT, on_a_terminal

TRAINING = """
import logging, sys, time
from pathlib import Path
from dist_train.tracking.progress import Display, set_up_logging
set_up_logging(0, Path(sys.argv[1]))
exits = int(sys.argv[2])
with Display(53400, 0) as display:
    for step in (1, 20, 40):
        display.step(step)
        metrics = {f"train/exit{m + 1}/top1": 0.5 + 0.03 * m for m in range(exits)}
        metrics |= {"train/loss": 3.78, "train/temperature": 1.8, "train/learning_rate": 7.8e-6, "speed/waiting_for_data": 0.02}
        metrics |= {"speed/images_per_second": 1234.0, "memory/peak_gib": 2.1}
        if step == 40:
            metrics |= {"speed/seconds_for_slowest": 9.0, "speed/slowest_rank": 3.0}
        display.metrics(step, step / 267, metrics)
        logging.getLogger("dist_train").info("a line above it")
        time.sleep(0.6)
"""


@pytest.mark.parametrize("exits", [3, 11])
@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_the_line_keeps_what_matters_at_every_width(tmp_path, width, exits):
    shown = on_a_terminal(width, "-c", TRAINING, tmp_path, str(exits))
    live = [line for line in shown if line.startswith("step ")]
    assert "step 1/53400" in live[0]
    assert max(map(len, shown)) <= width
    last = live[-1]
    for part in ("step 40/53400", "left ", "loss 3.780", "50.0", f"{50 + 3 * (exits - 1)}.0"):
        assert part in last or width < 80, (part, last)
    assert re.match(r"step 40/53400 .*left \d+:\d\d:\d\d", last)
    # With room comes the rest, the most important first.
    assert ("━" in last or "╌" in last) == (width >= 100)
    assert ("img/s" in last) == (width >= 100)
    assert ("rank 3 slow" in last or "rank 3 is slow" in last) or width < 80
    assert "a line above it" in shown
    # The log has all of every line, however narrow the terminal is.
    lines = [line for line in (tmp_path / "log" / "rank0.txt").read_text().splitlines() if "img/s" in line]
    assert [re.search(r"step (\d+)/53400", line)[1] for line in lines] == ["1", "20", "40"]
    assert all(" ".join(f"{50 + 3 * m}.0" for m in range(exits)) in line for line in lines)
    assert "rank 3 is slow, the others waited 9.0 s" in lines[-1]


def test_what_is_least_important_goes_first_and_the_short_form_before_nothing():
    parts = [Part(20, "step 1/2"), Part(1, "T 1.00"), Part(4, "1 2 3 4 5 6", "1 … 6"), Part(6, "loss 1")]
    whole = "step 1/2  T 1.00  1 2 3 4 5 6  loss 1"
    found = [fit(parts, width) for width in range(len(whole), 0, -1)]
    assert list(dict.fromkeys(found))[:4] == [
        whole,
        "step 1/2  1 2 3 4 5 6  loss 1",
        "step 1/2  1 … 6  loss 1",
        "step 1/2  1 … 6",
    ]
    assert all(len(line) <= width for line, width in zip(found, range(len(whole), 0, -1)))


def test_a_reader_that_leaves_does_not_disturb_the_training(tmp_path):
    program = f"{sys.executable} -c '{TRAINING}' {tmp_path} 3 | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "step 40/53400" in (tmp_path / "log" / "rank0.txt").read_text()
