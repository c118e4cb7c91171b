"""The processes of a run on one node: started by DeepSpeed's launcher, stopped by signals or by the end of stdin."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from dist_train.distributed.launcher import launcher_variable
from dist_train.errors import ConfigError, UserError

GRACE_SECONDS = 60.0
"""How long the processes may keep running after the process that started them is gone."""
# How glibc's malloc treats the memory of a training step: it keeps what a step frees, for the next step to take without a page
# fault each 4 KiB, and takes it in huge pages.
_ALLOCATOR = ":".join(
    (
        "glibc.malloc.trim_threshold=1099511627776",
        "glibc.malloc.mmap_threshold=1099511627776",
        "glibc.malloc.hugetlb=1",
    )
)

# DeepSpeed's autotuner, used by nobody here, imports MLflow where it is there, which takes as long as all else in a launcher.
_LAUNCH = "import sys; sys.modules['mlflow'] = None; from deepspeed.launcher.launch import main; main()"


@dataclass(frozen=True)
class Place:
    """One node among the nodes of a run."""

    slots: Mapping[str, int]
    """Processes by host, in the order of the ranks."""
    number: int
    master: str
    port: int

    def command(self, module: str, arguments: list[str]) -> list[str]:
        """The command that starts DeepSpeed's launcher on this node."""
        slots: dict[str, list[int] | list[str]] = {host: list(range(count)) for host, count in self.slots.items()}
        here = list(slots)[self.number]
        # The launcher gives each rank one of these as its GPU: where the user, or SLURM, has chosen some, only those.
        slots[here] = visible_gpus(self.slots[here]) or slots[here]
        world = json.dumps(slots)
        return [
            sys.executable,
            "-u",
            "-c",
            _LAUNCH,
            f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}",
            f"--node_rank={self.number}",
            f"--master_addr={self.master}",
            f"--master_port={self.port}",
            "--no_local_rank",
            # Not with --quiet, which makes it "error": a run that was asked to stop would look as if it had failed.
            "--log_level=critical",
            "--module",
            module,
            *arguments,
        ]


def visible_gpus(processes: int) -> list[str]:
    """The first entries of CUDA_VISIBLE_DEVICES, numbers or names, one for each process; none where it is not set.

    Where it hides all GPUs each is -1, which hides them again: the launcher sets the variable for each rank.

    Raises:
        ConfigError: it has fewer.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return []
    entries = [entry.strip() for entry in given.split(",") if entry.strip()]
    # As CUDA reads it: what follows a number below 0 is not visible.
    entries = list(itertools.takewhile(lambda entry: not entry.startswith("-"), entries)) or ["-1"] * processes
    if len(entries) < processes:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES is {','.join(entries)}, {len(entries)} GPUs for {processes} processes; name more, or start fewer"
        )
    return entries[:processes]


class Node:
    """The launcher of one node and its ranks, in a session of their own: a Ctrl-C reaches them only through :meth:`stop`."""

    def __init__(self, place: Place, module: str, arguments: list[str]) -> None:
        self._command = place.command(module, arguments)
        self._environment = os.environ | _environment(list(place.slots.values())[place.number]) | launcher_variable()
        self._child: subprocess.Popen[bytes] | None = None
        self.asked = 0
        """How many times the node was asked to stop."""

    def run(self) -> int:
        """Start all and wait for them; the exit code of the first rank that failed, 128 + N for signal N, or 0."""
        self._child = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        # A signal came while the process was being started.
        if self.asked:
            self.kill()
        code = self._child.wait()
        # DeepSpeed's launcher passes a rank's -N on to exit(), where it arrives as 256 - N.
        signal_number = -code if code < 0 else 256 - code if code > 192 else 0
        return 128 + signal_number if signal_number else code

    def stop(self) -> None:
        """Ask the ranks to save and exit; kill them if none has started yet, or on the second request."""
        self.asked += 1
        ranks = self._ranks()
        if self.asked > 1 or not ranks:
            self.kill()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()

    def kill(self) -> None:
        """Kill launcher and ranks."""
        if self._child and self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)

    def _ranks(self) -> list[psutil.Process]:
        try:
            children = psutil.Process(self._child.pid).children() if self._child else []
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if _is_rank(child)]


def _is_rank(process: psutil.Process) -> bool:
    """Whether a child of the launcher is a rank, and not one of the programs that it runs while it is imported."""
    try:
        # One that has ended was a rank: the launcher is about to end as well, with its exit code.
        return process.status() == psutil.STATUS_ZOMBIE or "RANK" in process.environ()
    except psutil.Error:
        return False


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call ``stop`` for SIGTERM, SIGINT, SIGUSR2, and for SIGHUP, which a terminal or an ssh session sends when it closes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: stop())


def main() -> int:
    """Run one node at the other end of an ssh connection: orders come on stdin, and its end is an order to stop.

    The first line is JSON with ``environment``, ``place``, ``module`` and ``arguments``; every further line stops.
    """
    order = json.loads(sys.stdin.readline())
    os.environ.update(order["environment"])
    try:
        node = Node(Place(**order["place"]), order["module"], order["arguments"])
    except UserError as error:
        print(f"launch.nodes: {socket.gethostname()}: {error}", file=sys.stderr)
        return error.exit_code

    def obey() -> None:
        for _ in sys.stdin:
            node.stop()
        if not node.asked:
            node.stop()
        # Ranks that do not end by themselves would block the node for the next start.
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
        # Without it every process would start a thread per core of the machine.
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))
        if "GLIBC_TUNABLES" not in os.environ and _glibc() >= (2, 35):
            environment["GLIBC_TUNABLES"] = _ALLOCATOR
    return environment


def _glibc() -> tuple[int, ...]:
    """Its version; 0 of another library.  One before 2.35 refuses a large mmap_threshold, and would give every tensor back at once."""
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    return tuple(map(int, version.split(".")[:2])) if name == "glibc" else (0,)


if __name__ == "__main__":
    sys.exit(main())
