"""What the operator ``dist_train::exit_loss`` is given, grouped: the samples' targets, the exits' weights, the options."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The ignore_index of torch's cross-entropy.
UNLABELED = -100


class Targets(NamedTuple):
    """What the labels of N samples are."""

    labels: Tensor
    """[N] int64 labels, -100 for none; or [N, K] floating-point distributions, rows of zeros for none."""
    second: Tensor | None = None
    """[N] int64 second labels of mixed images (mixup, cutmix)."""
    lam: Tensor | None = None
    """[N] weight of the first label where there is a second, 0 to 1."""
    weights: Tensor | None = None
    """[N] weight of each sample's loss; None: all 1."""


class ExitWeights(NamedTuple):
    """How the terms of M exits are weighted; all float32 tensors on the device of the logits."""

    label_weights: Tensor
    """[M] weight of each exit's label loss."""
    distill_weights: Tensor
    """[M] weight of each exit's distillation, all factors but the square of the temperature included."""
    teachers: Tensor
    """[M, M] weight of teacher t (column) for student m (row)."""
    confidence_weights: Tensor
    """[M] mixture of exits whose largest probability is the teacher's confidence."""
    temperature: Tensor
    """[M] temperature of each exit's softmax in the distillation."""
    label_count: Tensor
    """[] number of labeled samples: what the sum of label losses is divided by."""


KERNEL_RULES = ("last", "next", "later", "ensemble", "none")
"""Teacher rules for which the GPU kernels have code of their own; they would compute another name wrongly without an error."""


class LossOptions(NamedTuple):
    """What is known before any tensor; each combination is a compiled kernel of its own."""

    rule: str
    """Which of :data:`KERNEL_RULES` made ``teachers``; or matrix, which says nothing about it and always holds."""
    smoothing: float = 0.0
    """Fraction of a label's mass that is spread over the classes that are not masked by -inf."""
    cross_entropy: bool = True
    """The value of the distillation is the cross-entropy to the teacher rather than the divergence from it."""
    with_grad: bool = True
    """Compute the gradient."""


def grad_scale(dtype: torch.dtype, samples: int) -> int:
    """Static scale of the operator's gradient: in fp16, the gradient of a large batch would underflow without it."""
    return max(samples, 1) if dtype == torch.float16 else 1
