"""How MLflow loads an export: image files in, class, confidence and exit out; copied into the model, where it needs no dist_train.

A request has a column ``image``: the bytes of an image file, in JSON as base64.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


class EarlyExitModel:
    """An export as MLflow calls it; threads take turns."""

    def __init__(self, folder: Path) -> None:
        # By its path: the folder is no package, and other modules are called predict as well.
        spec = importlib.util.spec_from_file_location("early_exit_predict", folder / "predict.py")
        assert spec is not None
        assert spec.loader is not None
        runner = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(runner)
        self._network: Any = runner.EarlyExit(folder)
        self._lock = threading.Lock()

    def predict(self, images: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row per image: class, confidence, exit (from 1).

        Raises:
            ValueError: one of them is no image.
        """
        loaded = [self._load(number, data) for number, data in enumerate(images["image"], start=1)]
        with self._lock:
            size = self._network.policy["preprocessing"]["crop"]
            result = self._network.predict(np.stack(loaded) if loaded else np.zeros((0, 3, size, size), np.float32))
            if warning := self._network.warning():
                logging.getLogger(__name__).warning(warning)
        names = self._network.policy["classes"]
        return pd.DataFrame(
            {
                "class": [names[one] for one in result.classes],
                "confidence": result.confidence.astype(np.float64),
                "exit": result.exits.astype(np.int64),
            }
        )

    def _load(self, number: int, data: bytes) -> Any:
        try:
            return self._network.load(io.BytesIO(data))
        except Exception as error:  # a damaged file can make Pillow raise anything
            raise ValueError(f"image {number} of the request cannot be read: {error}") from None


def _load_pyfunc(folder: str) -> EarlyExitModel:
    """What MLflow calls, with the folder of the export."""
    return EarlyExitModel(Path(folder))
