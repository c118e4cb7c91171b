"""The checks before a run: everything that can be wrong is found here, before any process group is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dist_train.checkpoint import check_continues
from dist_train.config import Config, DataConfig, accumulation
from dist_train.data.order import Order
from dist_train.data.remote import open_index
from dist_train.dist import Ranks
from dist_train.engine import check_device
from dist_train.errors import ConfigError, DataError
from shards.index import Index

HASHED_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Preflight:
    """A run that can be started: its data, its network (not yet trained), its arithmetic."""

    train: Index
    val: Index
    model: nn.Module
    passes: int
    """Forward passes accumulated per update on every rank."""
    steps_per_epoch: int
    resume: Path | None
    """Checkpoint that the run goes on from, if there is one."""
    changes: list[str]
    """Fields that differ from that checkpoint's."""


def preflight(config: Config, ranks: Ranks) -> Preflight:
    """Check a configuration against the device, the shards and the run folder, and build the network.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    from dist_train.models import build_model, load_pretrained

    check_device(config, ranks.device)
    passes = accumulation(config.train, ranks.world_size)
    train, val = open_split(config.data, config.data.train), open_split(config.data, config.data.val)
    if train.classes != val.classes:
        raise DataError(
            f"{config.data.shards}: {config.data.train} and {config.data.val} have different classes; make them together"
        )
    order = Order(train.shard_sizes, train.label, config.data, config.seed, config.train.global_batch)
    steps = order.steps_per_epoch
    if steps == 0:
        raise ConfigError(
            f"train.global_batch is {config.train.global_batch}, but {config.data.train} has only {order.pass_size} images; "
            "use a smaller one, or data.last_batch: wrap"
        )
    model = build_model(config.model, len(train.classes), config.data.image_size)
    _check_writable(config.folder)
    latest = config.folder / "checkpoints" / "latest"
    resume = latest if latest.exists() else None
    if not resume:
        load_pretrained(model, config.model)
    changes = check_continues(latest.resolve(), config, train.fingerprint, len(train.classes)) if resume else []
    return Preflight(train, val, model, passes, steps, resume, changes)


def open_split(data: DataConfig, split: str) -> Index:
    """The index of a split, compared with its shards.

    Raises:
        DataError: folder or index missing, or a shard that does not match.
    """
    index = open_index(data, split)
    if not isinstance(data.shards, Path):
        return index  # its shards are compared by their hashes as they come
    total = sum(shard.bytes for shard in index.shards)
    index.verify("hash" if data.verify == "hash" or (data.verify == "auto" and total <= HASHED_BYTES) else "size")
    return index


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing}: is a file; the run folder {folder} cannot be made there; set --runs or --name")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{existing}: is not writable, the run folder {folder} cannot be made there; set --runs")
