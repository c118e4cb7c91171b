"""The files of an index: index.json, and the columns beside it in index.bin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import DataError
from dist_train.files import write_whole
from shards import columns as table

FORMAT = 2
FILE = "index.json"
COLUMNS_FILE = "index.bin"


def read_json(folder: Path) -> dict[str, Any]:
    """What index.json in ``folder`` holds, of this format.

    Raises:
        DataError: there is none, or it is malformed or of another version; the text says what to do.
    """
    path = folder / FILE
    if not folder.is_dir() or not path.exists():
        # Tars that others have made are to be indexed, not made.
        tars = next((place for place in (folder, folder.parent) if any(place.glob("*.tar"))), None)
        if tars:
            # The folder of all splits, where others have tars as well.
            splits = {path.parent for path in folder.parent.glob("*/*.tar")}
            whole = folder.parent if tars == folder and len(splits) > 1 else tars
            raise DataError(
                f"{folder}: has no {FILE}, but {tars} holds tars; index them with `python -m shards index {whole}`"
            )
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards; make it with `python -m shards make`")
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder}: has no {FILE}; make the shards with `python -m shards make`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON ({error}); make the shards again") from None
    version = tree.get("format") if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or not isinstance(version, int):
        raise DataError(f"{path}: is not an index of shards; make the shards with `python -m shards make`")
    if version != FORMAT:
        remedy = "update the program" if version > FORMAT else "make the shards again"
        raise DataError(f"{path}: has format {version}, this version reads format {FORMAT}; {remedy}")
    return tree


def read_columns(folder: Path, tree: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The columns beside an index.json with the contents ``tree``, mapped into memory.

    Args:
        folder: of the split.
        tree: what index.json holds; it says the dtypes and the number of rows.
        expected: the columns that there must be, with the kinds of their dtypes.

    Raises:
        DataError: they are not there, or not what index.json says.
    """
    path = folder / COLUMNS_FILE
    try:
        arrays = table.read(path, tree["columns"], int(tree["rows"]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it belongs to {FILE}, copy both") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not what {FILE} says ({error}); make the shards again") from None
    wrong = [
        name for name, kind in expected.items() if name not in arrays or not np.issubdtype(arrays[name].dtype, kind)
    ]
    if wrong or len(arrays) != len(expected):
        raise DataError(f"{path}: has a faulty column ({', '.join(wrong or arrays)}); make the shards again")
    return {name: arrays[name] for name in expected}


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file of an index without spaces: it can name thousands of shards."""
    write_whole(path, json.dumps(tree, separators=(",", ":")))
