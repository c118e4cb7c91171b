from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dist_train.config import DataConfig
from dist_train.data import augment
from dist_train.data.rng import Purpose, uniform

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIZES = np.array([[375, 500], [500, 375], [32, 32], [1200, 90], [20, 900], [1, 1], [2, 3]], dtype=np.int64)


def plain_crop(draws: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """The rule of one random resized crop, step by step: y, x, height, width."""
    for share, shape, place_y, place_x in draws.reshape(10, 4).tolist():
        area = height * width * (SCALE[0] + share * (SCALE[1] - SCALE[0]))
        aspect = math.exp(math.log(RATIO[0]) + shape * (math.log(RATIO[1]) - math.log(RATIO[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(place_y * (height - h + 1)), int(place_x * (width - w + 1)), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return round((height - h) / 2), round((width - w) / 2), h, w


def test_resized_crops_follow_the_plain_rule() -> None:
    ids = np.arange(2100)
    sizes = SIZES[ids % len(SIZES)]
    anchor, shape = augment.resized_crops(1, 2, ids, sizes, SCALE, RATIO)
    draws = uniform(1, 2, Purpose.RESIZED_CROP, ids, 40)
    plain = [plain_crop(draw, *size) for draw, size in zip(draws, sizes.tolist())]
    assert np.concatenate([anchor, shape], axis=1).tolist() == [list(window) for window in plain]
    assert (anchor >= 0).all()
    assert (anchor + shape <= sizes).all()
    assert (shape >= 1).all()


def test_resized_crops_cover_scale_and_ratio() -> None:
    ids = np.arange(20_000)
    anchor, shape = augment.resized_crops(0, 0, ids, np.full((20_000, 2), 1000), (0.1, 0.5), RATIO)
    share = shape.prod(axis=1) / 1e6
    aspect = np.log(shape[:, 1] / shape[:, 0])
    assert share.min() == pytest.approx(0.1, abs=0.002)
    assert share.max() == pytest.approx(0.5, abs=0.002)
    assert share.mean() == pytest.approx(0.3, abs=0.004)
    assert aspect.mean() == pytest.approx(0, abs=0.006)
    assert np.abs(aspect).max() == pytest.approx(math.log(4 / 3), abs=0.005)
    centre = (anchor + shape / 2).mean(axis=0)
    assert centre == pytest.approx([500, 500], abs=6)


def test_flips_and_shifts_are_fair() -> None:
    ids = np.arange(20_000)
    flips, shifts = augment.flips(0, 0, ids), augment.shifts(0, 0, ids, pad=4)
    assert flips.mean() == pytest.approx(0.5, abs=0.015)
    values, counts = np.unique(shifts, return_counts=True)
    assert values.tolist() == list(range(-4, 5))
    assert counts / 40_000 == pytest.approx(np.full(9, 1 / 9), abs=0.008)
    together = np.corrcoef(np.stack([flips, shifts[:, 0], shifts[:, 1], ids]))
    assert np.abs(together - np.eye(4)).max() < 0.03


def test_epochs_and_seeds_differ() -> None:
    ids = np.arange(1000)
    first = augment.shifts(0, 0, ids, 4)
    for seed, epoch in ((0, 1), (1, 0)):
        assert np.mean(first == augment.shifts(seed, epoch, ids, 4)) == pytest.approx(1 / 9, abs=0.04)


VARIED = {
    "pad_crop": {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
    "resized_crop": {"rand_augment": (2, 9), "random_erasing": 0.5},
    "none": {},
}


@pytest.mark.parametrize("mode", ["pad_crop", "resized_crop", "none"])
def test_a_sample_has_the_same_parameters_in_any_company(mode: str) -> None:
    data = DataConfig(shards=Path("x"), augment=mode, image_size=24, **VARIED[mode])  # type: ignore[arg-type]
    ids = np.random.default_rng(0).permutation(10_000)[:64]
    sizes = SIZES[ids % len(SIZES)]
    together = augment.parameters(data, True, 7, 3, ids, sizes)
    for row in (0, 13, 63):
        alone = augment.parameters(data, True, 7, 3, ids[row : row + 1], sizes[row : row + 1])
        assert together.keys() == alone.keys()
        assert all(np.array_equal(together[name][row], alone[name][0]) for name in together)


def test_parameters_are_those_of_earlier_versions() -> None:
    # A run that is resumed with a newer version must see the same images.
    assert augment.flips(1, 2, np.arange(8)).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert augment.shifts(1, 2, np.arange(3), 4).tolist() == [[-4, -3], [1, 2], [3, -2]]
    assert augment.operations(1, 2, np.arange(3), 2)[0].tolist() == [[12, 13], [1, 3], [6, 9]]
    assert augment.erasures(1, 2, np.arange(2), 32, 1.0)[1].tolist() == [[14.0, 13.0], [7.0, 21.0]]


@pytest.mark.parametrize(
    ("size", "target"), [((375, 500), 256), ((500, 333), 256), ((32, 32), 32), ((1200, 90), 64), ((7, 9), 8)]
)
def test_evaluation_view_has_the_usual_numbers(size: tuple[int, int], target: int) -> None:
    height, width = size
    expected = (target, int(target * width / height)) if height <= width else (int(target * height / width), target)
    resized = augment.shorter_side(np.array([size]), target)
    assert tuple(resized[0]) == expected
    crop = min(target, 56)
    assert augment.centre(resized - crop)[0].tolist() == [round((side - crop) / 2.0) for side in expected]


def test_colors_operations_and_erasures_have_their_ranges() -> None:
    ids = np.arange(40_000)
    color = augment.colors(0, 0, ids, (0.4, 0.3, 1.5, 0.1))
    assert color.min(axis=0) == pytest.approx([0.6, 0.7, 0.0, -36], abs=0.01)
    assert color.max(axis=0) == pytest.approx([1.4, 1.3, 2.5, 36], abs=0.01)
    assert color[:, [0, 1, 3]].mean(axis=0) == pytest.approx([1, 1, 0], abs=0.2)
    chosen, negated = augment.operations(0, 0, ids, 2)
    assert np.bincount(chosen.reshape(-1)) / 80_000 == pytest.approx(np.full(14, 1 / 14), abs=0.004)
    assert negated.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(np.concatenate([chosen, negated], axis=1).T) - np.eye(4)).max() < 0.02
    anchor, shape = augment.erasures(0, 0, ids, 224, 0.25)
    erased = shape.prod(axis=1) > 0
    assert erased.mean() == pytest.approx(0.25, abs=0.01)
    assert (anchor >= 0).all()
    assert (anchor + shape <= 224).all()
    area, ratio = shape[erased].prod(axis=1) / 224**2, shape[erased, 0] / shape[erased, 1]
    assert (area.min(), area.max()) == pytest.approx((0.02, 0.4), abs=0.005)
    assert (ratio.min(), ratio.max()) == pytest.approx((0.3, 3.33), abs=0.06)
