"""The index of shards behind a URL: what belongs to it, what changes meanwhile, and what a server gives instead of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_train.config import DataConfig
from dist_train.data.split import open_index
from dist_train.errors import DataError
from shards.index import Index
from shards.make import ShardSize, make_samples
from shards.quarantine import Bad
from shards.sources import Sample
from tests.common import cpu_loader
from tests.dist_train.data.shard_server import Server, serving
from tests.dist_train.data.test_remote import remote_loader


@pytest.mark.usefixtures("no_pauses")
def test_an_optional_file_may_be_forbidden_and_the_index_may_not(server: Server, tmp_path: Path) -> None:
    # What object stores answer for any missing key to those who may not list the keys.
    server.refused = {"/train/quarantine.json": 403}
    data = DataConfig(shards=server.url, cache=tmp_path)
    assert not open_index(data, "train").quarantine
    assert server.counts["/train/quarantine.json"] == 1
    server.refused = {"/train/index.json": 403}
    with pytest.raises(
        DataError, match=r"index.json: the server forbids it \(403\); check the URL and the credentials"
    ):
        open_index(data, "train")


def grey(folder: Path, first: int) -> None:
    """Shards of ten images, each of one level of grey, from ``first`` on."""
    images = (np.full((8, 8, 3), first + number, np.uint8) for number in range(10))
    samples = (Sample(f"n{number}", "ab"[number % 2], image) for number, image in enumerate(images))
    make_samples(samples, folder, ShardSize(samples=5))


def levels(url: str, cache: Path) -> list[int]:
    """The greys of the images behind a URL, in the order of their ids."""
    data = DataConfig(shards=url, cache=cache, image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    index = open_index(data, "train")
    loader = cpu_loader(index, data.location("train"), data, train=False, seed=0, global_batch=10)
    (micro,) = loader.evaluation()
    loader.close()
    return (255 * micro.images[:, 0, 0, 0]).round().int().tolist()


def test_shards_made_anew_behind_the_same_url_are_not_those_of_the_cache(tmp_path: Path) -> None:
    grey(tmp_path / "set", 0)
    url = f"file://{tmp_path}/set"
    assert sorted(levels(url, tmp_path / "cache")) == list(range(10))
    shutil.rmtree(tmp_path / "set")
    grey(tmp_path / "set", 100)
    assert sorted(levels(url, tmp_path / "cache")) == list(range(100, 110))


def test_an_index_replaced_while_it_is_fetched_is_fetched_again(tmp_path: Path) -> None:
    grey(tmp_path / "set", 0)
    grey(tmp_path / "other", 100)

    def replace_index() -> None:
        shutil.rmtree(tmp_path / "set")
        os.rename(tmp_path / "other", tmp_path / "set")
        server.before.clear()

    with serving(tmp_path / "set") as server:
        server.before["/train/index.bin"] = replace_index
        assert sorted(levels(server.url, tmp_path / "cache")) == list(range(100, 110))


def test_an_index_that_comes_in_parts_is_said_to_come_from_there(server: Server, tmp_path: Path) -> None:
    for name in ("index.json", "index.bin", "quarantine.json"):
        server.counts.clear()
        server.damaged = {f"/train/{name}": 10}
        with pytest.raises(
            DataError, match=rf"\(as it comes from {server.url}/train; look whether its files are whole"
        ):
            open_index(DataConfig(shards=server.url, cache=tmp_path / name), "train")


def test_a_page_in_the_place_of_a_quarantine_list_is_no_list(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "set")
    (tmp_path / "set" / "train" / "quarantine.json").write_text("\n<!doctype html><title>our buckets</title>")
    with serving(tmp_path / "set") as server:
        index = open_index(DataConfig(shards=server.url, cache=tmp_path / "cache"), "train")
    assert not index.quarantine


def test_a_quarantine_list_behind_a_url_keeps_its_images_out(tmp_path: Path) -> None:
    grey(tmp_path / "set", 0)
    index = Index.load(tmp_path / "set" / "train", quarantine=False)
    index.save_quarantine([Bad(3, str(index.key[3]), "cut off")])
    all_but_one = levels(f"file://{tmp_path}/set", tmp_path / "cache")
    assert sorted(all_but_one) == sorted(set(range(10)) - {all_of(tmp_path / "set")[3]})


def all_of(folder: Path) -> list[int]:
    """The greys of a folder's images in the order of their ids in the whole split."""
    (folder / "train" / "quarantine.json").unlink(missing_ok=True)
    return levels(f"file://{folder}", folder / "cache")


def test_an_index_from_elsewhere_does_not_choose_where_the_cache_writes(
    server: Server, digits: Path, tmp_path: Path
) -> None:
    index = Index.load(digits / "train")
    shards = tuple(replace(shard, name=f"../../../{shard.name}") for shard in index.shards)
    hostile = tmp_path / "hostile"
    (hostile / "train").mkdir(parents=True)
    replace(index, shards=shards).save(hostile / "train")
    with pytest.raises(DataError, match=r"names the shard '../../../shard-000000.tar', which is not beside it"):
        remote_loader(f"file://{hostile}", tmp_path / "cache")
    assert not list(tmp_path.rglob("*.tar"))
