"""Images that cannot be read: which they are, over all ranks and starts of a run, and when they are too many."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.distributed.group import Group
from dist_train.errors import DataError, TrainingError

log = logging.getLogger("dist_train")

_NAMED_IN_ERROR = 5


@dataclass(frozen=True)
class BadSample:
    """A sample whose image could not be read: its shard's file name, its key, and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


class UnreadableImages(dict[int, BadSample]):
    """The unreadable images of a split, by id.

    In training they are those of the run: those that this rank found, since the latest :meth:`share` those of all ranks, and
    after :meth:`restore` those of earlier starts.  In evaluation they are this rank's of the latest pass.

    Args:
        limit: how many are tolerated, ``data.max_unreadable``.
        consequence: what happens to one, for the log.
    """

    def __init__(self, limit: int, consequence: str) -> None:
        super().__init__()
        self._limit, self._consequence = limit, consequence
        self._shared = 0
        """How many of them, the first ones, all ranks have."""
        self._named: set[int] = set()

    def note(self, sample: int, bad: BadSample) -> None:
        """Take in one that is not there yet.

        Raises:
            DataError: there are more than the limit now.
        """
        self[sample] = bad
        if sample not in self._named:  # once, not in every validation
            log.warning("unreadable image %d: %s; it is %s", len(self), bad, self._consequence)
        self._named.add(sample)
        if len(self) > self._limit:
            named = "; ".join(str(entry) for entry in itertools.islice(self.values(), _NAMED_IN_ERROR))
            raise DataError(
                f"{len(self)} images cannot be read, data.max_unreadable is {self._limit} ({named}"
                f"{'; ...' if len(self) > _NAMED_IN_ERROR else ''}); check the shards with `python -m shards check`"
            )

    def share(self, group: Group) -> None:
        """Learn of those that other ranks found; all ranks must call."""
        # A dict keeps the order in which its items came: behind the first ones, which all ranks have, are the new ones.
        new = dict(itertools.islice(self.items(), self._shared, None))
        # Almost always there are none, and one small sum says so.
        if int(group.sum(torch.tensor(len(new), device=group.device))):
            for of_rank in group.broadcast(group.gather(new)) or ():
                self.update(of_rank)
        self._shared = len(self)

    def count(self, group: Group) -> int:
        """How many there are on all ranks together, each counted once; all ranks must call.

        Raises:
            TrainingError: they are more than the limit.
        """
        self.share(group)
        if len(self) > self._limit:
            raise TrainingError(
                f"{len(self)} images cannot be read, data.max_unreadable is {self._limit}; log/rank*.txt names them: repair the "
                "shards, or raise the limit"
            )
        return len(self)

    def restore(self, bad: Mapping[int, BadSample]) -> None:
        """Begin with those that earlier starts of the run found, the same on all ranks."""
        self.update(bad)
        self._shared = len(self)


def fault_of(image: NDArray[np.uint8]) -> str | None:
    """What is wrong with an encoded image, None if PIL reads it; its words are clearer than the decoder's."""
    from PIL import Image

    try:
        Image.open(io.BytesIO(image.tobytes())).convert("RGB")
    except Exception as error:  # any: it is a damaged file that is looked at
        text = str(error).replace("\n", " ")
        return "it is not an image" if "cannot identify image file" in text else text
    return None
