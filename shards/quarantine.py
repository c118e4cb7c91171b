"""The quarantine list of a split: samples that training and evaluation leave out, by ``quarantine.json`` beside the index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_train.errors import DataError
from shards.index_file import write_json

QUARANTINE_FILE = "quarantine.json"


class Bad(NamedTuple):
    """A sample that is not to be used: its id in the whole split, its key, and why."""

    id: int
    key: str
    why: str


def read(folder: Path, fingerprint: str, samples: int) -> list[Bad]:
    """The entries of the list in ``folder``; none where there is no list.

    Args:
        folder: of the split.
        fingerprint, samples: of the whole split, which the list must be of: its ids mean nothing in another one.

    Raises:
        DataError: the list is malformed, or was written for other shards.
    """
    path = folder / QUARANTINE_FILE
    try:
        tree = json.loads(path.read_bytes())
        entries = [Bad(int(entry["id"]), str(entry["key"]), str(entry["why"])) for entry in tree["samples"]]
        fits = tree["fingerprint"] == fingerprint and all(0 <= entry.id < samples for entry in entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is malformed ({error!r}); run `python -m shards check {folder}` again") from None
    if not fits:
        raise DataError(f"{path}: was written for other shards; run `python -m shards check {folder}` again")
    return entries


def write(folder: Path, fingerprint: str, entries: Sequence[Bad]) -> None:
    """Write the list of the whole split with this fingerprint; an empty one is removed.

    Raises:
        DataError: it cannot be written.
    """
    path = folder / QUARANTINE_FILE
    try:
        if entries:
            write_json(path, {"fingerprint": fingerprint, "samples": [entry._asdict() for entry in entries]})
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); training would use what is bad") from None
