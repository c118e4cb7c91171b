"""`bench predict`: it times what it says, the same network with and without exits, and its conclusions follow from the times."""

import importlib.util
import json
import math

import numpy as np
import onnx
import pytest

from dist_train import cli, load_model
from dist_train.bench.exported import ExportRuntime
from dist_train.bench.predict import Combination, Row, _exits
from dist_train.bench.runtimes import TorchRuntime
from dist_train.export.parity import all_logits
from dist_train.models.stages import static_networks
from dist_train.prediction import Thresholds
from dist_train.prediction.timing import read_timing

EXITS = np.array([0, 2, 1, 0, 2, 2, 0])


def test_images_leave_where_the_script_says_in_both_runtimes(runs, exported):
    images = np.random.default_rng(0).standard_normal((7, 3, 32, 32), dtype=np.float32)
    network = load_model(runs["vit"])
    staged = network.staged(32)
    rows = []
    for stage in staged.stages:
        stage.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    torch_runtime = TorchRuntime(staged, static_networks(network, 32), Thresholds([0.5, 0.5]))
    torch_runtime.prepare(images, 1)
    torch_runtime.route(EXITS)
    assert rows == [7, 4, 3]
    onnx_runtime = ExportRuntime(exported["vit"])
    onnx_runtime.prepare(images, 1)
    onnx_runtime.route(EXITS)
    assert onnx_runtime._runner.counts.tolist() == [3, 1, 3]


@pytest.mark.parametrize("name", ["msdnet", "vit"])
def test_programs_cut_off_at_an_exit_give_its_logits_without_the_other_exits(name, exported):
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32), dtype=np.float32)
    runtime = ExportRuntime(exported[name])
    runtime.prepare(images, 1)
    for program, expected in zip(runtime._static, all_logits(runtime._runner, images), strict=True):
        (logits,) = program([images])
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    stages = [(exported[name] / stage).read_bytes() for stage in runtime.policy["stages"]]
    cut_off = [file.read_bytes() for file in runtime._cut_off]
    assert weights(cut_off[0]) == weights(stages[0])
    # Every early exit has at least a linear layer from 8 features to 10 classes.
    assert weights(cut_off[-1]) <= sum(map(weights, stages)) - 2 * 80


def weights(program):
    """Numbers in the weights of an ONNX program."""
    return sum(math.prod(one.dims) for one in onnx.load_model_from_string(program).graph.initializer)


def test_any_stretch_of_images_has_the_shares():
    shares = [0.5, 0.2, 0.3]
    for first in (0, 17, 1000):
        counts = np.bincount(_exits(shares, first, 100), minlength=3)
        assert np.abs(counts - 100 * np.array(shares)).max() <= 2
    assert np.bincount(_exits([0.0, 1.0, 0.0], 0, 100), minlength=3).tolist() == [0, 100, 0]


def combination(exits, static, policy):
    """With these mean milliseconds."""
    rows = [("exit", n, ms) for n, ms in enumerate(exits, 1)] + [("static", n, ms) for n, ms in enumerate(static, 1)]
    rows += [("policy", None, policy)]
    return Combination(
        "any", 1, 1, "fp32", 9, [Row(kind, n, ms, ms, ms, ms, 0.0, 1000 / ms) for kind, n, ms in rows], 0.0
    )


def test_at_the_break_even_share_exits_cost_what_they_save():
    one = combination([2, 5, 9], [1.5, 4, 8], 6)
    assert one.routing == 1
    for share, early in zip(one.break_even, (2, 5), strict=True):
        assert share * early + (1 - share) * 9 == pytest.approx(8)
    assert combination([8.5, 8.9, 9], [1.5, 4, 8], 6).break_even == [None, None]
    assert combination([2, 5, 7], [1.5, 4, 8], 6).break_even == [0, 0]


