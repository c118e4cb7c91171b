"""What a checkpoint holds, and why it is always whole or absent.

    runs/NAME/checkpoints/
        step-00001200/
            model.safetensors      weights and buffers; running statistics averaged over the ranks
            averaged.safetensors   moving average of the weights (only with optim.ema_decay)
            optimizer.safetensors  optimizer state by parameter, whole, whatever the ZeRO stage
            ranks.safetensors      per rank: own running statistics and random states
            state.json             progress, temperature, unreadable images, what the data and the network were
            config.yaml            the resolved configuration
            manifest.json          size and sha256 of all of these
        latest, best               links to a step, for people: nothing here reads them

A checkpoint is written beside its name, flushed, and renamed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dist_train.checks import check_kind
from dist_train.config import Config
from dist_train.config_file import dump_config, load_config
from dist_train.data.unreadable import BadSample
from dist_train.errors import CheckpointError, ConfigError
from dist_train.files import DRAFT, draft_folder_of, sha256
from dist_train.hub import is_address
from dist_train.models import MultiExitNetwork, build_model
from dist_train.training import published

FORMAT = 2
WEIGHTS = ("model.safetensors", "config.yaml", "state.json")
"""What a folder of weights holds, at least."""
log = logging.getLogger("dist_train")


@dataclass
class Progress:
    """How far a run has come.  ``step`` counts applied updates, ``batch`` consumed global batches."""

    step: int = 0
    batch: int = 0
    stage_start: int = 0
    """Updates that were applied before the present stage of the regime; 0 in the first."""
    skipped_steps: int = 0
    """Updates that were not applied, because the gradient was not finite."""
    skipped_in_a_row: int = 0
    """The last of them that count towards ``faults.max_nonfinite``."""
    evaluated: int = 0
    """Global batch after which the network was last evaluated."""
    best_score: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class CheckpointMeta:
    """The JSON side of a checkpoint."""

    progress: Progress
    world_size: int
    classes: list[str]
    fingerprint: str
    """Of the training split, as it was used."""
    loss: dict[str, list[float]]
    val_fingerprint: str = ""
    averages_updates: int = 0
    loss_scale: tuple[float, int] | None = None
    """Of fp16: its value, and the updates that were applied in a row with it."""
    teachers: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the weights of every outside teacher that is a run, by its name."""
    unreadable: dict[int, BadSample] = field(default_factory=dict)
    """Images of the training split that the run could not read so far, by id."""
    finished: bool = False
    """The run had come to its end, and report.json was written."""
    format: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """A whole run at one step, on the CPU of rank 0."""

    meta: CheckpointMeta
    config: Config
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor] | None = None
    ranks: dict[str, torch.Tensor] = field(default_factory=dict)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint as ``folder/step-N``, which is whole whenever it is there; it replaces one of the same step.

    Raises:
        OSError: no space, no permission; nothing half-written is left behind.
    """
    target = folder / step_name(checkpoint.meta.progress.step)
    tensors = {"model": checkpoint.model, "optimizer": checkpoint.optimizer, "ranks": checkpoint.ranks}
    # Left out, not empty: its existence tells load_model that there are averaged weights.
    if checkpoint.averaged is not None:
        tensors["averaged"] = checkpoint.averaged
    try:
        # The same step can come again, after a resume from an earlier one: the new folder takes its place.
        with draft_folder_of(target) as draft:
            for name, content in tensors.items():
                # safetensors refuses tensors with other strides.
                save_file({key: value.contiguous() for key, value in content.items()}, draft / f"{name}.safetensors")
            (draft / "state.json").write_text(json.dumps(asdict(checkpoint.meta), indent=1))
            (draft / "config.yaml").write_text(dump_config(checkpoint.config))
            write_manifest(draft)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        # safetensors wraps the system's error in a text of its own.
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
    return target


def write_manifest(folder: Path) -> None:
    """List all files of a folder in its ``manifest.json``, which is written last, with size and hash."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def set_link(folder: Path, name: str, target: Path) -> None:
    """Make ``folder/name`` a link to a checkpoint beside it, in one step.

    A copy that has followed links (``cp -rL``) left a folder there; it is removed.
    """
    link = folder / name
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    # A link cannot be changed in place; renaming a new one over it leaves no moment without.
    draft = folder / f".{name}{DRAFT}"
    # One that a killed writer has left.
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.name)
    draft.replace(link)


