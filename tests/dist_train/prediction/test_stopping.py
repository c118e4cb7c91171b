"""Prediction that stops equals its policy applied afterwards to the logits of all exits, and computes no more than that."""

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import MSDNet, attach_exits, predict
from dist_train.errors import ConfigError
from dist_train.models import ResNet
from dist_train.models.stages import StagedNetwork
from dist_train.prediction.confidence import (
    FEATURES,
    HISTORY_MEASURES,
    MEASURES,
    confidence,
    confidence_with_history,
    exits_taken,
)
from dist_train.prediction.stopping import Patience, Thresholds, at_exit, for_inference
from tests.dist_train.models.test_stages import BranchOnValue


def msdnet():
    return MSDNet(
        5,
        exits=4,
        base=2,
        step=1,
        scales=2,
        growth=2,
        growth_factors=(1, 2),
        bottleneck_factors=(1, 2),
        initial_channels=4,
        head_width=8,
    )


def resnet():
    return attach_exits(ResNet(5, blocks=(1, 1, 1, 1), width=8), [f"stages.{i}" for i in range(3)], 5, image_size=16)


NETWORKS = {"msdnet": msdnet, "attached": resnet}


@pytest.fixture(params=NETWORKS, scope="module")
def network(request):
    """In float64: there a score equals a threshold only where both are meant to be equal."""
    torch.manual_seed(1)
    network = NETWORKS[request.param]().double()
    with torch.no_grad():
        network(3 * torch.randn(32, 3, 16, 16).double())
        for head in network.heads:
            for parameter in head.parameters():
                parameter.mul_(3)
    return network.eval()


@pytest.mark.parametrize("size", [1, 2, 3, 64, 257])
def test_thresholds_are_those_applied_afterwards(network, size):
    torch.manual_seed(size)
    images = 3 * torch.randn(size, 3, 16, 16).double()
    with torch.no_grad():
        every = torch.stack(network(images))
    taken = set()
    for measure in MEASURES:
        scores = torch.stack([confidence(logits, measure) for logits in every], 1)
        for temperatures in (None, [0.5, 1.0, 2.0, 4.0]):
            if temperatures:
                scores = torch.stack([confidence(z / t, measure) for z, t in zip(every, temperatures)], 1)
            picked = [scores[torch.randint(size, (1,)), exit_].item() for exit_ in range(4)]
            # Halfway between two scores, and for the first exit on a score: the sample with just this one leaves.
            values = [picked[0], *(value * 0.9999 for value in picked[1:])]
            result = predict(network, images, Thresholds(values, measure, temperatures))
            expected = exits_taken(scores, torch.tensor(values))
            assert result.exits.equal(expected)
            torch.testing.assert_close(result.logits, every[expected, torch.arange(size)], rtol=1e-9, atol=1e-12)
            assert result.classes.equal(every[expected, torch.arange(size)].argmax(1))
            assert (result.milliseconds > 0).all()
            taken |= set(expected.tolist())
    assert size < 257 or len(taken) >= 3


class Table(nn.Module):
    """Gives the logits that stand in its 'images' [N, 3, M, K], and notes how many rows each exit was computed for."""

    def __init__(self, num_exits):
        super().__init__()
        self.num_exits, self.num_classes = num_exits, 3

    def iter_exits(self, images):
        self.rows = []
        for number in range(self.num_exits):
            self.rows.append(len(images))
            rows = yield images[:, 0, number]
            if rows is not None:
                images = images[rows]


def test_ties_leave_and_only_the_others_are_computed():
    table = Table(4).eval()
    generator = np.random.default_rng(0)
    for size in (1, 7, 60):
        images = torch.from_numpy(generator.integers(0, 3, (size, 3, 4, 3)).astype(np.float32))
        scores = torch.stack([confidence(images[:, 0, exit_]) for exit_ in range(4)], 1)
        values = scores[0]  # scores of whole numbers: many samples have exactly these
        result = predict(table, images, Thresholds(values.tolist()))
        expected = exits_taken(scores, values)
        assert result.exits.equal(expected)
        computed = [int((expected >= exit_).sum()) for exit_ in range(4)]
        assert table.rows == [count for count in computed if count]
        assert size < 60 or len(set(expected.tolist())) == 4


def patient_exit(classes, patience):
    """The exit, from 0, at which a list of predictions has not changed for so many exits."""
    for exit_ in range(len(classes)):
        run = classes[max(0, exit_ - patience) : exit_ + 1]
        if len(run) == patience + 1 and len(set(run)) == 1:
            return exit_
    return len(classes) - 1


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_is_that_applied_afterwards(network, patience):
    table = Table(6).eval()
    for source, images in ((network, torch.randn(50, 3, 16, 16).double()), (table, torch.randn(200, 3, 6, 3))):
        with torch.no_grad():
            classes = torch.stack([logits.argmax(1) for logits in source.iter_exits(images)], 1).tolist()
        result = predict(source, images, Patience(patience))
        assert result.exits.tolist() == [patient_exit(row, patience) for row in classes]
    assert len(set(result.exits.tolist())) == 6 - patience


