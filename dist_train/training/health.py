"""What interrupts a run: requests to stop, steps whose gradient is not finite, a GPU that cannot be used any more."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

import torch

from dist_train.distributed.fault_report import exit_code_for
from dist_train.distributed.group import Group
from dist_train.distributed.launcher import Launcher
from dist_train.errors import TrainingError, UserError
from dist_train.training.checkpoint import Progress
from dist_train.training.loss_scale import LossScale

log = logging.getLogger("dist_train")


class StopRequests:
    """Turns SIGTERM, SIGINT, SIGHUP and SIGUSR2, and the end of the launcher, into a flag that the loop polls between steps.

    A handler must not save by itself: it runs in the middle of a step, and a collective save there would deadlock.
    A second SIGINT ends the process at once.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}
        self._launcher = Launcher()

    def __enter__(self) -> StopRequests:
        for number in self.signals:
            # Under nohup a process ignores SIGHUP; installing a handler would undo that.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    @property
    def reason(self) -> str | None:
        """Why this rank should stop, as text for the log; None while it should not."""
        # A signal is named first: it explains the end of a launcher that got it as well.
        if self._received is not None:
            return self._received.name
        return "the end of its launcher" if self._launcher.is_gone else None

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The second Ctrl-C: the user does not want to wait for the checkpoint.
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self._received = signal.Signals(number)


class SkippedSteps:
    """Counts steps that were skipped because the gradient was not finite; every rank has one."""

    def __init__(self, group: Group, allowed_in_a_row: int) -> None:
        self.group = group
        self.allowed = allowed_in_a_row

    def count(self, applied: bool, loss: torch.Tensor, progress: Progress, scale: LossScale | None = None) -> None:
        """Count one step in the progress; name the rank whose loss caused a skipped one.  All ranks must call.

        As long as the loss scale can fall, that is the remedy, and a skipped step does not count towards the limit in a row.
        """
        if applied or scale is None or scale.is_smallest:
            progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
        progress.skipped_steps += not applied
        if applied:
            return
        # Only behind a skipped step: to read the loss waits for the device.
        finite = self.group.gather(bool(torch.isfinite(loss)))
        if finite is None:
            return
        ranks = [str(rank) for rank, fine in enumerate(finite) if not fine]
        source = f"the loss of rank {', '.join(ranks)} is not finite" if ranks else "every rank's loss is finite"
        log.warning(
            "step %d (batch %d): the gradient is not finite (%s); step skipped, %d in all%s",
            progress.step,
            progress.batch,
            source,
            progress.skipped_steps,
            f"; the loss scale is now {scale.value:g}" if scale else "",
        )

    def check(self, progress: Progress) -> None:
        """Raise TrainingError after too many skipped steps in a row."""
        if progress.skipped_in_a_row >= self.allowed:
            raise TrainingError(
                f"{progress.skipped_in_a_row} steps in a row had a gradient that is not finite (step {progress.step}); the weights and the "
                "last checkpoint are from before; lower optim.lr, set optim.max_grad_norm, or try train.precision fp32"
            )


def works(device: torch.device) -> bool:
    """Whether this process can still use the device: after a fault in a kernel, a process cannot use its GPU again.

    Waits for nothing: what runs on the GPU may itself wait for a rank that is gone.
    """
    try:
        if device.type == "cuda":
            torch.cuda.current_stream(device).query()
    except RuntimeError:
        return False
    return True


def end_without_gpu(error: Exception) -> NoReturn:
    """End the process with its error, closing nothing that is on a GPU.

    DALI and nvJPEG would report every buffer that they cannot free, and then abort, which hides the error among thousands of lines.
    """
    if isinstance(error, UserError):
        log.error("dist-train train: %s", error)
    else:
        log.error(
            "%sthe GPU cannot be used any more by this process; CUDA_LAUNCH_BLOCKING=1 shows the operation that failed",
            "".join(traceback.format_exception(error)),
        )
    # os._exit flushes nothing.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code_for(error))
