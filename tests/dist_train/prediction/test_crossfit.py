"""Thresholds chosen by held-out images: no worse than geometric ones on new images, and an honest promise."""

import numpy as np
import pytest

from dist_train.prediction import budget, crossfit
from tests.dist_train.prediction.synthetic import population

SPLITS = 25


def known(truth, rows):
    """Accuracy and cost on all of the population, [B] each."""
    found = [budget.outcome(truth.scores, truth.correct, truth.costs, row) for row in rows]
    return np.array([one.accuracy for one in found]), np.array([one.cost for one in found])


def geometric_at(truth, drawn, costs):
    """Accuracy of the geometric thresholds that were fitted on these images, between two of them in proportion."""
    accuracies, spent = known(truth, budget.geometric(drawn.scores, range(1, 40, 3)))
    order = np.argsort(spent)
    return np.interp(costs, spent[order], accuracies[order])


@pytest.fixture(scope="module", params=[200, 1000])
def splits(request):
    """By split: what cross-fitted, and the best thresholds in hindsight of the calibration images, do on new images."""
    truth = population(images=30_000, exits=4)
    rng = np.random.default_rng(request.param)
    budgets = np.linspace(truth.costs[0], truth.costs[-1], 7)[1:-1].tolist()
    rows = []
    for _ in range(SPLITS):
        drawn = truth.draw(rng, request.param)
        fitted = crossfit.fit(lambda _, scores=drawn.scores: scores, drawn.correct, drawn.costs, budgets)
        accuracy, cost = known(truth, [one.thresholds for one in fitted])
        old_accuracy, old_cost = known(truth, budget.optimal(drawn.scores, drawn.correct, drawn.costs, budgets))
        rows.append(
            {
                "gain": accuracy - geometric_at(truth, drawn, cost),
                "old gain": old_accuracy - geometric_at(truth, drawn, old_cost),
                "accuracy": accuracy,
                "old accuracy": old_accuracy,
                "over": cost > np.array(budgets),
                "promised": np.array([one.hits / request.param for one in fitted]),
                "cost error": np.array([(one.cost - spent) / one.deviation for one, spent in zip(fitted, cost)]),
            }
        )
    return request.param, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_new_images_are_classified_no_worse_than_with_geometric_thresholds(splits):
    _, found = splits
    error = found["gain"].std(axis=0) / np.sqrt(SPLITS)
    assert (found["gain"].mean(axis=0) >= -2 * error - 1e-4).all()
    assert found["gain"].mean() > 0
    assert found["gain"].mean() > found["old gain"].mean()
    assert found["accuracy"].mean() > found["old accuracy"].mean()


def test_the_promise_is_kept_by_new_images(splits):
    images, found = splits
    miss = found["promised"] - found["accuracy"]
    error = np.sqrt(found["accuracy"] * (1 - found["accuracy"]) / images)
    assert abs(miss.mean()) < 3 * error.mean() / np.sqrt(SPLITS)
    assert (np.abs(miss) < 1.96 * error).mean() > 0.9
    assert (np.abs(found["cost error"]) < 1.96).mean() > 0.9
    assert found["over"].mean() < 0.3


def test_a_budget_is_kept_on_the_calibration_images_and_the_ends_are_exact():
    truth = population(images=400, exits=3)
    budgets = [truth.costs[0], 0.5e8, truth.costs[-1]]
    fitted = crossfit.fit(lambda _: truth.scores, truth.correct, truth.costs, budgets)
    for limit, one in zip(budgets, fitted):
        assert budget.outcome(truth.scores, truth.correct, truth.costs, one.thresholds).cost <= limit * (1 + 1e-9)
        assert one.cost <= limit * (1 + 1e-9)
    assert fitted[0].cost == truth.costs[0]
    assert fitted[0].hits == truth.correct[:, 0].sum()
    assert fitted[0].deviation == 0


def test_held_out_images_are_not_learned_from():
    """Confidence that has learned the answers of its own images is worth nothing on others, and the promise says so."""
    rng = np.random.default_rng(0)
    correct = rng.random((600, 2)) < [0.5, 0.6]
    noise = rng.random((600, 2)).astype(np.float32)

    def cheats(rows):
        scores = noise.copy()
        scores[rows] = correct[rows] * 0.5 + scores[rows] / 2
        return scores

    (one,) = crossfit.fit(cheats, correct, np.array([1.0, 2.0]), [2.0])
    assert 0.5 < one.hits / 600 < 0.68
    (row,) = budget.optimal(cheats(np.arange(600)), correct, np.array([1.0, 2.0]), [2.0])
    assert budget.outcome(cheats(np.arange(600)), correct, np.array([1.0, 2.0]), row).accuracy > 0.75


@pytest.mark.parametrize("images", [1, 2, 3])
def test_few_images_are_no_error(images):
    truth = population(images=images, exits=3)
    (one,) = crossfit.fit(lambda _: truth.scores, truth.correct, truth.costs, [0.7e8])
    assert len(one.thresholds) == 3
