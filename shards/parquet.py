"""Images and labels in Parquet files, as Hugging Face's data sets have them; the one file with pyarrow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dist_train.errors import DataError
from dist_train.files import draft_of, write_whole
from shards.index import UNLABELED
from shards.processes import ProgressCallback
from shards.source import SPLITS, Item, Source, read_file, shown
from shards.split_names import split_of, split_words

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "image_bytes", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target", "fine_label")
_NATIVE = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "hf")
_ROWS = 64
"""Read at a time: images of some megabytes, not a whole file, are in memory."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold the images and the classes, and the names of the classes, None where they are in the column."""

    image: str
    label: str
    classes: tuple[str, ...] | None


def parquet(
    source: str,
    scratch: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    report: ProgressCallback | None = None,
) -> Source:
    """The rows of Parquet files; their images are first written to a file in ``scratch``, which is found again later.

    ``source`` is a file or a folder, on this machine or behind a URL (``hf://datasets/...``, ``s3://...``) whose driver is
    installed.  The splits are those that the files' names, or their folders', have a word for; without any all is train.

    Raises:
        DataError: pyarrow or a driver is missing, no such file, a damaged one, or columns that are not clear.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DataError(
            "Parquet files are read with pyarrow, which is not installed; run: pip install 'dist-train[parquet]'"
        ) from None
    system, files = _find(source)
    columns = _columns(source, _open(system, files[0]).schema_arrow, image_column, label_column)
    # By size and time: to hash the contents would be to read them all once more.
    text = json.dumps([source, [(info.path, info.size, info.mtime_ns) for info in files], image_column, label_column])
    version = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    spill = scratch / f"parquet-{version[:16]}.bin"
    # It is written last, so where it is, all images are in the file beside it.
    if not spill.with_suffix(".json").exists():
        scratch.mkdir(parents=True, exist_ok=True)
        with draft_of(spill) as draft, open(draft, "wb") as file:
            rows = _spill(system, files, columns, file, report)
            _refuse_ids(source, rows, columns)
        write_whole(spill.with_suffix(".json"), json.dumps(rows))
    rows = json.loads(spill.with_suffix(".json").read_bytes())
    return _source(source, rows, columns, spill, version)


def _refuse_ids(source: str, rows: Sequence[Any], columns: Columns) -> None:
    """Refuse numbers of something else: the network would get an output for every number up to the largest."""
    numbers = {label for _, _, label, _ in rows if isinstance(label, int)}
    if columns.classes is None and numbers and max(numbers) >= max(1000, 100 * len(numbers)):
        raise DataError(
            f"{source}: its labels in '{columns.label}' are {len(numbers)} numbers up to {max(numbers)}, which are no classes from 0 on; "
            "give another --label-column"
        )


def _source(source: str, rows: Sequence[Any], columns: Columns, spill: Path, version: str) -> Source:
    labels = {label for _, _, label, _ in rows if label is not None}
    classes = columns.classes
    if classes is None:
        numbers = all(isinstance(label, int) for label in labels)
        if not numbers and any(isinstance(label, int) for label in labels):
            raise DataError(
                f"{source}: its files have numbers as well as texts in '{columns.label}'; give files of one data set"
            )
        classes = (
            tuple(str(number) for number in range(max(labels) + 1)) if numbers and labels else tuple(sorted(labels))
        )
    place = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    offset = 0
    for split, name, label, size in rows:
        number = UNLABELED if label is None else label if isinstance(label, int) else place[label]
        splits[split].append(Item(name, number, size, (str(spill), offset)))
        offset += size
    left = [split for split, items in splits.items() if items and all(item.label == UNLABELED for item in items)]
    if len(left) == sum(map(bool, splits.values())):
        left = []  # images without labels are what was asked for
    kept = {split: items for split, items in splits.items() if items and split not in left}
    about = ", ".join(f"{split} {len(items)} rows" for split, items in kept.items())
    layout = f"read as Parquet, images from '{columns.image}' and labels from '{columns.label}': {about}"
    if left:
        layout += f"; left out: {', '.join(left)} (no labels)"
    return Source(classes, kept, partial(read_file, spill.parent), version, layout)


def _find(source: str) -> tuple[Any, list[Any]]:
    """The file system and what it knows of the Parquet files."""
    from pyarrow import ArrowException, fs

    scheme, is_url, _ = source.partition("://")
    try:
        if is_url:
            # By this prefix pyarrow hands a URL that it has no file system for to fsspec's.
            uri = source if scheme.partition("+")[0] in (*_NATIVE, "fsspec") else f"fsspec+{source}"
            system, path = fs.FileSystem.from_uri(uri)
        else:
            system, path = fs.LocalFileSystem(), str(Path(source).absolute())
        info = system.get_file_info(path)
        if info.type == fs.FileType.Directory:
            found = system.get_file_info(fs.FileSelector(path, recursive=True))
            files = sorted((one for one in found if one.path.endswith(".parquet")), key=lambda one: str(one.path))
        else:
            files = [info] if info.type == fs.FileType.File else []
    except (OSError, ValueError, ImportError, ArrowException) as error:
        raise DataError(
            f"{source}: cannot be opened ({_line(error)}); check the path, and for a URL that its driver is installed"
        ) from None
    if not files:
        raise DataError(f"{source}: holds no Parquet file; give a .parquet file or a folder of them")
    return system, files


def _open(system: Any, info: Any) -> Any:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        # Without reading ahead a column of images is read page by page, whatever the size of a row group.
        return pyarrow.parquet.ParquetFile(info.path, filesystem=system, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, ValueError, ArrowException) as error:
        raise DataError(
            f"{info.path}: is not a Parquet file, or a damaged one ({_line(error)}); fetch it again"
        ) from None


def _columns(source: str, schema: pyarrow.Schema, image: str | None, label: str | None) -> Columns:
    from pyarrow import types

    def holds_images(field: Any) -> bool:
        kind = field.type
        # Hugging Face's images are structs of bytes and path.
        if types.is_struct(kind):
            return any(kind.field(n).name == "bytes" for n in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    fields = {field.name: field for field in schema}
    for option, name in (("--image-column", image), ("--label-column", label)):
        if name is not None and name not in fields:
            raise DataError(f"{option} {name}: there is no such column; {source} has {', '.join(fields)}")
    features = _features(schema)
    if image is None:
        likely = [name for name, field in fields.items() if holds_images(field)]
        image = likely[0] if len(likely) == 1 else next((name for name in IMAGE_COLUMNS if name in likely), None)
    if image is None or not holds_images(fields[image]):
        what = (
            f"its column '{image}' is {fields[image].type}" if image else "none of its columns is known to hold images"
        )
        raise DataError(f"{source}: {what}; give --image-column with bytes of encoded images, of {', '.join(fields)}")
    if label is None:
        likely = [name for name, feature in features.items() if feature] or [
            name for name in LABEL_COLUMNS if name in fields
        ]
        label = likely[0] if len(likely) == 1 else None
        if label is None:
            raise DataError(
                f"{source}: which of its columns ({', '.join(fields)}) has the class is not clear; give --label-column"
            )
    kind = fields[label].type
    # pandas writes categories as numbers into a dictionary of names.
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(f"{source}: its column '{label}' is {kind}; give --label-column with a number or a name")
    return Columns(image, label, features.get(label))


def _features(schema: pyarrow.Schema) -> dict[str, tuple[str, ...]]:
    """The names of the classes by column, as Hugging Face's ``datasets`` writes them down."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: tuple(feature["names"]) for name, feature in features.items() if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _spill(
    system: Any, files: Sequence[Any], columns: Columns, target: BinaryIO, report: ProgressCallback | None
) -> list[Any]:
    """Write all images one after the other; returns (split, name, label, bytes) of each, in that order."""
    rows = []
    paths = [Path(info.path) for info in files]
    named = [split_words(path.stem) or split_of(path.parent.name) for path in paths]
    if None in named and any(named):
        info = files[named.index(None)]
        raise DataError(
            f"{info.path}: its name says no split, those of others do; put every split into a folder ({', '.join(SPLITS)})"
        )
    prefixes = [path.stem for path in paths]
    if len(set(prefixes)) < len(prefixes):  # in folders of their own
        top = os.path.commonpath([path.parent for path in paths])
        prefixes = [path.relative_to(top).with_suffix("").as_posix() for path in paths]
    for number, (info, split, prefix) in enumerate(zip(files, named, prefixes)):
        for name, label, image in _rows(info, prefix, _open(system, info), columns):
            rows.append((split or "train", name, label, len(image)))
            target.write(image)
        if report:
            # By the files so far: the whole number is known only when all have been opened.
            report("reading Parquet", len(rows), round(len(rows) * len(files) / (number + 1)))
    if not rows:
        raise DataError(f"{files[0].path}: has no rows; give files that have some")
    return rows


