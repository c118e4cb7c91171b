from __future__ import annotations

import numpy as np
import pytest

from dist_train.data.passes import epoch_order

SIZES = np.array([7, 100, 1, 0, 53, 99, 100, 100, 40], dtype=np.int64)


def test_epoch_has_each_id_once() -> None:
    for window in (1, 2, 4, 100):
        ids = epoch_order(SIZES, seed=3, number=2, window=window)
        assert np.array_equal(np.sort(ids), np.arange(500))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(SIZES, 3, 2, 4)
    assert np.array_equal(first, epoch_order(SIZES, 3, 2, 4))
    for seed, epoch in ((4, 2), (3, 3), (2, 3)):
        other = epoch_order(SIZES, seed, epoch, 4)
        assert np.mean(first == other) < 0.05


def test_order_is_the_one_of_earlier_versions() -> None:
    # A run that is resumed with a newer version must go on in the same order.
    assert epoch_order(np.array([3, 4, 5]), 0, 0, 2).tolist() == [11, 4, 9, 7, 8, 5, 10, 3, 6, 1, 0, 2]
    assert epoch_order(np.array([3, 4, 5]), 1, 7, 3).tolist() == [10, 8, 4, 5, 1, 6, 9, 2, 3, 11, 7, 0]


def test_a_window_reads_its_shards_only_and_mixes_them() -> None:
    sizes = np.full(32, 50, dtype=np.int64)
    shard = np.repeat(np.arange(32), 50)
    read = shard[epoch_order(sizes, 0, 0, window=8)].reshape(4, 400)
    windows = [set(part.tolist()) for part in read]
    assert all(len(shards) == 8 for shards in windows)
    assert set.union(*windows) == set(range(32))
    # In a mixed window two neighbours are of one shard once in eight times.
    assert np.mean(read[:, 1:] == read[:, :-1]) == pytest.approx(1 / 8, abs=0.03)
