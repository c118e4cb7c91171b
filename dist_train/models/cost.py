"""Multiply-adds and parameters per exit of any multi-exit network, found by running it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_train.models.network import MultiExitNetwork, evaluating

Convention = Literal["macs", "msdnet_pytorch"]


@dataclass(frozen=True)
class ExitCost:
    """What one image costs up to an exit, the heads of the exits before it included."""

    macs: int
    """Multiply-adds; under the convention msdnet_pytorch also the other operations that it counts."""
    params: int
    """Parameters that took part."""


def exit_costs(
    network: MultiExitNetwork, image_size: int, convention: Convention = "macs", *, lazy: bool = False
) -> list[ExitCost]:
    """Cost of every exit for one image of ``image_size`` x ``image_size`` pixels, by counting the operations of a real pass.

    Args:
        network: its training mode and buffers are as before afterwards.
        image_size: height and width, in pixels.
        convention: ``macs`` counts the multiply-adds of convolutions and matrix products alone. ``msdnet_pytorch`` is the
            counter behind the published MSDNet axes: also one per element of a ReLU, per window element of a pooling and
            per bias of a linear layer (not of a convolution).
        lazy: count what ``iter_exits`` computes for an exit. Otherwise what ``forward`` has computed when the exit's logits
            are there, which for MSDNet includes finer scales that only later exits need (as in the published axes).
    """
    parameter = next(network.parameters())
    images = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    counter = _Counter(_RULES[convention])
    with _counting(network), counter:
        if lazy:
            return [counter.cost() for _ in network.iter_exits(images)]
        # An ensemble adds up what they give, which multiplies nothing.
        return [counter.cost_of(logits) for logits in network.exit_logits(images)]


def cost_columns(network: MultiExitNetwork, image_size: int) -> dict[str, list[float]]:
    """What a report says of the cost of every exit, by name: multiply-adds in the three ways of counting, parameters."""
    macs = exit_costs(network, image_size)
    public = exit_costs(network, image_size, "msdnet_pytorch")
    lazy = exit_costs(network, image_size, lazy=True)
    return {
        "multiply_adds": [cost.macs for cost in macs],
        "multiply_adds_public": [cost.macs for cost in public],
        "multiply_adds_lazy": [cost.macs for cost in lazy],
        "parameters": [cost.params for cost in macs],
    }


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the cost of the operations that run under it, and remembers the sum at every tensor they give."""

    def __init__(self, rules: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rules = rules
        self._macs = 0
        self._parameters: dict[int, int] = {}
        # The tensors are kept alive: the id of a freed tensor can be reused.
        self._costs: dict[int, tuple[Tensor, ExitCost]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and torch would import its compiler to keep it out, which takes seconds."""
        return False

    def cost(self) -> ExitCost:
        """All operations so far."""
        return ExitCost(self._macs, sum(self._parameters.values()))

    def cost_of(self, tensor: Tensor) -> ExitCost:
        """All operations up to the one that gave this tensor."""
        return self._costs[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        rule = self._rules.get(func.overloadpacket)
        if rule is not None:
            self._macs += rule(*args, **kwargs, out_val=out)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter):
                # By identity: a parameter that several layers share counts once.
                self._parameters[id(leaf)] = leaf.numel()
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._costs[id(leaf)] = (leaf, self.cost())
        return out


def _multiply_adds(flops: Callable[..., int]) -> Callable[..., int]:
    # torch counts a multiplication and an addition as two.
    return lambda *args, **kwargs: flops(*args, **kwargs) // 2


def _linear_with_bias(bias: Tensor, rows: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return out_val.numel() * (rows.shape[-1] + 1)


def _window(images: Tensor, kernel: list[int], *_: Any, out_val: Any, **__: Any) -> int:
    pooled = out_val[0] if isinstance(out_val, tuple) else out_val
    # A square window may be given by one number.
    return int(pooled.numel() * kernel[0] * kernel[-1])


def _elements(tensor: Tensor, *_: Any, **__: Any) -> int:
    return tensor.numel()


_ATEN = torch.ops.aten
_MULTIPLY_ADDS = {operation: _multiply_adds(flops) for operation, flops in flop_registry.items()}
_RULES: dict[Convention, dict[Any, Callable[..., int]]] = {
    "macs": _MULTIPLY_ADDS,
    "msdnet_pytorch": {
        **_MULTIPLY_ADDS,
        _ATEN.addmm: _linear_with_bias,
        _ATEN.relu: _elements,
        _ATEN.relu_: _elements,
        _ATEN.avg_pool2d: _window,
        _ATEN.max_pool2d_with_indices: _window,
        _ATEN.mean: _elements,  # a pooling to one pixel
    },
}


@contextlib.contextmanager
def _counting(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without fused operations that hide matrix products from the counter."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
