"""The stages of a network as ONNX files, one per exit."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError
from dist_train.export.formats import RUNTIMES, Format
from dist_train.models.stages import StagedNetwork

OPSET = 20
"""Version of the ONNX operators; ONNX Runtime knows it since 1.17."""
EXPORTERS = ("onnx", "onnxscript", "onnxruntime")
"""What exporting to any format imports."""


def check_installed(format_: Format = "onnx") -> None:
    """Raise ConfigError where a library that exporting to a format needs is missing."""
    missing = [name for name in _libraries(format_) if importlib.util.find_spec(name) is None]
    if missing:
        extra = "openvino" if format_ == "openvino" else "export"
        raise ConfigError(
            f"exporting needs {' and '.join(missing)}, which cannot be found; install them with pip install 'dist-train[{extra}]'"
        )


def versions(format_: Format) -> dict[str, str | int]:
    """Of the operators, and of the libraries that made the programs and that they were compared in."""
    # Asked of the modules: ONNX Runtime comes from distributions of several names, such as onnxruntime-gpu.
    libraries = ("torch", *_libraries(format_))
    return {"opset": OPSET} | {name: importlib.import_module(name).__version__ for name in libraries}


def _libraries(format_: Format) -> list[str]:
    return list(dict.fromkeys((*EXPORTERS, RUNTIMES[format_])))


def write_programs(staged: StagedNetwork, image_size: int, folder: Path) -> list[str]:
    """Write ``stage1.onnx`` to ``stageM.onnx`` into a folder, for any number of images; their names.

    Raises:
        ConfigError: ONNX has no operator for something that the network does.
        OSError: a file cannot be written.
    """
    # Three images: torch.export would take 0 or 1 for constants.
    given: Sequence[Tensor] = (torch.randn(3, 3, image_size, image_size),)
    names = []
    for number, stage in enumerate(staged.stages, start=1):
        names.append(f"stage{number}.onnx")
        batch = torch.export.Dim("batch", min=1)
        shapes = tuple({0: batch} for _ in given)
        write_program(stage, tuple(given), shapes, folder / names[-1], f"stage {number}")
        with torch.inference_mode():
            _, *given = stage(*given)
    return names


def write_program(
    module: nn.Module, given: tuple[Tensor, ...], dynamic_shapes: tuple[Any, ...] | None, file: Path, name: str
) -> None:
    """Write a module as an ONNX file.

    Args:
        module: in evaluation mode.
        given: examples of its inputs.
        dynamic_shapes: as torch.export takes them; None: all are as in the examples.
        file: to write.
        name: what messages call it.

    Raises:
        ConfigError: ONNX has no operator for something that it does.
        OSError: the file cannot be written.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                module, given, dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=dynamic_shapes
            )
            assert program is not None
    except Exception as error:  # the exporter raises what each of its steps raises
        raise ConfigError(f"{name} cannot be written as ONNX: {reason(error)}") from None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose files the network's code is
    program.save(file, external_data=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices of exporters, such as that torchvision is not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def reason(error: BaseException) -> str:
    """The operator that is missing, else the innermost error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    operator = re.search(r"No (?:ONNX|decompositions?)[^<]*<OpOverload\(op='([^']+)'", text)
    return f"it has no operator for {operator[1]}" if operator else text[:200] or type(error).__name__
