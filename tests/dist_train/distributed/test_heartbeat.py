"""A rank that is killed or stopped is noticed by ranks that wait for it outside of any collective that would fail."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dist_train.distributed.launcher import free_port
from tests.common import LIMIT, ROOT

RANK = """
import os, signal, sys, time
from pathlib import Path
from dist_train.config import FaultConfig
from dist_train.distributed import heartbeat
from dist_train.distributed.group import Group, Ranks
from dist_train.distributed.watchdog import JOIN, Watchdog

heartbeat.SILENCE_SECONDS = 4.0
ranks, fate = Ranks.from_env(), sys.argv[2]
with Watchdog(FaultConfig(), Path(sys.argv[1]), ranks.rank, 2) as watchdog:
    watchdog.phase(JOIN)
    group = Group(ranks, 1, watchdog.phase)
    watchdog.exchange_heartbeats(group.store)
    group.any_rank(True)
    print("joined", flush=True)
    if fate == "lives":  # as behind a kernel of NCCL, which never ends: nothing here fails by the end of the other rank
        time.sleep(float(sys.argv[3]))
    elif fate != "leaves":
        os.kill(os.getpid(), getattr(signal, fate))
os._exit(0)
"""


@pytest.fixture
def run(tmp_path):
    """`run(fate of rank 0, fate of rank 1, seconds)` gives the exit codes, None for one that had to be killed, and what was said.

    ``suspended`` are seconds for which both are stopped together once they have joined.
    """

    def start(fates, seconds, suspended=0):
        environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, tmp_path, fate, str(seconds)],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, fate in enumerate(fates)
        ]
        said, alive = "", [rank for rank, fate in enumerate(fates) if fate in ("lives", "leaves")]
        try:
            if suspended:
                assert [process.stdout.readline() for process in processes] == ["joined\n"] * 2
                for number, wait in ((signal.SIGSTOP, suspended), (signal.SIGCONT, 0)):
                    for process in processes:
                        process.send_signal(number)
                    time.sleep(wait)
            for rank in alive:
                said += processes[rank].communicate(timeout=LIMIT)[0]
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                process.kill()
                process.communicate()
        return codes, said

    return start


@pytest.mark.parametrize(("fate", "dead"), [("SIGKILL", 0), ("SIGKILL", 1), ("SIGSTOP", 0)])
def test_a_rank_that_is_killed_or_stopped_ends_the_others_without_their_main_thread(run, tmp_path, fate, dead):
    fates = [fate, "lives"] if dead == 0 else ["lives", fate]
    codes, said = run(fates, 1000)
    assert codes[1 - dead] == 1, said
    assert [path.name for path in (tmp_path / "faults").iterdir()] == [f"rank{1 - dead}.txt"]
    if dead == 1:
        assert "rank 1 left no report: killed from outside" in said


def test_a_rank_that_has_left_is_not_dead(run, tmp_path):
    start = time.monotonic()
    codes, said = run(["lives", "leaves"], 10)
    assert codes == [0, 0], said
    assert time.monotonic() - start > 10
    assert not (tmp_path / "faults").exists()


def test_ranks_that_are_suspended_together_go_on(run, tmp_path):
    codes, said = run(["lives", "lives"], 15, suspended=8)
    assert codes == [0, 0], said
    assert not (tmp_path / "faults").exists()
