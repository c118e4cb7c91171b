"""The model ``early_exit`` of a Triton server: its Python backend loads this file, as model.py, after the runner's class.

Every stage is a model of the server; which images go on to the next is decided here (business logic scripting).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server

from dist_train.export.runner import EarlyExit


class ServerEarlyExit(EarlyExit):
    """The runner, whose programs are models of the server."""

    def program(self, file: Path, threads: int) -> Any:
        """A model as a function, from a list of its inputs to a list of its outputs."""
        takes, gives = self.policy["tensors"][file.name]
        # as_numpy below reads tensors of the CPU alone, wherever a stage would leave its outputs.
        memory = server.PreferredMemory(server.TRITONSERVER_MEMORY_CPU)

        def run(given: list[Any]) -> list[Any]:
            inputs = [server.Tensor(name, np.ascontiguousarray(tensor)) for name, tensor in zip(takes, given)]
            request = server.InferenceRequest(
                model_name=file.name, requested_output_names=gives, inputs=inputs, preferred_memory=memory
            )
            response = request.exec()
            if response.has_error():
                raise server.TritonModelException(f"{file.name}: {response.error().message()}")
            return [server.get_output_tensor_by_name(response, name).as_numpy() for name in gives]

        return run


class TritonPythonModel:
    """What the server calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read policy.json, which is beside this file."""
        self.network = ServerEarlyExit(Path(__file__).parent)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request; the images of all of them are one batch."""
        images = [server.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        result = self.network.predict(np.concatenate(images))
        found = {
            "class": result.classes[:, None].astype(np.int64),
            "confidence": result.confidence[:, None].astype(np.float32),
            "exit": result.exits[:, None].astype(np.int64),
            "logits": result.logits,
        }
        ends = np.cumsum([len(one) for one in images])
        parts = {name: np.split(values, ends[:-1]) for name, values in found.items()}
        return [
            server.InferenceResponse([server.Tensor(name, parts[name][number]) for name in found])
            for number in range(len(requests))
        ]
