"""Mixup and cutmix: every image of a micro batch mixed with another of it, on the device.

Whose share it has is a function of (seed, epoch, view); whom it is mixed with depends on the micro batch, so that batches are
the same for any number of ranks at the same ``micro_batch``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.rng import Purpose, integers, uniform
from dist_train.loss import LabelMix


def mix(
    data: DataConfig, seed: int, epoch: int, views: NDArray[np.int64], images: torch.Tensor, labels: NDArray[np.int64]
) -> tuple[torch.Tensor, LabelMix]:
    """Images [N, 3, S, S] mixed among themselves, channels_last, and the two labels of each, on the images' device.

    The partner is taken from the back of the micro batch, for a labeled image among the labeled ones and for an unlabeled one
    among the unlabeled ones, so that as many samples as before have a label; the one in the middle stays as it is.
    """
    size = images.shape[-1]
    share, anchor, shape = shares(data, seed, epoch, views, size)
    partner = partners(labels >= 0)
    arrays = (partner, share, anchor, shape, labels, labels[partner])
    other, kept, start, extent, first, second = (
        torch.from_numpy(array).to(images.device, non_blocking=True) for array in arrays
    )
    line = torch.arange(size, device=images.device)
    inside = (line >= start[..., None]) & (line < (start + extent)[..., None])  # [N, 2, S]: rows, columns
    window = inside[:, 0, :, None] & inside[:, 1, None, :]
    # One weight per pixel serves both: cutmix is 1 or 0, mixup the share everywhere.
    cut = (extent.sum(1) > 0)[:, None, None]
    weight = torch.where(cut, (~window).float(), kept[:, None, None])[:, None]
    mixed = torch.lerp(images[other], images, weight)
    return mixed.contiguous(memory_format=torch.channels_last), LabelMix(first, second, kept)


def shares(
    data: DataConfig, seed: int, epoch: int, views: NDArray[np.int64], size: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Share of an image in its mixture, float32 [N], and the window (anchor, shape), int64 [N, 2], that its partner fills.

    A window of zero pixels stands for mixup.  Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019, whose share is
    that of the pixels that are left, the window being cut at the image's edge.
    """
    from scipy.special import betaincinv

    draws = uniform(seed, epoch, Purpose.MIX, views, 4)
    by_window = draws[:, 0] < (0.5 if data.mixup and data.cutmix else float(data.cutmix > 0))
    alpha = np.where(by_window, data.cutmix, data.mixup)
    # By the inverse of Beta's distribution function: a sampler that rejects would take an unknown number of draws.
    share = betaincinv(alpha, alpha, draws[:, 1])
    # CutMix: r_w = W * sqrt(1 - lambda), so that the window has the share 1 - lambda of the area.
    side = np.where(by_window, np.rint(size * np.sqrt(1 - share)), 0).astype(np.int64)[:, None]
    first = integers(draws[:, 2:], 0, size - 1) - side // 2
    anchor, end = np.clip(first, 0, size), np.clip(first + side, 0, size)
    shape = np.where(((end - anchor) > 0).all(axis=1, keepdims=True), end - anchor, 0)
    share = np.where(by_window, 1 - shape.prod(axis=1) / size**2, share)
    return share.astype(np.float32), anchor, shape


def partners(labeled: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Place of each image's partner, int64 [N]: labeled ones among themselves in reverse, and so the others."""
    partner = np.arange(len(labeled))
    for kind in (labeled, ~labeled):
        places = np.flatnonzero(kind)
        partner[places] = places[::-1]
    return partner
