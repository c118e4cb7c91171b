"""An export as a model repository of Triton Inference Server: a model per stage, and one that decides which images go on."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from dist_train.errors import ConfigError
from dist_train.evaluation.thresholds import OperatingPoint
from dist_train.export import policy as policies
from dist_train.export import runner
from dist_train.export.export import folder_for, repackaged
from dist_train.export.formats import Form
from dist_train.export.runner import EarlyExit

NAME = "early_exit"
"""Of the model that is called; its stages are ``early_exit_stage1`` and so on."""
FILES = ("README.md", NAME, f"{NAME}_stage[0-9]*")
"""Patterns of what is in a repository; another model that shares it would be lost."""
VERSION = "1"
MAX_BATCH = 64
"""Images that the server computes together."""
_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}

Tensor = tuple[str, str, list[int]]
"""Name, type, and shape without the batch, as the server calls them."""


def export_repository(
    path: str | Path,
    point: OperatingPoint,
    form: Form,
    out: str | Path | None = None,
    shards: str | Path | None = None,
) -> Path:
    """Write a model repository, whole or not at all; the folder.

    Args: as of :func:`~dist_train.export.export.export`; the folder is ``triton`` in the run folder by default.

    Raises:
        UserError: as there; or another format than ``onnx``.
    """
    if form.format != "onnx":
        raise ConfigError(
            f"--triton serves a program per exit in ONNX Runtime; give --format onnx instead of {form.format}"
        )
    folder = folder_for(path, out, "triton")
    ours = FILES if (folder / NAME / VERSION / policies.NAME).is_file() else ()
    policies.check_replaceable(folder, ours, "model repository of an export")
    with repackaged(folder, path, point, form, shards) as (exported, repository):
        _write(exported, repository)
    return folder


def _write(exported: Path, repository: Path) -> None:
    policy = json.loads((exported / policies.NAME).read_text(encoding="utf-8"))
    tensors = {}
    for program in policy["stages"]:
        name = f"{NAME}_{Path(program).stem}"
        version = _model_folder(repository, name)
        shutil.copyfile(exported / program, version / "model.onnx")
        graph = onnx.load(exported / program).graph
        tensors[name] = [[one.name for one in graph.input], [one.name for one in graph.output]]
        text = _config(name, "onnxruntime", map(_tensor, graph.input), map(_tensor, graph.output))
        (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    size, classes = policy["preprocessing"]["crop"], len(policy["classes"])
    outputs = [
        ("class", "TYPE_INT64", [1]),
        ("confidence", "TYPE_FP32", [1]),
        ("exit", "TYPE_INT64", [1]),
        ("logits", "TYPE_FP32", [classes]),
    ]
    version = _model_folder(repository, NAME)
    text = _config(NAME, "python", [("images", "TYPE_FP32", [3, size, size])], outputs)
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    (version / "model.py").write_text(_model_text(), encoding="utf-8")
    # The runner finds its programs by these names, and the server wants each tensor by its own.
    policies.write(version, policy | {"stages": list(tensors), "tensors": tensors})
    (repository / "README.md").write_text(_readme(policy), encoding="utf-8")


def _model_folder(repository: Path, name: str) -> Path:
    folder = repository / name / VERSION
    folder.mkdir(parents=True)
    return folder


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    # -1 is a size that is not fixed.
    # The batch is left out: with max_batch_size the server puts it in front.
    dims = [one.dim_value or -1 for one in kind.shape.dim][1:]
    if not dims or kind.elem_type not in _TYPES:
        raise ConfigError(
            f"a stage hands on {value.name}, of a type or shape that the configuration of Triton does not have"
        )
    return value.name, _TYPES[kind.elem_type], dims


def _config(name: str, backend: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> str:
    """config.pbtxt; the server computes waiting requests together."""
    parts = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {MAX_BATCH}", "dynamic_batching { }"]
    parts.append("instance_group [{ kind: KIND_CPU }]")  # parity was measured there; a server with a GPU would take it
    for side, tensors in (("input", inputs), ("output", outputs)):
        rows = [f'  {{ name: "{one}", data_type: {type_}, dims: {dims} }}' for one, type_, dims in tensors]
        parts.append(f"{side} [\n" + ",\n".join(rows) + "\n]")
    return "\n".join(parts) + "\n"


def _model_text() -> str:
    """model.py: the runner's class without what reads images, and what makes its programs models of the server."""
    of_runner, of_server = (
        (Path(runner.__file__).with_name(name)).read_text(encoding="utf-8") for name in ("runner.py", "triton_model.py")
    )
    head, body = of_server.split("from dist_train.export.runner import EarlyExit\n")
    shared = of_runner[of_runner.index("Array = ") : of_runner.index("def main()")]
    # Programs are models of the server here, and images come prepared, so no ONNX Runtime or Pillow is imported.
    for method in (EarlyExit.program, EarlyExit.load):
        shared = shared.replace(inspect.getsource(method) + "\n", "")
    imports = "import hashlib\nimport json\nimport math\nfrom collections import namedtuple\n"
    return head.replace("from pathlib", f"{imports}from pathlib", 1) + shared.rstrip() + "\n" + body


def _readme(policy: dict[str, Any]) -> str:
    how = policy["preprocessing"]
    return f"""# Model repository of an early-exit network, step {policy["step"]}

For Triton Inference Server with its Python and ONNX Runtime backends. **It has not been run on a Triton server**: its configurations were
compared with the ONNX programs, and `model.py` was run against a stand-in of the server that runs the same programs.

```
docker run --rm --shm-size=1g -p 8000:8000 -v "$PWD":/models nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver --model-repository=/models
```

Call the model `{NAME}`, never its stages. `images`: float32 [N, 3, {how["crop"]}, {how["crop"]}], N at most {MAX_BATCH}: {how["color"]}, shorter side resized to {how["resize"]} pixels,
centre crop of {how["crop"]}, scaled to {how["scale"]}, minus {list(how["mean"])}, by {list(how["std"])}. It gives `class` (its number in the `classes` of
`{NAME}/{VERSION}/policy.json`), `confidence`, `exit` (from 1), each [N, 1], and the `logits` of the exit taken.

An image goes on to the next stage only if the exit is not sure of it; thresholds, accuracy and parity with the trained network are in
`policy.json`. Requests that wait are computed together. The programs compute in {policy["precision"]}, on the CPU (`instance_group`), where they were
compared with the network; what `policy.json` promises is of the network in float32.
"""
