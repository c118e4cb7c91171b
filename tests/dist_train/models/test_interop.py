"""Weights of the two public repositories: the logits, costs and sizes that they have there."""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train.errors import CheckpointError, ConfigError
from dist_train.models import MSDNet
from dist_train.models.cost import exit_costs
from dist_train.models.interop import load_msdnet_pytorch, load_multiexit_distillation

TEST_DATA = os.environ.get("DIST_TRAIN_TEST_DATA")
needs_parity = pytest.mark.skipif(
    not TEST_DATA, reason="set DIST_TRAIN_TEST_DATA to the folder with parity/msdnet_pytorch.json"
)

CF_NET: dict[str, Any] = {
    "call": "MsdNet",
    "in_shape": 32,
    "out_dim": 7,
    "n_scales": 3,
    "n_exits": 3,
    "nlayers_to_exit": 3,
    "nlayers_between_exits": 3,
    "nplanes_mulv": [2, 4, 4],
    "nplanes_addh": 1,
    "nplanes_init": 2,
    "prune": "max",
    "plane_reduction": 0.5,
    "exit_width": 8,
    "btneck_widths": [4, 4, 4],
}


def weight_by_rule(key: str, shape: list[int]) -> Tensor:
    """The rule that the weights of the parity file follow."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    if key.endswith("running_var"):
        value = 0.5 + random.rand(*shape)
    elif key.endswith("running_mean"):
        value = 0.1 * random.randn(*shape)
    elif len(shape) == 1:
        value = float(key.endswith("weight")) + 0.1 * random.randn(*shape)
    else:
        value = random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, np.float32))


def parity(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    case = json.loads((Path(TEST_DATA or "") / "parity" / "msdnet_pytorch.json").read_text())[name]
    return case, {key: weight_by_rule(key, shape) for key, shape in case["keys"].items()}


@needs_parity
@pytest.mark.parametrize("name", ["small_cifar_even", "cifar100_anytime7"])
def test_msdnet_pytorch_parity(name: str) -> None:
    case, weights = parity(name)
    network = load_msdnet_pytorch(case["args"], {f"module.{key}": value for key, value in weights.items()}).eval()
    images = torch.from_numpy(np.random.RandomState(7).randn(2, 3, 32, 32).astype(np.float32))
    with torch.no_grad():
        logits = network(images)
    for exit_, (head, std, total) in enumerate(
        zip(case["logits_head"], case["logits_std"], case["logits_sum"], strict=True)
    ):
        np.testing.assert_allclose(logits[exit_][0, :5].numpy(), head, atol=1e-4, rtol=0)
        assert logits[exit_].std().item() == pytest.approx(std, abs=1e-4)
        assert logits[exit_].sum().item() == pytest.approx(total, abs=1e-3)
    assert [cost.macs for cost in exit_costs(network, 32, "msdnet_pytorch")] == case["macs_peer_counter"]
    assert sum(parameter.numel() for parameter in network.parameters()) == case["params_total"]


def as_theirs(network: MSDNet, unit: str) -> dict[str, Tensor]:
    """The state dict under the names of multiexit_distillation, from the structure that those names describe."""
    renamed = {}
    for key, value in network.state_dict().items():
        key = re.sub(r"\.(conv|norm)\.(\w+)$", lambda m: f".{'01'[m[1] == 'norm']}.{m[2]}", key)
        key = re.sub(r"^stem\.0\.", f"blocks.0.0.mods.0.{unit}", key)
        key = re.sub(r"^stem\.(\d)", r"blocks.0.0.mods.\1", key)
        key = re.sub(r"^heads\.(\d)\.conv(\d)", lambda m: f"exits.{m[1]}.{int(m[2]) - 1}", key)
        key = re.sub(r"^heads\.(\d)\.linear", r"exits.\1.4", key)
        if match := re.match(r"blocks\.(\d)\.(\d)\.(\d)\.(down|normal)\.(.*)", key):
            block, stage, scale, path, rest = match.groups()
            stage_ = int(stage) + (block == "0")
            key = f"blocks.{block}.{stage_}.mods.{scale}.{'conv_down' if path == 'down' else 'conv'}.{rest}"
        elif (match := re.match(r"blocks\.(\d)\.(\d)\.(\d)\.(.*)", key)) and "mods" not in key:
            block, stage, scale, rest = match.groups()
            key = f"blocks.{block}.{int(stage) + (block == '0')}.conv.{scale}.{rest}"
        renamed[key] = value
    return renamed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prune": None, "plane_reduction": 0.0},
        {"btneck_widths": ()},
        {"in_shape": 224, "exit_width": None},
        {"prune": "min", "n_exits": 4, "nlayers_to_exit": 2, "nlayers_between_exits": 2},
    ],
)
def test_multiexit_distillation_weights_are_read_back(changes: dict[str, Any]) -> None:
    cf_net = CF_NET | changes
    torch.manual_seed(0)
    network = MSDNet(
        7,
        exits=cf_net["n_exits"],
        growth=1,
        growth_factors=(2, 4, 4),
        initial_channels=2,
        bottleneck_factors=cf_net["btneck_widths"] or None,
        base=cf_net["nlayers_to_exit"],
        step=cf_net["nlayers_between_exits"],
        prune=cf_net["prune"] or "none",
        reduction=cf_net["plane_reduction"],
        head_width=cf_net["exit_width"],
        stem=cf_net["in_shape"],
        dialect="multiexit_distillation",
    ).eval()
    weights = as_theirs(network, "0." if cf_net["in_shape"] == 224 else "")
    loaded = load_multiexit_distillation(cf_net, weights).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for expected, logits in zip(network(images), loaded(images), strict=True):
            torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_names_of_multiexit_distillation() -> None:
    """A few of the names that the repository's own module tree gives, from its constructors."""
    network = load_multiexit_distillation(CF_NET, as_theirs(load_template(), ""))
    keys = as_theirs(network, "")
    assert keys["blocks.0.0.mods.0.0.weight"].shape == (4, 3, 3, 3)
    assert keys["blocks.0.1.mods.0.conv.0.0.weight"].shape == (4, 4, 1, 1)
    assert keys["blocks.0.1.mods.1.conv_down.1.0.weight"].shape == (2, 4, 3, 3)
    assert keys["blocks.0.4.mods.1.conv.1.1.running_var"].shape == (2,)
    assert keys["blocks.1.0.conv.1.0.weight"].shape == (12, 24, 1, 1)
    assert keys["blocks.1.1.mods.1.conv.1.1.running_var"].shape == (4,)
    assert keys["exits.2.4.bias"].shape == (7,)


