"""The typed description of a run: its schema, and the checks that span fields.

Every field carries a docstring line, which is its help on the command line.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator
from typing_extensions import Self

from dist_train.config.base import Natural, NotNegative, Positive, Section, Seed, Unit, UserPath
from dist_train.config.data import MIXTURE, DataConfig, PartConfig
from dist_train.config.loss import AVERAGED, LossConfig
from dist_train.config.model import (
    NETWORKS,
    AttachedConfig,
    FunctionConfig,
    LibraryConfig,
    ModelConfig,
    MSDNetConfig,
    NetworkConfig,
    ResNetConfig,
)
from dist_train.config.operation import CheckpointConfig, FaultConfig, TrackingConfig
from dist_train.config.optim import OptimConfig, TrainConfig
from dist_train.config.slurm import SlurmConfig
from dist_train.errors import ConfigError

__all__ = [
    "AVERAGED",
    "MIXTURE",
    "NETWORKS",
    "AttachedConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultConfig",
    "FunctionConfig",
    "LibraryConfig",
    "LossConfig",
    "MSDNetConfig",
    "ModelConfig",
    "Natural",
    "NetworkConfig",
    "NotNegative",
    "OptimConfig",
    "PartConfig",
    "Positive",
    "ResNetConfig",
    "Section",
    "Seed",
    "SlurmConfig",
    "TrackingConfig",
    "TrainConfig",
    "Unit",
    "UserPath",
    "accumulation_steps",
    "largest_zero_stage",
]


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = "run"
    """Name of the run: its folder under `runs`, and its name in MLflow."""
    runs: UserPath = Path("runs")
    """Folder of all runs."""
    seed: Seed = 0
    """Seed of the weights, of the order of samples and of the augmentation."""
    data: DataConfig
    model: ModelConfig = MSDNetConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    faults: FaultConfig = FaultConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, given: Any) -> Any:
        """A section with nothing under it, which is null in YAML, has its defaults."""
        if not isinstance(given, dict):
            return given
        fields = ("name", "runs", "seed")
        return {key: {} if value is None and key not in fields else value for key, value in given.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.first_epochs >= self.train.epochs:
            raise ValueError(
                f"model.first_epochs is {self.model.first_epochs}, but train.epochs is {self.train.epochs}, which counts both "
                "stages; raise train.epochs, or lower model.first_epochs"
            )
        if AVERAGED in self.loss.outside_teachers and self.optim.ema_decay is None:
            raise ValueError(
                "loss.outside_teachers has averaged, which is the moving average of the weights, and optim.ema_decay is not set; "
                "set it, such as 0.999"
            )
        if self.optim.exit_gradients == "equilibrium_coarsest" and self.model.name != "msdnet":
            raise ValueError(
                f"optim.exit_gradients is equilibrium_coarsest and model.name {self.model.name}, which has no scales; use "
                "equilibrium, or the network msdnet"
            )
        if self.train.cuda_graphs is True and (why_not := self.why_no_cuda_graphs()):
            raise ValueError(
                f"train.cuda_graphs is true and {why_not}; a recorded network always does the same, at ZeRO 0"
            )
        if self.optim.exit_gradients == "pcgrad":
            # Several backward passes are silently wrong at ZeRO 1 and 2, and a compiled network has one alone.
            for field, allowed in (("zero_stage", ("auto", 0)), ("compile", (False,))):
                if getattr(self.train, field) not in allowed:
                    raise ValueError(
                        f"optim.exit_gradients is pcgrad and train.{field} {getattr(self.train, field)}; pcgrad takes a backward "
                        f"pass per exit, which needs train.zero_stage 0 and train.compile false"
                    )
        return self

    def why_no_cuda_graphs(self) -> str | None:
        """The setting that keeps the network's passes from being recorded as CUDA graphs; None where nothing does."""
        given: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            ("train.zero_stage", self.train.zero_stage, ("auto", 0)),
            ("train.compile", self.train.compile, (False,)),
            ("train.sync_bn", self.train.sync_bn, (False,)),
            ("optim.exit_gradients", self.optim.exit_gradients, ("sum",)),
            ("model.regime", self.model.regime, ("joint",)),
            ("model.activation_checkpointing", getattr(self.model, "activation_checkpointing", False), (False,)),
        )
        return next((f"{name} {value}" for name, value, allowed in given if value not in allowed), None)

    def __repr__(self) -> str:
        """What differs from the defaults, as YAML."""
        return f"Config\n{yaml.safe_dump(self.model_dump(mode='json', exclude_defaults=True), sort_keys=False)}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.runs / self.name


def largest_zero_stage(config: Config) -> int:
    """The largest ZeRO stage that the other settings of a run allow."""
    # PCGrad's backward pass per exit is wrong where gradients are partitioned, and CUDA graphs record fixed addresses.
    if config.optim.exit_gradients == "pcgrad" or config.train.cuda_graphs is True:
        return 0
    # Stage 3 divides the averages, which are a teacher as a whole.
    return 2 if AVERAGED in config.loss.outside_teachers else 3


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Forward passes that every process accumulates per update.

    Raises:
        ConfigError: ``global_batch`` is no multiple of ``micro_batch`` x processes; names the nearest two that are.
    """
    pass_size = train.micro_batch * world_size
    if train.global_batch % pass_size:
        below = train.global_batch // pass_size * pass_size
        nearest = " or ".join(str(size) for size in (below, below + pass_size) if size)
        raise ConfigError(
            f"train.global_batch is {train.global_batch}, which does not divide by micro_batch x processes = "
            f"{train.micro_batch} x {world_size} = {pass_size}; use {nearest}, or another train.micro_batch"
        )
    return train.global_batch // pass_size
