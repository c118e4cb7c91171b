"""Indices for WebDatasets made elsewhere, whose tars stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import DataError
from dist_train.files import write_whole
from shards import sheet
from shards.foreign_labels import ForeignLabels, LabelForm, read_classes
from shards.images import Unreadable, as_stored
from shards.index import Index, Shard
from shards.index_file import FILE
from shards.make import Split, drafts_in, read_manifest, write_manifest
from shards.processes import ProgressCallback, in_processes
from shards.source import refuse_unprintable, shown
from shards.tarsplits import find_tars
from shards.tarstream import File, TarStream

IMAGES = ("jpg", "jpeg", "png", "webp")
SOURCES = ("cls", "json", "txt")
_COLUMNS = ("key", "ext", "offset", "size", "width", "height", "text", "label_offset", "label_size")


@dataclass(frozen=True)
class _Task:
    """A tar to be read, and the file that is there when, and only when, that is done."""

    path: Path
    done_file: Path
    form: LabelForm


def index_folder(
    folder: Path,
    out: Path | None = None,
    classes: Path | None = None,
    label_from: str | None = None,
    field: str | None = None,
    workers: int = 1,
    report: ProgressCallback | None = None,
) -> list[Split]:
    """Write an index for every split of the tars in ``folder``, or in its folders train, val and test.

    The tars are read once, from the first byte to the last.  After an interruption the same call reads those that are
    missing.

    Args:
        folder: of the tars.  Splits may be folders, or stand in the tars' names; otherwise all is train.
        out: where the indices are written, one folder per split (default: ``folder``).
        classes: a file with the names of the classes, in the order of their numbers.
        label_from: "cls", "json" or "txt" (default: the first of these that a sample has).
        field: of the JSON, which has the label.
        workers: processes.

    Raises:
        DataError: there are no tars, a damaged or compressed one, a sample without an image or a label, or labels that
            are no classes.
    """
    splits = find_tars(folder)
    form = _label_form(next(iter(splits.values()))[0], label_from, field)
    names = read_classes(classes) if classes else None
    target = out or folder
    places = {split: _place(folder, out, split, tars) for split, tars in splits.items()}
    try:
        with drafts_in(target) as drafts:
            _refuse_existing(drafts, places.values())
            notes = drafts / "index" / "tars"
            notes.mkdir(parents=True, exist_ok=True)
            tasks = {split: [_task(notes, path, form) for path in tars] for split, tars in splits.items()}
            for split, part in tasks.items():
                _read_all(split, part, workers, report)
            found = {split: [json.loads(task.done_file.read_bytes()) for task in part] for split, part in tasks.items()}
            labels = ForeignLabels.of(found, names, form)
            for split, tars in splits.items():
                _save(places[split], tars, found[split], labels)
            shutil.rmtree(drafts)
    except DataError as error:
        if "cannot be written" in str(error) and out is None:
            raise DataError(f"{error}, with --out") from None
        raise
    return [Split(place, Index.load(place), read_manifest(place)) for place in places.values()]


def _refuse_existing(drafts: Path, places: Iterable[Path]) -> None:
    """Refuse to write over an index, unless an interrupted start has left it."""
    for place in places:
        if (place / FILE).exists() and not (drafts / "index").exists():
            raise DataError(f"{place}: has an index already; remove its {FILE} to make it again")


def _place(folder: Path, out: Path | None, split: str, tars: Sequence[Path]) -> Path:
    """Where the index of a split goes: beside its tars, if they are in the split's folder."""
    if out is None and tars[0].parent.name == split:
        return tars[0].parent
    return (out or folder) / split


def _label_form(tar: Path, label_from: str | None, field: str | None) -> LabelForm:
    """Where the labels stand, as the first sample has them; its ending as it is written there, such as CLS."""
    if field is not None and label_from not in (None, "json"):
        raise DataError(
            f"--label-key {field} is for labels in JSON, --label-from is {label_from}; leave one of them out"
        )
    files: dict[str, File] = {}
    written: dict[str, str] = {}
    key = None
    for file in TarStream(tar):
        stem, ext = _parts(file.name)
        # A sample's files stand together: the first other key ends it.
        if key is not None and stem != key:
            break
        if _is_hidden(file.name):
            continue
        key = stem
        files[ext.lower()], written[ext.lower()] = file, ext
    if label_from or field:
        ending = label_from or "json"
        return LabelForm(written.get(ending, ending), field)
    if "cls" in files:
        return LabelForm(written["cls"])
    if "json" in files:
        try:
            tree = json.loads(files["json"].data or b"")
        except ValueError:
            tree = None
        if isinstance(tree, dict) and "label" in tree:
            return LabelForm(written["json"])
        if isinstance(tree, dict):
            raise DataError(
                f"{tar}: its samples have no .cls, and of their JSON's fields ({', '.join(map(str, tree))[:120]}) none is 'label'; give --label-key FIELD, or --label-from txt"
            )
    if "txt" in files:
        return LabelForm(written["txt"])
    raise DataError(
        f"{tar}: its first sample, {shown(key or 'which is missing')}, has no .cls, .json or .txt with a label"
    )


def _task(drafts: Path, path: Path, form: LabelForm) -> _Task:
    state = path.stat()
    # Named after the tar's state and where its labels stand: what was read otherwise is not taken for it.
    text = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {form}"
    return _Task(
        path, drafts / f"tar-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:24]}.json", form
    )


