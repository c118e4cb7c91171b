"""Exits attached to networks that know nothing of them: equal logits, stopping, dropped rows, training, bad input."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_train.errors import ConfigError
from dist_train.models import ResNet, attach_exits, build_model
from dist_train.models.cost import exit_costs
from tests.common import network_config


class VisionTransformer(nn.Module):
    """torch's encoder over patches, with a class token; gives all tokens."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], 1)
        return self.encoder(tokens + self.positions)


class Ladder(nn.Module):
    """Shared and listed submodules, a skip over an exit, a tuple and a named output: all that a chain does not have."""

    split: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3 if not i else 8, 8, 3, padding=1) for i in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.split = Split()
        self.end = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Any:
        first = self.relu(self.blocks[0](images))
        second = self.relu(self.blocks[1](first))
        both, _ = self.split(second)
        third = self.relu(self.blocks[2](both + first))
        return {"logits": self.end(third.mean((2, 3)))}["logits"]


class Split(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features * 2, features


class Both(NamedTuple):
    both: Tensor
    features: Tensor


class NamedSplit(nn.Module):
    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, features: Tensor) -> Any:
        return self.kind(features * 2, features)


class NamedOutputs(Ladder):
    """Its submodule ``split`` gives a named tuple, a dictionary, or one of transformers' outputs, which is both."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind, self.split = kind, NamedSplit(kind)

    def forward(self, images: Tensor) -> Tensor:
        first = self.relu(self.blocks[0](images))
        found = self.split(self.relu(self.blocks[1](first)))
        both = found[0] if self.kind is Both else found["both"]
        if hasattr(found, "both"):
            assert found.both is both
        logits: Tensor = self.end((self.relu(self.blocks[2](both + first)) + both).mean((2, 3)))
        return logits


def named_outputs() -> dict[str, Callable[..., Any]]:
    from transformers.utils import ModelOutput

    @dataclass
    class Output(ModelOutput):
        both: Tensor | None = None
        features: Tensor | None = None

    return {"named tuple": Both, "dictionary": lambda *both: dict(zip(Both._fields, both)), "of a library": Output}


class InPlace(nn.Module):
    """Adds to a submodule's output in place, outside of any submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        features += 1
        return (self.second(features) + features).mean((2, 3))


def resnet() -> nn.Module:
    return attach_exits(ResNet(5, blocks=(1, 2, 1), width=8), ["stages.0", "stages.1.0", "stages.1"], 5, image_size=32)


def transformer(head: Any = "mean") -> nn.Module:
    return attach_exits(VisionTransformer(), ["encoder.layers.0", "encoder.layers.1"], 5, head=head, image_size=32)


def ladder() -> nn.Module:
    return attach_exits(Ladder(), ["blocks.0", "split"], 5, image_size=32)


