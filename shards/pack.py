"""Writing one shard: a tar whose bytes depend on its samples alone, DALI's index beside it, and a done_file of what became of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_train.errors import DataError
from dist_train.files import draft_of, write_whole
from shards.images import Encoded, Encoding, Unreadable, encode
from shards.index import Shard
from shards.processes import Work
from shards.readahead import ReadAhead
from shards.source import Item, NotAFile, shown

_BLOCK = 512
_RECORD = 20 * _BLOCK
_ZEROS = bytes(_BLOCK)
_WRITTEN_AT_ONCE = 1 << 20
_MODE, _TIME = b"0000644\0" + 2 * b"0000000\0", 11 * b"0" + b"\0"
_BACK = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
# The checksum of a header counts its own field as eight spaces.
_CHECKSUM = sum(_MODE) + sum(_TIME) + sum(_BACK) + 8 * ord(" ")
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]+")
COLUMNS = ("key", "offset", "size", "label", "ext", "width", "height")


@dataclass(frozen=True)
class Task:
    """One shard to be written: where, the number of its first item in the split, its items, and how they are read and stored."""

    path: Path
    first: int
    items: Sequence[Item]
    read: Callable[[Item], bytes]
    encoding: Encoding

    @property
    def done_file(self) -> Path:
        """The file that is there when, and only when, the shard is finished."""
        return self.path.with_suffix(".json")


@dataclass
class ShardResult:
    """What became of a shard's items: its entry and columns in the index, and (source file, reason) of what is special.

    ``skipped`` files are not in the shard, ``converted`` ones not byte for byte; ``unusual`` counts unusual modes.
    """

    shard: Shard
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    skipped: list[tuple[str, str]] = field(default_factory=list)
    converted: list[tuple[str, str]] = field(default_factory=list)
    unusual: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, done_file: Path) -> ShardResult:
        """Read what :func:`write_shard` has left."""
        tree = json.loads(done_file.read_bytes())
        pairs = {name: [(file, reason) for file, reason in tree[name]] for name in ("skipped", "converted")}
        return cls(Shard(**tree["shard"]), tree["columns"], **pairs, unusual=tree["unusual"])


def write_shard(task: Task) -> Work:
    """Write a shard, and its done_file last, each whole or not at all; returns what that took.

    A shard in which nothing is readable leaves a done_file only.

    Raises:
        DataError: an item cannot be read, by a fault of the file system.
        OSError: the shard cannot be written.
    """
    packed = ShardResult(Shard(task.path.name, 0, "", 0))
    rows: list[str] = []
    start, source = time.perf_counter(), ReadAhead(task.items, task.read)
    # Unbuffered, because _Tar gathers small parts by itself.
    with draft_of(task.path) as draft, open(draft, "wb", buffering=0) as file:
        tar = _Tar(file.fileno())
        for number, (item, data) in enumerate(source, start=task.first):
            # The disk's error, or a lost mount's: to go on would leave out good images.
            if isinstance(data, OSError) and not isinstance(data, NotAFile):
                raise DataError(
                    f"{shown(item.name)}: cannot be read ({data.strerror or data}); see that the source is there and can be read, "
                    "and run the same command again to resume"
                )
            try:
                if isinstance(data, NotAFile):
                    raise data
                image = encode(data, task.encoding)
            except (Unreadable, NotAFile) as error:
                packed.skipped.append((item.name, str(error)))
                continue
            _note(packed, item.name, image)
            rows.append(_add_sample(tar, packed.columns, f"{number:08d}-{_stem(item.name)}", item.label, image))
        tar.finish()
        flushing = time.perf_counter()
    writing = tar.seconds + time.perf_counter() - flushing
    if rows:
        write_whole(task.path.with_suffix(".idx"), f"v1.2 {len(rows)}\n" + "".join(f"{row}\n" for row in rows))
        packed.shard = Shard(task.path.name, tar.length, tar.digest.hexdigest(), len(rows))
    else:
        # A tar without an image is no shard.
        task.path.unlink()
    write_whole(task.done_file, json.dumps(vars(packed) | {"shard": asdict(packed.shard)}))
    return Work(len(task.items), source.bytes, time.perf_counter() - start, source.waited, writing)


def _note(packed: ShardResult, name: str, image: Encoded) -> None:
    if image.converted_from:
        packed.converted.append((name, image.converted_from))
    for what in image.unusual:
        packed.unusual[what] = packed.unusual.get(what, 0) + 1


class _Tar:
    """Writes a USTAR archive that depends on names and contents alone, and hashes it on the way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._parts: list[bytes] = []
        self._waiting = 0
        self.digest = hashlib.sha256()
        self.length = 0
        self.seconds = 0.0
        """Spent in writing."""

    def add(self, name: str, data: bytes) -> int:
        """Add a file and return the offset of its data."""
        self._put(_header(name, len(data)))
        offset = self.length
        self._put(data)
        if padding := -len(data) % _BLOCK:
            self._put(_ZEROS[:padding])
        return offset

    def finish(self) -> None:
        # Two blocks of zeros end an archive, and tar fills up to a whole record of 20 blocks.
        self._put(bytes(2 * _BLOCK))
        self._put(bytes(-self.length % _RECORD))
        self._flush()

    def _put(self, data: bytes) -> None:
        self._parts.append(data)
        self.length += len(data)
        self._waiting += len(data)
        # os.writev takes 1,024 parts at most (IOV_MAX).
        if self._waiting > _WRITTEN_AT_ONCE or len(self._parts) > 500:
            self._flush()

    def _flush(self) -> None:
        """Hash and write what waits: small parts as one, since each call costs as much as some kilobytes do."""
        joined = b"".join(self._parts) if self._waiting < 64 * len(self._parts) * _BLOCK else None
        for part in self._parts if joined is None else [joined]:
            self.digest.update(part)
        parts, written = ([joined] if joined else self._parts), 0
        start = time.perf_counter()
        while written < self._waiting:  # a disk that becomes full takes a part
            written += os.writev(self._descriptor, parts)
            if written < self._waiting:
                parts = [b"".join(self._parts)[written:]]
        self.seconds += time.perf_counter() - start
        self._parts, self._waiting = [], 0


def _header(name: str, size: int) -> bytes:
    """A USTAR header (mode 0644, no owner, no time); ``tarfile`` is slower, and its bytes differ with Python's version."""
    start, digits = name.encode("ascii"), b"%011o" % size
    assert len(start) <= 100, "keys are short"
    assert len(digits) == 11, "images are smaller than 8 GiB"
    # 512 bytes: name, mode and owners, size, time, checksum, and the rest of the header.
    return b"%s%s%s\0%s%06o\0 %s" % (
        start.ljust(100, b"\0"),
        _MODE,
        digits,
        _TIME,
        _CHECKSUM + sum(start) + sum(digits),
        _BACK,
    )


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
    # With the number before it and the ending behind it, it stays below the 100 bytes of a header.
    return _NOT_IN_KEYS.sub("_", stem)[:60]
