"""What launchers and the ranks that they start know of each other; imports nothing that takes time."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

LAUNCHER = "DIST_TRAIN_LAUNCHER"
"""Variable with process number and start time of the launcher on this host, which its ranks inherit."""


def launcher_variable() -> dict[str, str]:
    """The environment variable that tells the ranks about this process, their launcher."""
    # With the start time, because the number alone can be reused.
    return {LAUNCHER: f"{os.getpid()} {started_at(os.getpid())}"}


def is_command_line() -> bool:
    """Whether this process is dist-train as a command, and not a notebook or a program of the user's."""
    program = Path(sys.argv[0])
    return program.name == "dist-train" or program.parts[-2:] == ("dist_train", "__main__.py")


def started_at(pid: int) -> float | None:
    """Seconds between the machine's start and the process's (proc(5), field 22 of stat); None where it has ended.

    Unlike a time of day it does not move when somebody sets the clock.
    """
    try:
        # After the name in parentheses, which may contain anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A zombie has ended and waits for its parent.
    return None if state in "ZX" else int(fields[18]) / os.sysconf("SC_CLK_TCK")


class Launcher:
    """The processes above this rank, as they were when it started.

    A rank that a launcher has started watches its parent (DeepSpeed's or torchrun's process, or SLURM's step) and, with
    our launchers, the process above that.  A process without a launcher has a shell as its parent, whose end means nothing.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        # A process that a shell started has no launcher to lose.
        launched = "RANK" in env or "SLURM_PROCID" in env
        self._parent = os.getppid() if launched else None
        self._above = env.get(LAUNCHER, "").split()
        self._looked = -1.0
        self._gone = False

    @property
    def is_gone(self) -> bool:
        """Whether one of them has ended; looks at most once a second, so that it can be asked at every step."""
        now = time.monotonic()
        if not self._gone and now - self._looked > 1:
            self._looked = now
            self._gone = (self._parent is not None and os.getppid() != self._parent) or not self._is_above()
        return self._gone

    def _is_above(self) -> bool:
        if len(self._above) != 2:
            return True
        # The number alone may belong to another process by now.
        return started_at(int(self._above[0])) == float(self._above[1])


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    Rank 0 opens it seconds later, so it is none that the kernel hands out by itself: srun, ssh or another job could
    get it in between.
    """
    try:
        handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux
        handed_out = 49152  # RFC 6335, section 6
    below = range(10_000, handed_out)
    # Not from the seeded generators: two runs with the same seed start on the same machine.
    wanted = random.SystemRandom().sample(below, min(100, len(below)))
    for port in wanted:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])
