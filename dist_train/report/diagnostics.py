"""How exits differ: where they agree, err together, forget what an earlier exit knew, and which classes they confuse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_train.report.samples import Samples

CONFUSIONS = 10
SHOWN = 8
"""Images shown of those that one exit alone got right."""


@dataclass(frozen=True)
class Diagnostics:
    """Exits compared; matrices [M, M] are shares of all images, row exit m, column exit l."""

    agreement: NDArray[np.float64]
    """Images to which both give the same class."""
    joint_errors: NDArray[np.float64]
    """Images that both get wrong."""
    right_then_wrong: NDArray[np.float64]
    """Images that m gets right and l wrong; above the diagonal right early, wrong late."""
    class_top1: NDArray[np.float64]
    """Accuracy by class and exit, [K, M]; NaN for a class without images."""
    class_images: NDArray[np.int64]
    """Images of every class, [K]."""
    confusions: list[tuple[int, int, list[int]]]
    """(class, class it is taken for, images per exit), most at the last exit first."""
    alone: list[list[int]]
    """Per exit, ids of images that no other exit got right, at most SHOWN."""
    alone_images: list[int]
    """Per exit, how many those are in all."""


def diagnose(samples: Samples, classes: int) -> Diagnostics:
    """Compare the exits of a network on these images, of ``classes`` classes."""
    images, prediction = len(samples), samples["prediction"]
    right = samples["rank"] == 0
    rights = right.astype(np.float64)
    wrongs = 1 - rights
    agreement = np.stack([(prediction[:, [m]] == prediction).mean(axis=0) for m in range(samples.exits)])
    counts = np.bincount(samples.labels, minlength=classes)
    hits = np.stack(
        [np.bincount(samples.labels, rights[:, m], minlength=classes) for m in range(samples.exits)], axis=1
    )
    with np.errstate(invalid="ignore"):
        class_top1 = hits / counts[:, None]
    alone = [samples.ids[right[:, m] & (right.sum(axis=1) == 1)] for m in range(samples.exits)]
    return Diagnostics(
        agreement=agreement,
        joint_errors=wrongs.T @ wrongs / images,
        right_then_wrong=rights.T @ wrongs / images,
        class_top1=class_top1,
        class_images=counts.astype(np.int64),
        confusions=_confusions(samples, classes),
        alone=[ids[:SHOWN].tolist() for ids in alone],
        alone_images=[len(ids) for ids in alone],
    )


def _confusions(samples: Samples, classes: int) -> list[tuple[int, int, list[int]]]:
    """Only pairs that occur are counted: a matrix of all pairs would be large for many classes."""
    pairs = samples.labels[:, None] * classes + samples["prediction"]
    wrong = samples["rank"] > 0
    last, counts = np.unique(pairs[wrong[:, -1], -1], return_counts=True)
    most = last[np.lexsort((last, -counts))][:CONFUSIONS]
    return [
        (int(pair // classes), int(pair % classes), [int((pairs[:, m] == pair).sum()) for m in range(samples.exits)])
        for pair in most
    ]