def test_the_verdict_compares_with_networks_that_are_as_accurate():
    one = combination([2, 5, 9], [1.5, 4, 8], 6)
    assert one.verdict(None, None) == "early exit pays here: 1.33 times as fast as the whole network without exits"
    assert "pays here: 1.33" in one.verdict([0.5, 0.7, 0.9], 0.8)
    said = one.verdict([0.5, 0.85, 0.9], 0.8)
    assert said.startswith(
        "early exit does not pay here: the network cut off at exit 2, no less accurate, takes 4.00 ms"
    )
    assert "does not pay here: the whole network takes 8.00 ms" in combination([2, 5, 9], [1, 4, 8], 8.1).verdict(
        None, None
    )


def test_a_run_and_an_export_are_measured_and_a_report_takes_the_times(runs, exported, tmp_path, command, capsys):
    files = {name: tmp_path / f"{name}.json" for name in ("run", "export")}
    quick = ["--batch", "1,3", "--threads", "1", "--seconds", "0.1", "--html", str(tmp_path / "page.html")]
    words = ["bench", "predict", str(runs["msdnet"]), "--shares", "0.5,0.3,0.2", "--json", str(files["run"]), *quick]
    assert cli.run(words) == 0
    assert cli.run(["bench", "predict", str(exported["msdnet"]), "--json", str(files["export"]), *quick]) == 0
    said = capsys.readouterr().out
    contents = {name: json.loads(file.read_text()) for name, file in files.items()}
    runtimes = ["torch", "onnxruntime"] + ["openvino"] * (importlib.util.find_spec("openvino") is not None)
    assert [one["runtime"] for one in contents["run"]["combinations"]] == [name for name in runtimes for _ in range(2)]
    policy = json.loads((exported["msdnet"] / "policy.json").read_text())
    assert contents["export"]["top1"] == policy["parity"]["top1"]
    for content in contents.values():
        for one in content["combinations"]:
            kinds = {(row["kind"], row["exit"]) for row in one["rows"]}
            assert kinds == {(kind, n) for kind in ("exit", "static") for n in (1, 2, 3)} | {("policy", None)}
            assert (one["threads"], one["precision"]) == (1, "fp32")
            assert one["rounds"] >= 5
            assert all(0 < row["p50"] <= row["p95"] <= row["p99"] for row in one["rows"])
            assert one["verdict"] in said
            title = f"{one['runtime']}, fp32, 1 thread, batch {one['batch']}, cpu, {one['rounds']} rounds"
            assert title in said
    assert title in (tmp_path / "page.html").read_text()
    timing = read_timing(files["export"], 3)
    assert timing.conditions == "fp32, 1 thread, batch 1, cpu, onnxruntime"
    done = command("dist_train", "eval", runs["msdnet"], "--cost", files["export"], "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [one["milliseconds"] for one in report["exits"]] == timing.milliseconds
    assert {sweep["cost"] for sweep in report["budgeted"]} >= {"milliseconds", "multiply_adds"}


def test_bad_input_is_one_line(runs, exported, refused, tmp_path):
    assert "--shares is '1,1'; give 3 shares that sum to 1" in refused(
        "bench", "predict", runs["vit"], "--shares", "1,1"
    )
    assert "--shares is 'nan,0,1'; give 3 shares" in refused("bench", "predict", runs["vit"], "--shares", "nan,0,1")
    assert "--batch is '0'; give whole numbers" in refused("bench", "predict", runs["vit"], "--batch", "0")
    assert "is an export, which has its policy" in refused("bench", "predict", exported["vit"], "--budget", "1M")
    assert "no checkpoint here" in refused("bench", "predict", tmp_path)
    missing = tmp_path / "missing" / "latency.json"
    assert "cannot be written" in refused("bench", "predict", exported["vit"], "--json", missing)
    (tmp_path / "times.json").write_text("{}")
    assert "is not a file that" in refused("eval", runs["vit"], "--cost", tmp_path / "times.json")
