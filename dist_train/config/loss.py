"""The section ``loss``: the objective."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dist_train.config.base import Natural, NotNegative, Section, Unit, expanded

AVERAGED = "averaged"
"""The outside teacher that is the moving average of the network's own weights."""

TEMPERATURES = (1e-3, 1e3)
"""Bounds of anneal where none are given.  Of two classes the surer one never has less than 0.5, so that by the default threshold
the temperature would rise forever, and float32 would keep nothing of the differences between logits.
"""


class LossConfig(Section):
    """The objective: labels at every exit, and distillation between exits.

    weight * mean over exits m of [ (1 - alpha) * label_weights[m] * CE(m) + alpha * distill_weights[m] * T^2 * D(m) ],
    where D(m) is the divergence of exit m from its teachers, softened by the temperature T.
    """

    preset: Literal["paper", "authors"] = "paper"
    """Defaults of the other fields: the formula of the paper, or its authors' released code (the same with weight 10)."""
    teachers: Literal["last", "next", "later", "ensemble", "best", "better", "none"] | tuple[tuple[float, ...], ...] = (
        "last"
    )
    """Teachers of an exit: last, next, all later ones, the ensemble of all, the best, all better later ones, none, or a matrix."""
    outside_teachers: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Further teachers of every exit; one with several exits teaches by its last: averaged (the moving average of this network's weights, see optim.ema_decay), a run folder, a checkpoint or hf://ORG/NAME, timm/NAME, torchvision/NAME or transformers/MODEL with the library's weights, or module:function, your own f(num_classes)."""
    outside_share: Unit = 0.5
    """Share of the outside teachers in what teaches an exit that has teachers in the network too; other exits learn from the outside ones alone."""
    alpha: Unit = 0.5
    """Weight of distillation against labels, 0 to 1."""
    label_weights: float | tuple[float, ...] = 1.0
    """Weight of the labels: one number, or one per exit."""
    distill_weights: float | tuple[float, ...] = 1.0
    """Weight of the distillation: one number, or one per exit (of the student)."""
    weight: Annotated[float, Field(gt=0)] = 2.0
    """Factor of the whole loss."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether the terms of the exits are averaged or summed."""
    distill_loss: Literal["cross_entropy", "kl", "dkd"] = "cross_entropy"
    """Distillation loss: cross_entropy to the teacher; kl, which is 0 at agreement and has the same gradient; or dkd, decoupled: the label's class and the other classes apart."""
    dkd_weights: tuple[NotNegative, NotNegative] = (1.0, 8.0)
    """Weights of dkd: of the label's class against all others together, and of the other classes among themselves."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of a label's mass that is spread over all classes."""
    temperature: float | tuple[float, ...] = 1.0
    """Temperature of the distillation, initial if it changes: one number, or one per exit."""
    temperature_rule: Literal["anneal", "constant", "schedule"] = "anneal"
    """anneal: multiplied by anneal_factor after every batch in which the teacher's mean confidence exceeds anneal_threshold; schedule: a function of the step."""
    anneal_threshold: Unit = 0.5
    """Threshold of anneal on the teacher's mean confidence: its largest probability at the current temperature."""
    anneal_factor: Annotated[float, Field(gt=0)] = 1.05
    """Factor by which anneal multiplies the temperature."""
    temperature_bounds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Smallest and largest temperature of anneal (default: 0.001 and 1000)."""
    temperature_schedule: tuple[tuple[Natural, Annotated[float, Field(gt=0)]], ...] = ()
    """Points [step, factor] of schedule, interpolated linearly and constant beyond the ends."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "authors":
            # What is given comes last, so that it wins over the preset.
            return {"weight": 10.0, **given}
        return given

    @field_validator("outside_teachers", mode="after")
    @classmethod
    def _expand_paths(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name if "://" in name else str(expanded(name)) for name in given)
        if len(set(names)) < len(names):
            raise ValueError(f"holds {', '.join(given)}; name each teacher once")
        return names

    @field_validator("teachers", "label_weights", "distill_weights", "temperature", mode="before")
    @classmethod
    def _check_numbers(cls, given: Any, info: ValidationInfo) -> Any:
        positive = info.field_name == "temperature"
        rows = given if isinstance(given, list | tuple) else [given]
        # One number, a list, or a matrix; words such as later are left to the type.
        for number in (number for row in rows for number in (row if isinstance(row, list | tuple) else [row])):
            if isinstance(number, int | float) and not (0 < number < math.inf or (number == 0 and not positive)):
                raise ValueError(
                    f"holds {number:g}; allowed is a finite number {'above' if positive else 'of at least'} 0"
                )
        return given

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest temperature of anneal."""
        return self.temperature_bounds or TEMPERATURES

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        low, high = self.bounds
        if low > high:
            raise ValueError(f"temperature_bounds are {[low, high]}; they must rise")
        initial = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        outside = [one for one in initial if not low <= one <= high]
        if outside and self.temperature_rule == "anneal":
            raise ValueError(
                f"temperature holds {outside[0]:g}, outside of temperature_bounds, {low:g} to {high:g}; the first step of anneal "
                "would jump into them; change one of the two"
            )
        steps = [step for step, _ in self.temperature_schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"temperature_schedule has the steps {steps}; they must rise")
        if (self.temperature_rule == "schedule") != bool(steps):
            raise ValueError(
                f"temperature_rule is {self.temperature_rule} and temperature_schedule has {len(steps)} points; "
                "points need the rule schedule, and schedule needs points"
            )
        return self
