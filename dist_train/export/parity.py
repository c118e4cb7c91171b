"""Whether the exported programs do what the network does: the same images through both."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.errors import DataError, UserError
from dist_train.export.runner import EarlyExit
from dist_train.models import MultiExitNetwork
from dist_train.prediction.stopping import Thresholds

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the batch's largest logit where that is above 1: rounding grows with the logits."""
TIE = 1e-5
"""So near to a threshold rounding decides whether an image exits."""


class ParityError(UserError):
    """The exported programs do not compute what the network computes."""


@dataclass
class Parity:
    """Images through the network and the exported programs, and what came of it.

    ``largest_logit_difference`` is absolute.  ``ties`` are images whose confidence is within :data:`TIE` of a threshold and that took another
    exit there, in float32.  ``pillow_*``: the runner's own decoding beside the one of evaluation, in levels of 0 to 255, and what it changed.
    """

    split: str
    max_changed: float | None = None
    """Share of the images that may have another class or exit; None: none of them, and logits are compared as well."""
    images: int = 0
    labeled: int = 0
    """Images that have a label; accuracy is theirs."""
    largest_logit_difference: float = 0.0
    ties: int = 0
    other_class: int = 0
    other_exit: int = 0
    changed: int = 0
    """Images of which one or the other is true."""
    correct: NDArray[np.int64] | None = None
    """Images that each exit classifies correctly, [M]."""
    policy_correct: int = 0
    counts: NDArray[np.int64] | None = None
    """Images that left at each exit, [M]."""
    pillow_images: int = 0
    pillow_mean_difference: float = 0.0
    pillow_largest_difference: float = 0.0
    pillow_other_class: int = 0
    pillow_other_exit: int = 0

    def to_json(self) -> dict[str, Any]:
        """As in policy.json; accuracies as shares of 1, null where no image has a label."""
        assert self.correct is not None
        assert self.counts is not None
        return {
            "split": self.split,
            "images": self.images,
            "labeled": self.labeled,
            "largest_logit_difference": self.largest_logit_difference,
            "ties": self.ties,
            "other_class": self.other_class,
            "other_exit": self.other_exit,
            "changed": self.changed,
            "max_changed": self.max_changed,
            "top1": [int(hits) / self.labeled if self.labeled else None for hits in self.correct],
            "policy_top1": self.policy_correct / self.labeled if self.labeled else None,
            "policy_shares": (self.counts / self.images).tolist(),
            "pillow": {
                "images": self.pillow_images,
                "mean_difference": self.pillow_mean_difference,
                "largest_difference": self.pillow_largest_difference,
                "other_class": self.pillow_other_class,
                "other_exit": self.pillow_other_exit,
            },
        }


@torch.inference_mode()
def compare(
    network: MultiExitNetwork,
    policy: Thresholds,
    exported: EarlyExit,
    batches: Iterable[tuple[Tensor, Tensor, list[bytes]]],
    split: str,
    max_changed: float | None = None,
) -> Parity:
    """Every image through both.

    Args:
        network: in float32, in evaluation mode.
        policy: as exported.
        exported: the folder's runner.
        batches: images [N, 3, S, S], labels [N] (-1: none), and the images' files.
        split: where they are from.
        max_changed: the share of the images that may have another class or exit, for programs of a lower precision.

    Raises:
        ParityError: a logit is not finite or differs by more than :data:`TOLERANCE`, or an image takes another exit; with
            ``max_changed``: a logit is not finite, or more images than that have another class or exit.
        DataError: there are no images.
    """
    zeros = np.zeros(network.num_exits, np.int64)
    found = Parity(split, max_changed, correct=zeros.copy(), counts=zeros.copy())
    for images, labels, files in batches:
        _add(found, network(images), policy, exported, images.contiguous().numpy(), labels.numpy())
        _add_pillow(found, exported, images.contiguous().numpy(), files)
    if not found.images:
        raise DataError(f"{split}: none of its images can be read, so the exported programs cannot be compared")
    if max_changed is not None and found.changed > max_changed * found.images:
        raise ParityError(
            f"{found.changed} of {found.images} images get another class ({found.other_class}) or take another exit ({found.other_exit}) than in float32, "
            f"allowed is a share of {max_changed:g}; not exported: give another --precision or --max-changed"
        )
    return found


