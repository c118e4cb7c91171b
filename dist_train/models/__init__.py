"""Multi-exit networks: what they have in common, and how one is built from a configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Generator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.errors import ConfigError
from dist_train.models.exits import AttachedExits, attach_exits
from dist_train.models.msdnet import MSDNet
from dist_train.models.named import LIBRARIES, build_named, library_weights
from dist_train.models.resnet import ResNet
from dist_train.models.weights import load_backbone, read_weights

__all__ = ["AttachedExits", "MSDNet", "MultiExitNetwork", "ResNet", "attach_exits", "build_model", "load_pretrained"]

NOT_MSDNET = {"name", "blocks", "width", "norm", "options", "pooling", "pretrained", "regime", "heads_epochs"}
"""Fields of the section ``model`` that are no arguments of MSDNet."""

LARGE_IMAGES = 96
"""From this image size on, in pixels, MSDNet's stem is the one for large images."""


class MultiExitNetwork(Protocol):
    """What training, evaluation and prediction know of a network; every one is an :class:`torch.nn.Module`."""

    num_exits: int
    num_classes: int

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of all exits, M tensors [N, K], for images [N, 3, H, W]."""

    def iter_exits(self, images: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """Yield the logits [N, K] of exit after exit, computing no further than is iterated.

        ``send(rows)`` goes on with these rows of the batch only.
        """


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The configured network, a :class:`MultiExitNetwork`, with fresh weights from torch's global generator.

    Args:
        config: the section ``model``.
        num_classes: classes K.
        image_size: height and width of the images, in pixels.

    Raises:
        ConfigError: values that do not fit together, or an image size that the network cannot take.
    """
    if isinstance(config.exits, int):
        arguments = config.model_dump(exclude=NOT_MSDNET)
        arguments["stem"] = config.stem or (32 if image_size < LARGE_IMAGES else 224)
        network = MSDNet(num_classes, **arguments)
        network.check_image_size(image_size)
        return network
    if config.name == "resnet":
        backbone: nn.Module = ResNet(num_classes, blocks=config.blocks, width=config.width, norm=config.norm)
    elif config.name.startswith(tuple(f"{library}/" for library in LIBRARIES)):
        backbone = build_named(config.name, num_classes, image_size, config.options)
    else:
        backbone = _call_by_name(config.name, num_classes, config.options)
    return attach_exits(backbone, config.exits, num_classes, head=config.pooling, image_size=image_size)


def load_pretrained(model: nn.Module, config: ModelConfig) -> None:
    """Put the weights that ``model.pretrained`` names into a network of :func:`build_model`.

    Raises:
        ConfigError: the library has none.
        CheckpointError: the file is not weights, or they do not fit.
    """
    if config.pretrained is True:
        load_backbone(model, library_weights(config.name, config.options), config.name)
    elif config.pretrained:
        load_backbone(model, read_weights(config.pretrained), str(config.pretrained))


def _call_by_name(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Call ``module:function`` with the number of classes."""
    module, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.name is {name!r}, which cannot be found ({error}); use module:function") from None
    try:
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
