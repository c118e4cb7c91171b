"""Checking finished shards against their index: sizes, hashes, the tars' own headers, labels and the images' headers."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from dist_train.errors import DataError
from shards.images import Unreadable, inspect
from shards.index import FILE, UNLABELED, Index


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


def check(folder: Path) -> Iterator[str]:
    """Yield one line for every fault of a split.

    Raises:
        DataError: the index itself is missing or damaged.
    """
    index = Index.load(folder)
    for number, shard in enumerate(index.shards):
        path = folder / shard.name
        try:
            index.verify_shard(number, "hash")
            members = _members(path)
        except (DataError, OSError, tarfile.TarError) as error:
            yield str(error)
            continue
        yield from _check_shard(index, number, path, members)


def _members(path: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(path, "r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def _check_shard(index: Index, number: int, path: Path, members: dict[str, tuple[int, int]]) -> Iterator[str]:
    first, last = index.shard.searchsorted([number, number + 1]).tolist()
    with open(path, "rb") as file:

        def content(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        for sample in range(first, last):
            key = index.key[sample].decode()
            name = f"{key}.{index.ext[sample].decode()}"
            where = (int(index.offset[sample]), int(index.size[sample]))
            if members.get(name) != where:
                yield f"{path}: {name}: the tar has it at {members.get(name)}, the index at {where} (offset, size)"
                continue
            if index.label[sample] != UNLABELED:
                label = content(*members.get(f"{key}.cls", (0, 0)))
                if label != str(index.label[sample]).encode():
                    yield f"{path}: {key}.cls: the tar has {label.decode(errors='replace')!r}, the index {index.label[sample]}"
            try:
                image = inspect(content(*where))
            except Unreadable as error:
                yield f"{path}: {name}: {error}"
                continue
            found, expected = (image.width, image.height), (int(index.width[sample]), int(index.height[sample]))
            if found != expected:
                yield f"{path}: {name}: is {found[0]} x {found[1]}, the index says {expected[0]} x {expected[1]}"
