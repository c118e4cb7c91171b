"""A network cut at its exits: the stages one after the other are the network, compute nothing early, and can lose rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dist_train.errors import ConfigError
from dist_train.models import MSDNet, MultiExitNetwork, attach_exits, build_model
from dist_train.models.cost import exit_costs
from dist_train.models.stages import StagedNetwork, static_networks
from dist_train.prediction import Thresholds, predict
from tests.common import network_config
from tests.dist_train.models.test_exits import Ladder, VisionTransformer, ladder, resnet, transformer

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}


def msdnet(dialect: str, **fields: object) -> MSDNet:
    usual = {"exits": 3, "scales": 3, "growth": 4, "initial_channels": 4, "base": 2, "step": 2, "head_width": 8}
    return MSDNet(5, dialect=dialect, **(usual | fields))


def library_transformer() -> MultiExitNetwork:
    exits = {"exits": ["vit.layers.0", "vit.layers.1"], "pooling": "class_token"}
    return build_model(network_config(name="transformers/ViTConfig", options=VIT, **exits), 5, 32)


class Views(Ladder):
    """Views of features and of a weight, which are impossible where the channels come last."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.blocks[0](images))
        second = self.blocks[1](first).view(images.shape[0], -1, 4)
        kernel = self.blocks[2].weight
        scale = kernel.view(8, 8 * 9).std(1).view(8, 1, 1)
        third = self.blocks[2](second.view(images.shape[0], 8, 32, 32)) / scale
        return self.end(third.mean((2, 3)))


NETWORKS = {
    **{dialect: lambda dialect=dialect: msdnet(dialect) for dialect in ("lua", "msdnet_pytorch")},
    "multiexit_distillation": lambda: msdnet("multiexit_distillation", prune="min", base=4),
    "no pruning": lambda: msdnet("lua", prune="none", reduction=0.0, bottleneck_factors=None),
    "resnet": resnet,
    "torch's transformer": transformer,
    "class token": lambda: transformer("class_token"),
    "transformers' ViT": library_transformer,
    "ladder": ladder,
    "views": lambda: attach_exits(Views(), ["blocks.0"], 5, image_size=32),
}


@pytest.fixture(scope="module", params=NETWORKS)
def both(request: pytest.FixtureRequest) -> tuple[MultiExitNetwork, StagedNetwork]:
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # folding must see other numbers than 0 and 1
            for values in (module.weight, module.running_var):
                nn.init.uniform_(values, 0.5, 2)
            for values in (module.bias, module.running_mean):
                nn.init.normal_(values)
    network.eval()
    return network, network.staged(32)


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 7])
def test_the_stages_one_after_the_other_are_the_network(
    both: tuple[MultiExitNetwork, StagedNetwork], images: int
) -> None:
    network, staged = both
    given = torch.randn(images, 3, 32, 32)
    handed_on = (given,)
    whole = network(given)
    assert len(staged.stages) == network.num_exits
    for stage, expected in zip(staged.stages, whole, strict=True):
        logits, *handed_on = stage(*handed_on)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert all(len(tensor) == images for tensor in handed_on)
        assert len(handed_on) <= 3  # one per scale, or the features and what a skip keeps
    assert handed_on == []
    weights = staged.state_dict(keep_vars=True)
    assert not any(isinstance(value, nn.Parameter) for value in weights.values())
    assert not any("running" in name for name in weights)  # batch norms are folded


def test_a_stage_computes_what_its_exit_adds_and_no_more(both: tuple[MultiExitNetwork, StagedNetwork]) -> None:
    network, staged = both
    lazy = [cost.macs for cost in exit_costs(network, 32, lazy=True)]
    staged.register_parameter("anywhere", nn.Parameter(torch.zeros(())))  # the counter asks a parameter for the device
    counted = [cost.macs for cost in exit_costs(staged, 32, lazy=True)]
    del staged.anywhere
    assert counted == lazy
    assert len(set(lazy)) == len(lazy)


def test_images_that_exit_leave_and_the_others_keep_their_logits(both: tuple[MultiExitNetwork, StagedNetwork]) -> None:
    network, staged = both
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        logits = network(images)[0]
    temperature = float(logits.abs().max())  # or else many confidences would be 1
    first = (logits / temperature).softmax(1).amax(1).sort().values
    between = float(first[7] + first[8]) / 2  # at a confidence itself rounding would decide
    others = network.num_exits - 2
    policy = Thresholds([between, *[0.5] * others], temperatures=[temperature, *[1.0] * (others + 1)])
    expected, got = predict(network, images, policy), predict(staged, images, policy)
    assert got.exits.tolist() == expected.exits.tolist()
    assert (got.exits == 0).sum() == 8
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-4 * float(expected.logits.abs().max()))


def test_the_network_stays_as_it_was() -> None:
    network = resnet().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    staged = network.staged(32)
    assert network.training
    assert not staged.training
    with torch.no_grad():
        for values in staged.state_dict().values():
            values.add_(1)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda: msdnet("lua"), ladder], ids=["lua", "ladder"])
def test_a_network_cut_off_behind_an_exit_has_its_logits_and_no_other_head(
    build: Callable[[], MultiExitNetwork],
) -> None:
    network = build().eval()
    images = torch.randn(5, 3, 32, 32)
    heads = [name for name, _ in network.heads.named_parameters()]
    for number, (cut, expected) in enumerate(zip(static_networks(network, 32), network(images), strict=True)):
        (logits,) = cut(images)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        others = {name.replace(".", "_") for name in heads if not name.startswith(f"{number}.")}
        assert not [name for name, _ in cut.named_buffers() if name.partition("heads_")[2] in others]


class FixedBatch(VisionTransformer):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + torch.zeros(len(images), 17, 16)


class BranchOnValue(Ladder):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images if images.mean() > 0 else -images)


class AcrossImages(Ladder):
    """The first exit leaves something that all images of a batch share."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shared = images.mean(0).sum()
        return super().forward(images + shared) + shared


@pytest.mark.parametrize(
    ("backbone", "at", "reason"),
    [
        (FixedBatch, "encoder.layers.0", "number of images for a fixed one; use images.shape[0]"),
        (BranchOnValue, "blocks.0", "torch.export cannot trace it"),
        (AcrossImages, "blocks.0", "has no row per image"),
    ],
)
def test_what_cannot_be_cut_says_why_in_a_line(backbone: type[nn.Module], at: str, reason: str) -> None:
    network = attach_exits(backbone(), [at], 5, image_size=32).eval()
    with pytest.raises(ConfigError) as refused:
        network.staged(32)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
