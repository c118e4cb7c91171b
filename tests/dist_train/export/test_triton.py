"""A model repository of Triton: its configurations fit its programs, and its model decides as the runner does."""

import importlib.util
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from dist_train import cli
from dist_train.export import triton_repository
from dist_train.export.runner import EarlyExit
from tests.common import imported_by
from tests.dist_train.export.test_export import images_of

TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


@pytest.fixture(scope="module")
def repository(runs, tmp_path_factory):
    """The folder."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    assert cli.run(["export", str(runs["msdnet"]), "--budget", "0.45M", "--triton", "--out", str(folder)]) == 0
    return folder


def configuration(folder):
    """Name, backend, and the tensors of a side: name, type and shape without the batch."""
    text = (folder / "config.pbtxt").read_text()
    sides = dict(re.findall(r"^(input|output) \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL))
    tensors = {
        side: [
            (name, type_, [int(one) for one in dims.split(",")])
            for name, type_, dims in re.findall(r'name: "(\w+)", data_type: (\w+), dims: \[(.*?)\]', rows)
        ]
        for side, rows in sides.items()
    }
    assert "max_batch_size: 64\ndynamic_batching { }\ninstance_group [{ kind: KIND_CPU }]\n" in text
    return re.search(r'^name: "(\w+)"', text)[1], re.search(r'backend: "(\w+)"', text)[1], tensors


def test_configurations_are_those_of_the_programs(repository):
    names = {path.name for path in repository.iterdir()}
    assert names == {"README.md", "early_exit", "early_exit_stage1", "early_exit_stage2", "early_exit_stage3"}
    for name in names - {"README.md", "early_exit"}:
        session = onnxruntime.InferenceSession(repository / name / "1/model.onnx")
        called, backend, tensors = configuration(repository / name)
        assert (called, backend) == (name, "onnxruntime")
        for side, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
            assert all(isinstance(one.shape[0], str) for one in nodes)  # any number of images
            assert tensors[side] == [(one.name, TYPES[one.type], one.shape[1:]) for one in nodes]
    called, backend, tensors = configuration(repository / "early_exit")
    assert (called, backend) == ("early_exit", "python")
    assert tensors["input"] == [("images", "TYPE_FP32", [3, 32, 32])]
    text = (repository / "README.md").read_text()
    assert "has not been run on a Triton server" in text
    assert "compute in fp32, on the CPU" in text


class Server(ModuleType):
    """A stand-in of triton_python_backend_utils, whose models are the programs of a repository."""

    TRITONSERVER_MEMORY_CPU = 0
    TritonModelException = RuntimeError

    def __init__(self, repository):
        super().__init__("triton_python_backend_utils")
        self.repository, self.rows, self.broken = repository, [], False
        self.sessions = {
            path.parent.parent.name: onnxruntime.InferenceSession(path) for path in repository.glob("*/1/model.onnx")
        }

    def PreferredMemory(self, kind):
        return kind

    def Tensor(self, name, values):
        assert values.flags["C_CONTIGUOUS"] or not values.size
        return SimpleNamespace(name=name, as_numpy=lambda: values)

    def InferenceResponse(self, tensors):
        return SimpleNamespace(tensors=tensors, has_error=lambda: False)

    def InferenceRequest(self, model_name, requested_output_names, inputs, preferred_memory):
        """Of a model with exactly the inputs of its configuration."""
        configured = configuration(self.repository / model_name)[2]
        assert [one.name for one in inputs] == [name for name, _, _ in configured["input"]]
        for one, (_, type_, dims) in zip(inputs, configured["input"]):
            assert {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}[one.as_numpy().dtype.name] == type_
            assert list(one.as_numpy().shape[1:]) == dims
        assert preferred_memory == self.TRITONSERVER_MEMORY_CPU

        def execute():
            if self.broken:
                return SimpleNamespace(
                    has_error=lambda: True, error=lambda: SimpleNamespace(message=lambda: "no memory")
                )
            self.rows.append((model_name, len(inputs[0].as_numpy())))
            given = {one.name: one.as_numpy() for one in inputs}
            values = self.sessions[model_name].run(requested_output_names, given)
            return self.InferenceResponse([self.Tensor(*one) for one in zip(requested_output_names, values)])

        return SimpleNamespace(exec=execute)

    def get_output_tensor_by_name(self, response, name):
        return next(one for one in response.tensors if one.name == name)

    def get_input_tensor_by_name(self, request, name):
        return next(one for one in request.tensors if one.name == name)


@pytest.fixture
def server(repository, monkeypatch):
    """The stand-in, and the model that it has loaded as the Python backend does."""
    server = Server(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    spec = importlib.util.spec_from_file_location("triton_model_of_test", repository / "early_exit/1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({})
    return server, model


def test_the_model_gives_what_the_runner_gives(server, runs, exported, digits):
    stub, model = server
    images = images_of(runs["msdnet"], digits)[:60].numpy()
    requests = [stub.InferenceResponse([stub.Tensor("images", part)]) for part in np.split(images, [1, 21])]
    responses = model.execute(requests)
    expected = EarlyExit(exported["msdnet"]).predict(images)
    outputs = configuration(stub.repository / "early_exit")[2]["output"]
    for (name, type_, dims), values in zip(
        outputs, (expected.classes, expected.confidence, expected.exits, expected.logits), strict=True
    ):
        parts = [stub.get_output_tensor_by_name(one, name).as_numpy() for one in responses]
        assert [len(part) for part in parts] == [1, 20, 39]
        found = np.concatenate(parts)
        assert list(found.shape[1:]) == dims
        assert {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}[found.dtype.name] == type_
        np.testing.assert_allclose(found.reshape(values.shape), values, atol=1e-5)
    # All requests are one batch, and sure images go no further.
    left = [60 - int((expected.exits <= number).sum()) for number in range(3)]
    assert left[-1] < 60
    assert stub.rows == [(f"early_exit_stage{number + 1}", count) for number, count in enumerate(left) if count]


def test_the_model_needs_numpy_and_the_server_alone(repository):
    text = (repository / "early_exit/1/model.py").read_text()
    assert imported_by(text) == {"numpy", "triton_python_backend_utils"}
    assert "Image" not in text


def test_what_a_stage_says_is_handed_on(server):
    stub, model = server
    stub.broken = True
    request = stub.InferenceResponse([stub.Tensor("images", np.zeros((1, 3, 32, 32), np.float32))])
    with pytest.raises(RuntimeError, match="early_exit_stage1: no memory"):
        model.execute([request])


def test_bad_input_is_one_line(runs, refused, tmp_path):
    def said(*arguments):
        return refused("export", runs["vit"], "--thresholds", "1,1", "--triton", *arguments)

    assert "give --format onnx instead of onnx-if" in said("--format", "onnx-if")
    assert "not allowed with argument" in said("--mlflow")
    (tmp_path / "one").touch()
    assert "exists and is no model repository" in said("--out", tmp_path)
    assert "exists and is no folder" in said("--out", tmp_path / "one")


def test_another_model_of_a_shared_repository_is_not_lost(repository, runs, refused, tmp_path, monkeypatch):
    shared = tmp_path / "models"
    shutil.copytree(repository, shared)
    (shared / "detector/1").mkdir(parents=True)
    (shared / "detector/1/model.onnx").write_bytes(b"theirs")
    words = ("export", runs["msdnet"], "--budget", "0.45M", "--triton", "--out", shared)
    with monkeypatch.context() as patched:
        patched.setattr(triton_repository, "repackaged", None)  # it is said before any work
        assert "detector in it would be lost" in refused(*words)
    assert (shared / "detector/1/model.onnx").read_bytes() == b"theirs"
    shutil.rmtree(shared / "detector")
    assert cli.run([str(word) for word in words]) == 0  # its own models are replaced
