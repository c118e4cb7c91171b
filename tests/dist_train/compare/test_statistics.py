"""The statistics of a comparison against scipy's, against hand-worked examples, and against a thousand repetitions."""

import math

import numpy as np
import pytest
from scipy import stats

from dist_train.compare.statistics import (
    LEVEL,
    bootstrap_interval,
    combined_interval,
    effect,
    holm,
    power,
    seeds_needed,
    t_interval,
    t_test,
)

DRAWS = 1000
ERROR = 3 * math.sqrt(LEVEL * (1 - LEVEL) / DRAWS)
"""Three standard errors of the share of DRAWS intervals that cover the truth."""


def covers(interval, truth):
    return interval[0] <= truth <= interval[1]


def test_interval_and_test_are_those_of_scipy():
    before, after = np.random.default_rng(1).normal([[0.50], [0.52]], 0.02, (2, 6))
    theirs = stats.ttest_rel(after, before)
    differences = (after - before).tolist()
    assert t_test(differences) == pytest.approx(theirs.pvalue)
    assert t_interval(differences) == pytest.approx(tuple(theirs.confidence_interval(LEVEL)))
    found = effect({str(seed): one for seed, one in enumerate(differences)})
    assert (found.mean, found.sd) == (pytest.approx(np.mean(differences)), pytest.approx(np.std(differences, ddof=1)))
    assert (found.over_seeds, found.p, found.over_images) == (t_interval(differences), t_test(differences), None)


def test_bootstrap_is_that_of_scipy():
    by_image = np.random.default_rng(2).choice([-1.0, -1 / 3, 0.0, 1 / 3, 1.0], 500, p=[0.1, 0.1, 0.5, 0.2, 0.1])
    theirs = stats.bootstrap((by_image,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    assert bootstrap_interval(by_image) == pytest.approx(tuple(theirs), abs=0.004)
    assert bootstrap_interval(by_image) == bootstrap_interval(by_image[::-1])


def test_one_seed_has_no_interval_over_seeds():
    found = effect({"0": 0.25}, np.array([0.0, 1.0, 0.0, 0.0]))
    assert (found.mean, found.sd, found.over_seeds, found.over_both, found.p) == (0.25, None, None, None, None)
    assert covers(found.over_images, 0.25)


def test_equal_differences_of_exact_values_are_certain():
    assert (t_test([0.5, 0.5]), t_test([0.0, 0.0])) == (0.0, 1.0)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("images", "accuracy", "tests", "seeds"), [(360, 0.985, 14, 2), (200, 0.97, 9, 2), (360, 0.985, 14, 3)]
)
def test_equal_counts_of_few_images_are_no_certainty(images, accuracy, tests, seeds):
    """Studies without any difference in which something is significant, at most 5 %; as exact values, it is up to 65 %."""
    hits = np.random.default_rng(7).binomial(images, accuracy, (300, 2, tests, seeds)) / images
    differences = hits[:, 1] - hits[:, 0]
    found = np.mean([min(holm([t_test(one, images) for one in study])) <= 1 - LEVEL for study in differences])
    assert found < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    low, high = t_interval([1 / images] * seeds, images)
    assert low < 0 < high or seeds > 2
    assert effect({"0": 1 / images, "1": 1 / images}, tested=images).p > 0.1


def test_intervals_over_seeds_cover_the_truth_as_often_as_they_say():
    drawn = np.random.default_rng(3).normal(0.01, 0.02, (DRAWS, 5))
    share = np.mean([covers(t_interval(row), 0.01) for row in drawn])
    assert abs(share - LEVEL) < ERROR


def test_intervals_over_images_cover_the_truth_as_often_as_they_say():
    drawn = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], (DRAWS, 2000), p=[0.05, 0.88, 0.07])
    share = np.mean([covers(bootstrap_interval(row), 0.02) for row in drawn])
    assert abs(share - LEVEL) < ERROR


def test_intervals_over_both_cover_what_neither_of_the_others_does():
    """Other seeds on other images: each interval alone leaves out what the other knows; both together do not."""
    generator, truth = np.random.default_rng(5), 0.1
    covered = np.zeros((DRAWS, 3))
    for draw in range(DRAWS):
        seeds, images = generator.normal(0, 0.02, (5, 1)), generator.choice([-0.1, 0.9], 400, p=[0.9, 0.1])
        values = truth + seeds + images
        means = values.mean(1)
        found = [t_interval(means), bootstrap_interval(values.mean(0))]
        found.append(combined_interval(values.mean(), *found))
        covered[draw] = [covers(interval, truth) for interval in found]
    over_seeds, over_images, over_both = covered.mean(0)
    assert max(over_seeds, over_images) < LEVEL - ERROR
    assert over_both > LEVEL - ERROR


def test_holm_is_the_hand_worked_example():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.04 * 1 (likewise).
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.001, 0.02, 0.9]) == pytest.approx([0.003, 0.04, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_power_is_the_share_of_studies_that_find_the_effect():
    drawn = np.random.default_rng(6).normal(0.005, 0.006, (4000, 8))
    found = np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue <= 1 - LEVEL)
    assert power(8, 0.005, 0.006) == pytest.approx(found, abs=3 * math.sqrt(0.25 / 4000))
    assert power(8, 0.005, 0.006) == pytest.approx(
        stats.nct.sf(stats.t.ppf(0.975, 7), 7, math.sqrt(8) * 5 / 6)
        + stats.nct.cdf(stats.t.ppf(0.025, 7), 7, math.sqrt(8) * 5 / 6)
    )


def test_so_many_seeds_are_enough_and_one_less_is_not():
    # Cohen's table for a paired t-test, two-sided at 5 %, power 80 %: an effect of 0.5 sd takes 34 pairs, one of 0.8 sd 15.
    assert (seeds_needed(0.5, 1.0), seeds_needed(0.8, 1.0)) == (34, 15)
    needed = seeds_needed(0.005, 0.0042)
    assert power(needed, 0.005, 0.0042) >= 0.8 > power(needed - 1, 0.005, 0.0042)
    assert seeds_needed(0.005, 0.0) == 2
    assert seeds_needed(0.005, 1e-17) == 2
    assert seeds_needed(0.005, 0.5) is None
