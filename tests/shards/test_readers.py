"""Other programs read our shards: webdataset and DALI's own reader, with equal images and labels."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import sources
from shards.__main__ import main
from shards.images import KEEP, Encoding
from shards.index import Index
from shards.make import ShardSize, make

Samples = dict[str, tuple[int, bytes]]


@pytest.fixture(scope="module", params=["digits", "photos", "photos re-encoded", "subset copied"])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "digits":
        make(sources.digits(), folder / "out", ShardSize(samples=100))
        return folder / "out" / "val"
    if request.param == "subset copied":
        make(sources.digits(), folder / "digits", ShardSize(samples=100))
        assert main(["subset", str(folder / "digits"), str(folder / "out"), "--labels-per-class", "9", "--copy"]) == 0
        return folder / "out" / "train"
    root = os.environ.get("DIST_TRAIN_TEST_DATA")
    if not root:
        pytest.skip("DIST_TRAIN_TEST_DATA does not say where imagenet-250.tar is")
    with tarfile.open(Path(root, "data", "imagenet-250.tar")) as tar:
        for number, member in enumerate(m for m in tar if m.isfile()):
            content = tar.extractfile(member)
            assert content is not None
            path = folder / "in" / f"class {number % 12}" / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    encoding = Encoding(max_size=64) if request.param.endswith("re-encoded") else KEEP
    make(sources.folder(folder / "in"), folder / "out", ShardSize(samples=100), encoding=encoding)
    return folder / "out" / "train"


def by_index(split: Path) -> Samples:
    """Key to label and decoded pixels, as the index says."""
    index = Index.load(split)
    samples = {}
    for sample in range(len(index)):
        with open(split / index.shards[index.shard[sample]].name, "rb") as file:
            file.seek(index.offset[sample])
            image = Image.open(io.BytesIO(file.read(index.size[sample])))
            assert image.size == (index.width[sample], index.height[sample])
            samples[index.key[sample].decode()] = (int(index.label[sample]), np.asarray(image.convert("RGB")).tobytes())
    assert len(samples) == len(index)
    return samples


def tars(split: Path) -> list[str]:
    return sorted(str(path) for path in split.glob("*.tar"))


def test_webdataset_reads_them(split: Path) -> None:
    import webdataset

    dataset = (
        webdataset.WebDataset(tars(split), shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg;png", "cls")
    )
    read = {key: (label, pixels.tobytes()) for key, pixels, label in dataset}
    assert read == by_index(split)


def test_dali_reads_them_with_our_index(split: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    ending = Index.load(split).ext[0].decode()

    @pipeline_def(batch_size=50, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> object:
        raw, label = fn.readers.webdataset(
            paths=tars(split),
            index_paths=[path.removesuffix("tar") + "idx" for path in tars(split)],
            ext=[ending, "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        return fn.decoders.image(raw, output_type=types.RGB, adjust_orientation=False), label

    pipe = pipeline()
    pipe.build()
    index = Index.load(split)
    assert pipe.epoch_size("reader") == len(index)
    read: list[tuple[int, bytes]] = []
    while len(read) < len(index):
        images, labels = pipe.run()
        read += [(int(bytes(label)), np.asarray(image).tobytes()) for image, label in zip(images, labels)]
    assert read[: len(index)] == list(by_index(split).values())
