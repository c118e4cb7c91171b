"""One ONNX graph that stops by itself: the stages inside each other, in the branches of ``If`` that are taken where an exit is not sure.

For an image at a time, because an ``If`` takes one branch for a whole batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dist_train.export.programs import OPSET, write_program
from dist_train.prediction.stopping import Thresholds

NAME = "network.onnx"


def write_single_graph(programs: Sequence[Path], policy: Thresholds, folder: Path) -> str:
    """Write ``network.onnx`` into a folder; its name.

    Inputs: ``images`` float32 [1, 3, S, S], and ``thresholds`` float32 [M - 1] of all exits but the last.  Outputs: ``logits`` float32
    [1, K] of the exit taken, and ``exit`` int64 [1], from 0.

    Args:
        programs: files of the stages, as :func:`~dist_train.export.programs.write_programs` writes them.
        policy: whose measure of confidence decides, with its temperatures and weights.
        folder: to write into.

    Raises:
        ConfigError: ONNX has no operator for something that the network does.
        OSError: a file cannot be written.
    """
    stages = [onnx.load(program) for program in programs]
    exits, classes = len(stages), _shape(stages[0].graph.output[0])[1]
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        decisions = []
        for number in range(exits - 1):
            given = (
                torch.randn(1, classes),
                torch.zeros(1, number, dtype=torch.int64),
                torch.zeros(exits - 1),
            )
            file = Path(draft) / f"decision{number}.onnx"
            write_program(_Decision(policy, number), given, None, file, f"the decision of exit {number + 1}")
            decisions.append(onnx.load(file))
    nodes, initializers, outputs = _from_exit(0, ["images"], "", stages, decisions)
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, *_shape(stages[0].graph.input[0])[1:]]),
        helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [exits - 1]),
    ]
    renamed = [helper.make_node("Identity", [name], [new]) for name, new in zip(outputs, ("logits", "exit"))]
    graph = helper.make_graph(
        [*nodes, *renamed], "network", inputs, _outputs(["logits", "exit"], classes), initializers
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        # The exporter's: onnx's own default is its newest, which runtimes may not know yet.
        ir_version=stages[0].ir_version,
        producer_name="dist_train",
    )
    onnx.checker.check_model(model, full_check=True)
    (folder / NAME).write_bytes(model.SerializeToString())
    return NAME


class _Decision(nn.Module):
    """Whether the image leaves at an exit, by the policy's own measure."""

    def __init__(self, policy: Thresholds, number: int) -> None:
        super().__init__()
        self._policy = policy
        self._number = number

    def forward(self, logits: Tensor, before: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Whether it leaves, bool [], and the classes so far, int64 [1, m + 1].

        Args:
            logits: of this exit, [1, K].
            before: classes by the exits before, int64 [1, m].
            thresholds: of all exits but the last.
        """
        classes = torch.cat([before, logits.argmax(1, keepdim=True)], dim=1)
        score = self._policy.scores(self._number, logits, classes)
        return (score >= thresholds[self._number])[0], classes


Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]
"""Nodes, weights, and the names of two outputs: logits and exit."""


def _from_exit(
    number: int,
    takes: Sequence[str],
    before: str,
    stages: Sequence[onnx.ModelProto],
    decisions: Sequence[onnx.ModelProto],
) -> Part:
    """The network from a stage on; ``takes`` are the names of what it is given, ``before`` that of the classes so far."""
    nodes, weights, (logits, *gives) = _inlined(stages[number], f"stage{number}_", takes)
    outputs = [f"logits{number}", f"exit{number}"]
    here = numpy_helper.from_array(np.array([number], dtype=np.int64), f"number{number}")
    if number == len(decisions):
        last = [helper.make_node("Identity", [name], [new]) for name, new in zip((logits, here.name), outputs)]
        return [*nodes, *last], [*weights, here], outputs
    if not number:
        # No class so far, with a dimension of 0, so that all decisions take the same inputs.
        before = "no_classes"
        weights.append(numpy_helper.from_array(np.zeros((1, 0), dtype=np.int64), before))
    deciding, constants, (leaves, classes) = _inlined(
        decisions[number], f"decision{number}_", [logits, before, "thresholds"]
    )
    inner, inner_weights, inner_outputs = _from_exit(number + 1, gives, classes, stages, decisions)
    width = _shape(stages[number].graph.output[0])[1]
    # Names of their own: nested graphs may give each name once.
    stop_outputs = [f"stop_{name}" for name in outputs]
    stop = helper.make_graph(
        [helper.make_node("Identity", [name], [new]) for name, new in zip((logits, here.name), stop_outputs)],
        f"stop{number}",
        [],
        _outputs(stop_outputs, width),
    )
    # Without inputs: a branch sees the names of the graphs around it.
    further = helper.make_graph(inner, f"further{number}", [], _outputs(inner_outputs, width), inner_weights)
    choice = helper.make_node("If", [leaves], outputs, f"exit{number + 1}", then_branch=stop, else_branch=further)
    return [*nodes, *deciding, choice], [*weights, *constants, here], outputs


def _inlined(model: onnx.ModelProto, prefix: str, takes: Sequence[str]) -> Part:
    """A program as part of another graph, where its inputs have other names; its names get a prefix."""
    assert not model.functions, "torch's exporter inlines its functions"
    graph = onnx.compose.add_prefix(model, prefix).graph
    given = [one.name for one in graph.input]
    linked = [helper.make_node("Identity", [name], [new]) for name, new in zip(takes, given, strict=True)]
    return [*linked, *graph.node], list(graph.initializer), [one.name for one in graph.output]


def _shape(tensor: onnx.ValueInfoProto) -> list[int]:
    return [one.dim_value for one in tensor.type.tensor_type.shape.dim]


def _outputs(names: Sequence[str], classes: int) -> list[onnx.ValueInfoProto]:
    logits, number = names
    return [
        helper.make_tensor_value_info(logits, TensorProto.FLOAT, [1, classes]),
        helper.make_tensor_value_info(number, TensorProto.INT64, [1]),
    ]
