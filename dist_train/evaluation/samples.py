"""What evaluation keeps of every image: a few numbers per exit instead of its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.distributed.group import Group
from dist_train.prediction.confidence import confidence

TEMPERATURES = tuple(2.0 ** (step / 6) for step in range(-6, 16))
"""Temperatures among which calibration chooses: from 0.5 to 5.7, 12 % apart."""


@dataclass(frozen=True)
class Samples:
    """One row per labeled image, in the order of its id, on the CPU; M exits, G :data:`TEMPERATURES`.

    Columns: ``ids`` and ``labels`` int64 [N].  Per exit [N, M]: ``prediction`` int32; ``rank`` int32, how many classes are
    above the label (of equal logits the first class is above); ``loss`` float32, -log p(label); ``max_probability``,
    ``entropy`` and ``margin`` float32, the measures of :mod:`dist_train.prediction.confidence`.  Of the running ensemble, the mean
    probabilities of an exit and all before it, [N, M]: ``ensemble_prediction``, ``ensemble_rank``, ``ensemble_loss``,
    ``ensemble_max_probability``.  At every temperature float32 [N, M, G]: ``scaled_loss``, ``scaled_max_probability``.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.columns[column]

    @property
    def exits(self) -> int:
        """M."""
        return int(self.columns["rank"].shape[1])

    def select(self, rows: NDArray[Any]) -> Samples:
        """These rows only, given by number or by flag."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Samples(self.ids[rows], self.labels[rows], columns, self.unreadable)


def reduce_logits(logits: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The columns of :class:`Samples` for one batch: M tensors [N, K] of logits, labels int64 [N]; rows independent."""
    rows: dict[str, list[Tensor]] = {}
    together = torch.full_like(logits[0], -math.inf, dtype=torch.float32)  # log of the sum of probabilities so far
    for number, exit_logits in enumerate(logits, start=1):
        exit_logits = exit_logits.float()
        log_probabilities = exit_logits.log_softmax(dim=1)
        # Probabilities themselves are 0 in float32 where a network is very confident, and their logarithm is infinite.
        together = _log_of_sum(together, log_probabilities)
        log_mean = together - math.log(number)
        columns = _ranks(exit_logits, labels, "") | _ranks(log_mean, labels, "ensemble_")
        columns["loss"] = _loss(log_probabilities, labels)
        columns["ensemble_loss"] = _loss(log_mean, labels)
        columns["ensemble_max_probability"] = log_mean.amax(dim=1).exp()
        columns["max_probability"] = confidence(exit_logits, "max_probability")
        # Rounding can take 1 - H / log K below 0.
        columns["entropy"] = confidence(exit_logits, "entropy").clamp(0, 1)
        columns["margin"] = confidence(exit_logits, "margin")
        scaled = [(exit_logits / temperature).log_softmax(dim=1) for temperature in TEMPERATURES]
        columns["scaled_loss"] = torch.stack([_loss(one, labels) for one in scaled], dim=1)
        columns["scaled_max_probability"] = torch.stack([one.amax(dim=1).exp() for one in scaled], dim=1)
        for name, column in columns.items():
            rows.setdefault(name, []).append(column)
    return {name: torch.stack(columns, dim=1) for name, columns in rows.items()}


class SampleCollector:
    """Collects the rows of a split on one rank, and joins those of all ranks.

    A row's index is the image's id, so the result does not depend on ranks, batches or their order.
    """

    def __init__(self, images: int) -> None:
        self._images = images
        self._labels = torch.full((images,), -1)
        self._columns: dict[str, Tensor] = {}

    def add(self, ids: Tensor, labels: Tensor, logits: Sequence[Tensor]) -> None:
        """Reduce a batch to its rows; images without a label or an id are left out."""
        keep = (labels >= 0) & (ids >= 0)
        indices, labels = ids[keep], labels[keep]
        if not len(indices):
            return
        rows = {name: column.cpu() for name, column in reduce_logits([one[keep] for one in logits], labels).items()}
        indices = indices.cpu()
        self._labels[indices] = labels.cpu()
        for name, column in rows.items():
            if name not in self._columns:
                self._columns[name] = column.new_zeros(self._images, *column.shape[1:])
            self._columns[name][indices] = column

    def join(self, group: Group, num_exits: int, unreadable: int) -> Samples:
        """The rows of all ranks, on all of them; every rank must call."""
        # A rank whose share of the split is empty knows no columns yet.
        empty = reduce_logits([torch.zeros(0, 2)] * num_exits, torch.zeros(0, dtype=torch.int64))
        # -1 for no label becomes 0, which the sum over the ranks needs.
        labels = self._over_ranks(group, self._labels + 1) - 1
        columns = {
            name: self._over_ranks(group, self._columns.pop(name, column.new_zeros(self._images, *column.shape[1:])))
            for name, column in empty.items()
        }
        counted = group.sum(torch.tensor(unreadable, device=group.device))
        ids = torch.arange(self._images)
        numbers = {name: column.numpy() for name, column in columns.items()}
        return Samples(ids.numpy(), labels.numpy(), numbers, int(counted)).select((labels >= 0).numpy())

    def _over_ranks(self, group: Group, column: Tensor) -> Tensor:
        # Every row is zero on all ranks but one, so the sum is exact.
        return group.sum(column.to(group.device)).cpu()


def _ranks(logits: Tensor, labels: Tensor, prefix: str) -> dict[str, Tensor]:
    """Predicted class, and how many classes are above the label."""
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    above = (logits > own) | ((logits == own) & before)
    return {
        f"{prefix}prediction": logits.argmax(dim=1).int(),
        f"{prefix}rank": above.sum(dim=1, dtype=torch.int32),
    }


def _log_of_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b), to the bit the same for a row in any batch, which torch.logaddexp is not."""
    # A class that is masked in both is -inf, and -inf less -inf would be no number.
    higher = torch.maximum(a, b).clamp(min=torch.finfo(a.dtype).min)
    return higher + ((a - higher).exp() + (b - higher).exp()).log()


def _loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return -log_probabilities.gather(1, labels[:, None])[:, 0]
