from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest

from dist_train.config import DataConfig
from dist_train.data import order
from dist_train.data.passes import epoch_order
from dist_train.errors import ConfigError
from shards.index import UNLABELED

SIZES = np.array([7, 100, 1, 0, 53, 99, 100, 100, 40], dtype=np.int64)


@pytest.mark.parametrize(("last_batch", "steps"), [("drop", 10), ("wrap", 11)])
def test_global_batches(last_batch: str, steps: int) -> None:
    ids = epoch_order(SIZES, 0, 1, 4)
    assert order.steps_per_epoch(500, 48, last_batch) == steps  # type: ignore[arg-type]
    read = np.concatenate([order.global_batch_views(ids, batch, 48) for batch in range(steps)])
    assert np.array_equal(read, np.concatenate([ids, ids])[: 48 * steps])


def test_wrap_repeats_a_split_smaller_than_a_batch() -> None:
    ids = np.array([2, 0, 1])
    assert order.steps_per_epoch(3, 8, "wrap") == 1
    assert order.steps_per_epoch(3, 8, "drop") == 0
    assert order.global_batch_views(ids, 0, 8).tolist() == [2, 0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_micro_batches_of_a_global_batch_are_the_same_for_every_number_of_ranks(world_size: int) -> None:
    ids = epoch_order(SIZES, 0, 0, 4)
    batch = order.global_batch_views(ids, 1, 48)
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


BATCH = 24
LABEL = np.where(np.arange(500) % 9 < 2, np.arange(500) % 5, UNLABELED)
SAMPLED = [
    {"labeled_fraction": 0.25},
    {"labeled_fraction": 0.9},
    {"class_balanced": True},
    {"repeated_augment": 3},
    {"labeled_fraction": 0.5, "class_balanced": True, "repeated_augment": 2},
    {"labeled_fraction": 0.25, "last_batch": "wrap"},
]


def sampled(label: np.ndarray = LABEL, batch: int = BATCH, **options: object) -> order.Order:
    data = DataConfig(shards=Path("x"), shuffle_shards=4, **options)  # type: ignore[arg-type]
    return order.Order(SIZES, label, data, 3, batch)


def batches(views: np.ndarray, made: order.Order, batch: int = BATCH) -> np.ndarray:
    """Views of the epoch's global batches [steps, batch]."""
    return np.stack([order.global_batch_views(views, number, batch) for number in range(made.steps_per_epoch)])


@pytest.mark.parametrize(("share", "labeled"), [(0.25, 6), (0.5, 12), (0.9, 22)])
def test_every_global_batch_has_the_same_number_of_labeled_images_spread_evenly(share: float, labeled: int) -> None:
    made = sampled(labeled_fraction=share)
    for epoch in (0, 1, 7):
        known = LABEL[batches(made.epoch(epoch), made) % 500] != UNLABELED
        assert known.sum(axis=1).tolist() == [labeled] * made.steps_per_epoch
        # Three ranks, whose parts differ by one labeled image at most.
        by_rank = known.reshape(-1, 3, BATCH // 3).sum(axis=2)
        assert np.ptp(by_rank, axis=1).max() <= 1


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_an_epoch_is_one_pass_over_the_longer_part_and_the_shorter_goes_round(share: float) -> None:
    made = sampled(labeled_fraction=share)
    known = np.flatnonzero(LABEL != UNLABELED)
    unknown = np.flatnonzero(LABEL == UNLABELED)
    labeled = round(share * BATCH)
    longer, shorter = unknown, known
    if len(known) / labeled > len(unknown) / (BATCH - labeled):
        longer, shorter = known, unknown
    assert made.pass_size == len(longer)
    seen = np.zeros(500, dtype=np.int64)
    for epoch in range(6):
        ids = batches(made.epoch(epoch), made).reshape(-1) % 500
        once = np.bincount(ids, minlength=500)
        assert once[longer].max() == 1
        assert (once[longer] == 0).sum() == made.pass_size - made.steps_per_epoch * made.per_batch < made.per_batch
        seen += once
        # Whenever one looks, the images of the shorter part came equally often, up to one.
        assert np.ptp(seen[shorter]) <= 1
    assert seen[shorter].min() >= 6


def test_classes_are_balanced_in_every_pass_and_in_every_stretch() -> None:
    label = np.repeat(np.arange(3), [380, 100, 20])
    label = label[np.random.default_rng(0).permutation(500)]
    made = sampled(label, class_balanced=True)
    ids = made.epoch(2) % 500
    times = np.bincount(ids, minlength=500)
    assert sorted(np.bincount(label[ids])) == [166, 167, 167]
    for number in range(3):
        assert np.ptp(times[label == number]) <= 1
    # Rare images come again and again over the whole epoch, not in a heap: 20 images 8 or 9 times each.
    rare = np.flatnonzero(np.isin(ids, np.flatnonzero(label == 2)[:1]))
    assert np.diff(rare).max() < 250
    shares = np.stack([np.bincount(label[part], minlength=3) for part in ids.reshape(5, 100)])
    assert np.abs(shares - 100 / 3).max() < 20


WEIGHTS = np.repeat([2.0, 1.0, 0.5, 2.25], [100, 200, 100, 100])


@pytest.mark.parametrize("last_batch", ["drop", "wrap"])
def test_every_image_of_a_mixture_comes_as_often_as_its_weight_says(last_batch: str) -> None:
    data = DataConfig(shards=Path("x"), shuffle_shards=4, last_batch=last_batch)
    made = order.Order(SIZES, LABEL, data, 3, BATCH, weight=WEIGHTS)
    assert made.pass_size == 200 + 200 + 50 + 225
    assert made.steps_per_epoch == (675 // BATCH if last_batch == "drop" else -(-675 // BATCH))
    seen = np.zeros(500, dtype=np.int64)
    for epoch in range(4):
        views = made.epoch(epoch)
        times = np.bincount(views % 500, minlength=500)
        assert len(views) == len(set(views)) == 675
        assert (times[:100] == 2).all()
        assert (times[100:300] == 1).all()
        assert np.bincount(times[300:400]).tolist() == [50, 50]
        assert np.bincount(times[400:]).tolist() == [0, 0, 75, 25]
        seen += times
        # Any tenth of the epoch has of every part the share that the whole has.
        tenths = np.stack(
            [np.bincount(np.digitize(part % 500, [100, 300, 400]), minlength=4) for part in views[:670].reshape(10, 67)]
        )
        assert np.abs(tenths - 67 / 675 * np.array([200, 200, 50, 225])).max() <= 3
    # Over four epochs every image came exactly four times its weight.
    assert (seen == 4 * WEIGHTS).all()


def test_a_mixture_of_weight_one_is_the_plain_order_and_of_equal_weights_one_shuffling() -> None:
    data = DataConfig(shards=Path("x"), shuffle_shards=4)
    plain = order.Order(SIZES, LABEL, data, 3, BATCH)
    assert np.array_equal(plain.epoch(2), order.Order(SIZES, LABEL, data, 3, BATCH, weight=np.ones(500)).epoch(2))
    twice = order.Order(SIZES, LABEL, data, 3, BATCH, weight=np.full(500, 2.0))
    assert np.array_equal(np.sort(twice.epoch(1)), np.arange(1000))


def test_a_part_of_which_nothing_would_ever_come_is_refused() -> None:
    weight = np.repeat([1.0, 0.004], [400, 100])
    with pytest.raises(ConfigError, match=r"100 images of weight 0\.004, of which none would ever come"):
        order.Order(SIZES, LABEL, DataConfig(shards=Path("x")), 3, BATCH, weight=weight)


def test_weights_do_not_go_with_other_ways_of_sampling() -> None:
    for options in ({"class_balanced": True}, {"labeled_fraction": 0.25}, {"repeated_augment": 2}):
        data = DataConfig(shards=Path("x"), **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"data\.train has weights, which cannot be combined"):
            order.Order(SIZES, LABEL, data, 3, BATCH, weight=WEIGHTS)


def test_the_appearances_of_a_rare_image_are_far_apart() -> None:
    label = (np.arange(1600) % 3 == 0).astype(np.int64)
    data = DataConfig(shards=Path("x"), shuffle_shards=2, class_balanced=True)
    views = order.Order(np.full(32, 50), label, data, 0, BATCH).epoch(0)
    twice = np.flatnonzero(np.isin(np.arange(1600) + 1600, views))
    assert len(twice) == 800 - 534
    apart = [abs(int(np.flatnonzero(views == v)[0]) - int(np.flatnonzero(views == v + 1600)[0])) for v in twice]
    # Two independent places are a third of the epoch apart.
    assert np.mean(apart) / 1600 == pytest.approx(1 / 3, abs=0.06)


def test_repeats_put_other_views_of_an_image_far_apart_into_its_global_batch() -> None:
    made = sampled(repeated_augment=3)
    seen = np.zeros(500, dtype=np.int64)
    for epoch in range(3):
        rows = batches(made.epoch(epoch), made)
        assert made.steps_per_epoch == 166 // 8
        for row in rows:
            # The first third of the batch again in the second and third, each time as another view.
            assert (row.reshape(3, 8) % 500 == row[:8] % 500).all()
            assert (row.reshape(3, 8) // 500 == [[0], [1], [2]]).all()
        seen += np.bincount(made.epoch(epoch) % 500, minlength=500)
    assert sorted(seen.tolist())[:3] == [0, 0, 3]  # 500 is not a multiple of 3
    assert seen.max() == 3


@pytest.mark.parametrize(
    ("options", "weight", "first", "checksum"),
    [
        ({}, None, [203, 19, 162], 669547472),
        ({"labeled_fraction": 0.25}, None, [25, 297, 210], 1270857918),
        ({"labeled_fraction": 0.25, "last_batch": "wrap"}, None, [25, 153, 210], 2161861405),
        ({"class_balanced": True}, None, [25, 210, 91], 2184331971),
        ({"repeated_augment": 3}, None, [44, 481, 52], 2632820557),
        ({"labeled_fraction": 0.5, "class_balanced": True, "repeated_augment": 2}, None, [450, 122, 19], 611916828),
        ({}, WEIGHTS, [119, 41, 37], 3947712341),
    ],
)
def test_every_way_of_sampling_has_the_order_of_earlier_versions(
    options: dict[str, object], weight: np.ndarray | None, first: list[int], checksum: int
) -> None:
    # A run that is resumed with a newer version must go on in the same order.
    data = DataConfig(shards=Path("x"), shuffle_shards=4, **options)  # type: ignore[arg-type]
    views = order.Order(SIZES, LABEL, data, 3, BATCH, weight=weight).epoch(5)
    assert views[:3].tolist() == first
    assert zlib.crc32(views.astype("<i8").tobytes()) == checksum


@pytest.mark.parametrize("options", SAMPLED)
def test_a_view_comes_once_an_epoch_and_the_order_is_that_of_any_number_of_ranks(options: dict[str, object]) -> None:
    made, again = sampled(**options), sampled(**options)
    views = made.epoch(5)
    assert len(np.unique(views)) == len(views)
    assert np.array_equal(views, again.epoch(5))
    assert not np.array_equal(views, made.epoch(6))
    for batch in batches(views, made)[:2]:
        for world_size in (1, 2, 3, 8):
            ranks = [order.micro_batches(order.rank_slice(batch, rank, world_size), 3) for rank in range(world_size)]
            assert np.concatenate(list(itertools.chain(*ranks))).tolist() == batch.tolist()


def test_a_replacement_is_another_image() -> None:
    views = np.array([0, 5, 1, 6, 10, 2])  # of five samples
    labeled = np.array([True, True, False, True, True])
    assert list(order.replacements(views, 0, labeled)) == [1, 6]
    assert list(order.replacements(views, 5, labeled)) == []


@pytest.mark.parametrize(
    ("label", "options", "text"),
    [
        (np.zeros(500, dtype=np.int64), {"labeled_fraction": 0.5}, "no unlabeled images; leave it out"),
        (np.full(500, UNLABELED), {"labeled_fraction": 0.5}, "no labeled images; leave it out"),
        (np.full(500, UNLABELED), {"class_balanced": True}, "class_balanced is true, but x/train has no labeled"),
        (LABEL, {"labeled_fraction": 0.01}, r"of 24 images in a global batch is 0; allowed are 0.0417 to 0.958"),
        (
            LABEL,
            {"repeated_augment": 5},
            r"global_batch is 24, which does not divide by data.repeated_augment, 5; use 20 or 25",
        ),
        (LABEL, {"repeated_augment": 48}, r"repeated_augment, 48; use 48"),
    ],
)
def test_sampling_that_cannot_be(label: np.ndarray, options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sampled(label, **options)
