"""Checking finished shards: every tar against the index, every image by decoding it, and which images are there twice."""

from __future__ import annotations

import hashlib
import json
import mmap
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import DataError
from shards.foreign_labels import LabelForm
from shards.images import Unreadable, decoded_size
from shards.index import UNLABELED, Index
from shards.index_file import FILE
from shards.processes import ProgressCallback, in_processes
from shards.quarantine import Bad

_NAMED = 3
"""Duplicates that are named; the others are counted."""


@dataclass(frozen=True)
class Checked:
    """A split that was looked through: what is wrong with its shards, with which samples, and every image's digest.

    ``digests`` are of the encoded images, in the order of the whole index; empty where the shard could not be read.
    """

    index: Index
    faults: list[str]
    bad: list[Bad]
    digests: NDArray[np.bytes_]


class _Found(NamedTuple):
    """The same of one shard."""

    faults: list[str]
    bad: list[Bad]
    digests: NDArray[np.bytes_]


def split_folders(folder: Path) -> list[Path]:
    """The splits in ``folder``, or the folder itself if it is one.

    Raises:
        DataError: there are none.
    """
    if (folder / FILE).exists():
        return [folder]
    splits = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    if not splits:
        raise DataError(
            f"{folder}: holds no shards (no {FILE} in it or in its folders); make them with `python -m shards make`"
        )
    return splits


def check(folder: Path, workers: int = 1, report: ProgressCallback | None = None) -> Checked:
    """Look through every shard of a split, in ``workers`` processes.

    Samples that the quarantine list keeps from training are looked at again as well.

    Raises:
        DataError: the index itself is missing or damaged.
    """
    index = Index.load(folder, quarantine=False)
    faults: list[str] = []
    bad: list[Bad] = []
    digests: list[NDArray[np.bytes_]] = []
    tasks = [(folder, index.fingerprint, number) for number in range(len(index.shards))]
    done = 0
    for one in in_processes(_check_shard, tasks, workers):
        faults += one.faults
        bad += one.bad
        digests.append(one.digests)
        done += len(one.digests)
        if report:
            report(folder.name, done, len(index))
    return Checked(index, faults, bad, np.concatenate(digests))


def duplicates(checked: Sequence[Checked]) -> list[str]:
    """Lines about images that are there twice, byte for byte, within a split or in two of them."""
    lines = []
    for number, one in enumerate(checked):
        lines += _repeated(one)
        for other in checked[number + 1 :]:
            lines += _shared(one, other)
    return lines


def _repeated(one: Checked) -> list[str]:
    # Stable: of equal images the first one is what the others repeat.
    order = np.argsort(one.digests, kind="stable")
    ordered = one.digests[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != b"")) + 1
    if not len(again):
        return []
    pairs = np.stack([order[again - 1], order[again]], axis=1)
    pairs = pairs[np.argsort(pairs[:, 1])]
    other = int((one.index.label[pairs[:, 0]] != one.index.label[pairs[:, 1]]).sum())
    count = "1 image is there" if len(again) == 1 else f"{len(again)} images are there"
    text = f"{_name(one)}: {count} more than once, {other} of them with another label"
    return [f"{text} ({_some([(_key(one, a), _key(one, b)) for a, b in pairs[:_NAMED]], len(pairs))})"]


def _shared(one: Checked, other: Checked) -> list[str]:
    _, here, there = np.intersect1d(one.digests, other.digests, return_indices=True)
    read = one.digests[here] != b""
    here, there = here[read], there[read]
    if not len(here):
        return []
    named = [(_key(one, a), _key(other, b)) for a, b in zip(here[:_NAMED], there)]
    return [
        f"{_name(one)} and {_name(other)}: share {len(here)} image{'s' if len(here) != 1 else ''} ({_some(named, len(here))})"
    ]


def _some(pairs: list[tuple[str, str]], total: int) -> str:
    return "; ".join(" = ".join(pair) for pair in pairs) + ("; ..." if total > len(pairs) else "")


def _name(one: Checked) -> str:
    return one.index.folder.name if one.index.folder else ""


def _key(one: Checked, sample: int) -> str:
    return str(one.index.key[sample].decode())


@lru_cache(maxsize=1)
# By the fingerprint as well: shards that were made anew in the same folder have another index.
def _index(folder: Path, _fingerprint: str) -> Index:
    return Index.load(folder, quarantine=False)


def _check_shard(task: tuple[Path, str, int]) -> _Found:
    folder, fingerprint, number = task
    index = _index(folder, fingerprint)
    first, last = index.shard.searchsorted([number, number + 1]).tolist()
    found = _Found([], [], np.zeros(last - first, "S16"))
    path = folder / index.shards[number].name
    try:
        index.verify_shard(number, "hash")
    except DataError as error:
        found.faults.append(str(error))
    if path.exists() and not path.is_file():  # a pipe would be waited for
        return found
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                with tarfile.open(fileobj=data, mode="r:") as tar:
                    # tar puts ./ before the names where a folder is packed as `.`.
                    members = {member.name.removeprefix("./"): (member.offset_data, member.size) for member in tar}
            except tarfile.TarError as error:
                found.faults.append(f"{path}: is not a tar archive, or a damaged one ({error})")
                return found
            for place, sample in enumerate(range(first, last)):
                offset, size = int(index.offset[sample]), int(index.size[sample])
                image = data[offset : offset + size]
                found.digests[place] = hashlib.sha256(image).digest()[:16]
                for why in _faults(index, _label_form(folder, fingerprint), sample, members, data, image):
                    found.bad.append(Bad(sample, index.key[sample].decode(), why))
                    # One reason is enough for an entry in the quarantine list.
                    break
    except (OSError, ValueError) as error:  # gone or empty, which cannot be mapped and is said above
        if not found.faults:
            found.faults.append(f"{path}: cannot be read ({error})")
    return found


@lru_cache(maxsize=1)
def _label_form(folder: Path, _fingerprint: str) -> LabelForm:
    """Where the labels stand in the tars of a split, or of the one that it is a list over, maybe of a list."""
    tree = json.loads((folder / FILE).read_bytes())
    while "of" in tree:
        folder = folder.resolve() / tree["of"]
        tree = json.loads((folder / FILE).read_bytes())
    return LabelForm(**tree.get("label_form", {"ext": "cls"}))


def _faults(
    index: Index, form: LabelForm, sample: int, members: dict[str, tuple[int, int]], data: mmap.mmap, image: bytes
) -> Iterator[str]:
    """What is wrong with a sample."""
    key, label = index.key[sample].decode(), int(index.label[sample])
    name, where = f"{key}.{index.ext[sample].decode()}", (int(index.offset[sample]), int(index.size[sample]))
    if members.get(name) != where:
        yield f"the tar has {name} at {members.get(name)}, the index at {where} (offset, size)"
    offset, size = members.get(f"{key}.{form.ext}", (0, 0))
    stored = data[offset : offset + size]
    if label != UNLABELED and not form.means(stored, label, index.classes):
        yield f"its label is {stored.decode(errors='replace')[:60]!r} in the tar, {label} in the index"
    try:
        found, expected = decoded_size(image), (int(index.width[sample]), int(index.height[sample]))
    except Unreadable as error:
        yield str(error)
        return
    if found != expected:
        yield f"is {found[0]} x {found[1]}, the index says {expected[0]} x {expected[1]}"
