from __future__ import annotations

import numpy as np
import pytest

from dist_train.data import rng as counter
from dist_train.data.rng import Purpose


def test_mixing_is_splitmix64() -> None:
    # The first outputs of SplitMix64 with seed 1234567, as published for checking implementations.
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert counter._mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_bits_never_collide_and_numbers_are_uniform() -> None:
    ids = np.arange(200_000)
    assert len(np.unique(counter.random_bits(0, 0, Purpose.SAMPLE_ORDER, ids))) == 200_000
    numbers = counter.uniform(0, 0, Purpose.PAD_CROP, ids, 2)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    # Chi-square of 99 degrees of freedom: mean 99, standard deviation 14.
    assert ((counts - 4000) ** 2 / 4000).sum() == pytest.approx(99, abs=60)


def test_purposes_are_independent() -> None:
    ids = np.arange(50_000)
    flat = [counter.uniform(1, 1, purpose, ids, 1)[:, 0] for purpose in Purpose]
    flat.append(counter.uniform(1, 1, Purpose.FLIP, ids + 1, 1)[:, 0])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.02


def test_integers_reach_both_ends_and_no_further() -> None:
    ends = np.array([0.0, 1 - 2.0**-53])
    assert counter.integers(ends, -4, 4).tolist() == [-4, 4]
    assert counter.integers(ends, 0, np.array([0, 2**20])).tolist() == [0, 2**20]
