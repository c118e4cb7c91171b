"""Where images come from: class folders on a disk or in a tar, any Python iterable, and the digits of scikit-learn."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import DataError
from shards import archives
from shards.index import UNLABELED
from shards.source import SPLITS, Item, Source, png, read_file


def folder(root: Path, scratch: Path | None = None) -> Source:
    """Class folders of image files, either directly in ``root`` or in its folders train, val and test.

    ``root`` is a folder, or a tar of one; a compressed tar is uncompressed to ``scratch`` first, and refused without.  The classes are the sorted
    union over the splits.  Files may lie deeper in a class folder; hidden ones are ignored.

    Raises:
        DataError: no such folder, no class folders, a class folder without files, or splits mixed with other folders.
    """
    if not root.exists():
        raise DataError(
            f"{root}: no such folder; give a folder of class folders, or of train/ val/ test/ with class folders"
        )
    try:
        stamp, folders, items = _walk(root) if root.is_dir() else _list(root, scratch)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    classes, splits = _sort(root, folders, items)
    return Source(classes, splits, partial(read_file, root), stamp)


def samples(given: Iterable[Sample], scratch: Path) -> Source:
    """Any samples, in any order; what they hold is first written to a file in ``scratch``.

    Raises:
        DataError: no sample, an unknown split, or two samples of the same name in a split.
    """
    path, digest, position = scratch / "samples.bin", hashlib.sha256(), 0
    found: dict[tuple[str, str], tuple[str | None, int, int]] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for name, label, image, split in given:
            if split not in SPLITS:
                raise DataError(f"sample {name}: its split is '{split}'; allowed are {', '.join(SPLITS)}")
            if (split, name) in found:
                raise DataError(f"sample {name}: there are two of that name in {split}; names must differ")
            data = image if isinstance(image, bytes) else png(image)
            found[split, name] = (label, len(data), position)
            position += file.write(data)
            digest.update(data)
    if not found:
        raise DataError("there are no samples; the iterable is empty")
    classes = tuple(sorted({label for label, _, _ in found.values() if label is not None}))
    labels: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    labels[None] = UNLABELED
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS if any(split == key[0] for key in found)}
    for (split, name), (label, size, offset) in found.items():
        splits[split].append(Item(name, labels[label], size, (str(path), offset)))
    return Source(classes, splits, partial(read_file, scratch), digest.hexdigest())


class Sample(NamedTuple):
    """What :func:`samples` takes: ``image`` is an encoded image, a PIL image, or uint8 [H, W] or [H, W, 3]; ``label`` a class name."""

    name: str
    label: str | None
    image: Any
    split: str = "train"


def digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn ships (8 x 8, 17 grey levels), as 32 x 32 RGB PNGs.

    36 images of every class are the val split, the other 1,437 the train split.
    """
    _, labels = _digits()
    items = [Item(f"digit-{number:04d}", int(label), 1000) for number, label in enumerate(labels)]
    return Source(tuple("0123456789"), {"train": items}, _read_digit).hold_out(36)


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


def _read_digit(item: Item) -> bytes:
    import numpy as np
    from PIL import Image

    images, _ = _digits()
    levels = images[int(item.name.rpartition("-")[2])]
    small = Image.fromarray(np.rint(levels * (255 / 16)).astype(np.uint8))
    return png(small.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))


def _walk(root: Path) -> tuple[str, set[str], list[Item]]:
    """A stamp, the folders up to two levels down, and the files below them, by their paths under ``root``."""
    digest = hashlib.sha256()
    folders: set[str] = set()
    items: list[Item] = []
    top = _visible_folders(root)
    for place in [inner for path in top for inner in (_visible_folders(path) if path.name in SPLITS else [path])]:
        folders.add(place.relative_to(root).as_posix())
        for where, inner, files in os.walk(place, onerror=_refuse):
            inner[:] = sorted(name for name in inner if _visible(name))
            for name in sorted(filter(_visible, files)):
                path = Path(where, name)
                state = path.stat() if path.exists() else None  # a broken link is skipped when it is read
                items.append(Item(path.relative_to(root).as_posix(), -1, state.st_size if state else 0))
                digest.update(f"{state.st_mtime_ns if state else 0}\n".encode())
    folders.update(path.name for path in top)
    return digest.hexdigest(), folders, items


def _list(path: Path, scratch: Path | None) -> tuple[str, set[str], list[Item]]:
    """The same of a tar; a folder that all of it lies in is not counted, unless it is a split or a class."""
    tar = archives.unpacked(path, scratch)
    folders: set[str] = set()
    items: dict[str, Item] = {}  # of two members of the same name the later one counts
    for member in archives.members(tar):
        if not all(_visible(part) for part in member.name.split("/")) or member.name in ("", "."):
            continue
        if member.is_folder:
            folders.add(member.name.rstrip("/"))
        else:
            items[member.name] = Item(member.name, -1, member.size, (str(tar), member.offset))
            folders.add(member.name.rpartition("/")[0])
    folders = {parent for name in folders if name for parent in (name, *map(str, Path(name).parents))} - {"."}
    while len(top := {name for name in folders if "/" not in name}) == 1 and not top & set(SPLITS):
        outer = f"{top.pop()}/"
        if not any(name.startswith(outer) for name in folders):
            break
        if any(name.startswith(outer) and "/" not in name[len(outer) :] for name in items):
            break
        folders = {name.removeprefix(outer) for name in folders if name.startswith(outer)}
        items = {name.removeprefix(outer): item for name, item in items.items()}
    named = [item._replace(name=name) for name, item in sorted(items.items())]
    return archives.stamp(path), folders, named


def _sort(root: Path, folders: set[str], items: Iterable[Item]) -> tuple[tuple[str, ...], dict[str, list[Item]]]:
    """Classes, and items with labels by split."""
    top = sorted(name for name in folders if "/" not in name)
    splits = [name for name in SPLITS if name in top]
    others = [name for name in top if name not in SPLITS]
    if splits and others:
        raise DataError(
            f"{root}: holds {', '.join(splits)} and also '{others[0]}'; beside the splits {', '.join(SPLITS)} "
            "there must be no other folder"
        )
    depth = 2 if splits else 1
    class_folders = sorted(name for name in folders if name.count("/") == depth - 1)
    for split in splits or [""]:
        if not any(name.startswith(f"{split}/" if split else "") for name in class_folders):
            raise DataError(f"{root / split}: has no class folders; images must lie in one folder per class")
    classes = tuple(sorted({name.rpartition("/")[2] for name in class_folders}))
    labels = {name: number for number, name in enumerate(classes)}
    sorted_out: dict[str, list[Item]] = {split: [] for split in splits or ["train"]}
    filled = set()
    for item in items:
        parts = item.name.split("/")
        if len(parts) > depth:
            filled.add("/".join(parts[:depth]))
            sorted_out[parts[0] if splits else "train"].append(item._replace(label=labels[parts[depth - 1]]))
    for name in class_folders:
        if name not in filled:
            raise DataError(f"{root / name}: is empty; put images of the class there or remove the folder")
    return classes, sorted_out


def _visible_folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and _visible(entry.name))


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would otherwise be left out without a word."""
    raise error


def _visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))
