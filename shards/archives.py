"""Tar archives read in place: what lies where in them, also in tars inside of tars."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from dist_train.errors import DataError

_BLOCK = 512
"""Bytes of a tar's header; one of zeros is the end."""
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

_DAMAGED = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged archive raises; a plain OSError is the disk's."""


class Member(NamedTuple):
    """A member of a tar: its name, its bytes, and where its contents start in the file (-1 for a link or a device)."""

    name: str
    size: int
    offset: int
    is_folder: bool


def members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The members of an uncompressed tar, or of one that takes ``size`` bytes of a file from ``start`` on.

    Raises:
        DataError: it is not a tar, or is damaged or cut off.
    """
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size if size is None else start + size
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                    if member.offset_data + member.size > end:
                        raise DataError(f"{path}: is cut off in {member.name}; fetch it again")
                    offset = member.offset_data if member.isreg() else -1
                    yield Member(member.name.removeprefix("./"), member.size, offset, member.isdir())
                # tarfile takes a damaged or missing header for the end, and would lose all that follows without a word.
                file.seek(tar.offset)
                if file.read(_BLOCK) != bytes(_BLOCK):
                    raise DataError(f"{path}: is damaged or cut off at byte {tar.offset}; fetch it again")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except tarfile.TarError as error:
        raise DataError(f"{path}: is not a tar archive, or a damaged one ({error})") from None


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a small archive, compressed or not, each read whole.

    Raises:
        DataError: it cannot be read, is not an archive, or is damaged.
    """
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if file := tar.extractfile(member):
                    yield member.name, file.read()
            while tar.fileobj and tar.fileobj.read(1 << 20):
                pass  # up to the compressed file's end, where its checksum stands
    except _DAMAGED:
        raise DataError(f"{path}: is not an archive, or a damaged one; fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def unpacked(path: Path, scratch: Path | None) -> Path:
    """The archive itself, or what it is uncompressed, as a file in ``scratch``, which is found again later.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    opener = _opener(path)
    if opener is None:
        return path
    if scratch is None:
        raise DataError(f"{path}: is compressed; uncompress it first")
    name = hashlib.sha256(stamp(path).encode()).hexdigest()[:16]
    target = scratch / f"{name}.tar"
    if target.exists():
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".part")
    with open(draft, "wb") as file:
        _decompress(path, opener, file)
    os.replace(draft, target)
    return target


def stamp(path: Path) -> str:
    """A text that is another one when a file was replaced or changed."""
    state = path.stat()
    return f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"


def _opener(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            head = file.read(6)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)


def _decompress(path: Path, opener: Any, target: IO[bytes]) -> None:
    with opener(path) as source:
        while True:
            try:
                block = source.read(1 << 20)
            except (OSError, *_DAMAGED) as error:
                raise DataError(f"{path}: is damaged or cut off ({error}); fetch it again") from None
            if not block:
                return
            target.write(block)
