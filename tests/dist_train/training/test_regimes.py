"""Regimes of training: what is frozen stays bit for bit, through ZeRO, a resume and a start from weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_train.config import Config
from dist_train.config_file import make_config
from dist_train.models import ResNet, build_model
from dist_train.models.parts import BACKBONE, EARLY_EXITS, exit_parts, part_of
from tests.common import SMALL_MODEL, network_config, train_all

RESNET = {"name": "resnet", "exits": ["stages.0"], "blocks": [1, 1], "width": 4}


def settings(digits: Path, runs: Path, name: str, model: dict[str, Any], zero: int = 0, **train: Any) -> Config:
    fields = {
        "name": name,
        "runs": str(runs),
        "data": {"shards": str(digits), "flip": False, "image_size": 16},
        "model": model,
        "optim": {"lr": 0.05, "ema_decay": 0.9, "weight_decay": 0.01},
        "train": {
            "global_batch": 256,
            "micro_batch": 64,
            "zero_stage": zero,
            "precision": "fp32",
            "epochs": 2,
            **train,
        },
        "checkpoint": {"every_epochs": 1, "keep": 10},
        "tracking": {"log_every": 5, "uri": "off"},
    }
    return make_config(fields)


def weights(config: Config, step: int) -> dict[str, torch.Tensor]:
    return load_file(config.folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Weights of a network without exits."""
    torch.manual_seed(5)
    network = ResNet(10, blocks=(1, 1), width=4)
    network(torch.randn(64, 3, 16, 16))
    backbone = {key: value for key, value in network.state_dict().items() if not key.startswith("head.")}
    save_file(backbone, tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


def test_exits_train_first_on_a_pretrained_network_and_go_on_bit_for_bit(
    ranks: Any, digits: Path, tmp_path: Path, start: Path
) -> None:
    model = {**RESNET, "pretrained": str(start), "regime": "heads_first", "first_epochs": 1}
    cases = [(zero, "sgd") for zero in (0, 2, 3)] + [(0, "adamw"), (2, "adamw")]

    def configs(name: str, **train: Any) -> list[Config]:
        made = [
            (settings(digits, tmp_path, f"{name}-{zero}-{optimizer}", model, zero, **train), optimizer)
            for zero, optimizer in cases
        ]
        return [c.model_copy(update={"optim": c.optim.model_copy(update={"name": o, "lr": 0.01})}) for c, o in made]

    cuts = [config for steps in (3, 7, None) for config in configs("cut", max_steps=steps)]
    whole = build_model(network_config(**SMALL_MODEL), 10, 16).state_dict()
    save_file(whole, tmp_path / "whole.safetensors")
    msdnet = {**SMALL_MODEL, "pretrained": str(tmp_path / "whole.safetensors"), "regime": "heads_only"}
    alone = settings(digits, tmp_path, "alone", msdnet, zero=1)
    ranks(train_all, 2, [alone, *configs("whole"), *cuts])  # cut while the exits train alone, and after it
    for key, value in weights(alone, 5).items():
        assert weights(alone, 10)[key].equal(value) != key.startswith("heads."), key
    backbone = load_file(start)
    exits = exit_parts(build_model(network_config(**RESNET), 10, 16))
    for config, cut in zip(configs("whole"), configs("cut")):
        frozen, trained = weights(config, 5), weights(config, 10)
        for key, value in backbone.items():
            assert frozen[f"network.{key}"].equal(value), key
        assert not [key for key in trained if trained[key].equal(frozen[key])]
        first, again = weights(cut, 3), weights(cut, 10)
        assert all(first[key].equal(frozen[key]) == (part_of(key, exits) == BACKBONE) for key in frozen)
        assert all(trained[key].equal(again[key]) for key in trained)
    ends = {case: weights(config, 10) for case, config in zip(cases, configs("whole"))}
    for (_, optimizer), end in ends.items():
        # Adam divides by the root of gradients near zero: there the order of a sum shows.
        atol = 1e-5 if optimizer == "sgd" else 1e-4
        for key, value in end.items():
            torch.testing.assert_close(value, ends[0, optimizer][key], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("model", [RESNET, SMALL_MODEL], ids=["attached", "msdnet"])
def test_the_network_trains_first_by_its_last_exit_and_then_the_others_on_it_or_everything(
    ranks: Any, digits: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    """disjoint and mixed are one run in their first stage; disjoint keeps its network to the bit; both resume like any run."""
    cases = [("disjoint", 0, "sgd"), ("disjoint", 1, "adamw"), ("disjoint", 3, "sgd"), ("mixed", 0, "sgd")]

    def configs(name: str, **train: Any) -> list[Config]:
        made = []
        for regime, zero, optimizer in cases:
            fields = {**model, "regime": regime, "first_epochs": 1}
            config = settings(digits, tmp_path, f"{name}-{regime}-{zero}-{optimizer}", fields, zero, **train)
            optim = config.optim.model_copy(update={"name": optimizer, "lr": 0.01})
            made.append(config.model_copy(update={"optim": optim}))
        return made

    cuts = [config for steps in (3, 6, None) for config in configs("cut", max_steps=steps)]
    ranks(train_all, 2, [*configs("whole"), *cuts])
    parts = exit_parts(build_model(network_config(**model), 10, 16))
    for (regime, *_), config, cut in zip(cases, configs("whole"), configs("cut")):
        first, begun, end = weights(cut, 3), weights(config, 5), weights(config, 10)
        for key in end:
            part = part_of(key, parts)
            assert first[key].equal(begun[key]) == (part == EARLY_EXITS), key
            assert begun[key].equal(end[key]) == (regime == "disjoint" and part != EARLY_EXITS), key
            assert weights(cut, 10)[key].equal(end[key]), key
    # The first update of a part: AdamW's step is then at most the learning rate.
    before, after = (weights(configs("cut")[1], step) for step in (5, 6))
    trained = [key for key in before if part_of(key, parts) == EARLY_EXITS and before[key].is_floating_point()]
    moved = [float((after[key] - before[key]).abs().max()) for key in trained if "running" not in key]
    assert moved
    assert max(moved) == pytest.approx(0.01, rel=0.02)
    same = [weights(config, 5) for config in configs("whole")]
    assert all(same[0][key].equal(same[3][key]) for key in same[0])
