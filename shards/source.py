"""What is packed: the splits, classes and items of a source, and how their bytes are had."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import DataError
from shards.index import UNLABELED

SPLITS = ("train", "val", "test")
MOST_BYTES = 1_000_000_000
"""Of an image that is still within the limit of pixels."""
_NO_FILE, _TOO_LARGE = "a link, a pipe or a device, not a file", "{} bytes, more than an image can have"


class NotAFile(OSError):
    """What is there can be no image's file: a pipe, a folder, or too many bytes.  Other errors are the file system's."""


class Item(NamedTuple):
    """An image that is to be packed: its name in the source, its label, and its bytes as far as known beforehand.

    ``location`` is (path of a file, offset in it) where the image is not a file of its own.
    """

    name: str
    label: int
    size: int
    location: tuple[str, int] | None = None


@dataclass(frozen=True)
class Source:
    """What is to be packed: class names, the items of every split, and how an item's bytes are had.

    ``layout`` says how the source was understood, where that is not obvious.  ``read`` must be picklable, since worker processes call it; it may raise OSError.  ``version`` is a text that is another
    one when the contents are others, as far as that shows without reading them: with it an interrupted making knows
    whether it still makes the same.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, list[Item]]
    read: Callable[[Item], bytes]
    version: str = ""
    layout: str = ""

    def __post_init__(self) -> None:
        """Refuse classes that cannot be told apart on every file system, or not be written down."""
        refuse_unprintable(self.classes)
        seen: dict[str, str] = {}
        for name in self.classes:
            # macOS takes accents apart and ignores case, Windows drops spaces at the end.
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

    def subsample(self, per_class: int, seed: int = 0) -> Source:
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
        if least <= spare:
            raise DataError(
                f"{option} is {per_class}, but class '{name}' has {least} image{'' if least == 1 else 's'}; it needs at least "
                f"{spare + 1}, add images or leave the class out"
            )
        if least < per_class + spare:
            raise DataError(
                f"{option} is {per_class}, but class '{name}' has {least} images; use at most {least - spare}"
            )
        return by_class, unlabeled


def shuffled(items: Iterable[Item], salt: str) -> list[Item]:
    """Items in an order that looks random and depends on their names and ``salt`` alone, on every machine."""
    return sorted(
        items, key=lambda item: hashlib.sha256(f"{salt}/{item.name}".encode("utf-8", "surrogateescape")).digest()
    )


def read_file(root: Path, item: Item) -> bytes:
    """The bytes of an item that is a file under ``root``, or that lies in another file.

    Raises:
        NotAFile: it is none.
        OSError: it cannot be read, or ends early.
    """
    if item.location is None:
        return read_path(f"{root}/{item.name}")
    path, offset = item.location
    if offset < 0:
        raise NotAFile(_NO_FILE)
    if item.size > MOST_BYTES:
        raise NotAFile(_TOO_LARGE.format(item.size))
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), item.size, offset)
    if len(data) < item.size:
        raise OSError(f"{path} ends before the image does")
    return data


def refuse_unprintable(classes: Iterable[str]) -> None:
    """Refuse names of classes that no report could hold; raises DataError."""
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"the class '{shown(name)}': its name is not UTF-8; rename it, for instance with convmv"
            ) from None


def read_path(path: str | Path) -> bytes:
    """The contents of a file, quicker for a small one than with a file object.

    Raises:
        NotAFile: it is a folder, a pipe or a device, which may never end, or is larger than any image.
        OSError: it cannot be read.
    """
    # O_NONBLOCK, because opening a pipe that nobody writes to would wait forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise NotAFile("a folder, not a file" if stat.S_ISDIR(state.st_mode) else _NO_FILE)
        if state.st_size > MOST_BYTES:
            raise NotAFile(_TOO_LARGE.format(state.st_size))
        # One byte more than it has: less than that, and the file has ended.
        data = os.read(descriptor, state.st_size + 1)
        if len(data) == state.st_size:
            return data
        parts = [data]  # it grows, or one call does not read all of it
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def shown(text: str) -> str:
    """A name as it can be printed on one line, whatever bytes it has."""
    # surrogateescape is how Python holds the bytes of a name that is not UTF-8.
    safe = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in safe)


def png(image: Any) -> bytes:
    """A PIL image, or uint8 pixels [H, W] or [H, W, 3], as PNG."""
    from PIL import Image

    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG")
    return file.getvalue()
