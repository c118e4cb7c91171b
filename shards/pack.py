"""Writing one shard: a tar whose bytes depend on its samples alone, DALI's index beside it, and a record of what became of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shards.images import Encoded, Storing, Unreadable, encode
from shards.index import Shard
from shards.source import Item

_BLOCK = 512
_RECORD = 20 * _BLOCK
COLUMNS = ("key", "offset", "size", "label", "ext", "width", "height")


@dataclass(frozen=True)
class Task:
    """One shard to be written: where, the number of its first item in the split, its items, and how they are read and stored."""

    path: Path
    first: int
    items: Sequence[Item]
    read: Callable[[Item], bytes]
    storing: Storing

    @property
    def record(self) -> Path:
        """The file that is there when, and only when, the shard is finished."""
        return self.path.with_suffix(".json")


@dataclass
class Packed:
    """What became of a shard's items: its entry and columns in the index, and (source file, reason) of what is special.

    ``skipped`` files are not in the shard, ``converted`` ones not byte for byte; ``odd`` counts unusual modes.
    """

    shard: Shard
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    skipped: list[tuple[str, str]] = field(default_factory=list)
    converted: list[tuple[str, str]] = field(default_factory=list)
    odd: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, record: Path) -> Packed:
        """Read what :func:`write_shard` has left."""
        tree = json.loads(record.read_bytes())
        pairs = {name: [(file, reason) for file, reason in tree[name]] for name in ("skipped", "converted")}
        return cls(Shard(**tree["shard"]), tree["columns"], **pairs, odd=tree["odd"])


def write_shard(task: Task) -> int:
    """Write a shard, and its record last, each whole or not at all; returns the number of items.

    A shard in which nothing is readable leaves a record only.

    Raises:
        OSError: it cannot be written.
    """
    packed = Packed(Shard(task.path.name, 0, "", 0))
    rows: list[str] = []
    draft = task.path.with_suffix(_part())
    with open(draft, "wb") as file:
        tar = _Tar(file)
        for number, item in enumerate(task.items, start=task.first):
            try:
                image = encode(task.read(item), task.storing)
            except (Unreadable, OSError) as error:
                packed.skipped.append((item.name, getattr(error, "strerror", None) or str(error)))
                continue
            _note(packed, item.name, image)
            rows.append(_add_sample(tar, packed.columns, f"{number:08d}-{_stem(item.name)}", item.label, image))
        tar.finish()
        _flush(file)
    if rows:
        os.replace(draft, task.path)
        _write(task.path.with_suffix(".idx"), f"v1.2 {len(rows)}\n" + "".join(f"{row}\n" for row in rows))
        packed.shard = Shard(task.path.name, tar.length, tar.digest.hexdigest(), len(rows))
    else:
        draft.unlink()
    _write(task.record, json.dumps(vars(packed) | {"shard": asdict(packed.shard)}))
    return len(task.items)


def _note(packed: Packed, name: str, image: Encoded) -> None:
    if image.converted_from:
        packed.converted.append((name, image.converted_from))
    for what in image.odd:
        packed.odd[what] = packed.odd.get(what, 0) + 1


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}{_part()}")
    with open(draft, "wb") as file:
        file.write(text.encode("utf-8", "surrogateescape"))
        _flush(file)
    os.replace(draft, path)


def _part() -> str:
    """Ending of a draft, of this process alone on all machines: what one that was killed has left is not written to by two."""
    return f".part-{socket.gethostname()}-{os.getpid()}"


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Tar:
    """Writes a USTAR archive that depends on names and contents alone, and hashes it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.length = 0

    def add(self, name: str, data: bytes) -> int:
        """Add a file and return the offset of its data."""
        self._write(_header(name, len(data)))
        offset = self.length
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    def finish(self) -> None:
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.length % _RECORD))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.length += len(data)


def _header(name: str, size: int) -> bytes:
    """A USTAR header (mode 0644, no owner, no time); ``tarfile`` is slower, and its bytes differ with Python's version."""
    front = (
        name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % size + 11 * b"0" + b"\0"
    )
    back = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    assert len(front) == 148, "keys are short, and images smaller than 8 GiB"
    checksum = sum(front) + sum(back) + 8 * ord(" ")
    return front + b"%06o\0 " % checksum + back


def _add_sample(tar: _Tar, columns: dict[str, list[Any]], key: str, label: int, image: Encoded) -> str:
    """Add image and label to the tar and to the columns; returns the sample's line of DALI's index."""
    offset = tar.add(f"{key}.{image.ext}", image.data)
    digits = str(label).encode()
    label_offset = tar.add(f"{key}.cls", digits)
    values = (key, offset, len(image.data), label, image.ext, image.width, image.height)
    for column, value in zip(columns.values(), values):
        column.append(value)
    return f"{image.ext} {offset} {len(image.data)} {key}.{image.ext} cls {label_offset} {len(digits)} {key}.cls"


def _stem(name: str) -> str:
    """The file name in a form that WebDataset keys can have: no dots, spaces or letters outside of ASCII."""
    stem = name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60]
