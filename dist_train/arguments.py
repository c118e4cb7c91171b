"""How every command line is parsed."""

from __future__ import annotations

import argparse
from typing import NoReturn

from dist_train.errors import ConfigError

OVERRIDES = "Any field of CONFIG can be overridden: --section.key value. `dist-train train --help` lists them."
"""What the help of a launcher says of overrides."""


class Parser(argparse.ArgumentParser):
    """Raises ConfigError, one line, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise what the parser found wrong as ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")
