"""Prediction that stops: a policy decides per sample after every exit, and what is sure goes no further."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError
from dist_train.models import MultiExitNetwork
from dist_train.policy import Measure, confidence


@dataclass(frozen=True)
class Thresholds:
    """A sample leaves at the first exit whose confidence reaches that exit's threshold (:func:`~dist_train.policy.exits_taken`).

    ``values`` has one threshold per exit; the last may be left out, because there every sample leaves; infinity means
    that no sample leaves at an exit. ``temperatures``, one per exit, divide the logits before their confidence is taken.
    """

    values: Sequence[float]
    measure: Measure = "max_probability"
    temperatures: Sequence[float] | None = None

    def check(self, num_exits: int) -> None:
        """Raise ConfigError where there is not one number (and temperature) per exit."""
        if len(self.values) not in (num_exits, num_exits - 1):
            raise ConfigError(
                f"{len(self.values)} thresholds are given for {num_exits} exits; give {num_exits - 1}, the last exit needs none"
            )
        if any(math.isnan(value) for value in self.values):
            raise ConfigError(f"thresholds are {list(self.values)}; allowed are numbers and infinity")
        if self.temperatures is not None and len(self.temperatures) != num_exits:
            raise ConfigError(
                f"{len(self.temperatures)} temperatures are given for {num_exits} exits; give one per exit"
            )

    def sure(self, number: int, logits: Tensor, agreed: Tensor) -> Tensor:
        """Which samples [N] leave at exit ``number`` (from 0) with these logits [N, K]."""
        temperature = self.temperatures[number] if self.temperatures is not None else 1.0
        scores = confidence(logits if temperature == 1.0 else logits.float() / temperature, self.measure)
        return scores >= torch.tensor(self.values[number]).to(scores)


@dataclass(frozen=True)
class Patience:
    """A sample leaves when ``exits`` exits in a row have predicted the same class as the one before them.

    Zhou et al., "BERT Loses Patience: Fast and Robust Inference with Early Exit", NeurIPS 2020, section 3.2.
    """

    exits: int

    def check(self, num_exits: int) -> None:
        """Raise ConfigError for a patience that no network of so many exits can have."""
        if not 1 <= self.exits < num_exits:
            raise ConfigError(
                f"patience is {self.exits}; it must be at least 1 and below the number of exits, {num_exits}"
            )

    def sure(self, number: int, logits: Tensor, agreed: Tensor) -> Tensor:
        """Which samples [N] leave; ``agreed`` int64 [N] counts the exits in a row that kept the prediction."""
        return agreed >= self.exits


Policy = Thresholds | Patience


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
    """The policy by which every sample leaves at one exit, counted from 1 as in tables.

    Raises:
        ConfigError: there is no such exit.
    """
    if not 1 <= number <= num_exits:
        raise ConfigError(f"exit is {number}; the network has the exits 1 to {num_exits}")
    return Thresholds([float("inf")] * (number - 1) + [float("-inf")] * (num_exits - number + 1))


@torch.inference_mode()
def predict(network: nn.Module, images: Tensor, policy: Policy) -> Predictions:
    """Classify a batch; after every exit the samples that are sure leave, and only the others are computed further.

    The result is that of the policy applied afterwards to the logits of all exits.

    Args:
        network: a :class:`~dist_train.models.MultiExitNetwork` in evaluation mode.
        images: float [N, 3, H, W] on the network's device, prepared as in training.
        policy: when a sample leaves.

    Raises:
        ConfigError: the policy does not fit the network's number of exits, or the network is in training mode.
    """
    multi_exit = cast(MultiExitNetwork, network)
    last = multi_exit.num_exits - 1
    policy.check(multi_exit.num_exits)
    if network.training:
        raise ConfigError(
            "the network is in training mode, where its predictions depend on the batch; call eval() first"
        )
    count, device = len(images), images.device
    exits = torch.full((count,), last, device=device)
    milliseconds = torch.zeros(count, dtype=torch.float64)
    if not count:
        return Predictions(images.new_zeros(0, multi_exit.num_classes), exits, milliseconds)
    waiting = torch.arange(count, device=device)
    agreed, before, logits_out = torch.zeros_like(waiting), None, None
    start = time.perf_counter()
    passes = multi_exit.iter_exits(images)
    logits = next(passes)
    for number in range(last + 1):
        classes = logits.argmax(1)
        if before is not None:
            agreed = torch.where(classes == before, agreed + 1, 0)
        sure = policy.sure(number, logits, agreed) if number < last else torch.ones_like(waiting, dtype=torch.bool)
        rows, left = sure.nonzero()[:, 0], waiting[sure]
        if logits_out is None:
            logits_out = logits.new_empty(count, logits.shape[1])
        logits_out[left], exits[left] = logits[rows], number
        # The row numbers are on the host by now, so the device has computed this exit.
        milliseconds[left.cpu()] = 1000 * (time.perf_counter() - start)
        if len(rows) == len(waiting):
            break
        if len(rows):
            stay = (~sure).nonzero()[:, 0]
            waiting, agreed, before = waiting[stay], agreed[stay], classes[stay]
            logits = passes.send(stay)
        else:
            before, logits = classes, next(passes)
    passes.close()
    assert logits_out is not None
    return Predictions(logits_out, exits, milliseconds)
