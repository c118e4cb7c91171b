"""Which images every exit got right, as a few kilobytes inside of ``report.json``.

Differences between runs on the same images are far less noisy than the accuracies themselves, but only the outcome of every
single image tells by how much.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import DataError

UNCOUNTED, WRONG, RIGHT = 0, 1, 2
"""Outcomes of an image: without a label or unreadable; its label is not the first class, or it is."""


def pack(outcomes: NDArray[np.uint8]) -> dict[str, Any]:
    """The field ``outcomes`` of report.json for outcomes [N, M] of the N images of a split, in the order of their ids.

    ``images`` is N; ``counted`` and, per exit, ``correct`` hold a bit per image, the first in the highest bit, as base64.
    """
    return {
        "images": len(outcomes),
        "counted": _to_text(outcomes[:, 0] != UNCOUNTED),
        "correct": [_to_text(column == RIGHT) for column in outcomes.T],
    }


def unpack(field: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Outcomes [N, M] from what :func:`pack` made.

    Raises:
        DataError: it is damaged; says how.
    """
    try:
        images = field["images"]
        counted = _from_text(field["counted"], images)
        correct = [_from_text(text, images) for text in field["correct"]]
        # 1 + 0 is WRONG, 1 + 1 is RIGHT.
        return np.stack([np.where(counted, WRONG + column, UNCOUNTED) for column in correct], axis=1).astype(np.uint8)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"outcomes ({error}); run dist-train eval again") from None


def _to_text(flags: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def _from_text(text: str, images: int) -> NDArray[np.uint8]:
    # With their number, because packbits fills up the last byte.
    return np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8), count=images)
