"""How exits differ: where they agree, err together, forget what an earlier exit knew, and which classes they confuse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_train.evaluation.samples import Samples

CONFUSIONS = 10
SHOWN = 8
"""Images shown of those that one exit alone classifies correctly."""


@dataclass(frozen=True)
class Diagnostics:
    """Exits compared; matrices [M, M] are shares of all images, row exit m, column exit l."""

    agreement: NDArray[np.float64]
    """Images to which both give the same class."""
    joint_errors: NDArray[np.float64]
    """Images that both get wrong."""
    correct_then_wrong: NDArray[np.float64]
    """Images that m classifies correctly and l does not; above the diagonal correct early, wrong late."""
    class_top1: NDArray[np.float64]
    """Accuracy by class and exit, [K, M]; NaN for a class without images."""
    class_images: NDArray[np.int64]
    """Images of every class, [K]."""
    confusions: list[tuple[int, int, list[int]]]
    """(class, class it is taken for, images per exit), most at the last exit first."""
    uniquely_correct: list[list[int]]
    """Per exit, ids of images that no other exit classifies correctly, at most SHOWN."""
    uniquely_correct_images: list[int]
    """Per exit, how many those are in all."""


def diagnose(samples: Samples, classes: int) -> Diagnostics:
    """Compare the exits of a network on these images, of ``classes`` classes."""
    images, prediction = len(samples), samples["prediction"]
    correct = samples["rank"] == 0
    hit = correct.astype(np.float64)
    miss = 1 - hit
    agreement = np.stack([(prediction[:, [m]] == prediction).mean(axis=0) for m in range(samples.exits)])
    counts = np.bincount(samples.labels, minlength=classes)
    hits = np.stack([np.bincount(samples.labels, hit[:, m], minlength=classes) for m in range(samples.exits)], axis=1)
    # 0 / 0 for a class without images.
    with np.errstate(invalid="ignore"):
        class_top1 = hits / counts[:, None]
    uniquely_correct = [samples.ids[correct[:, m] & (correct.sum(axis=1) == 1)] for m in range(samples.exits)]
    return Diagnostics(
        agreement=agreement,
        # Products of indicators count the images for which both are true.
        joint_errors=miss.T @ miss / images,
        correct_then_wrong=hit.T @ miss / images,
        class_top1=class_top1,
        class_images=counts.astype(np.int64),
        confusions=_confusions(samples, classes),
        uniquely_correct=[ids[:SHOWN].tolist() for ids in uniquely_correct],
        uniquely_correct_images=[len(ids) for ids in uniquely_correct],
    )


def _confusions(samples: Samples, classes: int) -> list[tuple[int, int, list[int]]]:
    """Only pairs that occur are counted: a matrix of all pairs would be large for many classes."""
    # One number for each pair of a class and what it is taken for.
    pairs = samples.labels[:, None] * classes + samples["prediction"]
    wrong = samples["rank"] > 0
    last, counts = np.unique(pairs[wrong[:, -1], -1], return_counts=True)
    most = last[np.lexsort((last, -counts))][:CONFUSIONS]
    return [
        (int(pair // classes), int(pair % classes), [int((pairs[:, m] == pair).sum()) for m in range(samples.exits)])
        for pair in most
    ]
