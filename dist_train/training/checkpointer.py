"""What a checkpoint saves and restores of a running run, and when one is due."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import torch

from dist_train.config import Config
from dist_train.data.unreadable import BadSample, UnreadableImages
from dist_train.distributed.group import Group
from dist_train.errors import NotSavedError
from dist_train.loss import ExitDistillation
from dist_train.models.parts import ALL, REGIMES
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Checkpoint, CheckpointMeta, Progress
from dist_train.training.engine import Engine
from dist_train.training.loss_scale import LossScale
from dist_train.training.meter import Meter
from dist_train.training.preflight import Preflight
from dist_train.training.random_state import random_state, set_random_state
from dist_train.training.resume import ResumePoint, val_changed

log = logging.getLogger("dist_train")

TEMPERATURE = ("temperature", "temperature_rule", "temperature_schedule")
"""The fields of the loss from which its temperature starts."""

RETRY_SECONDS = (1.0, 4.0)
"""Pauses before the final checkpoint of a start is retried."""


class Checkpointer:
    """Saves and restores one run; every method is called on all ranks together."""

    def __init__(
        self,
        config: Config,
        ready: Preflight,
        group: Group,
        engine: Engine,
        criterion: ExitDistillation,
        meter: Meter,
        teachers: Mapping[str, str],
    ) -> None:
        self.before_writing: Callable[[], None] = lambda: None
        """Writes, on rank 0, what has to be on disk before a checkpoint is; a failure of it is one of the checkpoint."""
        self.checkpoints = config.folder / "checkpoints"
        self.config, self.group = config, group
        self.engine, self.criterion, self.meter = engine, criterion, meter
        self.train, self.val = ready.train, ready.val
        self._unreadable: UnreadableImages | None = None
        self._restored: dict[int, BadSample] = {}
        self._teachers = dict(teachers)
        self._last_save = time.monotonic()
        self.failed_saves = 0
        """Checkpoints that could not be written since this start."""
        self._said: set[str] = set()
        self._saved: tuple[int, int, bool] | None = None
        """Of the newest checkpoint: its batch, the batch of its last validation, whether it says that the run is finished."""

    def restore(self, resume: ResumePoint, loaded: Checkpoint) -> Progress:
        """Restore engine, objective, meter and random states from a checkpoint; the network already has its weights."""
        meta = loaded.meta
        self.engine.load_optimizer_state(loaded.optimizer, self._updates_by_part(meta.progress))
        for name, tensor in self.criterion.state_dict().items():
            tensor.copy_(torch.tensor(meta.loss[name], dtype=tensor.dtype).view(tensor.shape))
        # One that was changed counts from here on, and not what the old one had come to.
        if any(getattr(loaded.config.loss, name) != getattr(self.config.loss, name) for name in TEMPERATURE):
            self.criterion.reset_temperature()
        # Averages that were switched off are dropped, those just switched on start from the loaded weights.
        if loaded.averaged is not None and self.engine.averages is not None:
            self.engine.load_averages(loaded.averaged, meta.averages_updates)
        if meta.loss_scale is not None and self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(*meta.loss_scale)
        # With another number of ranks there is nobody to give their random states to; the run is then not bit-identical.
        if meta.world_size == self.group.ranks.world_size:
            self._restore_rank(loaded.ranks)
        self._restored = meta.unreadable
        progress = meta.progress
        self._saved = (progress.batch, progress.evaluated, meta.finished)
        # Scores on other images cannot be compared: the next validation is the best so far.
        if val_changed(meta, self.val):
            progress = replace(progress, best_score=None, best_step=None)
        if self.group.ranks.rank == 0:
            # They may be behind: by a kill between a checkpoint and its links, or because the newest one is damaged.
            self._link("latest", resume.path)
            if progress.best_step is not None:
                self._link("best", self.checkpoints / checkpoint.step_name(progress.best_step))
        return progress

    def attach(self, unreadable: UnreadableImages) -> None:
        """Keep the loader's unreadable images in the checkpoints, and give it those of the checkpoint that was restored."""
        self._unreadable = unreadable
        unreadable.restore(self._restored)

    @property
    def due_by_time(self) -> bool:
        """Whether a checkpoint is due between epochs by the clock of this rank; those of others may differ."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._last_save > 60 * minutes

    def due_by_steps(self, progress: Progress, applied: bool) -> bool:
        """Whether a checkpoint is due between epochs by the number of steps, the same on all ranks."""
        every = self.config.checkpoint.every_steps
        # Only after an applied update: while steps are skipped the number stays, and each would be saved again.
        return bool(every and applied and progress.step % every == 0)

    def due_by_epochs(self, epoch: int) -> bool:
        """Whether a checkpoint is due at the end of the epoch that is the ``epoch``-th, counted from 1."""
        every = self.config.checkpoint.every_epochs
        return bool(every and epoch % every == 0)

    def save(self, progress: Progress, *, finished: bool = False, last: bool = False) -> bool:
        """Write a checkpoint, unless the same one exists already; whether it exists now.

        Args:
            progress: how far the run has come.
            finished: the run is complete.
            last: this start writes no further checkpoint that could make up for a failure, so a failure is retried.  A
                failure of other checkpoints is logged and counted, and training continues.

        Raises:
            NotSavedError: the last checkpoint could not be written.
        """
        state = (progress.batch, progress.evaluated, finished)
        # A stop right after an epoch's end would write the same checkpoint twice.
        if self._saved == state:
            return True
        # Random states and running statistics differ between the ranks; all else is whole on rank 0.
        ranks = self.group.gather(self._rank_tensors())
        if self._unreadable is not None:
            self._unreadable.share(self.group)
        self.group.phase("checkpoint")
        # Collectives that every rank takes part in, although rank 0 alone writes.
        weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
        averaged = self.engine.averaged_weights()
        # Also after a failure, so that a full disk does not cost a try at every step.
        self._last_save = time.monotonic()
        failure: str | None = None
        if ranks is not None:
            by_rank = {
                f"{rank}/{name}": tensor for rank, tensors in enumerate(ranks) for name, tensor in tensors.items()
            }
            meta = self._meta(progress, finished)
            content = Checkpoint(meta, self.config, weights, optimizer, averaged, by_rank)
            failure = self._write(content, RETRY_SECONDS if last else ())
        # All ranks must learn of it: they raise together, or count the same failures.
        failure = self.group.broadcast(failure)
        if failure is None:
            self._saved = state
            return True
        self.failed_saves += 1
        if last:
            kept = checkpoint.newest_step(self.config.folder)
            raise NotSavedError(
                f"{self.checkpoints}: the last checkpoint, of step {progress.step}, could not be written ({failure}); what remains is "
                f"{f'step {kept}' if kept else 'no checkpoint'}: free space, and run the same command again to resume there"
            )
        return False

    def _write(self, content: Checkpoint, pauses: Sequence[float]) -> str | None:
        """Write on rank 0, and retry after each pause; the reason of the last failure, or None once it is written."""
        for pause in (*pauses, None):
            try:
                self.before_writing()
                checkpoint.write(self.checkpoints, content)
            except OSError as error:
                reason = error.strerror or str(error)
                if pause is None:
                    self._say_once(
                        f"{self.checkpoints}: a checkpoint could not be written ({reason}); the previous one is kept"
                    )
                    return reason
                time.sleep(pause)
            else:
                break
        progress = content.meta.progress
        # Links and removals only after the new checkpoint is on disk.
        self._move_links(progress)
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, progress.best_step, progress.step)
        return None

    def _meta(self, progress: Progress, finished: bool) -> CheckpointMeta:
        averages = self.engine.averages
        return CheckpointMeta(
            progress=replace(progress),
            world_size=self.group.ranks.world_size,
            classes=list(self.train.classes),
            fingerprint=self.train.fingerprint,
            val_fingerprint=self.val.fingerprint,
            loss={name: tensor.flatten().tolist() for name, tensor in self.criterion.state_dict().items()},
            averages_updates=averages.updates if averages else 0,
            loss_scale=astuple(self.engine.loss_scale) if self.engine.loss_scale else None,
            teachers=self._teachers,
            unreadable=dict(sorted((self._unreadable or {}).items())),
            finished=finished,
        )

    def _move_links(self, progress: Progress) -> None:
        for name, step in (("latest", progress.step), ("best", progress.best_step)):
            if step is not None:
                self._link(name, self.checkpoints / checkpoint.step_name(step))

    def _link(self, name: str, target: Path) -> None:
        # The best checkpoint may have been removed by hand.
        if not target.is_dir():
            return
        try:
            checkpoint.set_link(self.checkpoints, name, target)
        except OSError as error:  # some file systems have no links
            self._say_once(f"{self.checkpoints / name}: cannot be moved to {target.name} ({error.strerror})")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            log.warning("%s", text)
        self._said.add(text)

    def _updates_by_part(self, progress: Progress) -> dict[str, int]:
        """Updates of every part of the network since it began to train."""
        first, _ = REGIMES[self.config.model.regime]
        # A part that trains from the second stage on has none of the updates before it.
        return {part: progress.step - (0 if part in first else progress.stage_start) for part in ALL}

    def _rank_tensors(self) -> dict[str, torch.Tensor]:
        random = {f"random/{name}": tensor for name, tensor in random_state().items()}
        return self.engine.rank_state() | random | {"meter": self.meter.state()}

    def _restore_rank(self, ranks: dict[str, torch.Tensor]) -> None:
        prefix = f"{self.group.ranks.rank}/"
        mine = {key.removeprefix(prefix): value for key, value in ranks.items() if key.startswith(prefix)}
        self.engine.load_rank_state(mine)
        self.meter.load_state(mine["meter"])
        random = {key.removeprefix("random/"): value for key, value in mine.items() if key.startswith("random/")}
        set_random_state(random)