@pytest.mark.parametrize("measure", HISTORY_MEASURES)
def test_measures_that_look_back_are_those_applied_afterwards(network, measure):
    torch.manual_seed(3)
    weights = torch.randn(4, len(FEATURES) + 1).tolist()
    for source, images in (
        (network, torch.randn(50, 3, 16, 16).double()),
        (Table(4).eval(), torch.randn(200, 3, 4, 3)),
    ):
        with torch.no_grad():
            every = list(source.iter_exits(images))
        classes = torch.stack([logits.argmax(1) for logits in every], 1)
        scores = torch.stack(
            [confidence_with_history(z, classes[:, : m + 1], measure, weights[m]) for m, z in enumerate(every)], 1
        )
        picked = [max(scores[:, m].quantile(0.7).item(), 0.2) for m in range(4)]
        values = [0.9999 * value for value in picked]
        result = predict(source, images, Thresholds(values, measure, weights=weights))
        assert result.exits.equal(exits_taken(scores, torch.tensor(values)))
    assert len(set(result.exits.tolist())) >= 3


def test_one_exit_and_an_empty_batch(network):
    images = torch.randn(6, 3, 16, 16).double()
    with torch.no_grad():
        every = network(images)
    for number in range(1, 5):
        result = predict(network, images, at_exit(number, 4))
        assert result.exits.tolist() == [number - 1] * 6
        torch.testing.assert_close(result.logits, every[number - 1], rtol=1e-9, atol=1e-12)
    assert len(predict(network, images[:0], Patience(1)).classes) == 0


def test_policies_that_do_not_fit_are_refused(network):
    images = torch.randn(1, 3, 16, 16).double()
    for policy, said in (
        (Thresholds([0.5]), "1 thresholds are given for 4 exits; give 3"),
        (Thresholds([0.5, float("nan"), 0.5]), "allowed are numbers and infinity"),
        (Thresholds([0.5] * 3, temperatures=[1.0]), "1 temperatures are given for 4 exits"),
        (Thresholds([0.5] * 3, temperatures=[1.0, 0.0, 1.0, 1.0]), "allowed are numbers above 0"),
        (Thresholds([0.5] * 3, "nope"), "the measure is 'nope'; use one of max_probability, entropy"),
        (Thresholds([0.5] * 3, "learned"), "learned needs 6 weights for each of 4 exits; `dist-train eval` fits them"),
        (Thresholds([0.5] * 3, "learned", weights=[[1.0]] * 4), "learned needs 6 weights"),
        (Thresholds([0.5] * 3, "learned", weights=5), "learned needs 6 weights"),
        (Patience, "policy is <class .*; give Thresholds, Patience or at_exit of dist_train.prediction, or an object"),
        (OwnPolicy(exits="all"), "OwnPolicy.should_exit gave 'all'; it gives a bool tensor .1., one per sample"),
        (OwnPolicy(exits=torch.ones(1)), "OwnPolicy.should_exit gave .1. in torch.float32"),
        (OwnPolicy(exits=torch.ones(2, dtype=torch.bool)), "OwnPolicy.should_exit gave .2. in torch.bool"),
        (Patience(4), "patience is 4"),
        (Patience(0), "patience is 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            predict(network, images, policy)
    with pytest.raises(ConfigError, match="exits 1 to 4"):
        at_exit(5, 4)
    with pytest.raises(ConfigError, match="training mode"):
        predict(msdnet(), images.float(), Patience(1))
    with pytest.raises(ConfigError, match="image_size is 'a'; give an integer"):
        for_inference(network, "a")


class OwnPolicy:
    """A policy of one's own, here as good as drawing lots."""

    def __init__(self, exits=None):
        self.exits = exits

    def check(self, num_exits):
        assert num_exits > 1

    def should_exit(self, number, logits, classes):
        return logits.abs().sum(1) % 0.01 > 0.005 if self.exits is None else self.exits


def test_a_policy_of_ones_own(network):
    images = 3 * torch.randn(64, 3, 16, 16).double()
    with torch.no_grad():
        would = torch.stack([OwnPolicy().should_exit(0, logits, None) for logits in network(images)[:-1]])
    result = predict(network, images, OwnPolicy())
    assert result.exits.equal(torch.where(would.any(0), would.int().argmax(0), 3))
    assert len(set(result.exits.tolist())) == 4


@pytest.mark.parametrize("size", [1, 64])
def test_the_form_for_inference_predicts_the_same(network, size):
    staged = for_inference(network, 16)
    assert isinstance(staged, StagedNetwork)
    images = 3 * torch.randn(size, 3, 16, 16).double()
    for policy in (Thresholds([0.9, 0.7, 0.5]), Thresholds([0.5] * 3, "margin"), Patience(2), at_exit(2, 4)):
        expected, got = predict(network, images, policy), predict(staged, images, policy)
        assert got.exits.equal(expected.exits)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-12)


def test_a_network_that_cannot_be_cut_predicts_as_it_is():
    network = attach_exits(BranchOnValue(), ["blocks.0"], 5, image_size=32).eval()
    assert for_inference(network, 32) is network
