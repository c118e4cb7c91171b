"""Multi-exit networks: what they have in common, and how one is built from a configuration."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_train.config import LibraryConfig, ModelConfig, MSDNetConfig, NetworkConfig, ResNetConfig
from dist_train.errors import ConfigError
from dist_train.models.exits import AttachedExits, attach_exits
from dist_train.models.msdnet import MSDNet
from dist_train.models.named import build_named, library_weights
from dist_train.models.network import MultiExitNetwork
from dist_train.models.resnet import ResNet
from dist_train.models.weights import load_backbone, read_weights

__all__ = [
    "AttachedExits",
    "MSDNet",
    "MultiExitNetwork",
    "ResNet",
    "attach_exits",
    "build_model",
    "load_pretrained",
    "network_of_library",
]

LARGE_IMAGES = 96
"""From this image size on, in pixels, MSDNet's stem is the one for large images."""


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> MultiExitNetwork:
    """The configured network, with fresh weights from torch's global generator.

    Args:
        config: the section ``model``.
        num_classes: classes K.
        image_size: height and width of the images, in pixels.

    Raises:
        ConfigError: values that do not fit together, or an image size that the network cannot take.
    """
    try:
        network = _build(config, num_classes, image_size)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        raise ConfigError(
            f"the network {config.name} does not fit into this machine's memory; choose fewer or narrower layers"
        ) from None
    network.ensemble = config.ensemble
    return network


def _build(config: ModelConfig, num_classes: int, image_size: int) -> MultiExitNetwork:
    if isinstance(config, MSDNetConfig):
        arguments = config.model_dump(exclude={"name", *NetworkConfig.model_fields})
        arguments["stem"] = config.stem or (32 if image_size < LARGE_IMAGES else 224)
        network = MSDNet(num_classes, **arguments)
        network.check_image_size(image_size)
        return network
    if isinstance(config, ResNetConfig):
        backbone: nn.Module = ResNet(num_classes, blocks=config.blocks, width=config.width, norm=config.norm)
    elif isinstance(config, LibraryConfig):
        backbone = build_named(config.name, num_classes, image_size, config.options)
    else:
        backbone = _call_by_name(config.name, num_classes, config.options)
    try:
        return attach_exits(backbone, config.exits, num_classes, head=config.pooling, image_size=image_size)
    except ConfigError:
        raise
    except (AssertionError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # What networks raise on images of a wrong size: timm asserts, others fail in a reshape or a matrix product.
        if isinstance(error, RuntimeError) and _is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{config.name} fails on images of {image_size} x {image_size} pixels: {_first_line(error)}; set another "
            "data.image_size, or the size that the network takes in model.options"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On a CPU a plain RuntimeError whose text has "can't allocate memory"; the GPU's OutOfMemoryError is one as well.
    return "allocate" in str(error) or "out of memory" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def load_pretrained(model: MultiExitNetwork, config: ModelConfig) -> None:
    """Put the weights that ``model.pretrained`` names into a network of :func:`build_model`.

    Raises:
        ConfigError: the library has none.
        CheckpointError: the file is not weights, or they do not fit.
    """
    if config.pretrained is True:
        assert isinstance(config, LibraryConfig)
        load_backbone(model, library_weights(config.name, config.options), config.name)
    elif config.pretrained:
        load_backbone(model, read_weights(config.pretrained), str(config.pretrained))


def network_of_library(name: str, num_classes: int, image_size: int) -> nn.Module:
    """A trained network without exits: ``LIBRARY/NAME`` with the library's weights, or ``module:function`` as it comes.

    Raises:
        ConfigError: it cannot be found or built, or its weights are of another number of classes.
    """
    if ":" in name:
        return _call_by_name(name, num_classes, {})
    network = build_named(name, num_classes, image_size, {})
    try:
        network.load_state_dict(library_weights(name, {}))
    except RuntimeError as error:
        raise ConfigError(
            f"{name}: its weights do not fit {num_classes} classes ({str(error).splitlines()[-1].strip()[:200]}); give a "
            "network of the same classes, or a run that was trained on them"
        ) from None
    return network


def _call_by_name(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Call ``module:function`` with the number of classes."""
    module, _, function = name.partition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:
        # A checkpoint names its network as well, and whoever made it must not choose among all functions of Python.
        raise ConfigError(
            f"model.name is {name!r}, but the standard library has no networks; use module:function of your own"
        )
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"model.name is {name!r}, which cannot be found ({error}); use module:function") from None
    try:
        # Before the call, whose own TypeErrors would otherwise be taken for wrong arguments.
        inspect.signature(build).bind(num_classes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"model.name is {name!r}, which cannot be called with the number of classes and model.options ({error})"
        ) from None
    network = build(num_classes, **options)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"model.name is {name!r}, which gives a {type(network).__name__}; it must give a torch.nn.Module"
        )
    return network
