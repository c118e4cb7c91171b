from __future__ import annotations

import itertools

import numpy as np
import pytest

from dist_train.data import order

SIZES = np.array([7, 100, 1, 0, 53, 99, 100, 100, 40], dtype=np.int64)


def test_epoch_has_each_id_once() -> None:
    for window in (1, 2, 4, 100):
        ids = order.epoch_order(SIZES, seed=3, epoch=2, window=window)
        assert np.array_equal(np.sort(ids), np.arange(500))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = order.epoch_order(SIZES, 3, 2, 4)
    assert np.array_equal(first, order.epoch_order(SIZES, 3, 2, 4))
    for seed, epoch in ((4, 2), (3, 3), (2, 3)):
        other = order.epoch_order(SIZES, seed, epoch, 4)
        assert np.mean(first == other) < 0.05


def test_order_is_the_one_of_earlier_versions() -> None:
    # A run that is resumed with a newer version must go on in the same order.
    assert order.epoch_order(np.array([3, 4, 5]), 0, 0, 2).tolist() == [11, 4, 9, 7, 8, 5, 10, 3, 6, 1, 0, 2]
    assert order.epoch_order(np.array([3, 4, 5]), 1, 7, 3).tolist() == [10, 8, 4, 5, 1, 6, 9, 2, 3, 11, 7, 0]


def test_a_window_reads_its_shards_only_and_mixes_them() -> None:
    sizes = np.full(32, 50, dtype=np.int64)
    shard = np.repeat(np.arange(32), 50)
    read = shard[order.epoch_order(sizes, 0, 0, window=8)].reshape(4, 400)
    windows = [set(part.tolist()) for part in read]
    assert all(len(shards) == 8 for shards in windows)
    assert set.union(*windows) == set(range(32))
    # In a mixed window two neighbours are of one shard once in eight times.
    assert np.mean(read[:, 1:] == read[:, :-1]) == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.parametrize(("last_batch", "steps"), [("drop", 10), ("wrap", 11)])
def test_global_batches(last_batch: str, steps: int) -> None:
    ids = order.epoch_order(SIZES, 0, 1, 4)
    assert order.steps_per_epoch(500, 48, last_batch) == steps  # type: ignore[arg-type]
    read = np.concatenate([order.global_batch_ids(ids, batch, 48) for batch in range(steps)])
    assert np.array_equal(read, np.concatenate([ids, ids])[: 48 * steps])


def test_wrap_repeats_a_split_smaller_than_a_batch() -> None:
    ids = np.array([2, 0, 1])
    assert order.steps_per_epoch(3, 8, "wrap") == 1
    assert order.steps_per_epoch(3, 8, "drop") == 0
    assert order.global_batch_ids(ids, 0, 8).tolist() == [2, 0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_micro_batches_of_a_global_batch_are_the_same_for_every_number_of_ranks(world_size: int) -> None:
    ids = order.epoch_order(SIZES, 0, 0, 4)
    batch = order.global_batch_ids(ids, 1, 48)
    ranks = [order.micro_batches(order.rank_slice(batch, rank, world_size), 2) for rank in range(world_size)]
    assert len({len(parts) for parts in ranks}) == 1
    assert [part.tolist() for part in itertools.chain(*ranks)] == batch.reshape(24, 2).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 2, 7, 24, 101])
def test_evaluation_takes_each_id_once(samples: int, world_size: int) -> None:
    shares = [order.rank_slice(np.arange(samples), rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), np.arange(samples))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_replacements_are_the_next_of_the_order_of_the_same_kind() -> None:
    ids = np.array([4, 2, 0, 3, 1])
    labeled = np.array([True, True, False, False, True])
    assert list(order.replacements(ids, 2, labeled)) == [1, 4]
    assert list(order.replacements(ids, 3, labeled)) == [2]
