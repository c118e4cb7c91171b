"""How a sample is cropped and flipped: pure functions of (seed, epoch, view, image size), for many samples at once.

The ``ids`` here are views (see :mod:`dist_train.data.order`), which are the samples' ids where each comes once an epoch.

Windows are (anchor, shape) in pixels as (y, x), int32 [N, 2], an anchor being the upper left corner.  Image sizes are
(height, width), int64 [N, 2].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.counter import Purpose, integers, uniform

Ids = NDArray[np.int64]
Sizes = NDArray[np.int64]
Pairs = NDArray[np.int32]

_TRIES = 10


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
    draws = uniform(seed, epoch, Purpose.RESIZED_CROP, ids, 4 * _TRIES).reshape(len(ids), _TRIES, 4)
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (scale[0] + draws[..., 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + draws[..., 1] * (high - low))
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits: NDArray[np.bool_] = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    found = fits.any(axis=1, keepdims=True)
    chosen = (np.arange(len(ids)), fits.argmax(axis=1))
    shape = np.stack([tall[chosen], wide[chosen]], axis=1).astype(np.int64)
    shape = np.where(found, shape, _largest_centred(sizes, ratio))
    free = sizes - shape
    anchor = np.where(found, integers(draws[chosen][:, 2:], 0, free), centre(free))
    return anchor.astype(np.int32), shape.astype(np.int32)


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

    ``mirror`` int32 [N]; then either ``anchor`` and ``shape``, the window that is decoded and resized to the input size,
    or ``size`` (float32 [N, 2]), to which the whole image is resized, and ``anchor`` of the input's window in it, which
    for pad_crop is shifted and may stand over the edge.  An image is mirrored before its window is cut.
    """
    mode = data.augment if train else "none"
    columns: dict[str, NDArray[np.int32] | NDArray[np.float32]] = {}
    if data.flip and mode != "none":
        columns["mirror"] = flips(seed, epoch, ids)
    if mode == "resized_crop":
        columns["anchor"], columns["shape"] = resized_crops(seed, epoch, ids, sizes, data.scale, data.ratio)
        return columns
    resized = shorter_side(sizes, (data.eval_resize or data.image_size) if mode == "none" else data.image_size)
    anchor = centre(resized - data.image_size)
    if mode == "pad_crop":
        anchor = anchor + shifts(seed, epoch, ids, data.pad)
    return columns | {"size": resized.astype(np.float32), "anchor": anchor.astype(np.int32)}
