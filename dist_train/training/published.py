"""What is fetched from a repository of the Hugging Face Hub, which anybody may have written, before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train import hub
from dist_train.config import Config, FunctionConfig, LibraryConfig
from dist_train.config_file import load_config
from dist_train.errors import CheckpointError

# Of transformers only its own classes: OWNER/MODEL would be fetched from another repository.
_LIBRARY_NAME = re.compile(r"(?:timm|torchvision)/[\w.]+|transformers/\w+", re.ASCII)


def fetch(path: str | Path, needed: Sequence[str], optional: Sequence[str]) -> Path:
    """The local folder of a repository ``hf://ORG/NAME``, whose network can be built without running code that it names.

    Args:
        path: the address.
        needed: files without which it holds no network.
        optional: further files to fetch where it has them.

    Raises:
        UserError: there is no such repository, it holds no network of ours, or one that runs code.
    """
    address = hub.parse_address(path)
    folder = hub.fetch(address, [*needed, *optional])
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{address}: holds no network that `dist-train push` wrote, it has no {missing[0]}")
    config = load_config(folder / "config.yaml")
    if reason := _runs_code(config) or _reaches_out(config):
        raise CheckpointError(
            f"{address}: {reason}; if you trust it, run `hf download {address.repository} --local-dir FOLDER` and load FOLDER"
        )
    return folder


def _runs_code(config: Config) -> str:
    """Why building this network could run code that the configuration chooses; empty where it cannot.

    Libraries take the names of modules, of repositories and of files among their options, so an option may be no text.
    """
    network = config.model
    if not isinstance(network, FunctionConfig):
        return ""
    if not isinstance(network, LibraryConfig):
        return f"its network is made by {network.name}, a function that the repository chooses"
    if not _LIBRARY_NAME.fullmatch(network.name):
        return f"its network is {network.name}, which is looked up elsewhere"
    chosen = [name for name, value in network.options.items() if not _is_number(value)]
    return f"its network has the option {chosen[0]}, which is no number" if chosen else ""


def _reaches_out(config: Config) -> str:
    """Why its data could be fetched from, or cached, where the configuration chooses; empty where they cannot."""
    data = config.data
    places = [str(data.shards), data.val]
    for part, split in data.training_splits:
        places += [str(part.shards), split]
    # Path("..").name is "..", so a comparison with the name alone would let it through.
    if chosen := [place for place in places if Path(place).name != place or place == ".."]:
        return f"its data lie at {chosen[0]}, which is more than a name"
    return f"its data.cache is {data.cache}, a folder that it chooses" if data.cache is not None else ""


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_number, value))
    # True and False are numbers to Python, and as harmless.
    return value is None or isinstance(value, int | float)
