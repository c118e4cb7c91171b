"""Shards behind a URL: a real HTTP server, and fsspec's local and memory file systems."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.cli import run
from dist_train.config import DataConfig
from dist_train.data import remote
from dist_train.data.order import epoch_order
from dist_train.data.pipeline import Loader
from dist_train.errors import ConfigError, DataError
from shards.index import Index

MakeLoader = Callable[..., Loader]


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts requests, and gives `damaged[path]` many wrong answers for a path before the right one."""

    def __init__(self, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.damaged: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.counts[self.path] += 1
        if server.counts[self.path] <= server.damaged.get(self.path, 0):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"half of a sh")
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(digits: Path) -> Iterator[Server]:
    with Server(digits) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def remote_loader(url: str, cache: Path, *, train: bool = True, **options: Any) -> Loader:
    data = DataConfig(shards=url, cache=cache, **options)
    split = data.train if train else data.val
    return Loader(
        remote.open_index(data, split), data.location(split), data, train=train, seed=5, global_batch=48, micro_batch=16,
        rank=0, world_size=1, device=torch.device("cpu"), threads=1,
    )  # fmt: skip


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


def test_a_small_cache_makes_room_and_gives_the_same(
    server: Server, digits: Path, tmp_path: Path, make_loader: MakeLoader
) -> None:
    ids, images = pixels(make_loader(digits / "train", window=2))
    # What a process that was killed has left neither takes room for ever nor stands in for the shard.
    local = remote._local(DataConfig(shards=server.url, cache=tmp_path), f"{server.url}/train")
    local.mkdir()
    (local / ".shard-000003.tar.999999999.tmp").write_bytes(b"half of a sh")
    largest = max(path.stat().st_size for path in (digits / "train").glob("*.tar"))
    loader = remote_loader(server.url, tmp_path, window=2, cache_gb=5.5 * largest / 1e9)
    most = 0
    read, seen = [], []
    for batch in loader.epoch(1):
        for micro in batch:
            read += micro.ids.tolist()
            seen.append(micro.images)
        most = max(most, len(list(tmp_path.glob("*/*.tar"))))
    loader.close()
    assert read == ids
    assert torch.equal(torch.cat(seen), images)
    assert 2 < most <= 5  # of 15
    assert not list(tmp_path.rglob("*.tmp"))
    # Read in the order of need, a shard comes once although not all fit in.
    assert max(count for path, count in server.counts.items() if path.endswith(".tar")) == 1


def test_shards_are_fetched_ahead_in_the_order_of_need(server: Server, tmp_path: Path) -> None:
    loader = remote_loader(server.url, tmp_path, window=2)
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


def test_what_arrives_damaged_is_fetched_again_and_what_stays_damaged_is_replaced(
    server: Server, digits: Path, tmp_path: Path, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.1, 0.1))
    index = Index.load(digits / "train")
    once, always, gone = (index.shards[number].name for number in (2, 5, 9))
    server.damaged = {f"/train/{once}": 1, f"/train/{always}": 10**6}
    clean, _ = pixels(make_loader(digits / "train"))
    hidden = tmp_path / gone
    os.rename(digits / "train" / gone, hidden)
    try:
        loader = remote_loader(server.url, tmp_path / "cache", max_bad=1000)
        ids, _ = pixels(loader)
    finally:
        os.rename(hidden, digits / "train" / gone)
    assert set(index.shard[list(loader.bad)].tolist()) == {5, 9}
    assert not {5, 9} & set(index.shard[ids].tolist())
    kept = ~np.isin(index.shard[clean], [5, 9])
    assert np.array_equal(np.array(ids)[kept], np.array(clean)[kept])
    assert server.counts[f"/train/{once}"] == 2
    assert f"{once}: it has SHA-256" in caplog.text
    assert any(f"{always}: cannot be fetched (it has SHA-256" in bad.reason for bad in loader.bad.values())
    assert not list((tmp_path / "cache").glob(f"*/{always}"))


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


@pytest.mark.parametrize(
    ("url", "options", "error", "text"),
    [
        ("ftpx://host/set", {}, ConfigError, "data.shards takes s3://, gs:// or https://"),
        ("http://127.0.0.1:9/set", {}, DataError, "cannot be fetched"),
        ("{url}/none", {}, DataError, "has no index.json; give the URL of a folder"),
        ("{url}", {"cache_gb": 1e-6}, ConfigError, r"data.cache_gb is 1e-06, but 17 shards .* raise it, or lower"),
    ],
)
def test_urls_that_do_not_work(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    options: dict[str, float],
    error: Any,
    text: str,
) -> None:
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))
    with pytest.raises(error, match=text) as caught:
        remote_loader(url.format(url=server.url), tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_a_run_trains_and_evaluates_from_a_url(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {
        "name": "r", "runs": str(tmp_path / "runs"), "tracking": {"uri": "off"},
        "data": {"shards": server.url, "cache": str(tmp_path / "cache"), "flip": False},
        "model": {"exits": 2, "growth": 2, "initial_channels": 4, "base": 1, "step": 1, "head_width": 8},
        "train": {"epochs": 1, "max_steps": 3},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(fields))
    assert run(["train", str(tmp_path / "r.yaml")]) == 0
    assert run(["eval", str(tmp_path / "runs" / "r"), "--shards", server.url]) == 0
    assert "360 images, each once" in capsys.readouterr().out
