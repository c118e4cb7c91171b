"""The dynamic loss scale of fp16: as large as the gradients allow, so that the small ones do not underflow."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST, LARGEST = 1.0, 2.0**24
UPDATES_BEFORE_RISE = 2000
"""Applied updates in a row after which the scale doubles, as in torch's GradScaler and DeepSpeed."""


@dataclass
class LossScale:
    """Halved by every update that is skipped because its gradient is not finite, doubled after many that are applied.

    The same on all ranks, because all of them see the same gradient; part of the checkpoint.
    """

    value: float = 2.0**16
    applied_in_a_row: int = 0

    @property
    def is_smallest(self) -> bool:
        """Whether it can fall no further: a gradient that is not finite then has another cause."""
        return self.value <= SMALLEST

    def count(self, applied: bool) -> None:
        """Follow the outcome of one update."""
        self.applied_in_a_row = self.applied_in_a_row + 1 if applied else 0
        if not applied:
            self.value = max(self.value / 2, SMALLEST)
        elif self.applied_in_a_row == UPDATES_BEFORE_RISE:
            self.value, self.applied_in_a_row = min(2 * self.value, LARGEST), 0
