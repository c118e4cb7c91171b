"""Which sample is read when and by whom: pure functions of (index, seed, epoch), whatever the number of ranks.

An epoch is a sequence of views.  View v of N samples is the sample v % N in its variation v // N: the n-th time that a
sample comes in an epoch it is augmented in another way.  Without sampling options an epoch is one permutation of all ids.
Global batch k is its stretch [k B, (k + 1) B); a rank takes its contiguous part of that, in micro batches, so that the
sequence of a global batch's micro batches is the same for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.rng import Purpose, random_bits
from dist_train.errors import ConfigError
from shards.index import UNLABELED

Ids = NDArray[np.int64]
_Array = TypeVar("_Array", bound=NDArray[Any])

EXTRA_PASSES = 1 << 40
"""Number of the first pass that a fraction in a weight is taken from; far beyond the whole passes, whose order is another."""


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
    """Views that may stand in for the one at ``position``, best first: the following ones of the order, round its end.

    A sample with a label is replaced by one with a label, and one without by one without, so that the number of labeled
    samples in a global batch is known beforehand.
    """
    sample = order[position] % len(labeled)
    for step in range(1, len(order)):
        candidate = int(order[(position + step) % len(order)])
        other = candidate % len(labeled)
        if labeled[other] == labeled[sample] and other != sample:
            yield candidate


@dataclass(frozen=True)
class _Part:
    """Samples that are drawn together: their ids, rising, how many each shard has, how many a global batch takes, and
    how often each comes per epoch.
    """

    ids: Ids
    shard_sizes: Ids
    per_batch: int
    weight: float = 1.0

    @property
    def extra(self) -> int:
        """Images per epoch that come once more than the others, for the fraction in the weight."""
        return round(self.weight % 1 * len(self.ids))

    @property
    def size(self) -> int:
        """Images per epoch."""
        return int(self.weight) * len(self.ids) + self.extra


class Order:
    """The epochs of a training split, as the configuration wants them sampled.

    With ``labeled_fraction`` every global batch has the same number of labeled images, evenly spread in it, and an epoch is one
    pass over the part (labeled or unlabeled) that lasts longer; the other part starts over as often as needed and goes on
    from epoch to epoch where it was, so that its images come equally often up to one.

    With ``class_balanced`` a pass over the labeled images draws every class equally often, up to one, and every image of a
    class equally often, up to one.

    With ``repeated_augment`` R a global batch has B/R images in R views each, and R epochs in a row make one pass.

    In a mixture the images of each weight are spread evenly over the epoch.  With a weight of 2.5 each of them comes twice,
    and half of them once more: any two epochs from an even one on have all of them.

    Args:
        shard_sizes: samples per shard, int64 [S].
        label: of every sample, int64 [N].
        data: the sampling options.
        seed: of the shuffling.
        global_batch: samples per update, B.
        weight: in a mixture, how often every sample comes per epoch, float64 [N].

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
        self._data, self._seed, self._label = data, seed, label
        self._samples, self._global_batch = len(label), global_batch
        if global_batch % data.repeated_augment:
            below = global_batch // data.repeated_augment * data.repeated_augment
            nearest = " or ".join(str(size) for size in (below, below + data.repeated_augment) if size)
            raise ConfigError(
                f"train.global_batch is {global_batch}, which does not divide by data.repeated_augment, {data.repeated_augment}; use {nearest}"
            )
        images = global_batch // data.repeated_augment
        sizes = self._per_batch(images)
        self._parts = [_Part(np.arange(len(label), dtype=np.int64), shard_sizes, images)]
        if data.class_balanced or data.labeled_fraction is not None:
            shard = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
            split = [np.flatnonzero(label != UNLABELED), np.flatnonzero(label == UNLABELED)]
            self._parts = [
                _Part(ids, np.bincount(shard[ids], minlength=len(shard_sizes)), size) for ids, size in zip(split, sizes)
            ]
        if weight is not None and (weight != 1).any():
            self._parts = self._weighted_parts(np.repeat(np.arange(len(shard_sizes)), shard_sizes), weight)
        # The part that lasts longest is what an epoch is a pass over.
        lengths = [len(part.ids) // data.repeated_augment / part.per_batch for part in self._parts if part.per_batch]
        self._main = lengths.index(max(lengths))
        mixed = data.labeled_fraction is not None
        self.pass_size = len(self._parts[self._main].ids) if mixed else sum(part.size for part in self._parts)
        self.per_batch = self._parts[self._main].per_batch if mixed else images
        self.steps_per_epoch = steps_per_epoch(self.pass_size // data.repeated_augment, self.per_batch, data.last_batch)

    def epoch(self, epoch: int) -> Ids:
        """The views of an epoch in their order, int64; what its global batches do not reach serves as replacements."""
        cycle, turn = divmod(epoch, self._data.repeated_augment)
        turn_size = self.pass_size // self._data.repeated_augment
        if self._data.labeled_fraction is None:
            ids = interleave([sequence for part in self._parts for sequence in self._weighted(part, cycle)])
            if self._data.repeated_augment > 1:
                ids = ids[turn * turn_size : (turn + 1) * turn_size]
        else:
            main = self._parts[self._main]
            whole = self._pass(main, cycle)[turn * turn_size : (turn + 1) * turn_size]
            once = np.resize(whole, self.steps_per_epoch * main.per_batch)
            batches = self.steps_per_epoch
            ids = interleave(
                [once if part is main else self._stretch(part, epoch, batches * part.per_batch) for part in self._parts]
            )
        if self._data.repeated_augment > 1:
            ids = _repeat(ids, self._global_batch // self._data.repeated_augment, self._data.repeated_augment)
        plain = len(self._parts) == 1 and self._parts[0].weight <= 1 and self._data.repeated_augment == 1
        return ids if plain else _views(ids, self._samples)

    def summary(self) -> str | None:
        """What an epoch is, in words, where that is not simply every image once."""
        data, taken = self._data, self.steps_per_epoch * self.per_batch
        notes = []
        if data.labeled_fraction is not None:
            labeled, unlabeled = self._parts
            kind = "labeled" if self._main == 0 else "unlabeled"
            notes.append(
                f"global batch = {labeled.per_batch} labeled + {unlabeled.per_batch} unlabeled images; an epoch is one pass "
                f"over the {len(self._parts[self._main].ids)} {kind} ones"
            )
        if data.repeated_augment > 1:
            notes.append(
                f"every image of a global batch comes {data.repeated_augment} times; {data.repeated_augment} epochs make one pass"
            )
        if any(part.weight != 1 for part in self._parts):
            shares = ", ".join(f"{len(part.ids)} images {part.weight:g} times" for part in self._parts)
            notes.append(f"an epoch has {shares}: {self.pass_size} in all")
        left = self.pass_size // data.repeated_augment - taken
        if left:
            what = f"{left} images are left out" if left > 0 else f"{-left} images come twice"
            notes.append(f"in every epoch {what} (data.last_batch: {data.last_batch})")
        return "; ".join(notes) or None

    def _per_batch(self, images: int) -> tuple[int, int]:
        """Labeled and unlabeled images in a global batch of so many; without a fixed share all of it for either."""
        share = self._data.labeled_fraction
        known = int(np.count_nonzero(self._label != UNLABELED))
        if self._data.class_balanced and not known:
            raise ConfigError(
                f"data.class_balanced is true, but {self._data.train_name} has no labeled images; leave it out"
            )
        if share is None:
            return images, images
        missing = "labeled" if not known else "unlabeled"
        if known in (0, self._samples):
            raise ConfigError(
                f"data.labeled_fraction is {share:g}, but {self._data.train_name} has no {missing} images; leave it out, or make the "
                "shards with --labels-per-class"
            )
        labeled = round(share * images)
        if not 0 < labeled < images:
            raise ConfigError(
                f"data.labeled_fraction is {share:g}, which of {images} images in a global batch is {labeled}; allowed are "
                f"{1 / images:.3g} to {1 - 1 / images:.3g}"
            )
        return labeled, images - labeled

    def _weighted_parts(self, shard: NDArray[np.int64], weight: NDArray[np.float64]) -> list[_Part]:
        """One part per weight of a mixture."""
        data = self._data
        if data.class_balanced or data.labeled_fraction is not None or data.repeated_augment > 1:
            raise ConfigError(
                "data.train has weights, with which class_balanced, labeled_fraction and repeated_augment do not go; leave out "
                "one or the other"
            )
        parts = []
        for value in np.unique(weight):
            ids = np.flatnonzero(weight == value)
            # The shards of other parts would count in the window without adding to it.
            sizes = np.unique(shard[ids], return_counts=True)[1].astype(np.int64)
            parts.append(_Part(ids, sizes, self._global_batch, float(value)))
        return parts

    def _weighted(self, part: _Part, epoch: int) -> list[Ids]:
        """The passes over a part in an epoch, and what of one more pass makes up the fraction in its weight."""
        times = int(part.weight)
        whole = [self._pass(part, epoch * times + number) for number in range(times)]
        return [*whole, self._stretch(part, epoch, part.extra, EXTRA_PASSES)] if part.extra else whole

    def _stretch(self, part: _Part, epoch: int, length: int, first_pass: int = 0) -> Ids:
        """The ``length`` images that an epoch takes of a part that is passed over again and again."""
        first, size = epoch * length, len(part.ids)
        cycles = range(first // size, -(-(first + length) // size))
        passes = np.concatenate([self._pass(part, first_pass + cycle) for cycle in cycles])
        return passes[first % size : first % size + length]

    def _pass(self, part: _Part, cycle: int) -> Ids:
        """One pass over a part, int64 [len(part.ids)]: a permutation of it, or drawn by classes."""
        if not self._data.class_balanced or not len(part.ids) or self._label[part.ids[0]] == UNLABELED:
            return part.ids[epoch_order(part.shard_sizes, self._seed, cycle, self._data.shuffle_shards)]
        times = _balanced_times(self._label[part.ids], part.ids, self._seed, cycle)
        ends = np.cumsum(part.shard_sizes)
        rounds = []
        for number in range(int(times.max())):
            chosen = np.flatnonzero(times > number)
            sizes = np.diff(np.searchsorted(chosen, ends), prepend=0)
            # Another shuffling for every round, or the appearances of an image would stand close together.
            places = epoch_order(sizes, self._seed, cycle + (number << 32), self._data.shuffle_shards)
            rounds.append(part.ids[chosen[places]])
        return interleave(rounds)


def interleave(parts: Sequence[Ids]) -> Ids:
    """Merge sequences evenly: of any stretch, each has the share that it has of the whole, up to one place."""
    if len(parts) == 1:
        return parts[0]
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    merged: Ids = np.concatenate(parts)[np.argsort(places, kind="stable")]
    return merged


def _balanced_times(label: NDArray[np.int64], ids: Ids, seed: int, cycle: int) -> Ids:
    """How often each sample comes in a pass of their number that draws all classes equally often, int64 [N]."""
    classes, member, count = np.unique(label, return_inverse=True, return_counts=True)
    lucky = np.argsort(random_bits(seed, cycle, Purpose.CLASS_REMAINDER, classes))[: len(ids) % len(classes)]
    wanted = np.full(len(classes), len(ids) // len(classes))
    wanted[lucky] += 1
    by_class = np.lexsort((random_bits(seed, cycle, Purpose.CLASS_MEMBERS, ids), member))
    rank = np.empty(len(ids), dtype=np.int64)
    rank[by_class] = np.arange(len(ids)) - (np.cumsum(count) - count)[member[by_class]]
    times: Ids = (wanted // count)[member] + (rank < (wanted % count)[member])
    return times


def _repeat(ids: Ids, images: int, repeats: int) -> Ids:
    """Every ``images`` of the sequence ``repeats`` times in a row, so that the views of an image are far apart in the batch."""
    whole = len(ids) // images * images
    blocks = np.tile(ids[:whole].reshape(-1, images), repeats).reshape(-1)
    return np.concatenate([blocks, np.tile(ids[whole:], repeats)])


def _views(ids: Ids, samples: int) -> Ids:
    """Number the appearances of every id: its n-th one becomes the view id + n x samples."""
    several = np.flatnonzero(np.bincount(ids, minlength=samples)[ids] > 1)
    by_id = several[np.argsort(ids[several], kind="stable")]
    ordered = ids[by_id]
    places = np.arange(len(several))
    first = np.diff(ordered, prepend=-1) != 0
    views: Ids = ids.copy()
    views[by_id] += samples * (places - np.maximum.accumulate(np.where(first, places, 0)))
    return views
