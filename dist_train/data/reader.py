"""The bytes of samples, read from the shards by (shard, offset, size)."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.data.remote import DamagedShardError, ShardCache
from dist_train.errors import StorageError
from shards.index import Index

_OPEN_SHARDS = 128


class ShardReader:
    """Reads samples of a split, several at once; keeps the shards in use open.  For any number of threads.

    Args:
        index: the split.
        folder: where its shards are.
        threads: samples read at the same time.
        cache: brings the shards into ``folder`` where they are behind a URL.
        keep_open: files kept open at most; what the cache removes is gone from the disk only when it is closed.
    """

    def __init__(
        self,
        index: Index,
        folder: Path,
        threads: int = 1,
        cache: ShardCache | None = None,
        keep_open: int = _OPEN_SHARDS,
    ) -> None:
        self._index = index
        self._folder = folder
        self._cache = cache
        self._keep_open = keep_open
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._stamps: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The encoded image of a sample, uint8 [size]; what fails once is tried once more on a newly opened file.

        Raises:
            DamagedShardError: its shard ends before the sample does, or cannot be fetched as the index says.
            StorageError: its shard cannot be opened or read, which says nothing about the image.
        """
        shard = int(self._index.shard[sample])
        try:
            return self._read(sample)
        except OSError:
            # Without the file that failed: after a remount, the open one would fail again.
            self._forget(shard)
        try:
            return self._read(sample)
        except DamagedShardError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self._path(shard)}: cannot be read ({error.strerror or error}), although the index names it; bring its file "
                "system back, and run the same command again"
            ) from None

    def read_all(self, samples: Sequence[int], failed: Callable[[int], NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """The encoded images of samples, in their order, ``failed(sample)`` standing in for one whose shard is damaged.

        Raises:
            StorageError: as :meth:`read`.
        """

        def read_part(part: Sequence[int]) -> list[NDArray[np.uint8]]:
            self._announce(part)
            images = []
            for sample in part:
                try:
                    images.append(self.read(sample))
                except DamagedShardError:
                    images.append(failed(sample))
            return images

        # One part per thread rather than one task per sample: small images are read faster than tasks are handed over.
        parts = [samples[first :: self._threads] for first in range(self._threads)]
        images: list[NDArray[np.uint8]] = [np.empty(0, dtype=np.uint8)] * len(samples)
        for first, part in enumerate(self._pool.map(read_part, parts)):
            images[first :: self._threads] = part
        return images

    def changed(self, sample: int) -> bool:
        """Whether the sample's shard is another file, or was written to, since it was first opened here."""
        shard = int(self._index.shard[sample])
        try:
            found = _stamp(os.stat(self._path(shard)), self._cache is not None)
        except OSError:
            return False
        return self._stamps.get(shard, found) != found

    def close(self) -> None:
        """End the threads and close all shards."""
        self._pool.shutdown(cancel_futures=True)
        for shard in list(self._open):
            self._forget(shard)

    def _read(self, sample: int) -> NDArray[np.uint8]:
        shard, offset = int(self._index.shard[sample]), int(self._index.offset[sample])
        size = int(self._index.size[sample])
        # Held while reading: another thread may push the shard out, and its number must not become another file's.
        descriptor = self._descriptor(shard)
        data = os.pread(descriptor.number, size, offset)
        if len(data) < size:
            raise DamagedShardError(f"the shard ends {size - len(data)} bytes before the end of the image")
        return np.frombuffer(data, dtype=np.uint8)

    def _announce(self, samples: Sequence[int]) -> None:
        """Tell the kernel what will be read: it starts with all at once, which doubles one thread's rate from a cold disk."""
        for sample in samples:
            with contextlib.suppress(OSError):  # the reading itself says what is wrong
                # Not held as in _read: should the file be closed meanwhile, the advice alone is lost.
                number = self._descriptor(int(self._index.shard[sample])).number
                place = int(self._index.offset[sample]), int(self._index.size[sample])
                os.posix_fadvise(number, *place, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, shard: int) -> _Descriptor:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        # Opened without the lock, since it may take long on a network's file system; of two threads the later one wins.
        descriptor = _Descriptor(self._cache.path(shard) if self._cache else self._path(shard))
        with self._lock:
            self._stamps.setdefault(shard, _stamp(os.fstat(descriptor.number), self._cache is not None))
            self._open[shard] = descriptor
            if len(self._open) > self._keep_open:
                self._open.popitem(last=False)
        return descriptor

    def _path(self, shard: int) -> Path:
        return self._folder / self._index.shards[shard].name

    def _forget(self, shard: int) -> None:
        with self._lock:
            self._open.pop(shard, None)


class _Descriptor:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # It is not there where os.open has failed.
        if hasattr(self, "number"):
            os.close(self.number)


def _stamp(status: os.stat_result, cached: bool) -> tuple[int, int]:
    # The cache sets a shard's time whenever somebody uses it.
    return status.st_ino, status.st_size if cached else status.st_mtime_ns
