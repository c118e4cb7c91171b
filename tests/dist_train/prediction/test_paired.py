"""The exact test of two exits on the same images: its level is kept for every truth, summed up and not drawn."""

import numpy as np
import pytest
from scipy.stats import multinomial, norm

from dist_train.prediction import paired
from dist_train.prediction.paired import paired_p_value


@pytest.mark.parametrize(("images", "epsilon"), [(1, 0.5), (12, 0.3), (40, 0.1), (50, 0.06)])
def test_a_difference_above_epsilon_is_passed_with_probability_delta_at_most(images, epsilon):
    outcomes = [(w, b) for w in range(images + 1) for b in range(images + 1 - w)]
    for delta in (0.02, 0.1):
        passed = np.array([paired_p_value(w, b, images, epsilon, delta) <= delta for w, b in outcomes])
        assert passed.any() or (1 - epsilon) ** images > delta  # without a difference among all images, it can pass
        counts = np.array([(w, b, images - w - b) for w, b in outcomes])
        for difference in (epsilon, min(1.0, 1.2 * epsilon)):
            for share in np.linspace(difference, 1, 20):
                truth = [(share + difference) / 2, (share - difference) / 2, 1 - share]
                assert multinomial.pmf(counts, images, truth)[passed].sum() <= delta + 1e-9, (difference, share)


def test_with_many_images_it_is_the_score_test():
    for worse, better, images in ((180, 170, 4500), (300, 280, 9000), (60, 20, 20_000)):
        score = paired._score(np.array(float(worse)), np.array(float(worse + better)), images, 0.01)
        assert paired_p_value(worse, better, images, 0.01, 0.05) == pytest.approx(norm.cdf(score), rel=0.2, abs=1e-4)


def test_better_results_have_smaller_p_values_and_none_a_p_value_of_one():
    values = [paired_p_value(worse, 5, 300, 0.05, 0.05) for worse in range(25)]
    assert values == sorted(values)
    assert values[0] < 1e-3 < 0.3 < values[-1]
    assert paired_p_value(0, 0, 0, 0.05, 0.05) == paired_p_value(9, 0, 10, 0.05, 0.05) == 1
    # Of images that never differ: P(Bin(n, epsilon) = 0), and what pays for the shares that are not looked at.
    assert paired_p_value(0, 0, 100, 0.03, 0.05) == pytest.approx(0.97**100, abs=1e-4)