def _rows(info: Any, prefix: str, file: Any, columns: Columns) -> Iterator[tuple[str, int | str | None, bytes]]:
    from pyarrow import ArrowException

    missing = [name for name in (columns.image, columns.label) if name not in file.schema_arrow.names]
    if missing:
        raise DataError(
            f"{info.path}: has no column '{missing[0]}', which other files have; give files of one data set"
        )
    own = _features(file.schema_arrow).get(columns.label)
    if own != columns.classes:
        has, others = ("no names" if names is None else f"{len(names)} names" for names in (own, columns.classes))
        raise DataError(
            f"{info.path}: has {has} of classes for '{columns.label}', the files before it {others}, or others; give files of one data set"
        )
    row = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[columns.image, columns.label]):
            images, labels = batch.column(columns.image).to_pylist(), batch.column(columns.label).to_pylist()
            for image, label in zip(images, labels):
                path, data = "", image
                if isinstance(image, dict):
                    path, data = str(image.get("path") or ""), image.get("bytes")
                    if data is None and path:
                        raise DataError(
                            f"{info.path}: its images are not in it, only their paths ({shown(path)}); use `python -m shards make folder` on these"
                        )
                name = f"{prefix}/{row:08d}" + (f"-{path.rpartition('/')[2]}" if path else ".image")
                # A row without an image becomes an empty file, which packing skips and lists.
                yield name, _label(info, row, label, columns), data or b""
                row += 1
    except (OSError, ValueError, ArrowException) as error:
        # Which is a ValueError, too.
        if isinstance(error, DataError):
            raise
        raise DataError(f"{info.path}: is damaged behind row {row} ({_line(error)}); fetch it again") from None


def _label(info: Any, row: int, label: Any, columns: Columns) -> int | str | None:
    """A row's class, None without one."""
    # -1 is how data sets of the Hugging Face Hub write the labels that they keep to themselves.
    if label is None or label == -1:
        return None
    if isinstance(label, int):
        if label < 0 or (columns.classes is not None and label >= len(columns.classes)):
            allowed = f"0 to {len(columns.classes) - 1}" if columns.classes else "numbers from 0 on"
            raise DataError(f"{info.path}: row {row} has the label {label}, allowed are {allowed}, or -1 without one")
        if columns.classes is None and label > 1_000_000:
            raise DataError(
                f"{info.path}: row {row} has the label {label}, which is no class; give another --label-column"
            )
    elif columns.classes is not None and label not in columns.classes:
        raise DataError(
            f"{info.path}: row {row} has the label '{shown(label)}', which is none of its {len(columns.classes)} classes"
        )
    return label  # type: ignore[no-any-return]


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