def _add(
    found: Parity, logits: tuple[Tensor, ...], policy: Thresholds, exported: EarlyExit, images: Any, labels: Any
) -> None:
    assert found.correct is not None
    assert found.counts is not None
    scale = max(1.0, max(float(one.abs().max()) for one in logits))
    for number, (expected, got) in enumerate(zip(logits, all_logits(exported, images)), start=1):
        _check_logits(found, float(np.abs(expected.numpy() - got).max()), scale, f"exit {number}")
        found.correct[number - 1] += int((got.argmax(1) == labels).sum())
    exits, margins = _exits(policy, logits)
    result = exported.predict(images)
    # The runner counts exits from 1.
    other = result.exits - 1 != exits
    if found.max_changed is None and (other & (margins > TIE)).any():
        raise ParityError(f"{int(other.sum())} of {len(images)} images take another exit when exported; not exported")
    every = torch.stack(logits, dim=1).numpy()
    rows = np.arange(len(images))
    taken = every[rows, result.exits - 1]
    # Once more as the runner computes: only the images that have not left go on to the next program.
    _check_logits(found, float(np.abs(taken - result.logits).max()), scale, "the exit taken")
    another = every[rows, exits].argmax(1) != result.classes
    found.ties += 0 if found.max_changed is not None else int(other.sum())
    found.other_exit += int(other.sum())
    found.other_class += int(another.sum())
    found.changed += int((other | another).sum())
    found.images += len(images)
    found.labeled += int((labels >= 0).sum())
    found.policy_correct += int((result.classes == labels).sum())
    found.counts += np.bincount(result.exits - 1, minlength=len(logits))


def _check_logits(found: Parity, difference: float, scale: float, where: str) -> None:
    if not np.isfinite(difference):
        raise ParityError(f"the logits of {where} are not finite; not exported")
    allowed = TOLERANCE * scale if found.max_changed is None else np.inf
    if difference > allowed:
        raise ParityError(
            f"the logits of {where} differ by {difference:.2g} when exported, allowed is {allowed:.2g}; not exported"
        )
    found.largest_logit_difference = max(found.largest_logit_difference, difference)


def _exits(policy: Thresholds, logits: tuple[Tensor, ...]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The exit that the policy lets every image take, from 0, and how far its confidence is from the nearest threshold."""
    classes = torch.stack([one.argmax(1) for one in logits], dim=1)
    last = len(logits) - 1
    exits = torch.full((len(classes),), last)
    margins = torch.full((len(classes),), float("inf"))
    # From the last one to the first, so that the first exit that lets an image go decides.
    for number in reversed(range(last)):
        leaves = policy.should_exit(number, logits[number], classes[:, : number + 1])
        exits[leaves] = number
        scores = policy.scores(number, logits[number], classes[:, : number + 1])
        margins = torch.minimum(margins, (scores - policy.values[number]).abs())
    return exits.numpy(), margins.numpy()


def _add_pillow(found: Parity, exported: EarlyExit, images: Any, files: list[bytes]) -> None:
    """The same images as the runner itself decodes them, without those that Pillow refuses."""
    loaded = {}
    for row, file in enumerate(files):
        with contextlib.suppress(Exception):  # a damaged file can make Pillow raise anything
            loaded[row] = exported.load(io.BytesIO(file))
    if not loaded:
        return
    images, decoded = images[list(loaded)], np.stack(list(loaded.values()))
    deviation = np.float32(exported.policy["preprocessing"]["std"])[:, None, None]
    # Back from (x / 255 - mean) / std to levels; the mean cancels in a difference.
    levels = np.abs(decoded - images) * deviation * 255
    # Both by the exported programs, so that only the decoding differs.
    expected, got = exported.predict(images), exported.predict(decoded)
    weight = len(images) / (found.pillow_images + len(images))
    found.pillow_images += len(images)
    # mean <- mean + n / N (mean of the batch - mean)
    found.pillow_mean_difference += weight * (float(levels.mean()) - found.pillow_mean_difference)
    found.pillow_largest_difference = max(found.pillow_largest_difference, float(levels.max()))
    found.pillow_other_class += int((expected.classes != got.classes).sum())
    found.pillow_other_exit += int((expected.exits != got.exits).sum())


def all_logits(exported: EarlyExit, images: NDArray[np.float32]) -> Iterable[NDArray[np.float32]]:
    """Logits [N, K] of exit after exit by the exported programs, of all images at every exit."""
    if exported.graph:
        yield from _logits_by_thresholds(exported, images)
        return
    given = [images]
    for stage in exported.stages:
        logits, *given = stage(given)
        yield logits


def _logits_by_thresholds(exported: EarlyExit, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The same of a program that stops by itself: it is made to stop at one exit after the other."""
    chosen, counts, found = exported.thresholds, exported.counts.copy(), []
    for number in range(len(chosen)):
        exported.thresholds = leaving_at(number, len(chosen))
        found.append(exported.predict(images).logits)
    exported.thresholds, exported.counts = chosen, counts
    return found


def leaving_at(number: int, exits: int) -> NDArray[np.float32]:
    """Thresholds by which every image leaves at one exit, from 0."""
    return np.where(np.arange(exits) < number, np.inf, -np.inf).astype(np.float32)
