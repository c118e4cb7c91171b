"""The confidence of samples by any measure, and what scaling and learning take from calibration images for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.evaluation.calibration import fit_temperatures, scaled_confidence, temperatures_at
from dist_train.evaluation.samples import Samples
from dist_train.prediction.confidence import FEATURES, MEASURES, AnyMeasure, agreement, learned, patience
from dist_train.prediction.risk import Outputs


@dataclass(frozen=True)
class Scoring:
    """A measure of confidence, with what it was fitted with.

    ``temperature_indices`` (into TEMPERATURES, [M]) are None where the logits are not scaled, ``weights`` (a row per exit) but
    for ``learned``.
    """

    measure: AnyMeasure
    temperature_indices: NDArray[np.int64] | None = None
    weights: list[list[float]] | None = None

    @property
    def temperatures(self) -> list[float] | None:
        """One per exit; None where the logits are not scaled."""
        return None if self.temperature_indices is None else temperatures_at(self.temperature_indices)

    def __call__(self, samples: Samples) -> NDArray[np.float32]:
        """Confidence of every sample at every exit, float32 [N, M]."""
        scores: NDArray[np.float32]
        if self.temperature_indices is not None:
            scores = scaled_confidence(samples, self.temperature_indices)
        elif self.measure == "learned":
            assert self.weights is not None
            columns = [learned(features(samples, m), row) for m, row in enumerate(self.weights)]
            scores = torch.stack(columns, dim=1).numpy()
        elif self.measure in MEASURES:
            scores = samples[self.measure]
        else:
            index = FEATURES.index(self.measure)
            scores = torch.stack([features(samples, m)[:, index] for m in range(samples.exits)], dim=1).numpy()
        return scores

    def outputs(self, samples: Samples) -> Outputs:
        """The samples as a guarantee wants them."""
        return Outputs(self(samples), samples["prediction"], samples.labels)


def fit_scoring(samples: Samples, measure: AnyMeasure, scaled: bool = False) -> Scoring:
    """The measure, its temperatures where ``scaled`` and its weights where learned fitted on these samples."""
    if scaled:
        return Scoring(measure, fit_temperatures(samples))
    if measure == "learned":
        return Scoring(measure, weights=[_fit_weights(samples, m) for m in range(samples.exits)])
    return Scoring(measure)


def features(samples: Samples, exit_index: int) -> torch.Tensor:
    """FEATURES of one exit, counted from 0, as prediction takes them, float32 [N, 5]."""
    classes = torch.from_numpy(samples["prediction"][:, : exit_index + 1])
    columns = [torch.from_numpy(samples[measure][:, exit_index]) for measure in MEASURES]
    return torch.stack([*columns, agreement(classes), patience(classes)], dim=1)


def _fit_weights(samples: Samples, exit_index: int) -> list[float]:
    """Weights of logistic regression on whether the exit is correct; of the largest probability alone where it always, or
    never, is.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and not always wanted

    correct = samples["rank"][:, exit_index] == 0
    if correct.all() or not correct.any():
        # scikit-learn refuses a single class. FEATURES begin with the largest probability; the constant comes last.
        return [1.0] + [0.0] * len(FEATURES)
    model = LogisticRegression(max_iter=200).fit(features(samples, exit_index).double().numpy(), correct)
    return [*model.coef_[0].tolist(), float(model.intercept_[0])]
