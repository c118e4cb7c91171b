"""Files that say the classes of images: CSV, text, and JSON in COCO's form, as Kaggle, Places365 and iNaturalist have them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dist_train.errors import DataError
from shards.source import Item, shown
from shards.tree import is_image

_IMAGE_COLUMNS = (
    "image",
    "filename",
    "file_name",
    "file",
    "path",
    "filepath",
    "image_path",
    "image_name",
    "image_id",
    "imageid",
    "id",
    "name",
)
_CLASS_COLUMNS = (
    "label",
    "class",
    "classname",
    "class_name",
    "category",
    "category_name",
    "species",
    "breed",
    "synset",
    "target",
)


SEVERAL = "//"
"""In place of an item's name, which is none that a file can have."""


class Entry(NamedTuple):
    """A line of such a file: an image, by its path, its name or its name without ending, and its class."""

    image: str
    label: str


def parse(name: str, data: bytes) -> list[Entry]:
    """The entries of a file that is called ``name`` in messages.

    A first line counts as the columns' names where one of them is a usual one.

    Raises:
        DataError: it is neither CSV nor text nor JSON of a form that can be understood.
    """
    try:
        # Spreadsheets put a byte order mark in front, which would be a part of the first column's name.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            f"{name}: is no text; give lines of an image and its class, as CSV or divided by spaces"
        ) from None
    if text.lstrip().startswith("{"):
        return _coco(name, text)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{name}: is empty; give lines of an image and its class")
    delimiter = next((mark for mark in (",", "\t", ";") if mark in lines[0]), None)
    if delimiter:
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
        except csv.Error as error:
            raise DataError(f"{name}: is not CSV ({error}); look for a quotation mark that is not closed") from None
    else:
        # At the last space, since names of files have spaces more often than classes do.
        rows = [line.rsplit(None, 1) for line in lines]
    image, label, header = _columns(name, rows[0])
    entries = []
    for number, row in enumerate(rows[header:], start=1):
        if len(row) <= max(image, label) or not row[image] or not row[label]:
            raise DataError(f"{name}: entry {number} ({shown(' '.join(row))[:60]}) has no image or no class")
        entries.append(Entry(row[image], row[label]))
    if not entries:
        raise DataError(f"{name}: has no entries; give lines of an image and its class")
    return entries


def assign(name: str, entries: Sequence[Entry], items: Iterable[Item]) -> dict[str, str]:
    """The class of every item that has an entry, by the item's name.

    An entry names an item by its path, by the end of its path, or by that without its ending, if only one item has it.
    Folders that all entries begin with may lie above those that are given.

    Raises:
        DataError: an entry without an image, with several, or two entries of different classes for one.
    """
    by_name = _Names(items, [image for image, _ in entries])
    classes: dict[str, str] = {}
    missing: list[str] = []
    for image, label in entries:
        item = by_name.find(image)
        if item == SEVERAL:
            raise DataError(f"{name}: names {shown(image)}, which several images are called; give their paths")
        if item is None:
            missing.append(image)
        elif classes.setdefault(item, label) != label:
            raise DataError(
                f"{name}: gives {shown(image)} the classes '{classes[item]}' and '{label}'; leave one of them out"
            )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{name}: names {shown(missing[0])}{more}, of which there is no image; remove the entries or fetch the images"
        )
    return classes


class _Names:
    """Items by their paths and by the ends of these, as long as the given texts are."""

    def __init__(self, items: Iterable[Item], texts: Sequence[str]) -> None:
        folders = [_clean(text).rpartition("/")[0] for text in texts]
        depths = {len(folder.split("/")) if folder else 0 for folder in folders}
        self._above = os.path.commonpath(folders) if folders else ""
        self._paths: set[str] = set()
        self._ends: dict[str, str] = {}
        for item in items:
            self._paths.add(item.name)
            if not is_image(item.name):
                continue
            parts = item.name.split("/")
            for depth in depths:
                if depth < len(parts):
                    end = "/".join(parts[-1 - depth :])
                    for short in (end, end.rpartition(".")[0]):
                        self._ends[short] = SEVERAL if short in self._ends else item.name

    def find(self, text: str) -> str | None:
        """The name of the item that is meant, if there is one; SEVERAL where it cannot be told which."""
        path = _clean(text)
        if path in self._paths:
            return path
        if path in self._ends:
            return self._ends[path]
        # As a path from further up, such as train2017/Aves/1.jpg where train2017 is what was given.  Only a whole path
        # counts then: a/1.jpg must not be any 1.jpg.
        parts = path.split("/")
        inner = ("/".join(parts[number + 1 :]) for number, _ in enumerate(filter(None, self._above.split("/"))))
        return next((end for end in inner if end in self._paths), None)


def _clean(text: str) -> str:
    return text.strip().removeprefix("./").lstrip("/")


def _columns(name: str, first: Sequence[str]) -> tuple[int, int, int]:
    """Which column has the image, which the class, and how many lines name them (0 or 1)."""
    if len(first) < 2:
        raise DataError(
            f"{name}: its first line ({shown(' '.join(first))[:60]}) has one column; give an image and its class on every line"
        )
    names = [cell.lower().replace(" ", "_") for cell in first]
    found = [
        next((names.index(word) for word in words if word in names), -1) for words in (_IMAGE_COLUMNS, _CLASS_COLUMNS)
    ]
    if any(map(is_image, first)):
        found = [-1, -1]  # a line of data, whose class is called like a column
    if len(first) == 2:
        # The image comes first, unless a header says that it is the other way round.
        return (1, 0, 1) if found in ([1, -1], [-1, 0], [1, 0]) else (0, 1, int(found != [-1, -1]))
    if -1 in found:
        what, words = ("image", _IMAGE_COLUMNS) if found[0] < 0 else ("class", _CLASS_COLUMNS)
        raise DataError(
            f"{name}: which of its columns ({', '.join(first)[:80]}) has the {what} is not clear; call it '{words[0]}'"
        )
    return found[0], found[1], 1


def _coco(name: str, text: str) -> list[Entry]:
    try:
        tree: Any = json.loads(text)
        if not {"images", "annotations"} <= tree.keys():
            entries = [Entry(str(image), str(label)) for image, label in tree.items() if isinstance(label, str | int)]
            if len(entries) < len(tree) or not entries:
                raise DataError(
                    f"{name}: is JSON of another form; give {{image: class}}, or images, annotations and categories as COCO has them"
                )
            return entries
        files: Mapping[Any, str] = {image["id"]: str(image["file_name"]) for image in tree["images"]}
        names = {row["id"]: str(row["name"]) for row in tree.get("categories", [])}
        return [
            Entry(files[row["image_id"]], names.get(row["category_id"], str(row["category_id"])))
            for row in tree["annotations"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{name}: is not JSON in COCO's form ({type(error).__name__}: {error})") from None
