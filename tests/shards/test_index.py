from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.errors import DataError
from shards import sources
from shards.index import Index
from shards.make import ShardSize, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make(sources.digits(), folder, ShardSize(samples=100))
    return folder / "val"


@pytest.fixture
def split(made: Path, tmp_path: Path) -> Path:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_what_is_saved_is_loaded(split: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    index = Index.load(split)
    assert len(index) == 360
    assert index.classes == tuple("0123456789")
    assert [shard.samples for shard in index.shards] == index.shard_sizes.tolist() == [100, 100, 100, 60]
    other = tmp_path_factory.mktemp("copy")
    index.save(other)
    assert sorted(os.listdir(other)) == ["index.bin", "index.json"]
    for name in os.listdir(other):
        assert (other / name).read_bytes() == (split / name).read_bytes()
    assert Index.load(other).fingerprint == index.fingerprint


def test_the_index_says_where_the_bytes_are(split: Path) -> None:
    index = Index.load(split)
    for sample in (0, 99, 100, 359):
        content = (split / index.shards[index.shard[sample]].name).read_bytes()
        image = content[index.offset[sample] : index.offset[sample] + index.size[sample]]
        assert image.startswith(b"\x89PNG")
        assert image.endswith(b"IEND\xaeB`\x82")
        name = content[index.offset[sample] - 512 :][:100].rstrip(b"\0").decode()
        assert name == f"{index.key[sample].decode()}.{index.ext[sample].decode()}"
    assert set(index.width.tolist()) == set(index.height.tolist()) == {32}


def test_every_part_is_in_the_fingerprint(split: Path) -> None:
    index = Index.load(split)
    columns = ("shard", "offset", "size", "label", "width", "height", "key", "ext")
    parts: dict[str, Any] = {name: getattr(index, name) for name in ("classes", "shards", *columns)}
    moved = index.shard.copy()
    moved[100] = 0
    first, second, *others = index.shards
    changes: list[dict[str, Any]] = [
        {"classes": tuple("abcdefghij")},
        {"shards": (replace(first, sha256="0" * 64), second, *others)},
        {"shard": moved, "shards": (replace(first, samples=101), replace(second, samples=99), *others)},
        {"label": (index.label + 1) % 10},
        {"key": np.char.replace(index.key, b"00000007", b"00000008")},
        {"ext": np.char.replace(index.ext, b"png", b"jpg")},
    ]
    for name in ("offset", "size", "width", "height"):
        changes.append({name: getattr(index, name) - (np.arange(360) == 100)})
    prints = {index.fingerprint}
    for change in changes:
        changed = {**parts, **change}
        prints.add(Index.from_columns(changed.pop("classes"), changed.pop("shards"), changed).fingerprint)
    assert len(prints) == len(changes) + 1


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / "index.json").read_text())
        change(tree)
        (folder / "index.json").write_text(json.dumps(tree))

    return apply


def set_in(name: str, row: int, value: int) -> Callable[[Path], None]:
    """Overwrite one number in the binary columns."""

    def apply(folder: Path) -> None:
        tree = json.loads((folder / "index.json").read_text())
        at = 0
        for column, kind in tree["columns"].items():
            if column == name:
                break
            at += np.dtype(kind).itemsize * tree["rows"]
        content = bytearray((folder / "index.bin").read_bytes())
        number = np.array(value, kind).tobytes()
        content[at + row * len(number) : at + (row + 1) * len(number)] = number
        (folder / "index.bin").write_bytes(content)

    return apply


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "has no index.json"),
    "not JSON": (lambda folder: (folder / "index.json").write_text('{"format": 1'), "not valid JSON"),
    "other JSON": (lambda folder: (folder / "index.json").write_text("[1]"), "not an index"),
    "newer": (edit(lambda tree: tree.update(format=3)), "has format 3, this version reads format 2; update"),
    "older": (edit(lambda tree: tree.update(format=1)), "has format 1, this version reads format 2; make the shards"),
    "no columns": (edit(lambda tree: tree.pop("columns")), "malformed.*columns"),
    "shard without a name": (edit(lambda tree: tree["shards"][0].pop("name")), "malformed.*name"),
    "no binary": (lambda folder: (folder / "index.bin").unlink(), "index.bin: cannot be read .*copy both"),
    "cut binary": (lambda folder: os.truncate(folder / "index.bin", 5000), "has 5000 bytes, 360 rows have"),
    "no column": (edit(lambda tree: tree["columns"].pop("size")), "360 rows have"),
    "column of another name": (
        edit(lambda tree: tree.update(columns={n.replace("size", "s"): k for n, k in tree["columns"].items()})),
        "faulty column.*size",
    ),
    "column of objects": (edit(lambda tree: tree["columns"].update(size="O")), "cannot have the dtype 'O'"),
    "column of fractions": (edit(lambda tree: tree["columns"].update(size="<f8")), "cannot have the dtype '<f8'"),
    "label too large": (set_in("label", 3, 10), "has label 10, allowed are 0 to 9"),
    "label below 0": (set_in("label", 3, -1), "has label -1, allowed are 0 to 9"),
    "outside of the shard": (set_in("offset", 3, 10**9), "lies outside of shard-000000.tar"),
    "before the shard": (set_in("offset", 3, -5), "lies outside of shard-000000.tar"),
    "unknown shard": (set_in("shard", 359, 4), "column shard"),
    "other counts": (set_in("shard", 99, 1), "samples per shard"),
    "no width": (set_in("width", 3, 0), "width or height 0"),
    "changed": (set_in("height", 3, 31), "fingerprint"),
    "other fingerprint": (edit(lambda tree: tree.update(fingerprint="0")), "fingerprint is 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_indices_are_refused_in_one_line(fault: str, split: Path) -> None:
    break_it, message = FAULTS[fault]
    Index.load(split)
    break_it(split)
    with pytest.raises(DataError, match=message) as caught:
        Index.load(split)
    assert str(split) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of shards; make it with"):
        Index.load(tmp_path / "none")


def test_verify_finds_what_differs(split: Path) -> None:
    index = Index.load(split)
    index.verify("hash")
    path = split / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    index.verify("size")
    with pytest.raises(DataError, match=r"shard-000002.tar: has SHA-256 \w{12}, the index says \w{12}"):
        index.verify("hash")
    os.truncate(path, 5000)
    with pytest.raises(DataError, match=rf"shard-000002.tar: has 5000 bytes, the index says {len(content)}"):
        index.verify("size")
    path.unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar: cannot be read \(No such file"):
        index.verify("size")
