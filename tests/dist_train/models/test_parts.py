"""Which parts a network has, starting from weights of some of them, and fields of the regimes that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_train.config_file import make_config
from dist_train.errors import CheckpointError, ConfigError
from dist_train.models import MSDNet, ResNet, attach_exits, build_model, load_pretrained
from dist_train.models.parts import EARLY_EXITS, LAST_EXIT, exit_parts
from dist_train.models.weights import load_backbone
from tests.common import network_config

RESNET = {"name": "resnet", "exits": ["stages.0"], "blocks": [1, 1], "width": 4}


def test_parts_of_exits() -> None:
    def parts(classes: int) -> dict[str, str]:
        network = ResNet(classes, blocks=(1, 1), width=8)
        return exit_parts(attach_exits(network, ["stages.0"], 5, image_size=16))

    assert parts(5) == {"heads.0": EARLY_EXITS, "network.head.2": LAST_EXIT}
    assert parts(9) == {"heads.0": EARLY_EXITS, "heads.1": LAST_EXIT}
    assert exit_parts(MSDNet(5, exits=2)) == {"heads.0": EARLY_EXITS, "heads.1": LAST_EXIT}


class EndsWithANorm(nn.Module):
    """Defined in another order than it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.norm = nn.Conv2d(3, 5, 3), nn.Linear(5, 5), nn.BatchNorm2d(5)

    def forward(self, images: torch.Tensor) -> Any:
        return self.fc(self.norm(self.stem(images)).mean((2, 3)))


def test_a_norm_with_a_channel_per_class_is_no_classifier() -> None:
    network = attach_exits(EndsWithANorm(), ["stem"], 5, image_size=16)
    assert exit_parts(network) == {"heads.0": EARLY_EXITS, "network.fc": LAST_EXIT}


class Distilled(nn.Module):
    """Two classifiers, as DeiT, LeViT and SwiftFormer have them: their mean, or both in training mode."""

    def __init__(self, classes: int, mean: bool = True) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.head, self.head_dist = nn.Linear(6, classes), nn.Linear(6, classes)
        self.mean = mean

    def forward(self, images: torch.Tensor) -> Any:
        features = self.norm(self.block(self.stem(images)).mean((2, 3)))
        both = self.head(features), self.head_dist(features)
        return both if self.training and not self.mean else (both[0] + both[1]) / 2


def test_two_classifiers_are_one_last_exit_and_start_from_weights_of_other_classes() -> None:
    network = attach_exits(Distilled(5), ["stem"], 5, image_size=16)
    last = {"network.head": LAST_EXIT, "network.head_dist": LAST_EXIT}
    assert exit_parts(network) == {"heads.0": EARLY_EXITS, **last}
    other = Distilled(9).state_dict()
    load_backbone(network, other, "weights")
    assert network.state_dict()["network.stem.weight"].equal(other["stem.weight"])
    # A backbone of as many channels as classes is none of them.
    assert exit_parts(attach_exits(Distilled(6), ["stem"], 6, image_size=16)).keys() == {"heads.0", *last}


def test_a_layer_before_the_classifier_is_none() -> None:
    layers = [nn.Flatten(), nn.Linear(3 * 4 * 4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)]
    network = attach_exits(nn.Sequential(*layers), ["1"], 5, image_size=4)
    assert exit_parts(network) == {"heads.0": EARLY_EXITS, "network.5": LAST_EXIT}


def test_several_logits_are_refused_and_not_the_first_taken_for_all() -> None:
    network = attach_exits(Distilled(5, mean=False), ["stem"], 5, image_size=16)
    with pytest.raises(ConfigError, match=r"gives 2 tensors of 5 logits per image.* in training mode as well"):
        network.train()(torch.zeros(2, 3, 16, 16))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def started(weights: dict[str, torch.Tensor], **changes: Any) -> Any:
        save_file(weights, tmp_path / "w.safetensors")
        config = network_config(**{**RESNET, "pretrained": tmp_path / "w.safetensors", **changes})
        model = build_model(config, 5, 16)
        load_pretrained(model, config)
        return model

    other_classes = ResNet(9, blocks=(1, 1), width=4).state_dict()
    model = started(other_classes)
    assert model.network.stem[0].weight.equal(other_classes["stem.0.weight"])
    whole = build_model(network_config(**RESNET), 5, 16).state_dict()
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
        ({"first_epochs": 2}, "regime is joint and first_epochs is 2"),
        ({"heads_epochs": 2}, "is now called 'model.first_epochs'"),
        ({"regime": "heads_only"}, "pretrained is not set"),
        ({"regime": "heads_first", "first_epochs": 2}, "pretrained is not set"),
        ({"regime": "disjoint", "first_epochs": 300}, "model.first_epochs is 300, but train.epochs is"),
        ({"pretrained": True}, "pretrained is true, which needs a network of a library"),
        ({"options": {"depth": 3}}, "model.options is a setting of library, function alone"),
    ],
)
def test_fields_that_do_not_fit_together(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config({"data": {"shards": "s"}, "model": {**RESNET, **fields}})
