"""One ONNX graph that stops by itself: it computes no further than the exit taken, and decides as prediction does."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dist_train import cli, load_model
from dist_train.export.programs import write_program
from dist_train.export.runner import EarlyExit
from dist_train.export.single_graph import _Decision
from dist_train.prediction import Thresholds, predict
from dist_train.prediction.confidence import HISTORY_MEASURES, MEASURES
from tests.dist_train.export.test_export import images_of, policy_of, thresholds_of, untied


@pytest.fixture(scope="module")
def graph(runs, tmp_path_factory):
    """Folder of the export."""
    folder = tmp_path_factory.mktemp("graph") / "msdnet"
    words = ["export", str(runs["msdnet"]), "--budget", "0.45M", "--format", "onnx-if", "--out", str(folder)]
    assert cli.run(words) == 0
    return folder


def test_it_takes_the_exits_of_the_network_and_gives_its_logits(graph, runs, exported, digits, elsewhere, tmp_path):
    images, policy = images_of(runs["msdnet"], digits), policy_of(graph)
    expected = predict(load_model(runs["msdnet"]), images, thresholds_of(policy))
    network = EarlyExit(graph, threads=1)
    result = network.predict(images.numpy())
    sure = untied(runs["msdnet"], policy, images)
    assert (result.exits - 1 == expected.exits.numpy())[sure].all()
    np.testing.assert_allclose(result.logits[sure], expected.logits.numpy()[sure], atol=1e-4)
    assert network.counts.tolist() == np.bincount(result.exits - 1, minlength=3).tolist()
    assert network.predict(images[:0].numpy()).exits.shape == (0,)
    stages = policy_of(exported["msdnet"])
    assert {key: policy[key] for key in ("thresholds", "measure", "promise", "costs")} == {
        key: stages[key] for key in ("thresholds", "measure", "promise", "costs")
    }
    assert policy["parity"]["policy_shares"] == stages["parity"]["policy_shares"]
    assert policy["files"].keys() == {"network.onnx", "predict.py", "README.md"}
    assert b"/dist_train/" not in (graph / "network.onnx").read_bytes()  # no paths of this machine
    assert "One ONNX program in fp32 with 3 exits" in (graph / "README.md").read_text()
    done = elsewhere(graph / "predict.py", tmp_path / "none.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.png" in done.stderr


def test_what_is_behind_an_exit_is_computed_in_a_branch_alone(graph):
    def operators(part, depth=0):
        for node in part.node:
            inner = [one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
            yield depth, node.op_type
            for branch in inner:
                yield from operators(branch, depth + 1)

    found = list(operators(onnx.load(str(graph / "network.onnx")).graph))
    assert [depth for depth, name in found if name == "If"] == [0, 1]
    convolutions = [depth for depth, name in found if name == "Conv"]
    assert set(convolutions) == {0, 1, 2}


@pytest.mark.parametrize("measure", [*MEASURES, *HISTORY_MEASURES])
def test_decisions_are_those_of_prediction(measure, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = [[1.0, -0.5, 2.0, 0.3, 0.1, -1.0]] * 4
    policy = Thresholds([0.5] * 3, measure, [0.7, 1.0, 2.5, 1.0], weights)
    number, thresholds = 2, torch.tensor([0.0, 0.0, 0.5])
    example = (torch.randn(1, 4), torch.zeros(1, number, dtype=torch.int64), thresholds)
    write_program(_Decision(policy, number), example, None, tmp_path / "one.onnx", "a decision")
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    taken = set()
    for row in range(40):
        logits = torch.randn(1, 4, generator=generator) * (200 if row == 0 else 3)
        before = torch.randint(0, 2, (1, number), generator=generator)
        classes = torch.cat([before, logits.argmax(1, keepdim=True)], dim=1)
        score = policy.scores(number, logits, classes).item()
        for threshold in (score - 1e-5, score + 1e-5):
            thresholds = np.array([0, 0, threshold], np.float32)
            leaves, after = session.run(None, dict(zip(names, (logits.numpy(), before.numpy(), thresholds))))
            assert bool(leaves) == (threshold < score)
            taken.add(bool(leaves))
            np.testing.assert_array_equal(after, classes.numpy())
    assert taken == {True, False}


def test_it_is_not_timed_as_stages_are(graph, refused):
    assert "is one graph that stops by itself" in refused("bench", "predict", graph)
    assert json.loads((graph / "policy.json").read_text())["graph"] == "network.onnx"
