"""A network's forward and backward pass as two CUDA graphs: two launches in the place of some thousands.

A multi-exit network calls many small operators, and the host launches them more slowly than a GPU computes them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.distributed.fault_report import first_line
from dist_train.errors import ConfigError

log = logging.getLogger("dist_train")

WARM_UP = 3
"""Passes before the capture, in which libraries choose their algorithms and allocate what they keep."""


def takes_cuda_graphs(config: Config, stage: int, device: torch.device) -> bool:
    """Whether a run records its network as CUDA graphs; ``train.cuda_graphs: auto`` does so with this project's own networks.

    Other networks may look at values on the host, which cannot be recorded.
    """
    wanted = config.train.cuda_graphs
    if device.type != "cuda" or wanted is False:
        return False
    return wanted is True or (
        stage == 0 and not config.why_no_cuda_graphs() and config.model.name in ("msdnet", "resnet")
    )


def record(
    network: nn.Module,
    images: Tensor,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    wanted: bool | str,
) -> NetworkGraphs | None:
    """The graphs of a network; None, and a line in the log, where ``auto`` meets one that cannot be recorded.

    Args:
        network, images, autocast: see :class:`NetworkGraphs`.
        wanted: ``train.cuda_graphs``.

    Raises:
        ConfigError: true was given for such a network.
    """
    try:
        return NetworkGraphs(network, images, autocast)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = f"this network cannot be recorded ({first_line(error)})"
        if wanted is True:
            raise ConfigError(
                f"train.cuda_graphs is true, and {reason}; recorded code must not look at values on the host; set it to false"
            ) from None
        log.warning("without CUDA graphs: %s", reason)
        return None


class NetworkGraphs:
    """The forward and the backward pass of a network on images of one shape, recorded once and replayed from then on.

    The result is that of the network itself: buffers, parameters and their gradients are the same tensors.  The gradients
    that a backward pass leaves in the parameters are overwritten by the next one, see :meth:`keep_gradients`.

    Args:
        network: in training mode, on a GPU; it keeps its parameters, buffers and mode from now on.
        images: [N, 3, H, W], an example.
        autocast: the context of its forward pass.

    Raises:
        RuntimeError: the network does something that cannot be recorded, such as to look at a value on the host.
    """

    def __init__(
        self, network: nn.Module, images: Tensor, autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # A graph reads from fixed addresses: the images of every pass are copied to here.
        self._images = images.clone()
        buffers = [buffer.clone() for buffer in network.buffers()]
        random = torch.cuda.get_rng_state(images.device)

        def forward() -> tuple[Tensor, ...]:
            # A weight that was cast in another pass must not be taken for this one's.
            before = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)
            try:
                with autocast():
                    return tuple(network(self._images))
            finally:
                torch.set_autocast_cache_enabled(before)

        def backward(logits: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(logits, self._parameters, gradients, allow_unused=True)

        try:
            self._record(forward, backward)
        finally:
            # The passes before the recording were none of the training's.
            for buffer, before in zip(network.buffers(), buffers):
                buffer.copy_(before)
            torch.cuda.set_rng_state(random, images.device)

    def _record(
        self, forward: Callable[[], Sequence[Tensor]], backward: Callable[..., Sequence[Tensor | None]]
    ) -> None:
        device = self._images.device
        # torch wants the passes before a capture on a stream of their own.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                logits = forward()
                backward(logits, [torch.zeros_like(z) for z in logits])
        torch.cuda.synchronize(device)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # DALI's and NCCL's threads go on working meanwhile: what they call must not count as part of the recording.
        with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
            logits = forward()
        self._logit_gradients = [torch.empty_like(z) for z in logits]
        # One memory pool for both, because they are always replayed in the order in which they were recorded.
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode="thread_local"):
            made = backward(logits, self._logit_gradients)
            # In the layout of their parameters: autograd would else copy them in every pass, with a launch for each.
            self._gradients = [
                g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
                for p, g in zip(self._parameters, made)
            ]
        # Without what autograd knows of them, which belongs to the stream of the recording.
        self._logits = [z.detach() for z in logits]
        del logits

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of all exits for images of the recorded shape; they are overwritten by the next call."""
        logits: tuple[Tensor, ...] = _Replay.apply(self, images, *self._parameters)  # type: ignore[no-untyped-call]
        return logits

    def replay_forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The forward pass."""
        self._images.copy_(images)
        self._forward.replay()
        return tuple(z.detach() for z in self._logits)

    def replay_backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the parameters for those of the logits."""
        # The recorded pass reads a gradient for every exit; without a loss it is 0.
        given = [zero.zero_() if g is None else g for zero, g in zip(self._logit_gradients, gradients)]
        torch._foreach_copy_(self._logit_gradients, given)
        self._backward.replay()
        return [None if gradient is None else gradient.detach() for gradient in self._gradients]

    def keep_gradients(self) -> None:
        """Move the gradients in the parameters to where the next backward pass adds to them instead of overwriting them."""
        gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        # Times 1, because there is no copy of many tensors in a few launches.
        for parameter, copy in zip(gradients, torch._foreach_mul(list(gradients.values()), 1.0)):
            parameter.grad = copy


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: NetworkGraphs, images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        ctx.set_materialize_grads(False)
        return graphs.replay_forward(images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graphs.replay_backward(gradients)
