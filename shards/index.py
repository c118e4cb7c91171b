"""The index of a split: what lies where in its shards; the one reader and writer of index.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import DataError

FORMAT = 1
FILE = "index.json"
UNLABELED = -100

_COLUMNS: dict[str, Any] = {
    "key": np.bytes_,
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "label": np.int64,
    "ext": np.bytes_,
    "width": np.int32,
    "height": np.int32,
}


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, its length in bytes, the SHA-256 of the file in hex, and how many samples it holds."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a split in the order of the shards; a sample's id is its place in the columns, from 0.

    Columns, each of length N: ``key`` and ``ext`` (ASCII bytes: ``<key>.<ext>`` is the image's name in the tar),
    ``shard`` (int32, never falling), ``offset`` and ``size`` (int64: the image's bytes in that tar), ``label`` (int64,
    UNLABELED without one), ``width`` and ``height`` (int32 pixels, as stored, without regard to an orientation tag).
    ``folder`` is where the index was loaded from.
    """

    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    key: NDArray[np.bytes_]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    ext: NDArray[np.bytes_]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def from_columns(
        cls, classes: Sequence[str], shards: Sequence[Shard], columns: dict[str, Any], folder: Path | None = None
    ) -> Index:
        """Build an index from one sequence per column and check that it is consistent.

        Raises:
            DataError: columns of different lengths or types, a label outside the classes, bytes outside their shard.
        """
        where = str(folder / FILE) if folder else "index"
        try:
            arrays = {name: _column(columns[name], dtype) for name, dtype in _COLUMNS.items()}
        except (KeyError, ValueError, TypeError, OverflowError, UnicodeEncodeError) as error:
            raise DataError(f"{where}: has a faulty column ({error}); make the shards again") from None
        index = cls(tuple(classes), tuple(shards), **arrays, folder=folder)
        fault = index._fault()
        if fault:
            raise DataError(f"{where}: {fault}; make the shards again")
        return index

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read the index of the split in ``folder``.

        Raises:
            DataError: no folder, no index, an index of a newer version, one that is malformed, or one that was changed.
        """
        folder = Path(folder)
        path = folder / FILE
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of shards; make it with `python -m shards make`")
        try:
            tree = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{folder}: has no {FILE}; make the shards with `python -m shards make`") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise DataError(f"{path}: is not valid JSON ({error}); make the shards again") from None
        version = tree.get("format") if isinstance(tree, dict) else None
        if not isinstance(version, int):
            raise DataError(f"{path}: is not an index of shards; make the shards with `python -m shards make`")
        if version > FORMAT:
            raise DataError(f"{path}: has format {version}, this version reads up to {FORMAT}; update the program")
        try:
            shards = [Shard(**shard) for shard in tree["shards"]]
            index = cls.from_columns(tree["classes"], shards, tree["samples"], folder)
            stored = tree["fingerprint"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: is malformed ({error}); make the shards again") from None
        if stored != index.fingerprint:
            raise DataError(
                f"{path}: its fingerprint is {str(stored)[:12]}, its contents give {index.fingerprint[:12]}; "
                "it was changed by hand or damaged, make the shards again"
            )
        return index

    def save(self, folder: str | Path) -> None:
        """Write index.json into ``folder``, whole or not at all."""
        tree = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
            "samples": {name: getattr(self, name).astype("U" if dtype is np.bytes_ else dtype).tolist()
                        for name, dtype in _COLUMNS.items()},
        }  # fmt: skip
        path = Path(folder) / FILE
        draft = path.with_name(f".{FILE}.tmp")
        with open(draft, "w", encoding="ascii") as file:
            json.dump(tree, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over classes, shards and all columns, whatever way they are written down."""
        digest = hashlib.sha256()
        head = {"classes": self.classes, "shards": [asdict(shard) for shard in self.shards]}
        digest.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        for name, dtype in _COLUMNS.items():
            column = getattr(self, name)
            digest.update(f"\n{name}\n".encode())
            digest.update(b"\n".join(column.tolist()) if dtype is np.bytes_ else column.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of every shard, int64."""
        return np.bincount(self.shard, minlength=len(self.shards)).astype(np.int64)

    def verify(self, files: Literal["size", "hash"] = "size") -> None:
        """Compare the shards in ``folder`` with the index, by their sizes or also by their SHA-256.

        Raises:
            DataError: the first shard that is missing or differs, with what was found and what is expected.
        """
        for number in range(len(self.shards)):
            self.verify_shard(number, files)

    def verify_shard(self, number: int, files: Literal["size", "hash"] = "size") -> None:
        """Compare one shard, as :meth:`verify` does with all."""
        assert self.folder is not None, "only an index that was loaded has shards to verify"
        shard = self.shards[number]
        path = self.folder / shard.name
        try:
            found = path.stat().st_size
            digest = file_sha256(path) if files == "hash" and found == shard.bytes else shard.sha256
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); the index names it, make the shards again"
            ) from None
        if found != shard.bytes:
            raise DataError(f"{path}: has {found} bytes, the index says {shard.bytes}; make the shards again")
        if digest != shard.sha256:
            raise DataError(
                f"{path}: has SHA-256 {digest[:12]}, the index says {shard.sha256[:12]}; it was changed, make the shards again"
            )

    def _fault(self) -> str | None:
        """What is inconsistent, if anything."""
        lengths = {name: len(getattr(self, name)) for name in _COLUMNS}
        if len(set(lengths.values())) > 1:
            return f"its columns differ in length ({lengths})"
        if not len(self):
            return "it holds no samples"
        if self.shard.min() < 0 or self.shard.max() >= len(self.shards) or np.any(np.diff(self.shard) < 0):
            return f"its column shard must rise from 0 to at most {len(self.shards) - 1}"
        if not np.array_equal(self.shard_sizes, [shard.samples for shard in self.shards]):
            return "its samples per shard are not those of its shards"
        wrong = (self.label != UNLABELED) & ((self.label < 0) | (self.label >= len(self.classes)))
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            return f"sample {self.key[first].decode()} has label {self.label[first]}, allowed are 0 to {len(self.classes) - 1}"
        ends = np.array([shard.bytes for shard in self.shards], dtype=np.int64)[self.shard]
        outside = (self.offset < 0) | (self.size < 0) | (self.offset + self.size > ends)
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            return f"sample {self.key[first].decode()} lies outside of {self.shards[self.shard[first]].name}"
        if min(self.width.min(), self.height.min()) < 1:
            return "it has images of width or height 0"
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _column(values: Any, dtype: Any) -> NDArray[Any]:
    if dtype is np.bytes_:
        return np.array(values, dtype=np.bytes_) if len(values) else np.array([], dtype="S1")
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"whole numbers expected, {array.dtype} found")
    if array.size and array.max() > np.iinfo(dtype).max:
        raise ValueError(f"{array.max()} is too large")
    return array.astype(dtype).reshape(-1)
