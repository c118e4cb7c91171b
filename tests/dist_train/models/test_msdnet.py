"""MSDNet: structure by dialect, lazy against whole evaluation, gradients, recomputation, bad input."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config import ModelConfig, MSDNetConfig
from dist_train.errors import ConfigError
from dist_train.models import MSDNet, build_model
from dist_train.models.cells import ConvNormReLU, DenseCell
from tests.common import network_config

DIALECTS = ("lua", "msdnet_pytorch", "multiexit_distillation")
SHAPES: dict[str, dict[str, Any]] = {
    "max": {"exits": 3, "base": 4, "step": 2},
    "max, two scales left at the end": {"exits": 3, "base": 2, "step": 1},
    "min": {"exits": 4, "base": 3, "step": 2, "prune": "min"},
    "none": {"exits": 2, "base": 2, "step": 2, "prune": "none"},
    "growing": {"exits": 3, "base": 2, "step": 1, "step_mode": "growing", "prune": "min"},
    "large stem": {
        "exits": 2,
        "scales": 4,
        "growth_factors": (1, 2, 4, 4),
        "bottleneck_factors": (1, 2, 4, 4),
        "base": 4,
        "step": 4,
        "stem": 224,
        "head_width": None,
    },
    "no bottlenecks": {"exits": 2, "base": 2, "step": 2, "bottleneck_factors": None},
    "one scale": {"exits": 2, "scales": 1, "growth_factors": (2,), "bottleneck_factors": (2,), "base": 1, "step": 1},
}


def small(dialect: str, **changes: Any) -> MSDNet:
    torch.manual_seed(0)
    arguments = {"growth": 4, "initial_channels": 6, "head_width": 8, "dialect": dialect} | changes
    network = MSDNet(5, **arguments)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):  # statistics and scales that a mistake in the order would show in
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    return network


def images_for(network: MSDNet, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def convolutions_run(network: nn.Module) -> tuple[Counter[str], list[Any]]:
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    return counts, handles


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_iter_exits_gives_what_forward_gives(shape: str, dialect: str) -> None:
    changes = SHAPES[shape]
    if dialect == "multiexit_distillation" and shape == "growing":
        changes = changes | {"base": 3}
    network = small(dialect, **changes).eval()
    with torch.no_grad():
        images = images_for(network)
        whole, lazy = network(images), list(network.iter_exits(images))
    assert [tuple(logits.shape) for logits in whole] == [(3, 5)] * network.num_exits
    for expected, logits in zip(whole, lazy, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert len({tuple(logits.flatten().tolist()) for logits in whole}) == network.num_exits


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_iter_exits_runs_just_what_an_exit_depends_on(shape: str, dialect: str) -> None:
    """What an exit's logits depend on is told by autograd: the parameters that its gradient reaches."""
    changes = SHAPES[shape]
    if dialect == "multiexit_distillation" and shape == "growing":
        changes = changes | {"base": 3}
    network = small(dialect, **changes).eval()
    images = images_for(network)
    needed: set[str] = set()
    counts, handles = convolutions_run(network)
    iteration = network.iter_exits(images)
    assert not counts
    for logits in network(images):
        counts.clear()
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {name.removesuffix(".weight") for name, g in zip(parameters, gradients) if g is not None}
        before, needed = needed, needed | {name for name, _ in network.named_modules() if name in reached}
        next(iteration)
        convolutions = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        assert counts == Counter((needed - before) & convolutions)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_trained_parameter_gets_a_gradient(shape: str) -> None:
    for dialect in ("lua", "msdnet_pytorch"):
        network = small(dialect, **SHAPES[shape])
        sum(logits.square().sum() for logits in network(images_for(network))).backward()
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        frozen = sum(not parameter.requires_grad for parameter in network.parameters())
        dead_ends = shape in ("max, two scales left at the end", "none", "no bottlenecks")
        assert (frozen > 0) == (dialect == "msdnet_pytorch" and dead_ends)


