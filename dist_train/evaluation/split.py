"""Which images thresholds are fitted on: clean, as many of every class, and none of those that are tested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.data.reader import ShardReader
from dist_train.errors import DataError, StorageError
from shards.index import Index

Ids = NDArray[np.int64]


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


def check_disjoint(calibration: Index, test: Index, names: tuple[str, str]) -> None:
    """Refuse a calibration split that holds images, byte for byte, of the test split.

    Raises:
        DataError: names the first of them.
    """
    same = _found_in(calibration, np.arange(len(calibration)), test, np.arange(len(test)))
    if len(same):
        key = calibration.key[same[0]].decode()
        raise DataError(
            f"{len(same)} images of {names[0]} are in {names[1]} as well (the first is {key}); thresholds must not be "
            "fitted on images that are tested: give another --calibration, or none to hold out half of the split"
        )


def copies(index: Index, ids: Ids, other: Index) -> Ids:
    """Those of ``ids`` that are in ``other`` as well, byte for byte and under the same name, as parts of one data set are."""
    named = ids[np.isin(index.key[ids], other.key)]
    return _found_in(index, named, other, np.flatnonzero(np.isin(other.key, index.key[named])))


def without_copies(index: Index, ids: Ids) -> Ids:
    """Those of ``ids`` of which the rest of the split has no copy, byte for byte."""
    rest = np.setdiff1d(np.arange(len(index)), ids)
    return np.setdiff1d(ids, _found_in(index, ids, index, rest))


def _found_in(index: Index, ids: Ids, other: Index, others: Ids) -> Ids:
    """Those of ``ids`` that are, byte for byte, among ``others`` of the other index; only what has a size of theirs is read."""
    common = np.intersect1d(index.size[ids], other.size[others])
    digests = {digest for _, digest in _digests(other, others[np.isin(other.size[others], common)])}
    candidates = ids[np.isin(index.size[ids], common)]
    return np.array([sample for sample, digest in _digests(index, candidates) if digest in digests], dtype=np.int64)


def _digests(index: Index, samples: Ids) -> Iterable[tuple[int, bytes]]:
    if not len(samples):
        return
    assert index.folder is not None, "only an index that was loaded has images"
    reader = ShardReader(index, Path(index.folder))
    try:
        for sample in samples.tolist():
            try:
                yield sample, hashlib.sha256(reader.read(sample).tobytes()).digest()
            except (OSError, StorageError):
                continue  # evaluation says which images cannot be read
    finally:
        reader.close()
