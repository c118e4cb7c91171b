"""The statistics of the objective: sums over samples in one flat vector."""

from __future__ import annotations

import torch
from torch import Tensor


class ExitStats:
    """Statistics of the objective: a view over one flat float32 tensor of sums over samples.

    Because everything is a sum, micro batches and ranks are joined by adding vectors.  Samples with logits that are
    not finite count in ``samples`` and ``nonfinite``, and in nothing else.

    Args:
        vector: [4 * M + 5] sums; any float dtype.
        num_exits: M.
    """

    def __init__(self, vector: Tensor, num_exits: int) -> None:
        self.vector = vector
        self.num_exits = num_exits

    @staticmethod
    def size(num_exits: int) -> int:
        """Length of the vector."""
        return 4 * num_exits + 5

    @classmethod
    def zeros(cls, num_exits: int, device: torch.device | str | None = None) -> ExitStats:
        """Sums over no sample."""
        return cls(torch.zeros(cls.size(num_exits), device=device), num_exits)

    def of_exits(self, num_exits: int) -> ExitStats:
        """The statistics of the first exits alone."""
        if num_exits == self.num_exits:
            return self
        rows = [self._row(row)[:num_exits] for row in range(4)]
        return ExitStats(torch.cat([*rows, self.vector[-5:]]), num_exits)

    @property
    def label_loss(self) -> Tensor:
        """[M] cross-entropy of each exit to the labels, temperature 1, without smoothing or weights; over labeled samples."""
        return self._row(0)

    @property
    def kl(self) -> Tensor:
        """[M] divergence of each exit from its teachers at their temperatures, the mean over them (with an explicit
        matrix: the sum, weighted by its row); 0 without teachers.  Weighted where samples have weights.
        """
        return self._row(1)

    @property
    def top1(self) -> Tensor:
        """[M] labeled samples whose label has the largest logit; of equal logits the first class counts as larger."""
        return self._row(2)

    @property
    def top5(self) -> Tensor:
        """[M] labeled samples whose label is among the five largest logits."""
        return self._row(3)

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

    def _row(self, row: int) -> Tensor:
        return self.vector[row * self.num_exits : (row + 1) * self.num_exits]
