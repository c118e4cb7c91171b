"""When an epoch, a stage of the regime and a run end, what is due then, and the learning rate of every update."""

from __future__ import annotations

from dist_train.config import Config
from dist_train.training.checkpoint import Progress
from dist_train.training.optim import learning_rate


class Schedule:
    """What follows from how far a run has come.

    Epochs and stages end with the global batch, so that every image has had its turn, however many updates were skipped;
    the learning rate moves with the updates that were applied.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.total_batches = config.train.epochs * steps_per_epoch
        self.first_batches = config.model.first_epochs * steps_per_epoch
        """Global batches of the first of two stages; 0 where there is one stage only."""
        self.batches = min(self.total_batches, config.train.max_steps or self.total_batches)
        """Global batches that the run takes where no update is skipped."""

    def begin_stage(self, progress: Progress) -> None:
        """Note in the progress that the second stage begins, where it does."""
        if progress.batch == self.first_batches:
            progress.stage_start = progress.step

    def learning_rate(self, progress: Progress) -> float:
        """Learning rate of the next update."""
        first = self.first_batches
        # Each stage has a warm-up and a schedule of its own.
        length = first if progress.batch < first else self.total_batches - first
        return learning_rate(self.config.optim, progress.step - progress.stage_start, self.steps_per_epoch, length)

    def epochs_begun(self, progress: Progress) -> int:
        """Epochs that have begun; at a boundary those that have ended."""
        return -(-progress.batch // self.steps_per_epoch)

    def at_end(self, progress: Progress) -> bool:
        """Whether the run is at its end: that of its epochs, or ``train.max_steps``."""
        limit = self.config.train.max_steps
        return progress.batch >= self.total_batches or (limit is not None and progress.step >= limit)

    def at_boundary(self, progress: Progress) -> bool:
        """Whether an epoch, or the run, has just ended."""
        return progress.batch > 0 and (progress.batch % self.steps_per_epoch == 0 or self.at_end(progress))

    def validation_is_due(self, progress: Progress) -> bool:
        """Whether this batch ends the run, or an epoch after which there is a validation, and has not had it."""
        wanted = self.at_end(progress) or self.epochs_begun(progress) % self.config.train.eval_every == 0
        return self.at_boundary(progress) and wanted and progress.batch != progress.evaluated
