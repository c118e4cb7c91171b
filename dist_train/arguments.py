"""How every command line is parsed."""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from typing import Any, NoReturn

from dist_train.errors import ConfigError

OVERRIDES = "Any field of CONFIG can be overridden: --section.key value. `dist-train train --help` lists them."
"""What the help of a launcher says of overrides."""


def positive(text: str) -> int:
    """The type of an option that takes a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Raises ConfigError, one line, where argparse would print its usage and exit."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; an option that is given empty, as by a shell's variable that is not set, is an error."""
        words = sys.argv[1:] if args is None else list(args)
        for option, value in pairwise(words):
            if value == "" and option in self._option_string_actions:
                self.error(f"{option} is empty; give a value, or leave it out")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what the parser found wrong as ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")
