"""What the exits' gradients make of the parameters that they share: their mean, or their sum without conflicts.

Both rules look at one gradient per exit: that of the loss through the logits of the exit, its teachers being constants.  Their sum
is the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.data.rng import Purpose, uniform
from dist_train.distributed.group import Group


def balance_gradients(
    parameters: Mapping[str, nn.Parameter], exits: Mapping[str, Sequence[int]], active: Callable[[], bool]
) -> None:
    """Give every parameter the mean of the gradients of the exits that depend on it, while ``active``, instead of their sum.

    Gradient equilibrium (Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019, section 3.1) multiplies
    what flows back from exit i of M by 1 / (M - i + 1), and what flows back from behind it by (M - i) / (M - i + 1).  Up to a
    parameter between the exits j - 1 and j these factors multiply to 1 / (M - j + 1) for every exit from j on.

    Args:
        parameters: by name.
        exits: the exits that depend on each, from :func:`dist_train.models.parts.exits_behind`.
        active: asked in every backward pass.
    """
    for name, parameter in parameters.items():
        count = len(exits[name])
        if count > 1:

            def divide(gradient: Tensor, count: int = count) -> Tensor:
                return gradient / count if active() else gradient

            # Before the gradient is added to those of other passes, and before ZeRO sees it.
            parameter.register_hook(divide)  # type: ignore[no-untyped-call]


class ProjectedGradients:
    """PCGrad between exits: the gradient of an exit loses what points against that of another exit.

    Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1, on the gradients of a whole global batch.
    Two exits are compared on the parameters that both of them depend on, and the gradient of an exit is never projected outside
    of those that it depends on.  What an exit meets first is drawn anew in every update, as a function of seed and update.

    It keeps one gradient per exit, and takes one backward pass per exit.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], exits: Mapping[str, Sequence[int]], seed: int, group: Group
    ) -> None:
        self._num_exits = 1 + max(number for numbers in exits.values() for number in numbers)
        self._seed, self._group = seed, group
        by_exits: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if exits[name]:
                by_exits.setdefault(tuple(exits[name]), []).append(parameter)
        self._shares = [_Share(numbers, shared) for numbers, shared in by_exits.items()]
        self._cosines = torch.ones(self._num_exits, self._num_exits)
        self._logits: tuple[Tensor, ...] = ()
        self._leaves: tuple[Tensor, ...] = ()

    def detach(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the loss of a micro batch is to be made of instead of these logits, so that it stops at the exits."""
        self._logits = tuple(logits)
        self._leaves = tuple(one.detach().requires_grad_(one.requires_grad) for one in logits)
        return self._leaves

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro batch, of this rank alone, to those of the others."""
        # Logits have no gradient where everything before them is frozen.
        trained = [number for number, leaf in enumerate(self._leaves) if leaf.requires_grad]
        through = torch.autograd.grad(loss, [self._leaves[number] for number in trained], materialize_grads=True)
        for number, gradient in zip(trained, through):
            # The exits share the graph of the layers before them; the last one frees it.
            self._add(number, gradient, retain_graph=number != trained[-1])
        self._logits = self._leaves = ()

    def _add(self, number: int, gradient: Tensor, *, retain_graph: bool) -> None:
        """Add what one exit's logits, whose gradient is given, make of the parameters."""
        shares = [share for share in self._shares if number in share.exits]
        parameters = [parameter for share in shares for parameter in share.parameters if parameter.requires_grad]
        found = torch.autograd.grad(
            self._logits[number], parameters, gradient, retain_graph=retain_graph, materialize_grads=True
        )
        by_parameter = dict(zip(parameters, found))
        for share in shares:
            share.add(number, by_parameter)

    def finish(self, update: int) -> None:
        """Write the gradient of the global batch into the parameters; all ranks must call."""
        grams = torch.zeros(3 * (self._num_exits,), device=self._group.device)
        for share in self._shares:
            # DeepSpeed, which averages over the ranks elsewhere, does not see these gradients.
            self._group.sum(share.gradients).div_(self._group.ranks.world_size)
            grams += share.gram(self._num_exits)
        weights = _project(grams, orders(self._seed, update, self._num_exits).to(grams.device, non_blocking=True))
        # At [i, j]: the square of g_j, and in the line below g_i g_j, on the parameters that exit i depends on.
        squares = torch.einsum("ijj->ij", grams)
        self._cosines = torch.einsum("iij->ij", grams) / (squares * squares.T).sqrt().clamp(min=1e-30)
        for share in self._shares:
            share.write(weights)

    def metrics(self) -> dict[str, float]:
        """Cosines between the exits' gradients of the last global batch, on what both depend on, before the projection."""
        cosines = self._cosines.cpu()
        return {
            f"train/exit{deeper + 1}/cosine_to_exit{exit_number + 1}": float(cosines[exit_number, deeper])
            for deeper in range(self._num_exits)
            for exit_number in range(deeper)
        }


class _Share:
    """The parameters that the same exits depend on, with the gradients of each of these exits, flat [exits, elements]."""

    def __init__(self, exits: tuple[int, ...], parameters: Sequence[nn.Parameter]) -> None:
        self.exits = exits
        self.parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        self.gradients = torch.zeros(len(exits), sum(sizes), device=parameters[0].device)
        # Made once: a tensor of Python numbers waits for the device.
        self._index = torch.tensor(exits, device=parameters[0].device)
        self._views = [
            {
                parameter: part.view_as(parameter)
                for parameter, part in zip(parameters, torch.split(row, sizes), strict=True)
            }
            for row in self.gradients
        ]

    def add(self, exit_number: int, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Add an exit's gradients, by parameter; frozen ones have none."""
        row = self._views[self.exits.index(exit_number)]
        trained = [parameter for parameter in self.parameters if parameter in gradients]
        if trained:
            torch._foreach_add_([row[one] for one in trained], [gradients[one] for one in trained])

    def gram(self, num_exits: int) -> Tensor:
        """[M, M, M]: at (i, j, k) the product of the gradients of exits j and k, 0 where i, j or k is none of these exits."""
        index = self._index
        gram = self.gradients.new_zeros(3 * (num_exits,))
        products = self.gradients @ self.gradients.T
        gram[index[:, None, None], index[None, :, None], index[None, None, :]] = products
        return gram

    def write(self, weights: Tensor) -> None:
        """Write the sum of the exits' gradients after the projection, and forget the gradients.

        ``weights`` [M, M] has a row per exit: its projected gradient as a sum of gradients as they were.
        """
        # Only the exits that depend on these parameters move them.
        whole = weights[self._index][:, self._index].sum(0) @ self.gradients
        for parameter, part in zip(
            self.parameters, torch.split(whole, [p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter) if parameter.requires_grad else None
        self.gradients.zero_()


def _project(grams: Tensor, meets: Tensor) -> Tensor:
    """[M, M]: the projected gradient of every exit as a sum of all gradients, all exits at once.

    Args:
        grams: [M, M, M], products of gradients over what exit i (first index) and the two others depend on.
        meets: [M, M - 1], from :func:`orders`.
    """
    exits = torch.arange(len(grams), device=grams.device)
    weights = torch.eye(len(grams), device=grams.device)
    for other in meets.T:
        against = grams[exits, :, other]
        # g_i <- g_i - (g_i g_j / |g_j|^2) g_j where g_i g_j < 0, with g_j as it was and g_i a row of weights times gradients.
        product = (weights * against).sum(1)
        square = against[exits, other]
        weights[exits, other] -= torch.where(product < 0, product / square, 0.0)
    return weights


def orders(seed: int, update: int, num_exits: int) -> Tensor:
    """[M, M - 1]: for every exit the others in the order in which it meets them in an update."""
    keys = uniform(seed, update, Purpose.GRADIENT_ORDER, np.arange(num_exits), num_exits)
    np.fill_diagonal(keys, 2.0)  # behind all others, and cut off
    return torch.from_numpy(keys.argsort(1)[:, :-1].copy())
