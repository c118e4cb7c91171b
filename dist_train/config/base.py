"""What all sections of a configuration have in common: their base, and the types of their fields."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, given: Any, info: ValidationInfo) -> Any:
        # Python counts with booleans, and so does pydantic: true would be 1.
        assert info.field_name
        if _holds_bool(given) and not _takes_bool(cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("bool_for_number", "it takes no true or false")
        return given


def _holds_bool(given: Any, depth: int = 2) -> bool:
    """Whether a value, a list or a matrix holds a boolean; what is nested deeper is refused by its type."""
    if depth and isinstance(given, list | tuple):
        return any(_holds_bool(one, depth - 1) for one in given)
    return isinstance(given, bool)


def _takes_bool(kind: Any) -> bool:
    return kind in (bool, Any) or any(map(_takes_bool, get_args(kind)))


def path_or_url(given: Any) -> Any:
    """A path, expanded, or a URL as it is."""
    if not isinstance(given, str | Path) or re.fullmatch(r"(\w+:///*)?", str(given)):
        raise ValueError(f"{given!r} names no folder; give its path or URL")
    return expanded(given) if isinstance(given, str) and "://" not in given else given


def expanded(given: Any) -> Any:
    """A path with ``~`` and variables such as ``$HOME`` filled in; one that is not set is an error, and not a folder's name."""
    if not isinstance(given, str | Path) or not str(given):
        return given
    text = os.path.expandvars(str(given))
    if match := re.search(r"\$(\w+|\{\w+\})", text):
        raise ValueError(f"{given}: the variable {match[0]} is not set")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{given}: there is no such user, whose home it could be in") from None


UserPath = Annotated[Path, BeforeValidator(expanded)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
