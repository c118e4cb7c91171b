"""The index of a split: what lies where in its shards, and which of its samples are used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import DataError
from dist_train.files import sha256
from shards import columns as table
from shards import quarantine as quarantine_list
from shards.index_file import COLUMNS_FILE, FILE, FORMAT, read_columns, read_json, write_json
from shards.quarantine import QUARANTINE_FILE, Bad

UNLABELED = -100

# In the order of the file: numbers of 8 bytes before those of 4 and text, so that all are aligned.
_COLUMNS: dict[str, Any] = {
    "offset": np.int64,
    "size": np.int64,
    "label": np.int64,
    "shard": np.int32,
    "width": np.int32,
    "height": np.int32,
    "key": np.bytes_,
    "ext": np.bytes_,
}
_LIST_COLUMNS = {"id": "<i8", "label": "<i8"}


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, its length in bytes, the SHA-256 of the file in hex, and how many of its samples are meant."""

    name: str
    bytes: int
    sha256: str
    samples: int


# eq=False: == of arrays is an array, which a dataclass cannot take for true or false.
@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a split in the order of the shards; a sample's id is its place in the columns, from 0.

    Columns, each of length N: ``key`` and ``ext`` (ASCII bytes: ``<key>.<ext>`` is the image's name in the tar),
    ``shard`` (int32, never falling), ``offset`` and ``size`` (int64: the image's bytes in that tar), ``label`` (int64,
    UNLABELED without one), ``width`` and ``height`` (int32 pixels, as stored, without regard to an orientation tag).
    ``fingerprint`` is a SHA-256 in hex over all that, ``folder`` is where the index was loaded from.  ``quarantine`` has the
    ids, in the whole split, of samples that are kept out, and ``whole_fingerprint`` is that of the whole split.

    A split may also be a list over another split, which :meth:`save_list` writes.  Loaded, it is an index like others,
    whose shards have absolute names.  So is a mixture of several splits (:func:`shards.mixture.mix`): ``sources`` are
    theirs, and ``weight``, float64 [N], is how often each sample comes per epoch.
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
    fingerprint: str
    folder: Path | None = None
    quarantine: tuple[int, ...] = ()
    whole_fingerprint: str = ""
    sources: tuple[Index, ...] = ()
    inherited: tuple[int, ...] = ()
    """Of a whole list: the ids of its samples that are in the quarantine of the splits that it is a list over."""
    weight: NDArray[np.float64] | None = None

    @property
    def left_out(self) -> int:
        """Samples that are kept out."""
        return len(self.quarantine)

    @property
    def splits(self) -> tuple[Index, ...]:
        """The splits on disk that the samples are from: this one, or those of a mixture."""
        return self.sources or (self,)

    @property
    def quarantine_notes(self) -> list[str]:
        """A line per split for whoever uses it, about what its quarantine list has kept out; none where it keeps out nothing."""
        return [
            f"{split.folder}: {split.left_out} images are left out, by {QUARANTINE_FILE}"
            for split in self.splits
            if split.left_out
        ]

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def from_columns(cls, classes: Sequence[str], shards: Sequence[Shard], columns: Mapping[str, Any]) -> Index:
        """Build an index from one sequence per column and check that it is consistent.

        Raises:
            DataError: columns of different lengths or types, a label outside the classes, bytes outside their shard.
        """
        try:
            arrays = {name: _column(columns[name], dtype) for name, dtype in _COLUMNS.items()}
        except (KeyError, ValueError, TypeError, OverflowError, UnicodeEncodeError) as error:
            raise DataError(f"index: has a faulty column ({error}); make the shards again") from None
        return cls._checked(tuple(classes), tuple(shards), arrays, None)

    @classmethod
    def load(cls, folder: str | Path, quarantine: bool | Sequence[int] = True) -> Index:
        """Read the index of the split in ``folder``, without the samples of its quarantine list, if there is one.

        The columns are mapped into memory, so the processes of a machine share them.

        Args:
            folder: the split's own.
            quarantine: whether the list is followed; or the ids of the samples to keep out instead.

        Raises:
            DataError: no folder, no index, one of another version, one that is malformed or was changed, a list over
                a split that is not there or is another one now, or a quarantine list for other shards.
        """
        folder = Path(folder)
        tree = read_json(folder)
        try:
            if "of" in tree:
                index, found = cls._load_list(folder, tree)
            else:
                shards = tuple(Shard(**shard) for shard in tree["shards"])
                index = cls._checked(tuple(tree["classes"]), shards, read_columns(folder, tree, _COLUMNS), folder)
                found = index.fingerprint
            stored = tree["fingerprint"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / FILE}: is malformed ({error!r}); make the shards again") from None
        if stored != found:
            raise DataError(
                f"{folder / FILE}: its fingerprint is {str(stored)[:12]}, its contents give {found[:12]}; "
                "it was changed by hand or damaged, make the shards again"
            )
        index = replace(index, whole_fingerprint=index.fingerprint)
        if quarantine is False:
            return index
        if quarantine is True:
            quarantine = index.bad()
        return index._without(quarantine) if quarantine else index

    def save(self, folder: str | Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write index.json, and the columns beside it, into ``folder``; ``notes`` are further entries, for other readers."""
        arrays = {name: getattr(self, name) for name in _COLUMNS}
        table.write(Path(folder) / COLUMNS_FILE, arrays)
        tree = {
            "format": FORMAT,
            "fingerprint": _fingerprint(self.classes, self.shards, arrays),
            "rows": len(self),
            "columns": {name: array.dtype.str for name, array in arrays.items()},
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
            **(notes or {}),
        }
        write_json(Path(folder) / FILE, tree)

    def save_list(
        self, folder: Path, ids: NDArray[np.int64], label: NDArray[np.int64], rule: Mapping[str, Any], place: Path
    ) -> None:
        """Make ``folder`` a split of the samples ``ids`` (rising) of this loaded one with the labels ``label``.

        No image is copied: the split's index.json refers to this one, by a path relative to ``place``, where the folder
        will be, and by its fingerprint.  ``rule`` says for people how the samples were chosen.
        """
        assert self.folder is not None, "only an index that was loaded can be referred to"
        table.write(folder / COLUMNS_FILE, {"id": ids.astype("<i8"), "label": label.astype("<i8")})
        tree = {
            "format": FORMAT,
            "fingerprint": _list_fingerprint(self.fingerprint, ids, label),
            "of": os.path.relpath(self.folder.resolve(), place.resolve()),
            "of_fingerprint": self.fingerprint,
            "rule": dict(rule),
            "rows": len(ids),
            "columns": _LIST_COLUMNS,
        }
        write_json(folder / FILE, tree)

    def take(self, ids: NDArray[np.int64], label: NDArray[np.int64] | None = None) -> Index:
        """The samples ``ids`` (rising) alone, with other labels where they are given; the shards are those that they lie in.

        All of them with the same labels have the same fingerprint: a subset leaves splits whole, which can be compared.
        """
        used, shard, counts = np.unique(self.shard[ids], return_inverse=True, return_counts=True)
        root = self.folder.resolve() if self.folder else Path()
        # Absolute names, since the result belongs to another folder than the shards.
        shards = tuple(
            replace(self.shards[number], name=str(root / self.shards[number].name), samples=int(count))
            for number, count in zip(used, counts)
        )
        label = self.label[ids] if label is None else label
        arrays: Any = {name: getattr(self, name)[ids] for name in _COLUMNS if name not in ("shard", "label")}
        same = len(ids) == len(self) and np.array_equal(label, self.label)
        return replace(
            self,
            shards=shards,
            shard=shard.reshape(-1).astype(np.int32),
            label=label,
            fingerprint=self.fingerprint if same else _list_fingerprint(self.fingerprint, ids, label),
            inherited=(),
            **arrays,
        )

    def bad(self) -> list[int]:
        """The ids of all samples of this whole split that are to be kept out: by its own quarantine list, or by those of the
        splits that it is a list over.

        Raises:
            DataError: as :meth:`quarantined`.
        """
        return sorted({*self.inherited, *(entry.id for entry in self.quarantined())})

    def quarantined(self) -> list[Bad]:
        """The entries of the quarantine list beside this index, which must be one of the whole split.

        Raises:
            DataError: the list is malformed, or was written for other shards.
        """
        assert self.folder is not None, "only an index that was loaded has a quarantine list"
        return quarantine_list.read(self.folder, self.fingerprint, len(self))

    def save_quarantine(self, entries: Sequence[Bad]) -> None:
        """Write the quarantine list of this split, which must be loaded whole; an empty one is removed.

        Raises:
            DataError: it cannot be written.
        """
        assert self.folder is not None, "only an index that was loaded has a quarantine list"
        quarantine_list.write(self.folder, self.fingerprint, entries)

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
            # Of a wrong size it differs in any case, and hashing takes long.
            digest = sha256(path) if files == "hash" and found == shard.bytes else shard.sha256
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

    @classmethod
    def _checked(
        cls,
        classes: tuple[str, ...],
        shards: tuple[Shard, ...],
        arrays: Mapping[str, Any],
        folder: Path | None,
    ) -> Index:
        where = folder / FILE if folder else "index"
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{where}: its columns differ in length ({lengths}); make the shards again")
        index = cls(classes, shards, fingerprint=_fingerprint(classes, shards, arrays), folder=folder, **arrays)
        if fault := index._fault():
            raise DataError(f"{where}: {fault}; make the shards again")
        return index

    @classmethod
    def _load_list(cls, folder: Path, tree: Mapping[str, Any]) -> tuple[Index, str]:
        """The list in ``folder`` as an index, and its own fingerprint."""
        # Links are resolved first: `..` behind a link would lead to another folder than when the list was written.
        source = Path(os.path.normpath(folder.resolve() / tree["of"]))
        if not source.is_dir():
            raise DataError(f"{folder / FILE}: refers to the shards in {source}, which are not there; move them back")
        # Whole: the ids of a list are places in the split with its bad samples.
        whole = cls.load(source, quarantine=False)
        if whole.fingerprint != tree["of_fingerprint"]:
            raise DataError(f"{folder / FILE}: the shards in {source} are others now; make the subset again")
        rows = read_columns(folder, tree, _LIST_COLUMNS)
        ids, label = rows["id"], rows["label"]
        if not len(ids) or ids[0] < 0 or ids[-1] >= len(whole) or np.any(np.diff(ids) <= 0):
            raise DataError(
                f"{folder / COLUMNS_FILE}: its ids must rise from 0 to at most {len(whole) - 1}; make it again"
            )
        inherited = tuple(np.flatnonzero(np.isin(ids, whole.bad())).tolist())
        index = replace(whole.take(ids, label), folder=folder, inherited=inherited)
        if fault := index._fault():
            raise DataError(f"{folder / FILE}: {fault}; make the subset again")
        return index, _list_fingerprint(whole.fingerprint, ids, label)

    def _without(self, bad: Sequence[int]) -> Index:
        if bad and not 0 <= min(bad) <= max(bad) < len(self):
            raise DataError(
                f"{self.folder}: a list of samples to leave out has ids beyond the {len(self)} samples; remove it"
            )
        if len(bad) >= len(self):
            raise DataError(f"{self.folder}: all of its samples are in quarantine; make the shards again")
        return replace(self.take(np.delete(np.arange(len(self)), bad)), quarantine=tuple(bad))

    def _fault(self) -> str | None:
        """What is inconsistent, if anything."""
        if not len(self):
            return "it holds no samples"
        if self.shard.min() < 0 or self.shard.max() >= len(self.shards) or np.any(np.diff(self.shard) < 0):
            return f"its column shard must rise from 0 to at most {len(self.shards) - 1}"
        if not np.array_equal(self.shard_sizes, [shard.samples for shard in self.shards]):
            return "its samples per shard are not those of its shards"
        wrong = ((self.label < 0) | (self.label >= len(self.classes))) & (self.label != UNLABELED)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            return f"sample {self.key[first].decode(errors='replace')} has label {self.label[first]}, allowed are 0 to {len(self.classes) - 1}"
        ends = np.array([shard.bytes for shard in self.shards], dtype=np.int64)[self.shard]
        outside = (self.offset < 0) | (self.size < 0) | (self.offset + self.size > ends)
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            return f"sample {self.key[first].decode(errors='replace')} lies outside of {self.shards[self.shard[first]].name}"
        if min(self.width.min(), self.height.min()) < 1:
            return "it has images of width or height 0"
        return None


def _fingerprint(classes: Sequence[str], shards: Sequence[Shard], arrays: Mapping[str, NDArray[Any]]) -> str:
    # With the types: from the bytes alone it does not show where a column ends.
    kinds = {name: array.dtype.str for name, array in arrays.items()}
    head = {"classes": list(classes), "shards": [asdict(shard) for shard in shards], "columns": kinds}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    for array in arrays.values():
        digest.update(table.raw(array))
    return digest.hexdigest()


def _list_fingerprint(whole: str, ids: NDArray[np.int64], label: NDArray[np.int64]) -> str:
    """Of a list over the split with the fingerprint ``whole``."""
    digest = hashlib.sha256(whole.encode())
    digest.update(ids.astype("<i8").tobytes() + label.astype("<i8").tobytes())
    return digest.hexdigest()


def _column(values: Any, dtype: Any) -> NDArray[Any]:
    if dtype is np.bytes_:
        return np.array(values, dtype=np.bytes_) if len(values) else np.array([], dtype="S1")
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"whole numbers expected, {array.dtype} found")
    # astype would let it wrap around without an error.
    if array.size and array.max() > np.iinfo(dtype).max:
        raise ValueError(f"{array.max()} is too large")
    return array.astype(dtype).reshape(-1)
