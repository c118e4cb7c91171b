"""What a run writes besides its checkpoints: the files of its folder, the mirror in MLflow, the lines on the screen."""

from __future__ import annotations

import html
import json
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_train.config import Config
from dist_train.config_file import dump_config
from dist_train.data.split import KeptQuarantine
from dist_train.distributed.group import Group
from dist_train.files import write_whole
from dist_train.tracking.environment import describe_data, describe_environment
from dist_train.tracking.metrics import MetricsFile
from dist_train.tracking.mlflow import ui_command
from dist_train.tracking.progress import Display
from dist_train.tracking.tracker import Tracker
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Progress
from dist_train.training.cuda_graph import takes_cuda_graphs
from dist_train.training.preflight import Preflight
from dist_train.training.resume import ResumePoint
from dist_train.training.validation import Validation, report_json, table

log = logging.getLogger("dist_train")


@dataclass(frozen=True)
class Run:
    """The result of :func:`train`: the run folder, how far it got, and the last validation (None before the first)."""

    folder: Path
    progress: Progress
    finished: bool
    validation: Validation | None

    def __repr__(self) -> str:
        state = "finished" if self.finished else "stopped"
        top1 = f", top-1 % {self.validation.line()}" if self.validation else ""
        return f"Run({self.folder}: {state} at step {self.progress.step}{top1})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    @property
    def best(self) -> Path:
        """The checkpoint with the best mean top-1 over the exits."""
        return checkpoint.find(self.folder)

    @property
    def latest(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / checkpoint.step_name(checkpoint.newest_step(self.folder))


class RunFolder:
    """``config.yaml``, ``env.json``, ``metrics.jsonl`` and ``report.json`` of a run; only rank 0 writes and logs.

    A file that cannot be written is logged, each message once, and training continues.
    """

    def __init__(self, config: Config, ready: Preflight, group: Group, total_steps: int) -> None:
        self.path = config.folder
        self.display = Display(total_steps, group.ranks.rank)
        self.tracker: Tracker | None = None
        self._config, self._ready, self._group = config, ready, group
        self._is_writer = group.ranks.rank == 0
        self._quarantine = KeptQuarantine(self.path)
        self._metrics = MetricsFile(self.path / "metrics.jsonl")
        self._said: set[str] = set()
        self._pending: list[Callable[[], None]] = []
        """What is still to be written before anything else is, in this order."""

    def begin(
        self, progress: Progress, validates: bool, resume: ResumePoint | None, notes: Sequence[str | None]
    ) -> None:
        """Write what the run is, drop the metrics that will be measured again, start the mirror, say what begins.

        All ranks must call.  ``validates``: the first thing to do is a validation (see :meth:`MetricsFile.rewind`).
        """
        # A collective, so it comes before the ranks other than 0 return.
        hosts = self._group.gather(socket.gethostname())
        if hosts is None:
            return
        data = describe_data(self._ready.train, self._ready.val)
        environment = replace(describe_environment(self._group.ranks, hosts), data=data)

        # The progress moves on, and this may be written later.
        batch = progress.batch

        def write() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            # Before anything is appended: lines after the checkpoint will be measured again.
            self._metrics.rewind(batch, validates)
            write_whole(self.path / "config.yaml", dump_config(self._config))
            write_whole(self.path / "env.json", environment.json())
            self._quarantine.keep(self._ready.train, self._ready.val)

        self._pending.append(write)
        self._try(self.flush)
        # After config.yaml is there: the mirror reads the files, not this object.
        self.tracker = Tracker(self._config, environment.tags)
        self._announce(progress, resume, notes)

    @property
    def has_report(self) -> bool:
        """Whether there is a report.json that can be read."""
        return self._report() is not None

    def log(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Append a line of metrics; one that cannot be written is kept for :meth:`flush`."""
        if self._is_writer:
            self._metrics.add(progress.step, progress.batch, metrics)
            self._try(self.flush)

    def flush(self) -> None:
        """Write what could not be written before, on rank 0; raises OSError where that fails again."""
        while self._pending:
            self._pending[0]()
            # Only once it is written: after a failure it comes first again.
            del self._pending[0]
        self._metrics.flush()

    def log_validation(self, progress: Progress, epoch: int, validation: Validation, best: bool) -> None:
        """Append a validation's metrics, and say its line."""
        self.log(progress, validation.metrics("val"))
        if self._is_writer:
            log.info("epoch %d  val top-1 %%  %s%s", epoch, validation.line(), "  (best)" if best else "")

    def write_report(self, progress: Progress, validation: Validation) -> None:
        """Write report.json with the exits of the last validation."""
        split, data = self._config.data.val, self._ready.val.fingerprint
        text = report_json(validation, self._ready.costs, progress.step, split, data)
        if self._is_writer:
            # Where the disk is full, it is written before a checkpoint that says that the run is finished.
            self._pending.append(lambda: write_whole(self.path / "report.json", text))
            self._try(self.flush)

    def say_earlier_result(self, progress: Progress) -> None:
        """Say that the run had ended before, and the result that its report.json has, if there is one."""
        if self._is_writer:
            log.info(
                "%s was already complete at step %d; set more train.epochs, or another --name", self.path, progress.step
            )
            if (report := self._report()) is not None:
                self.say_result(Validation.of_report(report))

    def say_result(self, validation: Validation) -> None:
        """Say the table of the exits, and where everything is."""
        if self._is_writer:
            costs, classes = self._ready.costs["multiply_adds"], len(self._ready.train.classes)
            log.info("\n%s\n\nrun folder  %s", table(validation, costs, classes), self.path)
        if self.tracker and self.tracker.uri:
            log.info("in MLflow   %s", ui_command(self.tracker.uri))

    def close(self, status: str, timeout: float = 30.0) -> None:
        """End the mirror with MLflow's status of the run."""
        if self.tracker:
            self.tracker.close(status, timeout)

    def _report(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / "report.json").read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and "exits" in content else None

    def _announce(self, progress: Progress, resume: ResumePoint | None, notes: Sequence[str | None]) -> None:
        train, ready = self._config.train, self._ready
        log.info(
            "%s: %d images, %d classes, %d exits; global batch %d = %d process%s x %d accumulation step%s x %d; %s, ZeRO %s, %s",
            self.path,
            len(ready.train),
            len(ready.train.classes),
            ready.model.num_exits,
            train.global_batch,
            self._group.ranks.world_size,
            "es" if self._group.ranks.world_size != 1 else "",
            ready.accumulation_steps,
            "s" if ready.accumulation_steps != 1 else "",
            train.micro_batch,
            train.precision,
            f"{ready.zero_stage} ({train.zero_stage})" if train.zero_stage == "auto" else ready.zero_stage,
            self._group.device.type
            + (" with CUDA graphs" if takes_cuda_graphs(self._config, ready.zero_stage, self._group.device) else ""),
        )
        left_out = [*ready.train.quarantine_notes, *ready.val.quarantine_notes]
        for note in (*left_out, *self._quarantine.changes(ready.train, ready.val), *notes):
            if note:
                log.info("%s", note)
        if resume:
            epoch = progress.batch / ready.steps_per_epoch
            log.info("resumed from %s: step %d, epoch %.2f", resume.path, progress.step, epoch)
            for change in resume.changes:
                log.info("changed since then: %s", change)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            text = f"{error.filename or self.path}: cannot be written ({error.strerror}); training continues"
            if text not in self._said:
                log.warning("%s", text)
            self._said.add(text)