def prune(folder: Path, keep: int, best_step: int | None, written: int) -> None:
    """Remove all but the last ``keep`` checkpoints and the best one, and the leftovers of killed writers.

    ``written`` is the step of the one that was just written.  Later ones are damaged: the run resumed from before them.
    """
    paths = _steps(folder)
    intact = [path for path in paths if path.name <= step_name(written)]
    best = [path for path in intact if best_step is not None and path.name == step_name(best_step)]
    # keep is at least 1, so the newest checkpoint is never removed.
    kept = {*intact[-keep:], *best}
    for path in [*(path for path in paths if path not in kept), *folder.glob(f".step-*{DRAFT}")]:
        # What cannot be removed now is tried again after the next save; it is no reason to end training.
        shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where none was ever written; damaged ones are logged and skipped.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    paths = _steps(folder)
    for path in reversed(paths):
        try:
            verify(path)
            read_meta(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
        else:
            return path
    if paths:
        raise CheckpointError(
            f"{folder}: none of its {len(paths)} checkpoints is intact; restore one from a backup, or remove the folder to start over"
        )
    return None


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or of another format.
    """
    manifest = _json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: has format {manifest.get('format')}, this version of dist_train reads format {FORMAT}"
        )
    files = manifest.get("files")
    # Without this, a manifest that lists nothing would pass unchecked.
    if not isinstance(files, dict) or not files.keys() >= set(WEIGHTS):
        raise CheckpointError(f"{path}: manifest.json is damaged (it does not list the files)")
    for name, expected in files.items():
        file = path / name
        # The names come from a file: one with a path in it would point outside of the checkpoint.
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if expected != {"bytes": file.stat().st_size, "sha256": sha256(file)}:
            raise CheckpointError(f"{path}: {name} is damaged (size or sha256 differs from manifest.json)")


def read_meta(path: Path) -> tuple[CheckpointMeta, Config]:
    """The small side of a checkpoint: its state and its configuration.

    Raises:
        CheckpointError: state.json or config.yaml is missing, damaged, or of another version.
    """
    raw = _json(path / "state.json")
    try:
        # JSON has no numbers for keys.
        unreadable = {int(sample): BadSample(**bad) for sample, bad in raw.get("unreadable", {}).items()}
        raw = {key: value for key, value in raw.items() if key != "mlflow_run"}  # older ones have it
        meta = CheckpointMeta(**{**raw, "progress": Progress(**raw["progress"]), "unreadable": unreadable})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: state.json is damaged ({error})") from None
    try:
        return meta, load_config(path / "config.yaml")
    except ConfigError as error:
        raise CheckpointError(f"{path}: config.yaml cannot be used ({error})") from None


def read(path: Path) -> Checkpoint:
    """Load a checkpoint on the CPU; its files are taken as verified."""
    meta, config = read_meta(path)
    averaged = path / "averaged.safetensors"
    return Checkpoint(
        meta=meta,
        config=config,
        model=load_file(path / "model.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        averaged=load_file(averaged) if averaged.exists() else None,
        ranks=load_file(path / "ranks.safetensors"),
    )


def find(path: str | Path) -> Path:
    """The checkpoint that a path stands for: itself, or the best (else the newest) of a run folder.

    A folder of weights works as well: the files of a checkpoint that its network needs, without a manifest.  So does a
    repository of the Hugging Face Hub, ``hf://ORG/NAME``, which is fetched.

    Raises:
        CheckpointError: there is none that can be read.
        UserError: a repository cannot be fetched, or would run code.
    """
    check_kind("path", path, str | Path, "give a run folder, one of its checkpoints, or hf://ORG/NAME")
    if is_address(path):
        return published.fetch(path, WEIGHTS, ("manifest.json", "report.json"))
    path = Path(path)
    if (path / "manifest.json").is_file() or all((path / name).is_file() for name in WEIGHTS):
        # Resolved, so that a link given by the user cannot move to another step between two files.
        return path.resolve()
    problem: CheckpointError | None = None
    # The newest state that can be read knows which step was best; the link `best` is not asked.
    for candidate in reversed(_steps(path / "checkpoints")):
        try:
            best_step = read_meta(candidate)[0].progress.best_step
        except CheckpointError as error:
            problem = problem or error  # of the newest, should no other be readable
            continue
        best = candidate.with_name(step_name(best_step)) if best_step is not None else candidate
        # The best one may have been removed by hand.
        return (best if best.is_dir() else candidate).resolve()
    raise problem or CheckpointError(f"{path}: no checkpoint here; give a run folder, or one of its checkpoints/step-*")


def put_back(folder: Path) -> None:
    """Undo replacements of a checkpoint by one of the same step that were killed between their two renames.

    Only for who holds the run's lock: a writer that lives is to finish its own.
    """
    for old in folder.glob(f".step-*-replaced{DRAFT}"):
        path = folder / old.name[1:].partition(".")[0]
        if not path.exists():
            old.rename(path)


def newest_meta(folder: Path) -> CheckpointMeta | None:
    """The state of the newest checkpoint in a run folder that can be read; None without any."""
    for path in reversed(_steps(folder / "checkpoints")):
        try:
            return read_meta(path)[0]
        except CheckpointError:
            continue
    return None


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder has come to its end, as it was configured then: its newest checkpoint says so."""
    # report.json is no evidence: `dist-train eval` writes it for unfinished runs, too.
    meta = newest_meta(folder)
    return meta is not None and meta.finished


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint in a run folder, unchecked; 0 without any."""
    paths = _steps(folder / "checkpoints")
    return int(paths[-1].name.removeprefix("step-")) if paths else 0


def run_folder(path: Path) -> Path:
    """The run folder of a checkpoint that :func:`find` gave; a folder of weights elsewhere is its own."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def load_model(path: str | Path, weights: str = "evaluated") -> MultiExitNetwork:
    """The network of a run folder or checkpoint as a plain module in evaluation mode, without DeepSpeed or pickle.

    Args:
        path: a run folder (its best checkpoint), one checkpoint, or a repository ``hf://ORG/NAME``.
        weights: "evaluated" (the moving average where one was kept, as evaluation uses it), or "raw".

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one whose raw weights were not published.
        UserError: a repository that cannot be fetched, or that would run code.
    """
    if weights not in ("evaluated", "raw"):
        raise ConfigError(f"weights is {weights!r}; use 'evaluated' or 'raw'")
    path = find(path)
    # Folders of weights made by hand have no manifest.
    if (path / "manifest.json").is_file():
        verify(path)
    config = load_config(path / "config.yaml")
    classes = _json(path / "state.json").get("classes")
    if not isinstance(classes, list):
        raise CheckpointError(f"{path}: state.json is damaged (it does not name the classes)")
    if weights == "raw" and config.optim.ema_decay and evaluated_weights(path).name == "model.safetensors":
        raise CheckpointError(
            f"{path}: has the moving average of the weights alone, and not the raw ones; leave out weights='raw'"
        )
    model = build_model(config.model, len(classes), config.data.image_size)
    try:
        tensors = load_file(path / "model.safetensors" if weights == "raw" else evaluated_weights(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: its weights are damaged ({error})") from None
    load_weights(model, tensors, path)
    return model.eval()


def evaluated_weights(path: Path) -> Path:
    """The file of a checkpoint that evaluation takes the weights from: their moving average where one was kept."""
    averaged = path / "averaged.safetensors"
    return averaged if averaged.exists() else path / "model.safetensors"


def load_weights(model: MultiExitNetwork, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put weights of a checkpoint into its network; raises CheckpointError where the network's code is another one by now."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"{path}: its weights do not fit the network ({lines[-1][:200]}); use the code that it was trained with"
        ) from None


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def _steps(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read ({error.strerror})") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.parent}: {path.name} is damaged (not JSON)")
    return content
