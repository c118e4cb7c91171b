"""Weights of two public MSDNet repositories: their configuration and state dict become an :class:`MSDNet`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from dist_train.errors import CheckpointError, ConfigError
from dist_train.models.cells import ConvNormReLU, DenseCell
from dist_train.models.msdnet import MSDNet

_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_CLASSES = {"cifar10": 10, "cifar100": 100, "ImageNet": 1000}
_STEP_MODES = {"even": "even", "lin_grow": "growing"}


def load_msdnet_pytorch(args: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MSDNet:
    """The network that kalviny/MSDNet-PyTorch makes of ``args``, with its weights.

    Args:
        args: its command-line arguments by name: data, nBlocks, nChannels, base, step, stepmode, growthRate, grFactor,
            bnFactor, prune, reduction, bottleneck; the factors as numbers or as text ("1-2-4").
        state_dict: weights by its names, with or without ``module.`` before each.

    Raises:
        ConfigError: an argument is missing or out of range.
        CheckpointError: keys are missing, unexpected or of another shape.
    """
    num_classes, arguments = msdnet_pytorch_arguments(args)
    return _load(MSDNet(num_classes, **arguments), state_dict)


def msdnet_pytorch_arguments(args: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Classes and arguments of :class:`MSDNet` for the ``args`` of :func:`load_msdnet_pytorch`; raises ConfigError as it does."""
    data = _choice(args, "data", tuple(_CLASSES))
    growth_factors = _factors(args, "grFactor")
    return _CLASSES[data], {
        "exits": _whole(args, "nBlocks"),
        "scales": len(growth_factors),
        "growth": _whole(args, "growthRate"),
        "growth_factors": growth_factors,
        "bottleneck_factors": _factors(args, "bnFactor") if args.get("bottleneck", True) else None,
        "initial_channels": _whole(args, "nChannels"),
        "base": _whole(args, "base"),
        "step": _whole(args, "step"),
        "step_mode": cast(Any, _STEP_MODES[_choice(args, "stepmode", tuple(_STEP_MODES))]),
        "prune": cast(Any, _choice(args, "prune", ("min", "max"))),
        # 0.5 is the default of their command line.
        "reduction": _share({"reduction": 0.5, **args}, "reduction"),
        # Their classifier of CIFAR is 128 channels wide, that of ImageNet as wide as what enters it.
        "head_width": None if data == "ImageNet" else 128,
        "stem": 224 if data == "ImageNet" else 32,
        "dialect": "msdnet_pytorch",
    }


