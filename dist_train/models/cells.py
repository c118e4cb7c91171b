"""What the layers of an MSDNet are made of, and how the cells of a layer run side by side."""

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
        return self.join(own, self.normal(own), None if self.down is None else self.down(finer))

    def join(self, own: Tensor, normal: Tensor, down: Tensor | None) -> Tensor:
        """The cell's channels in their order."""
        if down is None:
            return torch.cat([own, normal], 1)
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
    """All cells of a layer or transition, by their scale.

    The normal path of a scale and the path down from it start with a 1x1 convolution of the same features. In training the
    two run as one of twice the width, norm and ReLU included: the same numbers from fewer operators, and one gradient of the
    features instead of two that have to be added.
    """
    shared = {scale: _run_bottlenecks(cells, features, scale) for scale in range(len(features))}
    return [
        _run_cell_from(cells[str(scale)], features, scale, shared) if str(scale) in cells else None
        for scale in range(len(features))
    ]


_Shared = dict[int, tuple[Tensor, Tensor] | None]
"""By scale: what the bottlenecks of its normal path and of the path down from it give, where they run as one."""


def _run_cell_from(cell: nn.Module, features: Features, scale: int, shared: _Shared) -> Tensor:
    own = features[scale]
    if not isinstance(cell, DenseCell) or own is None:
        return run_cell(cell, features, scale)
    here, above = shared[scale], shared.get(scale - 1)
    normal = cell.normal(own) if here is None else _behind_bottleneck(cell.normal, here[0])
    down = None
    if cell.down is not None:
        down = cell.down(features[scale - 1]) if above is None else _behind_bottleneck(cell.down, above[1])
    return cell.join(own, normal, down)


def _behind_bottleneck(path: nn.Module, features: Tensor) -> Tensor:
    return cast(Tensor, cast(nn.Sequential, path)[1](features))


def _run_bottlenecks(cells: nn.ModuleDict, features: Features, scale: int) -> tuple[Tensor, Tensor] | None:
    """The two bottlenecks behind the features of a scale as one; None where there are not two, or they must run by themselves."""
    if not (str(scale) in cells and str(scale + 1) in cells):
        return None
    cell, coarser = cells[str(scale)], cells[str(scale + 1)]
    if not (isinstance(cell, DenseCell) and isinstance(coarser, DenseCell)):
        return None
    first, second = _bottleneck(cell.normal), _bottleneck(coarser.down)
    if first is None or second is None:
        return None
    return _run_together(first, second, cast(Tensor, features[scale]))


def _bottleneck(path: nn.Module | None) -> ConvNormReLU | None:
    """The first convolution of a path, if it can run together with another one."""
    if path is None or isinstance(path, ConvNormReLU):
        return None
    unit = cast(ConvNormReLU, cast(nn.Sequential, path)[0])
    # Only in training: there nothing is left out, as it is for an exit, and no norm is folded.  A norm over all ranks (SyncBN)
    # has to run by itself.  DeepSpeed at ZeRO 3 gathers a parameter only for the module that owns it.
    together = type(unit.norm) is BatchNorm and unit.norm.training and unit.norm.momentum is not None
    return unit if together and not hasattr(cast(nn.Conv2d, unit.conv).weight, "ds_id") else None


def _run_together(first: ConvNormReLU, second: ConvNormReLU, features: Tensor) -> tuple[Tensor, Tensor]:
    """Both units on the same features, by weights that are concatenated for it; they move their own running statistics."""
    convs = [cast(nn.Conv2d, unit.conv) for unit in (first, second)]
    norms = [cast(BatchNorm, unit.norm) for unit in (first, second)]
    weight = torch.cat([conv.weight for conv in convs])
    bias = None if convs[0].bias is None else torch.cat([cast(Tensor, conv.bias) for conv in convs])
    statistics = [cast(Tensor, getattr(norm, name)) for name in ("running_mean", "running_var") for norm in norms]
    moved = torch.cat(statistics)
    mean, variance = moved.chunk(2)
    out = functional.batch_norm(
        functional.conv2d(features, weight, bias),
        mean,
        variance,
        torch.cat([norm.weight for norm in norms]),
        torch.cat([norm.bias for norm in norms]),
        True,
        cast(float, norms[0].momentum),
        norms[0].eps,
    )
    widths = [norm.num_features for norm in norms]
    with torch.no_grad():
        torch._foreach_copy_(statistics, torch.split(moved, 2 * widths))
    # Not in place: each half is written out densely, as the convolution behind it would copy it otherwise.
    one, other = (functional.relu(half) for half in torch.split(out, widths, 1))
    return one, other
