"""The objective: labels at every exit and distillation between exits, with its temperature rule.

Phuong & Lampert, "Distillation-Based Training for Multi-Exit Architectures", ICCV 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dist_train.checks import check_count, check_kind
from dist_train.config import LossConfig
from dist_train.errors import ConfigError, DataError
from dist_train.loss.decoupled import decoupled_loss
from dist_train.loss.inputs import KERNEL_RULES, ExitWeights, LossOptions, Targets
from dist_train.loss.operator import exit_loss
from dist_train.loss.statistics import ExitStats
from dist_train.loss.teachers import last_teacher_mixture, teacher_matrix, with_outside

MAX_EXITS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LabelMix(NamedTuple):
    """Targets of mixed images (mixup, cutmix): two labels [N] int64, and the share [N] of the first, 0 to 1.

    A sample counts as unlabeled if either label is -100.
    """

    first: Tensor
    second: Tensor
    share: Tensor


class ExitLoss(NamedTuple):
    """The loss, a 0-dim float32 tensor with gradient, and the statistics of the same samples, detached."""

    loss: Tensor
    stats: ExitStats


class ExitDistillation(nn.Module):
    """Labels at every exit and distillation between exits, as the section ``loss`` of the configuration says.

    The loss of a micro batch of N samples is::

        weight * mean over m of  (1 - alpha) * label_weights[m]   *         1/labeled * sum_n CE(y_n, p_mn)
                               +    alpha    * distill_weights[m] * T_m^2 *      1/N  * sum_n sum_t W_mt * D(q_tn, q_mn)

    with p the softmax of an exit's logits, q their softmax at a temperature, of which each exit m has its own, T_m; D the
    cross-entropy or the Kullback-Leibler divergence, and W the teacher matrix; teachers get no gradient.  With the reduction
    ``sum`` the mean over exits is a sum.  The paper's objective (section 3) is alpha 1/2, weight 2, W_mt = 1/|S(m)| for the
    set S(m) of the teachers of exit m.  With ``outside_teachers``, S(m) has these as well.  For the form ``dkd`` of D see
    :mod:`dist_train.loss.decoupled`.

    :meth:`use_last_exit_alone` is for the stage of a regime in which the other exits do not train.

    State: ``temperature`` [M] float32, and ``step``, the number of calls of :meth:`end_batch`, without those while the last
    exit trains alone.

    With the teachers ``best`` and ``better`` the label losses that decide are those of the micro batch on this rank, and
    finding them costs a second pass over the logits; without labels ``best`` is ``last`` and ``better`` is ``later``.
    """

    temperature: Tensor
    step: Tensor
    label_weights: Tensor
    distill_weights: Tensor
    teachers: Tensor
    confidence_weights: Tensor
    teachers_among_exits: Tensor
    initial_temperature: Tensor
    schedule: Tensor
    last_exit: Tensor

    def __init__(self, config: LossConfig, num_exits: int) -> None:
        super().__init__()
        check_kind("config", config, LossConfig, "give a LossConfig of dist_train.config")
        check_count("num_exits", num_exits, least=0)
        outside = len(config.outside_teachers)
        if not 1 <= num_exits <= MAX_EXITS - outside:
            others = f" beside {outside} outside teachers" if outside else ""
            raise ConfigError(f"the network has {num_exits} exits; the loss takes 1 to {MAX_EXITS - outside}{others}")
        self.config = config
        self.num_exits = num_exits
        self.num_outside = outside
        # The mean over the exits is in their weights, because the operator adds the exits up.
        weight = config.weight / (num_exits if config.reduction == "mean" else 1)
        matrix, among_exits = (self._teachers(torch.zeros(num_exits), count) for count in (outside, 0))
        initial = _per_exit("temperature", config.temperature, num_exits)
        constants = {
            # To the operator outside teachers are further exits, which learn nothing.
            "label_weights": pad(
                weight * (1 - config.alpha) * _per_exit("label_weights", config.label_weights, num_exits), (0, outside)
            ),
            "distill_weights": pad(
                weight * config.alpha * _per_exit("distill_weights", config.distill_weights, num_exits), (0, outside)
            ),
            "teachers": matrix,
            "confidence_weights": last_teacher_mixture(matrix),
            "teachers_among_exits": among_exits,
            "initial_temperature": initial,
            "schedule": torch.tensor(config.temperature_schedule or [(0, 1.0)]),
            "last_exit": pad(torch.eye(num_exits)[-1], (0, outside)),
        }
        for name, tensor in constants.items():
            # Not persistent: they follow from the configuration, and a checkpoint holds what training has moved.
            self.register_buffer(name, tensor, persistent=False)
        # A copy: annealing moves it in place, and reset_temperature goes back to where it began.
        self.register_buffer("temperature", initial.clone())
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._last_exit_alone = False
        self.reset_temperature()

    @classmethod
    def from_config(cls, config: LossConfig, num_exits: int) -> ExitDistillation:
        """The objective for a network with so many exits.

        Raises:
            ConfigError: more than 16 exits, or a weight, temperature or teacher matrix of another number of exits.
        """
        return cls(config, num_exits)

    @property
    def needs_confidence(self) -> bool:
        """Whether :meth:`end_batch` looks at the confidence, which then has to be reduced over passes and ranks."""
        taught = self.config.teachers != "none" or self.num_outside > 0
        anneals = self.config.temperature_rule == "anneal" and taught
        return anneals and not self._last_exit_alone

    @property
    def needs_outside(self) -> bool:
        """Whether :meth:`forward` has to be given the logits of outside teachers in training."""
        return self.num_outside > 0 and not self._last_exit_alone

    def use_last_exit_alone(self, alone: bool = True) -> None:
        """Make the loss the last exit's cross-entropy to the labels, and keep the temperature where it is; or undo that."""
        self._last_exit_alone = alone

    def forward(
        self,
        logits: Sequence[Tensor],
        targets: Tensor | LabelMix,
        *,
        labeled: float | Tensor | None = None,
        passes: int = 1,
        weights: Tensor | None = None,
        outside: Sequence[Tensor] = (),
    ) -> ExitLoss:
        """Loss and statistics of one micro batch; waits for nothing on the device.

        A sample with a logit of NaN or +inf, or with nothing but -inf, makes the loss NaN and gets a gradient of NaN in
        all exits: the step is to be skipped.  On a GPU, a label out of range, a negative weight and a share below 0 or above
        1 make the loss NaN as well; on the CPU they are an error.  Other samples' gradients are not touched.  A logit of -inf alone takes its class out.

        Args:
            logits: M tensors [N, K] in fp32, bf16 or fp16, as the network gives them.
            targets: labels [N] int64, -100 for unlabeled images; distributions [N, K] of a floating-point dtype, a row
                of zeros for unlabeled images; or a :class:`LabelMix`.
            labeled: what the sum of label losses is divided by (default: the labeled samples here, at least 1).  To
                average gradients over ranks and passes into the mean over all labeled images, give the labeled images
                of the global batch / (ranks x passes).
            passes: what the loss is divided by, so that the gradients of so many passes add up to their mean.  To divide
                the loss afterwards would have its gradient written twice.
            weights: [N] weight of each sample's loss, at least 0 (default: 1).  Of the statistics, only ``kl`` uses it.
            outside: logits [N, K] of the outside teachers, in the order of the configuration and the dtype of ``logits``.  Without
                gradient, and while the last exit trains alone, they can be left out; loss and statistics are then those of the
                exits alone.

        Raises:
            DataError: shapes, dtypes or values that do not fit.
            ConfigError: passes below 1.
        """
        first, second, share = targets if isinstance(targets, LabelMix) else (targets, None, None)
        self._check(logits, first, second, share, weights)
        self._check_outside(outside, logits[0])
        check_count("passes", passes)
        given = Targets(first, second, share, weights)
        options = self._options(with_grad=torch.is_grad_enabled() and any(z.requires_grad for z in logits))
        logits = [*logits, *outside]
        exits = self._exit_weights(_label_count(labeled, first, second), passes, len(logits))
        if self.config.teachers in ("best", "better"):
            with torch.no_grad():
                _, vector, _ = exit_loss(logits, given, exits, options._replace(with_grad=False))
                # Sums over the same labeled samples: they compare as the means do.
                losses = ExitStats(vector, len(logits)).label_loss[: self.num_exits]
                matrix = self._teachers(losses, len(outside))
                exits = exits._replace(teachers=matrix, confidence_weights=last_teacher_mixture(matrix))
        apart: Tensor | None = None
        if self.config.distill_loss == "dkd":
            apart = decoupled_loss(logits, given, exits, options.rule, self.config.dkd_weights)
            # The statistics still report the whole divergence.
            exits = exits._replace(distill_weights=exits.distill_weights * 0)
        loss, vector, _ = exit_loss(logits, given, exits, options)
        stats = ExitStats(vector.detach(), len(logits)).of_exits(self.num_exits)
        return ExitLoss(loss if apart is None else loss + apart, stats)

    def _teachers(self, label_loss: Tensor, outside: int) -> Tensor:
        """The teacher matrix of the exits and so many outside teachers; see :func:`teacher_matrix` for ``label_loss`` [M]."""
        matrix = teacher_matrix(self.config.teachers, self.num_exits, label_loss)
        return with_outside(matrix, outside, self.config.outside_share) if outside else matrix

    def _exit_weights(self, label_count: Tensor, passes: int, rows: int) -> ExitWeights:
        """Weights for the operator; its rows are the exits, then any outside teachers."""
        alone = self._last_exit_alone
        label_weights = self.last_exit if alone else self.label_weights
        distill_weights = self.distill_weights * 0 if alone else self.distill_weights
        if passes > 1:
            label_weights, distill_weights = label_weights / passes, distill_weights / passes
        temperature = self.temperature
        exits = ExitWeights(
            label_weights, distill_weights, self.teachers, self.confidence_weights, temperature, label_count
        )
        if not self.num_outside:
            return exits
        # Evaluated without the outside teachers: the weights of the exits among themselves.
        if rows == self.num_exits:
            return exits._replace(
                label_weights=label_weights[:rows],
                distill_weights=distill_weights[:rows],
                teachers=self.teachers_among_exits,
                confidence_weights=last_teacher_mixture(self.teachers_among_exits),
            )
        # The softmax of outside teachers is taken at the temperature of the last exit.
        return exits._replace(temperature=torch.cat([temperature, temperature[-1:].expand(self.num_outside)]))

    def _options(self, with_grad: bool) -> LossOptions:
        teachers = self.config.teachers
        # Outside teachers are further columns, which the code for a rule does not look for.
        rule = teachers if teachers in KERNEL_RULES and not self.num_outside else "matrix"
        return LossOptions(rule, self.config.label_smoothing, self.config.distill_loss == "cross_entropy", with_grad)

    @torch.no_grad()
    def reset_temperature(self) -> None:
        """Set the temperature to what the configuration gives for this step, whatever it was annealed to."""
        scheduled = self.config.temperature_rule == "schedule"
        self.temperature.copy_(self._scheduled() if scheduled else self.initial_temperature)

    @torch.no_grad()
    def end_batch(self, totals: Tensor | tuple[Tensor, Tensor]) -> None:
        """Move the temperature; waits for nothing on the device.

        To be called once per global batch, after its update, and not if the update was skipped.

        The rule ``anneal`` is the authors': a mean confidence, measured at the temperature of this batch, above
        ``anneal_threshold`` multiplies the temperature by ``anneal_factor``.

        Args:
            totals: ``[stats.confidence, stats.samples]``, summed over passes and ranks (with torch.distributed:
                ``dist.all_reduce(totals)``); read only if :attr:`needs_confidence`.
        """
        if self._last_exit_alone:
            return
        self.step += 1
        if self.config.temperature_rule == "schedule":
            self.temperature.copy_(self._scheduled())
        elif self.needs_confidence:
            # On the device, by torch.where: to decide it here would wait for the batch.
            is_confident = totals[0] / totals[1] > self.config.anneal_threshold
            moved = self.temperature * self.config.anneal_factor
            self.temperature.copy_(torch.where(is_confident, moved.clamp(*self.config.bounds), self.temperature))

    def _scheduled(self) -> Tensor:
        """The initial temperature times the schedule at this step: a level and a sum of ramps, so that nothing is looked up."""
        steps, factors = self.schedule.unbind(1)
        # T = T_0 * (f[0] + sum over i of clamp((step - s[i]) / (s[i+1] - s[i]), 0, 1) * (f[i+1] - f[i]))
        ramps = ((self.step - steps[:-1]) / steps.diff()).clamp(0, 1)
        return self.initial_temperature * (factors[0] + (ramps * factors.diff()).sum())

    def _check(
        self,
        logits: Sequence[Tensor],
        first: Tensor,
        second: Tensor | None,
        share: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        if len(logits) != self.num_exits:
            raise DataError(f"logits has {len(logits)} exits; this loss was made for {self.num_exits}")
        z = logits[0]
        # float64 is there for tests of gradients.
        known = z.dtype in DTYPES or (z.dtype == torch.float64 and z.device.type == "cpu")
        if z.dim() != 2 or not z.shape[1] or not known:
            allowed = ", ".join(map(_short, DTYPES))
            raise DataError(f"logits[0] is {_describe(z)}; allowed is [N, K], K at least 1, in {allowed}")
        # The GPU kernels take pointers and the shape of the first exit: they would read beyond a smaller tensor.
        for number, other in enumerate(logits):
            if (other.shape, other.dtype, other.device) != (z.shape, z.dtype, z.device):
                raise DataError(
                    f"logits[{number}] is {_describe(other)}, logits[0] {_describe(z)}; all exits must agree"
                )
        samples, classes = z.shape
        check_kind("targets", first, Tensor, "give a tensor of labels [N] or of distributions [N, K]")
        soft = first.is_floating_point() and second is None
        expected = (samples, classes) if soft else (samples,)
        for name, tensor, shape, integer in (
            ("targets", first, expected, not soft),
            ("targets.second", second, (samples,), True),
            ("targets.share", share, (samples,), False),
            ("weights", weights, (samples,), False),
        ):
            if tensor is None:
                continue
            right = tensor.dtype == torch.int64 if integer else tensor.is_floating_point()
            if tuple(tensor.shape) != shape or not right or tensor.device != z.device:
                kind = "int64" if integer else "a floating-point dtype"
                raise DataError(
                    f"{name} is {_describe(tensor)}; for these logits it must be {list(shape)} in {kind} on {z.device}"
                )

    def _check_outside(self, outside: Sequence[Tensor], z: Tensor) -> None:
        if len(outside) != self.num_outside and (outside or (torch.is_grad_enabled() and self.needs_outside)):
            raise DataError(f"outside has {len(outside)} tensors; this loss has {self.num_outside} outside teachers")
        for number, other in enumerate(outside):
            if (other.shape, other.dtype, other.device) != (z.shape, z.dtype, z.device):
                raise DataError(f"outside[{number}] is {_describe(other)}, logits[0] {_describe(z)}; all must agree")


def _label_count(given: float | Tensor | None, first: Tensor, second: Tensor | None) -> Tensor:
    """The divisor of the label losses, a tensor [] on the labels' device; without one given, the labeled samples here."""
    if isinstance(given, Tensor):
        return given.to(first.device)
    if given is not None:
        if not 0 < given < math.inf:
            raise DataError(f"labeled is {given:g}; it must be a number above 0")
        return torch.full((), given, dtype=torch.float32, device=first.device)
    if first.is_floating_point():
        valid = first.sum(1) > 0
    else:
        valid = first >= 0 if second is None else (first >= 0) & (second >= 0)
    # At least 1: a micro batch without labels has a label loss of 0, and not of 0 / 0.
    return valid.sum().clamp(min=1).float()


def _per_exit(name: str, value: float | Sequence[float], num_exits: int) -> Tensor:
    if isinstance(value, Sequence) and len(value) != num_exits:
        raise ConfigError(
            f"loss.{name} has {len(value)} numbers, but the network has {num_exits} exits; give one number or {num_exits}"
        )
    return torch.tensor(value, dtype=torch.float32).expand(num_exits).clone()


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {_short(tensor.dtype)} on {tensor.device}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
