"""Exports in OpenVINO and in lower precision: what they compute, what is said of it, and what is refused."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from dist_train import cli, load_model
from dist_train.bench.exported import ExportRuntime
from dist_train.errors import ConfigError
from dist_train.export import formats, int8
from dist_train.export import policy as policies
from dist_train.export.export import _samples
from dist_train.export.formats import open_export
from dist_train.export.parity import all_logits
from dist_train.prediction import predict
from tests.common import ROOT, imported_by
from tests.dist_train.export.test_export import images_of, policy_of, thresholds_of, untied


def exported_to(folder, run, *arguments):
    assert cli.run(["export", str(run), "--thresholds", "0.5,0.4", "--out", str(folder), *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def openvino(runs, tmp_path_factory):
    """Folder of the export."""
    pytest.importorskip("openvino", reason="needs OpenVINO")
    return exported_to(tmp_path_factory.mktemp("openvino") / "vit", runs["vit"], "--format", "openvino")


@pytest.fixture(scope="module")
def quantised(runs, tmp_path_factory):
    """Folders of the export in int8, by their format."""
    folder = tmp_path_factory.mktemp("int8")
    words = ["--precision", "int8", "--max-changed", "0.2"]
    return {name: exported_to(folder / name, runs["msdnet"], "--format", name, *words) for name in ("onnx", "onnx-if")}


def test_openvino_takes_the_exits_of_the_network_and_gives_its_logits(openvino, runs, digits):
    images, policy = images_of(runs["vit"], digits), policy_of(openvino)
    expected = predict(load_model(runs["vit"]), images, thresholds_of(policy))
    network, sure = open_export(openvino, threads=1), untied(runs["vit"], policy, images)
    for size in (1, 7, 360):
        parts = [network.predict(part.numpy()) for part in images[: 360 if size > 1 else 20].split(size)]
        exits, logits = (np.concatenate([getattr(part, name) for part in parts]) for name in ("exits", "logits"))
        same = sure[: len(exits)]
        assert (exits - 1 == expected.exits[: len(exits)].numpy())[same].all()
        np.testing.assert_allclose(logits[same], expected.logits[: len(exits)].numpy()[same], atol=1e-4)
    assert len(set(exits.tolist())) > 1
    assert (policy["runtime"], policy["precision"]) == ("openvino", "fp32")
    assert policy["parity"]["largest_logit_difference"] <= 1e-4
    assert "openvino" in policy["versions"]
    assert "pip install numpy pillow openvino" in (openvino / "README.md").read_text()
    programs = {f"stage{number}.{ending}" for number in (1, 2, 3) for ending in ("xml", "bin")}
    assert policy["files"].keys() == programs | {"predict.py", "README.md"}
    assert not [
        name for name in programs if b"/dist_train" in (openvino / name).read_bytes()
    ]  # no paths of this machine


def test_its_runner_needs_openvino_alone(openvino, photos, elsewhere, tmp_path):
    text = (openvino / "predict.py").read_text()
    assert len(text.splitlines()) <= 150
    assert imported_by(text) == {"numpy", "PIL", "openvino"}
    done = elsewhere(openvino / "predict.py", *photos, "--threads", "1", runtime="openvino")
    assert (done.returncode, done.stderr) == (0, "")
    network = open_export(openvino)
    found = network.predict(np.stack([network.load(photo) for photo in photos]))
    classes = [network.policy["classes"][one] for one in found.classes]
    assert [line.split()[1:3] for line in done.stdout.splitlines()] == [
        [str(exit_), name] for exit_, name in zip(found.exits, classes, strict=True)
    ]
    without = elsewhere(openvino / "predict.py", photos[0])
    assert without.stderr.count("\n") == 1
    assert "pip install numpy pillow openvino" in without.stderr
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in openvino.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes() + (b" " if file.name == "stage2.bin" else b""))
    assert "stage2.bin is not the one" in elsewhere(damaged / "predict.py", photos[0], runtime="openvino").stderr


def test_openvino_is_timed_with_networks_that_have_no_exits(openvino):
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32), dtype=np.float32)
    runtime = ExportRuntime(openvino)
    runtime.prepare(images, 1)
    runtime.route(np.array([0, 2, 1, 0, 2]))
    assert runtime._runner.counts.tolist() == [2, 1, 2]
    for program, expected in zip(runtime._static, all_logits(runtime._runner, images), strict=True):
        (logits,) = program([images])
        np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("format_", ["onnx", "onnx-if"])
def test_int8_multiplies_bytes_and_says_what_that_changed(format_, quantised, runs, digits):
    folder = quantised[format_]
    images, policy = images_of(runs["msdnet"], digits), policy_of(folder)
    with torch.inference_mode():
        expected = predict(load_model(runs["msdnet"]), images, thresholds_of(policy))
    network = open_export(folder, threads=1)
    found = network.predict(images.numpy())
    other_class = found.classes != expected.classes.numpy()
    other_exit = found.exits - 1 != expected.exits.numpy()
    parity = policy["parity"]
    assert policy["precision"] == "int8"
    assert (parity["other_class"], parity["other_exit"]) == (other_class.sum(), other_exit.sum())
    assert parity["changed"] == (other_class | other_exit).sum() <= 0.2 * 360
    assert parity["max_changed"] == 0.2
    assert parity["largest_logit_difference"] > 1e-3  # else nothing was rounded
    text = (folder / "README.md").read_text()
    assert f"{parity['other_class']} of 360 get another class and\n{parity['other_exit']} take another exit" in text
    assert "in int8" in text


def test_int8_stages_are_smaller_and_every_convolution_is_quantised(quantised, exported):
    for name in policy_of(quantised["onnx"])["stages"]:
        graph = onnx.load(quantised["onnx"] / name).graph
        made_by = {output: node.op_type for node in graph.node for output in node.output}
        for node in graph.node:
            if node.op_type == "Conv":
                assert [made_by[one] for one in node.input] == ["DequantizeLinear"] * len(node.input)
                weights = next(one for one in graph.node if node.input[1] in one.output)
                scale = next(one for one in graph.initializer if one.name == weights.input[1])
                channels = next(one for one in graph.initializer if one.name == weights.input[0]).dims[0]
                assert list(scale.dims) == [channels]
    sizes = [
        sum(weights_of(folder / name) for name in ("stage1.onnx", "stage2.onnx", "stage3.onnx"))
        for folder in (quantised["onnx"], exported["msdnet"])
    ]
    assert sizes[0] < sizes[1]


def weights_of(file):
    return sum(len(one.raw_data) for one in onnx.load(file).graph.initializer)


def test_nothing_is_left_when_too_many_images_change(runs, refused, tmp_path, monkeypatch):
    quantize = int8.quantize
    monkeypatch.setattr(
        int8, "quantize", lambda stages, images: quantize(stages, images * 1e-3)
    )  # ranges much too small
    said = refused(
        "export", runs["msdnet"], "--thresholds", "0.5,0.4", "--precision", "int8", "--out", tmp_path / "int8"
    )
    assert "than in float32, allowed is a share of 0.1; not exported" in said
    assert not list(tmp_path.iterdir())


def test_a_stage_that_cannot_be_quantised_is_one_line(exported, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise ValueError("no scale\nof this")

    shutil.copyfile(exported["msdnet"] / "stage1.onnx", tmp_path / "stage1.onnx")
    monkeypatch.setattr(int8, "quantize_static", fails)
    with pytest.raises(ConfigError, match=r"^stage 1 cannot be quantised: no scale of this$"):
        int8.quantize([tmp_path / "stage1.onnx"], np.zeros((2, 3, 32, 32), np.float32))


def test_ranges_come_from_images_that_are_not_compared():
    compared, calibration = _samples(50_000)
    assert (len(compared), len(calibration)) == (1000, 128)
    assert not set(compared.tolist()) & set(calibration.tolist())
    compared, calibration = _samples(360)
    assert (len(compared), len(set(calibration.tolist()))) == (360, 128)


def test_an_export_of_before_there_was_a_choice_is_float32_in_onnx_runtime(runs, exported, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "run/export"
    shutil.copytree(runs["msdnet"], run, symlinks=True)
    shutil.copytree(exported["msdnet"], folder)
    old = {key: value for key, value in policy_of(folder).items() if key not in ("runtime", "precision")}
    policies.write(folder, old)
    runtime = ExportRuntime(folder)
    assert (runtime.name, runtime.precision) == ("onnxruntime", "fp32")
    assert cli.run(["push", str(run), "--folder", str(tmp_path / "shared")]) == 0
    assert "pip install numpy pillow onnxruntime" in (tmp_path / "shared/README.md").read_text()


def test_a_damaged_policy_is_named(tmp_path):
    for text in ("{", "[]", '"runtime"', '{"runtime": []}'):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path))) as caught:
            open_export(tmp_path)
        assert "policy.json" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bad_input_is_one_line(runs, refused, tmp_path, monkeypatch):
    def said(*arguments):
        return refused("export", runs["vit"], "--thresholds", "1,1", "--out", tmp_path / "new", *arguments)

    for precision in ("bf16", "fp16"):
        for format_ in ("onnx", "onnx-if"):
            assert "ONNX Runtime has no such convolutions for a CPU" in said(
                "--precision", precision, "--format", format_
            )
    assert "invalid choice: 'fp8'" in said("--precision", "fp8")
    for share in ("2", "-0.1", "nan"):
        assert "give a share of the images from 0 to 1" in said("--precision", "int8", f"--max-changed={share}")
    assert "a lower --precision than fp32" in said("--max-changed", "0.1")
    pytest.importorskip("openvino", reason="needs OpenVINO")
    assert "--precision int8: OpenVINO computes other logits" in said("--format", "openvino", "--precision", "int8")
    monkeypatch.setattr("dist_train.export.openvino_runtime.has_precision", lambda _: False)
    assert "this CPU does not have it" in said("--format", "openvino", "--precision", "bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_within_the_limit_where_the_cpu_has_it(precision, runs, tmp_path):
    openvino_runtime = pytest.importorskip("dist_train.export.openvino_runtime", reason="needs OpenVINO")
    if not openvino_runtime.has_precision(precision):
        pytest.skip(f"needs a CPU that computes in {precision}")
    folder = exported_to(tmp_path / precision, runs["vit"], "--format", "openvino", "--precision", precision)
    policy = policy_of(folder)
    assert policy["precision"] == precision
    assert policy["parity"]["changed"] <= formats.MAX_CHANGED * 360
    assert policy["parity"]["largest_logit_difference"] > 1e-4  # else it was float32


def test_openvino_that_is_not_installed_is_named(runs, openvino, tmp_path):
    without = "import sys; sys.modules['openvino'] = None; from dist_train import cli; sys.exit(cli.run(sys.argv[1:]))"
    new = ["export", runs["vit"], "--thresholds", "1,1", "--format", "openvino", "--out", tmp_path / "new"]
    for words, pip in (
        (new, "pip install 'dist-train[openvino]'"),
        (["bench", "predict", openvino], "pip install openvino"),
    ):
        done = subprocess.run([sys.executable, "-c", without, *words], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert pip in done.stderr
    assert not (tmp_path / "new").exists()
    assert json.loads((openvino / "policy.json").read_text())["runtime"] == "openvino"
