"""Parsing of command lines: argparse, with its errors as ours."""

from __future__ import annotations

import argparse
from typing import NoReturn

from dist_train.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Refuses a command line by ConfigError, in one line, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """What the parser found wrong."""
        raise ConfigError(f"{message}; see {self.prog} --help")
