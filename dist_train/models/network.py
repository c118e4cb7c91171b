"""What training, evaluation and prediction know of a network with several exits."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from dist_train.models.stages import StagedNetwork


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class MultiExitNetwork(nn.Module):
    """Base of networks with several exits.

    Attributes:
        num_exits: exits M.
        num_classes: classes K.
        heads: what an exit puts on its features, one module per exit.
    """

    num_exits: int
    num_classes: int
    heads: nn.ModuleList

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of all exits, M tensors [N, K], for images [N, 3, H, W]."""
        raise NotImplementedError

    def iter_exits(self, images: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """Yield the logits [N, K] of exit after exit, computing no further than is iterated.

        ``send(rows)``, a tensor of row numbers, continues with these rows of the batch alone.
        """
        raise NotImplementedError

    def staged(self, image_size: int) -> StagedNetwork:
        """The same network for inference, as one program per exit that can be run, exported and timed by itself.

        Evaluation mode, on this network's device, with a copy of its weights in which batch norms are folded into
        convolutions, whose kernels have the memory format channels_last; logits agree up to rounding.

        Args:
            image_size: S, height and width of the images, in pixels.

        Raises:
            ConfigError: the network cannot be traced for any number of images, or what an exit leaves to the next has no
                row per image; says why.
        """
        from dist_train.models.stages import cut_into_stages  # which knows this class

        return cut_into_stages(self, image_size)
