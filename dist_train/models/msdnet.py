"""MSDNet, the multi-scale dense network of Huang et al. (ICLR 2018), as in the original and in two public ports."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from dist_train.checks import check_choice, check_count, check_counts, check_number
from dist_train.errors import ConfigError
from dist_train.models.cells import (
    BatchNorm,
    ConvNormReLU,
    DenseCell,
    Features,
    ScaleGradient,
    count_batches,
    run_cell,
    run_stage,
)
from dist_train.models.network import MultiExitNetwork

Dialect = Literal["lua", "msdnet_pytorch", "multiexit_distillation"]
Prune = Literal["min", "max", "none"]
StepMode = Literal["even", "growing"]
Stem = Literal[32, 224]


class MSDNet(MultiExitNetwork):
    """Multi-scale dense network: several scales are computed side by side, and every exit classifies the coarsest.

    A layer adds ``growth * growth_factors[s]`` channels to scale s: half of them from the scale itself, half from the
    next finer scale by a convolution of stride 2 (all of them from itself where there is no finer scale).

    Args:
        num_classes: classes K.
        exits: exits M.
        scales: scales S; each has half the width and height of the one before.
        growth: channels that a layer adds, times the scale's growth factor.
        growth_factors: S numbers, finest scale first.
        bottleneck_factors: S numbers, the widest 1x1 bottleneck per output channel of its 3x3; None for no bottlenecks.
        initial_channels: channels after the stem, times the scale's growth factor.
        base: layers before the first exit.
        step: layers from one exit to the next.
        step_mode: ``even``, or ``growing`` for ``step * m + 1`` layers between the exits m and m + 1, counted from 1.
        prune: ``max`` ends the finest scale after every ``ceil(N / S)`` of the N layers, ``min`` only when it can reach
            no exit any more, ``none`` never.
        reduction: share of the channels that a transition keeps; transitions follow the layer with which a scale ends
            (``max``), or a third and two thirds of the layers (``min``); 0 for none.
        head_width: channels inside the heads; None for as many as enter.
        stem: 32 for a 3x3 convolution, 224 for a 7x7 of stride 2 with a max pooling of stride 2.
        dialect: ``lua`` is the original. ``msdnet_pytorch`` has a bias in the 7x7 stem and torch's own initialisation.
            ``multiexit_distillation`` has a bias in every convolution, puts the channels from the finer scale last, and
            moves an exit that would lie one layer before a transition to behind that layer. Both keep, frozen, the few
            modules that no exit depends on; ``lua`` leaves them out.
        activation_checkpointing: keep only the activations between blocks and compute the others again in the backward pass.

    Attributes:
        num_exits, num_classes: M and K.
        balance_coarsest: the gradient that exit i of M sends into the coarsest scale is divided by M - i + 1, and the gradient
            from later layers is multiplied by (M - i) / (M - i + 1).
        divisor: image height and width must be multiples of it, in pixels.

    Raises:
        ConfigError: values that do not fit together.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        exits: int = 7,
        scales: int = 3,
        growth: int = 6,
        growth_factors: Sequence[int] = (1, 2, 4),
        bottleneck_factors: Sequence[int] | None = (1, 2, 4),
        initial_channels: int = 16,
        base: int = 4,
        step: int = 2,
        step_mode: StepMode = "even",
        prune: Prune = "max",
        reduction: float = 0.5,
        head_width: int | None = 128,
        stem: Stem = 32,
        dialect: Dialect = "lua",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, exits=exits, scales=scales, growth=growth, base=base, step=step)
        check_counts(initial_channels=initial_channels, head_width=1 if head_width is None else head_width)
        check_choice("step_mode", step_mode, get_args(StepMode))
        check_choice("prune", prune, get_args(Prune))
        check_choice("stem", stem, get_args(Stem))
        check_choice("dialect", dialect, get_args(Dialect))
        check_number("reduction", reduction, 0, 1)
        self.num_exits = exits
        self.num_classes = num_classes
        self.dialect = dialect
        self._recomputed = _Recomputed() if activation_checkpointing else None
        self.divisor = (1 if stem == 32 else 4) * 2 ** (scales - 1)
        spans = [base, *(step if step_mode == "even" else step * exit_ + 1 for exit_ in range(1, exits))]
        widths = _Widths(scales, growth, growth_factors, bottleneck_factors or None)
        stages = _plan_stages(sum(spans), widths, initial_channels, prune, reduction)
        ends = _plan_ends(spans, stages, dialect)
        self.stem = nn.ModuleList(_build_stem(widths.of(initial_channels), stem, dialect))
        cells = [_build_stage(stage, widths, dialect) for stage in stages]
        self.blocks = nn.ModuleList(nn.ModuleList(cells[start:end]) for start, end in itertools.pairwise([0, *ends]))
        exit_widths = [widths.of(stages[end - 1].width_out)[-1] for end in ends]
        self.heads = nn.ModuleList(Head(width, head_width or width, num_classes, dialect) for width in exit_widths)
        self.balance_coarsest = False
        self._norms = self._own_norms()
        if dialect != "msdnet_pytorch":
            _initialize(self)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode, as of any module."""
        # Norms over all ranks, which may have taken the place of some by now, count their batches themselves.
        self._norms = self._own_norms()
        return super().train(mode)

    def _own_norms(self) -> list[BatchNorm]:
        return [module for module in self.modules() if isinstance(module, BatchNorm)]

    def exit_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the exits themselves give, M tensors [N, K], for images [N, 3, H, W]."""
        self.check_image_size(*images.shape[-2:])
        count_batches(self._norms)
        features: Features = []
        for scale, layer in enumerate(self.stem):
            features.append(layer(features[scale - 1] if scale else images))
        logits = []
        for number, (block, head) in enumerate(zip(self.blocks, self.heads)):
            run = self._recomputed.run if self._recomputed and torch.is_grad_enabled() else _run_block
            features = run(cast(nn.ModuleList, block), features)
            coarsest, left = cast(Tensor, features[-1]), self.num_exits - number
            # Gradient equilibrium where its authors' code has it.  The factors multiply: what comes from behind is scaled by
            # 1 / left * (left - 1).
            if self.balance_coarsest and left > 1:
                coarsest = cast(Tensor, ScaleGradient.apply(coarsest, 1 / left))  # type: ignore[no-untyped-call]
                features[-1] = cast(Tensor, ScaleGradient.apply(coarsest, left - 1))  # type: ignore[no-untyped-call]
            logits.append(head(coarsest))
        return tuple(logits)

    def iter_exit_logits(self, images: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """The same exit after exit, each scale no further than the exit needs it."""
        self.check_image_size(*images.shape[-2:])
        stages = [cast(nn.ModuleDict, stage) for block in self.blocks for stage in cast(nn.ModuleList, block)]
        features: Features = [None] * len(self.stem)
        done = [0] * len(self.stem)  # per scale: 0 nothing, 1 the stem, then one more for every stage

        def advance(scale: int, target: int) -> None:
            while done[scale] < target:
                position = done[scale]
                if position == 0:
                    if scale:
                        advance(scale - 1, 1)
                    features[scale] = self.stem[scale](features[scale - 1] if scale else images)
                else:
                    cell = stages[position - 1][str(scale)]
                    # The path from the finer scale takes that scale as it was before this stage.
                    if isinstance(cell, DenseCell) and cell.down is not None:
                        advance(scale - 1, position)
                    features[scale] = run_cell(cell, features, scale)
                done[scale] += 1

        end = 1
        for block, head in zip(self.blocks, self.heads):
            end += len(cast(nn.ModuleList, block))
            advance(len(self.stem) - 1, end)
            rows = yield head(features[-1])
            if rows is not None:
                features = [kept if kept is None else kept[rows] for kept in features]

    def check_image_size(self, *sizes: int) -> None:
        """Raise ConfigError for a height or width, in pixels, that the scales cannot halve."""
        for size in sizes:
            if size % self.divisor:
                below = size // self.divisor * self.divisor
                nearest = " or ".join(str(near) for near in (below, below + self.divisor) if near)
                raise ConfigError(
                    f"image size is {size} pixels, which {len(self.stem)} scales cannot halve; "
                    f"use a multiple of {self.divisor}, for instance {nearest}"
                )


class Head(nn.Sequential):
    """Classifier of one exit: two 3x3 convolutions of stride 2, the mean over what remains, a linear layer."""

    def __init__(self, width_in: int, width: int, num_classes: int, dialect: Dialect) -> None:
        bias = dialect == "multiexit_distillation"
        super().__init__(
            OrderedDict(
                conv1=ConvNormReLU(width_in, width, 3, 2, bias=bias),
                conv2=ConvNormReLU(width, width, 3, 2, bias=bias),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(width, num_classes),
            )
        )


@dataclass(frozen=True)
class _Widths:
    """Channels by scale, out of numbers that hold for a growth factor of 1."""

    scales: int
    growth: int
    growth_factors: Sequence[int]
    bottleneck_factors: Sequence[int] | None

    def __post_init__(self) -> None:
        for name in ("growth_factors", "bottleneck_factors"):
            factors = getattr(self, name)
            if factors is None:
                continue
            if isinstance(factors, str) or not hasattr(factors, "__len__"):
                raise ConfigError(f"{name} is {factors!r}; give a list of one factor per scale")
            if len(factors) != self.scales:
                raise ConfigError(f"{name} are {list(factors)}, but scales is {self.scales}; give one factor per scale")
            for factor in factors:
                check_count(f"a number of {name}", factor)
        for factor in self.growth_factors[1:]:
            if self.growth * factor % 2:
                raise ConfigError(
                    f"growth is {self.growth} with growth_factors {list(self.growth_factors)}: {self.growth * factor} channels "
                    "do not halve between two paths; make the product even in all scales but the first"
                )

    def of(self, base: int) -> list[int]:
        return [base * factor for factor in self.growth_factors]

    def path(self, width_in: int, width_out: int, scale: int, stride: int, bias: bool) -> nn.Module:
        """A 3x3 convolution, after a 1x1 bottleneck that is limited by the factor of the scale it starts from."""
        if self.bottleneck_factors is None:
            return ConvNormReLU(width_in, width_out, 3, stride, bias=bias)
        middle = min(width_in, self.bottleneck_factors[scale] * width_out)
        return nn.Sequential(
            ConvNormReLU(width_in, middle, 1, bias=bias), ConvNormReLU(middle, width_out, 3, stride, bias=bias)
        )


@dataclass(frozen=True)
class _Stage:
    """A dense layer or a transition: its base widths, and the finest scale before it, after it, and after it in use."""

    layer: int
    is_transition: bool
    width_in: int
    width_out: int
    finest_in: int
    finest_out: int
    finest_used: int


def _plan_stages(layers: int, widths: _Widths, width: int, prune: Prune, reduction: float) -> list[_Stage]:
    """All layers 1..N and transitions in their order."""
    scales = widths.scales
    if prune == "max":
        # The paper's network reduction: N layers in S blocks, of which block i has the scales from i on.
        finest = [0] + [(layer - 1) // math.ceil(layers / scales) for layer in range(1, layers + 1)]
        transitions = {layer for layer in range(1, layers + 1) if finest[layer] > finest[layer - 1]}
    else:
        # N - l + 1 layers are left from layer l on, and scale s (from 0) takes S - s of them to get to an exit.
        finest = [0] + [
            max(0, scales - (layers - layer + 1)) if prune == "min" else 0 for layer in range(1, layers + 1)
        ]
        transitions = {layers // 3, 2 * layers // 3} if prune == "min" else set()
    stages = []
    for layer in range(1, layers + 1):
        # A layer leads one scale further, and exits read the coarsest: from finer scales than this none is reached.
        used = max(finest[layer], scales - 1 - (layers - layer))
        grown = width + widths.growth
        stages.append(_Stage(layer, False, width, grown, finest[layer - 1], finest[layer], used))
        width = grown
        if reduction and layer in transitions:
            width = math.floor(reduction * grown)
            if not width:
                raise ConfigError(
                    f"reduction is {reduction}, which leaves no channel of {grown} after layer {layer}; use more"
                )
            stages.append(_Stage(layer, True, grown, width, finest[layer], finest[layer], used))
    return stages


def _plan_ends(spans: Sequence[int], stages: Sequence[_Stage], dialect: Dialect) -> list[int]:
    """For every exit, the number of stages before it."""
    transitions = [stage.layer for stage in stages if stage.is_transition]
    # multiexit_distillation counts a transition as passed when an exit's layer is the one before it.
    early = 1 if dialect == "multiexit_distillation" else 0
    if early and transitions and transitions[0] <= 1:
        raise ConfigError(
            f"{sum(spans)} layers are too few for dialect {dialect} with prune min; use 6 or more, or another dialect"
        )
    return [layer + sum(t <= layer + early for t in transitions) for layer in itertools.accumulate(spans)]


def _build_stem(widths: Sequence[int], stem: int, dialect: Dialect) -> Iterator[nn.Module]:
    bias = dialect == "multiexit_distillation"
    if stem == 32:
        yield ConvNormReLU(3, widths[0], 3, bias=bias)
    else:
        first = ConvNormReLU(3, widths[0], 7, 2, bias=dialect != "lua")
        first.append(nn.MaxPool2d(3, 2, 1))
        yield first
    for width_in, width_out in itertools.pairwise(widths):
        yield ConvNormReLU(width_in, width_out, 3, 2, bias=bias)


def _build_stage(stage: _Stage, widths: _Widths, dialect: Dialect) -> nn.ModuleDict:
    """The cells of a stage by their scale: DenseCell for a layer, ConvNormReLU for a transition."""
    bias = dialect == "multiexit_distillation"
    before, after, added = widths.of(stage.width_in), widths.of(stage.width_out), widths.of(widths.growth)
    cells = nn.ModuleDict()
    for scale in range(stage.finest_used if dialect == "lua" else stage.finest_out, widths.scales):
        if stage.is_transition:
            cell: nn.Module = ConvNormReLU(before[scale], after[scale], 1, bias=bias)
        elif scale == stage.finest_in:
            cell = DenseCell(None, widths.path(before[scale], added[scale], scale, 1, bias), down_last=bias)
        else:
            half = added[scale] // 2
            down = widths.path(before[scale - 1], half, scale - 1, 2, bias)
            cell = DenseCell(down, widths.path(before[scale], half, scale, 1, bias), down_last=bias)
        # Modules that no exit depends on never get a gradient.
        cells[str(scale)] = cell.requires_grad_(scale >= stage.finest_used)
    return cells


def _initialize(network: nn.Module) -> None:
    """He et al. (2015) over the outputs for convolutions, no biases at the start; norms and linear weights are torch's."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _run_block(block: nn.ModuleList, features: Features) -> Features:
    """Run the stages of a block at all scales."""
    for stage in block:
        features = run_stage(cast(nn.ModuleDict, stage), features)
    return features


class _Recomputed:
    """:func:`_run_recomputed`, never compiled, as a checkpoint with a context of its own cannot be; pickled by name."""

    def __init__(self) -> None:
        # Only in a network that needs it, since it imports the compiler.
        self.run = torch.compiler.disable(_run_recomputed)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[type[_Recomputed], tuple[()]]:
        return _Recomputed, ()


def _run_recomputed(block: nn.ModuleList, features: Features) -> Features:
    """As :func:`_run_block`, without keeping what is inside the block for the backward pass."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]

    return cast(
        Features,
        checkpoint(
            _run_block,
            block,
            features,
            # The reentrant form refuses torch.autograd.grad, by which pcgrad takes the gradient of every exit.
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _StatisticsUntouched(norms)),
        ),
    )


class _StatisticsUntouched:
    """Within it, batch norms do not move their running statistics: the first pass has moved them, the second must leave them.

    It can be entered again: a graph that is kept for several backward passes computes its blocks again in each.
    """

    def __init__(self, norms: Sequence[nn.modules.batchnorm._NormBase]) -> None:
        self._norms = norms

    def __enter__(self) -> None:
        self._kept = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            # A counter of its own: SyncBatchNorm insists on one.
            batches = norm.num_batches_tracked
            norm.momentum, norm.num_batches_tracked = 0.0, None if batches is None else batches.clone()

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, batches) in zip(self._norms, self._kept):
            norm.momentum, norm.num_batches_tracked = momentum, batches
