"""How far an exit's confidence can be taken at its word: calibration error, and the temperature that mends it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from dist_train.evaluation.samples import TEMPERATURES, Samples

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Mean confidence, accuracy and share of the images of every bin that is not empty, from the least to the most confident."""

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    share: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: mean over the images of |accuracy - confidence| of their bin."""
        # ECE = sum over bins b of |B_b| / N * |acc(B_b) - conf(B_b)|.
        return float((self.share * np.abs(self.accuracy - self.confidence)).sum())


def reliability(confidence: NDArray[np.float32], correct: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Bins of equal mass (Nguyen & O'Connor, EMNLP 2015); images of the same confidence are never parted.

    Args:
        confidence: largest probability, [N].
        correct: whether the prediction is correct, [N].
        bins: how many; ties can leave some of them empty.
    """
    images, indices = len(confidence), bin_indices(confidence, bins)
    counts = np.bincount(indices, minlength=bins)
    filled = counts > 0
    sums = [np.bincount(indices, weights=values.astype(np.float64), minlength=bins) for values in (confidence, correct)]
    means = [total[filled] / counts[filled] for total in sums]
    return Reliability(means[0], means[1], counts[filled] / images)


def bin_indices(confidence: NDArray[np.float32], bins: int = BINS) -> NDArray[np.int64]:
    """The bin of every image, [N], from 0; a group of images that tie goes where its middle is."""
    # bin = floor((r - 1/2) * bins / N) of the image with rank r, from 1; those that tie share their mean rank.
    middles = (rankdata(confidence, method="average") - 0.5) * bins / len(confidence)
    indices: NDArray[np.int64] = middles.astype(np.int64).clip(0, bins - 1)
    return indices


def fit_temperatures(samples: Samples) -> NDArray[np.int64]:
    """Index into TEMPERATURES, per exit [M], of the lowest mean cross-entropy (Guo et al., ICML 2017, section 4.2)."""
    losses = samples["scaled_loss"].mean(axis=0, dtype=np.float64)
    # T = argmin over the grid of the mean of -ln softmax(z / T) at the label.
    indices: NDArray[np.int64] = losses.argmin(axis=1)
    return indices


def temperatures_at(indices: NDArray[np.int64]) -> list[float]:
    """The temperatures at these indices."""
    return [TEMPERATURES[index] for index in indices]


def scaled_confidence(samples: Samples, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Largest probability at every exit's temperature, float32 [N, M]."""
    scaled: NDArray[np.float32] = samples["scaled_max_probability"][:, np.arange(samples.exits), indices]
    return scaled
