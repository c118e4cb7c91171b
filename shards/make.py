"""Packing a source into shards: tars, DALI's index beside each, index.json and a manifest, a split whole or absent."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dist_train.errors import DataError
from shards.images import Encoded, Unreadable, inspect
from shards.index import Index, Shard
from shards.sources import Item, Source, shuffled

_BLOCK = 512
_RECORD = 20 * _BLOCK
MANIFEST = "manifest.json"
Report = Callable[[str, int, int], None]
"""Called with (split, images done, images in all) as shards are finished."""


@dataclass(frozen=True)
class ShardSize:
    """Where a shard ends: after so many samples, or when its images have so many bytes, whichever is set."""

    samples: int | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> ShardSize:
        """Read ``1000`` (samples) or ``128MB`` (of 10^6 bytes); raises ValueError for anything else."""
        match = re.fullmatch(r"([1-9]\d*)(MB)?", text)
        if not match:
            raise ValueError(f"'{text}' is neither a number of samples, such as 1000, nor of megabytes, such as 128MB")
        number = int(match[1])
        return cls(bytes=number * 1_000_000) if match[2] else cls(samples=number)


@dataclass
class Packed:
    """What became of one shard's items: its entry in the index, its samples' columns, and what was not stored as it was."""

    shard: Shard
    columns: dict[str, list[Any]]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    converted: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """A finished split: its folder, its index, and (source file, reason) of what was skipped or converted."""

    folder: Path
    index: Index
    skipped: list[tuple[str, str]]
    converted: list[tuple[str, str]]


def make(source: Source, out: Path, size: ShardSize, workers: int = 1, report: Report | None = None) -> list[Made]:
    """Write every split of ``source`` to ``out/<split>``; the same source and size give the same bytes.

    Samples are shuffled by a fixed rule.  Everything is written under a temporary name and renamed at the end.

    Raises:
        DataError: a split is there already, a class has no readable image, or ``out`` cannot be written.
    """
    for split in source.splits:
        if (out / split).exists():
            raise DataError(f"{out / split}: is there already; remove it or choose another folder")
    with _draft_folder(out) as draft:
        made = [_make_split(source, split, draft / split, size, workers, report) for split in source.splits]
        for split in source.splits:
            os.rename(draft / split, out / split)
        _sync_folder(out)
    return [Made(out / one.folder.name, one.index, one.skipped, one.converted) for one in made]


def _make_split(source: Source, split: str, folder: Path, size: ShardSize, workers: int, report: Report | None) -> Made:
    folder.mkdir()
    items = shuffled(source.splits[split], "pack")
    packed: list[Packed] = []
    done = 0
    # A shard's items are settled before any image is read, so that every shard can be made by itself.
    tasks = [
        (folder / f"shard-{number:06d}.tar", first, part, source.read)
        for number, (first, part) in enumerate(_cut(items, size))
    ]
    for result, task in zip(_each(tasks, workers), tasks):
        packed.append(result)
        done += len(task[2])
        if report:
            report(split, done, len(items))
    skipped = sorted(entry for one in packed for entry in one.skipped)
    converted = sorted(entry for one in packed for entry in one.converted)
    _check_classes(source, split, items, dict(skipped))
    kept = [one for one in packed if one.shard.samples]
    columns = {name: [value for one in kept for value in one.columns[name]] for name in kept[0].columns}
    columns["shard"] = [number for number, one in enumerate(kept) for _ in range(one.shard.samples)]
    index = Index.from_columns(source.classes, [one.shard for one in kept], columns, folder)
    index.save(folder)
    _write_manifest(folder, index, skipped, converted)
    _sync_folder(folder)
    return Made(folder, index, skipped, converted)


def _cut(items: Sequence[Item], size: ShardSize) -> Iterator[tuple[int, list[Item]]]:
    """Yield (number of the first item, items) shard by shard."""
    part: list[Item] = []
    filled = 0
    for number, item in enumerate(items):
        full = len(part) == size.samples if size.samples else filled + item.size > (size.bytes or 0)
        if part and full:
            yield number - len(part), part
            part, filled = [], 0
        part.append(item)
        filled += item.size
    if part:
        yield len(items) - len(part), part


def _each(tasks: Sequence[tuple[Path, int, list[Item], Callable[[str], bytes]]], workers: int) -> Iterator[Packed]:
    if min(workers, len(tasks)) <= 1:
        yield from (write_shard(*task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    # An interrupt from the keyboard reaches all processes; this one ends the others.
    with ProcessPoolExecutor(
        min(workers, len(tasks)), context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        try:
            yield from pool.map(write_shard, *zip(*tasks))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_shard(path: Path, first: int, items: Sequence[Item], read: Callable[[str], bytes]) -> Packed:
    """Write one tar and DALI's index beside it; ``first`` is the number of the first item in its split.

    A shard in which nothing is readable leaves no file.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "offset", "size", "label", "ext", "width", "height")}
    packed = Packed(Shard(path.name, 0, "", 0), columns)
    rows: list[str] = []
    with open(path, "wb") as file:
        tar = _Tar(file)
        for number, item in enumerate(items, start=first):
            try:
                image = inspect(read(item.name))
            except (Unreadable, OSError) as error:
                packed.skipped.append((item.name, getattr(error, "strerror", None) or str(error)))
                continue
            if image.converted_from:
                packed.converted.append((item.name, image.converted_from))
            rows.append(_add_sample(tar, columns, f"{number:08d}-{_stem(item.name)}", item.label, image))
        tar.finish()
        file.flush()
        os.fsync(file.fileno())
    if not rows:
        path.unlink()
        return packed
    with open(path.with_suffix(".idx"), "w", encoding="ascii") as file:
        file.write(f"v1.2 {len(rows)}\n" + "".join(f"{row}\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
    packed.shard = Shard(path.name, tar.length, tar.digest.hexdigest(), len(rows))
    return packed


class _Tar:
    """Writes a USTAR archive that depends on names and contents alone, and hashes it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.length = 0

    def add(self, name: str, data: bytes) -> int:
        """Add a file and return the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.length
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    def finish(self) -> None:
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.length % _RECORD))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.length += len(data)


