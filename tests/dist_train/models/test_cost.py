"""Costs per exit: the published axes, pure multiply-adds, lazy ones, and that counting leaves no trace."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config_file import load_config
from dist_train.models import MSDNet, MultiExitNetwork, build_model
from dist_train.models.cost import ExitCost, exit_costs
from tests.common import ROOT

IMAGENET = {
    "num_classes": 1000,
    "exits": 5,
    "scales": 4,
    "growth": 16,
    "growth_factors": (1, 2, 4, 4),
    "bottleneck_factors": (1, 2, 4, 4),
    "initial_channels": 32,
    "head_width": None,
    "stem": 224,
}
CIFAR: dict[str, Any] = {"num_classes": 100}
AUTHORS = {
    "exits": 11,
    "prune": "min",
    "growth": 1,
    "initial_channels": 1,
    "growth_factors": (6, 12, 24),
    "bottleneck_factors": (4, 4, 4),
    "dialect": "multiexit_distillation",
}
# name: arguments, ops of the public counter, lazy ops (None: not tabled), parameters up to each exit or of all; millions
TABLE: dict[str, tuple[dict[str, Any], str, str | None, str]] = {
    "ImageNet step 4": (
        IMAGENET | {"base": 4, "step": 4},
        "339.90 685.46 1008.16 1254.47 1360.53",
        "255.82 614.97 964.74 1254.47 1360.53",
        "4.24 8.77 13.07 16.75 23.96",
    ),
    "ImageNet step 5": (
        IMAGENET | {"base": 5, "step": 5},
        "422.73 933.85 1453.51 1915.23 2156.91",
        None,
        "5.57 11.80 17.42 29.48",
    ),
    "ImageNet step 6": (
        IMAGENET | {"base": 6, "step": 6},
        "514.66 1171.18 1844.52 2501.40 2742.06",
        "412.92 1084.64 1793.87 2431.49 2742.06",
        "7.08 15.69 24.01 42.19 56.53",
    ),
    "ImageNet step 7": (
        IMAGENET | {"base": 7, "step": 7},
        "615.69 1436.39 2283.21 2967.42 3253.79",
        "505.12 1340.22 2226.95 2967.42 3253.79",
        "8.76 20.15 31.73 41.86 62.31",
    ),
    "CIFAR anytime": (
        CIFAR,
        "15.14 25.51 37.10 46.33 57.34 66.96 75.94",
        "13.39 23.46 36.07 45.15 56.01 66.96 75.94",
        "3.068",
    ),
    "CIFAR batch": (
        CIFAR | {"exits": 5, "base": 1, "step": 1, "step_mode": "growing"},
        "6.86 14.35 27.54 41.71 58.48",
        "5.96 12.75 24.72 40.50 58.48",
        "2.079",
    ),
    "CIFAR 10 exits": (
        CIFAR | {"exits": 10},
        "15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.04 110.12 121.68",
        None,
        "4.956",
    ),
    "CIFAR growth 16": (
        CIFAR | {"growth": 16},
        "56.43 101.00 155.31 198.10 249.53 298.05 340.64",
        None,
        "0.90 1.84 2.80 3.76 4.92 6.10 7.36",
    ),
    "CIFAR of the distillation paper": (
        CIFAR | AUTHORS,
        "15.57 31.23 51.95 65.99 83.28 103.80 132.95 150.23 170.76 194.53 211.57",
        None,
        "5.068",
    ),
}


def millions(numbers: list[int]) -> str:
    return " ".join(f"{number / 1e6:.2f}" for number in numbers)


@pytest.mark.parametrize("name", TABLE)
def test_costs_of_published_configurations(name: str) -> None:
    arguments, published, lazy_ops, params = TABLE[name]
    network = MSDNet(**arguments)
    size = arguments.get("stem", 32)
    costs = exit_costs(network, size, "msdnet_pytorch")
    lazy = exit_costs(network, size, "msdnet_pytorch", lazy=True)
    assert millions([cost.macs for cost in costs]) == published
    if lazy_ops:
        assert millions([cost.macs for cost in lazy]) == lazy_ops
    assert lazy[-1] == costs[-1]
    assert all(early.macs < cost.macs for early, cost in zip(lazy[:2], costs))
    assert costs[-1].params == sum(parameter.numel() for parameter in network.parameters())
    if len(params.split()) == 1:
        assert f"{costs[-1].params / 1e6:.3f}" == params
    else:
        assert millions([cost.params for cost in costs]).startswith(params)


@pytest.mark.parametrize(("file", "name"), [("", "step 4"), ("_step6", "step 6"), ("_step7", "step 7")])
def test_the_configurations_for_imagenet_are_the_published_networks(file: str, name: str) -> None:
    network = build_model(load_config(ROOT / f"configs/imagenet_msdnet{file}.yaml").model, 1000, 224)
    assert millions([cost.macs for cost in exit_costs(network, 224, "msdnet_pytorch")]) == TABLE[f"ImageNet {name}"][1]


def test_pure_multiply_adds() -> None:
    network = MSDNet(**IMAGENET, base=4, step=4)
    assert millions([cost.macs for cost in exit_costs(network, 224)]) == "337.21 681.65 1003.66 1249.63 1355.61"


class Plain(MultiExitNetwork):
    """A network whose costs are known by hand, with two exits of different kinds."""

    num_exits, num_classes = 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.early, self.late = nn.Linear(4, 3), nn.Linear(8, 3, bias=False)

    def exit_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.iter_exit_logits(images))

    def iter_exit_logits(self, images: Tensor) -> Any:
        features = self.first(images).relu()
        yield self.early(nn.functional.max_pool2d(features, 8).flatten(1))
        tokens = self.grouped(features).flatten(2).transpose(1, 2)
        yield self.late(self.tokens(tokens).mean(1))


def test_costs_by_hand() -> None:
    network = Plain()
    first = 3 * 4 * 9 * 64 + 4 * 3
    grouped = 2 * 9 * 8 * 16
    attention = 16 * (3 * 8 * 8 + 8 * 8) + 2 * 16 * 16 * 8
    rest = grouped + attention + 16 * 2 * 8 * 16 + 8 * 3
    assert [cost.macs for cost in exit_costs(network, 8)] == [first, first + rest]
    assert [cost.macs for cost in exit_costs(network, 8, lazy=True)] == [first, first + rest]
    extra_first = 4 * 64 + 4 * 64 + 3  # relu, max pooling, bias
    assert exit_costs(network, 8, "msdnet_pytorch")[0].macs == first + extra_first
    all_params = sum(parameter.numel() for parameter in network.parameters())
    assert [cost.params for cost in exit_costs(network, 8)] == [3 * 4 * 9 + 4 + 4 * 3 + 3, all_params]


def test_counting_leaves_no_trace() -> None:
    network = MSDNet(10, exits=2).train()
    network.heads[0].eval()
    modes = {name: module.training for name, module in network.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for lazy in (False, True):
        first = exit_costs(network, 32, lazy=lazy)
        assert exit_costs(network, 32, lazy=lazy) == first
    assert {name: module.training for name, module in network.named_modules()} == modes
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0, msg=name)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_cost_is_a_value() -> None:
    assert ExitCost(1, 2) == ExitCost(1, 2)


def test_counting_does_not_import_the_compiler():
    """It takes seconds, at the start of every command that says what an exit costs."""
    code = (
        "import sys; from dist_train import MSDNet; from dist_train.models.cost import exit_costs;"
        "exit_costs(MSDNet(10, exits=2), 32, lazy=True); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
