"""Images made worse in a few common ways, in torch.

After Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
with the severities of its CIFAR-10-C (images of at most 64 pixels) and ImageNet-C.  Five of its kinds that need no other
library: `imagecorruptions`, which has all fifteen, wants OpenCV, scikit-image and numba.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

SMALL = 64
"""Largest image, in pixels, for which the severities of CIFAR-10-C are taken."""
SEVERITIES = (1, 3, 5)
TABLE: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
}
"""By corruption, severities 1 to 5 for small and for large images: the noise's standard deviation, the blur's in pixels, what
is added to the brightest channel, the contrast that stays, and the side that stays."""


def corrupt(images: Tensor, ids: Sequence[int], corruption: str, severity: int) -> Tensor:
    """Images of the same shape made worse; an image's noise depends on its id alone.

    Args:
        images: float32 [N, 3, H, W] in [0, 1].
        ids: of the images, N numbers.
        corruption: a key of TABLE.
        severity: 1 to 5.
    """
    amount = TABLE[corruption][max(images.shape[2:]) > SMALL][severity - 1]
    if corruption == "gaussian_noise":
        worse = images + amount * _noise(images, ids)
    elif corruption == "gaussian_blur":
        worse = _blur(images, amount)
    elif corruption == "brightness":
        value = images.amax(dim=1, keepdim=True)  # of HSV, whose hue and saturation stay
        brighter = (value + amount).clamp(max=1)
        # Black has no hue, and becomes grey.
        worse = torch.where(value > 0, images * brighter / value.clamp(min=1e-12), brighter)
    elif corruption == "contrast":
        # Of every channel by itself, as ImageNet-C has it.
        mean = images.mean(dim=(2, 3), keepdim=True)
        worse = (images - mean) * amount + mean
    else:
        height, width = (max(1, int(side * amount)) for side in images.shape[2:])
        smaller = _box(images.shape[2], height, images) @ images @ _box(images.shape[3], width, images).T
        worse = functional.interpolate(smaller, images.shape[2:], mode="nearest-exact")
    return worse.clamp(0, 1)


def _noise(images: Tensor, ids: Sequence[int]) -> Tensor:
    # On the CPU, because a generator on a GPU gives other numbers.
    rows = [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(max(0, number))) for number in ids]
    return torch.stack(rows).to(images)


def _box(pixels: int, fewer: int, like: Tensor) -> Tensor:
    """Weights [fewer, pixels] that average a line of pixels, each counted where its centre lies, as Pillow's BOX does.

    Interpolation by "area" counts pixels on a border twice, and so blurs more where the sizes are no multiples.
    """
    centres = torch.arange(pixels, dtype=torch.float64) + 0.5
    owner = (centres * fewer / pixels).ceil().long() - 1
    weights = functional.one_hot(owner, fewer).T.to(like)
    return weights / weights.sum(dim=1, keepdim=True)


def _blur(images: Tensor, deviation: float) -> Tensor:
    # Cut off at 4 deviations, with edges repeated, as scikit-image does, by which ImageNet-C was blurred.
    reach = math.ceil(4 * deviation)
    steps = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (steps / deviation) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    # A Gaussian is the product of one across and one down.
    across = functional.conv2d(padded, kernel[:, :, None, :], groups=3)
    return functional.conv2d(across, kernel[:, :, :, None], groups=3)
