"""Shards behind a URL: a real HTTP server, and fsspec's local and memory file systems."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.cli import run
from dist_train.config import DataConfig
from dist_train.data import remote
from dist_train.data.passes import epoch_order
from dist_train.data.pipeline import Loader
from dist_train.data.split import open_index, open_training
from dist_train.errors import ConfigError, DataError, StorageError
from dist_train.evaluation.evaluate import _exists
from dist_train.evaluation.split import Images, check_disjoint
from shards.index import Index
from tests.common import cpu_loader
from tests.dist_train.data.shard_server import Server

MakeLoader = Callable[..., Loader]


def remote_loader(url: str, cache: Path, *, train: bool = True, **options: Any) -> Loader:
    data = DataConfig(shards=url, cache=cache, **options)
    split = data.train if train else data.val
    return cpu_loader(
        open_index(data, split), data.location(split), data, train=train, seed=5, global_batch=48, micro_batch=16
    )


def pixels(loader: Loader, epoch: int = 1) -> tuple[list[int], torch.Tensor]:
    micros = [micro for batch in loader.epoch(epoch) for micro in batch]
    loader.close()
    return torch.cat([micro.ids for micro in micros]).tolist(), torch.cat([micro.images for micro in micros])


def read_everything(url: str, cache: Path) -> list[int]:
    return pixels(remote_loader(url, cache))[0]


def test_processes_of_a_node_fetch_each_shard_once_and_read_what_is_there(
    server: Server, digits: Path, tmp_path: Path, make_loader: MakeLoader, ranks: Any
) -> None:
    ids, images = pixels(make_loader(digits / "train"))
    assert ranks(read_everything, 3, server.url, tmp_path / "cache") == [ids] * 3
    shards = {f"/train/{path.name}": 1 for path in (digits / "train").glob("*.tar")}
    assert {path: count for path, count in server.counts.items() if path.endswith(".tar")} == shards
    # Another run fetches the index alone.
    again, remote_images = pixels(remote_loader(server.url, tmp_path / "cache"))
    assert again == ids
    assert torch.equal(remote_images, images)
    assert {path: server.counts[path] for path in shards} == shards
    assert server.counts["/train/index.json"] == 4
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_mixture_of_urls_and_folders_is_that_of_folders(server: Server, digits: Path, tmp_path: Path) -> None:
    def mixture(number: int, *places: Path | str) -> tuple[list[int], torch.Tensor]:
        parts = [
            {"shards": str(place), "where": f'class_name {word} ["0", "1"]', "weight": weight}
            for place, word, weight in zip(places, ("in", "not in"), (2, 1))
        ]
        data = DataConfig.model_validate({"shards": digits, "cache": tmp_path / str(number), "train": parts})
        index = open_training(data, Index.load(digits / "val").classes)
        locations = data.training_locations
        return pixels(cpu_loader(index, locations, data, train=True, seed=5, global_batch=48, micro_batch=16))

    ids, images = mixture(0, digits, digits)
    for number, places in enumerate([(server.url, digits), (digits, server.url), (server.url, server.url)], start=1):
        server.counts.clear()
        found, same = mixture(number, *places)
        assert found == ids
        assert same.equal(images)
        assert server.counts["/train/shard-000000.tar"] == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_small_cache_makes_room_and_gives_the_same(
    late: bool, server: Server, digits: Path, tmp_path: Path, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain = remote.ShardCache._obtain

    def obtain_late(cache: remote.ShardCache, shard: int, wait: bool) -> Path:
        if not wait:  # a thread that fetches ahead on a busy machine
            time.sleep(0.2)
        return obtain(cache, shard, wait)

    if late:
        monkeypatch.setattr(remote.ShardCache, "_obtain", obtain_late)
    ids, images = pixels(make_loader(digits / "train", shuffle_shards=2))
    # What a process that was killed has left neither takes room forever nor stands in for the shard.
    local = remote.local_folder(DataConfig(shards=server.url, cache=tmp_path), f"{server.url}/train")
    local.mkdir()
    (local / f".{'a' * 16}-shard-000003.tar.999999999.tmp").write_bytes(b"half of a sh")
    others = tmp_path / "photos" / "shard-000000.tar"  # in a folder that serves for other things as well
    others.parent.mkdir()
    others.write_bytes(b"somebody's")
    making = others.with_name(".shard-000001.tar.12.tmp")
    making.touch()
    largest = max(path.stat().st_size for path in (digits / "train").glob("*.tar"))
    loader = remote_loader(server.url, tmp_path, shuffle_shards=2, cache_gb=5.5 * largest / 1e9)
    most = 0
    read, seen = [], []
    for batch in loader.epoch(1):
        for micro in batch:
            read += micro.ids.tolist()
            seen.append(micro.images)
        # Under the lock of what makes room, since a look at a folder that changes can see a file and its successor.
        with remote._lock(tmp_path / ".room.lock"):
            most = max(most, sum(path.stat().st_size for path in tmp_path.glob("*/*-*-*.tar")))
    loader.close()
    assert others.read_bytes() == b"somebody's"
    assert sorted(others.parent.iterdir()) == [making, others]
    assert read == ids
    assert torch.equal(torch.cat(seen), images)
    assert 2 * largest < most <= 5.5 * largest  # of 15
    assert list(tmp_path.rglob("*.tmp")) == [making]
    # Read in the order of need, a shard comes once although not all fit in.
    assert max(count for path, count in server.counts.items() if path.endswith(".tar")) == 1


def test_shards_are_fetched_ahead_in_the_order_of_need(server: Server, tmp_path: Path) -> None:
    loader = remote_loader(server.url, tmp_path, shuffle_shards=2)
    next(loader.epoch(0))
    assert loader._cache is not None
    for thread in loader._cache._threads:
        thread.join(0.2)
    for _ in range(100):
        if len(list(tmp_path.glob("*/*.tar"))) == 15:
            break
        threading.Event().wait(0.1)
    loader.close()
    fetched = [path for path in server.counts if path.endswith(".tar")]
    index = Index.load(loader._index.folder or tmp_path)
    wanted = index.shard[epoch_order(index.shard_sizes, 5, 0, 2)]
    order = [f"/train/{index.shards[shard].name}" for shard in dict.fromkeys(wanted.tolist())]
    assert sorted(fetched) == sorted(order)
    # Four at a time, so up to that many places apart.
    assert max(abs(order.index(path) - place) for place, path in enumerate(fetched)) <= 4


@pytest.mark.usefixtures("no_pauses")
def test_what_arrives_damaged_is_fetched_again_and_what_stays_damaged_is_replaced(
    server: Server, digits: Path, tmp_path: Path, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    index = Index.load(digits / "train")
    once, always = (index.shards[number].name for number in (2, 5))
    server.damaged = {f"/train/{once}": 1, f"/train/{always}": 10**6}
    clean, _ = pixels(make_loader(digits / "train"))
    loader = remote_loader(server.url, tmp_path / "cache", max_unreadable=1000)
    ids, _ = pixels(loader)
    assert set(index.shard[list(loader.bad)].tolist()) == {5}
    assert 5 not in index.shard[ids]
    kept = index.shard[clean] != 5
    assert np.array_equal(np.array(ids)[kept], np.array(clean)[kept])
    assert server.counts[f"/train/{once}"] == 2
    assert server.counts[f"/train/{always}"] == 3  # and not for each of its images
    assert f"{once}: it has SHA-256" in caplog.text
    assert any(f"{always}: cannot be used (it has SHA-256" in bad.reason for bad in loader.bad.values())
    assert not list((tmp_path / "cache").glob(f"*/*{always}"))


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("status", [503, 404, 403])
def test_a_shard_that_cannot_be_fetched_is_an_outage_and_no_bad_image(
    server: Server, digits: Path, tmp_path: Path, make_loader: MakeLoader, status: int
) -> None:
    index = Index.load(digits / "train")
    clean, _ = pixels(make_loader(digits / "train", shuffle_shards=1))
    lost = index.shards[index.shard[clean[700]]].name
    server.refused = {f"/train/{lost}": status}
    loader = remote_loader(server.url, tmp_path, shuffle_shards=1)
    read: list[int] = []

    def train() -> None:
        for batch in loader.epoch(1):
            for micro in batch:
                read.extend(micro.ids.tolist())

    with pytest.raises(StorageError, match=rf"{lost}.* run the same command again") as caught:
        train()
    loader.close()
    assert caught.value.exit_code == 1  # a retry may cure it
    assert not loader.bad
    assert len(read) > 500
    assert read == clean[: len(read)]
    # The same command, once it is back.
    server.refused = {}
    again, _ = pixels(remote_loader(server.url, tmp_path, shuffle_shards=1))
    assert again == clean


def test_closing_does_not_wait_for_a_download(server: Server, digits: Path, tmp_path: Path) -> None:
    begun, release = threading.Event(), threading.Event()
    for shard in Index.load(digits / "train").shards:
        server.before[f"/train/{shard.name}"] = lambda: (begun.set(), release.wait(60))
    loader = remote_loader(server.url, tmp_path)
    batch = next(loader.epoch(0))
    errors: list[Exception] = []

    def read() -> None:
        try:
            next(iter(batch))
        except StorageError as error:
            errors.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    assert begun.wait(60)
    assert loader._cache is not None
    loader._cache.close()
    reading.join()
    loader.close()
    assert not release.is_set()
    assert "was closed while" in str(*errors)
    release.set()


def test_copies_are_found_among_images_that_nobody_has_fetched_yet(
    server: Server, digits: Path, tmp_path: Path
) -> None:
    data = DataConfig(shards=server.url, cache=tmp_path / "cache")
    behind = Images(open_index(data, "val"), data, "val")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    here = Images(Index.load(digits / "val"), DataConfig(shards=digits), "val")
    with pytest.raises(DataError, match=r"360 images of val are in val as well.*or --calibration val to hold out half"):
        check_disjoint(behind, here)
    # The split that calibrates by default is looked for behind the URL as well.
    assert _exists(data, "val")
    assert not _exists(data, "test")


def test_other_file_systems(digits: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    import fsspec

    ids, images = pixels(make_loader(digits / "train"))
    memory = fsspec.filesystem("memory")
    memory.put(str(digits / "train"), "/set/train", recursive=True)
    for url in (f"file://{digits}", "memory://set/"):
        read, remote_images = pixels(remote_loader(url, tmp_path / url[:3]))
        assert read == ids
        assert torch.equal(remote_images, images)
    loader = remote_loader(f"file://{digits}", tmp_path, train=False)
    assert sum(len(micro.ids) for micro in loader.evaluation()) == 360
    loader.close()


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    ("url", "options", "error", "text"),
    [
        ("ftpx://host/set", {}, ConfigError, "data.shards takes s3://, gs:// or https://"),
        ("http://127.0.0.1:9/set", {}, StorageError, "cannot be fetched .* check the URL and the network"),
        ("{url}/none", {}, DataError, "has no index.json; give the URL of a folder"),
        ("{url}", {"cache_gb": 1e-6}, ConfigError, r"data.cache_gb is 1e-06, but 17 shards .* raise it, or lower"),
    ],
)
def test_urls_that_do_not_work(
    server: Server,
    tmp_path: Path,
    url: str,
    options: dict[str, float],
    error: Any,
    text: str,
) -> None:
    with pytest.raises(error, match=text) as caught:
        remote_loader(url.format(url=server.url), tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_an_order_that_would_fetch_shards_again_and_again_is_refused_before_it_does(
    digits: Path, tmp_path: Path
) -> None:
    index = Index.load(digits / "train")
    (tmp_path / "set").mkdir()
    shutil.copytree(digits / "train", tmp_path / "set" / "train")
    # One image in twenty is of the other classes, which come as often: ten rounds and more through all shards at once.
    rare = np.where(np.arange(len(index)) % 20, np.minimum(index.label, 1), index.label)
    replace(index, label=rare).save(tmp_path / "set" / "train")
    largest = max(shard.bytes for shard in index.shards) / 1e9
    url, options = f"file://{tmp_path / 'set'}", {"shuffle_shards": 2, "cache_gb": 5.5 * largest}
    whole = sum(shard.bytes for shard in index.shards) / 1e9
    with pytest.raises(
        ConfigError, match=rf"would fetch \d+ shards, .* GB; raise it to {whole:.3g}, which holds all"
    ) as caught:
        remote_loader(url, tmp_path / "cache", class_balanced=True, **options)
    assert "\n" not in str(caught.value)
    for others in ({}, {"class_balanced": True, "cache_gb": 1.01 * whole}):
        remote_loader(url, tmp_path / "cache", **options | others).close()


def test_a_run_trains_and_evaluates_from_a_url(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {
        "name": "r",
        "runs": str(tmp_path / "runs"),
        "tracking": {"uri": "off"},
        "data": {"shards": server.url, "cache": str(tmp_path / "cache"), "flip": False},
        "model": {"exits": 2, "growth": 2, "initial_channels": 4, "base": 1, "step": 1, "head_width": 8},
        "train": {"epochs": 1, "max_steps": 3},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(fields))
    assert run(["train", str(tmp_path / "r.yaml")]) == 0
    assert run(["eval", str(tmp_path / "runs" / "r"), "--shards", server.url]) == 0
    assert "360 images, each once" in capsys.readouterr().out
