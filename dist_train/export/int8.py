"""Stages in int8: static quantisation, by the ranges that activations have on some images."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static


def quantize(stages: Sequence[Path], images: NDArray[np.float32]) -> None:
    """Replace float32 stages by int8 ones, in the form of ONNX's QuantizeLinear and DequantizeLinear that every runtime fuses.

    Weights have a scale per channel, activations one per tensor, from the smallest and largest values on the images. What a stage
    hands on stays float32.  uint8 activations times int8 weights are what the instructions of x86 multiply.

    Args:
        stages: files of the programs in order.
        images: [N, 3, S, S], as the network takes them.

    Raises:
        OSError: a file cannot be written.
    """
    given = [[image[None]] for image in images]
    for stage in stages:
        session = onnxruntime.InferenceSession(stage, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        inputs = [dict(zip(names, one)) for one in given]
        with _quiet():
            quantize_static(
                stage,
                stage,
                _Rows(inputs),
                QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        given = [session.run(None, one)[1:] for one in inputs]


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    """Inputs of a program, one after the other."""

    def __init__(self, inputs: Sequence[dict[str, Any]]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        """The next ones; None at the end."""
        return next(self._inputs, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to prepare the program by other tools first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
