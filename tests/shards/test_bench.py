"""The benchmark of shards runs through and writes what it has measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_train import cli
from dist_train.bench import shards as bench


def test_bench_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "INDEX_SAMPLES", 5000)
    path = tmp_path / "result.json"
    words = ["bench", "shards", "--count", "12", "--rounds", "1", "--folder", str(tmp_path), "--json", str(path)]
    assert cli.run(words) == 0
    document = json.loads(path.read_text())
    assert {"tar", "make, 1 worker", "webdataset.ShardWriter", "check, 1 worker"} <= {
        row["way"] for row in document["rows"]
    }
    assert all(row["images_per_cpu_second"] > 0 for row in document["rows"])
    assert document["ratios"]["make / tar, per core"] > 0
    assert "an index of 5000 samples" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]
    assert cli.run(["bench", "shards", "--images", str(path)]) == 2
    assert "is neither a folder nor a tar" in capsys.readouterr().err
