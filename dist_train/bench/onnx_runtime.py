"""An export in ONNX Runtime, as ``dist-train bench predict`` times it; to be imported where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.compose
import onnx.utils
import onnxruntime

from dist_train.bench.runtimes import Exits, Images, Script
from dist_train.export.runner import EarlyExit


class _ScriptedRunner(EarlyExit):
    """An export's runner, whose confidence is computed, and then overruled by a script."""

    script: Script

    def confidence(self, number: int, logits: Any, predicted: Any) -> Any:
        super().confidence(number, logits, predicted)
        return np.where(self.script.leaves(number), np.inf, -np.inf)


class OnnxRuntime:
    """The runner of an export on the CPU.

    Args:
        folder: of the export.

    Attributes:
        policy: content of its policy.json.

    Raises:
        ValueError: a file is not the exported one, or the export is one graph.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.policy = EarlyExit(folder).policy
        if "graph" in self.policy:
            raise ValueError(
                f"{folder} is one graph that stops by itself; `dist-train export --format onnx` writes what is timed"
            )
        self._programs = _cut_off_programs(folder, self.policy["stages"])

    def prepare(self, images: Images, threads: int) -> None:
        """See :class:`Runtime`."""
        self._images = images
        self._runner = _ScriptedRunner(self._folder, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._static = [
            onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
            for program in self._programs
        ]

    def route(self, exits: Exits) -> None:
        """See :class:`Runtime`."""
        self._runner.script = Script(exits)
        self._runner.predict(self._images)

    def static(self, number: int) -> None:
        """See :class:`Runtime`."""
        session = self._static[number]
        session.run(None, {session.get_inputs()[0].name: self._images})


def _cut_off_programs(folder: Path, stages: Sequence[str]) -> list[bytes]:
    """The stages up to each exit joined into one program that gives its logits alone: other exits are left out of it."""
    whole, handed_on, programs = onnx.ModelProto(), list[str](), list[bytes]()
    for number, name in enumerate(stages):
        stage = onnx.compose.add_prefix(onnx.load(str(folder / name)), f"stage{number}_")
        takes = [one.name for one in stage.graph.input]
        # What a stage gives behind its logits is what the next one takes, in this order.
        logits, *gives = [one.name for one in stage.graph.output]
        whole = onnx.compose.merge_models(whole, stage, io_map=list(zip(handed_on, takes))) if number else stage
        handed_on = gives
        images = [one.name for one in whole.graph.input]
        programs.append(onnx.utils.Extractor(whole).extract_model(images, [logits]).SerializeToString())
    return programs
