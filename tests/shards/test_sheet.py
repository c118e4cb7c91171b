"""The contact sheet: every class in its row, and an image with a wrong label among the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import sheet
from shards.__main__ import main
from shards.index import Index
from shards.make import Sample, ShardSize, make_samples

COLOURS = {"ape": (200, 30, 30), "bée": (30, 200, 30), "cat": (30, 30, 200), None: (90, 90, 90)}


def tiles(path: Path) -> list[list[tuple[int, ...]]]:
    """The colour in the middle of every tile, row by row."""
    image = Image.open(path).convert("RGB")
    rows = range(sheet.TILE // 2, image.height, sheet.TILE)
    columns = range(sheet.NAME + sheet.TILE // 2, image.width, sheet.TILE)
    return [[image.getpixel((x, y)) for x in columns] for y in rows]  # type: ignore[misc]


def test_a_wrong_label_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        Sample(f"{name}{n}", name, np.full((20 + n, 30, 3), colour, np.uint8))
        for name, colour in COLOURS.items()
        for n in range(6)
    ]
    samples[3] = samples[3]._replace(image=np.full((20, 20, 3), COLOURS["cat"], np.uint8))
    make_samples(samples, tmp_path / "out", ShardSize(samples=7))
    assert main(["info", str(tmp_path / "out")]) == 0
    path = tmp_path / "out/train/sheet.png"
    assert f"some images of every class: {path}" in capsys.readouterr().out
    found = tiles(path)
    white = (255, 255, 255)
    assert found[0] == [COLOURS[None]] * 6 + [white] * 2
    assert sorted(found[1]) == sorted([COLOURS["ape"]] * 5 + [COLOURS["cat"]] + [white] * 2)
    assert found[2:] == [[COLOURS[name]] * 6 + [white] * 2 for name in ("bée", "cat")]


def test_many_classes_and_damaged_images_fit(tmp_path: Path) -> None:
    samples = [Sample(f"{n}", f"class {n % 60:02d}", np.full((9, 9, 3), n % 250, np.uint8)) for n in range(120)]
    (made,) = make_samples(samples, tmp_path / "out")
    index = Index.load(made.folder)
    first = int(np.flatnonzero(index.label == 0)[0])
    with open(made.folder / index.shards[0].name, "r+b") as file:
        file.seek(int(index.offset[first]))
        file.write(b"broken")
    found = tiles(sheet.write(made.folder))
    assert len(found) == sheet.ROWS
    assert found[0][0] == (255, 0, 0)
    assert [row[1][0] for row in found[1:]] != [255] * (sheet.ROWS - 1)


def test_make_writes_it_and_a_folder_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("a", "b"):
        assert main(["make", "digits", str(tmp_path / out)]) == 0
    for split in ("train", "val"):
        pictures = [(tmp_path / out / split / "sheet.png").read_bytes() for out in ("a", "b")]
        assert pictures[0] == pictures[1]

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(sheet, "write_whole", refuse)
    (tmp_path / "a/val/sheet.png").unlink()
    assert main(["info", str(tmp_path / "a/val")]) == 0
    assert "no picture of its classes: sheet.png cannot be written (Read-only file system)" in capsys.readouterr().out
