"""How well a number of images knows a share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from dist_train.prediction.search import Floats


def clopper_pearson(hits: ArrayLike, images: int, unsure: float) -> tuple[Floats, Floats]:
    """Ends of the intervals that hold each share with probability 1 - ``unsure`` at least (Clopper and Pearson, Biometrika 1934)."""
    hits = np.asarray(hits, dtype=np.float64)
    # Where no image or every image is a hit, a parameter of Beta is 0, its quantile NaN, and the end 0 or 1.
    low = np.nan_to_num(beta.ppf(unsure / 2, hits, images - hits + 1), nan=0.0)
    high = np.nan_to_num(beta.ppf(1 - unsure / 2, hits + 1, images - hits), nan=1.0)
    return low, high
