"""What the layers of an MSDNet are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Features = list[Tensor | None]
"""One feature map [N, C, H, W] per scale, finest first; None where a scale has ended."""


class BatchNorm(nn.BatchNorm2d):
    """Leaves the counting of batches to :func:`count_batches`, one operator for a whole network instead of one per norm."""

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C, H, W], normalised."""
        if self.momentum is None:  # the mean of all batches, which needs their number at once
            return super().forward(features)
        # As nn.BatchNorm2d has it but for the counter, which matters only where there is no momentum.
        return functional.batch_norm(
            features,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


def count_batches(norms: Sequence[BatchNorm]) -> None:
    """Count a batch in each of the norms that are in training mode."""
    counters = [
        norm.num_batches_tracked
        for norm in norms
        if norm.training and norm.momentum is not None and norm.num_batches_tracked is not None
    ]
    if counters:
        torch._foreach_add_(counters, 1)


class ConvNormReLU(nn.Sequential):
    """Convolution, batch norm, ReLU; keeps height and width divided by ``stride``, rounded up."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1, *, bias: bool = False) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, bias=bias),
                norm=BatchNorm(width_out),
                relu=nn.ReLU(inplace=True),
            )
        )


class DenseCell(nn.Module):
    """One layer at one scale: the scale's channels, and new ones made from them and from the next finer scale."""

    def __init__(self, down: nn.Module | None, normal: nn.Module, *, down_last: bool) -> None:
        super().__init__()
        self.down = down
        self.normal = normal
        self.down_last = down_last

    def forward(self, own: Tensor, finer: Tensor | None) -> Tensor:
        """Concatenate own [N, C, H, W] with what is made of it and of finer [N, C', 2H, 2W]."""
        if self.down is None:
            return torch.cat([own, self.normal(own)], 1)
        down, normal = self.down(finer), self.normal(own)
        return torch.cat([own, normal, down] if self.down_last else [own, down, normal], 1)


class ScaleGradient(torch.autograd.Function):
    """The same features, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        """Features of any shape, unchanged."""
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Times the factor."""
        return gradient * ctx.factor, None


def run_cell(cell: nn.Module, features: Features, scale: int) -> Tensor:
    """A cell by itself."""
    if isinstance(cell, DenseCell):
        return cast(Tensor, cell(features[scale], features[scale - 1] if scale else None))
    return cast(Tensor, cell(features[scale]))


def run_stage(cells: nn.ModuleDict, features: Features) -> Features:
    """All cells of a layer or transition, by their scale."""
    return [
        run_cell(cells[str(scale)], features, scale) if str(scale) in cells else None for scale in range(len(features))
    ]
