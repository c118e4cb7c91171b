"""How a sample is cropped, flipped, coloured and erased: pure functions of (seed, epoch, view, image size), for many samples at once.

The ``ids`` here are views (see :mod:`dist_train.data.order`), which are the samples' ids where each comes once an epoch.

Windows are (anchor, shape) in pixels as (y, x), int32 [N, 2], an anchor being the upper left corner.  Image sizes are
(height, width), int64 [N, 2].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.rng import Purpose, integers, uniform

Ids = NDArray[np.int64]
Sizes = NDArray[np.int64]
Pairs = NDArray[np.int32]

_TRIES = 10
RAND_AUGMENT_OPERATIONS = 14
# The ranges of random erasing that Zhong et al. (AAAI 2020, section 4) found best for images of objects.
_ERASED_AREA = (0.02, 0.4)
_ERASED_RATIO = (0.3, 1 / 0.3)


def flips(seed: int, epoch: int, ids: Ids) -> NDArray[np.int32]:
    """1 where the image is mirrored, else 0, each for half of the samples; int32 [N]."""
    return (uniform(seed, epoch, Purpose.FLIP, ids, 1)[:, 0] < 0.5).astype(np.int32)


def shifts(seed: int, epoch: int, ids: Ids, pad: int) -> Pairs:
    """Shift of the crop window for small images, each coordinate uniform in [-pad, pad]; int32 [N, 2]."""
    return integers(uniform(seed, epoch, Purpose.PAD_CROP, ids, 2), -pad, pad).astype(np.int32)


def resized_crops(
    seed: int, epoch: int, ids: Ids, sizes: Sizes, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Pairs, Pairs]:
    """Windows (anchor, shape) of random area and aspect ratio that lie in the image; they are resized to the input size.

    The rule of Inception's training (Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6) as commonly
    done: the share of the area uniform in ``scale``, width by height log-uniform in ``ratio``, up to ten tries; if none
    fits, the largest centred window whose aspect ratio is in ``ratio``.
    """
    # Four numbers a try: area, aspect ratio, and the place down and across.
    draws = uniform(seed, epoch, Purpose.RESIZED_CROP, ids, 4 * _TRIES).reshape(len(ids), _TRIES, 4)
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (scale[0] + draws[..., 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + draws[..., 1] * (high - low))
    # From width * height = area and width / height = aspect.
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    # All tries are drawn beforehand, since a view's numbers stand at fixed places of the stream, and the first that fits is taken.
    fits: NDArray[np.bool_] = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    found = fits.any(axis=1, keepdims=True)
    chosen = (np.arange(len(ids)), fits.argmax(axis=1))
    shape = np.stack([tall[chosen], wide[chosen]], axis=1).astype(np.int64)
    shape = np.where(found, shape, _largest_centred(sizes, ratio))
    free = sizes - shape
    anchor = np.where(found, integers(draws[chosen][:, 2:], 0, free), centre(free))
    return anchor.astype(np.int32), shape.astype(np.int32)


def colors(seed: int, epoch: int, ids: Ids, jitter: tuple[float, float, float, float]) -> NDArray[np.float32]:
    """Factors of brightness, contrast and saturation, and degrees of hue, float32 [N, 4], each uniform in its range."""
    change = (2 * uniform(seed, epoch, Purpose.COLOR, ids, 4) - 1) * np.array(jitter)
    # A jitter above 1 would give negative factors.
    factors = np.maximum(0, 1 + change[:, :3])
    # The hue in degrees, as DALI takes it.
    return np.concatenate([factors, 360 * change[:, 3:]], axis=1).astype(np.float32)


def operations(seed: int, epoch: int, ids: Ids, count: int) -> tuple[Pairs, Pairs]:
    """Which operations RandAugment does one after the other, and whether their strength is negated; int32 [N, count] each.

    Cubuk et al., "RandAugment", 2019: each operation is equally probable, at a strength that all share.
    """
    draws = uniform(seed, epoch, Purpose.RAND_AUGMENT, ids, 2 * count).reshape(len(ids), 2, count)
    chosen = integers(draws[:, 0], 0, RAND_AUGMENT_OPERATIONS - 1)
    return chosen.astype(np.int32), (draws[:, 1] < 0.5).astype(np.int32)


def erasures(
    seed: int, epoch: int, ids: Ids, size: int, share: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rectangles (anchor, shape) that are erased from images of ``size``, whole pixels as float32 [N, 2]; empty for most.

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, algorithm 1.
    """
    # One number decides whether anything is erased, and four are for each try, as in resized_crops.
    draws = uniform(seed, epoch, Purpose.ERASE, ids, 1 + 4 * _TRIES)
    tries = draws[:, 1:].reshape(len(ids), _TRIES, 4)
    area = size * size * (_ERASED_AREA[0] + tries[..., 0] * (_ERASED_AREA[1] - _ERASED_AREA[0]))
    low, high = math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])
    aspect = np.exp(low + tries[..., 1] * (high - low))
    # H_e = sqrt(S_e * r_e) and W_e = sqrt(S_e / r_e): here the ratio is that of height to width.
    tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits: NDArray[np.bool_] = (tall < size) & (wide < size)
    chosen = (np.arange(len(ids)), fits.argmax(axis=1))
    erased = (draws[:, :1] < share) & fits.any(axis=1, keepdims=True)
    shape = np.where(erased, np.stack([tall[chosen], wide[chosen]], axis=1), 0)
    anchor = integers(tries[chosen][:, 2:], 0, (size - shape).astype(np.int64))
    return anchor.astype(np.float32), shape.astype(np.float32)


