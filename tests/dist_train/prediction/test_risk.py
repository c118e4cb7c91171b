"""Guarantees: they hold as often as they say, they are worth having, and the simulated risk is that of real stopping."""

import numpy as np
import pytest
import torch
from torch import nn

from dist_train.errors import ConfigError, DataError
from dist_train.prediction import risk
from dist_train.prediction.risk import Outputs, Target, certify, losses, p_value
from dist_train.prediction.search import Search
from dist_train.prediction.stopping import Thresholds, predict
from tests.dist_train.prediction.synthetic import population

EPSILON = {"gap": 0.01, "consistency": 0.02, "error": 0.07, "cost": 0.45}


@pytest.fixture(scope="module")
def truth():
    """The population, and its risk at any thresholds."""
    drawn = population(images=60_000, exits=4)
    outputs = Outputs(drawn.scores, drawn.predictions, drawn.labels)

    def known(name, thresholds):
        return losses(name, outputs, outputs.exits(thresholds), drawn.costs).mean()

    return drawn, known


def sample(drawn, rng, images):
    found = drawn.draw(rng, images)
    return Outputs(found.scores, found.predictions, found.labels)


@pytest.mark.parametrize("name", risk.RISKS)
def test_a_p_value_is_small_no_more_often_than_it_says(name):
    """At the edge of the null hypothesis, for losses of the kinds that occur."""
    rng = np.random.default_rng(0)
    epsilon, images, draws = {"gap": 0.02, "cost": 0.5}.get(name, 0.05), 300, 2000
    if name == "gap":
        kinds = [np.array([-1.0, 0, 1]), np.array([-1.0, 0, 1]), np.array([0.0, 1])]
        chances = [[0.05, 0.88, 0.07], [0.4, 0.18, 0.42], [0.98, 0.02]]
    elif name == "cost":
        kinds, chances = [np.array([0.2, 0.6, 1.0]), np.array([0.0, 1])], [[0.45, 0.35, 0.2], [0.5, 0.5]]
    else:
        kinds, chances = [np.array([0.0, 1])], [[1 - epsilon, epsilon]]
    for values, weights in zip(kinds, chances):
        assert np.dot(values, weights) == pytest.approx(epsilon)
        drawn = rng.choice(values, p=weights, size=(draws, images))
        found = np.array([p_value(name, row, epsilon, 0.1) for row in drawn])
        for level in (0.02, 0.1, 0.3):
            assert (found <= level).mean() <= level + 2 * np.sqrt(level * (1 - level) / draws)
    # And it finds what is there: where the risk is clearly below, it is small.
    low = {"gap": ([-1.0, 0, 1], [0.09, 0.9, 0.01]), "cost": ([0.2, 0.6, 1.0], [0.7, 0.2, 0.1])}
    values, weights = low.get(name, ([0.0, 1], [0.99, 0.01]))
    assert np.median([p_value(name, rng.choice(values, images, p=weights), epsilon, 0.1) for _ in range(50)]) < 0.01


def test_as_many_images_of_every_class_keep_p_values_valid():
    """Calibration images are drawn class by class, which classes of different risk make more even than chance does."""
    rng = np.random.default_rng(1)
    each, draws = 30, 2000
    rates = np.linspace(0.0, 0.2, 10)  # by class; 0.1 on average
    for name, losses_of in (
        ("error", lambda: (rng.random((each, 10)) < rates).astype(float)),
        ("gap", lambda: (rng.random((each, 10)) < rates + 0.1) - 1.0 * (rng.random((each, 10)) < 0.1)),
        ("cost", lambda: np.clip(rates + 0.4 + 0.3 * (rng.random((each, 10)) - 0.5), 0, 1)),
    ):
        epsilon = 0.5 if name == "cost" else 0.1
        found = np.array([p_value(name, rng.permutation(losses_of().ravel()), epsilon, 0.1) for _ in range(draws)])
        for level in (0.02, 0.1):
            assert (found <= level).mean() <= level + 2 * np.sqrt(level * (1 - level) / draws), name


@pytest.mark.parametrize("images", [200, 1000])
def test_guarantees_are_broken_no_more_often_than_delta(truth, images):
    """The long form of this, with 1,000 splits, is `python tests/benchmarks/guarantees.py`."""
    drawn, known = truth
    rng, splits, delta = np.random.default_rng(images), 60, 0.2
    for name, epsilon in EPSILON.items():
        broken = []
        for _ in range(splits):
            found = certify(sample(drawn, rng, images), drawn.costs, [Target(name, epsilon)], delta)
            broken.append(found.thresholds is not None and known(name, found.thresholds) > epsilon)
        assert np.mean(broken) <= delta + 2 * np.sqrt(delta * (1 - delta) / splits), name


