"""Reads a tar from its first byte to its last, once: its files with their places, and the SHA-256 of all of it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_train.errors import DataError
from shards.archives import MOST_PADDING, beyond_the_end
from shards.kinds import HEAD, kind_of
from shards.source import shown

_BLOCK = 512
_KEPT = 1 << 30
"""Larger files are read past: no image has so many bytes."""


class File(NamedTuple):
    """A file in a tar: its name, where its contents start, their length, and the contents, None if they are huge."""

    name: str
    offset: int
    size: int
    data: bytes | None


class TarStream:
    """Iterates over the files of a tar; afterwards ``sha256`` and ``length`` are those of the whole tar.

    Raises:
        DataError: while iterating: it is no plain tar, is damaged or cut off, or holds links or sparse files.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._place = 0
        self.length = 0
        self.sha256 = ""

    def __iter__(self) -> Iterator[File]:
        """Read on, file by file."""
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                raise DataError(f"{self._path}: is not a file")
            with open(self._path, "rb", buffering=1 << 20) as file:
                self.length = os.fstat(file.fileno()).st_size
                yield from self._files(file)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({error.strerror or error})") from None
        self.sha256 = self._digest.hexdigest()

    def _files(self, file: BinaryIO) -> Iterator[File]:
        name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        while True:
            at = self._place
            head = self._read(file, _BLOCK)
            if head == bytes(_BLOCK):
                self._end(file, at)
                return
            kind, size = self._checked(head, at)
            # Where the header has no room for it: eleven octal digits are 8 GiB.
            if b"size" in pax:
                size = _number(pax[b"size"], 10)
            start = self._place
            if size < 0 or start + size > self.length:
                raise DataError(f"{self._path}: is cut off at byte {at}; fetch it again")
            called = pax.get(b"path") or name or _name(head)
            # In tars of the seventh edition's kind a folder is a file whose name ends in a slash.
            if kind == b"\0" and called.endswith(b"/"):
                kind = b"5"
            # Plain files: of POSIX, of older tars, and contiguous ones, which nobody makes any more.
            if kind in (b"0", b"\0", b"7"):
                data = self._contents(file, size)
                yield File(called.decode("utf-8", "surrogateescape"), start, size, data)
            # GNU's long names (L) and link targets (K), pax records of the next entry (x) and of all (g).
            elif kind in (b"L", b"x", b"K", b"g"):
                data = self._contents(file, size)
                if kind == b"L":
                    name = (data or b"").rstrip(b"\0")
                if kind == b"x":
                    pax = _records(data or b"")
                    if any(key.startswith(b"GNU.sparse") for key in pax):
                        raise DataError(f"{self._path}: holds a sparse file; pack it again without --sparse")
                continue  # these speak of the entry that follows
            elif kind == b"5":
                self._contents(file, size)
            else:
                what = {b"1": "a link", b"2": "a link", b"S": "a sparse file"}.get(
                    kind, f"an entry of the kind {kind!r}"
                )
                raise DataError(
                    f"{self._path}: holds {shown(_name(head).decode(errors='replace'))}, {what}; pack it again with plain files"
                )
            name, pax = None, {}

    def _end(self, file: BinaryIO, at: int) -> None:
        """Read what lies behind the end mark, which is padding and nothing else."""
        padding = self._read(file, min(MOST_PADDING, self.length - self._place))
        if padding.strip(b"\0") or self._place < self.length:
            raise DataError(f"{self._path}: {beyond_the_end(at)}")

    def _checked(self, head: bytes, at: int) -> tuple[bytes, int]:
        """Kind and size of an entry whose header is sound."""
        # The sum of all bytes of the header, its own field taken as spaces.
        expected = _number(head[148:156], 8)
        if expected != sum(head) - sum(head[148:156]) + 8 * ord(" "):
            known = kind_of(head[:HEAD]) if at == 0 else None
            if known:
                raise DataError(f"{self._path}: is {known.name}, not a tar; {known.remedy}")
            raise DataError(f"{self._path}: is not a tar, or is damaged at byte {at}; fetch it again")
        # Where the highest bit is set, the size is a binary number: GNU tar's form for more than 8 GiB.
        size = int.from_bytes(head[125:136], "big") if head[124] & 0x80 else _number(head[124:136], 8)
        return head[156:157], size

    def _contents(self, file: BinaryIO, size: int) -> bytes | None:
        padded = -(-size // _BLOCK) * _BLOCK
        if padded <= _KEPT:
            return self._read(file, padded)[:size]
        for first in range(0, padded, 1 << 20):
            self._read(file, min(1 << 20, padded - first))
        return None

    def _read(self, file: BinaryIO, size: int) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise DataError(f"{self._path}: is damaged or cut off at byte {self._place}; fetch it again")
        self._digest.update(data)
        self._place += size
        return data


def _number(field: bytes, base: int) -> int:
    try:
        return int(field.strip(b"\0 ") or b"0", base)
    except ValueError:
        return -1


def _name(head: bytes) -> bytes:
    name = head[:100].partition(b"\0")[0]
    prefix = head[345:500].partition(b"\0")[0] if head[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(data: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, ``LENGTH KEY=VALUE`` each."""
    records = {}
    while data:
        length = _number(data.partition(b" ")[0], 10)
        if length <= 0:
            break
        key, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        records[key] = value
        data = data[length:]
    return records
