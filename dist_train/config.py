"""The typed description of a run: its schema, YAML in and out, overrides, and the checks that span fields.

A configuration is one YAML file plus overrides ``--section.key value``.  Every field carries a docstring
line, which is its help on the command line.  Anything wrong is a :class:`ConfigError`, one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    teachers: (
        Literal["last", "next", "later", "ensemble", "best", "better", "none"]
        | tuple[tuple[Annotated[float, Field(ge=0)], ...], ...]
    ) = "last"
    """Teachers of an exit: last, next, all later ones, the ensemble of all, the best, all better later ones, none, or a matrix."""
    mix: Unit = 0.5
    """Share of distillation against labels, 0 to 1."""
    label_weights: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...] = 1.0
    """Weight of the labels: one number, or one per exit."""
    distill_weights: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...] = 1.0
    """Weight of the distillation: one number, or one per exit (of the student)."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """Factor of the whole loss."""
    over_exits: Literal["mean", "sum"] = "mean"
    """Whether the exits' terms are averaged or summed."""
    form: Literal["cross_entropy", "kl"] = "cross_entropy"
    """Value of the distillation term: cross_entropy to the teacher, or kl, which is 0 at agreement; same gradient."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label that is spread evenly over the classes."""
    temperature: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = 1.0
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
    """Memory format of the activations."""
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
    """Longest wait for the other processes."""


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

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.runs / self.name


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file and apply overrides such as ``"--optim.lr", "0.4"`` (or ``"--optim.lr=0.4"``).

    Override values are YAML, so ``--data.ratio "[0.8, 1.2]"`` and ``--optim.clip null`` work.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong type or out of range.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file, see configs/") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections; see configs/quickstart.yaml")
    for key, value in _override_pairs(overrides):
        _set(tree, key, value)
    return make_config(tree)


def make_config(tree: dict[str, Any]) -> Config:
    """Check a tree of plain values against the schema; raises ConfigError with one line for the first fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every field written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) of every field, sections opened: the text of ``--help``."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from describe_fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else _plain(field.get_default(call_default_factory=True))
            yield f"{prefix}{name}", default, field.description or ""


def changed_fields(before: Config, after: Config) -> list[tuple[str, str, str]]:
    """The fields (key, before, after) in which two configurations differ."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(after.model_dump(mode="json"))
    return [(key, _plain(old.get(key)), _plain(new.get(key))) for key in new if old.get(key) != new.get(key)]


def flat_fields(config: Config) -> dict[str, str]:
    """Every field as text by its dotted key, as shown in tables and tracking."""
    return {key: _plain(value) for key, value in _flatten(config.model_dump(mode="json")).items()}


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


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}:{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _override_pairs(tokens: Sequence[str]) -> Iterator[tuple[str, Any]]:
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError(f"'{token}' is not an override; write --section.key value, for instance --optim.lr 0.05")
        if not equals:
            if not tokens:
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = tokens.pop(0)
        yield key, _parse_yaml(value, f"--{key}")


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(_unknown(key))
        tree = node
    tree[leaf] = value


def _unknown(key: str) -> str:
    keys = [name for name, _, _ in describe_fields()]
    known = keys + sorted({name.rpartition(".")[0] for name in keys} - {""})
    leaf = key.rpartition(".")[2]
    by_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) if not by_leaf else by_leaf
    hint = f"did you mean {' or '.join(near)}?" if near else "`dist-train train --help` lists all keys"
    return f"unknown key '{key}'; {hint}"


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    # pydantic appends the names of a union's branches to the place; a key of the schema ends before them.
    known = {name for name, _, _ in describe_fields()}
    key = next((".".join(place[:end]) for end in range(len(place), 0, -1) if ".".join(place[:end]) in known), ".".join(place))
    if first["type"] == "extra_forbidden":
        return _unknown(".".join(place))
    if first["type"] == "missing":
        return f"'{key}' is missing; it has no default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} is {first['input']!r}; {message[0].lower()}{message[1:]}"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
