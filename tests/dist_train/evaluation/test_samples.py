"""What is kept of every image: equal to what scikit-learn says of the logits, whoever reduced them."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from dist_train.distributed.group import Group, Ranks
from dist_train.evaluation.accuracy import _resampled, by_exit, interval
from dist_train.evaluation.calibration import (
    bin_indices,
    fit_temperatures,
    reliability,
    scaled_confidence,
    temperatures_at,
)
from dist_train.evaluation.diagnostics import diagnose
from dist_train.evaluation.samples import SampleCollector, reduce_logits
from dist_train.prediction.confidence import MEASURES, confidence

EXITS, CLASSES = 3, 12


class Alone:
    """One process: there is nothing to sum, and no process group that would outlive the test."""

    device = torch.device("cpu")

    def sum(self, tensor):
        return tensor


def made(images):
    """Logits of a split, the same in every process; some labels are missing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    logits = torch.randn(EXITS, images, CLASSES, generator=generator) * 2
    logits[:, torch.arange(images), labels] += torch.arange(1.0, EXITS + 1)[:, None]
    labels[5::11] = -100
    return labels, logits


def reduced(images, batch, world_size=1):
    """One rank's part, in batches taken from the end to the start."""
    ranks = Ranks.from_env()
    labels, logits = made(images)
    group = Group(ranks, 2.0) if world_size > 1 else Alone()
    share = torch.arange(images).tensor_split(world_size)[ranks.rank]
    table = SampleCollector(images)
    for ids in reversed(share.split(batch)):
        known = ids.clone()
        known[labels[ids] < 0] = -1  # as an image that could not be read
        table.add(known, labels[ids], [one[ids] for one in logits])
    return table.join(group, EXITS, unreadable=ranks.rank)


def reduced_both(world_size):
    """Fewer images than ranks, and more."""
    return [reduced(images, 7, world_size) for images in (2, 101)]


def test_ranks_and_batches_change_nothing(ranks):
    wholes = [reduced(images, 1000) for images in (2, 101)]
    for results in ranks(reduced_both, 3, 3):
        for whole, result in zip(wholes, results, strict=True):
            assert result.unreadable == 0 + 1 + 2
            np.testing.assert_array_equal(result.ids, whole.ids)
            np.testing.assert_array_equal(result.labels, whole.labels)
            assert result.columns.keys() == whole.columns.keys()
            for name, column in whole.columns.items():
                np.testing.assert_array_equal(result[name], column, err_msg=name)


def test_accuracy_is_what_scikit_learn_says():
    samples = reduced(500, 64)
    labels, logits = made(500)
    keep = labels >= 0
    labels, probabilities = labels[keep].numpy(), logits[:, keep].double().softmax(dim=2)
    assert len(samples) == len(labels) < 500
    for ensemble in (False, True):
        for m, one in enumerate(by_exit(samples, ensemble)):
            p = (probabilities[: m + 1].mean(dim=0) if ensemble else probabilities[m]).numpy()
            assert one.top1 == accuracy_score(labels, p.argmax(axis=1))
            assert one.top5 == top_k_accuracy_score(labels, p, k=5, labels=range(CLASSES))
            assert one.loss == pytest.approx(log_loss(labels, p, labels=range(CLASSES)), rel=1e-5)
            assert one.top1_interval[0] < one.top1 < one.top1_interval[1]


def test_intervals_of_loss_and_calibration_error_are_those_of_images_drawn_again():
    samples = reduced(400, 64)
    generator = np.random.default_rng(1)
    for m, one in enumerate(by_exit(samples)):
        hits, confidence = samples["rank"][:, m] == 0, samples["max_probability"][:, m]
        places = bin_indices(confidence)
        assert reliability(confidence, hits).error == pytest.approx(error_by_bins(confidence, hits, places))
        losses, errors = [], []
        for _ in range(2000):
            drawn = generator.integers(len(samples), size=len(samples))
            losses.append(samples["loss"][drawn, m].mean())
            errors.append(error_by_bins(confidence[drawn], hits[drawn], places[drawn]))
        low, high = np.quantile(losses, [0.025, 0.975])
        assert one.loss_interval == pytest.approx((low, high), abs=0.1 * (high - low))
        low, high = np.quantile(errors, [0.025, 0.975]) - (np.mean(errors) - one.ece)
        assert one.ece_interval == pytest.approx((max(0, low), high), abs=0.1 * (high - low))
    assert by_exit(samples) == by_exit(samples)


def test_the_interval_of_a_calibration_error_is_about_what_other_images_give():
    """Also for a calibrated network, whose error is noise alone: images drawn again have more of it."""
    generator, inside, others = np.random.default_rng(2), 0, []
    for _ in range(40):
        confidence = generator.uniform(0.3, 1, (200, 1)).astype(np.float32)
        hits = generator.random((200, 1)) < confidence
        _, ((low, high),) = _resampled(np.zeros_like(confidence), confidence, hits)
        others.append(reliability(confidence[:, 0], hits[:, 0]).error)
        assert low < others[-1] < high
        inside += low < np.mean(others) < high
    assert inside > 32


def error_by_bins(confidence, hits, places):
    """The calibration error as it is defined: over the bins, their share times |accuracy - mean confidence|."""
    total = 0.0
    for place in np.unique(places):
        inside = places == place
        total += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean(dtype=np.float64))
    return total


