"""A small residual network (He et al., CVPR 2016), as an example of a network that exits are attached to."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group"]


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean, linear layer; every stage after the first halves the image.

    Args:
        num_classes: classes K.
        blocks: residual blocks per stage.
        width: channels of the first stage; each further stage has twice as many.
        norm: ``batch``, or ``group`` (8 groups or the nearest divisor), which does not depend on the batch.
    """

    def __init__(
        self, num_classes: int, *, blocks: Sequence[int] = (2, 2, 2), width: int = 16, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), _norm(norm, width), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential()
        width_in = width
        for stage, count in enumerate(blocks):
            width_out = width * 2**stage
            self.stages.append(
                nn.Sequential(
                    *(
                        ResidualBlock(
                            width_out if block else width_in, width_out, 2 if stage and not block else 1, norm
                        )
                        for block in range(count)
                    )
                )
            )
            width_in = width_out
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] for images [N, 3, H, W]."""
        return cast(Tensor, self.head(self.stages(self.stem(images))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False),
                norm1=_norm(norm, width_out),
                relu=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
                norm2=_norm(norm, width_out),
            )
        )
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width_out:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width_out, 1, bias=False), _norm(norm, width_out))

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C', H', W'] from [N, C, H, W]."""
        # A 1x1 convolution with a stride reads these places alone.  As one operation, torch 2.13 writes outside of its
        # memory where a thin network (2 to 8 channels) runs on a CPU in channels_last.
        read = features[:, :, :: self.stride, :: self.stride]
        return torch.relu(self.residual(features) + self.shortcut(read))


def _norm(norm: Norm, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(math.gcd(8, width), width)
