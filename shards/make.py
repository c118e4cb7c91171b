"""Packing a source into shards: each split whole or absent, and what was interrupted is resumed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import PIL

from dist_train.errors import DataError, UserError
from dist_train.files import DRAFT, flush, write_whole
from shards import sheet, sources
from shards.images import KEEP, Encoding
from shards.index import UNLABELED, Index
from shards.index_file import FILE
from shards.pack import COLUMNS, ShardResult, Task, write_shard
from shards.processes import ProgressCallback, in_processes
from shards.slurm import refuse_jobs
from shards.source import Item, Source, shuffled
from shards.sources import Sample

if TYPE_CHECKING:
    from shards.slurm import Array

MANIFEST = "manifest.json"
_DRAFTS = ".making"
_FINISHED = ".made-"
"""What the drafts are renamed to, with their plan, when nothing of them is needed any more."""
_COMPLETE = "complete"


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
class Split:
    """A finished split: its folder, its index, and its manifest: samples, classes, what was skipped, converted, or unusual."""

    folder: Path
    index: Index
    manifest: Mapping[str, Any]


def make(
    source: Source | Callable[[Path], Source],
    out: Path,
    size: ShardSize,
    workers: int = 1,
    report: ProgressCallback | None = None,
    encoding: Encoding = KEEP,
    array: Array | None = None,
    *,
    with_sheet: bool = False,
) -> list[Split]:
    """Write every split of ``source`` to ``out/<split>``; the same source, size and encoding give the same bytes.

    Samples are shuffled by a fixed rule.  Everything is written to a hidden folder in ``out`` and renamed at the end.  After
    an interruption of any kind the same call keeps the shards that were finished, and the result is that of one that was
    not interrupted.

    Args:
        source: the source, or a function that opens it, given a folder for what has to be unpacked.
        size: where a shard ends.
        workers: processes.
        encoding: how images are stored.
        with_sheet: whether a picture of some images per class is written beside the index.
        array: the SLURM array whose tasks write the shards, which this process then only finishes (default: it writes them).

    Raises:
        DataError: a split is there already, a class has no readable image, or ``out`` cannot be written.
        SlurmError: sbatch refuses the array, or some of its tasks failed.
    """
    with drafts_in(out) as drafts:
        opened = _opened(source, drafts / "source") if callable(source) else source
        draft = drafts / _plan(opened, size, encoding)
        # Killed behind the last rename: all is there, made by this very plan.
        if (out / f"{_FINISHED}{draft.name}").exists() and all((out / split).exists() for split in opened.splits):
            shutil.rmtree(drafts)
            _remove_finished(out)
            return [_made(out / split) for split in opened.splits]
        if any(drafts.glob("*/slurm")):
            refuse_jobs(drafts, draft if array else None)
        if not (draft / _COMPLETE).exists():
            refuse_existing(out, opened.splits)
            tasks = {split: _tasks(opened, split, draft / split, size, encoding) for split in opened.splits}
            if array:
                array.write(draft, [task for part in tasks.values() for task in part], report)
            for split in opened.splits:
                _make_split(opened, split, draft / split, tasks[split], workers, report)
                if with_sheet:
                    sheet.write(draft / split)
            # From here on a start after a kill packs nothing again, and only renames what is left to rename.
            (draft / _COMPLETE).touch()
            flush(draft)
        _put_in_place(opened.splits, draft, out)
        # One rename ends it.  Should this process be killed behind it, the next start sees by the plan that all is done.
        os.rename(drafts, out / f"{_FINISHED}{draft.name}")
        _remove_finished(out)
    return [_made(out / split) for split in opened.splits]


def _put_in_place(splits: Iterable[str], draft: Path, out: Path) -> None:
    """Rename the finished splits from the drafts to ``out``."""
    # After a kill between two renames some of them are in their places already.
    pending = [split for split in splits if (draft / split).exists()]
    refuse_existing(out, pending, others=False)
    for split in pending:
        for done_file in (draft / split).glob("shard-*.json"):
            done_file.unlink()
        os.rename(draft / split, out / split)
    flush(out)


def _made(folder: Path) -> Split:
    return Split(folder, Index.load(folder), read_manifest(folder))


def _remove_finished(out: Path) -> None:
    for folder in out.glob(f"{_FINISHED}*"):
        shutil.rmtree(folder)


def make_samples(
    samples: Iterable[Sample],
    out: Path,
    size: ShardSize = ShardSize(bytes=128_000_000),
    workers: int = 1,
    report: ProgressCallback | None = None,
    encoding: Encoding = KEEP,
) -> list[Split]:
    """:func:`make` from any Python iterable, for instance a generator, of :class:`~shards.sources.Sample`.

    Example::

        def photos():
            for row in database:
                yield Sample(name=row.id, label=row.species, image=row.jpeg_bytes, split="train")

        make_samples(photos(), Path("data/photos"), workers=8)

    The iterable is read once and need not fit in memory: its images go to a file in ``out`` first.  Names must differ within
    a split.  ``label`` None means unlabeled.  The same samples in any order give the same bytes.
    """
    return make(lambda scratch: sources.samples(samples, scratch), out, size, workers, report, encoding)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a split: ``samples``, ``per_class``, and (file, reason) of ``skipped`` and ``converted``, counts of ``unusual``.

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
    if isinstance(manifest, dict) and "odd" in manifest:  # what 0.1.0's drafts called it
        manifest["unusual"] = manifest.pop("odd")
    if not isinstance(manifest, dict) or not {"skipped", "converted", "unusual"} <= manifest.keys():
        raise DataError(f"{path}: is malformed; nothing but `shards info` needs it, remove it or make the shards again")
    return manifest


def _tasks(source: Source, split: str, folder: Path, size: ShardSize, encoding: Encoding) -> list[Task]:
    """The shards of a split.  Their items are settled before any image is read, so that each can be made by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Task(folder / f"shard-{number:06d}.tar", first, part, source.read, encoding)
        for number, (first, part) in enumerate(_cut(shuffled(source.splits[split], "pack"), size))
    ]