def test_a_network_that_is_very_sure_and_wrong_has_a_finite_loss():
    table = SampleCollector(2)
    table.add(
        torch.arange(2), torch.tensor([1, 0]), [torch.tensor([[400.0, 0.0]] * 2), torch.tensor([[300.0, 0.0]] * 2)]
    )
    samples = table.join(Alone(), 2, 0)
    assert samples["ensemble_loss"][0].tolist() == pytest.approx([400, 300 + np.log(2)])
    assert samples["ensemble_loss"][1].tolist() == [0, 0]
    assert samples["ensemble_rank"].tolist() == [[1, 1], [0, 0]]


def test_of_equal_logits_the_first_class_counts_as_larger():
    table = SampleCollector(4)
    table.add(torch.arange(4), torch.tensor([0, 1, 4, 5]), [torch.zeros(4, 6)])
    samples = table.join(Alone(), 1, 0)
    assert samples["rank"][:, 0].tolist() == [0, 1, 4, 5]
    assert samples["prediction"][:, 0].tolist() == [0, 0, 0, 0]


def test_confidences_are_those_that_prediction_takes():
    samples = reduced(200, 33)
    labels, logits = made(200)
    logits = logits[:, labels >= 0]
    for measure in MEASURES:
        wanted = torch.stack([confidence(one, measure) for one in logits], dim=1)
        np.testing.assert_allclose(samples[measure], wanted.numpy(), atol=1e-6)
    places = np.array([0, 7, 21])
    temperatures = temperatures_at(places)
    wanted = torch.stack([confidence(one / t) for one, t in zip(logits, temperatures)], dim=1)
    np.testing.assert_array_equal(scaled_confidence(samples, places), wanted.numpy())


def test_the_fitted_temperature_is_the_one_that_spoilt_the_logits():
    generator = torch.Generator().manual_seed(1)
    honest = torch.randn(EXITS, 20_000, CLASSES, generator=generator) * 2
    labels = torch.distributions.Categorical(logits=honest[0]).sample()
    table = SampleCollector(20_000)
    table.add(torch.arange(20_000), labels, [honest[0] * 0.5, honest[0], honest[0] * 3])
    samples = table.join(Alone(), EXITS, 0)
    assert temperatures_at(fit_temperatures(samples)) == pytest.approx([0.5, 1, 3], rel=0.13)
    errors = [one.ece for one in by_exit(samples)]
    assert errors[1] < 0.015 < 0.1 < min(errors[0], errors[2])


def test_calibration_error_is_its_definition_and_does_not_part_ties():
    rng = np.random.default_rng(0)
    sure, right = rng.random(1500).astype(np.float32), rng.random(1500) < 0.6
    parts = np.array_split(np.argsort(sure), 15)
    wanted = sum(len(part) / 1500 * abs(sure[part].mean() - right[part].mean()) for part in parts)
    assert reliability(sure, right).error == pytest.approx(wanted, rel=1e-5)
    tied = np.where(sure > 0.3, np.float32(1), sure)
    shuffled = rng.permutation(1500)
    once, again = reliability(tied, right), reliability(tied[shuffled], right[shuffled])
    np.testing.assert_allclose(once.confidence, again.confidence)
    np.testing.assert_allclose(once.accuracy, again.accuracy)
    assert once.accuracy[-1] == right[tied == 1].mean()


@pytest.mark.parametrize("images", [100, 360, 1000])
def test_the_interval_of_an_accuracy_covers_it_as_often_as_it_says(images):
    intervals = np.array([interval(hits, images) for hits in range(images + 1)])
    for accuracy in (0.5, 0.9, 0.985, 0.997, 0.999):
        covered = (intervals[:, 0] <= accuracy) & (accuracy <= intervals[:, 1])
        assert 0.95 <= binom.pmf(np.arange(images + 1), images, accuracy)[covered].sum() < 1
    assert interval(0, images)[0] == 0
    assert interval(images, images) == (pytest.approx(0.025 ** (1 / images)), 1)


def test_diagnostics_are_counted_right():
    samples = reduced(300, 50)
    found = diagnose(samples, CLASSES)
    labels, prediction = samples.labels, samples["prediction"]
    right = prediction == labels[:, None]
    for m in range(EXITS):
        alone = [i for i, row in zip(samples.ids, right) if row[m] and row.sum() == 1]
        assert found.uniquely_correct_images[m] == len(alone)
        assert found.uniquely_correct[m] == alone[:8]
        for n in range(EXITS):
            assert found.agreement[m, n] == pytest.approx((prediction[:, m] == prediction[:, n]).mean())
            assert found.joint_errors[m, n] == pytest.approx((~right[:, m] & ~right[:, n]).mean())
            assert found.correct_then_wrong[m, n] == pytest.approx((right[:, m] & ~right[:, n]).mean())
        for k in range(CLASSES):
            assert found.class_top1[k, m] == pytest.approx(right[labels == k, m].mean())
    true, taken, counts = found.confusions[0]
    assert counts == [int(((labels == true) & (prediction[:, m] == taken)).sum()) for m in range(EXITS)]
    assert counts[-1] == max(c[-1] for *_, c in found.confusions) > 0


def test_a_class_that_is_masked_everywhere_is_never_predicted():
    logits = torch.randn(EXITS, 20, CLASSES)
    logits[:, :, 3] = -torch.inf
    labels = torch.arange(20) % 3
    columns = reduce_logits(list(logits), labels)
    for name, column in columns.items():
        assert torch.isfinite(column).all(), name
    without = reduce_logits(list(torch.cat([logits[:, :, :3], logits[:, :, 4:]], dim=2)), labels)
    for name in ("loss", "ensemble_loss", "ensemble_max_probability", "ensemble_rank", "margin"):
        torch.testing.assert_close(columns[name], without[name])
    assert not (columns["ensemble_prediction"] == 3).any()
