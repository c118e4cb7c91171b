"""The processes of a run on one node: started by DeepSpeed's launcher, told to stop by signals or by the end of stdin."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

GRACE_SECONDS = 60.0
"""How long the processes may go on after the one that started them has gone."""


@dataclass(frozen=True)
class Place:
    """One node among the nodes of a run."""

    slots: Mapping[str, int]
    """Processes by host, in the order of the ranks."""
    number: int
    master: str
    port: int

    def command(self, module: str, arguments: list[str]) -> list[str]:
        """What starts DeepSpeed's launcher on this node."""
        world = json.dumps({host: list(range(slots)) for host, slots in self.slots.items()})
        return [
            sys.executable, "-u", "-m", "deepspeed.launcher.launch",
            f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}", f"--node_rank={self.number}",
            f"--master_addr={self.master}", f"--master_port={self.port}", "--no_local_rank", "--quiet",
            "--log_level=error", "--module", module, *arguments,
        ]  # fmt: skip


class Node:
    """The launcher of one node and its ranks, in a session of their own: a Ctrl-C reaches them only through :meth:`stop`."""

    def __init__(self, place: Place, module: str, arguments: list[str]) -> None:
        self._command = place.command(module, arguments)
        self._environment = os.environ | _environment(list(place.slots.values())[place.number])
        self._child: subprocess.Popen[bytes] | None = None
        self.asked = 0
        """How often the node was asked to stop."""

    def run(self) -> int:
        """Start all and wait for them; the exit code of the first rank that failed, 128 + N for signal N, or 0."""
        self._child = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        if self.asked:
            self.kill()
        code = self._child.wait()
        signal_number = -code if code < 0 else 256 - code if code > 192 else 0  # the launcher exits with -N itself
        return 128 + signal_number if signal_number else code

    def stop(self) -> None:
        """Ask the ranks to save and end, at once where none has started yet; asked a second time, end them at once."""
        self.asked += 1
        ranks = self._ranks()
        if self.asked > 1 or not ranks:
            self.kill()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()

    def kill(self) -> None:
        """End launcher and ranks at once."""
        if self._child and self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)

    def _ranks(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._child.pid).children() if self._child else []
        except psutil.NoSuchProcess:
            return []


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call ``stop`` for SIGTERM, SIGINT and SIGUSR2."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda *_: stop())


def main() -> int:
    """Run one node at the other end of an ssh connection: orders come on stdin, and its end is an order to stop.

    The first line is JSON with ``environment``, ``place``, ``module`` and ``arguments``; every further line stops.
    """
    order = json.loads(sys.stdin.readline())
    os.environ.update(order["environment"])
    node = Node(Place(**order["place"]), order["module"], order["arguments"])

    def obey() -> None:
        for _ in sys.stdin:
            node.stop()
        if not node.asked:
            node.stop()
        time.sleep(GRACE_SECONDS)
        node.kill()

    threading.Thread(target=obey, daemon=True).start()
    stop_on_signals(node.stop)
    return node.run()


def _environment(processes: int) -> dict[str, str]:
    import torch

    environment = {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore")}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return environment


if __name__ == "__main__":
    sys.exit(main())
