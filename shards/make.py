"""Packing a source into shards: each split whole or absent, and what was interrupted goes on where it was."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import PIL

from dist_train.errors import DataError, UserError
from shards import sources
from shards.images import AS_IS, Storing
from shards.index import FILE, UNLABELED, Index
from shards.pack import COLUMNS, Packed, Task, write_shard
from shards.source import Item, Source, shuffled
from shards.sources import Sample

if TYPE_CHECKING:
    from shards.slurm import Array

MANIFEST = "manifest.json"
_DRAFTS = ".making"
_COMPLETE = "complete"
Report = Callable[[str, int, int], None]
"""Called with (split, images done, images in all) as shards are finished."""
T = TypeVar("T")
R = TypeVar("R")


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


@dataclass(frozen=True)
class Made:
    """A finished split: its folder, its index, and its manifest: samples, classes, what was skipped, converted, or odd."""

    folder: Path
    index: Index
    manifest: Mapping[str, Any]


def make(
    source: Source | Callable[[Path], Source],
    out: Path,
    size: ShardSize,
    workers: int = 1,
    report: Report | None = None,
    storing: Storing = AS_IS,
    array: Array | None = None,
) -> list[Made]:
    """Write every split of ``source`` to ``out/<split>``; the same source, size and storing give the same bytes.

    Samples are shuffled by a fixed rule.  Everything is written to a hidden folder in ``out`` and renamed at the end.  After
    an interruption of any kind the same call keeps the shards that were finished, and the result is that of one that was
    not interrupted.

    Args:
        source: the source, or a function that opens it, given a folder for what has to be unpacked.
        size: where a shard ends.
        workers: processes.
        storing: how images are stored.
        array: the SLURM array whose tasks write the shards, which this process then only finishes (default: it writes them).

    Raises:
        DataError: a split is there already, a class has no readable image, or ``out`` cannot be written.
        SlurmError: sbatch refuses the array, or some of its tasks failed.
    """
    with _drafts(out) as drafts:
        opened = _opened(source, drafts / "source") if callable(source) else source
        draft = drafts / _plan(opened, size, storing)
        if any(drafts.glob("*/slurm")):
            from shards.slurm import refuse_jobs

            refuse_jobs(drafts, draft if array else None)
        if not (draft / _COMPLETE).exists():
            refuse_existing(out, opened.splits)
            tasks = {split: _tasks(opened, split, draft / split, size, storing) for split in opened.splits}
            if array:
                array.write(draft, [task for part in tasks.values() for task in part], report)
            for split in opened.splits:
                _make_split(opened, split, draft / split, tasks[split], workers, report)
            (draft / _COMPLETE).touch()
            _sync_folder(draft)
        pending = [split for split in opened.splits if (draft / split).exists()]
        refuse_existing(out, pending, others=False)
        for split in pending:
            for record in (draft / split).glob("shard-*.json"):
                record.unlink()
            os.rename(draft / split, out / split)
        _sync_folder(out)
        shutil.rmtree(drafts)
    return [Made(out / split, Index.load(out / split), read_manifest(out / split)) for split in opened.splits]


def make_samples(
    samples: Iterable[Sample], out: Path, size: ShardSize = ShardSize(bytes=128_000_000), workers: int = 1,
    report: Report | None = None, storing: Storing = AS_IS,
) -> list[Made]:  # fmt: skip
    """:func:`make` from any Python iterable, for instance a generator, of :class:`~shards.sources.Sample`.

    Example::

        def photos():
            for row in database:
                yield Sample(name=row.id, label=row.species, image=row.jpeg_bytes, split="train")

        make_samples(photos(), Path("data/photos"), workers=8)

    The iterable is read once and need not fit in memory: its images go to a file in ``out`` first.  Names must differ within
    a split.  ``label`` None means unlabeled.  The same samples in any order give the same bytes.
    """
    return make(lambda scratch: sources.samples(samples, scratch), out, size, workers, report, storing)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a split: ``samples``, ``per_class``, and (file, reason) of ``skipped`` and ``converted``, counts of ``odd``.

    Raises:
        DataError: it cannot be read, or is malformed.
    """
    path = folder / MANIFEST
    try:
        manifest: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"skipped", "converted", "odd"} <= manifest.keys():
        raise DataError(f"{path}: is malformed; nothing but `shards info` needs it, remove it or make the shards again")
    return manifest


