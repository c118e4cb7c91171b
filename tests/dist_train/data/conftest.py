"""Shards of real images, made once, and loaders over them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import DataConfig
from dist_train.data import remote
from dist_train.data.pipeline import Loader
from shards import sources
from shards.index import Index
from shards.make import ShardSize, make
from tests.dist_train.data.shard_server import Server, serving

MakeLoader = Callable[..., Loader]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,437 training digits in 15 shards, 360 validation digits in 4."""
    folder = tmp_path_factory.mktemp("digits")
    make(sources.digits(), folder, ShardSize(samples=100))
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 ImageNet JPEGs of various sizes, kinds and colour spaces, in two class folders."""
    root = os.environ.get("DIST_TRAIN_TEST_DATA")
    if not root:
        pytest.skip("DIST_TRAIN_TEST_DATA does not say where imagenet-250.tar is")
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(Path(root, "data", "imagenet-250.tar")) as tar:
        for number, member in enumerate(m for m in tar if m.isfile()):
            content = tar.extractfile(member)
            assert content is not None
            path = folder / ("even" if number % 2 == 0 else "odd") / Path(member.name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.read())
    return folder


@pytest.fixture(scope="session")
def photos(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the 250 JPEGs; the folder of their only split."""
    folder = tmp_path_factory.mktemp("photo-shards")
    make(sources.folder(photo_folder), folder, ShardSize(samples=64))
    return folder / "train"


@pytest.fixture
def make_loader() -> Iterator[MakeLoader]:
    """Loaders by folder; keywords are fields of DataConfig or arguments of Loader."""
    made: list[Loader] = []

    def make_one(folder: Path, *, train: bool = True, **options: Any) -> Loader:
        data = {name: options.pop(name) for name in list(options) if name in DataConfig.model_fields}
        arguments: dict[str, Any] = {
            "seed": 5,
            "global_batch": 48,
            "micro_batch": 16,
            "rank": 0,
            "world_size": 1,
            "device": torch.device("cpu"),
            "threads": 1,
        } | options
        made.append(
            Loader(Index.load(folder), folder, DataConfig(shards=folder.parent, **data), train=train, **arguments)
        )
        return made[-1]

    yield make_one
    for loader in made:
        loader.close()


@pytest.fixture
def server(digits: Path) -> Iterator[Server]:
    with serving(digits) as made:
        yield made


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching is tried again at once."""
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0, 0.0))
