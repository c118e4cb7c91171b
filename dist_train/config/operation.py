"""The sections ``checkpoint``, ``tracking`` and ``faults``: how a run is kept, followed and ended."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
)

from dist_train.config.base import Positive, Section


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every_epochs: Positive | None = 1
    """Epochs between checkpoints (null: never by epochs)."""
    every_steps: Positive | None = None
    """Steps between checkpoints, in addition (null: never by steps)."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Minutes between checkpoints, in addition (null: never by time)."""
    keep: Positive = 2
    """Number of recent checkpoints to keep, besides the best."""


class TrackingConfig(Section):
    """Where MLflow gets its copy of the metrics; metrics.jsonl in the run folder is written in any case."""

    uri: str | None = None
    """MLflow's tracking URI (default: the variable MLFLOW_TRACKING_URI, or sqlite in the folder of all runs; off: none)."""
    experiment: str | None = None
    """MLflow's experiment (default: the variable MLFLOW_EXPERIMENT_NAME, or dist_train)."""
    group: str | None = None
    """Name of the variant that the run belongs to, whatever its seed; comparisons show it (a study sets it)."""
    log_every: Positive = 20
    """Steps between log lines."""


class FaultConfig(Section):
    """Fault tolerance."""

    max_nonfinite: Positive = 10
    """Consecutive steps with a non-finite gradient after which the run stops."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Longest time without progress, such as a wait for the other processes, before all processes report to faults/ and end."""
    first_step_minutes: Annotated[float, Field(gt=0)] = 30.0
    """The same until the first step is done: starting on many nodes and compiling take longer."""

    @property
    def group_minutes(self) -> float:
        """Timeout of the process group: late enough that the reports come first."""
        return max(self.timeout_minutes, self.first_step_minutes) + 1