def in_processes(work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Yield ``work(task)`` of every task in order, computed by processes that end with this one, however it ends.

    Raises:
        DataError: one of the processes was killed.
    """
    if min(workers, len(tasks)) <= 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for want of memory; give the same command again to go on, "
                "with fewer --workers"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with(parent: int) -> None:
    """Leave interrupts from the keyboard, which reach all processes, to the parent, and die when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _tasks(source: Source, split: str, folder: Path, size: ShardSize, storing: Storing) -> list[Task]:
    """The shards of a split.  Their items are settled before any image is read, so that each can be made by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Task(folder / f"shard-{number:06d}.tar", first, part, source.read, storing)
        for number, (first, part) in enumerate(_cut(shuffled(source.splits[split], "pack"), size))
    ]


def _make_split(
    source: Source, split: str, folder: Path, tasks: Sequence[Task], workers: int, report: Report | None
) -> None:
    """Write the shards that are not finished yet, and the index of all when they are."""
    for leftover in folder.glob("*.part*"):
        leftover.unlink()
    items = [item for task in tasks for item in task.items]
    todo = [task for task in tasks if not task.record.exists()]
    done = len(items) - sum(len(task.items) for task in todo)
    if report and done:
        report(split, done, len(items))
    for packed in in_processes(write_shard, todo, workers):
        done += packed
        if report:
            report(split, done, len(items))
    try:
        _finish_split(source, split, folder, items, [task.record for task in tasks])
    except DataError:  # the source has to be mended, and then it is another one
        shutil.rmtree(folder.parent)
        raise


def _finish_split(source: Source, split: str, folder: Path, items: Sequence[Item], records: Sequence[Path]) -> None:
    """Write index and manifest from the shards' records, which stay until all splits are finished."""
    shards, parts, odd = [], [], Counter[str]()
    skipped: list[tuple[str, str]] = []
    converted: list[tuple[str, str]] = []
    for record in records:
        packed = Packed.load(record)
        skipped += packed.skipped
        converted += packed.converted
        odd.update(packed.odd)
        if packed.shard.samples:
            shards.append(packed.shard)
            parts.append({name: np.array(packed.columns[name]) for name in COLUMNS})
    _check_readable(source, split, items, dict(skipped))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    columns["shard"] = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    index = Index.from_columns(source.classes, shards, columns)
    index.save(folder)
    counts = np.bincount(index.label[index.label >= 0], minlength=len(index.classes)).tolist()
    manifest = {
        "samples": len(index), "per_class": dict(zip(index.classes, counts)), "odd": dict(sorted(odd.items())),
        "skipped": sorted(skipped), "converted": sorted(converted),
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _sync_folder(folder)


def _check_readable(source: Source, split: str, items: Sequence[Item], skipped: dict[str, str]) -> None:
    """Refuse a split in which all files, or all of a class, were skipped."""
    readable = {item.label for item in items if item.name not in skipped}
    for item in items:
        if item.label not in readable and (item.label != UNLABELED or not readable):
            what = "it" if item.label == UNLABELED else f"class '{source.classes[item.label]}'"
            raise DataError(
                f"{split}: {what} has no readable image "
                f"(for instance {item.name}: {skipped[item.name]}); mend or remove it"
            )
    if not items:
        raise DataError(f"{split}: there are no images for it; choose fewer for the other splits")


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


def _plan(source: Source, size: ShardSize, storing: Storing) -> str:
    """A name for what is being made: another one when the source, its files or the options are others."""
    digest = hashlib.sha256(repr((source.classes, source.stamp, size, storing, PIL.__version__)).encode())
    for split, items in source.splits.items():
        digest.update(repr(split).encode())
        for name, label, bytes_, place in items:
            digest.update(f"{name} {label} {bytes_} {place and place[1]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _opened(source: Callable[[Path], Source], scratch: Path) -> Source:
    try:
        return source(scratch)
    except OSError as error:
        raise DataError(
            f"{error.filename or scratch}: the source cannot be opened or unpacked ({error.strerror or error}); "
            "mend that and give the same command again"
        ) from None


def refuse_existing(out: Path, splits: Iterable[str], others: bool = True) -> None:
    """Refuse a folder that has one of these splits already, or (``others``) any shards.

    Raises:
        DataError: it is so.
    """
    found = [out / split for split in splits if (out / split).exists()]
    if others:
        found += sorted(path.parent for pattern in (FILE, f"*/{FILE}") for path in out.glob(pattern))
    if found:
        raise DataError(f"{found[0]}: is there already; remove it or choose another folder")


@contextmanager
def _drafts(out: Path) -> Iterator[Path]:
    """The folder for what is not finished, for one process at a time; without anything to keep it is removed again."""
    drafts, created = out / _DRAFTS, not out.exists()
    try:
        drafts.mkdir(parents=True, exist_ok=True)
        with open(drafts / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{out}: another process is making shards there; wait for it, or end it") from None
            try:
                yield drafts
            except UserError:
                if not any(drafts.glob("*/*/*")):
                    shutil.rmtree(drafts)
                if created and not any(out.iterdir()):
                    out.rmdir()
                raise
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); free space and give the same command again to go on, "
            "or choose another folder"
        ) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
