"""The operator ``dist_train::exit_loss``: the objective over all exits with its gradient and its statistics in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.errors import DataError
from dist_train.loss.cpu import exit_loss_cpu
from dist_train.loss.inputs import ExitWeights, LossOptions, Targets, grad_scale
from dist_train.loss.statistics import ExitStats

Outputs = tuple[Tensor, Tensor, Tensor]

_NAME = "dist_train::exit_loss"
torch.library.define(
    _NAME,
    "(Tensor[] logits, Tensor?[] targets, Tensor[] exits, str rule, float smoothing, bool cross_entropy, bool with_grad) "
    "-> (Tensor loss, Tensor statistics, Tensor gradients)",
)


def exit_loss(logits: Sequence[Tensor], targets: Targets, exits: ExitWeights, options: LossOptions) -> Outputs:
    """Loss, statistics and gradient of all exits on one micro batch; differentiable in the logits.

    Args:
        logits: M tensors [N, K] of one dtype (fp16, bf16, fp32; on the CPU also fp64).
        targets: what the labels of the N samples are.
        exits: how the terms of the M exits are weighted.
        options: the rule of the teachers, label smoothing, the form of the distillation loss, whether to make a gradient.

    Returns:
        The loss [] in float32 (float64 for fp64); the vector of :class:`ExitStats`; and the gradient [M, N, K] in the
        dtype of the logits, times :func:`grad_scale` (empty without ``with_grad``).
    """
    outputs: Outputs = torch.ops.dist_train.exit_loss(logits, list(targets), list(exits), *options)
    return outputs


@torch.library.impl(_NAME, "CPU")
def _cpu(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    exits: Sequence[Tensor],
    rule: str,
    smoothing: float,
    cross_entropy: bool,
    with_grad: bool,
) -> Outputs:
    options = LossOptions(rule, smoothing, cross_entropy, with_grad)
    with torch.autocast("cpu", enabled=False):  # it would take the matrix products to bf16
        return exit_loss_cpu(logits, Targets(*targets), ExitWeights(*exits), options)


@torch.library.impl(_NAME, "CUDA")
def _cuda(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    exits: Sequence[Tensor],
    rule: str,
    smoothing: float,
    cross_entropy: bool,
    with_grad: bool,
) -> Outputs:
    from dist_train.loss.gpu_launch import exit_loss_gpu  # needs Triton, which a torch without CUDA lacks

    options = LossOptions(rule, smoothing, cross_entropy, with_grad)
    return exit_loss_gpu(logits, Targets(*targets), ExitWeights(*exits), options)


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _fake(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    exits: Sequence[Tensor],
    rule: str,
    smoothing: float,
    cross_entropy: bool,
    with_grad: bool,
) -> Outputs:
    first, on_gpu = logits[0], logits[0].device.type == "cuda"
    samples, classes = first.shape
    loss = first.new_empty((), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
    vector = first.new_empty(ExitStats.size(len(logits)), dtype=torch.float32)
    if not with_grad:
        return loss, vector, first.new_empty((0, 0, 0))
    # The GPU kernels write the exits of a sample side by side; shown as [M, N, K] the strides differ from the CPU's.
    grads = first.new_empty((samples, len(logits), classes) if on_gpu else (len(logits), samples, classes))
    return loss, vector, grads.transpose(0, 1) if on_gpu else grads


class _ExitLoss(torch.autograd.Function):
    """The gradient that the forward pass has made, times that of the loss."""

    @staticmethod
    def forward(ctx: Any, constants: tuple[Any, ...], *logits: Tensor) -> Outputs:
        loss, vector, grads = _below_autograd(logits, *constants)
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(vector, grads)
        # Otherwise autograd allocates a zero tensor as large as all logits for the unused output.
        ctx.set_materialize_grads(False)
        return loss, vector, grads

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # as create_graph=True has it
            raise DataError(
                "the loss has no second derivatives; call backward or torch.autograd.grad without create_graph=True"
            )
        (grads,) = ctx.saved_tensors
        if loss is None:
            # The first one is for the constants.
            return None, *[None] * len(grads)
        factor = loss / grad_scale(grads.dtype, grads.shape[1])
        # The gradient is scaled in place and handed over without a copy, unless another backward pass needs it; under
        # torch.compile nothing may change in place.
        if torch._C._autograd._get_current_graph_task_keep_graph() or type(grads) is not Tensor:
            return None, *(grads * factor).unbind(0)
        if grads.is_cuda:
            from dist_train.loss.gpu_launch import scale_gradients_gpu

            # The factor stays on the device; on the CPU looking at it costs nothing.
            scale_gradients_gpu(grads, factor)
        elif float(factor) != 1:
            grads.mul_(factor)
        return None, *grads.unbind(0)


def _below_autograd(logits: Sequence[Tensor], *constants: Any) -> Outputs:
    # Without it the dispatcher would come back to _autograd.
    with torch._C._AutoDispatchBelowAutograd():
        outputs: Outputs = torch.ops.dist_train.exit_loss(logits, *constants)
    return outputs


# Not torch.library.register_autograd: its handling of tensor lists takes longer than the loss of a small batch.
@torch.library.impl(_NAME, "Autograd")
def _autograd(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    exits: Sequence[Tensor],
    rule: str,
    smoothing: float,
    cross_entropy: bool,
    with_grad: bool,
) -> Outputs:
    constants = (targets, exits, rule, smoothing, cross_entropy, with_grad)
    if with_grad and torch.is_grad_enabled() and any(z.requires_grad for z in logits):
        outputs: Outputs = _ExitLoss.apply(constants, *logits)  # type: ignore[no-untyped-call]
        return outputs
    return _below_autograd(logits, *constants)