def load_template() -> MSDNet:
    return MSDNet(
        7,
        exits=3,
        growth=1,
        growth_factors=(2, 4, 4),
        initial_channels=2,
        bottleneck_factors=(4, 4, 4),
        base=3,
        step=3,
        head_width=8,
        dialect="multiexit_distillation",
    )


@needs_parity
def test_weights_that_do_not_fit() -> None:
    case, weights = parity("small_cifar_even")
    args = case["args"]

    def fault(changes: dict[str, Any], weights: dict[str, Any]) -> str:
        with pytest.raises((CheckpointError, ConfigError)) as error:
            load_msdnet_pytorch(args | changes, weights)
        assert "\n" not in str(error.value)
        return str(error.value)

    fewer = {key: value for key, value in weights.items() if key != "classifier.1.linear.bias"}
    assert "1 missing (classifier.1.linear.bias)" in fault({}, fewer)
    assert "1 unexpected (classifier.9.linear.bias)" in fault(
        {}, weights | {"classifier.9.linear.bias": torch.zeros(10)}
    )
    said = fault({"data": "cifar100"}, weights)
    assert "3 exits and 10 classes" in said
    assert "6 misshapen (classifier.0.linear.bias [10] instead of [100]" in said
    assert "weights have 3 exits" in fault({"nBlocks": 4}, weights)
    assert "epoch is a int, not a tensor" in fault({}, {"epoch": 3})
    assert "data is 'mnist'; it can be cifar10, cifar100, ImageNet" in fault({"data": "mnist"}, weights)
    with pytest.raises(ConfigError, match="no nBlocks"):
        load_msdnet_pytorch({key: value for key, value in args.items() if key != "nBlocks"}, weights)


@needs_parity
def test_factors_may_be_text() -> None:
    case, weights = parity("small_cifar_even")
    assert load_msdnet_pytorch(case["args"] | {"grFactor": "1-2-4", "bnFactor": "1-2-4"}, weights).num_exits == 3