def load_multiexit_distillation(cf_net: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MSDNet:
    """The network that mary-phuong/multiexit-distillation makes of ``cf_net``, with its weights.

    Args:
        cf_net: its dictionary: in_shape, out_dim, n_scales, n_exits, nlayers_to_exit, nlayers_between_exits,
            nplanes_mulv, nplanes_addh, nplanes_init, prune, plane_reduction, exit_width, btneck_widths.
        state_dict: weights by its names, with or without ``module.`` before each. Its CIFAR-100 classes are permuted.

    Raises:
        ConfigError: an argument is missing or out of range.
        CheckpointError: keys are missing, unexpected or of another shape.
    """
    num_classes, arguments = multiexit_distillation_arguments(cf_net)
    return _load(MSDNet(num_classes, **arguments), state_dict)


def multiexit_distillation_arguments(cf_net: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Classes and arguments of :class:`MSDNet` for the ``cf_net`` of :func:`load_multiexit_distillation`; ConfigError as there."""
    prune = cf_net.get("prune")
    return _whole(cf_net, "out_dim"), {
        "exits": _whole(cf_net, "n_exits"),
        "scales": _whole(cf_net, "n_scales"),
        "growth": _whole(cf_net, "nplanes_addh"),
        "growth_factors": _factors(cf_net, "nplanes_mulv"),
        "bottleneck_factors": _factors(cf_net, "btneck_widths") if cf_net.get("btneck_widths") else None,
        "initial_channels": _whole({"nplanes_init": 32, **cf_net}, "nplanes_init"),
        "base": _whole(cf_net, "nlayers_to_exit"),
        "step": _whole(cf_net, "nlayers_between_exits"),
        "prune": cast(Any, "none" if prune is None else _choice(cf_net, "prune", ("min", "max"))),
        "reduction": _share({"plane_reduction": 0.0, **cf_net}, "plane_reduction"),
        "head_width": None if cf_net.get("exit_width") is None else _whole(cf_net, "exit_width"),
        "stem": _choice(cf_net, "in_shape", (32, 224)),
        "dialect": "multiexit_distillation",
    }


def _load(network: MSDNet, state_dict: Mapping[str, Tensor]) -> MSDNet:
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key} is a {type(value).__name__}, not a tensor; give the state dict alone")
    # DataParallel puts `module.` before every name.
    given = {key.removeprefix("module."): value for key, value in state_dict.items()}
    own = network.state_dict()
    theirs = {their_key: key for their_key, key in _renamed(network) if key in own}
    _check_keys(network, {their_key: own[key] for their_key, key in theirs.items()}, given)
    network.load_state_dict({key: given[their_key] for their_key, key in theirs.items()})
    return network


def _check_keys(network: MSDNet, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    misshapen = [
        f"{key} {list(given[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    faults = {
        "missing": [*wanted.keys() - given.keys()],
        "unexpected": [*given.keys() - wanted.keys()],
        "misshapen": misshapen,
    }
    found = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in faults.items() if keys]
    if found:
        linear = re.compile(r"(classifier\.\d+\.linear|exits\.\d+\.4)\.bias")
        biases = [value for key, value in given.items() if linear.fullmatch(key)]
        theirs = (
            f"have {len(biases)} exits and {len(biases[0])} classes"
            if biases
            else "have no exits by this repository's names"
        )
        raise CheckpointError(
            f"the weights {theirs} and do not fit the configuration, with {network.num_exits} exits and {network.num_classes} "
            f"classes: {', '.join(found)}; give the configuration they were trained with"
        )


def _some(keys: list[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _renamed(network: MSDNet) -> Iterator[tuple[str, str]]:
    """(their key, our key) for every leaf a module can have; not every module has all of them."""
    modules = dict(network.named_modules())
    names = {id(module): name for name, module in modules.items()}
    convert = _msdnet_pytorch if network.dialect == "msdnet_pytorch" else _multiexit_distillation
    for module, their_name in convert(network):
        for leaf in _LEAVES:
            yield f"{their_name}.{leaf}", f"{names[id(module)]}.{leaf}"


def _unit(unit: nn.Module, name: str, first: int = 0) -> Iterator[tuple[nn.Module, str]]:
    assert isinstance(unit, ConvNormReLU)
    yield unit[0], f"{name}.{first}"
    yield unit[1], f"{name}.{first + 1}"


def _cells(network: MSDNet) -> Iterator[tuple[str, int, int, nn.Module]]:
    """(block.stage in their numbering, scale, place among the stage's scales, cell); the stem is the first block's stage 0."""
    for number, block in enumerate(network.blocks):
        for position, stage in enumerate(cast(nn.ModuleList, block), start=number == 0):
            for place, (scale, cell) in enumerate(cast(nn.ModuleDict, stage).items()):
                yield f"blocks.{number}.{position}", int(scale), place, cell


def _msdnet_pytorch(network: MSDNet) -> Iterator[tuple[nn.Module, str]]:
    for scale, unit in enumerate(network.stem):
        # With a pooling, for large images, their first unit is a plain sequence, without a module around it.
        has_pool = len(cast(ConvNormReLU, unit)) == 4
        yield from _unit(unit, f"blocks.0.0.layers.{scale}" + ("" if has_pool else ".net"))
    for stage, _, place, cell in _cells(network):
        if not isinstance(cell, DenseCell):
            yield from _unit(cell, f"{stage}.m.{place}.net")
            continue
        for path, name in ((cell.down, "conv_down"), (cell.normal, "conv_normal")):
            for index, unit in enumerate(_units(path)):
                # A unit is three modules in their sequence: convolution, norm, ReLU.
                yield from _unit(unit, f"{stage}.layers.{place}.{name}.net", 3 * index)
    for number, head in enumerate(network.heads):
        conv1, conv2, *_, linear = head.children()
        yield from _unit(conv1, f"classifier.{number}.m.0.net")
        yield from _unit(conv2, f"classifier.{number}.m.1.net")
        yield linear, f"classifier.{number}.linear"


def _multiexit_distillation(network: MSDNet) -> Iterator[tuple[nn.Module, str]]:
    for scale, unit in enumerate(network.stem):
        has_pool = len(cast(ConvNormReLU, unit)) == 4
        yield from _unit(unit, f"blocks.0.0.mods.{scale}" + (".0" if has_pool else ""))
    # Cells are called by their scale here; msdnet_pytorch counts those that are left.
    for stage, scale, _, cell in _cells(network):
        if not isinstance(cell, DenseCell):
            yield from _unit(cell, f"{stage}.conv.{scale}")
            continue
        for path, name in ((cell.down, "conv_down"), (cell.normal, "conv")):
            units = _units(path)
            for index, unit in enumerate(units):
                yield from _unit(unit, f"{stage}.mods.{scale}.{name}" + (f".{index}" if len(units) > 1 else ""))
    for number, head in enumerate(network.heads):
        conv1, conv2, *_, linear = head.children()
        yield from _unit(conv1, f"exits.{number}.0")
        yield from _unit(conv2, f"exits.{number}.1")
        # Behind two convolutions, the pooling and the flattening.
        yield linear, f"exits.{number}.4"


def _units(path: nn.Module | None) -> list[nn.Module]:
    """The convolutions of a path: bottleneck and 3x3, or the 3x3 alone, or nothing."""
    if path is None:
        return []
    return [path] if isinstance(path, ConvNormReLU) else list(path.children())


def _get(mapping: Mapping[str, Any], key: str) -> Any:
    if key not in mapping:
        raise ConfigError(f"the network's configuration has no {key}; give the one it was trained with")
    return mapping[key]


def _choice(mapping: Mapping[str, Any], key: str, allowed: Sequence[Any]) -> Any:
    value = _get(mapping, key)
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}; it can be {', '.join(map(str, allowed))}")
    return value


def _whole(mapping: Mapping[str, Any], key: str) -> int:
    value = _get(mapping, key)
    if not re.fullmatch(r"[1-9]\d*", str(value)):
        raise ConfigError(f"{key} is {value!r}; it must be a whole number above 0")
    return int(value)


def _share(mapping: Mapping[str, Any], key: str) -> float:
    value = _get(mapping, key)
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"{key} is {value!r}; it must be a number from 0 to 1")
    return share


def _factors(mapping: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = _get(mapping, key)
    parts = value.split("-") if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not parts or not all(re.fullmatch(r"[1-9]\d*", str(part)) for part in parts):
        raise ConfigError(f'{key} is {value!r}; it must be whole numbers above 0, one per scale, such as "1-2-4"')
    return tuple(int(part) for part in parts)
