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
    indices = {path.name: Index.load(path, quarantine=False) for path in splits}
    classes = {index.classes for index in indices.values()}
    if len(classes) > 1:
        raise DataError(f"{folder}: its splits {', '.join(indices)} have different classes; make them together")
    items = {split: _items(split, index) for split, index in indices.items()}
    stamp = " ".join(index.fingerprint for index in indices.values())
    return Source(classes.pop(), items, partial(read_file, folder), stamp)


def choose(
    source: Source, per_class: int | None, val_per_class: int | None, labels_per_class: int | None, seed: int = 0
) -> Source:
    """A source with what the options leave of it, in this order: images, held-out images, labels.

    Raises:
        DataError: a class is too small, or there is a val split already.
    """
    if per_class:
        source = source.few(per_class, seed)
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
        f"{path.name}/{key.decode()}": (path.name, sample)
        for path in split_folders(folder)
        for sample, key in enumerate(Index.load(path, quarantine=False).key.tolist())
    }
    refuse_existing(out, source.splits)
    draft: Path | None = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".subset-", dir=out))
        for split, items in source.splits.items():
            chosen = sorted((*ids[item.name], item.label) for item in items)
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
    except OSError as error:
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
    bad = {entry.id for entry in index.quarantined()}
    rows = zip(
        index.key.tolist(), index.label.tolist(), index.size.tolist(), index.shard.tolist(), index.offset.tolist()
    )
    return [
        Item(f"{split}/{key.decode()}", label, size, (paths[shard], offset))
        for sample, (key, label, size, shard, offset) in enumerate(rows)
        if sample not in bad
    ]
