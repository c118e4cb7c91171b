"""The operator ``dist_train::exit_loss``: the objective over all exits with its gradient and its statistics in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.kernels.cpu import exit_loss_cpu, headroom


class ExitStats:
    """Statistics of the objective: a view over one flat float32 tensor of sums over samples.

    Because everything is a sum, micro batches and ranks are joined by adding vectors.  Samples with logits that are
    not finite count in ``samples`` and ``nonfinite``, and in nothing else.

    Args:
        vector: [M * M + 3 * M + 5] sums; any float dtype.
        num_exits: M.
    """

    def __init__(self, vector: Tensor, num_exits: int) -> None:
        self.vector = vector
        self.num_exits = num_exits

    @classmethod
    def zeros(cls, num_exits: int, device: torch.device | str | None = None) -> ExitStats:
        """Sums over no sample."""
        return cls(torch.zeros(num_exits * num_exits + 3 * num_exits + 5, device=device), num_exits)

    @property
    def label_loss(self) -> Tensor:
        """[M] cross-entropy of each exit to the labels, temperature 1, without smoothing or weights; over labeled samples."""
        return self.vector[: self.num_exits]

    @property
    def kl(self) -> Tensor:
        """[M, M] divergence of exit m (row) from exit t (column) at their temperatures; weighted where samples have weights."""
        return self.vector[self.num_exits : self.num_exits * (self.num_exits + 1)].view(self.num_exits, self.num_exits)

    @property
    def top1(self) -> Tensor:
        """[M] labeled samples whose label has the largest logit; of equal logits the first class counts as larger."""
        return self.vector[-2 * self.num_exits - 5 : -self.num_exits - 5]

    @property
    def top5(self) -> Tensor:
        """[M] labeled samples whose label is among the five largest logits."""
        return self.vector[-self.num_exits - 5 : -5]

    @property
    def confidence(self) -> Tensor:
        """[] largest probability of the teacher of the deepest exit that has one, at its temperature."""
        return self.vector[-5]

    @property
    def samples(self) -> Tensor:
        """[] samples."""
        return self.vector[-4]

    @property
    def labeled(self) -> Tensor:
        """[] samples with a label."""
        return self.vector[-3]

    @property
    def bad_labels(self) -> Tensor:
        """[] samples with a label outside of [0, K) other than -100."""
        return self.vector[-2]

    @property
    def nonfinite(self) -> Tensor:
        """[] samples in which an exit has a logit of NaN or +inf, or nothing but -inf."""
        return self.vector[-1]


_NAME = "dist_train::exit_loss"
torch.library.define(
    _NAME,
    "(Tensor[] logits, Tensor targets, Tensor? second, Tensor? share, Tensor? weights, Tensor teachers, Tensor reader, "
    "Tensor label_weights, Tensor temperature, Tensor labeled, float smoothing, bool cross_entropy, bool with_grad) "
    "-> (Tensor loss, Tensor statistics, Tensor gradients)",
)


@torch.library.impl(_NAME, "CPU")
def _cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):  # which would take the matrix products to bf16
        return exit_loss_cpu(*arguments)


@torch.library.impl(_NAME, "CUDA")
def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from dist_train.kernels.gpu import exit_loss_gpu  # needs Triton, which a torch without CUDA lacks

    return exit_loss_gpu(*arguments)


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _fake(logits: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    exits, first, with_grad = len(logits), logits[0], rest[-1]
    (samples, classes), on_gpu = first.shape, first.device.type == "cuda"
    loss = first.new_empty((), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
    vector = first.new_empty(exits * exits + 3 * exits + 5, dtype=torch.float32)
    if not with_grad:
        return loss, vector, first.new_empty((0, 0, 0))
    grads = first.new_empty((samples, exits, classes) if on_gpu else (exits, samples, classes))
    return loss, vector, grads.transpose(0, 1) if on_gpu else grads


class _ExitLoss(torch.autograd.Function):
    """The gradient that the forward pass has made, times that of the loss."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, vector, grads = _below_autograd(list(logits), *rest)
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(vector, grads)
        ctx.set_materialize_grads(False)
        return loss, vector, grads

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        if loss is None:
            return None, *[None] * len(grads)
        factor = loss / headroom(grads.dtype, grads.shape[1])
        # The gradient is given away as it is, which saves writing it again, unless a second backward pass is to come;
        # what the compiler traces must not change in place.
        if torch._C._autograd._get_current_graph_task_keep_graph() or type(grads) is not Tensor:
            return None, *(grads * factor).unbind(0)
        if grads.is_cuda:
            from dist_train.kernels.gpu import scale_gradients_gpu

            scale_gradients_gpu(grads, factor)
        elif float(factor) != 1:
            grads.mul_(factor)
        return None, *grads.unbind(0)


def _below_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return exit_loss(*arguments)


# Not torch.library.register_autograd: its handling of tensor lists takes longer than the loss of a small batch.
@torch.library.impl(_NAME, "Autograd")
def _autograd(logits: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if rest[-1] and torch.is_grad_enabled() and any(z.requires_grad for z in logits):
        outputs: tuple[Tensor, Tensor, Tensor] = _ExitLoss.apply(rest, *logits)  # type: ignore[no-untyped-call]
        return outputs
    return _below_autograd(logits, *rest)


def exit_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and gradient of all exits on one micro batch; differentiable in the logits.

    Args, in order:
        logits: M tensors [N, K] of one dtype (fp16, bf16, fp32; on the CPU also fp64).
        targets: [N] int64 labels, -100 for none; or [N, K] floating-point distributions, zeros for none.
        second: [N] int64 second labels of mixed images, or None.
        share: [N] share of the first label where there is a second.
        weights: [N] weight of each sample's loss, or None.
        teachers: [M, M] weight of teacher t (column) for student m (row), all factors but the temperature's included.
        reader: [M] mixture of exits whose largest probability is the confidence.
        label_weights: [M] weight of each exit's label loss.
        temperature: [M] temperature of each exit's softmax in the distillation.
        labeled: [] what the sum of label losses is divided by.
        smoothing: share of the labels spread over the classes that are not masked by -inf.
        cross_entropy: the value of the distillation is the cross-entropy to the teacher rather than the divergence.
        with_grad: compute the gradient.

    Returns:
        The loss [] in float32 (float64 for fp64); the vector of :class:`ExitStats`; and the gradient [M, N, K] in the
        dtype of the logits, times :func:`headroom` (empty without ``with_grad``).
    """
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.dist_train.exit_loss(*arguments)
    return outputs
