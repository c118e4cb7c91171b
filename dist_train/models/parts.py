"""Which part of a multi-exit network belongs to which exit, and which parts train when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dist_train.config import NetworkConfig
from dist_train.models.network import evaluating

EARLY_EXITS, LAST_EXIT, BACKBONE = "early exits", "last exit", "backbone"

ALL = frozenset({EARLY_EXITS, LAST_EXIT, BACKBONE})
EXITS = frozenset({EARLY_EXITS, LAST_EXIT})
WITHOUT_EARLY_EXITS = frozenset({LAST_EXIT, BACKBONE})
"""The network as it is without early exits: it trains by the labels at its end."""

REGIMES = {
    "joint": (ALL, ALL),
    "disjoint": (WITHOUT_EARLY_EXITS, frozenset({EARLY_EXITS})),
    "mixed": (WITHOUT_EARLY_EXITS, ALL),
    "heads_only": (EXITS, EXITS),
    "heads_first": (EXITS, ALL),
}
"""What trains in the first stage of a regime, and what after it.

joint, disjoint and mixed as in Kubaty et al., "How to Train Your Multi-Exit Model?", ICML 2025, section 3.
"""


def trained_parts(config: NetworkConfig, epoch: int) -> frozenset[str]:
    """The parts of the network that train in an epoch, by ``model.regime``."""
    first, second = REGIMES[config.regime]
    return first if epoch < config.first_epochs else second


def exit_parts(model: nn.Module) -> dict[str, str]:
    """Submodules that belong to exits, by name: whether to early ones or to the last one.

    Works on the networks of this package, whose heads are in ``heads``; exits that were attached to a network leave its
    classifier where it is, as the last submodule whose weight has a row per class.  Distilled networks (DeiT, LeViT) have two
    of the same shape, one after the other, and the last exit is both.  Where there is none, it is a part of the backbone.
    """
    heads = model.get_submodule("heads")
    assert isinstance(heads, nn.ModuleList)
    last = len(heads) - 1
    parts = dict.fromkeys((f"heads.{number}" for number in range(last)), EARLY_EXITS)
    backbone = getattr(model, "network", None)
    if not (isinstance(backbone, nn.Module) and isinstance(heads[last], nn.Identity)):
        return parts | {f"heads.{last}": LAST_EXIT}
    classes = model.num_classes
    assert isinstance(classes, int)
    return parts | {f"network.{name}": LAST_EXIT for name in _classifiers(backbone, classes)}


def _classifiers(backbone: nn.Module, classes: int) -> list[str]:
    # A norm has one dimension, and is no classifier, however many channels it has.
    weights = [
        (name, weight.shape)
        for name, module in backbone.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() > 1
    ]
    # From the end: what has a row per class further inside is there by chance.
    while weights and weights[-1][1][0] != classes:
        weights.pop()
    found = weights[-1:]
    if len(weights) > 1 and weights[-2][1] == found[0][1] and _are_beside(weights[-2][0], found[0][0]):
        found.append(weights[-2])
    return [name for name, _ in found]


def _are_beside(first: str, second: str) -> bool:
    """Whether two submodules are classifiers beside each other, as head and head_dist, and not layers of a sequence."""
    one, other = next(
        (pair for pair in zip(first.split("."), second.split(".")) if pair[0] != pair[1]), (first, second)
    )
    # Numbers are places in a sequence, where 1 also begins 10.
    return other.startswith(one) and not one.isdecimal()


def exits_behind(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """The exits that depend on each parameter, from 0 and rising, by the parameter's name; of a pass in evaluation mode.

    Args:
        model: gives the logits of its exits.
        image_size: height and width of the images, in pixels.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    exits: dict[str, list[int]] = {name: [] for name in names.values()}
    with evaluating(model), torch.enable_grad():
        logits = model(torch.zeros(2, 3, image_size, image_size, device=next(iter(names)).device))
    for number, one in enumerate(logits):
        seen, waiting = set(), [one.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            # The ends of the graph are what adds to the gradient of a parameter.
            if (parameter := getattr(node, "variable", None)) in names:
                exits[names[parameter]].append(number)
    return {name: tuple(numbers) for name, numbers in exits.items()}


def part_of(name: str, parts: Mapping[str, str]) -> str:
    """The part that a parameter or submodule of this name belongs to, given :func:`exit_parts`."""
    return next((part for prefix, part in parts.items() if is_in(name, [prefix])), BACKBONE)


def is_in(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a parameter or submodule of this name is one of these submodules or lies inside of one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
