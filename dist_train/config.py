"""The typed description of a run: its schema, and the checks that span fields.

Every field carries a docstring line, which is its help on the command line.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dist_train.errors import ConfigError

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which shards are read, and how an image becomes a tensor."""

    shards: Path
    """Folder made by `python -m shards make`, with one folder per split."""
    train: str = "train"
    """Split that is trained on."""
    val: str = "val"
    """Split that is evaluated during training and at its end."""
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32
    """Height and width of the network's input, in pixels."""
    augment: Literal["pad_crop", "resized_crop", "none"] = "pad_crop"
    """Training crop: pad_crop shifts small images, resized_crop is the usual one for large images, none is the evaluation view."""
    pad: Natural = 4
    """Largest shift of pad_crop, in pixels; what lies outside of the image has the mean colour."""
    flip: bool = True
    """Mirror every second training image (off for digits and text)."""
    scale: tuple[Unit, Unit] = (0.08, 1.0)
    """Range of the crop's share of the image area in resized_crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width divided by its height in resized_crop."""
    eval_resize: Positive | None = None
    """Shorter side in evaluation before the centre crop, in pixels (default: image_size, which for large images wants 256 at 224)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels, of 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, of 1."""
    last_batch: Literal["drop", "wrap"] = "drop"
    """The incomplete last global batch of an epoch: left out, or filled up from the epoch's start."""
    window: Positive = 16
    """Shards whose samples are shuffled together; reading stays near-sequential in them."""
    threads: Positive | None = None
    """Decoding threads per process (default: the cores this process may use, divided fairly)."""
    prefetch: Annotated[int, Field(ge=1, le=8)] = 2
    """Micro batches made ahead of the network."""
    verify: Literal["auto", "size", "hash"] = "auto"
    """How shards are compared with their index before training: sizes, also hashes, or (auto) hashes up to 1 GB."""
    max_bad: Natural = 100
    """Unreadable images that a run puts up with before it stops."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is {list(self.scale)}; it must be two rising numbers above 0 and at most 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {list(self.ratio)}; it must be two rising numbers above 0")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}; every number must be above 0")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(f"eval_resize is {self.eval_resize}; it must be at least image_size, {self.image_size}")
        return self


class ModelConfig(Section):
    """The multi-exit network."""

    name: str = "msdnet"
    """msdnet, resnet, or module:function, a function of your own called as f(num_classes) that returns a network."""
    exits: Positive | tuple[str, ...] = 7
    """Number of exits (msdnet), or the submodules after which exits are attached; the network's end is one more exit."""
    scales: Positive = 3
    """Scales, each of half the width and height of the one before (msdnet)."""
    growth: Positive = 6
    """Channels that a layer adds, times the scale's growth factor (msdnet)."""
    growth_factors: tuple[Positive, ...] = (1, 2, 4)
    """Factor of growth and initial_channels per scale, finest first (msdnet)."""
    bottleneck_factors: tuple[Positive, ...] | None = (1, 2, 4)
    """Largest width of a 1x1 bottleneck per scale, times the channels of the 3x3 after it (msdnet; null: no bottlenecks)."""
    initial_channels: Positive = 16
    """Channels after the stem, times the scale's growth factor (msdnet)."""
    base: Positive = 4
    """Layers before the first exit (msdnet)."""
    step: Positive = 2
    """Layers from one exit to the next (msdnet)."""
    step_mode: Literal["even", "growing"] = "even"
    """even: step layers between all exits; growing: step + 1, 2 step + 1, 3 step + 1, ... (msdnet)."""
    prune: Literal["min", "max", "none"] = "max"
    """When fine scales end: max one after each S-th of the layers, min in the last layers, none never (msdnet)."""
    reduction: Unit = 0.5
    """Share of the channels that a transition keeps; 0 leaves the transitions out (msdnet)."""
    head_width: Positive | None = 128
    """Channels inside an exit's head (msdnet; null: as many as enter it)."""
    stem: Literal[32, 224] | None = None
    """Stem for images of about 32 or of about 224 pixels (msdnet; null: by the image size, 224 from 96 pixels on)."""
    dialect: Literal["lua", "msdnet_pytorch", "multiexit_distillation"] = "lua"
    """Whose details are followed: the original, or one of two public PyTorch versions with their weights (msdnet)."""
    recompute: bool = False
    """Keep only the activations at exits and compute the others again in the backward pass: less memory, more time (msdnet)."""
    blocks: tuple[Positive, ...] = (2, 2, 2)
    """Residual blocks per stage; each further stage halves the image and doubles the channels (resnet)."""
    width: Positive = 16
    """Channels of the first stage (resnet)."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation (resnet)."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.name not in ("msdnet", "resnet") and ":" not in self.name:
            raise ValueError(f"name is {self.name!r}; use msdnet, resnet, or module:function")
        if (self.name == "msdnet") != isinstance(self.exits, int):
            wanted = "a number" if self.name == "msdnet" else 'names of submodules, such as ["stages.0", "stages.1"]'
            raise ValueError(f"exits is {self.exits!r}; for {self.name} it is {wanted}")
        for key, field in type(self).model_fields.items():
            owner = "resnet" if key in ("blocks", "width", "norm") else "msdnet"
            if key not in ("name", "exits") and owner != self.name and getattr(self, key) != field.default:
                raise ValueError(f"{key} is a setting of {owner}, but name is {self.name}; leave it out")
        return self


class LossConfig(Section):
    """The objective: labels at every exit, and distillation between exits.

    scale * mean over exits m of [ (1 - mix) * label_weights[m] * CE(m) + mix * distill_weights[m] * T^2 * D(m) ],
    where D(m) is the divergence of exit m from its teachers, softened by the temperature T.
    """

    preset: Literal["paper", "authors"] = "paper"
    """Where fields not given come from: the formula of the paper, or its authors' released code (the same with scale 10)."""
    teachers: Literal["last", "next", "later", "ensemble", "best", "better", "none"] | tuple[tuple[float, ...], ...] = (
        "last"
    )
    """Teachers of an exit: last, next, all later ones, the ensemble of all, the best, all better later ones, none, or a matrix."""
    mix: Unit = 0.5
    """Share of distillation against labels, 0 to 1."""
    label_weights: float | tuple[float, ...] = 1.0
    """Weight of the labels: one number, or one per exit."""
    distill_weights: float | tuple[float, ...] = 1.0
    """Weight of the distillation: one number, or one per exit (of the student)."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """Factor of the whole loss."""
    over_exits: Literal["mean", "sum"] = "mean"
    """Whether the exits' terms are averaged or summed."""
    form: Literal["cross_entropy", "kl"] = "cross_entropy"
    """Value of the distillation term: cross_entropy to the teacher, or kl, which is 0 at agreement; same gradient."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label that is spread evenly over the classes."""
    temperature: float | tuple[float, ...] = 1.0
    """Temperature of the distillation, at the start if it moves: one number, or one per exit."""
    temperature_rule: Literal["anneal", "constant", "schedule"] = "anneal"
    """anneal: times anneal_factor after each batch whose teacher is surer than anneal_above; schedule: a function of the step."""
    anneal_above: Unit = 0.5
    """Mean over the batch of the teacher's largest probability, at the current temperature, above which anneal acts."""
    anneal_factor: Annotated[float, Field(gt=0)] = 1.05
    """What anneal multiplies the temperature by."""
    temperature_bounds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Smallest and largest temperature that anneal reaches (default: no bounds)."""
    temperature_schedule: tuple[tuple[Natural, Annotated[float, Field(gt=0)]], ...] = ()
    """Points [step, factor] of schedule, joined by straight lines and level outside of them."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "authors":
            return {"scale": 10.0, **given}
        return given

    @field_validator("teachers", "label_weights", "distill_weights", "temperature", mode="before")
    @classmethod
    def _check_numbers(cls, given: Any, info: ValidationInfo) -> Any:
        numbers, positive = [given], info.field_name == "temperature"
        while numbers:
            number = numbers.pop()
            if isinstance(number, list | tuple):
                numbers.extend(number)
            elif isinstance(number, int | float) and not (0 < number < math.inf or (number == 0 and not positive)):
                raise ValueError(
                    f"holds {number:g}; allowed is a finite number {'above' if positive else 'of at least'} 0"
                )
        return given

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.temperature_bounds and self.temperature_bounds[0] > self.temperature_bounds[1]:
            raise ValueError(f"temperature_bounds are {list(self.temperature_bounds)}; they must rise")
        steps = [step for step, _ in self.temperature_schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"temperature_schedule has the steps {steps}; they must rise")
        if (self.temperature_rule == "schedule") != bool(steps):
            raise ValueError(
                f"temperature_rule is {self.temperature_rule} and temperature_schedule has {len(steps)} points; "
                "points need the rule schedule, and schedule needs points"
            )
        return self


