"""The dry run: what a configuration would do on so many processes, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dist_train import checkpoint
from dist_train.config import Config
from dist_train.dist import Ranks
from dist_train.engine import AUTOCAST
from dist_train.errors import UserError
from dist_train.metrics import read_metrics
from dist_train.models import build_model
from dist_train.models.cost import ExitCost, exit_costs
from dist_train.optim import learning_rate, state_names
from dist_train.preflight import preflight

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at a ZeRO stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``print`` it."""

    config: Config
    world_size: int
    problems: list[str] = field(default_factory=list)
    images: int = 0
    classes: int = 0
    passes: int = 0
    steps_per_epoch: int = 0
    costs: Sequence[ExitCost] = ()
    memory: dict[int, Memory] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    resumes: str | None = None
    warning: str | None = None

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.config.train.epochs * self.steps_per_epoch

    def learning_rates(self) -> list[tuple[int, float]]:
        """(step, learning rate) at a few steps over the run."""
        steps = sorted(
            {
                min(self.total_steps - 1, round(share * self.total_steps))
                for share in (0, 0.01, 0.05, 0.25, 0.5, 0.75, 1)
            }
        )
        return [
            (step, learning_rate(self.config.optim, step, self.steps_per_epoch, self.total_steps)) for step in steps
        ]

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(f"cannot run: {problem}" for problem in self.problems)
        train = self.config.train
        lines = [
            f"run       {self.config.folder}" + (f", goes on from {self.resumes}" if self.resumes else ", new"),
            f"data      {self.images} images, {self.classes} classes in {self.config.data.shards}/{self.config.data.train}",
            f"batch     {train.global_batch} = {self.world_size} processes x {self.passes} passes x {train.micro_batch}",
            f"length    {self.total_steps} steps = {train.epochs} epochs x {self.steps_per_epoch}, the incomplete last batch "
            + ("left out" if self.config.data.last_batch == "drop" else "filled up from the epoch's start"),
            "rate      " + "  ".join(f"step {step}: {rate:.3g}" for step, rate in self.learning_rates()),
            f"network   {self.config.model.name}",
            f"{'exit':>8}  {'multiply-adds':>14}  {'parameters':>11}",
        ]
        for number, cost in enumerate(self.costs, start=1):
            lines.append(f"{number:>8}  {f'{cost.macs / 1e6:.2f} M':>14}  {f'{cost.params / 1e6:.3f} M':>11}")
        unit, name = (GIB, "GiB") if max(m.total for m in self.memory.values()) > GIB else (2**20, "MiB")
        lines.append(f"memory    per process in {name}, at {train.precision} and micro batch {train.micro_batch}:")
        lines.append(
            f"{'ZeRO':>8}  {'weights':>8}  {'gradients':>9}  {'optimizer':>9}  {'activations':>11}  {'total':>7}"
        )
        for stage, m in self.memory.items():
            mark = "  <- configured" if stage == train.zero else ""
            parts = (m.weights, m.gradients, m.optimizer, m.activations, m.total)
            widths = (8, 9, 9, 11, 7)
            lines.append(f"{stage:>8}  " + "  ".join(f"{part / unit:>{w}.2f}" for part, w in zip(parts, widths)) + mark)
        lines.append(
            f"checkpoint {self.checkpoint_bytes / 2**20:.1f} MiB each, {self.config.checkpoint.keep} kept and the best one"
        )
        return "\n".join(lines + ([f"warning   {self.warning}"] if self.warning else []))


def plan(config: Config, world_size: int = 1) -> Plan:
    """Check a configuration for that many processes and say what it would do; trains nothing, needs no process group.

    Whatever is wrong with the shards or the configuration is in ``problems`` of the result.
    """
    try:
        ready = preflight(config, Ranks(0, world_size, 0, world_size))
    except UserError as error:
        return Plan(config, world_size, problems=[str(error)])
    model = ready.model
    activations = activation_bytes(config, len(ready.train.classes))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    kept = len(state_names(config.optim)) + 1 + (config.optim.ema is not None)
    return Plan(
        config,
        world_size,
        images=len(ready.train),
        classes=len(ready.train.classes),
        passes=ready.passes,
        steps_per_epoch=ready.steps_per_epoch,
        costs=exit_costs(model, config.data.image_size),
        memory={stage: _memory(numbers, config, stage, world_size, activations) for stage in range(4)},
        checkpoint_bytes=4 * numbers * kept,
        resumes=str(ready.resume.resolve()) if ready.resume else None,
        warning=_lead_time(config),
    )


def _lead_time(config: Config) -> str | None:
    """A warning where SLURM's signal comes later than a step and a save before the end, as far as the run was measured."""
    latest, metrics = config.folder / "checkpoints" / "latest", config.folder / "metrics.jsonl"
    speeds = [
        entry["metrics"]["speed/images_per_second"]
        for entry in (read_metrics(metrics) if metrics.exists() else [])
        if "speed/images_per_second" in entry["metrics"]
    ]
    if not speeds or not latest.exists():
        return None
    step = config.train.global_batch / min(speeds)
    written = [path.stat().st_mtime for path in latest.iterdir()]
    save = max(written) - min(written)
    if step + save <= config.slurm.signal_seconds:
        return None
    return (
        f"a step took up to {step:.1f} s and a save {save:.1f} s, but on SLURM the run is told only "
        f"{config.slurm.signal_seconds} s before its end; raise slurm.signal_seconds"
    )


def activation_bytes(config: Config, num_classes: int) -> int:
    """Bytes that autograd keeps for the backward pass of one micro batch, traced without computing or allocating anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    train = config.train
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(storage)  # or its address would be given to the next one
        return tensor

    with FakeTensorMode():
        network = build_model(config.model, num_classes, config.data.image_size).train()
        images = torch.empty(train.micro_batch, 3, config.data.image_size, config.data.image_size)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", AUTOCAST.get(train.precision), enabled=train.precision != "fp32"):
                network(images)
        for tensor in [*network.parameters(), *network.buffers()]:
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())


def costs_of(path: str | Path) -> list[ExitCost]:
    """Cost of every exit of a run's or a checkpoint's network."""
    _, config = checkpoint.read_state(checkpoint.resolve(path))
    return exit_costs(checkpoint.load_model(path), config.data.image_size)


def _memory(numbers: int, config: Config, stage: int, world_size: int, activations: int) -> Memory:
    share = [1 / world_size if stage >= needed else 1.0 for needed in (3, 2, 1)]
    # Stages 1 and 2 keep a second float32 copy of this rank's share of the weights beside the optimizer's state.
    copies = len(state_names(config.optim)) + (stage > 0)
    averages = 4 * numbers if config.optim.ema is not None else 0
    return Memory(
        weights=int(4 * numbers * share[0]) + averages,
        gradients=int(4 * numbers * share[1]),
        optimizer=int(4 * numbers * copies * share[2]),
        activations=activations,
    )
