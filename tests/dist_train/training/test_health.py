"""Requests to stop, and steps that are skipped."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dist_train.distributed.launcher import LAUNCHER, Launcher, free_port, launcher_variable, started_at
from dist_train.errors import TrainingError
from dist_train.training.checkpoint import Progress
from dist_train.training.health import SkippedSteps, StopRequests, works
from dist_train.training.loss_scale import LossScale
from tests.common import ROOT


class Alone:
    """The group of one rank, as far as counting needs it."""

    def gather(self, value):
        return [value]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_becomes_a_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequests() as requests:
        assert requests.reason is None
        os.kill(os.getpid(), number)
        assert requests.reason == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once():
    with StopRequests():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_counts_whatever_came_between():
    with StopRequests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run():
    steps, progress = SkippedSteps(Alone(), allowed_in_a_row=3), Progress(step=7, skipped_steps=5)
    for applied in (False, False, True, False, False):
        steps.count(applied, torch.tensor(float("nan")), progress)
        steps.check(progress)
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (9, 2)
    # The next start goes on counting where its checkpoint was written.
    steps, progress = SkippedSteps(Alone(), allowed_in_a_row=3), Progress(**asdict(progress))
    steps.count(False, torch.tensor(1.0), progress)
    with pytest.raises(TrainingError, match=r"3 steps in a row had a gradient that is not finite \(step 7\)"):
        steps.check(progress)


def test_steps_that_the_loss_scale_can_cure_are_none_in_a_row():
    steps, progress, scale = SkippedSteps(Alone(), allowed_in_a_row=4), Progress(), LossScale(2.0**6)
    for _ in range(8):
        scale.count(False)
        steps.count(False, torch.tensor(1.0), progress, scale)
        steps.check(progress)
        if scale.value > 1:
            assert progress.skipped_in_a_row == 0
    assert progress.skipped_steps == 8
    steps.count(False, torch.tensor(1.0), progress, scale)
    with pytest.raises(TrainingError, match="4 steps in a row"):
        steps.check(progress)


def test_a_free_port_is_none_that_the_kernel_gives_to_somebody_else_before_rank_0_opens_it():
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(not first <= free_port() <= last for _ in range(50))
    assert len({free_port() for _ in range(50)}) > 25


def test_a_clock_that_is_set_in_mid_run_is_not_the_end_of_the_launcher(monkeypatch):
    watched = Launcher(launcher_variable())
    # What /proc/stat says of the machine's start moves with the clock, and with it any start time that is made of it.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1e9)
    assert not watched.is_gone


def test_a_launcher_that_has_ended_is_noticed_and_its_number_given_again_is_not_taken_for_it():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    assert not Launcher({}).is_gone
    assert not Launcher(launcher_variable()).is_gone
    pid, started = launcher_variable()[LAUNCHER].split()
    assert Launcher({LAUNCHER: f"{pid} {float(started) - 100}"}).is_gone
    watched = Launcher({LAUNCHER: f"{child.pid} {started_at(child.pid)}"})
    assert not watched.is_gone
    child.kill()  # not waited for: a zombie has ended as well
    watched._looked = -100.0
    while not watched.is_gone:
        watched._looked = -100.0
    child.wait()


LOST = """
import atexit, logging
from dist_train.errors import DataError
from dist_train.training.health import end_without_gpu
logging.basicConfig(format="%(message)s")
atexit.register(print, "closed")
try:
    raise {error}
except Exception as error:
    end_without_gpu(error)
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            "RuntimeError('CUDA error: misaligned address')",
            1,
            "RuntimeError: CUDA error: misaligned address\nthe GPU cannot be",
        ),
        ("DataError('no such image')", 2, "dist-train train: no such image\n"),
    ],
)
def test_a_process_whose_gpu_is_lost_ends_with_its_error_and_closes_nothing(error, code, said):
    done = subprocess.run([sys.executable, "-c", LOST.format(error=error)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "closed" not in done.stdout


def test_a_cpu_always_works():
    assert works(torch.device("cpu"))