class OptimConfig(Section):
    """Optimizer, learning rate and weight averaging."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (with Nesterov momentum) or adamw."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate, for the global batch as configured."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov's form of momentum (sgd)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the two moments of adamw."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of adamw."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay."""
    decay_all: bool = False
    """Decay norms and biases too, as the authors' recipe does."""
    schedule: Literal["multistep", "cosine", "constant"] = "cosine"
    """Learning rate over the steps after the warm-up."""
    milestones: tuple[Unit, ...] = (0.5, 0.75)
    """Where multistep drops the rate, as shares of all steps."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of a drop in multistep."""
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where cosine ends, as a share of lr."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the rate rises linearly to lr."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient (default: not clipped)."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the averaged weights, for instance 0.999 (default: none are kept)."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {list(self.milestones)}; they must rise")
        if self.nesterov and self.name == "sgd" and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; set momentum, or nesterov: false")
        return self


class TrainConfig(Section):
    """Batches, length, precision and the distributed engine."""

    epochs: Positive = 100
    """Passes over the training split."""
    global_batch: Positive = 64
    """Images per update, over all processes."""
    micro_batch: Positive = 64
    """Images per forward pass of one process; the number of accumulated passes follows from it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 are autocast with float32 weights; fp16 scales the loss and needs a GPU."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what the processes share out among them (0 nothing, 1 optimizer state, 2 and gradients, 3 and weights)."""
    channels_last: bool = True
    """Activations in training as NHWC, which convolutions in bf16 want, instead of NCHW."""
    sync_bn: bool = False
    """Batch-norm statistics over all processes (GPU only)."""
    compile: bool = False
    """Compile the network with torch.compile."""
    eval_every: Positive = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    max_steps: Positive | None = None
    """Stop after so many updates; the learning rate still follows the whole length."""


