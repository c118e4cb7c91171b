"""What is packed: the splits, classes and items of a source, and how their bytes are had."""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import DataError
from shards.index import UNLABELED

SPLITS = ("train", "val", "test")


class Item(NamedTuple):
    """An image that is to be packed: its name in the source, its label, and its bytes as far as known beforehand.

    ``place`` is (path of a file, offset in it) where the image is not a file of its own.
    """

    name: str
    label: int
    size: int
    place: tuple[str, int] | None = None


@dataclass(frozen=True)
class Source:
    """What is to be packed: class names, the items of every split, and how an item's bytes are had.

    ``read`` must be picklable, since worker processes call it; it may raise OSError.  ``stamp`` is a text that is another
    one when the contents are others, as far as that shows without reading them: with it an interrupted making knows
    whether it still makes the same.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, list[Item]]
    read: Callable[[Item], bytes]
    stamp: str = ""

    def __post_init__(self) -> None:
        """Refuse classes that cannot be told apart on every file system."""
        seen: dict[str, str] = {}
        for name in self.classes:
            other = seen.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), name)
            if other is not name:
                raise DataError(f"the classes '{other}' and '{name}' collide; rename or unite them")

    def hold_out(self, per_class: int, seed: int = 0) -> Source:
        """Move ``per_class`` images of every class from train to a new val split; which ones depends on seed and names.

        Raises:
            DataError: there is a val split already, or a class is too small.
        """
        if "val" in self.splits:
            raise DataError("--val-per-class is given, but the source has a val split; leave one of them out")
        by_class, rest = self._by_class("hold out", "--val-per-class", per_class, seed, spare=1)
        held = [item for items in by_class for item in items[:per_class]]
        kept = [item for items in by_class for item in items[per_class:]]
        return replace(self, splits={**self.splits, "train": kept + rest, "val": held})

    def few(self, per_class: int, seed: int = 0) -> Source:
        """Keep ``per_class`` labeled images of every class of train; which ones depends on seed and names.

        Raises:
            DataError: there is no train split, or a class is too small.
        """
        by_class, _ = self._by_class("few", "--per-class", per_class, seed)
        return replace(
            self, splits={**self.splits, "train": [item for items in by_class for item in items[:per_class]]}
        )

    def labeled(self, per_class: int, seed: int = 0) -> Source:
        """Keep the labels of ``per_class`` images of every class of train, and take them from the others.

        Raises:
            DataError: there is no train split, or a class is too small.
        """
        by_class, rest = self._by_class("labels", "--labels-per-class", per_class, seed)
        kept = [item for items in by_class for item in items[:per_class]]
        others = [item._replace(label=UNLABELED) for items in by_class for item in items[per_class:]]
        return replace(self, splits={**self.splits, "train": kept + others + rest})

    def _by_class(
        self, salt: str, option: str, per_class: int, seed: int, spare: int = 0
    ) -> tuple[list[list[Item]], list[Item]]:
        """Train's items by class in an order that looks random, and those without a label."""
        if "train" not in self.splits:
            raise DataError(f"{option} is given, but the source has no train split to take from")
        if not self.classes:
            raise DataError(f"{option} is given, but no image of the source has a class")
        by_class: list[list[Item]] = [[] for _ in self.classes]
        unlabeled: list[Item] = []
        for item in shuffled(self.splits["train"], f"{salt}/{seed}" if seed else salt):
            (unlabeled if item.label == UNLABELED else by_class[item.label]).append(item)
        name, least = min(zip(self.classes, map(len, by_class)), key=lambda pair: pair[1])
        if least < per_class + spare:
            raise DataError(
                f"{option} is {per_class}, but class '{name}' has {least} images; use at most {max(0, least - spare)}"
            )
        return by_class, unlabeled


def shuffled(items: Iterable[Item], salt: str) -> list[Item]:
    """Items in an order that looks random and depends on their names and ``salt`` alone, on every machine."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}/{item.name}".encode()).digest())


def read_file(root: Path, item: Item) -> bytes:
    """The bytes of an item that is a file under ``root``, or that lies in another file.

    Raises:
        OSError: it cannot be read, or ends early.
    """
    if item.place is None:
        return (root / item.name).read_bytes()
    path, offset = item.place
    if offset < 0:
        raise OSError("a link or a device, not a file")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), item.size, offset)
    if len(data) < item.size:
        raise OSError(f"{path} ends before the image does")
    return data


def png(image: Any) -> bytes:
    """A PIL image, or uint8 pixels [H, W] or [H, W, 3], as PNG."""
    from PIL import Image

    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG")
    return file.getvalue()
