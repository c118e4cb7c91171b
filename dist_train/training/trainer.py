"""The training loop: from a configuration to a trained network, resuming an earlier start of the same run."""

from __future__ import annotations

import copy
import functools
import logging

import torch

from dist_train.config import AVERAGED, Config
from dist_train.data.pipeline import GlobalBatch, Loader
from dist_train.distributed.group import Group
from dist_train.distributed.watchdog import Watchdog
from dist_train.loss import ExitDistillation
from dist_train.models.parts import WITHOUT_EARLY_EXITS, trained_parts
from dist_train.precision import emulation_warning
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Checkpoint, Progress
from dist_train.training.checkpointer import Checkpointer
from dist_train.training.determinism import explain_nondeterministic_operations
from dist_train.training.engine import Engine, Update
from dist_train.training.epoch_end import EpochEnd
from dist_train.training.health import SkippedSteps, StopRequests, end_without_gpu, works
from dist_train.training.memory import explain_out_of_memory, peak_memory
from dist_train.training.meter import Meter, StepClock
from dist_train.training.outside_teachers import OutsideTeachers, share_averages
from dist_train.training.preflight import Preflight, load_first_weights
from dist_train.training.random_state import seed_random
from dist_train.training.resume import ResumePoint, resume_point
from dist_train.training.run_folder import Run, RunFolder
from dist_train.training.schedule import Schedule
from dist_train.training.validation import Validator

log = logging.getLogger("dist_train")


