"""Files and folders that are whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

DRAFT = ".tmp"
"""Ending of what is still being written."""


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file to; flushed to disk and renamed to ``path`` at the end, removed on an error.

    The name is unique to this process among all machines, so that no two writers ever share a draft.
    """
    draft = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{DRAFT}")
    try:
        yield draft
        # Without the flush a machine that loses power can keep the new name and lose the contents.
        flush(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that readers see the old contents or the new ones, never a part; raises OSError."""
    with draft_of(path) as draft:
        draft.write_bytes(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


@contextlib.contextmanager
def draft_folder_of(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``; flushed with its files and renamed to ``path`` at the end, removed on an error.

    What is at ``path`` already is replaced.
    """
    draft = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{DRAFT}")
    replaced = draft.with_name(f"{draft.name.removesuffix(DRAFT)}-replaced{DRAFT}")
    try:
        # In containers, hosts and processes have the same names and numbers again: one that was killed may have left it.
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        mode = 0o666 & ~_umask()
        for file in draft.rglob("*"):
            if not file.is_dir():
                file.chmod(mode)  # safetensors makes files that only their owner can read; the umask decides instead
            flush(file)
        # The files first, then the folder's entries, then the rename: whatever is at `path` is whole at any time.
        flush(draft)
        if path.exists():
            # No folder can be renamed over another one, and one that is being removed is not whole.
            path.rename(replaced)
        try:
            draft.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        flush(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The permissions that this process takes from new files; reading it by os.umask would change it for a moment."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