def test_a_pass_counts_a_batch_in_every_norm_that_trains() -> None:
    network = small("lua", **SHAPES["min"])
    network.heads[0].eval()
    network(images_for(network))
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == (not name.startswith("heads.0.")), name
    with torch.no_grad():
        network.eval()(images_for(network))
    assert network.stem[0].norm.num_batches_tracked == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_rows_can_leave_between_exits(dialect: str) -> None:
    network = small(dialect, **SHAPES["min"]).eval()
    with torch.no_grad():
        images = images_for(network, 6)
        whole = network(images)
        iteration = network.iter_exits(images)
        torch.testing.assert_close(next(iteration), whole[0])
        torch.testing.assert_close(iteration.send(torch.tensor([1, 2, 5])), whole[1][[1, 2, 5]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(next(iteration), whole[2][[1, 2, 5]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(iteration.send(torch.tensor([2])), whole[3][[5]], rtol=1e-5, atol=1e-6)


def exit_layers(network: MSDNet) -> tuple[list[int], list[int]]:
    """(layers before each exit, layers followed by a transition)."""
    layer, ends, transitions = 0, [], []
    for block in network.blocks:
        for stage in block:
            is_layer = isinstance(next(iter(stage.values())), DenseCell)
            layer += is_layer
            if not is_layer:
                transitions.append(layer)
        ends.append(layer)
    return ends, transitions


@pytest.mark.parametrize(
    ("arguments", "wanted", "moved"),
    [
        ({"exits": 7, "prune": "min"}, [4, 6, 8, 10, 12, 14, 16], [5, 6, 8, 10, 12, 14, 16]),
        ({"exits": 7, "prune": "max"}, [4, 6, 8, 10, 12, 14, 16], [4, 7, 8, 10, 13, 14, 16]),
        ({"exits": 10, "prune": "min"}, [*range(4, 23, 2)], [4, 7, *range(8, 23, 2)]),
        ({"exits": 11, "prune": "min"}, [*range(4, 25, 2)], [*range(4, 25, 2)]),
        ({"exits": 8, "prune": "min"}, [*range(4, 19, 2)], [*range(4, 19, 2)]),
        ({"exits": 5, "scales": 4, "base": 6, "step": 6}, [6, 12, 18, 24, 30], [6, 12, 18, 25, 30]),
        ({"exits": 5, "scales": 4, "base": 4, "step": 4}, [4, 8, 12, 16, 20], [4, 8, 12, 16, 20]),
        ({"exits": 5, "scales": 4, "base": 7, "step": 7}, [7, 14, 21, 28, 35], [7, 14, 21, 28, 35]),
    ],
)
def test_exits_one_layer_before_a_transition_move(
    arguments: dict[str, Any], wanted: list[int], moved: list[int]
) -> None:
    factors = (
        {"growth_factors": (1, 2, 4, 4), "bottleneck_factors": (1, 2, 4, 4)} if arguments.get("scales") == 4 else {}
    )
    for dialect, expected in zip(DIALECTS, (wanted, wanted, moved)):
        ends, _ = exit_layers(
            MSDNet(5, growth=2, initial_channels=4, head_width=4, dialect=dialect, **arguments, **factors)
        )
        assert ends == expected, dialect


def test_transitions_follow_the_paper() -> None:
    assert exit_layers(small("lua", exits=7, prune="max"))[1] == [7, 13]
    assert exit_layers(small("lua", exits=7, prune="min"))[1] == [5, 10]
    assert exit_layers(small("lua", exits=7, prune="none"))[1] == []
    assert exit_layers(small("lua", exits=7, prune="max", reduction=0))[1] == []


def reorder_inputs(target: MSDNet, source: MSDNet) -> None:
    """Give target (channels of the finer scale last) the weights of source (first), inputs permuted to match."""

    def copy(to: nn.Module, from_: nn.Module, order: list[int] | None) -> None:
        state = from_.state_dict()
        convolution = next(name for name in state if name.endswith("conv.weight"))
        if order is not None:
            state[convolution] = state[convolution][:, order]
        assert {name for name in to.state_dict() if name not in state} <= {
            n for n in to.state_dict() if n.endswith("conv.bias")
        }
        to.load_state_dict(state, strict=False)

    orders: list[list[int] | None] = [None] * len(source.stem)
    for to, from_ in zip(target.stem, source.stem):
        copy(to, from_, None)
    for block, (to_block, from_block) in enumerate(zip(target.blocks, source.blocks)):
        for to_stage, from_stage in zip(to_block, from_block, strict=True):
            new_orders = list(orders)
            for key, cell in from_stage.items():
                scale = int(key)
                if isinstance(cell, ConvNormReLU):
                    copy(to_stage[key], cell, orders[scale])
                    new_orders[scale] = None
                    continue
                convolutions = [module for module in cell.normal.modules() if isinstance(module, nn.Conv2d)]
                width_in, added = convolutions[0].in_channels, convolutions[-1].out_channels
                old = orders[scale] or list(range(width_in))
                copy(to_stage[key].normal, cell.normal, orders[scale])
                if cell.down is None:
                    new_orders[scale] = [*old, *range(width_in, width_in + added)]
                else:
                    copy(to_stage[key].down, cell.down, orders[scale - 1])
                    # target's channels are [old, normal, down]; source's are [old, down, normal]
                    new_orders[scale] = [
                        *old,
                        *range(width_in + added, width_in + 2 * added),
                        *range(width_in, width_in + added),
                    ]
            orders = new_orders
        copy(target.heads[block].conv1, source.heads[block].conv1, orders[-1])
        copy(target.heads[block].conv2, source.heads[block].conv2, None)
        target.heads[block].linear.load_state_dict(source.heads[block].linear.state_dict())


@pytest.mark.parametrize("shape", ["max", "min", "none", "large stem", "no bottlenecks"])
def test_dialects_are_the_same_function_of_permuted_weights(shape: str) -> None:
    unmoved = {"min": {"exits": 8, "base": 4, "step": 2}, "large stem": {"exits": 5}}
    changes = SHAPES[shape] | unmoved.get(shape, {"exits": 4, "base": 3, "step": 3})
    source, target = small("msdnet_pytorch", **changes), small("multiexit_distillation", **changes)
    if shape == "large stem":
        nn.init.zeros_(source.stem[0].conv.bias)
    assert exit_layers(source) == exit_layers(target), "choose a shape without moved exits"
    reorder_inputs(target, source)
    images = images_for(source)
    with torch.no_grad():
        for expected, logits in zip(source.eval()(images), target.eval()(images), strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        lua = small("lua", **changes).eval()
        theirs = source.state_dict()
        lua.load_state_dict({key: theirs[key] for key in lua.state_dict()})
        for expected, logits in zip(source(images), lua(images), strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_initialisation_by_dialect() -> None:
    for dialect, has_he, has_bias in zip(DIALECTS, (True, False, True), (False, False, True)):
        network = MSDNet(10, exits=2, dialect=dialect)
        convolution = network.heads[0].conv2.conv  # 128 to 128 channels: 147,456 weights
        he, default = (2 / (9 * 128)) ** 0.5, (1 / 3 / (9 * 128)) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(he if has_he else default, rel=0.02)
        assert (convolution.bias is not None) == has_bias
        assert bool(network.heads[0].linear.bias.any()) == (dialect == "msdnet_pytorch")


def bytes_saved_by_training_step(network: MSDNet, images: Tensor) -> int:
    """Run forward and backward; give the bytes that the forward pass kept for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(logits.square().sum() for logits in network(images))
    loss.backward()
    return sum(sizes.values())


@pytest.mark.parametrize("shape", ["max", "min"])
def test_recompute_changes_neither_gradients_nor_statistics(shape: str) -> None:
    plain, again = small("lua", **SHAPES[shape]), small("lua", activation_checkpointing=True, **SHAPES[shape])
    images = images_for(plain)
    saved = [bytes_saved_by_training_step(network, images) for network in (plain, again)]
    assert saved[1] < 0.7 * saved[0]
    for (name, expected), parameter in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    for (name, expected), buffer in zip(plain.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    assert all(norm.momentum == 0.1 for norm in again.modules() if isinstance(norm, nn.BatchNorm2d))


def test_what_is_computed_again_may_be_so_several_times() -> None:
    """As one backward pass per exit needs it: rules for the gradients of exits."""
    plain, again = small("lua", **SHAPES["max"]), small("lua", activation_checkpointing=True, **SHAPES["max"])
    images = images_for(plain)
    for network in (plain, again):
        for logits in network(images):
            logits.square().sum().backward(retain_graph=True)
    for expected, parameter in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    for expected, buffer in zip(plain.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_is_the_same(activation_checkpointing: bool) -> None:
    shape = {"exits": 2, "base": 1, "step": 1, "scales": 2, "growth_factors": (1, 2), "bottleneck_factors": (1, 2)}
    plain = small("lua", **shape, activation_checkpointing=activation_checkpointing)
    copied = pickle.loads(pickle.dumps(plain))
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=not activation_checkpointing)
    images = images_for(plain).contiguous(memory_format=torch.channels_last)
    for network in (plain, compiled):
        sum(logits.square().sum() for logits in network(images)).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, expected), buffer in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


def test_channels_last_stays_and_changes_nothing() -> None:
    network = small("lua", **SHAPES["max"]).eval()
    formats = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _i, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    images = images_for(network)
    with torch.no_grad():
        expected = network(images)
        formats.clear()
        logits = network(images.contiguous(memory_format=torch.channels_last))
    assert all(formats)
    for a, b in zip(logits, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"growth_factors": (1, 2)}, "growth_factors are [1, 2], but scales is 3"),
        ({"bottleneck_factors": (1, 2, 4, 4)}, "bottleneck_factors are [1, 2, 4, 4], but scales is 3"),
        ({"growth": 3, "growth_factors": (1, 1, 2)}, "3 channels do not halve"),
        ({"reduction": 0.01}, "leaves no channel"),
        ({"dialect": "multiexit_distillation", "prune": "min", "exits": 2, "base": 2}, "4 layers are too few"),
    ],
)
def test_values_that_do_not_fit(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        MSDNet(5, **arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_image_size_that_the_scales_cannot_halve() -> None:
    with pytest.raises(
        ConfigError, match=r"30 pixels, which 3 scales cannot halve; use a multiple of 4, for instance 28 or 32"
    ):
        build_model(network_config(), 10, 30)
    network = build_model(network_config(exits=1), 10, 32)
    with pytest.raises(ConfigError, match="30 pixels"):
        network(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ConfigError, match="30 pixels"):
        next(network.iter_exits(torch.zeros(1, 3, 30, 32)))
    assert network.eval()(torch.zeros(1, 3, 48, 64))[0].shape == (1, 10)


def test_build_model_takes_the_stem_by_image_size() -> None:
    def kernel(config: ModelConfig, size: int) -> int:
        return build_model(config, 10, size).stem[0].conv.kernel_size[0]

    assert [kernel(network_config(exits=1), size) for size in (32, 64, 96, 224)] == [3, 3, 7, 7]
    assert kernel(network_config(exits=1, stem=32), 224) == 3


def test_every_argument_is_in_the_configuration() -> None:
    import inspect

    for name, parameter in itertools.islice(inspect.signature(MSDNet).parameters.items(), 1, None):
        default = MSDNetConfig.model_fields[name].default
        assert default == (None if name == "stem" else parameter.default), name


def test_norms_over_all_ranks_count_their_batches_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    # A test before this one may have left a process group, in which this norm wants a GPU.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(MSDNet(5, exits=2, growth=4, initial_channels=4)).train()
    network(torch.randn(2, 3, 32, 32))
    assert {int(one) for name, one in network.named_buffers() if name.endswith("num_batches_tracked")} == {1}
