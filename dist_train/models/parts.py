"""Which part of a multi-exit network belongs to its exits, and which is the backbone that they stand on."""

from __future__ import annotations

from torch import nn


def exit_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that belong to exits: all heads, and a network's own classifier where that is the last exit's.

    Works on the networks of this package, whose heads are in ``heads``; exits that were attached to a network leave its
    classifier where it is, as the last submodule whose weight has a row per class.
    """
    heads = model.get_submodule("heads")
    backbone = getattr(model, "network", None)
    if not (
        isinstance(backbone, nn.Module) and isinstance(heads, nn.ModuleList) and isinstance(heads[-1], nn.Identity)
    ):
        return ("heads",)
    classes = model.num_classes
    ends = [
        name
        for name, module in backbone.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and len(weight) == classes
    ]
    return ("heads", f"network.{ends[-1]}") if ends else ("heads",)


def is_in(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter or submodule of this name is one of the parts or lies inside of one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)
