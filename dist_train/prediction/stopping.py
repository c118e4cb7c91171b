"""Prediction that stops: a policy decides per sample after every exit, and confident samples go no further."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from dist_train.checks import check_count, check_kind
from dist_train.errors import ConfigError
from dist_train.models.network import MultiExitNetwork
from dist_train.prediction.confidence import FEATURES, AnyMeasure, confidence_with_history

WORTH_CUTTING = 500
"""Images from which on cutting a network saves more time than it takes, about: measured are 200 to 2,700."""


@dataclass(frozen=True)
class Thresholds:
    """A sample exits at the first exit whose confidence reaches that exit's threshold (:func:`~dist_train.prediction.confidence.exits_taken`).

    ``values`` has one threshold per exit; the last may be left out, because there every sample exits; infinity means
    that no sample exits there. ``temperatures``, one per exit, divide the logits before their confidence is taken;
    ``weights``, a row per exit, are those of the measure ``learned``.
    """

    values: Sequence[float]
    measure: AnyMeasure = "max_probability"
    temperatures: Sequence[float] | None = None
    weights: Sequence[Sequence[float]] | None = None

    def check(self, num_exits: int) -> None:
        """Raise ConfigError where there is not one number (and temperature) per exit, and for a measure that is none."""
        if self.measure not in get_args(AnyMeasure):
            raise ConfigError(f"the measure is {self.measure!r}; use one of {', '.join(get_args(AnyMeasure))}")
        _check_numbers("thresholds", self.values)
        if len(self.values) not in (num_exits, num_exits - 1):
            raise ConfigError(
                f"{len(self.values)} thresholds are given for {num_exits} exits; give {num_exits - 1}, the last exit needs none"
            )
        if self.temperatures is not None:
            _check_numbers("temperatures", self.temperatures)
        if self.temperatures is not None and len(self.temperatures) != num_exits:
            raise ConfigError(
                f"{len(self.temperatures)} temperatures are given for {num_exits} exits; give one per exit"
            )
        if self.temperatures is not None and not all(0 < one < math.inf for one in self.temperatures):
            raise ConfigError(f"temperatures are {list(self.temperatures)}; allowed are numbers above 0")
        if self.measure == "learned" and _row_lengths(self.weights) != [len(FEATURES) + 1] * num_exits:
            raise ConfigError(
                f"the measure learned needs {len(FEATURES) + 1} weights for each of {num_exits} exits; `dist-train eval` fits them"
            )

    def scores(self, number: int, logits: Tensor, classes: Tensor) -> Tensor:
        """Confidence of exit ``number`` (from 0), float32 [N].

        Args:
            number: of the exit.
            logits: its own, [N, K].
            classes: predicted by each exit up to it, int64 [N, number + 1].
        """
        temperature = self.temperatures[number] if self.temperatures is not None else 1.0
        scaled = logits if temperature == 1.0 else logits.float() / temperature
        weights = self.weights[number] if self.weights is not None else None
        return confidence_with_history(scaled, classes, self.measure, weights)

    def should_exit(self, number: int, logits: Tensor, classes: Tensor) -> Tensor:
        """Which samples exit at exit ``number``, bool [N]; arguments as of :meth:`scores`."""
        scores = self.scores(number, logits, classes)
        # Rounded to the scores' dtype as in exits_taken, so that both decide alike.
        return scores >= torch.tensor(self.values[number]).to(scores)


@dataclass(frozen=True)
class Patience:
    """A sample exits when ``exits`` exits in a row have predicted the same class as the one before them.

    Zhou et al., "BERT Loses Patience: Fast and Robust Inference with Early Exit", NeurIPS 2020, section 3.2.
    """

    exits: int

    def check(self, num_exits: int) -> None:
        """Raise ConfigError for a patience that no network of so many exits can have."""
        check_count("patience", self.exits)
        if self.exits >= num_exits:
            raise ConfigError(
                f"patience is {self.exits}; it must be at least 1 and below the number of exits, {num_exits}"
            )

    def should_exit(self, number: int, logits: Tensor, classes: Tensor) -> Tensor:
        """Which samples exit, bool [N], by the classes that each exit so far predicted, int64 [N, number + 1]."""
        if number < self.exits:
            return torch.zeros(len(classes), dtype=torch.bool, device=classes.device)
        return (classes[:, -1 - self.exits :] == classes[:, -1:]).all(dim=1)


def _check_numbers(name: str, given: Sequence[float]) -> None:
    """Raise ConfigError for what is no list of numbers, or holds NaN."""
    try:
        unknown = any(math.isnan(given[index]) for index in range(len(given)))
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ConfigError(f"{name} are {given!r}; give a list of numbers, one per exit") from None
    if unknown:
        raise ConfigError(f"{name} are {list(given)}; allowed are numbers and infinity")


def _row_lengths(given: Any) -> list[int]:
    """The length of each row; none for what has no rows."""
    try:
        return [len(row) for row in given]
    except TypeError:
        return []


@runtime_checkable
class Policy(Protocol):
    """When a sample exits: :class:`Thresholds`, :class:`Patience`, or a rule of one's own with these two methods."""

    def check(self, num_exits: int) -> None:
        """Raise ConfigError where the policy does not fit a network of so many exits."""
        ...

    def should_exit(self, number: int, logits: Tensor, classes: Tensor) -> Tensor:
        """Which samples exit, bool [N]; not asked at the last exit, where all do.

        Args:
            number: of the exit, from 0.
            logits: its own, [N, K], of the samples that are still there.
            classes: predicted by each exit up to it, int64 [N, number + 1].
        """
        ...


