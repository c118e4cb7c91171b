"""Ensembles of exits: what the exits so far predict together, so that accuracy does not fall from exit to exit."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Ensemble = Literal["geometric", "arithmetic", "product", "boosted"]
"""How the exits up to an exit predict together.

geometric: by the mean of their logits, which is the normalised geometric mean of their probabilities; arithmetic: by the mean of
their probabilities; product: by the sum of their logits, a product of experts; boosted: by the same sum, in which the logits of
earlier exits are constants, so that an exit learns what they lack (Yu et al., "Boosted Dynamic Neural Networks", AAAI 2023,
section 3.2).
"""


def add_exit(rule: Ensemble, number: int, logits: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits of the ensemble of the exits up to ``number``, and the total with which the next exit continues.

    Args:
        rule: how they predict together.
        number: of the exit, from 1.
        logits: [N, K], what the exit itself gives.
        total: [N, K] of the exits before it; None at the first.

    Returns:
        two tensors [N, K] in float32, or in the dtype of the logits where that is wider: in bf16 a sum of many logits would lose
        what the later ones add.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if rule == "arithmetic":
        logits = logits.log_softmax(1)
        total = logits if total is None else torch.logaddexp(total, logits)
        # The logarithm of the mean probability, whose softmax is that mean.
        return total - math.log(number), total
    if total is not None:
        logits = (total.detach() if rule == "boosted" else total) + logits
    return (logits / number if rule == "geometric" else logits), logits
