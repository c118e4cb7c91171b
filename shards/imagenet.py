"""ImageNet (ILSVRC 2012) as a source: the original archives, which stay packed, or unpacked folders."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import DataError
from shards import archives
from shards.index import UNLABELED
from shards.layout import understand
from shards.reading import Reading
from shards.source import Item, Source, read_file, read_path, shown
from shards.tree import is_image, look

TRAIN = ("ILSVRC2012_img_train.tar", "train", "Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/train")
VAL = ("ILSVRC2012_img_val.tar", "val", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val")
TRUTH = (
    "ILSVRC2012_devkit_t12.tar.gz",
    "ILSVRC2012_devkit_t12",
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
)
_SYNSET = re.compile(r"n\d{8}")


class _Image(NamedTuple):
    """An image whose class is known by its synset, or (None) not yet."""

    synset: str | None
    item: Item


def imagenet(root: Path, truth: Path | None = None) -> Source:
    """ImageNet from the folder ``root`` of its archives or unpacked folders, train and val or one of them.

    Training images lie in ``ILSVRC2012_img_train.tar`` (a tar of one tar per class) or in ``train/SYNSET/``; validation
    images in ``ILSVRC2012_img_val.tar`` or in ``val/``, by classes or not.  In the latter cases ``truth`` says the classes
    (default: what of TRUTH lies in ``root``): the devkit (archive or folder), Kaggle's ``LOC_val_solution.csv``, or a text
    with one synset a line in the order of the images' names.  The classes are the synsets, sorted.

    Raises:
        DataError: nothing of that is there, an archive of another form, or a ground truth that does not fit.
    """
    train, val = _first(root, TRAIN), _first(root, VAL)
    if not train and not val:
        raise DataError(
            f"{root}: has neither {TRAIN[0]} nor {VAL[0]}, and no train/ or val/; give the folder of ImageNet"
        )
    if truth and not val:
        raise DataError(f"--val-labels {truth} is given, but {root} has neither {VAL[0]} nor val/; leave it out")
    images: dict[str, list[_Image]] = {}
    if train:
        images["train"] = _train_archive(train) if train.is_file() else _class_folders(root, train)
    if val:
        found = _flat(root, val)
        if found and found[0].synset is None:
            found = _with_truth(found, val, truth or _first(root, TRUTH))
        elif truth:
            raise DataError(
                f"--val-labels {truth} is given, but the images in {val} lie in class folders, which say the classes; "
                "leave --val-labels out, or put all images into one folder"
            )
        images["val"] = found
    classes = sorted({image.synset for image in images.get("train", images.get("val", [])) if image.synset})
    labels = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[Item]] = {}
    for split, part in images.items():
        strange = next((image for image in part if image.synset not in labels), None)
        if strange:
            raise DataError(f"{strange.item.name}: its class {strange.synset} is none of the {len(classes)} of train")
        splits[split] = [image.item._replace(label=labels[image.synset or ""]) for image in part]
    version = "\n".join(archives.version(path) for path in (train, val) if path)
    return Source(tuple(classes), splits, partial(read_file, root), version)


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).exists()), None)


def _train_archive(path: Path) -> list[_Image]:
    images: list[_Image] = []
    seen: set[str] = set()
    for inner in archives.members(path):
        synset = inner.name.rpartition("/")[2].removesuffix(".tar")
        if inner.is_folder:
            continue
        if not inner.name.endswith(".tar") or not _SYNSET.fullmatch(synset):
            raise DataError(f"{path}: holds {inner.name}, not one tar per class (n01440764.tar) as the original does")
        if synset in seen:
            raise DataError(f"{path}: holds the class {synset} twice; fetch it again")
        seen.add(synset)
        before = len(images)
        # A tar inside the tar: its images have offsets in the outer file, from where they are read without unpacking.
        for member in archives.members(path, inner.offset, inner.size):
            if not member.is_folder:
                item = Item(f"train/{synset}/{member.name}", UNLABELED, member.size, (str(path), member.offset))
                images.append(_Image(synset, item))
        if len(images) == before:
            raise DataError(f"{path}: {inner.name} is empty; fetch the archive again")
    if not images:
        raise DataError(f"{path}: is an empty archive; fetch it again")
    return images


def _class_folders(root: Path, path: Path) -> list[_Image]:
    # With a depth nothing is guessed: the folders of this level are the synsets.
    layout = understand(look(path), Reading(depth=1))
    prefix = path.relative_to(root).as_posix()
    return [_Image(synset, item._replace(name=f"{prefix}/{item.name}")) for item, synset in layout.splits["train"]]


def _flat(root: Path, path: Path) -> list[_Image]:
    """Validation images in the order of their names; from a folder of class folders with their synsets."""
    if path.is_dir():
        top, prefix = look(path).top, path.relative_to(root).as_posix()
        images = sorted(top.images())
        if top.folders and images:
            raise DataError(
                f"{path}: holds class folders and also {len(images)} images that are not in any, such as {shown(images[0].name)}; "
                "finish sorting them, or put all images back into one folder"
            )
        if top.folders:
            return _class_folders(root, path)
        return [_Image(None, item._replace(name=f"{prefix}/{item.name}")) for item in images]
    found = [
        Item(f"val/{member.name}", UNLABELED, member.size, (str(path), member.offset))
        for member in archives.members(path)
        if not member.is_folder and is_image(member.name)
    ]
    if not found:
        raise DataError(f"{path}: is an archive without images; fetch it again")
    return [_Image(None, item) for item in sorted(found)]


def _with_truth(images: list[_Image], val: Path, truth: Path | None) -> list[_Image]:
    if truth is None:
        raise DataError(
            f"{val}: the classes of its images are not known; put {TRUTH[0]} beside it, or give --val-labels"
        )
    try:
        synsets = _read_truth(truth)
    except OSError as error:
        raise DataError(f"{error.filename or truth}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{truth}: is no text; give the devkit, LOC_val_solution.csv, or a text with one synset a line"
        ) from None
    if len(synsets) != len(images):
        raise DataError(f"{truth}: has {len(synsets)} entries, {val} has {len(images)} images; they must be as many")
    # Line n is the class of the n-th image by name.
    if isinstance(synsets, list):
        return [_Image(synset, image.item) for synset, image in zip(synsets, images)]
    named = []
    for image in images:
        # Kaggle's file names images without their ending.
        stem = image.item.name.rpartition("/")[2].partition(".")[0]
        if stem not in synsets:
            raise DataError(f"{truth}: has no entry for {stem}")
        named.append(_Image(synsets[stem], image.item))
    return named


def _read_truth(path: Path) -> list[str] | dict[str, str]:
    """Synsets in the order of the images' names, or by name."""
    if path.suffix == ".csv":
        rows = csv.reader(read_path(path).decode().splitlines())
        # `n01440764 x y x y n01440764 ...`: the synset before every box; the header line has none.
        return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and _SYNSET.match(row[1])}
    kit = path
    if path.is_dir():
        lines, kit = read_path(path / "data" / TRUTH[3]).decode().split(), path / "data" / "meta.mat"
    elif path.suffix == ".txt":
        lines, kit = read_path(path).decode().split(), path.with_name("meta.mat")
    else:
        lines = _of_kit(path, TRUTH[3]).decode().split()
    if all(_SYNSET.fullmatch(line) for line in lines):
        return lines
    if not all(line.isdecimal() for line in lines):
        raise DataError(f"{path}: is no ground truth; a line holds a synset (n01440764) or the devkit's number of one")
    if not kit.exists():
        raise DataError(f"{path}: its numbers are explained by the devkit's meta.mat, which must lie beside it")
    # The devkit numbers the synsets in an order of its own, which is not that of their names.
    by_number = _synsets(_of_kit(kit, "meta.mat") if kit == path else read_path(kit))
    unknown = next((line for line in lines if int(line) not in by_number), None)
    if unknown:
        raise DataError(f"{path}: has the number {unknown}, which the devkit's meta.mat does not know")
    return [by_number[int(line)] for line in lines]


def _of_kit(path: Path, name: str) -> bytes:
    """A file of the devkit's archive."""
    found = [content for file, content in archives.contents(path) if file.endswith(f"data/{name}")]
    if not found:
        raise DataError(f"{path}: has no data/{name}; give ILSVRC's devkit of 2012")
    return found[0]


def _synsets(meta: bytes) -> dict[int, str]:
    """The devkit's number to synset; inner nodes of the hierarchy have higher numbers and are not used as classes."""
    from scipy.io import loadmat

    try:
        rows: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        # NotImplementedError is scipy's answer to files of MATLAB 7.3, which are HDF5.
        raise DataError(f"meta.mat of the devkit: cannot be understood ({error})") from None
