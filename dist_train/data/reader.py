"""The bytes of samples, read from the shards by (shard, offset, size)."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.index import Index

_OPEN_SHARDS = 128


class ShardReader:
    """Reads samples of a split; keeps the shards in use open.  For one thread at a time."""

    def __init__(self, index: Index, folder: Path) -> None:
        self._index = index
        self._folder = folder
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The encoded image of a sample, uint8 [size]; what fails once is tried once more on a newly opened file.

        Raises:
            OSError: the shard cannot be opened or read, or ends before the sample does.
        """
        try:
            return self._read(sample)
        except OSError:
            self._close(int(self._index.shard[sample]))
            return self._read(sample)

    def close(self) -> None:
        """Close all shards."""
        for shard in list(self._open):
            self._close(shard)

    def _read(self, sample: int) -> NDArray[np.uint8]:
        shard, offset = int(self._index.shard[sample]), int(self._index.offset[sample])
        size = int(self._index.size[sample])
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) < size:
            raise OSError(f"the shard ends {size - len(data)} bytes before the end of the image")
        return np.frombuffer(data, dtype=np.uint8)

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= _OPEN_SHARDS:
                self._close(next(iter(self._open)))
            self._open[shard] = os.open(self._folder / self._index.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def _close(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)
