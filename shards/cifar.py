"""CIFAR-10 and CIFAR-100 from their official archives, python and binary ones, as sources."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import DataError
from shards import archives
from shards.source import Item, Source, png

_PIXELS = 3 * 32 * 32
# All that the pickles of numpy arrays, lists and texts need; old and new numpy have one of them at different places.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class _Form:
    """Where a version of CIFAR keeps what: files by split, file and field of the class names, bytes before the pixels."""

    train: tuple[str, ...]
    test: str
    python_meta: tuple[str, bytes]
    python_labels: bytes
    binary_meta: str
    binary_labels: int
    """Label bytes in front of the pixels; the last one counts."""


_FORMS = {
    10: _Form(
        tuple(f"data_batch_{n}" for n in range(1, 6)),
        "test_batch",
        ("batches.meta", b"label_names"),
        b"labels",
        "batches.meta.txt",
        1,
    ),
    100: _Form(("train",), "test", ("meta", b"fine_label_names"), b"fine_labels", "fine_label_names.txt", 2),
}


def cifar(path: Path, classes: int) -> Source:
    """CIFAR-10 or CIFAR-100 (``classes``) with the splits train and test, stored as PNG.

    ``path`` is the official archive, python or binary, or a folder with its files.  Both kinds give the same shards.

    Raises:
        DataError: it is neither, or files of it are missing or damaged.
    """
    try:
        version = archives.version(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    names, splits = _load(path, classes, version)
    items = {
        split: [Item(f"{split}/{number:05d}", int(label), _PIXELS) for number, label in enumerate(labels)]
        for split, (_, labels) in splits.items()
    }
    for split, part in items.items():
        wrong = next((item for item in part if not 0 <= item.label < len(names)), None)
        if wrong:
            raise DataError(f"{path}: image {wrong.name} has label {wrong.label}, {split} has {len(names)} classes")
    return Source(names, items, partial(_read, path, classes, version), version)


def _read(path: Path, classes: int, version: str, item: Item) -> bytes:
    split, _, number = item.name.partition("/")
    images, _ = _load(path, classes, version)[1][split]
    return png(images[int(number)])


Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


@lru_cache(maxsize=1)
# Kept, because worker processes read image after image of the same file.
def _load(path: Path, classes: int, version: str) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """Class names and, by split, images uint8 [N, 32, 32, 3] and labels int64 [N]; ``version`` tells the file's versions apart."""
    form = _FORMS[classes]
    files = _files(path, form)
    if form.test in files:
        parse: Callable[[str], Arrays] = partial(_python, form, path, files)
        meta = _pickle(path, form.python_meta[0], files)
        names = [name.decode() for name in meta.get(form.python_meta[1], [])]
    elif f"{form.test}.bin" in files:
        parse = partial(_binary, form, path, files)
        names = files.get(form.binary_meta, b"").decode(errors="replace").split()
    else:
        raise DataError(
            f"{path}: has neither {form.test} nor {form.test}.bin; give CIFAR-{classes}'s python or binary archive"
        )
    if len(names) != classes:
        raise DataError(f"{path}: names {len(names)} classes, CIFAR-{classes} has {classes}; fetch it again")
    batches = [parse(name) for name in form.train]
    train = tuple(np.concatenate(part) for part in zip(*batches))
    return tuple(names), {"train": (train[0], train[1]), "test": parse(form.test)}


def _python(form: _Form, path: Path, files: Mapping[str, bytes], name: str) -> Arrays:
    tree = _pickle(path, name, files)
    try:
        pixels, labels = np.asarray(tree[b"data"], np.uint8), np.asarray(tree[form.python_labels], np.int64)
        return _images(pixels.reshape(len(labels), _PIXELS)), labels
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {name} is malformed ({error}); fetch it again") from None


def _binary(form: _Form, path: Path, files: Mapping[str, bytes], name: str) -> Arrays:
    data = np.frombuffer(_file(path, f"{name}.bin", files), np.uint8)
    width = form.binary_labels + _PIXELS
    if len(data) % width:
        raise DataError(f"{path}: {name}.bin has {len(data)} bytes, not records of {width}; fetch it again")
    rows = data.reshape(-1, width)
    return _images(rows[:, form.binary_labels :]), rows[:, form.binary_labels - 1].astype(np.int64)


def _images(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # A row is the red, the green and the blue plane, one after the other.
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _files(path: Path, form: _Form) -> dict[str, bytes]:
    """The files of an archive, or those of CIFAR in a folder, by their names without folders."""
    own = {form.python_meta[0], form.binary_meta}
    own |= {f"{name}{ending}" for name in (*form.train, form.test) for ending in ("", ".bin")}
    try:
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in sorted(own) if (path / name).is_file()}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return {name.rpartition("/")[2]: content for name, content in archives.contents(path)}


def _file(path: Path, name: str, files: Mapping[str, bytes]) -> bytes:
    if name not in files:
        raise DataError(f"{path}: has no {name}; fetch it again")
    return files[name]


class _Unpickler(pickle.Unpickler):
    """Reads pickles of arrays and texts; whatever else a pickle asks for, and could run, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the official files do not")
        return super().find_class(module, name)


def _pickle(path: Path, name: str, files: Mapping[str, bytes]) -> dict[bytes, Any]:
    try:
        # Pickled by Python 2, whose texts are bytes.
        tree = _Unpickler(io.BytesIO(_file(path, name, files)), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: {name} is not a pickle of CIFAR ({error})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: {name} is not a pickle of CIFAR (a {type(tree).__name__}, not a dictionary)")
    return tree