def _make_split(
    source: Source, split: str, folder: Path, tasks: Sequence[Task], workers: int, report: ProgressCallback | None
) -> None:
    """Write the shards that are not finished yet, and the index of all when they are."""
    # Of processes that were killed: under the lock, nobody else writes here.
    for leftover in folder.glob(f".*{DRAFT}"):
        leftover.unlink()
    items = [item for task in tasks for item in task.items]
    todo = [task for task in tasks if not task.done_file.exists()]
    done = len(items) - sum(len(task.items) for task in todo)
    if report and done:
        report(split, done, len(items))
    for work in in_processes(write_shard, todo, workers):
        done += work.images
        if report:
            report(split, done, len(items), work)
    try:
        _finish_split(source, split, folder, items, [task.done_file for task in tasks])
    except DataError:  # the source has to be repaired, and then it is another one
        shutil.rmtree(folder.parent)
        raise


def _finish_split(source: Source, split: str, folder: Path, items: Sequence[Item], done_files: Sequence[Path]) -> None:
    """Write index and manifest from the shards' done_files, which stay until all splits are finished."""
    shards, parts, unusual = [], [], Counter[str]()
    skipped: list[tuple[str, str]] = []
    converted: list[tuple[str, str]] = []
    for done_file in done_files:
        packed = ShardResult.load(done_file)
        skipped += packed.skipped
        converted += packed.converted
        unusual.update(packed.unusual)
        if packed.shard.samples:
            shards.append(packed.shard)
            parts.append({name: np.array(packed.columns[name]) for name in COLUMNS})
    _check_readable(source, split, items, dict(skipped))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    columns["shard"] = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    index = Index.from_columns(source.classes, shards, columns)
    index.save(folder)
    write_manifest(folder, index, unusual, skipped, converted)
    flush(folder)


def write_manifest(
    folder: Path,
    index: Index,
    unusual: Mapping[str, int],
    skipped: Iterable[tuple[str, str]],
    converted: Iterable[tuple[str, str]],
) -> None:
    """Write what :func:`read_manifest` reads."""
    counts = np.bincount(index.label[index.label >= 0], minlength=len(index.classes)).tolist()
    manifest = {
        "samples": len(index),
        "per_class": dict(zip(index.classes, counts)),
        "unusual": dict(sorted(unusual.items())),
        "skipped": sorted(skipped),
        "converted": sorted(converted),
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _check_readable(source: Source, split: str, items: Sequence[Item], skipped: dict[str, str]) -> None:
    """Refuse a split in which all files, or all of a class, were skipped."""
    readable = {item.label for item in items if item.name not in skipped}
    for item in items:
        if item.label not in readable and (item.label != UNLABELED or not readable):
            what = "it" if item.label == UNLABELED else f"class '{source.classes[item.label]}'"
            raise DataError(
                f"{split}: {what} has no readable image "
                f"(for instance {item.name}: {skipped[item.name]}); repair or remove it"
            )
    if not items:
        raise DataError(f"{split}: there are no images for it; choose fewer for the other splits")


def _cut(items: Sequence[Item], size: ShardSize) -> Iterator[tuple[int, list[Item]]]:
    """Yield (number of the first item, items) shard by shard."""
    part: list[Item] = []
    filled = 0
    for number, item in enumerate(items):
        full = len(part) == size.samples if size.samples else filled + item.size > (size.bytes or 0)
        # An image that is larger than a shard gets one of its own.
        if part and full:
            yield number - len(part), part
            part, filled = [], 0
        part.append(item)
        filled += item.size
    if part:
        yield len(items) - len(part), part


def _plan(source: Source, size: ShardSize, encoding: Encoding) -> str:
    """A name for what is being made: another one when the source, its files or the options are others."""
    # With Pillow's version, because another one may encode what is converted to other bytes.
    digest = hashlib.sha256(repr((source.classes, source.version, size, encoding, PIL.__version__)).encode())
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
            "fix that and run the same command again"
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


def _lock(lock: IO[str], out: Path) -> None:
    """Take the lock; the workers of a process that was killed keep it for a moment."""
    for last in (False,) * 10 + (True,):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if last:
                raise DataError(f"{out}: another process is making shards there; wait for it, or end it") from None
            time.sleep(0.1)


def _locked(drafts: Path, out: Path) -> IO[str]:
    """The lock of the folder for drafts, which is made if it is missing; held until it is closed."""
    while True:
        drafts.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            lock = open(drafts / "lock", "w")  # noqa: SIM115 - whom it is given to closes it
            _lock(lock, out)
            # Who held it may have removed the folder meanwhile: the lock of a file that is gone keeps nobody out.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(drafts / "lock")):
                return lock
            lock.close()


@contextmanager
def drafts_in(out: Path) -> Iterator[Path]:
    """The folder for what is not finished, for one process at a time; without anything to keep it is removed again."""
    drafts, created = out / _DRAFTS, not out.exists()
    try:
        with _locked(drafts, out):
            try:
                yield drafts
            except UserError:
                # Shards that are finished, and what was fetched or unpacked, are found again by the next command.
                if not any(drafts.glob("*/*/*")) and not any(drafts.glob("source/*")):
                    shutil.rmtree(drafts)
                if created and not any(out.iterdir()):
                    out.rmdir()
                raise
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); free space and run the same command again to resume, "
            "or choose another folder"
        ) from None
