"""Which sample is read when and by whom: pure functions of (index, seed, epoch), whatever the number of ranks.

An epoch is one permutation of all ids.  Global batch k is its stretch [k B, (k + 1) B); a rank takes its contiguous part of
that, in micro batches, so that the sequence of a global batch's micro batches is the same for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_train.data.counter import Purpose, random_bits

Ids = NDArray[np.int64]
_Array = TypeVar("_Array", bound=NDArray[Any])


def epoch_order(shard_sizes: Ids, seed: int, epoch: int, window: int) -> Ids:
    """The permutation of an epoch, int64 [N]: shards shuffled, then the samples of every ``window`` shards among themselves.

    Args:
        shard_sizes: samples per shard, int64 [S]; ids count through the shards in their order.
        window: shards whose samples are shuffled together; from S on it is a permutation of everything.
    """
    ends = np.cumsum(shard_sizes)
    starts = ends - shard_sizes
    shards = np.argsort(random_bits(seed, epoch, Purpose.SHARD_ORDER, np.arange(len(shard_sizes))))
    order = np.empty(int(ends[-1]), dtype=np.int64)
    filled = 0
    for first in range(0, len(shards), window):
        ids = np.concatenate([np.arange(starts[shard], ends[shard]) for shard in shards[first : first + window]])
        # No two ids have the same bits, so that the result does not depend on the sorting algorithm.
        order[filled : filled + len(ids)] = ids[np.argsort(random_bits(seed, epoch, Purpose.SAMPLE_ORDER, ids))]
        filled += len(ids)
    return order


def steps_per_epoch(samples: int, global_batch: int, last_batch: Literal["drop", "wrap"]) -> int:
    """Global batches of an epoch: the incomplete last one is dropped, or filled up from the epoch's start."""
    return samples // global_batch if last_batch == "drop" else -(-samples // global_batch)


def batch_positions(samples: int, batch: int, global_batch: int) -> Ids:
    """Places in the epoch's order that global batch ``batch`` takes, int64 [global_batch]; past the end they wrap."""
    return (batch * global_batch + np.arange(global_batch, dtype=np.int64)) % samples


def global_batch_ids(order: Ids, batch: int, global_batch: int) -> Ids:
    """Ids of global batch ``batch``, int64 [global_batch]."""
    return order[batch_positions(len(order), batch, global_batch)]


def rank_slice(ids: _Array, rank: int, world_size: int) -> _Array:
    """The contiguous part of ``ids`` that a rank takes; parts differ by at most one in length and may be empty."""
    return ids[len(ids) * rank // world_size : len(ids) * (rank + 1) // world_size]  # type: ignore[return-value]


def micro_batches(ids: _Array, size: int) -> list[_Array]:
    """Cut a rank's part into micro batches of ``size``; the last may be shorter."""
    return [ids[first : first + size] for first in range(0, len(ids), size)]  # type: ignore[misc]


def replacements(order: Ids, position: int, labeled: NDArray[np.bool_]) -> Iterator[int]:
    """Ids that may stand in for the one at ``position``, best first: the following ones of the order, round its end.

    A sample with a label is replaced by one with a label, and one without by one without, so that the number of labeled
    samples in a global batch is known beforehand.
    """
    wanted = labeled[order[position]]
    for step in range(1, len(order)):
        candidate = int(order[(position + step) % len(order)])
        if labeled[candidate] == wanted:
            yield candidate