def _add_sample(tar: _Tar, columns: dict[str, list[Any]], key: str, label: int, image: Encoded) -> str:
    """Add image and label to the tar and to the columns; returns the sample's line of DALI's index."""
    offset = tar.add(f"{key}.{image.ext}", image.data)
    digits = str(label).encode()
    label_offset = tar.add(f"{key}.cls", digits)
    values = (key, offset, len(image.data), label, image.ext, image.width, image.height)
    for column, value in zip(columns.values(), values):
        column.append(value)
    return f"{image.ext} {offset} {len(image.data)} {key}.{image.ext} cls {label_offset} {len(digits)} {key}.cls"


def _stem(name: str) -> str:
    """The file name in a form that WebDataset keys can have: no dots, spaces or letters outside of ASCII."""
    stem = name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60]


def _check_classes(source: Source, split: str, items: Sequence[Item], skipped: dict[str, str]) -> None:
    """Refuse a split in which all files of a class were skipped."""
    readable = {item.label for item in items if item.name not in skipped}
    for item in items:
        if item.label not in readable:
            raise DataError(
                f"{split}: class '{source.classes[item.label]}' has no readable image "
                f"(for instance {item.name}: {skipped[item.name]}); mend or remove it"
            )


def _write_manifest(
    folder: Path, index: Index, skipped: list[tuple[str, str]], converted: list[tuple[str, str]]
) -> None:
    counts = {name: int((index.label == label).sum()) for label, name in enumerate(index.classes)}
    tree = {"samples": len(index), "per_class": counts, "skipped": skipped, "converted": converted}
    (folder / MANIFEST).write_text(json.dumps(tree, indent=1) + "\n")


@contextmanager
def _draft_folder(out: Path) -> Iterator[Path]:
    """A folder in ``out`` for what is not finished; it is gone afterwards, and ``out`` too if it was made for nothing."""
    draft: Path | None = None
    created = not out.exists()
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".making-", dir=out))
            yield draft
        finally:
            if draft:
                shutil.rmtree(draft, ignore_errors=True)
            if created and out.is_dir() and not any(out.iterdir()):
                out.rmdir()
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
