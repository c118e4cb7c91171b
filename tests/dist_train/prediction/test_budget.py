"""Thresholds for a budget: geometric ones against the public method read plainly, optimal ones against what they promise."""

import math

import numpy as np
import pytest
import torch

from dist_train.bench import eval as bench
from dist_train.errors import ConfigError
from dist_train.prediction import budget


def problem(seed, images=None, exits=None, levels=None):
    """Exits of rising skill on images of differing difficulty; with few levels of confidence there are many ties."""
    rng = np.random.default_rng(seed)
    images, exits = images or int(rng.integers(5, 250)), exits or int(rng.integers(1, 6))
    skill = np.linspace(0.2, 1.2, exits) - 0.8 * rng.normal(size=(images, 1)) + 0.7 * rng.normal(size=(images, exits))
    scores = 1 / (1 + np.exp(-skill - 0.5 * rng.normal(size=(images, exits))))
    if levels:
        scores = np.round(levels * scores) / levels
    return scores.astype(np.float32), skill > 0.4, np.cumsum(rng.integers(1, 10**6, size=exits)).astype(float)


def read_plainly(scores, right, costs, p):
    """Budgeted batch as its description has it, one image at a time."""
    images, exits = scores.shape
    q = torch.tensor([p / 20]).log().mul(torch.arange(1, exits + 1).float()).exp()
    q = q / q.sum()
    thresholds = [1e8] * (exits - 1) + [-1e8]
    gone = set()
    for k in range(exits - 1):
        wanted = math.floor(images * q[k])
        count = 0
        for image in sorted(range(images), key=lambda image: -scores[image, k]):
            if image not in gone:
                count += 1
                if count == wanted:
                    thresholds[k] = scores[image, k]
                    break
        gone |= {image for image in range(images) if scores[image, k] >= thresholds[k]}
    exits_used = [next(k for k in range(exits) if scores[image, k] >= thresholds[k]) for image in range(images)]
    accuracy = sum(bool(right[image, k]) for image, k in enumerate(exits_used)) / images
    return thresholds, accuracy, sum(costs[k] for k in exits_used) / images


DEGENERATE = {
    "everything ties": np.ones((50, 4), dtype=np.float32),
    "first exit saturated": np.concatenate([np.ones((60, 1)), np.random.default_rng(0).random((60, 3))], 1).astype(
        "f4"
    ),
    "fewer images than exits": np.random.default_rng(1).random((3, 5)).astype("f4"),
    "one image": np.full((1, 3), 0.5, dtype=np.float32),
    "one exit": np.random.default_rng(2).random((20, 1)).astype("f4"),
    "two levels": np.random.default_rng(3).integers(0, 2, (80, 5)).astype("f4"),
}


def all_cases():
    random = [problem(seed, levels=(None, 4, 50)[seed % 3]) for seed in range(30)]
    made = [
        (s, np.arange(s.size).reshape(s.shape) % 3 == 0, np.arange(1.0, s.shape[1] + 1)) for s in DEGENERATE.values()
    ]
    return random + made


def test_geometric_is_the_public_method_read_plainly():
    zero_quota = too_few = 0
    for scores, right, costs in all_cases():
        for p, thresholds in zip(budget.GEOMETRIC_SWEEP, budget.geometric(scores)):
            if p not in (1, 5, 14, 20, 29, 39):
                continue
            wanted, accuracy, cost = read_plainly(scores, right, costs, p)
            assert [1e8 if math.isinf(one) else one for one in thresholds[:-1]] == wanted[:-1]
            result = budget.outcome(scores, right, costs, thresholds)
            assert result.accuracy == accuracy
            assert result.cost == pytest.approx(cost, rel=1e-12)
            zero_quota += int(thresholds[0] == math.inf)
            too_few += int(len(thresholds) > 2 and thresholds[0] <= scores[:, 0].min() and thresholds[1] == math.inf)
    assert zero_quota > 10
    assert too_few > 10


