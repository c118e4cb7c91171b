"""The operator ``dist_train::exit_loss``: the objective over all exits with its gradient and its statistics in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.kernels.cpu import exit_loss_cpu


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
        """[M, M] Kullback-Leibler divergence of exit m (row) from exit t (column), both at their temperatures."""
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


@torch.library.custom_op("dist_train::exit_loss", mutates_args=(), device_types="cpu")
def exit_loss(
    logits: Sequence[Tensor],
    targets: Tensor,
    second: Tensor | None,
    share: Tensor | None,
    weights: Tensor | None,
    teachers: Tensor,
    reader: Tensor,
    label_weights: Tensor,
    temperature: Tensor,
    labeled: Tensor,
    smoothing: float,
    cross_entropy: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and gradient of all exits on one micro batch.

    Args:
        logits: M tensors [N, K] of one dtype (fp16, bf16, fp32; fp64 on the CPU), rows contiguous.
        targets: [N] int64 labels, -100 for none; or [N, K] floating-point distributions, zeros for none.
        second: [N] int64 second labels of mixed images, or None.
        share: [N] share of the first label where there is a second.
        weights: [N] weight of each sample's loss, or None.
        teachers: [M, M] weight of teacher t (column) for student m (row).
        reader: [M] mixture of exits whose largest probability is the confidence.
        label_weights: [M].
        temperature: [M], of each exit's softmax in the distillation.
        labeled: [] what the sum of label losses is divided by.
        smoothing: share of the labels spread over the classes that are not masked by -inf.
        cross_entropy: value of the distillation is the cross-entropy to the teacher rather than the divergence.
        with_grad: compute the gradient.

    Returns:
        The loss [] in float32 (float64 for fp64); the vector of :class:`ExitStats`; and N times the gradient
        [M, N, K] in the dtype of the logits, which keeps small gradients representable in fp16 (empty without
        ``with_grad``).
    """
    return exit_loss_cpu(
        logits, targets, second, share, weights, teachers, reader, label_weights, temperature, labeled,
        smoothing, cross_entropy, with_grad,
    )  # fmt: skip


@exit_loss.register_fake
def _(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    exits, first, with_grad = len(logits), logits[0], arguments[-1]
    loss = first.new_empty((), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
    vector = first.new_empty(exits * exits + 3 * exits + 5, dtype=torch.float32)
    return loss, vector, first.new_empty((exits, *first.shape) if with_grad else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])
    ctx.arguments = len(inputs)


def _backward(ctx: Any, loss: Tensor, _vector: Tensor, _grads: Tensor) -> tuple[Any, ...]:
    (grads,) = ctx.saved_tensors
    # A new tensor: the saved one must survive for a second backward pass.
    scaled = grads * (loss / max(grads.shape[1], 1))
    return list(scaled.unbind(0)), *[None] * (ctx.arguments - 1)


exit_loss.register_autograd(_backward, setup_context=_setup_context)
