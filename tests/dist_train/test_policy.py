"""How sure an exit is, and where a sample leaves: against formulas written out in numpy."""

import numpy as np
import pytest
import torch

from dist_train.policy import MEASURES, confidence, exits_taken


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_confidence_is_the_formula(measure, classes):
    logits = torch.randn(50, classes) * 3
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    ordered = np.sort(p, axis=1)[:, ::-1]
    if classes == 1:
        expected = np.ones(50)
    elif measure == "max_probability":
        expected = ordered[:, 0]
    elif measure == "margin":
        expected = ordered[:, 0] - ordered[:, 1]
    else:
        expected = 1 + (p * np.log(p)).sum(1) / np.log(classes)
    np.testing.assert_allclose(confidence(logits, measure).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_confidence_of_extreme_logits(measure):
    logits = torch.tensor([[1e4, -1e4, -float("inf")], [0.0, 0.0, 0.0]])
    sure, unsure = confidence(logits, measure).tolist()
    assert sure == 1
    assert unsure == pytest.approx(1 / 3 if measure == "max_probability" else 0, abs=1e-6)


def test_each_sample_leaves_at_the_first_exit_that_is_sure_enough():
    scores = torch.rand(500, 4).mul(5).round().div(5)  # coarse: many scores equal their threshold
    thresholds = torch.tensor([0.8, 0.6, 0.4, 99.0])
    expected = [next((m for m in range(3) if row[m] >= thresholds[m]), 3) for row in scores]
    assert exits_taken(scores, thresholds).tolist() == expected
    assert len(set(expected)) == 4
