"""Exported folders: complete, equal to the network they were made of, whole or absent; bad input in one line."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import cli, load_model
from dist_train.data.pipeline import Loader
from dist_train.errors import DataError
from dist_train.evaluation.thresholds import point_for_budget, point_for_risk
from dist_train.export import export, parity, programs
from dist_train.export.parity import TIE, Parity, ParityError, _exits, compare
from dist_train.export.readme import readme_text
from dist_train.export.runner import EarlyExit
from dist_train.models import MultiExitNetwork, attach_exits
from dist_train.prediction import Thresholds, predict
from dist_train.prediction.shares import ShareMonitor
from dist_train.training import checkpoint
from shards.index import Index
from tests.common import ROOT, cpu_loader, tree


def policy_of(folder):
    return json.loads((folder / "policy.json").read_text())


def images_of(run, digits):
    """The validation images as evaluation prepares them."""
    _, config = checkpoint.read_meta(checkpoint.find(run))
    index = Index.load(digits / "val")
    loader = cpu_loader(index, digits / "val", config.data, train=False, seed=0, global_batch=360)
    images = next(iter(loader.evaluation())).images.contiguous().clone()
    loader.close()
    return images


def thresholds_of(policy):
    values = [float("inf") if value is None else value for value in policy["thresholds"]]
    return Thresholds(values, policy["measure"], policy["temperatures"], policy["weights"])


def untied(run, policy, images):
    """Which images are surely sure enough, or not: the confidence of the others is a threshold, up to rounding."""
    with torch.inference_mode():
        _, margins = _exits(thresholds_of(policy), load_model(run)(images))
    assert (margins <= TIE).sum() <= 3  # thresholds are confidences of calibration images
    return margins > TIE


@pytest.mark.parametrize("name", ["msdnet", "resnet", "vit"])
def test_programs_stop_where_the_network_stops_and_give_its_logits(name, runs, exported, digits):
    images, policy = images_of(runs[name], digits), policy_of(exported[name])
    expected = predict(load_model(runs[name]), images, thresholds_of(policy))
    network, sure = EarlyExit(exported[name], threads=1), untied(runs[name], policy, images)
    assert len(network.stages) == 3
    for size in (1, 7, 360):
        parts = [network.predict(part.numpy()) for part in images[: 360 if size > 1 else 40].split(size)]
        count = sum(len(part.exits) for part in parts)
        exits, logits = (np.concatenate([getattr(part, field) for part in parts]) for field in ("exits", "logits"))
        same = sure[:count]
        assert (exits - 1 == expected.exits[:count].numpy())[same].all()
        np.testing.assert_allclose(logits[same], expected.logits[:count].numpy()[same], atol=1e-4)
    # Within msdnet's budget, all images may leave at one exit.
    assert len(set(exits.tolist())) > 1 or name == "msdnet"
    classes = np.concatenate([part.classes for part in parts])
    assert (classes == expected.classes.numpy()).mean() == 1
    assert network.predict(images[:0].numpy()).exits.shape == (0,)
    assert policy["parity"]["images"] == 360
    assert policy["parity"]["policy_shares"] == (np.bincount(exits - 1, minlength=3) / 360).tolist()
    assert policy["parity"]["largest_logit_difference"] <= 1e-4


def test_policy_says_what_was_chosen_and_every_file_has_its_hash(runs, exported, digits):
    policy, point = policy_of(exported["msdnet"]), point_for_budget(runs["msdnet"], "0.45M")
    assert policy["thresholds"][:2] == [None if value == float("inf") else value for value in point.policy.values[:2]]
    assert policy["measure"] == point.policy.measure
    assert policy["promise"]["budget"] == 4.5e5
    assert policy["promise"]["cost"] <= 4.5e5
    assert policy["promise"]["top1_interval"][0] <= policy["promise"]["top1"] <= policy["promise"]["top1_interval"][1]
    assert policy["classes"] == list(Index.load(digits / "val").classes)
    assert policy["costs"]["exits"] == sorted(policy["costs"]["exits"])
    assert policy["preprocessing"]["crop"] == 32
    assert policy["shares"]["reference"] == list(point.reference.shares)
    files = {file.name for file in exported["msdnet"].iterdir()}
    assert files == {"policy.json", "predict.py", "README.md", "stage1.onnx", "stage2.onnx", "stage3.onnx"}
    assert policy["files"].keys() == files - {"policy.json"}
    for file, digest in policy["files"].items():
        assert hashlib.sha256((exported["msdnet"] / file).read_bytes()).hexdigest() == digest
    assert {"opset", "torch", "onnx", "onnxruntime"} <= policy["versions"].keys()
    for stage in policy["stages"]:
        assert b"/dist_train/" not in (exported["msdnet"] / stage).read_bytes()  # no paths of this machine


def test_a_guarantee_is_handed_on(runs, tmp_path):
    assert cli.run(["export", str(runs["msdnet"]), "--risk", "gap", "--out", str(tmp_path / "risk")]) == 0
    policy, point = policy_of(tmp_path / "risk"), point_for_risk(runs["msdnet"], "gap")
    assert policy["thresholds"][:2] == [None if value == float("inf") else value for value in point.policy.values[:2]]
    assert [(one["risk"], one["epsilon"]) for one in policy["promise"]["risks"]] == [("gap", 0.1)]
    assert policy["promise"]["delta"] == 0.05
    assert policy["promise"]["precision"] == "fp32"
    text = (tmp_path / "risk/README.md").read_text()
    assert "\nGuaranteed with probability 0.95" in text
    assert "not guaranteed for these programs" not in text
    lower = readme_text(policy | {"precision": "int8"}, [1.0, 2.0, 3.0])
    assert (
        "Of the network in fp32, as it was evaluated; not guaranteed for these programs. Guaranteed with probability 0.95"
        in lower
    )


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_logits_that_are_not_finite_are_no_parity(limit, value):
    parity._check_logits(Parity("val", limit), 0.0, 1.0, "exit 1")
    with pytest.raises(ParityError, match="logits of exit 1 are not finite; not exported"):
        parity._check_logits(Parity("val", limit), abs(np.float32(value) - 1), np.inf, "exit 1")


def test_the_runner_warns_when_the_monitor_of_predict_does(runs, exported):
    reference = point_for_budget(runs["msdnet"], "0.45M").reference
    network = EarlyExit(exported["msdnet"])
    said = set()
    for counts in (
        [5, 3, 1],
        [300, 30, 30],
        [30, 30, 300],
        [0, 0, 40],
        [0, 400, 0],
        [round(360 * s) for s in reference.shares],
    ):
        monitor = ShareMonitor(reference)
        monitor.add(np.repeat(np.arange(3), counts))
        network.counts = np.array(counts)
        assert bool(network.warning()) == bool(monitor.warning()), counts
        said.add(bool(network.warning()))
    assert said == {True, False}


def test_nothing_is_left_when_the_programs_are_not_the_network(runs, exported, tmp_path, monkeypatch, capsys):
    staged = MultiExitNetwork.staged

    def damaged(network, image_size):
        stages = staged(network, image_size)
        with torch.no_grad():
            next(value for name, value in stages.stages[1].named_buffers() if "weight" in name).mul_(1.01)
        return stages

    monkeypatch.setattr(MultiExitNetwork, "staged", damaged)
    shutil.copytree(exported["resnet"], tmp_path / "before")
    before = tree(tmp_path)
    for out in ("new", "before"):
        assert cli.run(["export", str(runs["resnet"]), "--thresholds", "0.5,0.4", "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "logits of exit 2 differ by" in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("unlabeled", [1, 0])
def test_accuracy_is_that_of_the_labeled_images(unlabeled, runs, exported, digits):
    """Where every second image, or every one, has no label."""
    network, (_, config) = load_model(runs["resnet"]), checkpoint.read_meta(checkpoint.find(runs["resnet"]))
    policy, hits = thresholds_of(policy_of(exported["resnet"])), []

    def batches():
        for images, labels, files in export._batches(config.data, Index.load(digits / "val"), np.arange(360)):
            labels = torch.where(torch.arange(len(labels)) % 2 < unlabeled, labels, -1)
            with torch.no_grad():
                hits.append(torch.stack([one.argmax(1) == labels for one in network(images)])[:, labels >= 0])
            yield images, labels, files

    found = compare(network, policy, EarlyExit(exported["resnet"]), batches(), "val").to_json()
    assert (found["images"], found["labeled"]) == (360, 180 * unlabeled)
    expected = torch.cat(hits, dim=1).double().mean(1).tolist()
    assert found["top1"] == (pytest.approx(expected) if unlabeled else [None] * 3)
    assert (found["policy_top1"] is None) == (not unlabeled)


def test_what_cannot_be_read_is_not_said_to_be_unwritable(runs, digits, tmp_path, monkeypatch):
    _, config = checkpoint.read_meta(checkpoint.find(runs["resnet"]))
    shutil.copytree(digits, tmp_path / "digits")
    index, encoded = Index.load(tmp_path / "digits/val"), Loader.encoded

    def emptied(loader, sample):  # once its pixels are there: how far the loader has read ahead is a matter of luck
        for shard in index.shards:
            (tmp_path / "digits/val" / shard.name).write_bytes(b"")
        return encoded(loader, sample)

    monkeypatch.setattr(Loader, "encoded", emptied)
    with pytest.raises(DataError, match=r"val: an image cannot be read again \(the shard ends"):
        list(export._batches(config.data.model_copy(update={"shards": tmp_path / "digits"}), index, np.arange(60)))


def test_a_folder_that_cannot_be_written_is_no_missing_operator(tmp_path):
    network = attach_exits(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), ["0"], 5, image_size=8)
    with pytest.raises(OSError, match="No such file or directory"):
        programs.write_programs(network.eval().staged(8), 8, tmp_path / "missing")


class Bessel(nn.Module):
    def forward(self, features):
        return torch.special.bessel_j0(features)


@pytest.mark.parametrize("options", [["--format", "onnx-if"], ["--triton"]])
def test_drafts_lie_beside_the_folder_and_go(options, runs, tmp_path, monkeypatch):
    """A full /tmp is nothing to an export, and a full disk is said to be that of the folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    command = ["export", str(runs["msdnet"]), "--budget", "0.45M", *options, "--out", str(tmp_path / "new/exported")]
    assert cli.run(command) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["exported"]
    assert not [path for path in (tmp_path / "new/exported").rglob("*") if path.name.startswith(("tmp", "."))]


