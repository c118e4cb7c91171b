"""Makes checkpoint folders of other networks: of a public MSDNet repository's file, or of a run whose exits are to predict together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dist_train.config import Config, DataConfig
from dist_train.config_file import make_config, parse_yaml
from dist_train.errors import CheckpointError, ConfigError
from dist_train.models import interop
from dist_train.models.ensembles import Ensemble
from dist_train.models.msdnet import MSDNet
from dist_train.models.weights import read_weights
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Checkpoint, CheckpointMeta, Progress
from shards.check import split_folders
from shards.index import Index

# Mean and deviation of CIFAR-100 as both repositories use them; ImageNet's are the defaults.
CIFAR = {"image_size": 32, "mean": [0.507, 0.487, 0.441], "std": [0.267, 0.256, 0.276]}
IMAGENET = {"image_size": 224, "eval_resize": 256}
NO_SHARDS = Path("shards")
"""Written to the configuration if no shards are given."""


def convert(file: str | Path, output: str | Path, repository: str, arguments: str | Path, *overrides: str) -> Path:
    """Write ``output/checkpoints/step-0``, which ``load_model``, eval and predict read; gives the path of ``output``.

    Args:
        file: their checkpoint, a torch file (read with ``weights_only=True``) or safetensors.
        output: folder to make.
        repository: ``msdnet_pytorch`` or ``multiexit_distillation``.
        arguments: YAML or JSON file with the configuration that :mod:`~dist_train.models.interop` takes.
        overrides: fields of the configuration, ``"--data.shards", "data/cifar100"``; the names of the classes come from
            those shards, and are numbers without them.

    Raises:
        ConfigError: the configuration is incomplete, or out of range.
        CheckpointError: the file is not weights, or they do not fit the configuration; names the keys.
    """
    output = _new_folder(output)
    theirs = _read_arguments(Path(arguments))
    if repository == "msdnet_pytorch":
        classes, model = interop.msdnet_pytorch_arguments(theirs)
        network: MSDNet = interop.load_msdnet_pytorch(theirs, read_weights(file))
    else:
        classes, model = interop.multiexit_distillation_arguments(theirs)
        network = interop.load_multiexit_distillation(theirs, read_weights(file))
    tree = {
        "name": output.name,
        "runs": str(output.parent),
        "model": {"name": "msdnet", **model},
        "data": {"shards": NO_SHARDS, **(CIFAR if model["stem"] == 32 else IMAGENET)},
    }
    config = make_config(tree, *overrides)
    if config.model != make_config(tree).model:
        raise ConfigError(f"the network is what {arguments} says, which its weights fit; leave out --model")
    return _write(output, config, _class_names(config.data, classes), network.state_dict())


def as_ensemble(run: str | Path, output: str | Path, rule: Ensemble) -> Path:
    """Write a copy of a trained network whose exits predict together with those before them; gives the path of ``output``.

    Args:
        run: run folder (its best checkpoint), a checkpoint, or a folder of weights; it stays as it is.
        output: folder to make, which ``load_model``, eval, predict and export read.
        rule: ``model.ensemble`` of the copy.

    Raises:
        ConfigError: ``output`` exists.
        CheckpointError: no checkpoint, or it cannot be written.
    """
    output = _new_folder(output)
    path = checkpoint.find(run)
    network = checkpoint.load_model(path)
    meta, config = checkpoint.read_meta(path)
    # The regime says how a network is trained, and not all of them train ensembles.
    model = config.model.model_copy(update={"ensemble": rule, "regime": "joint", "first_epochs": 0})
    config = config.model_copy(update={"name": output.name, "runs": output.parent, "model": model})
    return _write(output, config, meta.classes, network.state_dict())


def _new_folder(output: str | Path) -> Path:
    # Never written over: it may be a run.
    if Path(output).exists():
        raise ConfigError(f"{output}: exists already; give a new folder")
    return Path(output)


def _write(output: Path, config: Config, classes: list[str], weights: dict[str, Tensor]) -> Path:
    # No fingerprint and no optimizer state: it can be evaluated, but no run can resume from it.
    meta = CheckpointMeta(Progress(), 1, classes, "", {})
    folder = output / "checkpoints"
    try:
        path = checkpoint.write(folder, Checkpoint(meta, config, weights, {}))
        checkpoint.set_link(folder, "latest", path)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error.strerror or error})") from None
    return output


def _read_arguments(file: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(file.read_text(), str(file))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give their configuration as YAML or JSON"
        ) from None
    except (ValueError, RecursionError):  # ValueError: another encoding, or no number where it says so
        raise ConfigError(f"{file}: is neither YAML nor JSON; write their configuration as such") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds a {type(content).__name__}, not names and values")
    return content


def _class_names(data: DataConfig, classes: int) -> list[str]:
    """The names in the index of the shards, of any split, or numbers where no shards on this machine are given."""
    if data.shards == NO_SHARDS or not isinstance(data.shards, Path):
        return [str(number) for number in range(classes)]
    split = split_folders(data.shards)[0]
    names = list(Index.load(split).classes)
    if len(names) != classes:
        raise ConfigError(f"{split}: has {len(names)} classes, the network {classes}; give other --data.shards")
    return names
