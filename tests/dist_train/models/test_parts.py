"""Exits alone, then everything: what is frozen stays bit for bit, through ZeRO, a resume and a start from weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_train.config import Config, ModelConfig
from dist_train.config_file import make_config
from dist_train.errors import CheckpointError, ConfigError
from dist_train.models import MSDNet, ResNet, attach_exits, build_model, load_pretrained
from dist_train.models.parts import exit_parts, is_in

RESNET = {"name": "resnet", "exits": ["stages.0"], "blocks": [1, 1], "width": 4}

MSDNET = {"exits": 2, "base": 1, "step": 1, "scales": 2, "growth": 2, "initial_channels": 4, "head_width": 8,
          "growth_factors": [1, 2], "bottleneck_factors": [1, 2], "regime": "heads_only"}  # fmt: skip


def settings(digits: Path, runs: Path, name: str, model: dict[str, Any], zero: int = 0, **train: Any) -> Config:
    fields = {
        "name": name, "runs": str(runs), "data": {"shards": str(digits), "flip": False, "image_size": 16}, "model": model,
        "optim": {"lr": 0.05, "ema": 0.9, "weight_decay": 0.01},
        "train": {"global_batch": 256, "micro_batch": 64, "zero": zero, "precision": "fp32", "epochs": 2, **train},
        "checkpoint": {"every_epochs": 1, "keep": 10}, "tracking": {"log_every": 5, "uri": "off"},
    }  # fmt: skip
    return make_config(fields)


def train_all(configs: list[Config]) -> list[int]:
    from dist_train import train

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    return [train(config).position.step for config in configs]


def weights(config: Config, step: int) -> dict[str, torch.Tensor]:
    return load_file(config.folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def test_mixed_trains_the_exits_first_and_goes_on_bit_for_bit(ranks: Any, digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    start = ResNet(10, blocks=(1, 1), width=4)
    start(torch.randn(64, 3, 16, 16))
    backbone = {key: value for key, value in start.state_dict().items() if not key.startswith("head.")}
    save_file(backbone, tmp_path / "start.safetensors")
    model = {**RESNET, "pretrained": str(tmp_path / "start.safetensors"), "regime": "mixed", "heads_epochs": 1}
    cases = [(zero, "sgd") for zero in (0, 2, 3)] + [(0, "adamw"), (2, "adamw")]

    def configs(name: str, **train: Any) -> list[Config]:
        made = [
            (settings(digits, tmp_path, f"{name}-{zero}-{optimizer}", model, zero, **train), optimizer)
            for zero, optimizer in cases
        ]
        return [c.model_copy(update={"optim": c.optim.model_copy(update={"name": o, "lr": 0.01})}) for c, o in made]

    cuts = [config for steps in (3, 7, None) for config in configs("cut", max_steps=steps)]
    alone = settings(digits, tmp_path, "alone", MSDNET, zero=1)
    ranks(train_all, 2, [alone, *configs("whole"), *cuts])  # cut while the exits train alone, and after it
    for key, value in weights(alone, 5).items():
        assert weights(alone, 10)[key].equal(value) != key.startswith("heads."), key
    exits = ("heads", "network.head.2")
    for config, cut in zip(configs("whole"), configs("cut")):
        frozen, trained = weights(config, 5), weights(config, 10)
        for key, value in backbone.items():
            assert frozen[f"network.{key}"].equal(value), key
        assert not [key for key in trained if trained[key].equal(frozen[key])]
        first, again = weights(cut, 3), weights(cut, 10)
        assert all(first[key].equal(frozen[key]) != is_in(key, exits) for key in frozen)
        assert all(trained[key].equal(again[key]) for key in trained)
    ends = {case: weights(config, 10) for case, config in zip(cases, configs("whole"))}
    for (_, optimizer), end in ends.items():
        for key, value in end.items():
            torch.testing.assert_close(value, ends[0, optimizer][key], rtol=1e-4, atol=1e-5)


def test_parts_of_exits() -> None:
    assert exit_parts(attach_exits(ResNet(5, blocks=(1, 1), width=8), ["stages.0"], 5, image_size=16)) == (
        "heads",
        "network.head.2",
    )
    assert exit_parts(attach_exits(ResNet(9, blocks=(1, 1), width=8), ["stages.0"], 5, image_size=16)) == ("heads",)
    assert exit_parts(MSDNet(5, exits=2)) == ("heads",)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def started(weights: dict[str, torch.Tensor], **changes: Any) -> Any:
        save_file(weights, tmp_path / "w.safetensors")
        config = ModelConfig(**{**RESNET, "pretrained": tmp_path / "w.safetensors", **changes})
        model = build_model(config, 5, 16)
        load_pretrained(model, config)
        return model

    other_classes = ResNet(9, blocks=(1, 1), width=4).state_dict()
    model = started(other_classes)
    assert model.network.stem[0].weight.equal(other_classes["stem.0.weight"])
    whole = build_model(ModelConfig(**RESNET), 5, 16).state_dict()
    assert started(whole).heads[0][-1].weight.equal(whole["heads.0.2.weight"])
    fewer = {key: value for key, value in other_classes.items() if key != "stem.0.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing \(stem\.0\.weight\)"):
        started(fewer)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(more\)"):
        started(other_classes | {"more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"misshapen \(stem\.0\.weight \[4, 3, 3, 3\] instead of \[8, 3, 3, 3\]"):
        started(other_classes, width=8)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regime": "mixed"}, "mixed needs 1 or more"),
        ({"heads_epochs": 2}, "regime is joint and heads_epochs is 2"),
        ({"pretrained": True}, "pretrained is true, which needs a network of a library"),
        ({"options": {"depth": 3}}, "options are for networks of a library"),
    ],
)
def test_fields_that_do_not_fit_together(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config({"data": {"shards": "s"}, "model": {**RESNET, **fields}})
