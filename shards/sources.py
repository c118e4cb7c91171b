"""Where images come from before they are packed: the splits, classes and files of a source, and its bytes."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import DataError
from shards.index import UNLABELED

SPLITS = ("train", "val", "test")


class Item(NamedTuple):
    """An image that is to be packed: its name in the source, its label, and its bytes as far as known beforehand."""

    name: str
    label: int
    size: int


@dataclass(frozen=True)
class Source:
    """What is to be packed: class names, the items of every split, and how an item's bytes are had by its name.

    ``read`` must be picklable, since worker processes call it; it may raise OSError.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, list[Item]]
    read: Callable[[str], bytes]

    def hold_out(self, per_class: int) -> Source:
        """Move ``per_class`` images of every class from train to a new val split; which ones depends on their names alone.

        Raises:
            DataError: there is a val split already, or a class is too small.
        """
        if "val" in self.splits:
            raise DataError("--val-per-class is given, but the source has a val split; leave one of them out")
        if "train" not in self.splits:
            raise DataError("--val-per-class is given, but the source has no train split to take from")
        by_class = self._train_by_class("hold out")
        for name, items in zip(self.classes, by_class):
            if len(items) <= per_class:
                raise DataError(
                    f"--val-per-class is {per_class}, but class '{name}' has {len(items)} images; "
                    f"use at most {max(0, len(items) - 1)}"
                )
        held = [item for items in by_class for item in items[:per_class]]
        kept = [item for items in by_class for item in items[per_class:]]
        return replace(self, splits={**self.splits, "train": kept, "val": held})

    def few(self, per_class: int) -> Source:
        """Keep ``per_class`` images of every class of train; which ones depends on their names alone.

        Raises:
            DataError: there is no train split, or a class is too small.
        """
        by_class = self._enough_by_class("few", "--per-class", per_class)
        return replace(
            self, splits={**self.splits, "train": [item for items in by_class for item in items[:per_class]]}
        )

    def labeled(self, per_class: int) -> Source:
        """Keep the labels of ``per_class`` images of every class of train, and take them from the others.

        Raises:
            DataError: there is no train split, or a class is too small.
        """
        by_class = self._enough_by_class("labels", "--labels-per-class", per_class)
        kept = [item for items in by_class for item in items[:per_class]]
        others = [item._replace(label=UNLABELED) for items in by_class for item in items[per_class:]]
        return replace(self, splits={**self.splits, "train": kept + others})

    def _enough_by_class(self, salt: str, option: str, per_class: int) -> list[list[Item]]:
        if "train" not in self.splits:
            raise DataError(f"{option} is given, but the source has no train split to take from")
        by_class = self._train_by_class(salt)
        for name, items in zip(self.classes, by_class):
            if len(items) < per_class:
                raise DataError(
                    f"{option} is {per_class}, but class '{name}' has {len(items)} images; use at most that"
                )
        return by_class

    def _train_by_class(self, salt: str) -> list[list[Item]]:
        by_class: list[list[Item]] = [[] for _ in self.classes]
        for item in shuffled(self.splits["train"], salt):
            by_class[item.label].append(item)
        return by_class


def shuffled(items: Iterable[Item], salt: str) -> list[Item]:
    """Items in an order that looks random and depends on their names and ``salt`` alone, on every machine."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}/{item.name}".encode()).digest())


def folder(root: Path) -> Source:
    """Class folders of image files, either directly in ``root`` or in its folders train, val and test.

    The classes are the sorted union over the splits.  Files may lie deeper in a class folder; hidden ones are ignored.

    Raises:
        DataError: no such folder, no class folders, a class folder without files, or splits mixed with other folders.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; give a folder of class folders, or of train/ val/ test/ with class folders"
        )
    try:
        splits = _split_folders(root)
        class_folders = {split: _visible_folders(path) for split, path in splits.items()}
        for split, path in splits.items():
            if not class_folders[split]:
                raise DataError(f"{path}: has no class folders; images must lie in one folder per class")
        classes = tuple(sorted({path.name for paths in class_folders.values() for path in paths}))
        labels = {name: label for label, name in enumerate(classes)}
        items = {
            split: [item for path in paths for item in _files(root, path, labels[path.name])]
            for split, paths in class_folders.items()
        }
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return Source(classes, items, partial(_read_file, root))


def digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn ships (8 x 8, 17 grey levels), as 32 x 32 RGB PNGs.

    36 images of every class are the val split, the other 1,437 the train split.
    """
    _, labels = _digits()
    items = [Item(f"digit-{number:04d}", int(label), 1000) for number, label in enumerate(labels)]
    return Source(tuple("0123456789"), {"train": items}, _read_digit).hold_out(36)


def _split_folders(root: Path) -> dict[str, Path]:
    folders = _visible_folders(root)
    splits = {path.name: path for path in folders if path.name in SPLITS}
    others = [path.name for path in folders if path.name not in SPLITS]
    if splits and others:
        raise DataError(
            f"{root}: holds {', '.join(splits)} and also '{others[0]}'; beside the splits {', '.join(SPLITS)} "
            "there must be no other folder"
        )
    if not folders:
        raise DataError(f"{root}: has no class folders; images must lie in one folder per class")
    return splits or {"train": root}


def _visible_folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, class_folder: Path, label: int) -> list[Item]:
    items = []
    for place, folders, files in os.walk(class_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                path = Path(place, name)
                size = path.stat().st_size if path.exists() else 0  # a broken link is skipped when it is read
                items.append(Item(path.relative_to(root).as_posix(), label, size))
    if not items:
        raise DataError(f"{class_folder}: is empty; put images of the class there or remove the folder")
    return items


def _read_file(root: Path, name: str) -> bytes:
    return (root / name).read_bytes()


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


def _read_digit(name: str) -> bytes:
    import numpy as np
    from PIL import Image

    images, _ = _digits()
    levels = images[int(name.rpartition("-")[2])]
    small = Image.fromarray(np.rint(levels * (255 / 16)).astype(np.uint8))
    file = io.BytesIO()
    small.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(file, "PNG")
    return file.getvalue()
