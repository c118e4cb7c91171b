"""What a caller from Python gives, checked where it comes in: a value of another kind is one line, and no failure deep inside."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from numbers import Integral, Real
from types import UnionType

from dist_train.errors import ConfigError


def check_kind(name: str, given: object, kind: type | UnionType, remedy: str) -> None:
    """Raise ConfigError, with what to give instead, for a value that is of another type."""
    if not isinstance(given, kind):
        raise ConfigError(f"{name} is {_short(given)}, of type {type(given).__name__}; {remedy}")


def check_count(name: str, given: object, least: int = 1) -> None:
    """Raise ConfigError for what is no integer, or one below ``least``."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
        raise ConfigError(f"{name} is {_short(given)}; give an integer of at least {least}")


def check_counts(**given: object) -> None:
    """Raise ConfigError where one of these is no integer of at least 1."""
    for name, value in given.items():
        check_count(name, value)


def check_number(name: str, given: object, low: float, high: float) -> None:
    """Raise ConfigError for what is no number, or not between these."""
    if isinstance(given, bool) or not isinstance(given, Real) or not low <= float(given) <= high:
        raise ConfigError(f"{name} is {_short(given)}; give a number from {low:g} to {high:g}")


def check_choice(name: str, given: object, allowed: Collection[object]) -> None:
    """Raise ConfigError for a value that is not among those allowed."""
    if given not in allowed:
        raise ConfigError(f"{name} is {_short(given)}; use one of {', '.join(map(str, allowed))}")


def _short(given: object) -> str:
    """A value as one line of a message can hold it."""
    return " ".join(reprlib.repr(given).split())