def test_optimal_keeps_to_budgets_is_never_below_geometric_at_its_cost_and_never_falls():
    above = 0
    for seed in range(200):
        scores, right, costs = problem(seed, levels=(None, 5, 40)[seed % 3])
        geometric = [budget.outcome(scores, right, costs, row) for row in budget.geometric(scores)[2::9]]
        budgets = sorted([*(one.cost for one in geometric), *np.linspace(costs[0], costs[-1], 4)])
        rows = budget.optimal(scores, right, costs, budgets)
        results = [budget.outcome(scores, right, costs, row) for row in rows]
        assert all(result.cost <= limit * (1 + 1e-9) for result, limit in zip(results, budgets))
        accuracies = [result.accuracy for result in results]
        assert accuracies == sorted(accuracies)
        for wanted in geometric:
            result = results[budgets.index(wanted.cost)]
            assert result.accuracy >= wanted.accuracy
            above += result.accuracy > wanted.accuracy
    assert above > 400


def test_optimal_is_the_best_of_all_thresholds_of_small_problems_but_for_rare_hits():
    missed = []
    for seed in range(20):
        scores, right, costs = problem(seed, images=40, exits=3, levels=10)
        levels = [[*np.unique(scores[:, k]), np.inf] for k in range(2)]
        every = [
            budget.outcome(scores, right, costs, np.array([a, b, 0], dtype=np.float32))
            for a in levels[0]
            for b in levels[1]
        ]
        budgets = np.linspace(costs[0], costs[-1], 10)
        for limit, row in zip(budgets, budget.optimal(scores, right, costs, budgets)):
            best = max(one.hits for one in every if one.cost <= limit * (1 + 1e-9))
            missed.append(best - budget.outcome(scores, right, costs, row).hits)
    assert min(missed) >= 0
    assert sum(missed) <= 10  # of 20 x 10 budgets of 40 images each


def test_thresholds_do_not_part_ties_and_stand_off_from_every_confidence():
    scores, right, costs = problem(7, images=400, exits=4, levels=30)
    for row in budget.optimal(scores, right, costs, np.linspace(costs[0], costs[-1], 10)):
        for moved in (scores - np.float32(1e-6), scores + np.float32(1e-6)):
            assert budget.outcome(moved, right, costs, row).hits == budget.outcome(scores, right, costs, row).hits
    # Neighbouring numbers have nothing between them: the upper one is taken.
    close = np.array([[0.5, 0], [np.nextafter(np.float32(0.5), np.float32(1)), 0]], dtype=np.float32)
    right = np.array([[False, True], [True, False]])
    (row,) = budget.optimal(close, right, np.array([1.0, 2.0]), [2.0])
    assert budget.outcome(close, right, np.array([1.0, 2.0]), row).accuracy == 1


def test_the_benchmark_compares_with_the_same_method():
    scores, right, costs = problem(11, images=150, exits=4, levels=20)
    for p, row in zip((3, 20, 33), budget.geometric(scores, (3, 20, 33))):
        thresholds, accuracy, cost = bench.per_image_loop(torch.from_numpy(scores), torch.from_numpy(right), costs, p)
        assert thresholds[:-1].tolist() == row[:-1].tolist()
        result = budget.outcome(scores, right, costs, row)
        assert (result.accuracy, result.cost) == (accuracy, pytest.approx(cost))


def test_budgets_out_of_range_are_said_and_clamped_only_when_asked():
    costs = np.array([1e6, 3e6])
    assert budget.check_budgets([1e6, 2e6, 3e6], costs, "multiply_adds", clamp=False) == [1e6, 2e6, 3e6]
    assert budget.check_budgets([0, 9e6], costs, "multiply_adds", clamp=True) == [1e6, 3e6]
    with pytest.raises(
        ConfigError,
        match=r"budget 999999\.6 multiply_adds is below the first exit's 1000000; allowed is 1000000 to 3000000",
    ):
        budget.check_budgets([999_999.6], costs, "multiply_adds", clamp=False)
    with pytest.raises(ConfigError, match="above the last exit's 3000000"):
        budget.check_budgets([4e6], costs, "multiply_adds", clamp=False)
    with pytest.raises(ConfigError):
        budget.check_budgets([math.nan], costs, "multiply_adds", clamp=True)
