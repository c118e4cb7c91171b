"""The training loop: from a configuration to a trained network, going on where an earlier start of the same run ended."""

from __future__ import annotations

import copy
import functools
import logging
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from dist_train import checkpoint
from dist_train.checkpoint import Position, Snapshot, State
from dist_train.config import Config
from dist_train.config_file import dump_config
from dist_train.data.pipeline import GlobalBatch, Loader
from dist_train.dist import Group, Ranks
from dist_train.engine import Engine, Update
from dist_train.environment import describe_data, describe_environment
from dist_train.errors import TrainingError, UserError
from dist_train.evaluation import Evaluation, Evaluator, table, write_report
from dist_train.health import NonFinite, StopRequests
from dist_train.loss import ExitDistillation
from dist_train.metrics import Meter, MetricsFile, Stopwatch
from dist_train.models.cost import cost_columns, exit_costs
from dist_train.optim import learning_rate
from dist_train.preflight import Preflight, preflight
from dist_train.progress import Display, set_up_logging
from dist_train.tracking import Tracker, ui_command
from dist_train.watch import JOIN, Watch

log = logging.getLogger("dist_train")


@dataclass(frozen=True)
class Run:
    """What :func:`train` leaves: the run folder, how far it got, and the last evaluation (None before the first)."""

    folder: Path
    position: Position
    finished: bool
    evaluation: Evaluation | None

    @property
    def best(self) -> Path:
        """The checkpoint with the best mean top-1 over the exits."""
        return self.folder / "checkpoints" / "best"

    @property
    def latest(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "latest"


def train(config: Config) -> Run:
    """Train on all ranks of the environment (one, without a launcher); the same call again resumes.

    Raises:
        UserError: something in the configuration, the shards or the run folder is wrong; see the message.
        TrainingError: training cannot go on; the last checkpoint is whole.
    """
    ranks = Ranks.from_env()
    if ranks.device.type == "cpu":
        ranks.pin()
    torch.set_num_threads(ranks.threads)
    watch = Watch(config.faults, config.folder, ranks.rank, ranks.world_size)
    checkpoint.seed_random(config.seed)
    ready = preflight(config, ranks)
    set_up_logging(ranks.rank, config.folder)
    with watch, StopRequests() as requests:
        watch.enter(JOIN)
        group = Group(ranks, config.faults.group_minutes, watch.enter)
        return Trainer(config, ready, group, requests, watch).run()


class Trainer:
    """One run on one rank; every method is called on all ranks together."""

    def __init__(self, config: Config, ready: Preflight, group: Group, requests: StopRequests, watch: Watch) -> None:
        self.config = config
        self.group = group
        self.requests = requests
        self.watch = watch
        self.rank = group.ranks.rank
        self.steps_per_epoch = ready.steps_per_epoch
        self.total_batches = config.train.epochs * ready.steps_per_epoch
        self.passes = ready.passes
        self.index, self.val_data = ready.train, ready.val.fingerprint
        self.costs = exit_costs(ready.model, config.data.image_size)
        self.position = Position()
        self.evaluation: Evaluation | None = None
        self._said: set[str] = set()

        path = self.group.broadcast(checkpoint.newest(config.folder / "checkpoints") if self.rank == 0 else None)
        snapshot = checkpoint.read(path) if path else None
        if snapshot:
            ready.model.load_state_dict(snapshot.model)
        self.criterion = ExitDistillation.from_config(config.loss, cast(int, ready.model.num_exits)).to(group.device)
        group.enter("DALI")
        self.evaluator = Evaluator(
            copy.deepcopy(ready.model),
            Loader.of_run(config, ready.val, config.data.val, group, train=False),
            group,
            self.criterion,
            config.train.precision,
        )
        group.enter("DeepSpeed")
        self.engine = Engine(ready.model, config, group)
        group.enter("restoring")
        self.meter = Meter(self.criterion.num_exits, group)
        self.stopwatch = Stopwatch(group.device)
        checkpoint.seed_random(config.seed + 1 + self.rank)
        if snapshot:
            self._restore(snapshot)
        self.nonfinite = NonFinite(config.faults.max_nonfinite, self.position.nonfinite)
        group.enter("DALI")
        self.loader = Loader.of_run(config, ready.train, config.data.train, group, train=True)
        self.metrics = MetricsFile(config.folder / "metrics.jsonl")
        self.tracker: Tracker | None = None
        hosts = group.gather(socket.gethostname())
        if hosts is not None:
            self.environment = replace(
                describe_environment(group.ranks, hosts), data=describe_data(ready.train, ready.val)
            )
            self._open_folder()
            self.tracker = Tracker(config, self.environment.tags)
            watch.at_end = functools.partial(self.tracker.close, "FAILED", timeout=10)
        self._last_save = time.monotonic()
        self._saved_batch = self.position.batch if snapshot else -1
        self._saved_path = path if self.rank == 0 else None
        self._announce(ready, path)

    def run(self) -> Run:
        """Train to the end, or to the next step boundary after a request to stop."""
        status = "FAILED"
        try:
            with Display(
                min(self.total_batches, self.config.train.max_steps or self.total_batches), self.rank
            ) as self.display:
                stopped = False
                while not stopped:
                    if self.position.batch and (self.position.batch % self.steps_per_epoch == 0 or self._at_end()):
                        stopped = self._end_epoch()
                    if stopped or self._at_end():
                        break
                    stopped = self._train_epoch()
            if not stopped and self.evaluation is None and self._report_is_missing():
                self.evaluation = self.evaluator.run(self._evaluated_weights())
            status = "RUNNING" if stopped else "FINISHED"
            return self._close(finished=not stopped)
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except UserError:
            raise
        except Exception as error:
            self.watch.fail(error)
            raise
        finally:
            self.loader.close()
            self.evaluator.loader.close()
            if self.tracker:
                self.tracker.close(status)

    # --------------------------------------------------------------------------------------------- the loop

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch; true if the run must stop now."""
        epoch, start = divmod(self.position.batch, self.steps_per_epoch)
        self.engine.train_mode(epoch)
        for batch in self.loader.epoch(epoch, start_batch=start):
            self._train_step(batch)
            if self.position.batch % self.config.tracking.log_every == 0:
                self._log_training()
            stop, save = self.group.agree(self.requests.received is not None, self._save_due())
            if stop or save:
                self._save()
            if stop:
                return True
            if self._at_end():
                break
        return False

    def _train_step(self, batch: GlobalBatch) -> None:
        """One global batch: its micro batches forward and backward, one update, one move of the temperature."""
        rate = self._learning_rate()
        # Averaged over ranks and passes, label terms divided by this give the mean over the labeled images.
        labeled = max(1, batch.labeled) / (self.group.ranks.world_size * self.passes)
        confidence = torch.zeros(2, device=self.group.device)
        update: Update | None = None
        self.group.enter("wait for data")
        waiting_since = time.perf_counter()
        total = torch.zeros((), device=self.group.device)
        for number, micro in enumerate(batch, start=1):
            waited = time.perf_counter() - waiting_since
            self.group.enter("forward pass")
            with self.stopwatch:
                logits = self.engine.forward(micro.images)
                loss, stats = self.criterion(logits, micro.targets, labeled=labeled)
            self.stopwatch.add(waited)
            self.group.enter("backward pass")
            self.engine.backward(loss)
            confidence += torch.stack([stats.confidence, stats.samples])
            self.meter.add(stats.vector, loss, len(micro.ids), waited)
            last = number == self.passes
            self.group.enter("update")
            update = self.engine.update(rate if last else None)
            total += loss.detach()
            self.group.enter("wait for data")
            waiting_since = time.perf_counter()
        assert update is not None
        self.update = update
        self.position.batch += 1
        if update.applied:
            self.position.step += 1
            if self.criterion.needs_confidence:
                self.group.sum(confidence)
            self.criterion.end_batch(confidence)
        self._check_update(update, total)
        self.watch.step(self.position.step, self.position.batch)
        self.display.step(self.position.batch)

    def _check_update(self, update: Update, loss: torch.Tensor) -> None:
        """Count an update; say which rank's loss is to blame for a refused one, and give up after too many."""
        self.nonfinite.note(update.applied)
        self.position.nonfinite = self.nonfinite.total
        if update.applied:
            return
        where = self.group.gather(bool(torch.isfinite(loss)))
        if where is not None:
            ranks = [str(rank) for rank, fine in enumerate(where) if not fine]
            source = f"the loss of rank {', '.join(ranks)} is not finite" if ranks else "every rank's loss is finite"
            log.warning(
                "step %d (batch %d): the gradient is not finite (%s); update refused, %d in all",
                self.position.step, self.position.batch, source, self.nonfinite.total,
            )  # fmt: skip
        self.nonfinite.check(self.position.step)

    def _end_epoch(self) -> bool:
        """Evaluate and save where one of them is due, once for a batch; true if the run must stop before it is done."""
        epoch, best = self._epochs_begun(), False
        if self._evaluation_is_due():
            self.evaluation = self.evaluator.run(self._evaluated_weights(), lambda: self.requests.received is not None)
            if self.evaluation is None:
                self._save()
                return True
            self.position.evaluated = self.position.batch
            score = self.evaluation.mean_top1
            best = self.position.best_score is None or score > self.position.best_score
            if best:
                self.position.best_score, self.position.best_step = score, self.position.step
            self._log(self.evaluation.metrics("val"))
            if self.rank == 0:
                log.info("epoch %d  val top-1 %%  %s%s", epoch, self.evaluation.line(), "  (best)" if best else "")
        every = self.config.checkpoint.every_epochs
        if best or self._at_end() or (every and epoch % every == 0):
            self._save(best)
        return False

    def _epochs_begun(self) -> int:
        return -(-self.position.batch // self.steps_per_epoch)

    def _evaluation_is_due(self) -> bool:
        """Whether this batch ends the run, or an epoch after which there is an evaluation, and has not had it."""
        at_boundary = self._at_end() or self.position.batch % self.steps_per_epoch == 0
        wanted = self._at_end() or self._epochs_begun() % self.config.train.eval_every == 0
        return at_boundary and wanted and 0 < self.position.batch != self.position.evaluated

    def _evaluated_weights(self) -> dict[str, torch.Tensor]:
        return self.engine.averaged_weights() or self.engine.weights()

    def _report_is_missing(self) -> bool:
        """Whether an earlier start was ended after its last checkpoint and before its report."""
        return self.group.broadcast(self.rank == 0 and not (self.config.folder / "report.json").exists())

    # ------------------------------------------------------------------------------------------- checkpoints

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint; what cannot be written is said, and training goes on."""
        folder = self.config.folder / "checkpoints"
        if self._saved_batch == self.position.batch:
            if best and self._saved_path:
                self._point(folder, "best", self._saved_path)
            return
        ranks = self.group.gather(self._rank_tensors())
        self.group.enter("checkpoint")
        weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
        averaged = self.engine.averaged_weights()
        self._last_save, self._saved_batch, self._saved_path = time.monotonic(), self.position.batch, None
        if ranks is None:
            return
        averages = self.engine.averages
        state = State(
            position=replace(self.position),
            world_size=self.group.ranks.world_size,
            classes=list(self.index.classes),
            fingerprint=self.index.fingerprint,
            loss={name: tensor.flatten().tolist() for name, tensor in self.criterion.state_dict().items()},
            averages_updates=averages.updates if averages else 0,
            mlflow_run=self.tracker.run_id if self.tracker else None,
        )
        by_rank = {f"{rank}/{name}": tensor for rank, tensors in enumerate(ranks) for name, tensor in tensors.items()}
        try:
            path = checkpoint.write(folder, Snapshot(state, self.config, weights, optimizer, averaged, by_rank))
        except OSError as error:
            self._say_once(
                f"{folder}: a checkpoint could not be written ({error}); the last whole one stays, training goes on"
            )
            return
        self._saved_path = path
        self._point(folder, "latest", path)
        if best:
            self._point(folder, "best", path)
        checkpoint.prune(folder, self.config.checkpoint.keep)

    def _point(self, folder: Path, name: str, path: Path) -> None:
        try:
            checkpoint.point(folder, name, path)
        except OSError as error:
            self._say_once(f"{folder / name}: cannot be moved to {path.name} ({error.strerror}); training goes on")

    def _rank_tensors(self) -> dict[str, torch.Tensor]:
        random = {f"random/{name}": tensor for name, tensor in checkpoint.random_state().items()}
        return self.engine.rank_state() | random | {"meter": self.meter.state()}

    def _restore(self, snapshot: Snapshot) -> None:
        self.position = snapshot.state.position
        self.engine.load_optimizer_state(snapshot.optimizer, self.position.step)
        for name, tensor in self.criterion.state_dict().items():
            tensor.copy_(torch.tensor(snapshot.state.loss[name], dtype=tensor.dtype).view(tensor.shape))
        if snapshot.averaged is not None and self.engine.averages is not None:
            self.engine.load_averages(snapshot.averaged, snapshot.state.averages_updates)
        if snapshot.state.world_size == self.group.ranks.world_size:
            prefix = f"{self.rank}/"
            mine = {k.removeprefix(prefix): v for k, v in snapshot.ranks.items() if k.startswith(prefix)}
            self.engine.load_rank_state(mine)
            self.meter.load_state(mine["meter"])
            random = {k.removeprefix("random/"): v for k, v in mine.items() if k.startswith("random/")}
            checkpoint.set_random_state(random)

    def _save_due(self) -> bool:
        every, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        by_time = minutes is not None and time.monotonic() - self._last_save > 60 * minutes
        return by_time or bool(every and self.update.applied and self.position.step % every == 0)

    # ------------------------------------------------------------------------------------- words and numbers

    def _log_training(self) -> None:
        metrics = self.meter.take(self.stopwatch.take())
        metrics |= {
            "train/temperature": float(self.criterion.temperature.mean()),
            "train/learning_rate": self._learning_rate(self.position.step - 1),
            "train/gradient_norm": self.update.gradient_norm,
            "train/refused_updates": float(self.nonfinite.total),
            "train/epoch": self.position.batch / self.steps_per_epoch,
            "train/unreadable_images": float(self._unreadable()),
        }
        self._log(metrics)
        if self.rank == 0:
            self.display.metrics(self.position.batch, metrics["train/epoch"], metrics)

    def _unreadable(self) -> int:
        """Images that could not be read so far, over all ranks; raises TrainingError where they are more than allowed."""
        count = int(self.group.sum(torch.tensor(len(self.loader.bad), device=self.group.device)))
        if count > self.config.data.max_bad:
            raise TrainingError(
                f"{count} images cannot be read, data.max_bad is {self.config.data.max_bad}; log/rank*.txt names them: mend "
                "the shards, or raise it"
            )
        return count

    def _log(self, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            try:
                self.metrics.append(self.position.step, self.position.batch, metrics)
            except OSError as error:
                self._say_once(f"{self.metrics.path}: cannot be written ({error.strerror}); training goes on")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            log.warning("%s", text)
        self._said.add(text)

    def _learning_rate(self, step: int | None = None) -> float:
        step = self.position.step if step is None else max(0, step)
        return learning_rate(self.config.optim, step, self.steps_per_epoch, self.total_batches)

    def _at_end(self) -> bool:
        limit = self.config.train.max_steps
        return self.position.batch >= self.total_batches or (limit is not None and self.position.step >= limit)

    def _open_folder(self) -> None:
        folder = self.config.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics.rewind(self.position.batch, evaluates=self._evaluation_is_due())
            (folder / "config.yaml").write_text(dump_config(self.config))
            (folder / "env.json").write_text(self.environment.json())
        except OSError as error:
            self._say_once(f"{folder}: cannot be written ({error.strerror}); training goes on")

    def _announce(self, ready: Preflight, resumed: Path | None) -> None:
        if self.rank:
            return
        train, ranks = self.config.train, self.group.ranks
        log.info(
            "%s: %d images, %d classes, %d exits; global batch %d = %d processes x %d passes x %d; %s, ZeRO %d, %s",
            self.config.folder, len(ready.train), len(ready.train.classes), self.criterion.num_exits, train.global_batch,
            ranks.world_size, self.passes, train.micro_batch, train.precision, train.zero, self.group.device.type,
        )  # fmt: skip
        for index in (ready.train, ready.val):
            if index.left_out:
                log.info("%s", index.quarantine_note)
        if self.loader.order and (note := self.loader.order.summary()):
            log.info("%s", note)
        if resumed:
            log.info(
                "resumed from %s: step %d, epoch %.2f",
                resumed,
                self.position.step,
                self.position.batch / self.steps_per_epoch,
            )
            for change in ready.changes:
                log.info("changed since then: %s", change)

    def _close(self, finished: bool) -> Run:
        self.group.agree(finished)  # a launcher ends the others when one leaves: not before the checkpoint is written
        run = Run(self.config.folder, self.position, finished, self.evaluation)
        if self.rank:
            return run
        if not finished:
            assert self.requests.received is not None
            name = self.requests.received.name
            log.info("stopped by %s at step %d, saved; the same command goes on", name, self.position.step)
        elif self.evaluation is None:
            log.info(
                "%s was complete at step %d already; more train.epochs, or another --name?",
                run.folder,
                self.position.step,
            )
        else:
            self._report(self.evaluation)
        return run

    def _report(self, evaluation: Evaluation) -> None:
        folder = self.config.folder
        try:
            costs = cost_columns(self.evaluator.model, self.config.data.image_size)
            val = self.config.data.val
            write_report(folder / "report.json", evaluation, costs, self.position.step, val, self.val_data)
        except OSError as error:
            self._say_once(f"{folder / 'report.json'}: cannot be written ({error.strerror})")
        log.info("\n%s\n\nrun folder  %s", table(evaluation, self.costs), folder)
        if self.tracker and self.tracker.uri:
            log.info("in MLflow   %s", ui_command(self.tracker.uri))
