"""Which tars of a WebDataset that was made elsewhere belong to which split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dist_train.errors import DataError
from shards.source import SPLITS
from shards.split_names import split_of, split_words


def find_tars(folder: Path) -> dict[str, list[Path]]:
    """The tars of every split: in folders that are called like splits, else by their own names, else all are train.

    Raises:
        DataError: there are none, compressed ones, or some whose split does not show.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of a WebDataset's tars")
    for path in sorted(folder.rglob("*")):
        if re.search(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|Z)|tgz|tbz2?|txz|tzst)$", path.name):
            raise DataError(
                f"{path}: is compressed; samples are read at their places in the tar, which a compressed one has not: "
                "uncompress it"
            )
    inside, direct = _in_folders(folder), sorted(folder.glob("*.tar"))
    if inside and direct:
        raise DataError(
            f"{folder}: holds {direct[0].name} beside {next(iter(inside))}/; put it into the folder of its split"
        )
    _refuse_left_out(folder, [*direct, *(path for tars in inside.values() for path in tars)])
    if not inside and not direct:
        raise DataError(
            f"{folder}: holds no tars, nor do train/, val/ and test/ in it; give the folder of a WebDataset's tars"
        )
    return inside or _by_name(folder, direct)


def _in_folders(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for holder in sorted(path for path in folder.iterdir() if path.is_dir()):
        split, tars = split_of(holder.name), sorted(holder.glob("*.tar"))
        if not split or not tars:
            continue
        if split in found:
            raise DataError(
                f"{folder}: {found[split][0].parent.name}/ and {holder.name}/ are both called like {split}; put their tars into one"
            )
        found[split] = tars
    return {split: found[split] for split in SPLITS if split in found}


def _by_name(folder: Path, tars: Sequence[Path]) -> dict[str, list[Path]]:
    named: dict[str | None, list[Path]] = {}
    for path in tars:
        named.setdefault(split_words(path.stem), []).append(path)
    if None not in named:
        return {split: named[split] for split in SPLITS if split in named}
    if len(named) > 1:
        raise DataError(
            f"{folder}: the name of {named[None][0].name} says no split, those of others do; put every split into a folder "
            f"({', '.join(SPLITS)})"
        )
    # It may be the folder of one split that was given.
    return {folder.name if folder.name in SPLITS else "train": list(tars)}


def _refuse_left_out(folder: Path, taken: Sequence[Path]) -> None:
    """Refuse tars that lie deeper, or in a folder that is called like no split."""
    left = next(iter(sorted(set(folder.rglob("*.tar")).difference(taken))), None)
    if left:
        raise DataError(
            f"{folder}: holds {left.relative_to(folder)}, which would be left out; tars lie in the folder itself, or in folders "
            f"of it that are called like splits ({', '.join(SPLITS)})"
        )
