"""Weights from files: read without running their code, and loaded into a network by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_train.errors import CheckpointError
from dist_train.models.parts import exit_parts, is_in


def read_weights(file: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a file: the file's content, or what stands in it under ``state_dict`` or ``model``.

    Raises:
        CheckpointError: no such file, or no weights in it.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the pickle is written
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{file}: holds no weights, or more than weights, which is not read ({_reason(error)}); give a file that "
            "torch.load reads with weights_only=True, or safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not weights by name; give a state dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: holds a {type(value).__name__} under {key!r}, not a tensor under a name; give the state dict alone"
            )
    return content


def load_backbone(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Start a network from weights of its backbone, or of all of it; exits without weights, or with other classes, keep their initialization.

    Args:
        model: a network of this package.
        weights: by the names of the network that exits were attached to, or by those of the whole model; with or
            without ``module.`` before each.
        source: what the weights are, for the error.

    Raises:
        CheckpointError: a weight of the backbone is missing or of another shape, or one is not known; names them.
    """
    given = {key.removeprefix("module."): value for key, value in weights.items()}
    own = model.state_dict()
    # Names of the backbone by itself, which lies in `network`.
    if not any(key in own for key in given):
        given = {f"network.{key}": value for key, value in given.items()}
    exits = [*exit_parts(model), "heads"]
    misshapen = [key for key in own if key in given and given[key].shape != own[key].shape]
    faults = {
        # Files of torch before 0.4.1 count no batches; torch's own loader takes them, too.
        "missing": [
            key for key in own if not (key in given or is_in(key, exits) or key.endswith(".num_batches_tracked"))
        ],
        "misshapen": [
            f"{k} {list(given[k].shape)} instead of {list(own[k].shape)}" for k in misshapen if not is_in(k, exits)
        ],
        "unexpected": [key for key in given if key not in own and not is_in(key, exits)],
    }
    found = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in faults.items() if keys]
    if found:
        raise CheckpointError(
            f"{source}: does not fit the network: {', '.join(found)}; give weights of this architecture"
        )
    fitting = {key: value for key, value in given.items() if key in own and key not in misshapen}
    # Its own values fill the gaps, so that the loading can stay strict.
    model.load_state_dict(own | fitting)


def _reason(error: Exception) -> str:
    """The error of torch or safetensors, without torch's advice to load the file unsafely."""
    text = str(error).strip()
    found = re.search(r"WeightsUnpickler error: (.+?)(?:\. |\n|$)", text) or re.search(r"[^.]*[a-z][^.\n]*", text)
    return found[found.lastindex or 0].strip()[:120] if found else type(error).__name__


def _some(keys: Iterable[str]) -> str:
    first = [key.removeprefix("network.") for key in keys]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
