"""What training, evaluation and prediction know of a network with several exits."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dist_train.models.ensembles import Ensemble, add_exit

if TYPE_CHECKING:
    from dist_train.models.stages import StagedNetwork


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode."""
    # Module by module, because train() would wake those that a regime keeps frozen in evaluation mode.
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class MultiExitNetwork(nn.Module):
    """Base of networks with several exits, which give :meth:`exit_logits` and :meth:`iter_exit_logits`.

    Attributes:
        num_exits: exits M.
        num_classes: classes K.
        heads: what an exit puts on its features, one module per exit.
        ensemble: how an exit predicts together with those before it; None: by itself.
    """

    num_exits: int
    num_classes: int
    heads: nn.ModuleList
    ensemble: Ensemble | None = None

    def exit_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the exits themselves give, M tensors [N, K], for images [N, 3, H, W]."""
        raise NotImplementedError

    def iter_exit_logits(self, images: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """The same exit after exit, as :meth:`iter_exits`."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of all exits, M tensors [N, K], for images [N, 3, H, W]."""
        logits = self.exit_logits(images)
        if self.ensemble is None:
            return logits
        together, total = [], None
        for number, own in enumerate(logits, start=1):
            combined, total = add_exit(self.ensemble, number, own, total)
            together.append(combined)
        return tuple(together)

    def iter_exits(self, images: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """Yield the logits [N, K] of exit after exit, the same that :meth:`forward` gives.

        Before exit m nothing is computed that only later exits need, and nothing is computed twice.  With
        ``exits.send(rows)``, a tensor of row numbers, the iteration continues with these images only.
        """
        exits, rows, total = self.iter_exit_logits(images), None, None
        for number in range(1, self.num_exits + 1):
            # At first None, with which a generator starts.
            logits = exits.send(rows)
            if self.ensemble is not None:
                logits, total = add_exit(self.ensemble, number, logits, total)
            rows = yield logits
            if rows is not None and total is not None:
                total = total[rows]

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
