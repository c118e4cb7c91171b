"""Columns of equal length in one binary file, one after the other, mapped into memory when they are read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.files import draft_of


def write(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write the columns in their order, whole or not at all; little-endian dtypes only, since the bytes are what counts."""
    with draft_of(path) as draft, open(draft, "wb") as file:
        for column in columns.values():
            file.write(raw(column))


def raw(column: NDArray[Any]) -> memoryview:
    """The bytes of a column, without copying one that is contiguous."""
    contiguous: Any = np.ascontiguousarray(column)
    return memoryview(contiguous).cast("B")


def read(path: Path, dtypes: Mapping[str, str], rows: int) -> dict[str, NDArray[Any]]:
    """Map the columns of a file into memory, read-only, so that all processes of a machine share one copy.

    Args:
        dtypes: numpy's name for the dtype of every column, in the order of the file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: its length is not that of ``rows`` rows, or a dtype is not one.
    """
    kinds = {name: _dtype(name, text) for name, text in dtypes.items()}
    expected = rows * sum(kind.itemsize for kind in kinds.values())
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            raise ValueError(f"it has {found} bytes, {rows} rows have {expected}")
        # An empty file cannot be mapped.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if expected else b""
    columns, offset = {}, 0
    for name, kind in kinds.items():
        columns[name] = np.frombuffer(data, kind, rows, offset)
        offset += rows * kind.itemsize
    return columns


def _dtype(name: str, text: str) -> np.dtype[Any]:
    try:
        kind = np.dtype(text)
    except TypeError:
        kind = np.dtype(object)
    # Whole numbers and bytes alone: what a file holds must not become Python's objects.
    if kind.kind not in "iS" or kind.itemsize == 0:
        raise ValueError(f"column {name} cannot have the dtype {text!r}")
    return kind
