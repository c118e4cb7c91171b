"""Faults of a run: requests to stop, and steps that are not finite."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from dist_train.errors import TrainingError


class StopRequests:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a flag that the loop polls between steps.

    A handler must not save by itself: it runs in the middle of a step, and a collective save there would deadlock.
    A second SIGINT ends the process at once.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in self.signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class NonFinite:
    """Counts updates that were refused because the gradient was not finite."""

    def __init__(self, allowed_in_a_row: int, total: int = 0) -> None:
        self.allowed = allowed_in_a_row
        self.total = total
        self.in_a_row = 0

    def note(self, applied: bool) -> None:
        """Count one update."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied

    def check(self, step: int) -> None:
        """Raise TrainingError after too many refused updates in a row."""
        if self.in_a_row >= self.allowed:
            raise TrainingError(
                f"{self.in_a_row} updates in a row had a gradient that is not finite (step {step}); the weights and the "
                "last checkpoint are from before; lower optim.lr, set optim.clip, or try train.precision fp32"
            )