def test_an_operator_that_onnx_has_not_is_named(tmp_path):
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), Bessel(), nn.Flatten(), nn.Linear(4 * 36, 5))
    network = attach_exits(backbone, ["0"], 5, image_size=8).eval()
    with pytest.raises(programs.ConfigError, match=r"stage 2 cannot be written as ONNX: .*bessel_j0"):
        programs.write_programs(network.staged(8), 8, tmp_path)


def test_bad_input_is_one_line(runs, refused, tmp_path):
    msdnet, resnet = runs["msdnet"], runs["resnet"]
    assert "no thresholds are given; give --budget or --risk" in refused("export", resnet)
    assert "there is no report to take the thresholds from" in refused("export", resnet, "--budget", "1M")
    assert "--budget is 1k, but the cheapest point" in refused("export", msdnet, "--budget", "1k")
    assert "has no guarantee of cost" in refused("export", msdnet, "--risk", "cost")
    assert "4 thresholds are given for 3 exits" in refused("export", msdnet, "--thresholds", "1,1,1,1")
    assert "the current folder, which an export would replace" in refused(
        "export", msdnet, "--thresholds", "1,1", "--out", "."
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").touch()
    assert "photos: exists and is no export" in refused(
        "export", msdnet, "--thresholds", "1,1", "--out", tmp_path / "photos"
    )
    assert "invalid choice: 'pickle'" in refused("export", msdnet, "--thresholds", "1,1", "--format", "pickle")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("library", programs.EXPORTERS)
def test_a_library_that_is_not_installed_is_named(runs, library, tmp_path):
    without = (
        f"import sys; sys.modules[{library!r}] = None; from dist_train import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", without, "export", runs["vit"], "--thresholds", "1,1", "--out", tmp_path / "new"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"needs {library}, which" in done.stderr
    assert "pip install 'dist-train[export]'" in done.stderr
    assert not (tmp_path / "new").exists()
