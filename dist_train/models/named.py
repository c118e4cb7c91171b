"""Networks of timm, torchvision and transformers by their name, and the weights that those libraries have for them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_train.errors import ConfigError

EXITS = 3
"""Exits that are suggested for a network, besides its end."""

LIBRARIES = ("timm", "torchvision", "transformers")


def is_named(name: str) -> bool:
    """Whether a name is that of a library's network, ``LIBRARY/NAME``."""
    return name.startswith(tuple(f"{library}/" for library in LIBRARIES))


def build_named(name: str, num_classes: int, image_size: int, options: Mapping[str, Any]) -> nn.Module:
    """The network ``LIBRARY/NAME`` with fresh weights; nothing is downloaded but a transformers model's configuration.

    Args:
        name: ``timm/resnet50``, ``torchvision/resnet18``, ``transformers/ViTConfig`` (a configuration class) or
            ``transformers/google/vit-base-patch16-224`` (a model of its hub, or a folder).
        num_classes: classes K.
        image_size: height and width, in pixels; for a configuration class that has a field for it.
        options: further arguments of the network, or fields of its configuration.

    Raises:
        ConfigError: the library is not installed, or does not know the name or an option.
    """
    library, _, rest = name.partition("/")
    module = _import(library, name)
    try:
        network: nn.Module
        if library == "timm":
            network = module.create_model(rest, pretrained=False, num_classes=num_classes, **options)
        elif library == "torchvision":
            network = module.models.get_model(rest, weights=None, num_classes=num_classes, **options)
        else:
            network = module.AutoModelForImageClassification.from_config(
                _configuration(module, rest, image_size, {"num_labels": num_classes, **options})
            )
    except (
        ValueError,
        TypeError,
        RuntimeError,
        OSError,
        LookupError,
        ArithmeticError,
        AttributeError,
        ImportError,
    ) as error:
        raise ConfigError(f"model.name is {name!r}, which {library} cannot build: {_first_line(error)}") from None
    return network


@dataclass(frozen=True)
class TimmNetwork:
    """What a configuration has to know of a network of timm.

    Attributes:
        exits: submodules at a quarter, a half and three quarters of its stages or blocks.
        pooling: ``model.pooling`` of these exits.
        image_size: height and width in pixels, where the network takes one size alone.
        mean: per channel, 0 to 1, that its weights were trained with.
        std: likewise.
    """

    exits: list[str]
    pooling: str
    image_size: int | None
    mean: list[float]
    std: list[float]


def describe_timm(name: str) -> TimmNetwork:
    """What a configuration of the network ``timm/NAME`` has to know; nothing is downloaded.

    Raises:
        ConfigError: timm is not installed, does not know the name, or does not say where the network's stages end.
    """
    # With ImageNet's 1,000 classes, whatever the data have: only names of modules and facts about weights are read.
    network = build_named(f"timm/{name}", 1000, 224, {})
    stages = [stage["module"] for stage in getattr(network, "feature_info", [])]
    if len(stages) <= EXITS:
        raise ConfigError(
            f"timm does not say where the stages of {name} end; name model.exits yourself: docs/python.md"
        )
    # The last stage is followed by the network's end, which is an exit in any case.
    depths = [-(-len(stages) * number // (EXITS + 1)) - 1 for number in range(1, EXITS + 1)]
    weights: Any = network.pretrained_cfg
    return TimmNetwork(
        exits=[stages[depth] for depth in depths],
        pooling="class_token" if getattr(network, "global_pool", None) == "token" else "mean",
        image_size=weights["input_size"][-1] if weights.get("fixed_input_size") else None,
        mean=list(weights["mean"]),
        std=list(weights["std"]),
    )


def library_weights(name: str, options: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The library's own weights of the network ``LIBRARY/NAME``, which it may download.

    Raises:
        ConfigError: there are none, or they cannot be fetched.
    """
    library, _, rest = name.partition("/")
    module = _import(library, name)
    try:
        if library == "timm":
            network = module.create_model(rest, pretrained=True, **options)
        elif library == "torchvision":
            network = module.models.get_model(rest, weights="DEFAULT", **options)
        else:
            network = module.AutoModelForImageClassification.from_pretrained(rest, **options)
    except Exception as error:  # the libraries' own download errors have no common class
        raise ConfigError(
            f"model.pretrained is true, but {library} has no weights for {rest!r} here: {_first_line(error)}; give a file"
        ) from None
    state: Mapping[str, Tensor] = network.state_dict()
    return state


def _configuration(module: Any, name: str, image_size: int, fields: dict[str, Any]) -> Any:
    """Of a class of this name in transformers, else of a model of this name."""
    kind = getattr(module, name, None)
    if isinstance(kind, type) and issubclass(kind, module.PreTrainedConfig):
        known = kind()
        if hasattr(known, "image_size"):
            fields = {"image_size": image_size, **fields}
        # A configuration takes any keyword without complaint, so a misspelt one would have no effect.
        unknown = [field for field in fields if field != "num_labels" and not hasattr(known, field)]
        if unknown:
            raise ValueError(f"{name} has no field {', '.join(unknown)}")
        return kind(**fields)
    if "/" not in name:
        raise ValueError(f"transformers has no configuration class {name}; use one such as ViTConfig, or OWNER/MODEL")
    return module.AutoConfig.from_pretrained(name, **fields)


def _import(library: str, name: str) -> Any:
    try:
        if library == "torchvision":
            importlib.import_module("torchvision.models")
        return importlib.import_module(library)
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # torchvision beside another build of torch raises RuntimeError
        raise ConfigError(
            f"model.name is {name!r}, but {library} cannot be imported ({_first_line(error)}); "
            f"install it with pip install dist-train[{library}]"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