def test_guarantees_save_most_of_what_hindsight_saves(truth):
    drawn, known = truth
    rng = np.random.default_rng(0)
    for name in ("gap", "consistency"):
        wanted = drawn.predictions == drawn.predictions[:, -1:] if name == "consistency" else drawn.correct
        way = Search(drawn.scores, wanted, drawn.costs).curve(200)
        hindsight = 1 - min(known("cost", row) for row in way if known(name, row) <= 0.01)
        saved = []
        for _ in range(8):
            found = certify(sample(drawn, rng, 5000), drawn.costs, [Target(name, 0.01)], 0.05)
            assert not found.reason
            saved.append(1 - known("cost", found.thresholds))
        assert np.mean(saved) >= 0.8 * hindsight > 0.3, name


def test_where_exits_lie_close_a_gap_of_fewer_differences_saves_more(monkeypatch):
    """They are right and wrong about different images, which scatters: a small gap alone is hard to show."""
    drawn = population(images=50_000, exits=4, skills=(0.75, 0.9))
    saved = {}
    for price in (0.0, risk.DIFFERENCE_PRICE):
        monkeypatch.setattr(risk, "DIFFERENCE_PRICE", price)
        saved[price] = []
        for seed in range(12):
            outputs = sample(drawn, np.random.default_rng(seed), 5000)
            thresholds = certify(outputs, drawn.costs, [Target("gap", 0.01)], 0.05).thresholds
            saved[price].append(1 - losses("cost", outputs, outputs.exits(thresholds), drawn.costs).mean())
    without, with_price = (np.mean(values) for values in saved.values())
    assert with_price > without + 0.01


def test_several_risks_hold_together_and_share_delta(truth):
    drawn, known = truth
    rng = np.random.default_rng(1)
    targets = [Target("gap", 0.02), Target("cost", 0.6)]
    found = certify(sample(drawn, rng, 5000), drawn.costs, targets, 0.1)
    assert [bound.delta for bound in found.bounds] == [0.05, 0.05]
    assert all(bound.p_value <= 0.05 for bound in found.bounds)
    assert known("gap", found.thresholds) <= 0.02
    assert known("cost", found.thresholds) <= 0.6
    assert found.bounds[0].estimate == pytest.approx(known("gap", found.thresholds), abs=0.01)
    # The last exit alone agrees with itself, but costs everything: here nothing has both.
    none = certify(sample(drawn, rng, 5000), drawn.costs, [Target("consistency", 0.001), Target("cost", 0.3)], 0.1)
    assert none.thresholds is None
    assert "no thresholds keep to all of the risks at once" in none.reason


def test_too_few_images_say_how_many_do(truth):
    drawn, _ = truth
    rng = np.random.default_rng(2)
    for name in ("gap", "consistency"):
        found = certify(sample(drawn, rng, 150), drawn.costs, [Target(name, 0.01)], 0.05)
        assert found.thresholds[:-1].tolist() == [np.inf] * 3  # the last exit is never another one
        assert f"{name} at most 0.01 is guaranteed for the last exit alone" in found.reason
        assert f"{found.needed:,} calibration images" in found.reason
        assert "\n" not in found.reason
        again = [
            certify(sample(drawn, rng, 2 * found.needed), drawn.costs, [Target(name, 0.01)], 0.05) for _ in range(5)
        ]
        assert sum(not one.reason for one in again) >= 4
    # Rule of three: n images without a loss say that a share is at most 1 - delta^(1/n).
    assert risk.images_needed("error", np.zeros(10), 0.01, 0.05) == pytest.approx(299, abs=1)
    hopeless = certify(sample(drawn, rng, 2000), drawn.costs, [Target("error", 0.001)], 0.05)
    assert hopeless.thresholds is None
    assert hopeless.needed is None
    assert "nor would more" in hopeless.reason


