"""Parts of finished shards: fewer images, a validation split, fewer labels; as lists over them or as new shards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from dist_train.errors import DataError
from shards.check import split_folders
from shards.index import Index
from shards.make import refuse_existing
from shards.source import Item, Source, read_file


def open_shards(folder: Path) -> Source:
    """The splits in ``folder`` as a source, without the samples in quarantine; an item is named ``split/key``.

    Raises:
        DataError: there are no shards, or their splits have different classes.
    """
    splits = split_folders(folder)
    if splits == [folder]:
        raise DataError(f"{folder}: is one split; give the folder that holds its splits, {folder.parent}")
    # Whole: the ids of a list are places in the split with its bad samples, which _items leaves out.
    indices = {path.name: Index.load(path, quarantine=False) for path in splits}
    classes = {index.classes for index in indices.values()}
    if len(classes) > 1:
        raise DataError(f"{folder}: its splits {', '.join(indices)} have different classes; make them together")
    items = {split: _items(split, index) for split, index in indices.items()}
    version = " ".join(index.fingerprint for index in indices.values())
    return Source(classes.pop(), items, partial(read_file, folder), version)


def choose(
    source: Source, per_class: int | None, val_per_class: int | None, labels_per_class: int | None, seed: int = 0
) -> Source:
    """A source with what the options leave of it, in this order: images, held-out images, labels.

    Raises:
        DataError: a class is too small, or there is a val split already.
    """
    if per_class:
        source = source.subsample(per_class, seed)
    if val_per_class:
        source = source.hold_out(val_per_class, seed)
    if labels_per_class:
        source = source.labeled(labels_per_class, seed)
    return source


def save_lists(source: Source, folder: Path, out: Path, rule: Mapping[str, int]) -> list[Path]:
    """Write the splits of ``source``, chosen from the shards in ``folder``, to ``out`` as lists over them, and return the folders; all or none.

    Raises:
        DataError: there are shards already, or ``out`` cannot be written.
    """
    ids = {
        name: (path.name, sample)
        for path in split_folders(folder)
        for sample, name in enumerate(_names(path.name, Index.load(path, quarantine=False)))
    }
    refuse_existing(out, source.splits)
    draft: Path | None = None
    renamed: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".subset-", dir=out))
        for split, items in source.splits.items():
            # Rising ids, as a list over a split has to have them.
            chosen = sorted((*ids[item.name], item.label) for item in items)
            if not chosen:
                raise DataError(f"{folder / split}: all of its samples are in quarantine; make the shards again")
            # All of a split come from one: val is held out of train only where there is no val yet.
            origin = Index.load(folder / chosen[0][0], quarantine=False)
            (draft / split).mkdir()
            # Two folders down from `out` while it is written, one afterwards: the path to the shards is the final one's.
            origin.save_list(
                draft / split,
                np.array([sample for _, sample, _ in chosen], np.int64),
                np.array([label for _, _, label in chosen], np.int64),
                rule,
                place=out / split,
            )
        for split in source.splits:
            os.rename(draft / split, out / split)
            renamed.append(out / split)
    except OSError as error:
        for path in renamed:
            shutil.rmtree(path, ignore_errors=True)
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from None
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)
    return [out / split for split in source.splits]


def _items(split: str, index: Index) -> list[Item]:
    assert index.folder is not None
    paths = [str(index.folder / shard.name) for shard in index.shards]
    bad = set(index.bad())
    rows = zip(
        _names(split, index), index.label.tolist(), index.size.tolist(), index.shard.tolist(), index.offset.tolist()
    )
    return [
        Item(name, label, size, (paths[shard], offset))
        for sample, (name, label, size, shard, offset) in enumerate(rows)
        if sample not in bad
    ]


def _names(split: str, index: Index) -> list[str]:
    """The items' names; with the shard's number where, in shards made elsewhere, each shard has the same keys."""
    keys = [key.decode() for key in index.key.tolist()]
    if len(set(keys)) == len(keys):
        return [f"{split}/{key}" for key in keys]
    return [f"{split}/{shard}/{key}" for shard, key in zip(index.shard.tolist(), keys)]
