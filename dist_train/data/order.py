"""Which sample is read when, and by which rank: pure functions of (index, seed, epoch).

An epoch is a sequence of views.  View v of N samples is the sample v % N in its variation v // N: the n-th time that the
sampling gives a sample in an epoch, it is augmented in another way.  Without sampling options an epoch is one permutation
of all ids.  Global batch k is its stretch [k B, (k + 1) B), whatever the number of ranks; a rank takes its contiguous part
of that, in micro batches, so that the sequence of a global batch's micro batches is the same for every number of ranks.

Views that ``last_batch: wrap`` takes again from the start of the epoch are the same views, augmented as before.  Only with
a fixed share of labeled images are they new ones, because its sampling fills up the last batch itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.passes import Ids
from dist_train.data.sampling import sampling_of
from dist_train.errors import ConfigError

_Array = TypeVar("_Array", bound=NDArray[Any])


class Order:
    """The epochs of a training split, as the configuration wants them sampled: plain, balanced, mixed or with a fixed share.

    Which images an epoch has is up to :mod:`dist_train.data.sampling`.  Here they are cut into global batches, and with
    ``repeated_augment`` R a global batch has B/R images in R views each, and R epochs in a row make one pass.

    Args:
        shard_sizes: samples per shard, int64 [S].
        label: label of every sample, int64 [N].
        data: the sampling options.
        seed: seed of the shuffling.
        global_batch: samples per update, B.
        weight: how often each sample of a mixture comes per epoch, float64 [N].

    Raises:
        ConfigError: options that this split or this global batch does not allow.
    """

    def __init__(
        self,
        shard_sizes: Ids,
        label: NDArray[np.int64],
        data: DataConfig,
        seed: int,
        global_batch: int,
        *,
        weight: NDArray[np.float64] | None = None,
    ) -> None:
        self._samples, self._repeats, self._last_batch = len(label), data.repeated_augment, data.last_batch
        _refuse_indivisible(global_batch, self._repeats)
        self._images = global_batch // self._repeats
        self._sampling = sampling_of(shard_sizes, label, data, seed, self._images, weight)
        self.pass_size, self.per_batch = self._sampling.pass_size, self._sampling.per_batch
        self.reads_shards_once = self._sampling.reads_shards_once
        self.steps_per_epoch = steps_per_epoch(self.pass_size // self._repeats, self.per_batch, data.last_batch)

    def epoch(self, epoch: int) -> Ids:
        """The views of an epoch in their order, int64; its global batches may leave out the end (drop), or go past it (wrap)."""
        ids = self._sampling.epoch(epoch, self.steps_per_epoch)
        if self._repeats > 1:
            ids = _repeat(ids, self._images, self._repeats)
        return _views(ids, self._samples)

    def summary(self) -> str | None:
        """What an epoch is, in words, where that is not simply every image once."""
        notes = [self._sampling.note] if self._sampling.note else []
        if self._repeats > 1:
            notes.append(
                f"every image of a global batch comes {self._repeats} times; {self._repeats} epochs make one pass"
            )
        left = self.pass_size // self._repeats - self.steps_per_epoch * self.per_batch
        if left:
            what = f"{left} images are left out" if left > 0 else f"{-left} images come twice"
            notes.append(f"in every epoch {what} (data.last_batch: {self._last_batch})")
        return "; ".join(notes) or None


def _refuse_indivisible(global_batch: int, repeats: int) -> None:
    if global_batch % repeats:
        below = global_batch // repeats * repeats
        nearest = " or ".join(str(size) for size in (below, below + repeats) if size)
        raise ConfigError(
            f"train.global_batch is {global_batch}, which does not divide by data.repeated_augment, {repeats}; use {nearest}"
        )


def steps_per_epoch(samples: int, per_batch: int, last_batch: Literal["drop", "wrap"]) -> int:
    """Global batches of an epoch, each with ``per_batch`` of the samples.

    The incomplete last one is dropped, or filled up from the epoch's start.
    """
    return samples // per_batch if last_batch == "drop" else -(-samples // per_batch)


def batch_positions(samples: int, batch: int, global_batch: int) -> Ids:
    """Places in the epoch's order that global batch ``batch`` takes, int64 [global_batch]; past the end they wrap."""
    return (batch * global_batch + np.arange(global_batch, dtype=np.int64)) % samples


def global_batch_views(order: Ids, batch: int, global_batch: int) -> Ids:
    """Views of global batch ``batch``, int64 [global_batch]."""
    return order[batch_positions(len(order), batch, global_batch)]


def rank_slice(ids: _Array, rank: int, world_size: int) -> _Array:
    """The contiguous part of ``ids`` that a rank takes; parts differ by at most one in length and may be empty."""
    return ids[len(ids) * rank // world_size : len(ids) * (rank + 1) // world_size]  # type: ignore[return-value]


def micro_batches(ids: _Array, size: int) -> list[_Array]:
    """Cut a rank's part into micro batches of ``size``; the last may be shorter."""
    return [ids[first : first + size] for first in range(0, len(ids), size)]  # type: ignore[misc]


def replacements(order: Ids, position: int, labeled: NDArray[np.bool_]) -> Iterator[int]:
    """Views that may stand in for the one at ``position``, best first: the following ones of the order, wrapping round.

    They are normally images of the same global batch or of the next one, which then come twice.  A sample with a label is
    replaced by one with a label, and one without by one without, so that the number of labeled samples in a global batch is
    known beforehand.
    """
    sample = order[position] % len(labeled)
    for step in range(1, len(order)):
        candidate = int(order[(position + step) % len(order)])
        other = candidate % len(labeled)
        if labeled[other] == labeled[sample] and other != sample:
            yield candidate


def _repeat(ids: Ids, images: int, repeats: int) -> Ids:
    """Repeat each block of ``images`` ids as a block (a b a b, not a a b b): the views of an image are far apart in the batch."""
    whole = len(ids) // images * images
    blocks = np.tile(ids[:whole].reshape(-1, images), repeats).reshape(-1)
    return np.concatenate([blocks, np.tile(ids[whole:], repeats)])


def _views(ids: Ids, samples: int) -> Ids:
    """Number the appearances of every id: its n-th one becomes the view id + n x samples."""
    # Only those that come several times are sorted: in most epochs of millions of images there are none.
    several = np.flatnonzero(np.bincount(ids, minlength=samples)[ids] > 1)
    # Stable: appearances are numbered in the order of the epoch.
    by_id = several[np.argsort(ids[several], kind="stable")]
    ordered = ids[by_id]
    index = np.arange(len(several))
    is_first = np.diff(ordered, prepend=-1) != 0
    # The number of an appearance is its distance from the first one of the same id.
    number = index - np.maximum.accumulate(np.where(is_first, index, 0))
    views: Ids = ids.copy()
    views[by_id] += samples * number
    return views
