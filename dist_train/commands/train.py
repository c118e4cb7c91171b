"""``dist-train train``: one rank of a run, or a run of one process."""

from __future__ import annotations

from dist_train.commands.fields import config_parser
from dist_train.config_file import load_config
from dist_train.errors import STOPPED


def run(arguments: list[str]) -> int:
    """Train to the end; 0, or 75 where the run was asked to stop and has saved."""
    known, overrides = config_parser("train", "Train, or resume the run of the same name.").parse_known_args(arguments)
    config = load_config(known.config, *overrides)  # checked first, so that a typo does not wait for torch
    from dist_train.training.run import train

    return 0 if train(config).finished else STOPPED