class Trainer:
    """One run on one rank; every method is called on all ranks together."""

    def __init__(
        self, config: Config, ready: Preflight, group: Group, requests: StopRequests, watchdog: Watchdog
    ) -> None:
        self.config, self.group, self.requests, self.watchdog = config, group, requests, watchdog
        self.ready = ready
        self.rank = group.ranks.rank
        self.schedule = Schedule(config, ready.steps_per_epoch)
        self.progress = Progress()
        self.update = Update(applied=True, gradient_norm=float("nan"))
        self.learning_rate = float("nan")

        resume, loaded = self._load_weights()
        self.criterion = ExitDistillation.from_config(config.loss, ready.model.num_exits).to(group.device)
        group.phase("DALI")
        loader = Loader.of_run(config, ready.val, group, split=config.data.val)
        self.validator = Validator(copy.deepcopy(ready.model), loader, group, self.criterion, config.train.precision)
        group.phase("DeepSpeed")
        # Copied before ZeRO partitions the parameters.
        averaged = copy.deepcopy(ready.model) if AVERAGED in config.loss.outside_teachers else None
        self.engine = Engine(ready.model, config, group)
        if averaged is not None and self.engine.averages is not None:
            share_averages(averaged, self.engine.averages.tensors)
        group.phase("outside teachers")
        # A finished run needs no teachers, and is not to fail without them.
        names = () if loaded and self.schedule.at_end(loaded.meta.progress) else config.loss.outside_teachers
        self.outside_teachers = OutsideTeachers(names, config, ready.train.classes, group, averaged)
        self.meter = Meter(self.criterion.num_exits, group)
        self.clock = StepClock(group)
        self.checkpointer = Checkpointer(
            config, ready, group, self.engine, self.criterion, self.meter, self.outside_teachers.fingerprints
        )
        # From here on the ranks draw different numbers: dropout must not be the same on all of them.
        seed_random(config.seed + 1 + self.rank)
        if resume and loaded:
            group.phase("restoring")
            self.progress = self.checkpointer.restore(resume, loaded)
        self.skipped_steps = SkippedSteps(group, config.faults.max_nonfinite)
        group.phase("DALI")
        self.loader = Loader.of_run(config, ready.train, group)
        self.checkpointer.attach(self.loader.bad)
        self.run_folder = RunFolder(config, ready, group, self.schedule.batches)
        # Metrics up to a checkpoint must be on disk before it: a resumed run does not measure them again.
        self.checkpointer.before_writing = self.run_folder.flush
        order = self.loader.order.summary() if self.loader.order else None
        slow = emulation_warning(config.train.precision, group.device.type)
        self.run_folder.begin(self.progress, self.schedule.validation_is_due(self.progress), resume, [order, slow])
        watchdog.at_end = functools.partial(self.run_folder.close, "FAILED", timeout=10)
        had_ended = loaded is not None and loaded.meta.finished
        self.epoch_end = EpochEnd(
            group,
            self.schedule,
            self.engine,
            self.validator,
            self.checkpointer,
            self.run_folder,
            requests,
            had_ended=had_ended,
        )
        self.save_is_due = False
        """Whether a checkpoint was due with the last batch."""

    def _load_weights(self) -> tuple[ResumePoint | None, Checkpoint | None]:
        """Give the network the weights that it begins with; the checkpoint that they are from, if it is resumed."""
        ready, model = self.ready, self.ready.model
        # Rank 0 decides for all, and the checkpoint that it has checked is the one that is loaded.
        resume = self.group.on_rank0(lambda: resume_point(self.config, ready.train, ready.val))
        log.info("starting %s: loading DALI and DeepSpeed; the first step comes after that", self.config.folder)
        if resume is None:
            load_first_weights(self.config, model)
            return None, None
        loaded = checkpoint.read(resume.path)
        checkpoint.load_weights(model, loaded.model, resume.path)
        return resume, loaded

    def run(self) -> Run:
        """Train to the end, or to the next step boundary after a request to stop."""
        status, stopped = "FAILED", False
        try:
            out_of_memory = explain_out_of_memory(self.config, self.group)
            with self.run_folder.display, out_of_memory, explain_nondeterministic_operations():
                while not stopped:
                    # First, because a start that resumes at the end of an epoch may owe its validation.
                    if self.schedule.at_boundary(self.progress):
                        stopped = self.epoch_end.run(self.progress, self.save_is_due)
                    if stopped or self.schedule.at_end(self.progress):
                        break
                    stopped = self._train_epoch()
            # After a stop the run stays RUNNING in MLflow: the next start continues it.
            status = "RUNNING" if stopped else "FINISHED"
            return self._close(finished=not stopped)
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except Exception as error:
            # Before anything is closed, which may wait for a server: the other ranks wait for this report.
            self.watchdog.fail(error)
            if not works(self.group.device):
                self.run_folder.close(status)
                end_without_gpu(error)
            raise
        finally:
            self.close(status)

    def close(self, status: str) -> None:
        """Stop reading, and set MLflow's status of the run; after a stop that is RUNNING, since the next start continues it."""
        self.loader.close()
        self.validator.loader.close()
        self.run_folder.close(status)

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch; true if the run must stop now."""
        epoch, start = divmod(self.progress.batch, self.ready.steps_per_epoch)
        trained = trained_parts(self.config.model, epoch)
        self.engine.train_mode(trained)
        self.criterion.use_last_exit_alone(trained == WITHOUT_EARLY_EXITS)
        for batch in self.loader.epoch(epoch, start_batch=start):
            if self.step(batch):
                return True
            if self.schedule.at_end(self.progress):
                break
        return False

    def step(self, batch: GlobalBatch) -> bool:
        """Train on one global batch, log and save where that is due; true if the run must stop now."""
        confidence, loss = self._accumulate(batch)
        # A signal reaches the ranks at different steps: they agree, so that all of them save after the same one.  The vote
        # starts here and is read after the update, so it overlaps GPU work.
        finish_vote = self.group.vote(self.requests.reason is not None, self.checkpointer.due_by_time)
        self._update(confidence, loss)
        # The last steps are logged too: a run of fewer than log_every steps would say nothing about its training.
        if self.progress.batch % self.config.tracking.log_every == 0 or self.schedule.at_end(self.progress):
            self._log_training()
        stop, due_by_time = finish_vote()
        self.save_is_due = due_by_time or self.checkpointer.due_by_steps(self.progress, self.update.applied)
        # At the end of an epoch the checkpoint follows the validation, whose result it keeps.
        if stop or (self.save_is_due and not self.schedule.at_boundary(self.progress)):
            self.checkpointer.save(self.progress, last=stop)
        return stop

    def _accumulate(self, batch: GlobalBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward over this rank's micro batches: the gradient, averaged over all of them and the ranks.

        Returns:
            [sum of the teacher's confidence, number of images], for the temperature; and the loss of this rank.
        """
        steps, device = self.ready.accumulation_steps, self.group.device
        # Averaged over ranks and micro batches, label terms divided by this give the mean over the labeled images.
        labeled = max(1, batch.labeled) / (self.group.ranks.world_size * steps)
        # Both sums stay on the device: reading one here would wait for all that is queued, in every micro batch.
        confidence, total = torch.zeros(2, device=device), torch.zeros((), device=device)
        for number, micro in enumerate(self.clock.waiting_for(batch), start=1):
            with self.clock.computing():
                logits = self.engine.forward(micro.images)
                taught = self.criterion.needs_outside
                outside = self.outside_teachers.logits(micro.images, logits[0].dtype) if taught else ()
                loss, stats = self.criterion(logits, micro.targets, labeled=labeled, passes=steps, outside=outside)
            self.engine.backward(loss)
            # The loss is divided by the passes, so that gradients add up to their mean; the undivided loss is logged.
            self.meter.add(stats.vector, loss.detach() * steps, len(micro.ids))
            confidence += torch.stack([stats.confidence, stats.samples])
            total += loss.detach()
            if number < steps:
                self.engine.next_micro_batch()
        return confidence, total

    def _update(self, confidence: torch.Tensor, loss: torch.Tensor) -> None:
        """Update the weights with the accumulated gradient, and move on: progress, temperature, stage, watchdog."""
        progress = self.progress
        self.learning_rate = self.schedule.learning_rate(progress)
        update = self.engine.update(self.learning_rate, progress.batch)
        self.update = update
        progress.batch += 1
        # A skipped step moves neither the learning rate nor the temperature; its batch is consumed all the same.
        if update.applied:
            progress.step += 1
            if self.criterion.needs_confidence:
                self.group.sum(confidence)
            self.criterion.end_batch(confidence)
        self.schedule.begin_stage(progress)
        self.skipped_steps.count(update.applied, loss, progress, self.engine.loss_scale)
        self.skipped_steps.check(progress)
        self.watchdog.step(progress.step, progress.batch)
        self.run_folder.display.step(progress.batch)

    def _log_training(self) -> None:
        metrics = self.meter.reduce_and_reset(self.clock)
        metrics |= {
            "train/temperature": float(self.criterion.temperature.mean()),
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.update.gradient_norm,
            "train/skipped_steps": float(self.progress.skipped_steps),
            "train/epoch": self.progress.batch / self.ready.steps_per_epoch,
            "train/failed_saves": float(self.checkpointer.failed_saves),
            # A collective: where they are too many, all ranks stop at the same step.
            "train/unreadable_images": float(self.loader.bad.count(self.group)),
        }
        if self.engine.projected_gradients is not None:
            metrics |= self.engine.projected_gradients.metrics()
        metrics["memory/peak_gib"] = peak_memory(self.group.device)
        if self.engine.loss_scale is not None:
            metrics["train/loss_scale"] = self.engine.loss_scale.value
        self.run_folder.log(self.progress, metrics)
        self.run_folder.display.metrics(self.progress.batch, metrics["train/epoch"], metrics)

    def _close(self, finished: bool) -> Run:
        # Wait for all: a rank that exits closes its connections, and after a stop (exit code 75) the launcher kills the
        # others, while a slower rank may still be learning how the last save went.
        self.group.any_rank(finished)
        validation = self.epoch_end.validation
        if finished and validation:
            self.run_folder.say_result(validation)
        elif finished:
            self.run_folder.say_earlier_result(self.progress)
        elif self.rank == 0:
            reason = self.requests.reason or "a request on another rank"
            log.info(
                "stopped by %s at step %d, saved; run the same command again to resume", reason, self.progress.step
            )
        return Run(self.run_folder.path, self.progress, finished, validation)
