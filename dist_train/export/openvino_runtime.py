"""Exports in OpenVINO: the ONNX programs converted to its own format, and the runner that runs them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino

from dist_train.errors import ConfigError
from dist_train.export import runner
from dist_train.export.runner import EarlyExit


class OpenVinoEarlyExit(EarlyExit):
    """The runner of such a folder; see there."""

    def program(self, file: Path, threads: int) -> Any:
        """A program as a function, from a list of its inputs to a list of its outputs."""
        hint = {"bf16": "bf16", "fp16": "f16"}.get(self.policy["precision"], "f32")
        chosen = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        request = openvino.Core().compile_model(str(file), "CPU", chosen).create_infer_request()
        # Outputs are not copied: they are there until the program runs again.
        return lambda given: list(request.infer(given, share_inputs=True, share_outputs=True).values())


def runner_text() -> str:
    """predict.py of such a folder: that of ONNX Runtime, with the one method exchanged."""
    text = Path(runner.__file__).read_text(encoding="utf-8")
    text = text.replace(inspect.getsource(EarlyExit.program), inspect.getsource(OpenVinoEarlyExit.program))
    return text.replace("onnxruntime", "openvino").replace("ONNX Runtime", "OpenVINO")


def write_openvino(programs: Sequence[Path], folder: Path) -> list[str]:
    """Convert ONNX programs into OpenVINO's format, for each an ``.xml`` and a ``.bin`` of the same name; the names of the former.

    Raises:
        ConfigError: OpenVINO has no operator for something that a program does, or cannot write the file.
    """
    names = []
    for program in programs:
        names.append(f"{program.stem}.xml")
        try:
            # float16 weights would be a rounding of their own, whatever the precision that is computed in.
            openvino.save_model(openvino.Core().read_model(program), folder / names[-1], compress_to_fp16=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-200:]
            raise ConfigError(f"{program.stem} cannot be written for OpenVINO: {reason}") from None
    return names


def has_precision(precision: str) -> bool:
    """Whether the CPU computes in ``bf16`` or ``fp16`` itself."""
    return precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
