"""Which forms an export has, which runtime runs them, and at which precision it can compute here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dist_train.errors import ConfigError
from dist_train.export import policy as policies

if TYPE_CHECKING:  # which imports ONNX Runtime
    from dist_train.export.runner import EarlyExit

Format = Literal["onnx", "onnx-if", "openvino"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
RUNTIMES: dict[Format, str] = {"onnx": "onnxruntime", "onnx-if": "onnxruntime", "openvino": "openvino"}
"""What pip installs to run it."""
MAX_CHANGED = 0.1
"""Share of the images that a lower precision may give another class or another exit."""


@dataclass(frozen=True)
class Form:
    """In which form a network is exported.

    Args:
        format: ``onnx`` is a program per exit, ``onnx-if`` one graph that stops by itself, ``openvino`` a program per exit for OpenVINO.
        precision: precision of the arithmetic.
        max_changed: in a lower precision than fp32, the largest share of images with another class or exit.
    """

    format: Format = "onnx"
    precision: Precision = "fp32"
    max_changed: float = MAX_CHANGED


def check_precision(format_: Format, precision: Precision) -> None:
    """Raise ConfigError for a precision that the runtime of a format does not have on this CPU, or gets wrong."""
    if precision == "fp32" or (precision == "int8" and RUNTIMES[format_] == "onnxruntime"):
        return
    if RUNTIMES[format_] == "onnxruntime":
        raise ConfigError(
            f"--precision {precision}: ONNX Runtime has no such convolutions for a CPU, so it would be no faster than fp32; "
            "give int8, or --format openvino on a CPU that has it"
        )
    if precision == "int8":
        raise ConfigError(
            "--precision int8: OpenVINO computes other logits of programs quantised by ONNX Runtime than ONNX Runtime; give --format onnx"
        )
    from dist_train.export.openvino_runtime import has_precision

    if not has_precision(precision):
        raise ConfigError(f"--precision {precision}: OpenVINO says that this CPU does not have it; give fp32")


def open_export(folder: Path, threads: int = 0) -> EarlyExit:
    """The runner of an export, in its runtime.

    Raises:
        ConfigError: the runtime is not installed, or a file is not the exported one.
    """
    try:
        runtime = policies.read(folder)["runtime"]
        if runtime not in RUNTIMES.values():
            raise ConfigError(f"{folder}: its policy.json names the runtime {runtime!r}; export again")
        if importlib.util.find_spec(runtime) is None:
            raise ConfigError(
                f"{folder} is for {runtime}, which cannot be found; install it with pip install {runtime}"
            )
        if runtime == "openvino":
            from dist_train.export.openvino_runtime import OpenVinoEarlyExit

            return OpenVinoEarlyExit(folder, threads)
        from dist_train.export.runner import EarlyExit

        return EarlyExit(folder, threads)
    except KeyError as error:
        raise ConfigError(f"{folder}: its policy.json has no {error}; export again") from None
    except TypeError as error:
        raise ConfigError(f"{folder / policies.NAME}: is damaged ({error}); export again") from None
    except (ValueError, OSError) as error:  # which name the file
        raise ConfigError(str(error)) from None
