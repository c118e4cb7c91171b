"""``dist-train plan``: what a run would do."""

from __future__ import annotations

from dist_train.commands.fields import config_parser
from dist_train.config_file import load_config
from dist_train.errors import USER_ERROR, ConfigError


def run(arguments: list[str]) -> int:
    """Print the plan; 0, or 2 where the run could not start."""
    parser = config_parser("plan", "Show what a run would do, without training.")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes (GPUs) to plan for")
    known, overrides = parser.parse_known_args(arguments)
    from dist_train.training.planner import plan

    if known.processes < 1:
        raise ConfigError(f"--processes is {known.processes}; it must be at least 1")
    result = plan(load_config(known.config, *overrides), world_size=known.processes)
    print(result)
    return USER_ERROR if result.problems else 0
