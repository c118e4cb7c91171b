"""Learning rate, parameter groups and averaged weights, each by itself."""

import math

import pytest
import torch
from torch import nn

from dist_train.config import OptimConfig
from dist_train.training.optim import AveragedWeights, build_optimizer, learning_rate, state_names

STEPS_PER_EPOCH, TOTAL = 10, 100


def rates(**fields):
    config = OptimConfig(lr=0.4, **fields)
    return [learning_rate(config, step, STEPS_PER_EPOCH, TOTAL) for step in range(TOTAL)]


def test_multistep_drops_at_its_milestones():
    found = rates(schedule="multistep", milestones=(0.5, 0.75), gamma=0.1)
    assert found[49] == 0.4
    assert found[50] == pytest.approx(0.04)
    assert found[75] == pytest.approx(0.004)
    assert len(set(found)) == 3


def test_a_milestone_is_the_step_that_its_share_is_in_decimals():
    """0.55 * 220 is a little more than 121 in floats."""
    config = OptimConfig(lr=0.4, schedule="multistep", milestones=(0.55,), gamma=0.1)
    found = [learning_rate(config, step, 11, 220) for step in (120, 121)]
    assert found == [0.4, pytest.approx(0.04)]


def test_cosine_falls_from_the_peak_to_its_end():
    found = rates(final_lr=0.1)
    assert found[0] == 0.4
    assert found[50] == pytest.approx(0.4 * 0.55)
    assert found == sorted(found, reverse=True)
    end = learning_rate(OptimConfig(lr=0.4, final_lr=0.1), TOTAL, STEPS_PER_EPOCH, TOTAL)
    assert end == pytest.approx(0.04)
    assert learning_rate(OptimConfig(lr=0.4, final_lr=0.1), TOTAL + 5, STEPS_PER_EPOCH, TOTAL) == end


def test_warm_up_rises_linearly_and_then_the_schedule_begins_at_the_peak():
    found = rates(warmup_epochs=2)
    assert found[:20] == pytest.approx([0.4 * (step + 1) / 20 for step in range(20)])
    assert found[20] == 0.4
    assert found[60] == pytest.approx(0.4 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates(schedule="constant", warmup_epochs=2)[20:] == [0.4] * 80
    # A warm-up longer than the run is a run of warm-up.
    assert rates(warmup_epochs=1000)[-1] == 0.4


@pytest.mark.parametrize(("decay_all", "plain"), [(False, 2), (True, 0)])
def test_norms_and_biases_are_not_decayed_unless_asked(decay_all, plain):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    groups = build_optimizer(model, OptimConfig(weight_decay=0.1, decay_all=decay_all)).param_groups
    assert sum(len(group["params"]) for group in groups if group["weight_decay"] == 0) == plain
    assert sum(len(group["params"]) for group in groups) == 3


def test_the_optimizers_keep_what_their_state_names_say():
    for config in (OptimConfig(), OptimConfig(momentum=0, nesterov=False), OptimConfig(name="adamw")):
        weight = nn.Parameter(torch.ones(2, 2))
        optimizer = build_optimizer(nn.ParameterList([weight]), config)
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        kept = {
            name
            for name, value in optimizer.state[weight].items()
            if torch.is_tensor(value) and value.shape == weight.shape
        }
        assert kept == set(state_names(config))


def test_averaged_weights_forget_the_start_and_follow_the_recursion():
    weights = {"w": torch.tensor([10.0]), "count": torch.tensor(3)}
    averages = AveragedWeights(weights, decay=0.9)
    assert averages.tensors.keys() == {"w"}
    expected = 10.0
    for update in range(200):
        value = float(update % 7)
        weights["w"].fill_(value)
        averages.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert float(averages.tensors["w"]) == pytest.approx(expected, rel=1e-5)
    assert averages.updates == 200
