"""One pass over samples in a random order: a permutation of them, or a drawing that takes all classes equally often.

Every function is pure: the same seed and number of the pass give the same order, on any rank and after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_train.data.rng import Purpose, random_bits

Ids = NDArray[np.int64]

EXTRA_PASSES = 1 << 40
"""Number of the first pass that the fraction of a weight is taken from: far from the whole ones, so that the orders differ."""


def epoch_order(shard_sizes: Ids, seed: int, number: int, window: int) -> Ids:
    """The permutation of a pass, int64 [N]: shards shuffled, then the samples of every ``window`` shards among themselves.

    Args:
        shard_sizes: samples per shard, int64 [S]; ids count through the shards in their order.
        seed: seed of the shuffling.
        number: number of the pass; of a plain split, that of the epoch.
        window: number of shards whose samples are shuffled together; from S on it is a permutation of everything.
    """
    ends = np.cumsum(shard_sizes)
    starts = ends - shard_sizes
    shards = np.argsort(random_bits(seed, number, Purpose.SHARD_ORDER, np.arange(len(shard_sizes))))
    order = np.empty(int(ends[-1]), dtype=np.int64)
    filled = 0
    # A permutation of everything would read every shard at random places all epoch long: too slow from a disk or over
    # the network, and more than a cache of shards can hold.
    for first in range(0, len(shards), window):
        ids = np.concatenate([np.arange(starts[shard], ends[shard]) for shard in shards[first : first + window]])
        # No two ids have the same bits, so that the result does not depend on the sorting algorithm.
        order[filled : filled + len(ids)] = ids[np.argsort(random_bits(seed, number, Purpose.SAMPLE_ORDER, ids))]
        filled += len(ids)
    return order


@dataclass(frozen=True)
class Shuffling:
    """What decides the order of a pass: the seed, and the number of shards whose samples are shuffled together."""

    seed: int
    window: int


@dataclass(frozen=True)
class Stratum:
    """Samples of a split that are drawn together, in the way of stratified sampling.

    Args:
        ids: ids of the samples, rising.
        shard_sizes: number of these samples in each shard.
        shuffling: seed and window of every pass.
        label: labels of the samples, if a pass takes all classes equally often; without, it takes every sample once.
        weight: how often each sample comes per epoch.
    """

    ids: Ids
    shard_sizes: Ids
    shuffling: Shuffling
    label: NDArray[np.int64] | None = None
    weight: float = 1.0

    @property
    def extra(self) -> int:
        """Images per epoch that come once more than the others, for the fraction in the weight."""
        return round(self.weight % 1 * len(self.ids))

    @property
    def size(self) -> int:
        """Images per epoch."""
        return int(self.weight) * len(self.ids) + self.extra

    def one_pass(self, number: int) -> Ids:
        """The samples in the order of pass ``number``, int64 [len(ids)]."""
        if self.label is None or not len(self.ids):
            return self.ids[self._shuffled(self.shard_sizes, number)]
        times = _balanced_times(self.label, self.ids, self.shuffling.seed, number)
        ends = np.cumsum(self.shard_sizes)
        # Round k has the samples that come more than k times.
        rounds = []
        for k in range(int(times.max())):
            chosen = np.flatnonzero(times > k)
            sizes = np.diff(np.searchsorted(chosen, ends), prepend=0)
            # Another shuffling for every round, or the appearances of an image would stand close together.
            rounds.append(self.ids[chosen[self._shuffled(sizes, number + (k << 32))]])
        return interleave(rounds)

    def stretch(self, epoch: int, length: int, first_pass: int = 0) -> Ids:
        """Concatenate passes from ``first_pass`` on; ``epoch`` takes [epoch * length, (epoch + 1) * length).

        Each epoch goes on where the one before it ended: without class balancing, the counts of any two images differ by at
        most one.
        """
        # Computed from the number of the epoch alone: a resumed run needs no state of it.
        first, size = epoch * length, len(self.ids)
        numbers = range(first // size, -(-(first + length) // size))
        passes = np.concatenate([self.one_pass(first_pass + number) for number in numbers])
        return passes[first % size : first % size + length]

    def of_epoch(self, epoch: int) -> list[Ids]:
        """As many whole passes as the weight has whole, and for its fraction a stretch of a separate series of passes."""
        times = int(self.weight)
        whole = [self.one_pass(epoch * times + number) for number in range(times)]
        return [*whole, self.stretch(epoch, self.extra, EXTRA_PASSES)] if self.extra else whole

    def _shuffled(self, shard_sizes: Ids, number: int) -> Ids:
        return epoch_order(shard_sizes, self.shuffling.seed, number, self.shuffling.window)


def interleave(parts: Sequence[Ids]) -> Ids:
    """Merge sequences evenly: of any stretch, each has the share that it has of the whole, up to one place."""
    if len(parts) == 1:
        return parts[0]
    # Element i of n stands at (i + 1/2) / n of the way; the sort must be stable, or ties would depend on its algorithm.
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    merged: Ids = np.concatenate(parts)[np.argsort(places, kind="stable")]
    return merged


def _balanced_times(label: NDArray[np.int64], ids: Ids, seed: int, number: int) -> Ids:
    """How often each sample comes in a pass of N draws, class-balanced, int64 [N]."""
    classes, member, count = np.unique(label, return_inverse=True, return_counts=True)
    wanted = np.full(len(classes), len(ids) // len(classes))
    # N samples are rarely a multiple of K classes: N mod K classes, drawn anew in every pass, come once more.
    one_more = np.argsort(random_bits(seed, number, Purpose.CLASS_REMAINDER, classes))[: len(ids) % len(classes)]
    wanted[one_more] += 1
    # The position of a sample in a random order of its class; the first of them make up the remainder of the class.
    by_class = np.lexsort((random_bits(seed, number, Purpose.CLASS_MEMBERS, ids), member))
    position = np.empty(len(ids), dtype=np.int64)
    position[by_class] = np.arange(len(ids)) - (np.cumsum(count) - count)[member[by_class]]
    times: Ids = (wanted // count)[member] + (position < (wanted % count)[member])
    return times
