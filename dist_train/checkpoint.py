"""What a checkpoint holds, and how it comes to be whole or absent.

    runs/NAME/checkpoints/
        step-00001200/
            model.safetensors      weights and buffers; running statistics averaged over the ranks
            averaged.safetensors   moving average of the weights (only with optim.ema)
            optimizer.safetensors  optimizer state by parameter, whole, whatever the ZeRO stage
            ranks.safetensors      per rank: own running statistics and random states
            state.json             position, temperature, what the data and the network were
            config.yaml            the resolved configuration
            manifest.json          size and sha256 of all of these
        latest, best               links to a step

A checkpoint is written beside its name, flushed, and renamed; only then do the links move.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dist_train.config import Config
from dist_train.config_file import changed_fields, dump_config, load_config
from dist_train.errors import CheckpointError
from shards.index import file_sha256

FORMAT = 1
# Fields that make another run of it, or another order of samples: a checkpoint does not continue under them.
FIXED = (
    "model.", "seed", "data.image_size", "data.window", "data.last_batch", "data.labeled_share", "data.class_balanced",
    "data.repeats", "train.global_batch", "optim.name",
)  # fmt: skip
# What a folder of weights holds, at least.
WEIGHTS = ("model.safetensors", "config.yaml", "state.json")
log = logging.getLogger("dist_train")


@dataclass
class Position:
    """Where a run is.  ``step`` counts applied updates, ``batch`` consumed global batches."""

    step: int = 0
    batch: int = 0
    nonfinite: int = 0
    evaluated: int = 0
    """Global batch after which the network was last evaluated."""
    best_score: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class State:
    """The JSON side of a checkpoint."""

    position: Position
    world_size: int
    classes: list[str]
    fingerprint: str
    loss: dict[str, list[float]]
    averages_updates: int = 0
    mlflow_run: str | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class Snapshot:
    """A whole run at one step, on the CPU of rank 0."""

    state: State
    config: Config
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor] | None = None
    ranks: dict[str, torch.Tensor] = field(default_factory=dict)


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot as ``folder/step-N``; whole when this returns, absent if it raises.

    Raises:
        OSError: no space, no permission; nothing is left behind.
    """
    target = folder / f"step-{snapshot.state.position.step:08d}"
    draft = folder / f".{target.name}.{os.getpid()}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        draft.mkdir()
        tensors = {"model": snapshot.model, "optimizer": snapshot.optimizer, "ranks": snapshot.ranks}
        if snapshot.averaged is not None:
            tensors["averaged"] = snapshot.averaged
        for name, content in tensors.items():
            save_file({key: value.contiguous() for key, value in content.items()}, draft / f"{name}.safetensors")
        (draft / "state.json").write_text(json.dumps(asdict(snapshot.state), indent=1))
        (draft / "config.yaml").write_text(dump_config(snapshot.config))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(draft.iterdir())
        }
        (draft / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        for path in draft.iterdir():
            _flush(path)
        _flush(draft)
        if target.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(target)
        draft.rename(target)
        _flush(folder)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        # safetensors wraps the system's error in its own.
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    return target


def point(folder: Path, name: str, target: Path) -> None:
    """Make ``folder/name`` a link to a checkpoint beside it, in one step."""
    draft = folder / f".{name}.{os.getpid()}.tmp"
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.name)
    draft.replace(folder / name)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints and those that a link names, and drafts of killed writers."""
    named = {(folder / name).resolve() for name in ("latest", "best")}
    steps = sorted(path for path in folder.glob("step-*") if path.is_dir())
    for path in [p for p in steps[:-keep] if p.resolve() not in named] + list(folder.glob(".step-*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none; damaged ones are named in the log and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
        else:
            return path
    return None


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or of a newer format.
    """
    manifest = _json(path / "manifest.json")
    if manifest.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path}: has format {manifest['format']}, this version reads up to {FORMAT}; update dist_train"
        )
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != expected["bytes"] or file_sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{path}: {name} is damaged (size or sha256 differs from manifest.json)")


