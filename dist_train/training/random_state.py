"""The random states of this process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

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
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    numbers = numpy_state["state"]
    state["numpy"] = torch.from_numpy(np.append(numbers["key"], numbers["pos"]).astype(np.int64))
    _, numbers, second = random.getstate()
    state["python"] = torch.tensor(numbers, dtype=torch.int64)
    # Both make normal numbers in pairs; whether one is left of the last pair, and which.
    state["second_normals"] = torch.tensor(
        [numpy_state["has_gauss"], numpy_state["gauss"], second is not None, second or 0.0], dtype=torch.float64
    )
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    numbers = state["numpy"].numpy()
    key, position = numbers[:-1].astype(np.uint32), int(numbers[-1])
    # Checkpoints of earlier versions do not have it.
    has_numpy, of_numpy, has_python, of_python = state.get("second_normals", torch.zeros(4)).tolist()
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": position},
            "has_gauss": int(has_numpy),
            "gauss": of_numpy,
        }
    )
    # 3 is the version of Python's own form of a generator's state.
    random.setstate((3, tuple(state["python"].tolist()), of_python if has_python else None))
