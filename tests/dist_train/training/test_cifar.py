"""Photographs: the configuration for little data learns from shards of all of CIFAR-10's images."""

import json
import tarfile

from dist_train.tracking.metrics import read_metrics
from shards.index import Index
from tests.common import ROOT

CONFIG = ROOT / "configs" / "cifar10_150_msdnet.yaml"


def test_cifar10_with_150_images_per_class_is_learnt_on_two_ranks(test_data, tmp_path, command):
    with tarfile.open(test_data / "data" / "cifar10-images.tar.gz") as archive:
        archive.extractall(tmp_path / "images", filter="data")
    made = command("shards", "make", "folder", tmp_path / "images", tmp_path / "all", "--val-per-class", 500)
    assert made.returncode == 0, made.stderr
    assert [len(Index.load(tmp_path / "all" / split)) for split in ("train", "val", "test")] == [45000, 5000, 10000]
    few = ["--per-class", 150, "--val-per-class", 50]
    assert command("shards", "make", "folder", tmp_path / "images", tmp_path / "few", *few).returncode == 0

    words = [
        "launch.local",
        "-n",
        2,
        CONFIG,
        "--data.shards",
        tmp_path / "few",
        "--runs",
        tmp_path,
        "--train.epochs",
        5,
    ]
    # In bfloat16 a CPU without instructions for it takes five times as long.
    result = command(*words, "--train.precision", "fp32", "--tracking.uri", "off", "--tracking.log_every", 15)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "cifar10_150_msdnet"
    losses = [e["metrics"]["train/loss"] for e in read_metrics(run / "metrics.jsonl") if "train/loss" in e["metrics"]]
    assert losses[-1] < losses[0] - 0.1
    report = json.loads((run / "report.json").read_text())
    assert report["images"] == 500
    # Chance is 10 %, and the spread of 500 guesses 1.3 %.
    assert all(one["top1"] > 0.2 for one in report["exits"]), report
