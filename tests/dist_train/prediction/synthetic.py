"""A synthetic multi-exit network whose risks are known: images are drawn, with replacement, from a population."""

from typing import NamedTuple

import numpy as np


class Outputs(NamedTuple):
    """What exits say of N images: confidence float32 [N, M], predicted class int32 [N, M], labels int64 [N], costs [M]."""

    scores: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    costs: np.ndarray

    @property
    def correct(self):
        return self.predictions == self.labels[:, None]

    def draw(self, rng, images):
        rows = rng.integers(len(self.labels), size=images)
        return Outputs(self.scores[rows], self.predictions[rows], self.labels[rows], self.costs)


def population(images=200_000, exits=5, classes=10, seed=0, skills=(1.5, 2.5)):
    """Later exits are more skilled (about 82 % right at the first, 94 % at the last); confidence tells some of it.

    An image has a difficulty that all exits share, so that they agree more than by chance; a wrong exit mostly takes the
    image for one other class, the same at every exit.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    skill = np.linspace(*skills, exits)
    difficulty = 1.4 * rng.normal(size=(images, 1))
    margin = (
        skill
        - difficulty
        + np.cumsum(rng.normal(size=(images, exits)), axis=1) / np.sqrt(np.arange(1, exits + 1)) * 0.6
    )
    distractor = (labels + rng.integers(1, classes, size=images)) % classes
    other = rng.integers(classes, size=(images, exits))
    mistaken = np.where(rng.random((images, exits)) < 0.8, distractor[:, None], other)
    predictions = np.where(margin > 0, labels[:, None], mistaken)
    scores = 1 / (1 + np.exp(-1.5 * np.abs(margin + 0.3 * rng.normal(size=(images, exits)))))
    costs = np.linspace(0.2, 1, exits) * 1e8
    return Outputs(scores.astype(np.float32), predictions.astype(np.int32), labels, costs)