class CheckpointConfig(Section):
    """When the state of a run is kept."""

    every_epochs: Positive | None = 1
    """Epochs between checkpoints (null: never by epochs)."""
    every_steps: Positive | None = None
    """Steps between checkpoints, in addition (null: never by steps)."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Minutes between checkpoints, in addition (null: never by time)."""
    keep: Positive = 2
    """Latest checkpoints that are kept, besides the best one."""


class TrackingConfig(Section):
    """Where MLflow's mirror of the metrics goes; metrics.jsonl in the run folder is written in any case."""

    uri: str | None = None
    """MLflow's tracking URI (default: the variable MLFLOW_TRACKING_URI, or sqlite in the folder of all runs; off: none)."""
    experiment: str = "dist_train"
    """MLflow's experiment."""
    log_every: Positive = 20
    """Steps between two lines of metrics."""


class FaultConfig(Section):
    """What a run puts up with."""

    max_nonfinite: Positive = 10
    """Steps in a row with a gradient that is not finite, before the run stops."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Longest time without progress, such as a wait for the other processes; then all report to faults/ and end."""
    first_step_minutes: Annotated[float, Field(gt=0)] = 30.0
    """The same before the first step is done: starting on many nodes and compiling take longer."""

    @property
    def group_minutes(self) -> float:
        """Timeout of the process group: late enough that the reports come first."""
        return max(self.timeout_minutes, self.first_step_minutes) + 1


class SlurmConfig(Section):
    """The job of a run on a SLURM cluster, as `python -m launch.slurm` submits it; each field is a flag there."""

    nodes: Positive = 1
    """Nodes."""
    gpus_per_node: Positive | None = None
    """GPUs on each node, with one task per GPU (default: none asked for)."""
    tasks_per_node: Positive | None = None
    """Processes on each node without GPUs (default: one per GPU, or one)."""
    cpus_per_task: Positive | None = None
    """Cores for each process (default: the cluster's, which is often one)."""
    hours: Annotated[float, Field(gt=0)] = 24.0
    """Time limit of one start; a job that reaches it saves, is requeued and goes on."""
    partition: str | None = None
    """Partition (default: the cluster's)."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    reservation: str | None = None
    """Reservation to use."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of each node, in GB (default: the cluster's)."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    dependency: str | None = None
    """What the job waits for, for instance afterok:1234."""
    setup: tuple[str, ...] = ()
    """Shell lines that the job runs first: modules, containers, variables."""
    signal_seconds: Positive = 90
    """How long before the time limit the job is told to save."""
    array_parallelism: Positive = 256
    """Runs of a sweep that may run at the same time."""

    @model_validator(mode="after")
    def _check(self) -> SlurmConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node is {self.tasks_per_node}; with GPUs there is one task for each of them, leave it out"
            )
        return self

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.gpus_per_node or self.tasks_per_node or 1


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run: its folder under `runs`, and its name in MLflow."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    seed: Natural = 0
    """Seed of the weights, of the order of samples and of the augmentation."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    faults: FaultConfig = FaultConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.runs / self.name


def accumulation(train: TrainConfig, world_size: int) -> int:
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
