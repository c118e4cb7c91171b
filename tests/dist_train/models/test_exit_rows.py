"""Images that leave at an exit take their rows with them, and nothing else, whatever lies between the submodules."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError
from dist_train.models import attach_exits
from tests.dist_train.models.test_exits import NamedOutputs, named_outputs


class Table(nn.Module):
    """Four rows that belong to no image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(4, 8))

    def forward(self) -> Tensor:
        return self.rows


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table, self.exit, self.end = nn.Conv2d(3, 8, 3), Table(), nn.Identity(), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.table()
        tokens = self.exit(self.stem(images).flatten(2).transpose(1, 2))
        return cast(Tensor, self.end((tokens[:, :4] + rows).tanh().mean(1)))


class Windowed(nn.Module):
    """A block that computes on the four windows of an image, as Swin does, with an exit inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.exit, self.mixed = nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        windows = self.inside(tokens.reshape(4 * len(tokens), -1, 8))
        tokens = self.exit(tokens + windows.reshape(tokens.shape))
        return cast(Tensor, tokens + self.mixed(windows.tanh()).reshape(tokens.shape))


class WithWindows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.end = nn.Conv2d(3, 8, 4, 4), Windowed(), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.end(self.block(self.stem(images).flatten(2).transpose(1, 2)).mean(1)))


class Halved(Windowed):
    """The halves of all images one after the other: those of an image do not lie together."""

    def forward(self, tokens: Tensor) -> Tensor:
        first, second = self.inside(torch.cat([tokens, tokens.flip(1)])).chunk(2)
        return self.exit(tokens + first) + self.mixed(second)


@torch.no_grad()
def test_images_do_not_leave_where_their_rows_do_not_lie_together() -> None:
    network = WithWindows()
    network.block = Halved()
    attached = attach_exits(network, ["block.exit"], 10, image_size=16).eval()
    images = torch.randn(3, 3, 16, 16)
    whole = attached(images)
    iteration = attached.iter_exits(images)
    torch.testing.assert_close(next(iteration), whole[0])
    torch.testing.assert_close(next(iteration), whole[1])  # all of them go on
    iteration = attached.iter_exits(images)
    next(iteration)
    with pytest.raises(
        ConfigError, match="the Linear beside an exit gives several rows per image, which do not lie together"
    ):
        iteration.send(torch.tensor([1]))


@torch.no_grad()
def test_rows_leave_the_windows_of_their_images() -> None:
    network = attach_exits(WithWindows(), ["block.exit"], 10, image_size=16).eval()
    for count in (2, 5):
        images = torch.randn(count, 3, 16, 16)
        for rows in ([1], [0, 1], [1, 0]):
            iteration = network.iter_exits(images)
            next(iteration)
            torch.testing.assert_close(iteration.send(torch.tensor(rows)), network(images)[1][rows])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["named tuple", "dictionary", "of a library"])
def test_rows_leave_outputs_that_have_names(kind: str) -> None:
    network = attach_exits(NamedOutputs(named_outputs()[kind]), ["blocks.0", "blocks.2"], 5, image_size=32).eval()
    images = torch.randn(6, 3, 32, 32)
    whole = network(images)
    iteration = network.iter_exits(images)
    torch.testing.assert_close(next(iteration), whole[0])
    torch.testing.assert_close(iteration.send(torch.tensor([0, 2, 3, 5])), whole[1][[0, 2, 3, 5]])
    torch.testing.assert_close(iteration.send(torch.tensor([1, 2])), whole[2][[2, 3]])


@pytest.mark.parametrize("images", [3, 4])
def test_what_has_as_many_rows_as_there_are_images_is_no_row_per_image(images: int) -> None:
    network = attach_exits(WithTable(), ["exit"], 10, image_size=16).eval()
    batch = torch.randn(images, 3, 16, 16)
    for rows in ([1], [0, 2]):
        iteration = network.iter_exits(batch)
        next(iteration)
        torch.testing.assert_close(iteration.send(torch.tensor(rows)), network(batch)[1][rows])
