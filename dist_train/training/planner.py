"""The dry run: what a configuration would do on a number of processes, without training."""

from __future__ import annotations

import copy
import html
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from dist_train.checks import check_kind
from dist_train.config import Config, DataConfig
from dist_train.config_file import plain
from dist_train.distributed.group import Ranks
from dist_train.errors import UserError
from dist_train.models import build_model
from dist_train.models.cost import ExitCost, exit_costs
from dist_train.precision import AUTOCAST, emulation_warning
from dist_train.tracking.metrics import read_metrics
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Progress
from dist_train.training.memory import Memory, estimate, gpu_memory
from dist_train.training.optim import state_names
from dist_train.training.outside_teachers import teacher_bytes
from dist_train.training.preflight import check_processes
from dist_train.training.resume import has_ended
from dist_train.training.schedule import Schedule

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``print`` it."""

    config: Config
    world_size: int
    problems: list[str] = field(default_factory=list)
    images: int = 0
    classes: int = 0
    accumulation_steps: int = 0
    steps_per_epoch: int = 0
    costs: Sequence[ExitCost] = ()
    memory: dict[int, Memory] = field(default_factory=dict)
    zero_stage: int = 0
    """As configured, or as it would be chosen."""
    card: int | None = None
    """Bytes of the smallest GPU here, None without one."""
    checkpoint_bytes: int = 0
    resumes: str | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

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
        schedule, rates = Schedule(self.config, self.steps_per_epoch), []
        for step in steps:
            start = schedule.first_batches if step >= schedule.first_batches else 0
            # As if no update is skipped: steps are batches then.
            rates.append((step, schedule.learning_rate(Progress(step=step, batch=step, stage_start=start))))
        return rates

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _run_lines(self) -> list[str]:
        """Which run, on what, how long."""
        train, data = self.config.train, self.config.data
        begins = f", resumes from {self.resumes}" if self.resumes else ", new"
        if self.finished:
            begins = f", finished ({self.resumes}); to train longer set more train.epochs, or another --name"
        length = f"{self.total_steps} steps = {_count(train.epochs, 'epoch')} x {self.steps_per_epoch}"
        if train.max_steps and train.max_steps < self.total_steps:
            length = f"{train.max_steps} steps (train.max_steps) of {length}"
        return [
            f"run       {self.config.folder}{begins}",
            f"data      {self.images} images, {self.classes} classes in {data.train_name}",
            *(f"          {note}" for note in self.notes),
            f"images    {data.image_size} x {data.image_size} pixels; {', '.join(_augmentation(data))}; "
            f"mean {plain(data.mean)}, std {plain(data.std)}",
            f"batch     {train.global_batch} = {_count(self.world_size, 'process', 'es')} x "
            f"{_count(self.accumulation_steps, 'accumulation step')} x {train.micro_batch}",
            f"length    {length}, the incomplete last batch "
            + ("left out" if data.last_batch == "drop" else "filled up from the epoch's start"),
        ]

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(f"cannot run: {problem}" for problem in self.problems)
        train = self.config.train
        lines = [
            *self._run_lines(),
            "rate      " + "  ".join(f"step {step}: {rate:.3g}" for step, rate in self.learning_rates()),
            f"network   {self.config.model.name}",
            f"{'exit':>8}  {'multiply-adds':>14}  {'parameters':>11}",
        ]
        for number, cost in enumerate(self.costs, start=1):
            lines.append(f"{number:>8}  {f'{cost.macs / 1e6:.2f} M':>14}  {f'{cost.params / 1e6:.3f} M':>11}")
        unit, name = (GIB, "GiB") if max(m.total for m in self.memory.values()) > GIB else (2**20, "MiB")
        # Per stage, because the stage is what one changes when memory does not suffice.
        card = f" (this GPU has {self.card / unit:.1f})" if self.card else ""
        lines.append(
            f"memory    per process in {name}, at {train.precision} and micro batch {train.micro_batch}{card}:"
        )
        names = [part.name for part in fields(Memory) if any(getattr(m, part.name) for m in self.memory.values())]
        lines.append(f"{'ZeRO':>8}  " + "  ".join(f"{name:>{len(name)}}" for name in [*names, "  total"]))
        for stage, m in self.memory.items():
            chosen = "chosen" if train.zero_stage == "auto" else "configured"
            mark = f"  <- {chosen}" if stage == self.zero_stage else ""
            parts = [(name, getattr(m, name)) for name in names] + [("  total", m.total)]
            lines.append(f"{stage:>8}  " + "  ".join(f"{part / unit:>{len(n)}.2f}" for n, part in parts) + mark)
        if self.card:
            lines.append("          on a GPU, CUDA's context and the decoder's memory come on top")
        lines.append(
            f"checkpoint {self.checkpoint_bytes / 2**20:.1f} MiB each, {self.config.checkpoint.keep} kept and the best one"
        )
        return "\n".join([*lines, *(f"warning   {warning}" for warning in self.warnings)])


def plan(config: Config, world_size: int = 1) -> Plan:
    """Check a configuration for that many processes and say what it would do; trains nothing, needs no process group.

    Whatever is wrong with the shards or the configuration is in ``problems`` of the result.
    """
    check_kind("config", config, Config, "read a file with load_config(PATH)")
    if not isinstance(world_size, int) or world_size < 1:
        return Plan(config, 1, problems=[f"world_size is {world_size!r}; give a number of processes from 1 on"])
    try:
        ready, resume = check_processes(config, Ranks(0, world_size, 0, world_size))
    except UserError as error:
        return Plan(config, world_size, problems=[str(error)])
    model = ready.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    activations, uncounted = _activations(config, len(ready.train.classes))
    finished = has_ended(config, ready.steps_per_epoch)
    teachers = 0 if finished else teacher_bytes(config, ready.train.classes)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    # All in float32: the weights, the optimizer's tensors, and the averages.
    kept = len(state_names(config.optim)) + 1 + (config.optim.ema_decay is not None)
    return Plan(
        config,
        world_size,
        images=len(ready.train),
        classes=len(ready.train.classes),
        accumulation_steps=ready.accumulation_steps,
        steps_per_epoch=ready.steps_per_epoch,
        costs=exit_costs(model, config.data.image_size),
        memory={stage: estimate(model, config, stage, world_size, activations, teachers) for stage in range(4)},
        zero_stage=ready.zero_stage,
        card=gpu_memory(),
        checkpoint_bytes=4 * numbers * kept,
        resumes=str(resume.path) if resume else None,
        finished=finished,
        notes=[*ready.train.quarantine_notes, *ready.val.quarantine_notes],
        warnings=[
            one for one in (emulation_warning(config.train.precision, device), _lead_time(config), uncounted) if one
        ],
    )


def _activations(config: Config, num_classes: int) -> tuple[int, str]:
    """:func:`activation_bytes`, and a warning where they cannot be traced."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        return activation_bytes(config, num_classes), ""
    except (DataDependentOutputException, DynamicOutputShapeException):
        return 0, "memory is without activations, because the network looks at values of its tensors while it computes"


