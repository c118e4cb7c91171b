"""Random numbers that are a pure function of what they are for: no state, so nothing to save, share or replay.

A stream is the sequence of the generator SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), started at a hash of (seed, epoch, purpose); a sample's numbers stand at its own places in it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio, odd: the step of SplitMix64."""
_DRAWS_PER_ID = 64


class Purpose(IntEnum):
    """What a stream is used for; the numbers are part of every run's reproducibility and must never change."""

    SHARD_ORDER = 0
    SAMPLE_ORDER = 1
    FLIP = 2
    PAD_CROP = 3
    RESIZED_CROP = 4
    CLASS_REMAINDER = 5
    CLASS_MEMBERS = 6
    COLOR = 7
    RAND_AUGMENT = 8
    ERASE = 9
    MIX = 10
    GRADIENT_ORDER = 11


def random_bits(seed: int, epoch: int, purpose: Purpose, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One uint64 per id, shape of ``ids``; different ids never give the same number."""
    return _stream(seed, epoch, purpose, ids.astype(np.uint64))


def uniform(seed: int, epoch: int, purpose: Purpose, ids: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), float64 [N, draws], for ``ids`` [N]."""
    # More would be the first numbers of the next id.
    assert draws <= _DRAWS_PER_ID
    places = ids.astype(np.uint64)[:, None] * np.uint64(_DRAWS_PER_ID) + np.arange(draws, dtype=np.uint64)
    bits = _stream(seed, epoch, purpose, places)
    # The upper 53 bits, as many as a double holds exactly.
    values: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return values


def integers(
    values: NDArray[np.float64], low: int | NDArray[np.int64], high: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """Turn numbers in [0, 1) into integers from ``low`` to ``high``, both included."""
    return low + np.floor(values * (np.asarray(high) - low + 1)).astype(np.int64)


def _stream(seed: int, epoch: int, purpose: Purpose, places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # One-element arrays, because numpy warns of the (wanted) overflow of scalars only.
    start = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch, int(purpose)):
        start = _mix(start + _GOLDEN + np.uint64(part))
    # Number p of SplitMix64, without those before it: its state grows by the same step each time.
    return _mix(start + places * _GOLDEN)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed
