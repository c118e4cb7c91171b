"""What follows an epoch: the validation, the checkpoint that keeps its result, and at the end of the run the report."""

from __future__ import annotations

import torch

from dist_train.distributed.group import Group
from dist_train.training.checkpoint import Progress
from dist_train.training.checkpointer import Checkpointer
from dist_train.training.engine import Engine
from dist_train.training.health import StopRequests
from dist_train.training.run_folder import RunFolder
from dist_train.training.schedule import Schedule
from dist_train.training.validation import Validation, Validator


class EpochEnd:
    """Validates, saves and reports; every method is called on all ranks together."""

    def __init__(
        self,
        group: Group,
        schedule: Schedule,
        engine: Engine,
        validator: Validator,
        checkpointer: Checkpointer,
        run_folder: RunFolder,
        requests: StopRequests,
        *,
        had_ended: bool,
    ) -> None:
        """``had_ended``: the run resumes from a checkpoint that says finished, whose report is there already."""
        self.had_ended = had_ended
        self.group, self.schedule, self.requests = group, schedule, requests
        self.engine, self.validator = engine, validator
        self.checkpointer, self.run_folder = checkpointer, run_folder
        self.validation: Validation | None = None
        """The last validation of this start."""

    def run(self, progress: Progress, save_is_due: bool) -> bool:
        """Do what is due after the last batch of an epoch; true if the run was asked to stop before that was done.

        The same end of an epoch may come twice: once before a stop, and again in the start that resumes there.  Progress and
        files record what is done; it is not repeated.

        Args:
            progress: the progress after that batch; the validation is noted in it, and whether it is the best one.
            save_is_due: whether a checkpoint was due with that batch; it has waited for the validation, whose result it keeps.
        """
        epoch, finished = self.schedule.epochs_begun(progress), self.schedule.at_end(progress)
        is_best, best_before = False, (progress.best_score, progress.best_step)
        if self.schedule.validation_is_due(progress):
            self.validation = self.validator.run(self._weights(), lambda: self.requests.reason is not None)
            if self.validation is None:
                # Saved as of the last batch: the start that resumes there begins with this validation.
                self.checkpointer.save(progress, last=True)
                return True
            is_best = _note(progress, self.validation)
            self.run_folder.log_validation(progress, epoch, self.validation, is_best)
        # The report comes first: a checkpoint that says finished implies a report.
        if finished:
            self._report(progress)
        due = is_best or finished or save_is_due or self.checkpointer.due_by_epochs(epoch)
        if due and not self.checkpointer.save(progress, finished=finished, last=finished) and is_best:
            # The save failed, so this validation must not become the best: restore the earlier one.
            progress.best_score, progress.best_step = best_before
        return False

    def _report(self, progress: Progress) -> None:
        """Write report.json at the end; a run that had ended before keeps the one that it has."""
        if self.validation is None:
            if self.had_ended and self.group.on_rank0(lambda: self.run_folder.has_report):
                return
            # The start that validated left no report, it was removed since, or it is of another step: the run is at its
            # end because the configuration has fewer epochs now.
            self.validation = self.validator.run(self._weights())
            assert self.validation is not None
        self.run_folder.write_report(progress, self.validation)

    def _weights(self) -> dict[str, torch.Tensor]:
        """The weights to validate: the moving average where one is kept."""
        return self.engine.averaged_weights() or self.engine.weights()


def _note(progress: Progress, validation: Validation) -> bool:
    """Note a validation in the progress; returns whether it is the best one so far."""
    progress.evaluated = progress.batch
    best = progress.best_score is None or validation.mean_top1 > progress.best_score
    if best:
        progress.best_score, progress.best_step = validation.mean_top1, progress.step
    return best
