"""Multi-exit networks: what they have in common, and how one is built from a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from typing import Protocol

from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.errors import ConfigError
from dist_train.models.exits import AttachedExits, attach_exits
from dist_train.models.msdnet import MSDNet
from dist_train.models.resnet import ResNet

__all__ = ["AttachedExits", "MSDNet", "MultiExitNetwork", "ResNet", "attach_exits", "build_model"]

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
        arguments = config.model_dump(exclude={"name", "blocks", "width", "norm"})
        arguments["stem"] = config.stem or (32 if image_size < LARGE_IMAGES else 224)
        network = MSDNet(num_classes, **arguments)
        network.check_image_size(image_size)
        return network
    if config.name == "resnet":
        backbone: nn.Module = ResNet(num_classes, blocks=config.blocks, width=config.width, norm=config.norm)
    else:
        backbone = _call_by_name(config.name, num_classes)
    return attach_exits(backbone, config.exits, num_classes, image_size=image_size)


def _call_by_name(name: str, num_classes: int) -> nn.Module:
    """Call ``module:function`` with the number of classes."""
    module, _, function = name.partition(":")
    try:
        network = getattr(importlib.import_module(module), function)(num_classes)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.name is {name!r}, which cannot be found ({error}); use module:function") from None
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"model.name is {name!r}, which gives a {type(network).__name__}; it must give a torch.nn.Module"
        )
    return network
