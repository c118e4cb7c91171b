"""The times of exits are those of prediction, at the precision that is faster, with what they depend on."""

import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from torch import nn

from dist_train.errors import ConfigError
from dist_train.models import MSDNet
from dist_train.models.network import MultiExitNetwork
from dist_train.prediction.stopping import at_exit, predict
from dist_train.prediction.timing import OtherWork, Timing, busy_warning, conditions, exit_within, fastest


class Slow(MultiExitNetwork):
    """Two exits, each of which takes 20 ms longer at one precision."""

    num_exits, num_classes = 2, 10

    def __init__(self, slow_under_autocast):
        super().__init__()
        self.slow = slow_under_autocast
        self.heads = nn.ModuleList(nn.Linear(12, 10) for _ in range(2))

    def iter_exits(self, images):
        for head in self.heads:
            if torch.is_autocast_enabled("cpu") == self.slow:
                time.sleep(0.02)
            rows = yield head(images.flatten(1))
            images = images if rows is None else images[rows]


@pytest.mark.parametrize(("slow_under_autocast", "faster"), [(True, "fp32"), (False, "bf16")])
def test_the_faster_precision_is_taken(slow_under_autocast, faster):
    network = Slow(slow_under_autocast).eval()
    timing = fastest(network, torch.zeros(1, 3, 2, 2), ("fp32", "bf16"), repeats=4)
    assert timing.precision == faster
    other = "bf16" if faster == "fp32" else "fp32"
    alone = fastest(network, torch.zeros(1, 3, 2, 2), (other,), repeats=4)
    # Every exit is slower by its own wait and that of the exit before it.
    assert alone.milliseconds[0] >= 20
    assert alone.milliseconds[1] >= 40
    assert timing.conditions == conditions(faster, torch.get_num_threads(), 1, "cpu")


def test_times_rise_and_leave_no_trace():
    network = MSDNet(10, exits=3).eval()
    images = torch.randn(2, 3, 32, 32)
    before = predict(network, images, at_exit(3, 3)).logits
    timing = fastest(network, images, ("fp32",), repeats=3)
    assert timing.milliseconds == sorted(timing.milliseconds)
    assert len(timing.milliseconds) == len(timing.spread) == 3
    assert min(timing.milliseconds) > 0
    assert min(timing.spread) >= 0
    assert torch.equal(before, predict(network, images, at_exit(3, 3)).logits)


def test_a_busy_machine_is_said():
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(psutil.cpu_count())]
    try:
        work = OtherWork()
        time.sleep(2)
        share = work.share()
    finally:
        for spinner in spinners:
            spinner.kill()
    assert share > 0.5
    assert "other processes took" in busy_warning(share)
    assert busy_warning(0.01) == ""


def test_a_deadline_allows_the_last_exit_that_is_reached_in_time():
    timing = Timing([1.0, 2.0, 4.0], [0.1, 0.1, 0.1], "fp32", 1, 8, "cpu", 0.0)  # per image of a batch of 8
    for deadline, number in ((8.9, 1), (16.9, 2), (32.7, 2), (32.9, 3), (1e9, 3)):
        assert exit_within(timing, deadline) == number
    # By a time that scatters, an earlier exit can miss a deadline that a later one meets.
    assert exit_within(replace(timing, spread=[1.2, 0.1, 0.1]), 16.9) == 2
    with pytest.raises(ConfigError, match=r"exit 1 takes 8\.8 ms here"):
        exit_within(timing, 8.7)
    for deadline in (0, float("nan")):
        with pytest.raises(ConfigError, match="must be above 0"):
            exit_within(timing, deadline)
