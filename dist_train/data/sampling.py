"""How a split is sampled: every image in proportion to its weight, or a fixed share of labeled images in every batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.passes import Ids, Shuffling, Stratum, interleave
from dist_train.errors import ConfigError
from shards.index import UNLABELED


class Proportional:
    """All strata in proportion to how often their images come, evenly spread over the epoch.

    Without a mixture and without classes to balance that is one stratum, of every image once.

    Args:
        strata: the strata of an epoch.
        images: number of different images in a global batch.
        epochs: number of epochs that one pass is divided into.
    """

    def __init__(self, strata: list[Stratum], images: int, epochs: int) -> None:
        self._strata, self._epochs = strata, epochs
        self.pass_size, self.per_batch = sum(stratum.size for stratum in strata), images
        self.reads_shards_once = len(strata) == 1 and strata[0].weight == 1
        """Whether an epoch is done with a shard before long: in one stratum the shards come one after the other."""

    def epoch(self, epoch: int, steps: int) -> Ids:
        """The images of an epoch in their order: all that it has, whatever its number of ``steps``."""
        number, turn = divmod(epoch, self._epochs)
        ids = interleave([sequence for stratum in self._strata for sequence in stratum.of_epoch(number)])
        return _turn(ids, turn, self._epochs)

    @property
    def note(self) -> str | None:
        """What an epoch is, in words, where that is not every image once."""
        if all(stratum.weight == 1 for stratum in self._strata):
            return None
        shares = ", ".join(f"{len(stratum.ids)} images {stratum.weight:g} times" for stratum in self._strata)
        return f"an epoch has {shares}: {self.pass_size} in all"


class FixedShare:
    """The same number of labeled images in every global batch, evenly spread in it.

    An epoch is one pass over the stratum that lasts longer, the main one, cut or filled up to whole batches.  The other
    starts over as often as needed and goes on from epoch to epoch where it was: without class balancing, the counts of any
    two of its images differ by at most one.

    Args:
        labeled, unlabeled: the two strata.
        per_batch: number of different images of either in a global batch.
        epochs: number of epochs that one pass over the main stratum is divided into.
    """

    def __init__(self, labeled: Stratum, unlabeled: Stratum, per_batch: tuple[int, int], epochs: int) -> None:
        self._strata, self._counts, self._epochs = (labeled, unlabeled), per_batch, epochs
        # In global batches: what one epoch's part of a pass over each stratum lasts.
        lengths = [len(stratum.ids) / epochs / count for stratum, count in zip(self._strata, per_batch)]
        self._main = lengths.index(max(lengths))
        self.pass_size, self.per_batch = len(self._strata[self._main].ids), per_batch[self._main]
        self.reads_shards_once = False

    def epoch(self, epoch: int, steps: int) -> Ids:
        """The images of an epoch of ``steps`` global batches in their order."""
        number, turn = divmod(epoch, self._epochs)
        sequences = []
        for index, (stratum, count) in enumerate(zip(self._strata, self._counts)):
            if index == self._main:
                # Cut, or filled up from its beginning, to whole batches: else the share of the last ones would differ.
                sequences.append(np.resize(_turn(stratum.one_pass(number), turn, self._epochs), steps * count))
            else:
                sequences.append(stratum.stretch(epoch, steps * count))
        return interleave(sequences)

    @property
    def note(self) -> str:
        """What a global batch and an epoch are, in words."""
        labeled, unlabeled = self._counts
        kind = ("labeled", "unlabeled")[self._main]
        return (
            f"global batch = {labeled} labeled + {unlabeled} unlabeled images; an epoch is one pass "
            f"over the {self.pass_size} {kind} ones"
        )


Sampling = Proportional | FixedShare


def sampling_of(
    shard_sizes: Ids,
    label: NDArray[np.int64],
    data: DataConfig,
    seed: int,
    images: int,
    weight: NDArray[np.float64] | None,
) -> Sampling:
    """The way of sampling that the configuration asks for.

    Args:
        shard_sizes: samples per shard, int64 [S].
        label: label of every sample, int64 [N].
        data: the sampling options.
        seed: seed of the shuffling.
        images: number of different images in a global batch.
        weight: how often each sample of a mixture comes per epoch, float64 [N].

    Raises:
        ConfigError: options that this split, or a global batch of so many images, does not allow.
    """
    epochs, shuffling = data.repeated_augment, Shuffling(seed, data.shuffle_shards)
    counts = _labeled_and_unlabeled(label, data, images)
    shard = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    if weight is not None and (weight != 1).any():
        _refuse_with_weights(data)
        return Proportional(_strata_by_weight(shard, weight, shuffling), images, epochs)
    if counts is None and not data.class_balanced:
        return Proportional([Stratum(np.arange(len(label), dtype=np.int64), shard_sizes, shuffling)], images, epochs)
    split = []
    for ids, balanced in (
        (np.flatnonzero(label != UNLABELED), data.class_balanced),
        (np.flatnonzero(label == UNLABELED), False),  # without a class there is nothing to balance
    ):
        # Shards without such images stay, and count in the window: leaving them out would change the order of existing runs.
        sizes = np.bincount(shard[ids], minlength=len(shard_sizes))
        split.append(Stratum(ids, sizes, shuffling, label[ids] if balanced else None))
    labeled, unlabeled = split
    if counts is None:
        return Proportional([labeled, unlabeled], images, epochs)
    return FixedShare(labeled, unlabeled, counts, epochs)


def _turn(ids: Ids, turn: int, epochs: int) -> Ids:
    """The part of a pass that its epoch number ``turn`` takes."""
    # What the division leaves over is left out: other images each time, since every pass has an order of its own.
    size = len(ids) // epochs
    return ids if epochs == 1 else ids[turn * size : (turn + 1) * size]


def _labeled_and_unlabeled(label: NDArray[np.int64], data: DataConfig, images: int) -> tuple[int, int] | None:
    """How many of the images of a global batch have a label and how many have none, where that is fixed."""
    share = data.labeled_fraction
    known = int(np.count_nonzero(label != UNLABELED))
    if data.class_balanced and not known:
        raise ConfigError(f"data.class_balanced is true, but {data.train_name} has no labeled images; leave it out")
    if share is None:
        return None
    missing = "labeled" if not known else "unlabeled"
    if known in (0, len(label)):
        raise ConfigError(
            f"data.labeled_fraction is {share:g}, but {data.train_name} has no {missing} images; leave it out, or make the "
            "shards with --labels-per-class"
        )
    labeled = round(share * images)
    if not 0 < labeled < images:
        raise ConfigError(
            f"data.labeled_fraction is {share:g}, which of {images} images in a global batch is {labeled}; allowed are "
            f"{1 / images:.3g} to {1 - 1 / images:.3g}"
        )
    return labeled, images - labeled


def _refuse_with_weights(data: DataConfig) -> None:
    if data.class_balanced or data.labeled_fraction is not None or data.repeated_augment > 1:
        raise ConfigError(
            "data.train has weights, which cannot be combined with class_balanced, labeled_fraction or repeated_augment; "
            "leave out one or the other"
        )


def _strata_by_weight(shard: NDArray[np.int64], weight: NDArray[np.float64], shuffling: Shuffling) -> list[Stratum]:
    """One stratum per weight of a mixture."""
    strata = []
    for value in np.unique(weight):
        ids = np.flatnonzero(weight == value)
        # The shards of other strata would count in the window without adding to it.
        sizes = np.unique(shard[ids], return_counts=True)[1].astype(np.int64)
        stratum = Stratum(ids, sizes, shuffling, weight=float(value))
        if not stratum.size:
            raise ConfigError(
                f"data.train has {len(ids)} images of weight {value:g}, of which none would ever come; raise the weight to 1 / {len(ids)} or more"
            )
        strata.append(stratum)
    return strata