def _read_all(split: str, tasks: Sequence[_Task], workers: int, report: ProgressCallback | None) -> None:
    todo = [task for task in tasks if not task.done_file.exists()]
    sizes = {task.path: task.path.stat().st_size for task in tasks}
    total, done = sum(sizes.values()), sum(sizes[task.path] for task in tasks if task not in todo)
    images = 0
    for task, count in zip(todo, in_processes(_read_tar, todo, workers)):
        done += sizes[task.path]
        images += count
        if report:  # how many images there are is known at the end only
            report(split, images, round(images * total / done))


def _read_tar(task: _Task) -> int:
    """Read a tar, leave what was found in its done file, and return the number of images."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    skipped: list[tuple[str, str]] = []
    unusual = Counter[str]()
    stream, seen = TarStream(task.path), set[str]()
    group: dict[str, File] = {}
    key = ""

    def add() -> None:
        if not group:
            return
        if key in seen:
            raise DataError(f"{task.path}: has two samples of the key {shown(key)}; give every sample a key of its own")
        seen.add(key)
        _add_sample(task, key, group, columns, skipped, unusual)
        group.clear()

    for file in stream:
        if _is_hidden(file.name):
            continue
        stem, ext = _parts(file.name)
        if stem != key:
            add()
            key = stem
        if ext in group:
            raise DataError(f"{task.path}: holds {shown(file.name)} twice; pack it again")
        # Of what is neither image nor label only the name is kept.
        group[ext] = file if ext.lower() in (*IMAGES, task.form.ext.lower()) else file._replace(data=None)
    add()
    tree = {"bytes": stream.length, "sha256": stream.sha256, "columns": columns, "skipped": skipped, "unusual": unusual}
    write_whole(task.done_file, json.dumps(tree))
    return len(columns["key"])


def _add_sample(
    task: _Task,
    key: str,
    group: Mapping[str, File],
    columns: dict[str, list[Any]],
    skipped: list[tuple[str, str]],
    unusual: Counter[str],
) -> None:
    where = f"{task.path}: sample {shown(key)}"
    images = [ext for ext in group if ext.lower() in IMAGES]
    if len(images) != 1:
        if not images:
            raise DataError(f"{where} has no image ({', '.join(map(shown, group))}); images end in {', '.join(IMAGES)}")
        raise DataError(f"{where} has several images ({', '.join(images)}); keep one of them")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: its key is not UTF-8; rename its files") from None
    label = group.get(task.form.ext)
    if label is None or label.data is None:
        raise DataError(f"{where} has no .{task.form.ext}; add it, or give another --label-from")
    try:
        text = task.form.read(label.data)
        if not text:
            raise ValueError("it is empty")
    except (ValueError, RecursionError) as error:
        reason = "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise DataError(f"{where}: its .{task.form.ext} has no label ({reason})") from None
    image = group[images[0]]
    try:
        encoded = as_stored(image.data or b"")
    except Unreadable as error:
        skipped.append((f"{task.path.name}: {image.name}", str(error)))
        return
    unusual.update(encoded.unusual)
    values = (key, images[0], image.offset, image.size, encoded.width, encoded.height, text, label.offset, label.size)
    for column, value in zip(columns.values(), values):
        column.append(value)


def _save(place: Path, tars: Sequence[Path], parts: Sequence[Mapping[str, Any]], labels: ForeignLabels) -> None:
    """Write index, manifest, and DALI's index of every tar."""
    refuse_unprintable(labels.classes)
    place.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    rows: list[tuple[Path, Mapping[str, list[Any]]]] = []
    columns: dict[str, list[Any]] = {
        name: [] for name in ("key", "ext", "offset", "size", "width", "height", "label", "shard")
    }
    for tar, part in zip(tars, parts):
        found = part["columns"]
        # A tar without a readable image is no shard.
        if not found["key"]:
            continue
        # Links are resolved first: `..` behind a link leads to another folder.
        name = os.path.relpath(tar.resolve(), place.resolve())
        columns["shard"] += [len(shards)] * len(found["key"])
        columns["label"] += [labels.number[text] for text in found["text"]]
        columns["key"] += [key.encode() for key in found["key"]]
        for column in ("ext", "offset", "size", "width", "height"):
            columns[column] += found[column]
        shards.append(Shard(name, part["bytes"], part["sha256"], len(found["key"])))
        rows.append((tar, found))
    if not shards:
        raise DataError(f"{tars[0].parent}: no image of {place.name} can be read; see that the tars hold images")
    index = Index.from_columns(labels.classes, shards, {name: np.array(values) for name, values in columns.items()})
    for tar, found in rows:
        write_whole(place / f"{tar.stem}.idx", _dali_index(found, labels.form.ext))
    unusual = sum((Counter(part["unusual"]) for part in parts), Counter[str]())
    write_manifest(place, index, unusual, [tuple(pair) for part in parts for pair in part["skipped"]], [])
    (place / sheet.FILE).unlink(missing_ok=True)  # of an index that was removed
    # Last, because a folder with an index counts as a split.
    index.save(place, {"label_form": asdict(labels.form)})


def _dali_index(found: Mapping[str, list[Any]], label: str) -> str:
    # As DALI's wds2idx has it: ending, offset, size and name of each file, a sample per line.
    rows = zip(*(found[name] for name in ("ext", "offset", "size", "key", "label_offset", "label_size")))
    lines = [
        f"{ext} {at} {size} {key}.{ext} {label} {label_at} {label_size} {key}.{label}\n"
        for ext, at, size, key, label_at, label_size in rows
    ]
    return f"v1.2 {len(lines)}\n" + "".join(lines)


def _parts(name: str) -> tuple[str, str]:
    """Key and ending of a file, as webdataset has them: the ending begins at the first dot of the file's name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ext = base.partition(".")
    return f"{folder}{slash}{stem}", ext


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or name.startswith("__MACOSX")