def _augmentation(data: DataConfig) -> list[str]:
    """What is done to the training images, in words."""
    crops = {
        "pad_crop": f"shifted by up to {data.crop_padding}",
        "resized_crop": f"crops of {plain(data.crop_scale)} of the area",
        "none": "not varied",
    }
    names = ("color_jitter", "rand_augment", "random_erasing", "mixup", "cutmix")
    others = [f"{name} {plain(getattr(data, name))}" for name in names if getattr(data, name)]
    flipped = ["flipped"] if data.flip and data.augment != "none" else []
    return [crops[data.augment], *flipped, *others]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def _lead_time(config: Config) -> str | None:
    """A warning if SLURM's signal leaves less time than a step and a save took in the measured part of the run."""
    step, metrics = checkpoint.newest_step(config.folder), config.folder / "metrics.jsonl"
    speeds = [
        entry["metrics"]["speed/images_per_second"]
        for entry in (read_metrics(metrics) if metrics.exists() else [])
        if "speed/images_per_second" in entry["metrics"]
    ]
    if not speeds or not step:
        return None
    newest = config.folder / "checkpoints" / checkpoint.step_name(step)
    # The times of its files tell how long the last save took.
    written = [path.stat().st_mtime for path in newest.iterdir()]
    # By the slowest line: the signal can come just as such a step begins.
    seconds = config.train.global_batch / min(speeds)
    save = max(written) - min(written)
    if seconds + save <= config.slurm.signal_seconds:
        return None
    return (
        f"a step took up to {seconds:.1f} s and a save {save:.1f} s, but SLURM warns the run only "
        f"{config.slurm.signal_seconds} s before its end; raise slurm.signal_seconds"
    )


def activation_bytes(config: Config, num_classes: int) -> int:
    """Bytes that autograd keeps for the backward pass of one micro batch, traced without computing or allocating anything."""
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    train = config.train
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(storage)  # kept alive, or its address would be reused and counted once
        return tensor

    # Built with real values, not fake ones: some libraries compute with them while they build a network.
    network = build_model(config.model, num_classes, config.data.image_size).train()
    fake = FakeTensorMode()
    # The copy's tensors have shapes but no values, so the pass below allocates nothing.
    with FakeCopyMode(fake):
        network = copy.deepcopy(network)
    with fake:
        images = torch.empty(train.micro_batch, 3, config.data.image_size, config.data.image_size)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", AUTOCAST.get(train.precision), enabled=train.precision != "fp32"):
                network(images)
        # Weights that autograd keeps are counted as weights.
        for tensor in [*network.parameters(), *network.buffers()]:
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())
