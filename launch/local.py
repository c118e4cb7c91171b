"""Start a run's processes on this machine through the deepspeed launcher.

python -m launch.local -n 2 CONFIG [--section.key value ...]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from dist_train.dist import free_port
from dist_train.errors import ConfigError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the configuration here, once; then start the processes and wait for them.  Returns their exit code."""
    parser = argparse.ArgumentParser(
        "python -m launch.local",
        description="Train on this machine, one process per GPU, or CPU processes that share its cores.",
        allow_abbrev=False,
    )
    parser.add_argument("-n", "--processes", type=int, metavar="N", help="processes (default: one per GPU, or one)")
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    known, overrides = parser.parse_known_args(arguments)
    try:
        processes = _processes(known.processes)
        _check(known.config, overrides, processes)
    except UserError as error:
        print(f"launch.local: {error}", file=sys.stderr)
        return 2
    return start(processes, ["train", known.config, *overrides])


def start(processes: int, arguments: list[str], module: str = "dist_train") -> int:
    """Run ``python -m MODULE ARGUMENTS`` on that many processes of this machine; returns their exit code."""
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(processes), "--master_port",
        str(free_port()), "--no_local_rank", "--module", module, *arguments,
    ]  # fmt: skip
    # In a session of their own, Ctrl-C on the terminal reaches the processes through here, once, and not the
    # launcher, which would end with a traceback.
    child = subprocess.Popen(command, env=os.environ | _environment(processes), start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in _ranks(child.pid):
            rank.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, forward)
    return child.wait()


def _ranks(runner: int) -> list[psutil.Process]:
    """The training processes: the children of the launcher, which is the only child of its runner."""
    try:
        return [rank for launcher in psutil.Process(runner).children() for rank in launcher.children()]
    except psutil.NoSuchProcess:
        return []


def _processes(wanted: int | None) -> int:
    import torch

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if wanted is None:
        return max(1, gpus)
    most, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if not 1 <= wanted <= most:
        raise ConfigError(f"-n is {wanted}, but this machine has {most} {what}; use 1 to {most}")
    return wanted


def _check(path: str, overrides: list[str], processes: int) -> None:
    from dist_train.config_file import load_config
    from dist_train.dist import Ranks
    from dist_train.preflight import preflight

    preflight(load_config(path, *overrides), Ranks(0, processes, 0, processes))


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