def shorter_side(sizes: Sizes, target: int) -> Sizes:
    """Sizes after a resize of the shorter side to ``target``, the longer one cut to whole pixels as torchvision does."""
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    longer = (target * long / short).astype(np.int64)
    return np.where(sizes == short[:, None], target, longer[:, None])


def centre(free: Sizes) -> Sizes:
    """Anchor of a centred window that leaves ``free`` pixels (half ones rounded to even, as torchvision does)."""
    anchor: Sizes = np.rint(free / 2).astype(np.int64)
    return anchor


def _largest_centred(sizes: Sizes, ratio: tuple[float, float]) -> Sizes:
    height, width = sizes[:, 0], sizes[:, 1]
    aspect = width / height
    tall = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height)
    wide = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width)
    largest: Sizes = np.maximum(1, np.stack([tall, wide], axis=1)).astype(np.int64)
    return largest


def parameters(
    data: DataConfig, train: bool, seed: int, epoch: int, ids: Ids, sizes: Sizes
) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
    """What happens to each of these samples, one array per step of the decoder that is wanted.

    ``anchor`` and ``shape`` int32 [N, 2], the window that is decoded and resized to the input size; or ``size`` (float32
    [N, 2]), to which the whole image is resized, and ``anchor`` of the input's window in it, which for pad_crop is shifted
    and may stand over the edge.  Then as configured ``operations`` and ``signs`` int32 [N, n], ``color`` float32 [N, 4],
    ``mirror`` int32 [N], ``erased_anchor`` and ``erased_shape`` float32 [N, 2]: see the functions above.  An image is
    mirrored before the input's window is cut, and erased at the very end.
    """
    mode = data.augment if train else "none"
    columns: dict[str, NDArray[np.int32] | NDArray[np.float32]] = {}
    if mode == "resized_crop":
        columns["anchor"], columns["shape"] = resized_crops(seed, epoch, ids, sizes, data.crop_scale, data.crop_ratio)
    else:
        # Where nothing is varied, training sees what evaluation sees; pad_crop shifts a window of the input's size.
        resized = shorter_side(sizes, (data.eval_resize or data.image_size) if mode == "none" else data.image_size)
        anchor = centre(resized - data.image_size)
        if mode == "pad_crop":
            anchor = anchor + shifts(seed, epoch, ids, data.crop_padding)
        columns["size"], columns["anchor"] = resized.astype(np.float32), anchor.astype(np.int32)
    if mode == "none":
        return columns
    if data.flip:
        columns["mirror"] = flips(seed, epoch, ids)
    if data.rand_augment:
        columns["operations"], columns["signs"] = operations(seed, epoch, ids, data.rand_augment[0])
    if data.color_jitter:
        columns["color"] = colors(seed, epoch, ids, data.color_jitter)
    if data.random_erasing:
        erased = erasures(seed, epoch, ids, data.image_size, data.random_erasing)
        columns["erased_anchor"], columns["erased_shape"] = erased
    return columns
