"""Start a run's processes on this machine through the deepspeed launcher.

python -m launch.local -n 2 CONFIG [--section.key value ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dist_train.arguments import OVERRIDES, Parser
from dist_train.distributed.launcher import free_port
from dist_train.errors import INTERRUPTED, ConfigError, UserError
from launch.node import Node, Place, stop_on_signals, visible_gpus


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the configuration here, once; then start the processes and wait for them.  Returns their exit code."""
    parser = Parser(
        "python -m launch.local",
        description="Train on this machine, one process per GPU, or CPU processes that share its cores.",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    parser.add_argument("-n", "--processes", type=int, metavar="N", help="processes (default: one per GPU, or one)")
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    try:
        known, overrides = parser.parse_known_args(arguments)
        if sys.stdout.isatty():
            print(f"launch.local: checking {known.config}", flush=True)
        processes = _processes(known.processes)
        # For its check: that there are fewer GPUs than processes is said before anything starts.
        visible_gpus(processes)
        from dist_train.training.preflight import check_start  # takes seconds, in which Ctrl-C is no traceback either

        # Here, so that a mistake is one line instead of one per rank.
        check_start(known.config, overrides, processes)
    except UserError as error:
        print(f"launch.local: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    if sys.stdout.isatty():
        print(f"launch.local: starting {processes} processes", flush=True)
    return start(processes, ["train", known.config, *overrides])


def start(processes: int, arguments: list[str], module: str = "dist_train") -> int:
    """Run ``python -m MODULE ARGUMENTS`` on that many processes of this machine; returns their exit code."""
    node = Node(Place({"localhost": processes}, 0, "127.0.0.1", free_port()), module, arguments)
    stop_on_signals(node.stop)
    return node.run()


def _processes(wanted: int | None) -> int:
    import torch

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if wanted is None:
        return max(1, gpus)
    most, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if not 1 <= wanted <= most:
        raise ConfigError(f"-n is {wanted}, but this machine has {most} {what}; use 1 to {most}")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