def check_policy(policy: Policy, num_exits: int) -> None:
    """Raise ConfigError for what is no policy, or one that does not fit the number of exits."""
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise ConfigError(
            f"policy is {policy!r}; give Thresholds, Patience or at_exit of dist_train.prediction, or an object with check and should_exit"
        )
    policy.check(num_exits)


@dataclass(frozen=True)
class Predictions:
    """One row per image, in the order of the images.

    ``logits`` [N, K] are those of the exit that the image left at; ``exits`` int64 [N] counts from 0; ``milliseconds`` is how
    long each image waited for its result, float64 [N] on the CPU: the same for all that leave a batch together.
    """

    logits: Tensor
    exits: Tensor
    milliseconds: Tensor

    @property
    def classes(self) -> Tensor:
        """The predicted class of each image, int64 [N]."""
        return self.logits.argmax(1)


def at_exit(number: int, num_exits: int) -> Thresholds:
    """The policy by which every sample exits at one exit, counted from 1 as in tables.

    Raises:
        ConfigError: there is no such exit.
    """
    check_count("exit", number)
    if number > num_exits:
        raise ConfigError(f"exit is {number}; the network has the exits 1 to {num_exits}")
    return Thresholds([float("inf")] * (number - 1) + [float("-inf")] * (num_exits - number + 1))


def for_inference(network: MultiExitNetwork, image_size: int, images: int | None = None) -> MultiExitNetwork:
    """The form of a network that :func:`predict` is fastest with: cut into stages, or itself where it cannot be cut.

    Cutting takes seconds, so for few images the network is left as it is.  Predictions are the same up to rounding.

    Args:
        network: in evaluation mode, on the device of the images to come.
        image_size: S, height and width of the images, in pixels.
        images: how many will come; None: many.
    """
    check_count("image_size", image_size)
    if images is not None and images < WORTH_CUTTING:
        return network
    try:
        return network.staged(image_size)
    except ConfigError:
        return network


def _decided(policy: Policy, number: int, logits: Tensor, predicted: Tensor) -> Tensor:
    """Which samples exit; raises ConfigError for what a policy of one's own says in another form."""
    confident = policy.should_exit(number, logits, predicted)
    if not isinstance(confident, Tensor) or confident.dtype != torch.bool or confident.shape != logits.shape[:1]:
        said = f"{list(confident.shape)} in {confident.dtype}" if isinstance(confident, Tensor) else repr(confident)
        raise ConfigError(
            f"{type(policy).__name__}.should_exit gave {said}; it gives a bool tensor [{len(logits)}], one per sample"
        )
    return confident


@torch.inference_mode()
def predict(network: MultiExitNetwork, images: Tensor, policy: Policy) -> Predictions:
    """Classify a batch; after every exit the confident samples exit, and only the others are computed further.

    The result is that of the policy applied afterwards to the logits of all exits.

    Args:
        network: in evaluation mode; :func:`for_inference` gives the fastest form.
        images: float [N, 3, H, W] on the network's device, prepared as in training.
        policy: when a sample leaves.

    Raises:
        ConfigError: the policy does not fit the network's number of exits, or the network is in training mode.
    """
    if not hasattr(network, "iter_exits"):
        raise ConfigError(f"network is a {type(network).__name__}; give one of load_model, MSDNet or attach_exits")
    check_kind("images", images, Tensor, "give a tensor of floats [N, 3, H, W]")
    check_policy(policy, network.num_exits)
    if images.dim() != 4 or not images.is_floating_point():
        raise ConfigError(f"images are {list(images.shape)} in {images.dtype}; give a tensor of floats [N, 3, H, W]")
    last = network.num_exits - 1
    if network.training:
        raise ConfigError(
            "the network is in training mode, where its predictions depend on the batch; call eval() first"
        )
    count, device = len(images), images.device
    exits = torch.full((count,), last, device=device)
    milliseconds = torch.zeros(count, dtype=torch.float64)
    if not count:
        return Predictions(images.new_zeros(0, network.num_classes), exits, milliseconds)
    waiting = torch.arange(count, device=device)
    predicted = waiting.new_empty(count, 0)
    logits_out = None
    start = time.perf_counter()
    passes = network.iter_exits(images)
    logits = next(passes)
    for number in range(last + 1):
        predicted = torch.cat([predicted, logits.argmax(1, keepdim=True)], dim=1)
        confident = torch.ones_like(waiting, dtype=torch.bool)
        if number < last:
            confident = _decided(policy, number, logits, predicted)
        # Not before: under autocast their dtype is known from the first logits only.
        if logits_out is None:
            logits_out = logits.new_empty(count, logits.shape[1])
        rows = confident.nonzero()[:, 0]
        if not len(rows):
            logits = next(passes)
            continue
        # The row numbers are on the host by now, so the device has computed this exit.
        exited = waiting[rows]
        logits_out[exited], exits[exited] = logits[rows], number
        milliseconds[exited.cpu()] = 1000 * (time.perf_counter() - start)
        # Nobody is left: what lies behind this exit is never computed.
        if len(rows) == len(waiting):
            break
        stay = (~confident).nonzero()[:, 0]
        waiting, predicted = waiting[stay], predicted[stay]
        # The network goes on with these rows of its features alone.
        logits = passes.send(stay)
    passes.close()
    assert logits_out is not None
    return Predictions(logits_out, exits, milliseconds)
