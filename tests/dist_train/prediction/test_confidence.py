"""How sure an exit is, and where a sample leaves: against formulas written out in numpy."""

import numpy as np
import pytest
import torch

from dist_train.prediction.confidence import (
    MEASURES,
    agreement,
    confidence,
    confidence_with_history,
    exits_taken,
    patience,
)


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


def test_agreement_and_patience_are_counted_from_the_last_exit_back():
    classes = torch.tensor([[2, 2, 2, 2], [1, 2, 2, 2], [2, 1, 1, 2], [0, 1, 2, 3]])
    assert agreement(classes).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert patience(classes).tolist() == pytest.approx([1, 2 / 3, 0, 0])
    assert agreement(classes[:, :1]).tolist() == patience(classes[:, :1]).tolist() == [0, 0, 0, 0]


def test_the_learned_measure_is_logistic_regression_of_all_others():
    logits, classes = 3 * torch.randn(40, 6), torch.randint(6, (40, 3))
    weights = [1.5, -0.5, 2.0, 0.7, -1.1, 0.3]
    columns = [*(confidence(logits, one) for one in MEASURES), agreement(classes), patience(classes)]
    z = sum(w * column.double().numpy() for w, column in zip(weights, columns)) + weights[-1]
    found = confidence_with_history(logits, classes, "learned", weights)
    np.testing.assert_allclose(found.numpy(), 1 / (1 + np.exp(-z)), rtol=1e-5)
    for measure in MEASURES:
        assert confidence_with_history(logits, classes, measure).equal(confidence(logits, measure))
