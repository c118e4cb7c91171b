"""The random states of this process."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def seed_random(seed: int) -> None:
    """Set the random states of this process (torch, GPU, numpy, python)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """The random states of this process (torch, GPU, numpy, python) as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    # numpy's legacy global generator: the one that np.random.* functions in user code draw from.
    numbers = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    state["numpy"] = torch.from_numpy(np.append(numbers["key"], numbers["pos"]).astype(np.int64))
    state["python"] = torch.tensor(random.getstate()[1], dtype=torch.int64)
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    numbers = state["numpy"].numpy()
    key, position = numbers[:-1].astype(np.uint32), int(numbers[-1])
    np.random.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": position}})  # noqa: NPY002
    random.setstate((3, tuple(state["python"].tolist()), None))