def test_classes_have_guarantees_of_their_own_or_are_named(truth):
    drawn, _ = truth
    rng = np.random.default_rng(3)
    found = sample(drawn, rng, 20_000)
    rare = np.flatnonzero((found.labels != 3) | (np.arange(20_000) % 30 == 0))
    outputs = found.select(rare)
    overall = certify(outputs, drawn.costs, [Target("consistency", 0.03)], 0.1)
    each = certify(outputs, drawn.costs, [Target("consistency", 0.03)], 0.1, classes=10)
    assert overall.classes_left_out is None
    assert each.classes_left_out == [3]
    _, tested = risk.fit_rows(len(outputs.labels))
    test = outputs.select(tested)
    exits = test.exits(each.thresholds)
    loss = losses("consistency", test, exits, drawn.costs)
    for label in set(range(10)) - {3}:
        assert p_value("consistency", loss[test.labels == label], 0.03, 0.1) <= 0.1
    assert drawn.costs[exits].mean() > drawn.costs[test.exits(overall.thresholds)].mean()
    with pytest.raises(DataError, match="class 3 has no calibration image; give images of every class"):
        certify(found.select(np.flatnonzero(found.labels != 3)), drawn.costs, [Target("gap", 0.03)], 0.1, classes=10)


class Table(nn.Module):
    """Gives the logits that stand in its images [N, 3, M, K]."""

    num_exits, num_classes = 4, 10

    def iter_exits(self, images):
        for number in range(self.num_exits):
            rows = yield images[:, 0, number]
            images = images if rows is None else images[rows]


def test_the_simulated_risk_is_that_of_real_stopping(truth):
    drawn, _ = truth
    rng = np.random.default_rng(4)
    outputs = sample(drawn, rng, 3000)
    # Logits whose largest probability is the confidence, and belongs to the predicted class.
    confidence = torch.from_numpy(outputs.scores).double().clamp(0.11, 1 - 1e-6)
    logits = torch.zeros(3000, 4, 10, dtype=torch.float64)
    logits.scatter_(
        2,
        torch.from_numpy(outputs.predictions).long()[..., None],
        torch.log(9 * confidence / (1 - confidence))[..., None],
    )
    outputs = outputs._replace(scores=logits.softmax(2).amax(2).float().numpy())
    for name, epsilon in EPSILON.items():
        found = certify(outputs, drawn.costs, [Target(name, epsilon)], 0.2)
        result = predict(Table().eval(), logits[:, None].expand(-1, 3, -1, -1), Thresholds(found.thresholds.tolist()))
        simulated = losses(name, outputs, outputs.exits(found.thresholds), drawn.costs)
        taken, classes = result.exits.numpy(), result.classes.numpy()
        assert (taken == outputs.exits(found.thresholds)).all()
        last = outputs.predictions[:, -1]
        real = {
            "gap": (last == outputs.labels).mean() - (classes == outputs.labels).mean(),
            "consistency": (classes != last).mean(),
            "error": (classes != outputs.labels).mean(),
            "cost": drawn.costs[taken].mean() / drawn.costs[-1],
        }
        assert simulated.mean() == pytest.approx(real[name], abs=1e-12)
        assert len(set(taken.tolist())) >= 2


def test_the_same_images_give_the_same_thresholds_in_any_process(truth):
    drawn, _ = truth
    outputs = sample(drawn, np.random.default_rng(5), 700)
    fit, tested = risk.fit_rows(700)
    assert sorted([*fit, *tested]) == list(range(700))
    first, again = (certify(outputs, drawn.costs, [Target("gap", 0.05)], 0.1) for _ in range(2))
    assert first.thresholds.tolist() == again.thresholds.tolist()


def test_bad_input_is_refused(truth):
    drawn, _ = truth
    outputs = sample(drawn, np.random.default_rng(6), 50)
    for targets, delta, said in (
        ([Target("gap", 0)], 0.05, "--epsilon of gap is 0; give a share above 0 and below 1"),
        ([Target("error", 1.0)], 0.05, "--epsilon of error is 1; give"),
        ([Target("error", float("nan"))], 0.05, "--epsilon of error is nan; give"),
        ([Target("gap", 0.1)], 0.0, "--delta is 0; give a probability"),
        ([Target("gap", 0.1)], 1.5, "--delta is 1.5; give a probability"),
        ([Target("luck", 0.1)], 0.1, "--risk is 'luck'; use one of gap, consistency, error, cost"),
        ([Target("gap", 0.1), Target("gap", 0.2)], 0.1, "--risk is given twice"),
        ([Target("cost", 0.1)], 0.1, "the first exit alone costs 0.2 of the last; give more"),
    ):
        with pytest.raises(ConfigError, match=said):
            certify(outputs, drawn.costs, targets, delta)
    with pytest.raises(DataError, match="needs calibration images, and there are 1; give more"):
        certify(outputs.select(np.arange(1)), drawn.costs, [Target("gap", 0.1)], 0.1)
    one_exit = Outputs(outputs.scores[:, :1], outputs.predictions[:, :1], outputs.labels)
    assert certify(one_exit, drawn.costs[:1], [Target("gap", 0.1)], 0.1).shares == [1]
