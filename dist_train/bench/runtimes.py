"""One early-exit network in one runtime, as ``dist-train bench predict`` times it: routed by its exits, and without any."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_train.models.stages import StagedNetwork
from dist_train.prediction.stopping import Thresholds, predict

Images = NDArray[np.float32]
Exits = NDArray[np.int64]


class Runtime(Protocol):
    """What runs a network.

    Attributes:
        name: as tables call it.
        precision: that it computes in.
    """

    name: str
    precision: str

    def prepare(self, images: Images, threads: int) -> None:
        """Take these images [N, 3, S, S] from now on, and so many threads."""

    def route(self, exits: Exits) -> None:
        """Predict as in use, decisions included, but let each image leave at its exit here, from 0, int64 [N]."""

    def static(self, number: int) -> None:
        """Run the network cut off behind an exit, from 0, without the other exits."""


class Script:
    """Where each image of a batch leaves: asked exit by exit, it says which of those that are left leave."""

    def __init__(self, exits: Exits) -> None:
        self._left = exits

    def leaves(self, number: int) -> NDArray[np.bool_]:
        """Of the images that no exit before took, bool."""
        leaving: NDArray[np.bool_] = self._left == number
        self._left = self._left[~leaving]
        return leaving


@dataclass(frozen=True)
class _ScriptedThresholds(Thresholds):
    """Thresholds that are computed, and then overruled by a script."""

    script: Script = field(default_factory=lambda: Script(np.zeros(0, dtype=np.int64)))

    def should_exit(self, number: int, logits: Tensor, classes: Tensor) -> Tensor:
        # For its time alone: prediction in use decides at every exit.
        super().should_exit(number, logits, classes)
        return torch.from_numpy(self.script.leaves(number))


class TorchRuntime:
    """:func:`~dist_train.prediction.predict` on the CPU.

    Args:
        network: to route in.
        cut: the network cut off behind each exit.
        policy: whose measure of confidence is computed.
        compiled: whether torch.compile makes the programs faster first, which takes minutes.
    """

    def __init__(
        self, network: StagedNetwork, cut: Sequence[nn.Module], policy: Thresholds, compiled: bool = False
    ) -> None:
        self.name, self.precision = "torch compiled" if compiled else "torch", "fp32"
        self._network, self._policy = network, policy
        self._static = list(cut)
        if compiled:  # copies: compiling changes a module, and the others are timed as they are
            self._network, self._static = copy.deepcopy((network, self._static))
            for program in (*self._network.stages, *self._static):
                program.compile(dynamic=True)

    def prepare(self, images: Images, threads: int) -> None:
        """See :class:`Runtime`; images with the channels last, as files are predicted."""
        torch.set_num_threads(threads)
        self._images = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)

    def route(self, exits: Exits) -> None:
        """See :class:`Runtime`."""
        ours = self._policy
        policy = _ScriptedThresholds(ours.values, ours.measure, ours.temperatures, ours.weights, Script(exits))
        predict(self._network, self._images, policy)

    @torch.inference_mode()
    def static(self, number: int) -> None:
        """See :class:`Runtime`."""
        self._static[number](self._images)
