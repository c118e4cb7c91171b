"""Training on a WebDataset made elsewhere is training on our own shards of the same images."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train.data.pipeline import Loader
from shards import sources
from shards.foreign import index_folder
from shards.index import Index
from shards.make import ShardSize, make

MakeLoader = Callable[..., Loader]


def repack(ours: Path, theirs: Path) -> None:
    """The same samples as another tool packs them: another tar format, labels in JSON, other names and order in a sample."""
    index = Index.load(ours)
    for number, shard in enumerate(index.shards):
        data = (ours / shard.name).read_bytes()
        with tarfile.open(theirs / f"data-train-{number:03d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in (index.shard == number).nonzero()[0]:
                image = data[index.offset[sample] : index.offset[sample] + index.size[sample]]
                note = json.dumps({"about": {"label": index.classes[index.label[sample]]}, "name": "é" * 200}).encode()
                for ext, content in (("json", note), (index.ext[sample].decode(), image)):
                    info = tarfile.TarInfo(f"images/é{sample:09d}.{ext}")
                    info.size, info.mtime = len(content), 1.5  # type: ignore[assignment]
                    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("augment", ["resized_crop", "none"])
def test_order_and_pixels_are_those_of_our_own_shards(
    augment: str, photo_folder: Path, tmp_path: Path, make_loader: MakeLoader
) -> None:
    for number, path in enumerate(sorted(photo_folder.rglob("*.*"))[:60]):
        (tmp_path / "in" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "in" / "ab"[number % 2])
    (made,) = make(sources.folder(tmp_path / "in"), tmp_path / "ours", ShardSize(samples=13))
    (tmp_path / "theirs").mkdir()
    repack(made.folder, tmp_path / "theirs")
    (found,) = index_folder(tmp_path / "theirs", tmp_path / "index", field="about.label", workers=2)
    assert found.index.classes == made.index.classes == ("a", "b")
    options = {"image_size": 48, "augment": augment, "global_batch": 20, "micro_batch": 10}
    loaders = [make_loader(one.folder, **options) for one in (made, found)]
    for epoch in (0, 3):
        ours, theirs = ([micro for batch in loader.epoch(epoch) for micro in batch] for loader in loaders)
        assert len(ours) == len(theirs) == 6
        for one, other in zip(ours, theirs):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.images, other.images)
