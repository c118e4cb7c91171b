"""The index of a split, on this machine or behind a URL, compared with its shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_train.config import DataConfig
from dist_train.data.remote import BESIDE, fetch, file_system, local_folder, named_as_cached
from dist_train.errors import ConfigError, DataError, StorageError
from dist_train.files import draft_of, write_whole
from shards.index import Index
from shards.index_file import FILE
from shards.mixture import Part, mix
from shards.quarantine import QUARANTINE_FILE

HASHED_BYTES = 1_000_000_000
"""Up to so many, all shards are hashed at every start where ``data.verify`` is auto: some seconds."""


def open_split(data: DataConfig, split: str, kept: Mapping[str, Sequence[int]] | None = None) -> Index:
    """The index of a split, compared with its shards.

    Args:
        data: where the shards are, and how they are compared.
        split: its name.
        kept: by the fingerprint of a whole split, the samples of it that are kept out, whatever its quarantine list says by
            now (see :class:`KeptQuarantine`).

    Raises:
        DataError: folder or index missing, or a shard that does not match.
    """
    index = open_index(data, split, kept)
    if not isinstance(data.shards, Path):
        return index  # its shards are compared by their hashes as they come
    total = sum(shard.bytes for shard in index.shards)
    index.verify("hash" if data.verify == "hash" or (data.verify == "auto" and total <= HASHED_BYTES) else "size")
    return index


def open_training(data: DataConfig, classes: Sequence[str], kept: Mapping[str, Sequence[int]] | None = None) -> Index:
    """The index of what ``data.train`` says: a split, or a mixture of several with these classes.

    Raises:
        ConfigError, DataError: as :func:`open_split` and :func:`shards.mixture.mix`.
    """
    indices = [open_split(part, split, kept) for part, split in data.training_splits]
    if isinstance(data.train, str):
        return indices[0]
    return mix([Part(index, part.weight, part.where) for index, part in zip(indices, data.train)], classes)


class KeptQuarantine:
    """``quarantine.json`` in a run folder: which samples the run began without.

    The order of samples depends on how many there are, so a list that grows while a run trains must not reach the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "quarantine.json"

    def read(self) -> dict[str, list[int]]:
        """By the fingerprint of a whole split, the ids that are left out; empty for a new run, or where it is damaged."""
        try:
            tree = json.loads(self.path.read_bytes())
            return {str(fingerprint): [int(one) for one in ids] for fingerprint, ids in tree.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def keep(self, *indices: Index) -> None:
        """Write down what these splits are used without, unless that was done before; raises OSError."""
        kept = self.read()
        found = {split.whole_fingerprint: list(split.quarantine) for index in indices for split in index.splits}
        if not kept.keys() >= found.keys():
            # What was kept first stands: the order of the run's samples follows from it.
            write_whole(self.path, json.dumps(found | kept))

    @staticmethod
    def changes(*indices: Index) -> list[str]:
        """A line per split whose own list differs by now from what the run began with."""
        notes = []
        for split in (split for index in indices for split in index.splits):
            assert split.folder is not None
            current = Index.load(split.folder).quarantine
            if current != split.quarantine:
                notes.append(
                    f"{split.folder}: {len(current)} images are in its quarantine list by now; this run leaves out the "
                    f"{split.left_out} that it began without. Start another run (--name) to use the new list"
                )
        return notes


def open_index(data: DataConfig, split: str, kept: Mapping[str, Sequence[int]] | None = None) -> Index:
    """The index of a split, fetched first where ``data.shards`` is a URL; ``kept`` as for :func:`open_split`.

    Raises:
        DataError: no index there, or one that cannot be read.
        ConfigError: a URL of an unknown kind, or one whose driver is not installed.
        StorageError: the URL cannot be reached.
    """
    place = data.location(split)
    if isinstance(place, Path):
        return _load(place, kept)
    folder = local_folder(data, place)
    files = file_system(place)
    _fetch_index(files, place, folder)
    try:
        index = _load(folder, kept)
    except DataError:
        # Its files come one by one: where they were replaced in between, they do not belong together, but those of now do.
        _fetch_index(files, place, folder)
        try:
            index = _load(folder, kept)
        except DataError as error:
            raise DataError(
                f"{error} (as it comes from {place}; look whether its files are whole there, and whether the server gives them unchanged)"
            ) from None
    # One without the images of its quarantine list has whole names.
    root = folder.resolve()
    names = [Path(shard.name).name if Path(shard.name).parent == root else shard.name for shard in index.shards]
    index = replace(index, shards=tuple(replace(one, name=name) for one, name in zip(index.shards, names)))
    # The cache makes files of these names, and an index from elsewhere must not choose where.
    if outside := [shard.name for shard in index.shards if Path(shard.name).name != shard.name]:
        raise DataError(
            f"{place}/{FILE}: names the shard {outside[0]!r}, which is not beside it; give the URL of the shards' folder"
        )
    return named_as_cached(index)


def _load(folder: Path, kept: Mapping[str, Sequence[int]] | None) -> Index:
    index = Index.load(folder)
    if kept and index.whole_fingerprint in kept:
        return Index.load(folder, quarantine=kept[index.whole_fingerprint])
    return index


def _fetch_index(files: Any, place: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}); set data.cache to a folder of yours") from None
    for name in (FILE, *BESIDE):
        try:
            with draft_of(folder / name) as draft:
                fetch(files, f"{place}/{name}", draft)
                # Some servers answer with a page, and not with 404, for what is not there.  No JSON begins like that.
                if name == QUARANTINE_FILE and draft.read_bytes().lstrip()[:1] == b"<":
                    raise FileNotFoundError
        except FileNotFoundError:
            if name == FILE:
                raise DataError(f"{place}: has no {FILE}; give the URL of a folder that `shards make` wrote") from None
            (folder / name).unlink(missing_ok=True)
        except PermissionError as error:
            if name == FILE:
                raise DataError(f"{error}; check the URL and the credentials") from None
            # Without the right to list a bucket, this is S3's and GCS's answer for what is not there.
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{folder / name}: cannot be written ({error.strerror}); free space there") from None
