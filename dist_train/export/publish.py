"""What is published of a run: the weights that evaluation used, what they were trained by, their report, and their export."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

from dist_train.config import AVERAGED, Config, FunctionConfig, TrackingConfig
from dist_train.config_file import dump_config
from dist_train.errors import CheckpointError, ConfigError
from dist_train.export import policy as policies
from dist_train.export.card import card_text
from dist_train.files import draft_folder_of
from dist_train.models.named import is_named
from dist_train.training import checkpoint

STALE = ("report.json", f"{policies.FOLDER}/*")
"""Patterns of the files that not every run has; one of an earlier push would be of other weights."""


def write_published(path: str | Path, folder: Path, address: str) -> list[str]:
    """Write into an empty folder what is published of a run; what it lacks, in words.

    ``model.safetensors``, ``config.yaml``, ``state.json`` and ``manifest.json`` are a folder of weights as
    :func:`~dist_train.load_model` reads it, without paths and addresses of this machine; ``report.json`` and ``export/`` are there where the
    run has them for the same step; ``README.md`` is the model card.

    Args:
        path: run folder (its best checkpoint) or checkpoint.
        folder: to write into.
        address: by which the card says that it is loaded, such as ``hf://ORG/NAME``.

    Raises:
        UserError: there is no checkpoint, or a damaged one.
        OSError: the folder cannot be written.
    """
    path = checkpoint.find(path)
    if (path / "manifest.json").is_file():
        checkpoint.verify(path)
    meta, config = checkpoint.read_meta(path)
    config = _without_places(config)
    shutil.copyfile(checkpoint.evaluated_weights(path), folder / "model.safetensors")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    # Both name files and folders of this machine.
    state = asdict(replace(meta, unreadable={}, teachers={}))
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    checkpoint.write_manifest(folder)
    run, step, lacking = checkpoint.run_folder(path), meta.progress.step, []
    report = _of_step(run / "report.json", step)
    if report is None:
        lacking.append(f"no report of step {step}, so the card has no accuracy; `dist-train eval` writes one")
    else:
        shutil.copyfile(run / "report.json", folder / "report.json")
    exported = _of_step(run / policies.FOLDER / policies.NAME, step)
    if exported is None:
        lacking.append(f"no export of step {step}; `dist-train export` writes one")
    else:
        exported = policies.with_defaults(exported)
        (folder / policies.FOLDER).mkdir()
        for name in (*exported.get("files", ()), policies.NAME):
            # The names come from a file: one with a path in it would lead out of the folder.
            file = run / policies.FOLDER / PurePath(name).name
            if not file.is_file():
                raise CheckpointError(f"{file}: is missing; export again, or remove {file.parent}")
            shutil.copyfile(file, folder / policies.FOLDER / file.name)
    try:
        card = card_text(address, config, meta, report, exported)
    except (KeyError, TypeError, IndexError):
        raise CheckpointError(
            f"{run}: its report.json or the policy.json of its export is damaged; write it again, or remove it"
        ) from None
    (folder / "README.md").write_text(card, encoding="utf-8")
    if type(config.model) is FunctionConfig:
        lacking.append(f"the code of {config.model.name}, without which the network cannot be loaded elsewhere")
    return lacking


def write_folder(path: str | Path, folder: Path) -> list[str]:
    """The same as a folder of its own, whole or not at all; what it lacks, in words.

    Raises:
        UserError: as :func:`write_published`, and for a folder that holds something or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not empty; give another --folder")
    try:
        with draft_folder_of(folder.resolve()) as draft:
            return write_published(path, draft, folder.resolve().name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); give another --folder") from None


def _of_step(file: Path, step: int) -> dict[str, Any] | None:
    """The content of a JSON file that says which step it is of; None where there is none of this step."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise CheckpointError(f"{file}: is damaged; write it again, or remove it") from None
    return content if isinstance(content, dict) and content.get("step") == step else None


def _without_places(config: Config) -> Config:
    """The configuration without what it says of this machine and its network: folders, addresses, accounts."""
    data = config.data
    train = data.train
    if not isinstance(train, str):
        train = tuple(part.model_copy(update={"shards": Path(_name(part.shards))}) for part in train)
    pretrained = config.model.pretrained
    if isinstance(pretrained, Path):
        pretrained = Path(_name(pretrained))
    # Without their folders two runs may have one name, which the field refuses to have twice.
    teachers = [_teacher(name) for name in config.loss.outside_teachers]
    defaults = Config(data=data)
    return config.model_copy(
        update={
            "runs": defaults.runs,
            "data": data.model_copy(update={"shards": Path(_name(data.shards)), "cache": None, "train": train}),
            "model": config.model.model_copy(update={"pretrained": pretrained}),
            "loss": config.loss.model_copy(update={"outside_teachers": tuple(dict.fromkeys(teachers))}),
            "tracking": TrackingConfig(group=config.tracking.group, log_every=config.tracking.log_every),
            "slurm": defaults.slurm,
        }
    )


def _teacher(name: str) -> str:
    """A network of a library or of the Hub as it is called, of a run its name alone."""
    return name if name == AVERAGED or "://" in name or is_named(name) else _name(name)


def _name(place: Path | str) -> str:
    """The last part of a folder or a URL, without what a URL has behind a question mark."""
    return PurePath(str(place).partition("?")[0]).name or "shards"