def read_state(path: Path) -> tuple[State, Config]:
    """The small side of a checkpoint: its state and its configuration."""
    raw = _json(path / "state.json")
    return State(**{**raw, "position": Position(**raw["position"])}), load_config(path / "config.yaml")


def read(path: Path) -> Snapshot:
    """Load a checkpoint on the CPU; its files are taken as verified."""
    state, config = read_state(path)
    averaged = path / "averaged.safetensors"
    return Snapshot(
        state=state,
        config=config,
        model=load_file(path / "model.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        averaged=load_file(averaged) if averaged.exists() else None,
        ranks=load_file(path / "ranks.safetensors"),
    )


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the best, else the latest, of a run folder.

    A folder of weights will do as well: what is needed of a checkpoint to run its network, without a manifest.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for candidate in (path, path / "checkpoints" / "best", path / "checkpoints" / "latest"):
        if (candidate / "manifest.json").is_file() or all((candidate / name).is_file() for name in WEIGHTS):
            return candidate.resolve()
    raise CheckpointError(f"{path}: no checkpoint here; give a run folder, or one of its checkpoints/step-*")


def run_folder(path: Path) -> Path:
    """The run folder of a resolved checkpoint; a folder of weights elsewhere is its own."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def load_model(path: str | Path, weights: str = "evaluated") -> nn.Module:
    """The network of a run folder or checkpoint as a plain module in evaluation mode, without DeepSpeed or pickle.

    Args:
        path: a run folder (its best checkpoint), or one checkpoint.
        weights: "evaluated" (the moving average where one was kept, as evaluation uses it), or "raw".

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    from dist_train.models import build_model

    path = resolve(path)
    if (path / "manifest.json").is_file():
        verify(path)
    config = load_config(path / "config.yaml")
    classes = _json(path / "state.json")["classes"]
    model = build_model(config.model, len(classes), config.data.image_size)
    averaged = path / "averaged.safetensors"
    file = averaged if weights == "evaluated" and averaged.exists() else path / "model.safetensors"
    model.load_state_dict(load_file(file))
    return model.eval()


def check_continues(path: Path, config: Config, fingerprint: str, classes: int) -> list[str]:
    """Say in lines what changed since a checkpoint; refuse what would make the continuation another run.

    Raises:
        CheckpointError: network, data, seed or batches differ; names the fields.
    """
    state, before = read_state(path)
    if len(state.classes) != classes:
        raise CheckpointError(
            f"{path}: was trained on {len(state.classes)} classes, the shards have {classes}; set another --name"
        )
    changes = changed_fields(before, config)
    refused = [f"{key} {old} -> {new}" for key, old, new in changes if key.startswith(FIXED)]
    if refused:
        raise CheckpointError(f"{path}: differs in {', '.join(refused)}; put it back, or set another --name")
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path}: was trained on other data ({before.data.shards}, fingerprint {state.fingerprint[:12]}, "
            f"now {fingerprint[:12]}); use those shards, or set another --name"
        )
    return [f"{key} {old} -> {new}" for key, old, new in changes]


def seed_random(seed: int) -> None:
    """Set the random states of this process (torch, GPU, numpy, python)."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """The random states of this process (torch, GPU, numpy, python) as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    # The legacy generator is the one that user code draws from without asking for one.
    numbers = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    state["numpy"] = torch.from_numpy(np.append(numbers["key"], numbers["pos"]).astype(np.int64))
    state["python"] = torch.tensor(random.getstate()[1], dtype=torch.int64)
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Take over what :func:`random_state` gave."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    numbers = state["numpy"].numpy()
    key, position = numbers[:-1].astype(np.uint32), int(numbers[-1])
    np.random.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": position}})  # noqa: NPY002
    random.setstate((3, tuple(state["python"].tolist()), None))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read ({error.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{path.parent}: {path.name} is damaged (not JSON)") from None
    assert isinstance(content, dict)
    return content


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
