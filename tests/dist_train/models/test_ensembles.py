"""Ensembles of exits: what they predict, by hand; lazily, in stages, lighter by rows, and in training, the same."""

from __future__ import annotations

import pytest
import torch

from dist_train.config import LossConfig
from dist_train.loss import ExitDistillation
from dist_train.models import MultiExitNetwork, build_model
from dist_train.models.cost import exit_costs
from dist_train.models.parts import exits_behind
from tests.common import SMALL_MODEL, network_config

RULES = ("geometric", "arithmetic", "product", "boosted")
RESNET = {"name": "resnet", "exits": ["stages.0", "stages.1"], "width": 4, "blocks": [1, 1, 1]}
KINDS = {"msdnet": SMALL_MODEL, "attached": RESNET}


def made(kind: str, rule: str | None) -> MultiExitNetwork:
    torch.manual_seed(0)
    return build_model(network_config(**KINDS[kind], ensemble=rule), 5, 32).eval()


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_an_exit_predicts_with_those_before_it(rule: str) -> None:
    images = torch.randn(6, 3, 32, 32)
    alone, together = made("msdnet", None)(images), made("msdnet", rule)(images)
    for number in range(1, len(alone) + 1):
        logits = torch.stack(alone[:number])
        probabilities = logits.softmax(-1)
        expected = {
            "geometric": probabilities.log().mean(0).softmax(-1),
            "arithmetic": probabilities.mean(0),
            "product": logits.sum(0).softmax(-1),
            "boosted": logits.sum(0).softmax(-1),
        }[rule]
        torch.testing.assert_close(together[number - 1].softmax(-1), expected)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "rule"), [("msdnet", "geometric"), ("msdnet", "product"), ("attached", "arithmetic")])
def test_whole_lazy_and_staged_agree_and_rows_can_leave(kind: str, rule: str) -> None:
    network, images = made(kind, rule), torch.randn(5, 3, 32, 32)
    whole = network(images)
    for form in (network, network.staged(32)):
        exits = form.iter_exits(images)
        torch.testing.assert_close(next(exits), whole[0], rtol=1e-4, atol=1e-5)
        rows = torch.tensor([4, 1])
        for logits in whole[1:]:
            torch.testing.assert_close(exits.send(rows), logits[[4, 1]], rtol=1e-4, atol=1e-5)
            rows = None
        with pytest.raises(StopIteration):
            next(exits)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_the_exits_alone(kind: str) -> None:
    for lazy in (False, True):
        assert exit_costs(made(kind, "arithmetic"), 32, lazy=lazy) == exit_costs(made(kind, None), 32, lazy=lazy)


@pytest.mark.parametrize(("rule", "moves_earlier"), [("product", True), ("geometric", True), ("boosted", False)])
def test_what_an_exit_teaches_the_heads_before_it(rule: str, moves_earlier: bool) -> None:
    heads = {
        name: exits for name, exits in exits_behind(made("msdnet", rule), 32).items() if name.startswith("heads.0.")
    }
    assert heads
    last = len(made("msdnet", rule).heads) - 1
    assert all((last in exits) == moves_earlier for exits in heads.values())


def test_sums_are_kept_in_float32_and_the_loss_takes_them() -> None:
    network = made("msdnet", "geometric").train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(4, 3, 32, 32))
    assert {one.dtype for one in logits} == {torch.float32}
    criterion = ExitDistillation.from_config(LossConfig(), len(logits))
    criterion(logits, torch.tensor([0, 1, 2, 3])).loss.backward()
    assert all(parameter.grad is not None for parameter in network.heads.parameters())


def test_regimes_that_train_the_last_exit_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="ensemble is product and regime disjoint"):
        network_config(**SMALL_MODEL, ensemble="product", regime="disjoint", first_epochs=1)
