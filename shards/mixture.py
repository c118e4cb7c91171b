"""Several splits as one: what they hold, joined by the names of their classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dist_train.errors import DataError
from shards.index import UNLABELED, Index
from shards.where import select


class Part(NamedTuple):
    """One split of a mixture, loaded: how often each of its samples comes per epoch, and a condition on them."""

    split: Index
    weight: float = 1.0
    where: str | None = None


def mix(parts: Sequence[Part], classes: Sequence[str]) -> Index:
    """The samples of all parts as one index, those of each part in a row; nothing is copied on disk.

    Args:
        parts: at least one.
        classes: the classes of the result, in their order; labels are joined by name.

    Raises:
        ConfigError: a condition that cannot be read.
        DataError: a class that ``classes`` has not, or a condition that no sample meets.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    chosen = []
    for index, _, where in parts:
        ids = select(index, where) if where else np.arange(len(index))
        if not len(ids):
            raise DataError(f"{index.folder}: where is {where!r}, which none of its {len(index)} samples meets")
        label = index.label[ids]
        for number in np.unique(label[label != UNLABELED]):
            if (name := index.classes[number]) not in numbers:
                raise DataError(
                    f"{index.folder}: has the class {name!r}, which the validation split has not; leave it out with "
                    f"where: class_name != {name!r}, or validate on a split that has it"
                )
        # What has no label keeps none: -100 becomes the last place.
        new = np.array([numbers.get(name, UNLABELED) for name in index.classes] + [UNLABELED], np.int64)
        chosen.append(index.take(ids, new[np.where(label == UNLABELED, -1, label)]))
    shards = tuple(shard for index in chosen for shard in index.shards)
    starts = np.cumsum([0, *(len(index.shards) for index in chosen)])
    digest = hashlib.sha256("\0".join(classes).encode())
    for index, part in zip(chosen, parts):
        # A run that resumes with another weight or condition is then refused, as with other data.
        digest.update(f"{index.fingerprint} {part.weight}".encode())
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(index, name) for index in chosen])
        for name in ("key", "ext", "offset", "size", "label", "width", "height")
    }
    return replace(
        chosen[0],
        classes=tuple(classes),
        shards=shards,
        shard=np.concatenate([index.shard + start for index, start in zip(chosen, starts)]).astype(np.int32),
        fingerprint=digest.hexdigest(),
        whole_fingerprint=digest.hexdigest(),
        quarantine=(),
        sources=tuple(part.split for part in parts),
        weight=np.repeat([part.weight for part in parts], [len(index) for index in chosen]),
        **columns,
    )
