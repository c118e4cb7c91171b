"""Where images come from: class folders on a disk or in a tar, any Python iterable, and the digits of scikit-learn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import DataError
from dist_train.files import draft_of
from shards import imagenet
from shards.index import UNLABELED
from shards.index_file import FILE
from shards.layout import understand
from shards.reading import AS_IT_SHOWS, Reading
from shards.source import SPLITS, Item, Source, png, read_file, shown
from shards.tree import look, without_outer


def folder(root: Path, scratch: Path | None = None, reading: Reading = AS_IT_SHOWS) -> Source:
    """Images in a folder, or in a tar of one, of any layout that :mod:`shards.layout` understands.

    Usually these are class folders, either directly in ``root`` or in its folders train, val and test.  The classes are
    the sorted union over the splits.  A compressed tar is uncompressed to ``scratch`` first, and refused without.

    Raises:
        DataError: no such folder, a layout that is not understood, or one that may be meant in several ways.
    """
    if root.is_dir() and not (reading.labels or reading.splits or reading.depth):
        if (root / "LOC_val_solution.csv").exists():
            return imagenet.imagenet(root)
        _refuse_other_kinds(root)
    outer = frozenset(SPLITS) | {folder.partition("/")[0] for folders in reading.splits.values() for folder in folders}
    tree = look(root, scratch)
    tree = tree if reading.depth else without_outer(tree, outer)
    layout = understand(tree, reading)
    classes = tuple(sorted({label for items in layout.splits.values() for _, label in items}))
    number = {name: label for label, name in enumerate(classes)}
    splits = {
        split: [item._replace(label=number[label]) for item, label in items] for split, items in layout.splits.items()
    }
    return Source(classes, splits, partial(read_file, tree.root), tree.version, str(layout))


def _refuse_other_kinds(root: Path) -> None:
    """Name the command for folders of archives that are no folders of images."""
    names = {entry.name for entry in root.iterdir()}
    for marks, what, command in (
        (
            (*imagenet.TRAIN[:1], *imagenet.VAL[:1], "ILSVRC", "CLS-LOC"),
            "ImageNet",
            "shards make imagenet, with --val-labels",
        ),
        (("data_batch_1", "data_batch_1.bin"), "CIFAR-10", "shards make cifar10"),
        (("coarse_label_names.txt",), "CIFAR-100", "shards make cifar100"),
        ((FILE,), "shards already", "shards info"),
    ):
        # Folders of images may have these names too, but there `meta` is no file.
        python_cifar100 = (
            command.endswith("cifar100") and {"meta", "train", "test"} <= names and (root / "meta").is_file()
        )
        if names & set(marks) or python_cifar100:
            raise DataError(f"{root}: is {what}; use `python -m {command}`")
    for ending, what, verb in (
        (".parquet", "Parquet files", "make parquet"),
        (".tar", "tars of a WebDataset", "index"),
    ):
        files = [name for name in names if name.endswith(ending)]
        if files and not any(entry.is_dir() for entry in root.iterdir()):
            raise DataError(f"{root}: holds {what}, no images; use `python -m shards {verb} {root}`")


def samples(given: Iterable[Sample], scratch: Path) -> Source:
    """Any samples, in any order; what they hold is first written to a file in ``scratch``.

    Raises:
        DataError: no sample, an unknown split, or two samples of the same name in a split.
    """
    path, digest, position = scratch / "samples.bin", hashlib.sha256(), 0
    found: dict[tuple[str, str], tuple[str | None, int, int]] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    # Written out, because an iterable can be read once, and workers take the images by their places.
    with draft_of(path) as draft, open(draft, "wb") as file:
        for name, label, image, split in map(_checked, given):
            if (split, name) in found:
                raise DataError(f"sample {name}: there are two of that name in {split}; names must differ")
            data = bytes(image) if isinstance(image, bytes | bytearray | memoryview) else png(image)
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


def _checked(sample: Any) -> Sample:
    """Refuse a sample of a wrong type when it comes, not after hours of copying."""
    import numpy as np
    from PIL import Image

    if not isinstance(sample, tuple) or not 3 <= len(sample) <= 4:
        raise DataError(f"a sample is a {type(sample).__name__}; give Sample(name, label, image, split)")
    name, label, image, split = sample if len(sample) == 4 else (*sample, "train")
    if not isinstance(name, str):
        raise DataError(f"sample {name!r}: its name is a {type(name).__name__}; give a text")
    if label is not None and not isinstance(label, str):
        raise DataError(
            f"sample {shown(name)}: its label is a {type(label).__name__}; give the class's name, or None without one"
        )
    if not isinstance(split, str) or split not in SPLITS:
        raise DataError(f"sample {shown(name)}: its split is '{split}'; allowed are {', '.join(SPLITS)}")
    if isinstance(image, np.ndarray):
        usual = (
            image.dtype == np.uint8 and image.size and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
        )
        if not usual:
            raise DataError(
                f"sample {shown(name)}: its image is an array {image.dtype} {list(image.shape)}; give uint8 [H, W] or [H, W, 3]"
            )
    elif not isinstance(image, bytes | bytearray | memoryview | Image.Image):
        raise DataError(
            f"sample {shown(name)}: its image is a {type(image).__name__}; give the bytes of an encoded image, a PIL image, "
            "or uint8 [H, W] or [H, W, 3]"
        )
    return Sample(name, label, image, split)


def digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn ships (8 x 8, 17 grey levels), as 32 x 32 RGB PNGs.

    36 images of every class are the val split, the other 1,437 the train split.
    """
    _, labels = _digits()
    # About what its PNG takes, which is made when it is read: sizes only divide the items among shards.
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
    # 17 levels, 0 to 16.
    small = Image.fromarray(np.rint(levels * (255 / 16)).astype(np.uint8))
    return png(small.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))
