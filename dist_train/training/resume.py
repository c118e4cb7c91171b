"""Where a run resumes: decided once, and checked against the very checkpoint that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import Config
from dist_train.config_file import changed_fields
from dist_train.errors import CheckpointError
from dist_train.tracking.mlflow import without_password
from dist_train.training import checkpoint
from dist_train.training.checkpoint import CheckpointMeta
from dist_train.training.optim import state_names
from dist_train.training.outside_teachers import teacher_fingerprints
from dist_train.training.schedule import Schedule
from shards.index import Index

IMMUTABLE_FIELDS = (
    "model.",
    "seed",
    "data.image_size",
    "data.shuffle_shards",
    "data.last_batch",
    "data.labeled_fraction",
    "data.class_balanced",
    "data.repeated_augment",
    "train.global_batch",
    "optim.name",
)
"""Fields (or prefixes of fields) that define the run and its order of samples: a run cannot resume if one of them changed."""

MUTABLE_FIELDS = ("model.activation_checkpointing", "model.pretrained")
"""Those of them that can change after all: what memory it takes to train, and where the weights of the start were."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, and one line for each change since it was written."""

    path: Path
    changes: list[str]


def resume_point(config: Config, train: Index, val: Index) -> ResumePoint | None:
    """Decide where a run resumes: at its newest intact checkpoint, which must belong to this run; None for a new run.

    Raises:
        CheckpointError: no checkpoint is intact, or network, data, seed or batches differ; names the fields.
    """
    path = checkpoint.newest(config.folder / "checkpoints")
    return None if path is None else ResumePoint(path, check_resumable(path, config, train, val))


def has_ended(config: Config, steps_per_epoch: int) -> bool:
    """Whether the run has come to its end and, as it is configured now, would train on no further batch."""
    meta = checkpoint.newest_meta(config.folder)
    return meta is not None and meta.finished and Schedule(config, steps_per_epoch).at_end(meta.progress)


def check_resumable(path: Path, config: Config, train: Index, val: Index) -> list[str]:
    """List what changed since a checkpoint, one line each; refuse changes that would make it another run.

    Raises:
        CheckpointError: network, data, seed or batches differ; names the fields.
    """
    meta, before = checkpoint.read_meta(path)
    # First, because it is the clearest message: other classes also mean other data and another network.
    if meta.classes != list(train.classes):
        raise CheckpointError(
            f"{path}: was trained on {_summary(meta.classes)}, the shards have {_summary(train.classes)}; "
            "use those shards, or set another --name"
        )
    changes = changed_fields(before, config)
    refused = [
        f"{key} {old} -> {new}"
        for key, old, new in changes
        if key.startswith(IMMUTABLE_FIELDS) and key not in MUTABLE_FIELDS
    ]
    if refused:
        raise CheckpointError(f"{path}: differs in {', '.join(refused)}; revert it, or set another --name")
    # After the fields: the same data under a changed order or split is better explained by the field.
    if meta.fingerprint != train.fingerprint:
        raise CheckpointError(
            f"{path}: was trained on other data ({before.data.shards}, fingerprint {meta.fingerprint[:12]}, "
            f"now {train.fingerprint[:12]}); use those shards, or set another --name"
        )
    lines = [without_password(f"{key} {old} -> {new}") for key, old, new in changes]
    # Allowed, because weights, optimizer and order are untouched; said, because the averages forget what was before.
    if config.optim.ema_decay is not None and before.optim.ema_decay is None:
        lines.append("averaged weights start from this checkpoint's weights")
    if set(state_names(config.optim)) - set(state_names(before.optim)):
        lines.append("the optimizer's momentum starts from 0")
    for name, fingerprint in ({} if meta.finished else teacher_fingerprints(config)).items():
        # A teacher that was added is among the changed fields already.
        if meta.teachers.get(name, fingerprint) != fingerprint:
            lines.append(f"the outside teacher {name} has other weights than before")
    if val_changed(meta, val):
        lines.append("the validation split changed: the best checkpoint is chosen again from here on")
    return lines


def val_changed(meta: CheckpointMeta, val: Index) -> bool:
    """Whether the checkpoint was validated on other images than ``val``, so that scores cannot be compared with its best."""
    return bool(meta.val_fingerprint) and meta.val_fingerprint != val.fingerprint


def _summary(classes: Sequence[str]) -> str:
    named = ", ".join(classes[:3])
    return f"{len(classes)} classes ({named}{', ...' if len(classes) > 3 else ''})"
