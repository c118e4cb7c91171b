"""Which images thresholds are fitted on: clean, as many of every class, and none of those that are tested."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.reader import ShardReader
from dist_train.data.remote import DamagedShardError, ShardCache
from dist_train.errors import DataError
from shards.index import Index

Ids = NDArray[np.int64]
_NUMBERS = re.compile(rb"^(?:[0-9]+-)+")


def balanced(index: Index, share: float = 1.0) -> Ids:
    """Ids of as many images of every class as the smallest class has, times ``share`` and rounded down; sorted.

    Which of a class are taken depends on their names alone: the first in the order of their SHA-256.  Empty where a
    class has too few.
    """
    order = sorted(range(len(index)), key=lambda sample: hashlib.sha256(bytes(index.key[sample])).digest())
    by_class: list[list[int]] = [[] for _ in index.classes]
    for sample in order:
        if index.label[sample] >= 0:
            by_class[index.label[sample]].append(sample)
    each = int(share * min(len(members) for members in by_class))
    return np.array(sorted(sample for members in by_class for sample in members[:each]), dtype=np.int64)


@dataclass(frozen=True)
class Images:
    """A split whose images can be read: its index, and the name under which ``data`` has its shards."""

    index: Index
    data: DataConfig
    split: str


def check_disjoint(calibration: Images, test: Images) -> None:
    """Refuse a calibration split that holds images, byte for byte, of the test split.

    Raises:
        DataError: names the first of them.
    """
    same = _found_in(calibration, np.arange(len(calibration.index)), test, np.arange(len(test.index)))
    if len(same):
        key = calibration.index.key[same[0]].decode()
        raise DataError(
            f"{len(same)} images of {calibration.split} are in {test.split} as well (the first is {key}); thresholds must not be "
            f"fitted on images that are tested: give another --calibration, or --calibration {test.split} to hold out half of it"
        )


def copies(images: Images, ids: Ids, other: Images) -> Ids:
    """Those of ``ids`` that are in ``other`` as well, byte for byte and under the same name, as parts of one data set are.

    The numbers that shards put before a name differ between a data set and its part.
    """
    key, others = _names(images.index), _names(other.index)
    named = ids[np.isin(key[ids], others)]
    return _found_in(images, named, other, np.flatnonzero(np.isin(others, key[named])))


def _names(index: Index) -> NDArray[np.bytes_]:
    return np.array([_NUMBERS.sub(b"", key) for key in index.key.tolist()], dtype=np.bytes_)


def without_copies(images: Images, ids: Ids) -> Ids:
    """Those of ``ids`` of which the rest of the split has no copy, byte for byte."""
    rest = np.setdiff1d(np.arange(len(images.index)), ids)
    return np.setdiff1d(ids, _found_in(images, ids, images, rest))


def _found_in(images: Images, ids: Ids, other: Images, others: Ids) -> Ids:
    """Those of ``ids`` that are, byte for byte, among ``others`` of the other split; only what has a size of theirs is read."""
    size, sizes = images.index.size, other.index.size
    common = np.intersect1d(size[ids], sizes[others])
    digests = {digest for _, digest in _digests(other, others[np.isin(sizes[others], common)])}
    candidates = ids[np.isin(size[ids], common)]
    return np.array([sample for sample, digest in _digests(images, candidates) if digest in digests], dtype=np.int64)


def _digests(images: Images, samples: Ids) -> Iterable[tuple[int, bytes]]:
    if not len(samples):
        return
    index, place = images.index, images.data.location(images.split)
    assert index.folder is not None, "only an index that was loaded has images"
    # Behind a URL, an image that nobody has fetched yet may be a copy as well.
    cache = ShardCache(index, [place], images.data) if isinstance(place, str) else None
    reader = ShardReader(index, Path(index.folder), cache=cache)
    try:
        for sample in samples.tolist():
            try:
                yield sample, hashlib.sha256(reader.read(sample).tobytes()).digest()
            except DamagedShardError:
                continue  # evaluation says which images cannot be read
    finally:
        reader.close()
        if cache:
            cache.close()
