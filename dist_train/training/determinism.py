"""The switches of ``train.deterministic``: the same run on the same GPUs gives the same bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from dist_train.config import Config
from dist_train.errors import ConfigError


def make_deterministic(config: Config) -> Config:
    """Switch torch, cuDNN and cuBLAS to deterministic algorithms where the configuration wants them, before CUDA is used.

    Returns:
        the configuration with one JPEG decoder: the GPU's engine and its cores differ in the last bit of a pixel, and which
        of them gets an image depends on their load.
    """
    # Only where it changes something: the call imports torch's compiler, which takes more than a second.
    wanted, only_warns = config.train.deterministic, torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted != torch.are_deterministic_algorithms_enabled() or (wanted and only_warns):
        torch.use_deterministic_algorithms(wanted)
    # By default cuDNN chooses by rules; by measuring, two starts could choose differently.
    torch.backends.cudnn.benchmark = False
    if not config.train.deterministic:
        return config
    # cuBLAS is deterministic only with a workspace of its own per stream; it reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return config.model_copy(update={"data": config.data.model_copy(update={"hw_decoder_load": 0.0})})


@contextlib.contextmanager
def explain_nondeterministic_operations() -> Iterator[None]:
    """Turn torch's refusal of an operation into one line.

    Raises:
        ConfigError: the network has an operation without a deterministic algorithm.
    """
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ConfigError(
            f"train.deterministic is true, but {operation.split()[-1]} of this network has no deterministic algorithm on this "
            "device; set train.deterministic to false, or change the layer"
        ) from None