NETWORKS = {
    "resnet": resnet,
    "mean of tokens": transformer,
    "class token": lambda: transformer("class_token"),
    "ladder": ladder,
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    with torch.no_grad():
        network(torch.randn(16, 3, 32, 32))  # moves running statistics away from their start
    return network.eval()


@torch.no_grad()
def test_iter_exits_gives_what_forward_gives(network: nn.Module) -> None:
    images = torch.randn(3, 3, 32, 32)
    whole, single = network(images), list(network.iter_exits(images))
    assert len(whole) == network.num_exits == len(network._at) + 1
    for expected, logits in zip(whole, single, strict=True):
        assert logits.shape == (3, network.num_classes)
        torch.testing.assert_close(logits, expected)
    assert len({tuple(logits.flatten().tolist()) for logits in whole}) == network.num_exits


@torch.no_grad()
def test_nothing_runs_after_an_exit_and_nothing_computes_twice(network: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    run: list[str] = []
    names = {id(module): name for name, module in network.named_modules()}
    for module in network.modules():
        module.register_forward_hook(lambda module, *_: run.append(names[id(module)]))
    network(images)
    order = list(run)
    iteration = network.iter_exits(images)
    for number, name in enumerate((*network._at, "")):
        run.clear()
        next(iteration)
        done = f"network.{name}" if name else order[-1]
        allowed = set(order[: order.index(done) + 1]) | {n for n in order if n.startswith(f"heads.{number}")}
        assert set(run) - {""} <= allowed
    assert exit_costs(network, 32) == exit_costs(network, 32, lazy=True)


@torch.no_grad()
def test_rows_can_leave_between_exits(network: nn.Module) -> None:
    images = torch.randn(6, 3, 32, 32)
    whole = network(images)
    iteration = network.iter_exits(images)
    torch.testing.assert_close(next(iteration), whole[0])
    torch.testing.assert_close(iteration.send(torch.tensor([0, 3, 5])), whole[1][[0, 3, 5]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(iteration.send(torch.tensor([2])), whole[2][[5]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_passes_do_not_disturb_each_other(network: nn.Module) -> None:
    a, b = torch.randn(2, 3, 32, 32), torch.randn(4, 3, 32, 32)
    expected_a, expected_b = network(a), network(b)
    first, second = network.iter_exits(a), network.iter_exits(b)
    next(first)
    for expected, logits in zip(expected_b, network(b)):
        torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(next(second), expected_b[0])
    torch.testing.assert_close(next(first), expected_a[1])
    torch.testing.assert_close(next(second), expected_b[1])
    first.close()
    assert all("forward" not in vars(module) for module in network.network.modules())
    assert network.network(a).shape[0] == 2


def test_threads_may_use_a_network_at_once() -> None:
    network, images = resnet().eval(), [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32)]
    expected = [network(batch) for batch in images]
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_: Any) -> None:
        barrier.wait()

    network.network.get_submodule("stages.0").register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(network, images))
    for right, logits in zip(expected, found):
        torch.testing.assert_close(logits, right)


def test_training_reaches_every_parameter_also_of_a_copy(network: nn.Module) -> None:
    for trained in (network.train(), copy.deepcopy(network)):
        trained.zero_grad()
        sum(logits.square().sum() for logits in trained(torch.randn(4, 3, 32, 32))).backward()
        assert all(parameter.grad is not None for parameter in trained.parameters())
        with torch.no_grad():
            trained.heads[0][-1].bias.add_(1)  # the copy's exits are its own
    restored = copy.deepcopy(network)
    restored.load_state_dict(network.state_dict())


def test_attaching_without_values() -> None:
    """Memory is planned on tensors that have a shape, but no values."""
    with FakeTensorMode():
        logits = resnet()(torch.empty(4, 3, 32, 32))
    assert [tuple(exit_logits.shape) for exit_logits in logits] == [(4, 5)] * 4
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in transformer().parameters())


def test_attaching_leaves_no_trace() -> None:
    backbone = ResNet(5, blocks=(1, 1), width=8)
    backbone.stages[0].eval()
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    attached = attach_exits(backbone, ["stages.0"], 5, image_size=32)
    assert attached.training
    assert attached.heads.training
    assert [stage.training for stage in backbone.stages] == [False, True]
    for name, buffer in backbone.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)


def test_an_end_without_the_classes_gets_a_head() -> None:
    attached = attach_exits(ResNet(9, blocks=(1, 1), width=8), ["stages.0"], 5, image_size=32)
    assert isinstance(attached.heads[-1], nn.Linear)
    assert isinstance(resnet().heads[-1], nn.Identity)
    assert [tuple(logits.shape) for logits in attached(torch.zeros(2, 3, 32, 32))] == [(2, 5), (2, 5)]


def test_own_heads() -> None:
    def head(shape: torch.Size) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(shape[1:].numel(), 5))

    attached = attach_exits(ResNet(5, blocks=(1, 1), width=8), ["stages.0"], 5, head=head, image_size=32)
    assert attached.heads[0][1].in_features == 8 * 32 * 32


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet_by_configuration(norm: str) -> None:
    config = network_config(name="resnet", exits=("stages.0", "stages.1"), norm=norm, width=8)
    network = build_model(config, 10, 32)
    assert network.num_exits == 3
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == (norm == "batch")
    assert any(isinstance(m, nn.GroupNorm) for m in network.modules()) == (norm == "group")
    with torch.no_grad():
        images = torch.randn(4, 3, 32, 32)
        alone, together = network(images[:1]), network(images)
        same = torch.allclose(alone[-1][0], together[-1][0], atol=1e-5)
    assert same == (norm == "group")  # in training mode, only group norm does not depend on the other images


def test_resnet_halves_the_image_and_doubles_the_channels() -> None:
    network = ResNet(5, blocks=(1, 2, 1), width=8)
    shapes = []
    for stage in network.stages:
        stage.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert shapes == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]


def test_compiled_is_the_same() -> None:
    plain = resnet()
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager", fullgraph=True)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for network in (plain, compiled):
        sum(logits.square().sum() for logits in network(images)).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_network_of_ones_own_by_configuration() -> None:
    config = network_config(name="dist_train.models.resnet:ResNet", exits=("stages.1",))
    assert build_model(config, 7, 32)(torch.zeros(2, 3, 32, 32))[1].shape == (2, 7)
    for name, said in (
        ("no_such_module:f", "cannot be found"),
        ("torch:no_such", "cannot be found"),
        (".mine:net", "cannot be found"),
        ("torch:float32", "cannot be called with the number of classes"),
        ("shards.sources:digits", "cannot be called with the number of classes"),
        ("numpy:sqrt", "cannot be called|a float"),
        ("os:_exit", "the standard library has no networks"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_model(network_config(name=name, exits=("a",)), 7, 32)


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (["stage.0"], "no submodule 'stage.0' for an exit; the nearest is 'stages.0'"),
        (["stages.1", "stages.0"], "exits are given as stages.1, stages.0, but run as stages.0, stages.1"),
        (["stages.0", "stages.0"], "'stages.0' is named twice"),
        ([], "no submodule is named"),
    ],
)
def test_bad_names(at: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        attach_exits(ResNet(5, blocks=(1, 1), width=8), at, 5, image_size=32)
    assert "\n" not in str(error.value)


class BadOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scalar, self.nothing, self.tokens_first = (
            Apply(lambda x: x.mean()),
            Apply(lambda x: None),
            Apply(lambda x: x[0, 0]),
        )
        self.twice, self.unused, self.end = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        self.scalar(images), self.nothing(images), self.tokens_first(images)
        return self.end(self.twice(self.twice(images)).mean((2, 3)))


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scalar", r"output of scalar has the shape \[\] for 2 images"),
        ("tokens_first", r"has the shape \[32, 32\] for 2 images"),
        ("nothing", "output of nothing is a NoneType"),
        ("twice", "'twice' runs 2 times"),
        ("unused", "'unused' runs 0 times"),
    ],
)
def test_outputs_that_cannot_be_classified(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach_exits(BadOutputs(), [name], 5, image_size=32)


def test_a_network_that_changes_tensors_in_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="changes tensors in place"):
        attach_exits(InPlace(), ["first", "second"], 5, image_size=32)
