"""Tar archives read in place: what lies where in them, also in tars inside of tars."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from dist_train.errors import DataError
from dist_train.files import draft_of
from shards.kinds import HEAD, kind_of

_BLOCK = 512
"""Bytes of a tar's header; one of zeros is the end."""
MOST_PADDING = 1 << 20
"""Zeros behind the end of a tar: programs fill up their last record, of 10 kB as a rule."""
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

_DAMAGED = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged archive raises; a plain OSError is the disk's."""


class Member(NamedTuple):
    """A member of a tar: its name, its bytes, and where its contents start in the file (-1 for a link or a device).

    A hard link is another name of the earlier member ``same_as``.
    """

    name: str
    size: int
    offset: int
    is_folder: bool
    same_as: str | None = None


def members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The members of an uncompressed tar, or of one that takes ``size`` bytes of a file from ``start`` on.

    Raises:
        DataError: it is not a tar, or is damaged or cut off.
    """
    try:
        with open(_regular(path), "rb") as file:
            end = os.fstat(file.fileno()).st_size if size is None else start + size
            file.seek(start)
            # "r:" takes no compressed tar, in which an offset would be no place in the file.
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                    # Its bytes do not lie in a row, so an offset and a size do not give them.
                    if member.issparse():
                        raise DataError(f"{path}: holds {member.name} as a sparse file; pack it again without --sparse")
                    if member.offset_data + member.size > end:
                        raise DataError(f"{path}: is cut off in {member.name}; fetch it again")
                    offset = member.offset_data if member.isreg() else -1
                    same_as = _plain(path, member.linkname) if member.islnk() else None
                    yield Member(_plain(path, member.name), member.size, offset, member.isdir(), same_as)
                # tarfile takes a damaged or missing header for the end, and would lose all that follows without a word.
                file.seek(tar.offset)
                if file.read(_BLOCK) != bytes(_BLOCK):
                    raise DataError(f"{path}: is damaged or cut off at byte {tar.offset}; fetch it again")
                rest = end - file.tell()
                if rest > MOST_PADDING or file.read(rest).strip(b"\0"):
                    raise DataError(f"{path}: {beyond_the_end(tar.offset)}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except tarfile.TarError as error:
        raise _not_a_tar(path, start, f"is not a tar archive, or a damaged one ({error})") from None


def beyond_the_end(offset: int) -> str:
    """What to say of a tar that goes on behind its end: it would be read in part only."""
    return (
        f"goes on behind its end at byte {offset}: two tars that were joined (pack them again, or give them one at a time), or "
        "one that is not there in full (fetch it again)"
    )


def _plain(path: Path, name: str) -> str:
    """A member's name without parts that mean nothing."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise DataError(
            f"{path}: holds {name}, which lies outside of the archive; pack it again from within its folder"
        )
    return "/".join(parts)


def _regular(path: Path) -> Path:
    """The path of a file, refused where it is a pipe or a device, which reading could hang on forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path}: is neither a folder nor a file")
    return path


def _not_a_tar(path: Path, start: int, otherwise: str) -> DataError:
    """What to say of a file that is no tar: what it is, where that shows."""
    with open(path, "rb") as file:
        file.seek(start)
        head = file.read(HEAD)
    # What can be uncompressed here needs no advice to do so.
    kind = None if any(map(head.startswith, _OPENERS)) else kind_of(head)
    return DataError(f"{path}: is {kind.name}, not a tar; {kind.remedy}" if kind else f"{path}: {otherwise}")


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a small archive, compressed or not, each read whole.

    Raises:
        DataError: it cannot be read, is not an archive, or is damaged.
    """
    try:
        with tarfile.open(_regular(path)) as tar:
            for member in tar:
                if file := tar.extractfile(member):
                    yield member.name, file.read()
            while tar.fileobj and tar.fileobj.read(1 << 20):
                pass  # up to the compressed file's end, where its checksum stands
    except _DAMAGED:
        raise _not_a_tar(path, 0, "is not an archive, or a damaged one; fetch it again") from None
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
    # By its state: another archive at this path is uncompressed anew.
    name = hashlib.sha256(version(path).encode()).hexdigest()[:16]
    target = scratch / f"{name}.tar"
    if target.exists():
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    with draft_of(target) as draft, open(draft, "wb") as file:
        _decompress(path, opener, file)
    return target


def version(path: Path) -> str:
    """A text that is another one when a file was replaced or changed."""
    state = path.stat()
    return f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"


def _opener(path: Path) -> Any:
    try:
        with open(_regular(path), "rb") as file:
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
