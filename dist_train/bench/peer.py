"""The network of kalviny/MSDNet-PyTorch, out of a checkout of it, to measure beside ours."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from dist_train.errors import ConfigError
from dist_train.models.msdnet import MSDNet

REPOSITORY = "https://github.com/kalviny/MSDNet-PyTorch"


def load_peer(checkout: Path, ours: Mapping[str, Any]) -> nn.Module:
    """Its network with the same exits, scales and widths as ours, with fresh weights.  Runs the checkout's code.

    Args:
        checkout: folder of the repository.
        ours: arguments of :class:`MSDNet`; its defaults hold for what is missing.

    Raises:
        ConfigError: the folder has no such network.
    """
    path = checkout / "models" / "msdnet.py"
    spec = importlib.util.spec_from_file_location("msdnet_pytorch", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"--peer is {checkout}, which has no models/msdnet.py; give a checkout of {REPOSITORY}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every layer
        network: nn.Module = module.MSDNet(_arguments(ours))
    return network


def _arguments(ours: Mapping[str, Any]) -> SimpleNamespace:
    """The repository's command-line arguments by name."""
    known = {**(MSDNet.__init__.__kwdefaults__ or {}), **ours}
    return SimpleNamespace(
        data="ImageNet" if known["stem"] == 224 else "cifar100",
        nBlocks=known["exits"],
        nScales=known["scales"],
        nChannels=known["initial_channels"],
        base=known["base"],
        step=known["step"],
        stepmode="even",
        growthRate=known["growth"],
        grFactor=list(known["growth_factors"]),
        bnFactor=list(known["bottleneck_factors"]),
        bottleneck=True,
        prune=known["prune"],
        reduction=known["reduction"],
    )
