"""A picture with some images of every class, in which a wrong label is seen at a glance."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dist_train.files import write_whole
from shards.index import UNLABELED, Index

FILE = "sheet.png"
ROWS, COLUMNS = 24, 8
"""Classes, and images of each, that are shown at most."""
TILE, NAME = 72, 200
"""Pixels of an image's side, and of a class's name."""


def write(folder: Path) -> Path:
    """Write the sheet of a split into its folder, and return its path.

    The classes and images are evenly spread over all: the same split gives the same sheet.

    Raises:
        DataError: there is no split, or a faulty one.
        OSError: it cannot be written.
    """
    index = Index.load(folder)
    present = np.unique(index.label)
    labels = present[_spread(len(present), ROWS)].tolist()
    sheet = Image.new("RGB", (NAME + COLUMNS * TILE, max(1, len(labels)) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        ids = np.flatnonzero(index.label == label)
        name = "no label" if label == UNLABELED else index.classes[label]
        _write_name(draw, (6, row * TILE + TILE // 2 - 12), f"{name[:26]}\n{len(ids)} images")
        for column, sample in enumerate(ids[_spread(len(ids), COLUMNS)].tolist()):
            sheet.paste(_tile(index, folder, sample), (NAME + column * TILE, row * TILE))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_whole(folder / FILE, file.getvalue())
    return folder / FILE


def _spread(count: int, wanted: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """At most so many numbers below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def _tile(index: Index, folder: Path, sample: int) -> Image.Image:
    shard, offset, size = index.shards[index.shard[sample]], int(index.offset[sample]), int(index.size[sample])
    try:
        with open(folder / shard.name, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (2 * TILE, 2 * TILE))  # of a JPEG only so much is decoded
                return ImageOps.fit(image.convert("RGB"), (TILE - 2, TILE - 2))
    except Exception:  # a damaged image raises anything; `shards check` says what is wrong with it
        return Image.new("RGB", (TILE - 2, TILE - 2), "red")


def _write_name(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    font = ImageFont.load_default()
    try:
        draw.multiline_text(place, text, "black", font)
    except UnicodeError:  # a font without these letters
        draw.multiline_text(place, text.encode("ascii", "backslashreplace").decode(), "black", font)
