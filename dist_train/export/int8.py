"""Stages in int8: static quantisation, by the ranges that activations have on some images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from dist_train.errors import ConfigError
from dist_train.export.programs import quiet, reason


def quantize(stages: Sequence[Path], images: NDArray[np.float32]) -> None:
    """Replace float32 stages by int8 ones, in the form of ONNX's QuantizeLinear and DequantizeLinear that every runtime fuses.

    Weights have a scale per channel, activations one per tensor, from the smallest and largest values on the images. What a stage
    hands on stays float32.  uint8 activations times int8 weights are what the instructions of x86 multiply.

    Args:
        stages: files of the programs in order.
        images: [N, 3, S, S], as the network takes them.

    Raises:
        ConfigError: a stage cannot be quantised.
        OSError: a file cannot be written.
    """
    given = [[image[None]] for image in images]
    for number, stage in enumerate(stages, start=1):
        session = onnxruntime.InferenceSession(stage, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        inputs = [dict(zip(names, one)) for one in given]
        try:
            with quiet():  # without the advice to prepare the program by other tools first
                quantize_static(
                    stage,
                    stage,
                    _Rows(inputs),
                    QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
        except OSError:
            raise
        except Exception as error:  # the quantiser raises what each of its steps raises
            raise ConfigError(f"stage {number} cannot be quantised: {reason(error)}") from None
        # By the float32 session, which has read its file before: ranges are those of what the network hands on.
        given = [session.run(None, one)[1:] for one in inputs]


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    """Inputs of a program, one after the other."""

    def __init__(self, inputs: Sequence[dict[str, Any]]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        """The next ones; None at the end."""
        return next(self._inputs, None)
