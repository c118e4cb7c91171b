"""An export in its runtime, as ``dist-train bench predict`` times it; to be imported where onnx is installed."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.compose
import onnx.utils

from dist_train.bench.runtimes import Exits, Images, Script
from dist_train.errors import ConfigError
from dist_train.export import policy as policies
from dist_train.export.formats import open_export
from dist_train.export.programs import write_programs
from dist_train.models.stages import StagedNetwork


class ExportRuntime:
    """The runner of an export on the CPU.

    Args:
        folder: of the export.

    Attributes:
        policy: content of its policy.json.

    Raises:
        ConfigError: a file is not the exported one, its runtime is not installed, or the export is one graph.
    """

    def __init__(self, folder: Path) -> None:
        runner = open_export(folder)
        self.policy = policies.with_defaults(runner.policy)
        if "graph" in self.policy:
            raise ConfigError(
                f"{folder} is one graph that stops by itself; `dist-train export --format onnx` writes what is timed"
            )
        self.name: str = self.policy["runtime"]
        self.precision: str = self.policy["precision"]
        self._folder, self._runner_class = folder, type(runner)
        self._draft = tempfile.TemporaryDirectory()
        stages = [folder / name for name in self.policy["stages"]]
        join = _joined_openvino if self.name == "openvino" else _joined_onnx
        self._cut_off = join(stages, Path(self._draft.name))

    def prepare(self, images: Images, threads: int) -> None:
        """See :class:`Runtime`."""
        self._images = images
        self._runner = self._runner_class(self._folder, threads)
        self._confidence = self._runner.confidence
        self._runner.confidence = self._leaving  # type: ignore[method-assign]
        self._static = [self._runner.program(file, threads) for file in self._cut_off]

    def route(self, exits: Exits) -> None:
        """See :class:`Runtime`."""
        self._script = Script(exits)
        self._runner.predict(self._images)

    def static(self, number: int) -> None:
        """See :class:`Runtime`."""
        self._static[number]([self._images])

    def _leaving(self, number: int, logits: Any, predicted: Any) -> Any:
        """The runner's confidence: computed, and then overruled by the script."""
        self._confidence(number, logits, predicted)
        # Infinite, so that it holds against any threshold of the exported policy.
        return np.where(self._script.leaves(number), np.inf, -np.inf)


def _joined_onnx(stages: Sequence[Path], folder: Path) -> list[Path]:
    """The stages up to each exit joined into one program that gives its logits alone: other exits are left out of it."""
    whole, handed_on, files = onnx.ModelProto(), list[str](), list[Path]()
    for number, file in enumerate(stages):
        stage = onnx.compose.add_prefix(onnx.load(file), f"stage{number}_")
        takes = [one.name for one in stage.graph.input]
        # What a stage gives behind its logits is what the next one takes, in this order.
        logits, *gives = [one.name for one in stage.graph.output]
        whole = onnx.compose.merge_models(whole, stage, io_map=list(zip(handed_on, takes))) if number else stage
        handed_on = gives
        images = [one.name for one in whole.graph.input]
        files.append(folder / file.name)
        onnx.save(onnx.utils.Extractor(whole).extract_model(images, [logits]), files[-1])
    return files


def _joined_openvino(stages: Sequence[Path], folder: Path) -> list[Path]:
    """The same of programs of OpenVINO."""
    import openvino

    images, handed_on, files = list[Any](), list[Any](), list[Path]()
    for file in stages:
        stage = openvino.Core().read_model(file)
        for parameter, source in zip(stage.get_parameters(), handed_on):
            for target in parameter.output(0).get_target_inputs():
                target.replace_source_output(source)
        images = images or stage.get_parameters()
        logits, *handed_on = [result.input(0).get_source_output() for result in stage.get_results()]
        files.append(folder / file.name)
        openvino.save_model(openvino.Model([logits], images), files[-1], compress_to_fp16=False)
    return files


def exported_runtimes(staged: StagedNetwork, size: int, content: dict[str, Any], folder: Path) -> list[ExportRuntime]:
    """A network as programs of ONNX Runtime, and of OpenVINO where it is installed.

    Args:
        staged: in float32.
        size: of its images, in pixels.
        content: of their policy.json but runtime and programs.
        folder: to write into.
    """
    names = {"onnxruntime": write_programs(staged, size, _new(folder / "onnxruntime"))}
    if importlib.util.find_spec("openvino"):
        from dist_train.export.openvino_runtime import write_openvino

        stages = [folder / "onnxruntime" / name for name in names["onnxruntime"]]
        names["openvino"] = write_openvino(stages, _new(folder / "openvino"))
    for runtime, programs in names.items():
        policies.write(folder / runtime, content | {"runtime": runtime, "precision": "fp32", "stages": programs})
    return [ExportRuntime(folder / runtime) for runtime in names]


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
