"""``dist-train bench data`` and ``bench order``: what they compare is the same work, and what they say is so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_train.bench import data, order
from dist_train.cli import run


@pytest.fixture(scope="module")
def split(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    data._make_shards(photo_folder, 600, folder)
    return folder / "shards" / "train"


@pytest.mark.parametrize("way", list(data.WAYS))
def test_every_way_gives_the_images_of_an_epoch(split: Path, way: str) -> None:
    make_pass = data.WAYS[way](split, 1)
    for _ in range(2):
        batches = list(make_pass())
        assert 576 - 64 <= sum(batches) <= 600  # webdataset leaves out each worker's incomplete batch
        assert set(batches[:-1]) == {64}


def test_bench_data_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.tar").write_text("no tar")
    for path, text in ((tmp_path / "x.tar", "is not a tar"), (tmp_path / "none", "no JPEGs there")):
        assert run(["bench", "data", "--images", str(path)]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


def test_bench_order_counts_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = np.full(4, 64)
    shard = np.repeat(np.arange(4), 64)
    ordered, row = np.arange(256), order.reading(np.arange(256), shard, 1)
    assert (row["longest_run"], row["shards_opened_per_rank"]) == (256, 4)
    assert row["megabytes_per_shard_and_rank"] == pytest.approx(64 * 0.11)
    # Two ranks of 32 take turns: whole shards halved, in stretches of 32.
    row = order.reading(ordered, shard, 2)
    assert (row["longest_run"], row["shards_opened_per_rank"]) == (32, 4)
    assert order.shards_per_batch(shard) == 4
    assert order.spread(shard, sizes) == pytest.approx(np.arange(64).std())
    assert run(["bench", "order", "--samples", "20000", "--shards", "40", "--window", "40"]) == 0
    assert "spread over 100.00 %" in capsys.readouterr().out
    assert run(["bench", "order", "--samples", "2"]) == 2
