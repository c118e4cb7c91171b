"""The running statistics of norm layers: taken back with a step that is skipped, averaged over the ranks."""

from __future__ import annotations

import torch
from torch import nn

from dist_train.distributed.group import Group


class RunningStatistics:
    """The running statistics of a network's batch and instance norms, and a copy from before the current global batch.

    These layers take part in every forward pass.  A value that is not finite would stay in their statistics forever, and
    would not show in training, which does not use them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._now = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        ]
        self._before = [buffer.clone() for buffer in self._now]

    def keep(self) -> None:
        """Keep the statistics as they are: the next global batch begins from them."""
        if self._now:
            torch._foreach_copy_(self._before, self._now)

    def take_back(self) -> None:
        """Go back to the statistics before the global batch, whose update was not applied."""
        if self._now:
            torch._foreach_copy_(self._now, self._before)


def average_buffers(model: nn.Module, weights: dict[str, torch.Tensor], group: Group) -> None:
    """Average a network's floating-point buffers in ``weights`` over the ranks, in place.

    Each rank's norm layers saw its images alone.  All ranks must call.
    """
    # Integer buffers, such as batch norm's counter, are the same on all ranks.
    names = [n for n, _ in model.named_buffers() if n in weights and weights[n].is_floating_point()]
    if not names or group.ranks.world_size == 1:
        return
    # One reduction for all of them: there are two small tensors per batch norm.
    flat = torch.cat([weights[name].flatten() for name in names])
    group.sum(flat).div_(group.ranks.world_size)
    for name, mean in zip(names, torch.split(flat, [weights[name].numel() for name in names])):
        weights[name].copy_(mean.view_as(weights[name]))
