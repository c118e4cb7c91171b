from __future__ import annotations

import gc
import io
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.data.decode import Decoder
from dist_train.data.pipeline import GlobalBatch, Loader, MicroBatch
from dist_train.data.reader import ShardReader
from dist_train.errors import DataError, DeviceError, StorageError
from shards.index import UNLABELED, Index

MakeLoader = Callable[..., Loader]


def flat(batches: Iterable[GlobalBatch]) -> list[MicroBatch]:
    return [micro for batch in batches for micro in batch]


def ids(micros: list[MicroBatch]) -> list[int]:
    return torch.cat([micro.ids for micro in micros]).tolist()


def images(micros: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([micro.images for micro in micros])


def expected_order(clean: list[int], bad: set[int], order: list[int]) -> list[int]:
    """The clean run's ids with every bad one replaced by the next good one of the epoch's order."""
    place = {sample: position for position, sample in enumerate(order)}

    def good(sample: int) -> int:
        while sample in bad:
            sample = order[(place[sample] + 1) % len(order)]
        return sample

    return [good(sample) for sample in clean]


@pytest.fixture
def damaged(digits: Path, tmp_path: Path) -> tuple[Path, set[int]]:
    """The training digits with 3 images overwritten in three ways, 2 of them neighbours in epoch 0's order."""
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    index = Index.load(folder)
    order = order_of_epoch_0(folder)
    samples = [order[100], order[101], order[700]]
    for sample, kind in zip(samples, ("garbage", "zeros", "cut")):
        size = int(index.size[sample])
        content = {"garbage": b"<html>no image</html>".ljust(size), "zeros": bytes(size), "cut": None}[kind]
        with open(folder / index.shards[index.shard[sample]].name, "r+b") as file:
            file.seek(int(index.offset[sample]) + (size // 2 if kind == "cut" else 0))
            file.write(bytes(size - size // 2) if content is None else content)
    return folder, set(samples)


def order_of_epoch_0(folder: Path) -> list[int]:
    from dist_train.data.passes import epoch_order

    return epoch_order(Index.load(folder).shard_sizes, 5, 0, 16).tolist()


def test_bad_images_are_replaced_by_the_next_of_the_order(
    digits: Path, damaged: tuple[Path, set[int]], make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    folder, bad = damaged
    clean = flat(make_loader(digits / "train").epoch(0))
    loader = make_loader(folder)
    read = flat(loader.epoch(0))
    expected = expected_order(ids(clean), bad, order_of_epoch_0(folder))
    assert ids(read) == expected
    assert sum(a != b for a, b in zip(ids(clean), expected)) == 3
    # Everything else is untouched, and a replacement looks as it does at its own place.
    pixels = dict(zip(ids(clean), images(clean)))
    assert all(torch.equal(image, pixels[sample]) for sample, image in zip(ids(read), images(read)))
    index = Index.load(folder)
    assert torch.cat([micro.labels for micro in read]).tolist() == index.label[expected].tolist()
    assert all(micro.images.is_contiguous(memory_format=torch.channels_last) for micro in read)
    assert loader.bad.keys() == bad
    for sample in bad:
        assert f"{index.shards[index.shard[sample]].name}: {index.key[sample].decode()}.png: " in caplog.text
    assert len(caplog.records) == 3


def test_replacement_is_the_same_in_resumed_runs_and_on_any_number_of_ranks(
    damaged: tuple[Path, set[int]], make_loader: MakeLoader
) -> None:
    folder, _ = damaged
    whole = flat(make_loader(folder).epoch(0))
    for start in (2, 3):
        rest = flat(make_loader(folder).epoch(0, start_batch=start))
        assert ids(rest) == ids(whole)[48 * start :]
        assert torch.equal(images(rest), images(whole)[48 * start :])
    loaders = [make_loader(folder, rank=rank, world_size=3) for rank in range(3)]
    together = [micro for group in zip(*(loader.epoch(0) for loader in loaders)) for micro in flat(group)]
    assert ids(together) == ids(whole)
    assert torch.equal(images(together), images(whole))


def test_replacement_keeps_the_number_of_labeled_samples(
    damaged: tuple[Path, set[int]], make_loader: MakeLoader
) -> None:
    folder, bad = damaged
    index = Index.load(folder)
    label = np.where(
        (np.arange(len(index)) % 4 == 0) | np.isin(np.arange(len(index)), list(bad)), index.label, UNLABELED
    )
    replace(index, label=label).save(folder)
    for batch in make_loader(folder).epoch(0):
        labels = torch.cat([micro.labels for micro in batch])
        assert batch.labeled == int((labels != UNLABELED).sum())


def test_bad_images_are_masked_in_evaluation(
    digits: Path, tmp_path: Path, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(digits / "val", tmp_path / "val")
    index = Index.load(tmp_path / "val")
    with open(tmp_path / "val" / index.shards[0].name, "r+b") as file:
        file.seek(int(index.offset[37]))
        file.write(b"nothing")
    clean = list(make_loader(digits / "val", train=False).evaluation())
    loader = make_loader(tmp_path / "val", train=False)
    for _ in range(2):
        read = list(loader.evaluation())
    assert ids(read) == [*range(37), -1, *range(38, 360)]
    labels = torch.cat([micro.labels for micro in read])
    assert labels[37] == -100
    good = torch.arange(360) != 37
    assert torch.equal(images(read)[good], images(clean)[good])
    assert labels[good].tolist() == index.label[good.numpy()].tolist()
    assert list(loader.bad) == [37]
    # A later pass counts what it could not read itself, and what was named is not named again.
    assert caplog.text.count("unreadable image") == 1
    shutil.copy(digits / "val" / index.shards[0].name, tmp_path / "val")
    assert ids(list(loader.evaluation())) == list(range(360))
    assert not loader.bad


def test_too_many_bad_images_stop_with_the_list(damaged: tuple[Path, set[int]], make_loader: MakeLoader) -> None:
    folder, bad = damaged
    assert len(flat(make_loader(folder, max_unreadable=3).epoch(0))) == 87
    with pytest.raises(DataError, match=r"3 images cannot be read, data\.max_unreadable is 2") as caught:
        flat(make_loader(folder, max_unreadable=2).epoch(0))
    index = Index.load(folder)
    assert all(index.key[sample].decode() in str(caught.value) for sample in bad)
    assert "\n" not in str(caught.value)


def test_a_truncated_shard_has_bad_images(digits: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    index = Index.load(folder)
    cut = int(index.offset[index.shard.searchsorted(6) + 90]) + 10
    os.truncate(folder / index.shards[6].name, cut)
    bad = set(np.flatnonzero((index.shard == 6) & (index.offset + index.size > cut)).tolist())
    assert len(bad) == 10
    clean = ids(flat(make_loader(digits / "train").epoch(0)))
    loader = make_loader(folder, max_unreadable=10)
    assert ids(flat(loader.epoch(0))) == expected_order(clean, bad, order_of_epoch_0(folder))
    assert all("the shard ends" in bad_sample.reason for bad_sample in loader.bad.values())
    with pytest.raises(DataError, match="the shard ends"):
        flat(make_loader(folder, max_unreadable=9, last_batch="wrap").epoch(0))


@pytest.mark.parametrize("fault", ["gone", "unreadable"])
def test_a_file_system_that_is_lost_stops_the_run_and_damages_no_image(
    digits: Path, tmp_path: Path, make_loader: MakeLoader, fault: str
) -> None:
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    lost = folder / Index.load(folder).shards[3].name
    lost.unlink()
    if fault == "unreadable":
        lost.mkdir()  # which opens, and cannot be read
    for train in (True, False):
        loader = make_loader(folder, train=train, max_unreadable=1000)
        with pytest.raises(StorageError, match=f"{lost}: cannot be read .* run the same command again") as caught:
            flat(loader.epoch(0)) if train else list(loader.evaluation())
        assert caught.value.exit_code == 1  # a retry may cure it
        assert not loader.bad


def test_a_shard_that_changes_under_a_running_epoch(digits: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    batches = make_loader(folder, max_unreadable=20).epoch(0)
    clean = flat(make_loader(digits / "train").epoch(0))
    first = list(next(batches))
    for path in folder.glob("*.tar"):
        os.truncate(path, 0)
    assert ids(first) == ids(clean)[:48]
    with pytest.raises(
        DataError, match=r"21 images cannot be read, data\.max_unreadable is 20.*was changed while it was in use"
    ):
        flat(batches)


def test_a_split_without_a_readable_image_stops_training(digits: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    index = Index.load(digits / "val")
    for name in ("index.json", "index.bin"):
        shutil.copy(digits / "val" / name, tmp_path)
    for shard in index.shards:
        (tmp_path / shard.name).touch()
    loader = make_loader(tmp_path, max_unreadable=10_000)
    with pytest.raises(DataError, match="no image can be read"):
        flat(loader.epoch(0))
    assert len(loader.bad) == len(index)


def test_a_read_that_fails_once_is_repeated(digits: Path) -> None:
    index = Index.load(digits / "train")
    reader = ShardReader(index, digits / "train")
    before = reader.read(0)
    for descriptor in reader._open.values():
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor.number)
    assert np.array_equal(reader.read(0), before)
    reader.close()


def test_a_cut_photo_is_bad(photo_folder: Path, photos: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    for path in photos.iterdir():
        if path.suffix == ".tar":
            (tmp_path / path.name).symlink_to(path)
    index = Index.load(photos)
    size = index.size.copy()
    size[17] -= 20
    size[40] = 300
    replace(index, size=size).save(tmp_path)
    clean = list(make_loader(photos, train=False, image_size=64).evaluation())
    loader = make_loader(tmp_path, train=False, image_size=64)
    read = list(loader.evaluation())
    assert list(loader.bad) == [17, 40]
    assert "truncated" in loader.bad[17].reason
    good = [sample for sample in range(250) if sample not in (17, 40)]
    assert torch.equal(images(read)[good], images(clean)[good])
    assert not images(read)[17].any()


def test_an_image_of_another_size_than_the_index_says_is_bad_or_fits(
    photos: Path, tmp_path: Path, make_loader: MakeLoader
) -> None:
    # A crop window that reaches out of the image must not stop the run, nor give pixels of elsewhere.
    for path in photos.iterdir():
        if path.suffix == ".tar":
            (tmp_path / path.name).symlink_to(path)
    index = Index.load(photos)
    width, height = index.width.copy(), index.height.copy()
    width[9] = height[9] = 9000
    replace(index, width=width, height=height).save(tmp_path)
    loader = make_loader(tmp_path, image_size=64, augment="resized_crop", last_batch="wrap")
    read = ids(flat(loader.epoch(0)))
    assert 9 not in read
    assert list(loader.bad) == [9]


def test_a_gif_in_foreign_shards_is_bad_not_fatal(digits: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    shutil.copytree(digits / "val", tmp_path / "val")
    index = Index.load(tmp_path / "val")
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "GIF")
    assert len(file.getvalue()) <= index.size[5]
    with open(tmp_path / "val" / index.shards[0].name, "r+b") as tar:
        tar.seek(int(index.offset[5]))
        tar.write(file.getvalue())
    loader = make_loader(tmp_path / "val", train=False)
    assert ids(list(loader.evaluation()))[5] == -1
    assert loader.bad[5].reason == "the decoder cannot read it (nvImageCodec failure: '#4')"


def test_reading_by_many_threads_gives_each_sample_its_own_bytes(digits: Path) -> None:
    # With fewer shards kept open than are in use, files are closed and opened again under the threads all the time.
    index = Index.load(digits / "train")
    samples = np.random.default_rng(0).permutation(len(index)).tolist()
    gc.collect()  # what earlier tests have left open must not be closed in between
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(index, digits / "train", threads=8, keep_open=2)
    read = reader.read_all(samples, failed=lambda sample: np.empty(0, dtype=np.uint8))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    for sample, raw in zip(samples, read, strict=True):
        with open(digits / "train" / index.shards[index.shard[sample]].name, "rb") as file:
            file.seek(index.offset[sample])
            assert raw.tobytes() == file.read(index.size[sample])


def test_a_shard_replaced_by_another_file_is_read_on_and_one_overwritten_is_named(
    digits: Path, tmp_path: Path, make_loader: MakeLoader
) -> None:
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    clean = flat(make_loader(digits / "train").epoch(0))
    loader = make_loader(folder)
    batches = loader.epoch(0)
    read = list(next(batches))
    index = Index.load(folder)
    # Renamed over, as a new copy of the shards is: the open file goes on.
    sample = order_of_epoch_0(folder)[1300]
    for number, shard in enumerate(index.shards):
        if number != index.shard[sample]:
            shutil.copy(folder / shard.name, tmp_path / "new.tar")
            os.replace(tmp_path / "new.tar", folder / shard.name)
    # Written over in place, an image that comes late.
    with open(folder / index.shards[index.shard[sample]].name, "r+b") as file:
        file.seek(int(index.offset[sample]))
        file.write(b"nothing")
    read += flat(batches)
    assert ids(read) == expected_order(ids(clean), {sample}, order_of_epoch_0(folder))
    assert "the shard was changed while it was in use" in loader.bad[sample].reason


NVJPEG = "Critical error in pipeline:\nError in MIXED operator `fn.decoders.image`,\nencountered:\n\n{}\nCurrent pipeline object is no longer valid."


def test_an_image_that_the_gpu_refuses_and_the_cpu_reads_stops_the_run(
    damaged: tuple[Path, set[int]], make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bad = damaged
    loader = make_loader(folder)
    # The CPU plays a GPU that decodes; what is damaged is refused by both, and stays a bad image.
    loader._spare._pipeline = loader._spare._build()
    loader._spare.on_gpu = True
    read = flat(loader.epoch(0))
    assert loader.bad.keys() == bad

    plays_gpu = {id(loader._decoder), id(loader._spare)}
    decode = Decoder._tensor

    def refuse(self: Decoder, pipeline: Any) -> torch.Tensor:
        images = decode(self, pipeline)
        if id(self) in plays_gpu:
            raise RuntimeError(NVJPEG.format("Failed to decode sample #0 :"))
        return images

    monkeypatch.setattr(Decoder, "_tensor", refuse)
    loader.bad.clear()
    with pytest.raises(DeviceError, match="the images are not to blame: Failed to decode sample #0"):
        flat(loader.epoch(0))
    assert len(read) == 87
    assert not loader.bad


def test_the_pipeline_of_a_split_is_built_once(
    digits: Path, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = Decoder._build
    monkeypatch.setattr(Decoder, "_build", lambda self: built.append(self) or build(self))
    loader, evaluation = make_loader(digits / "train"), make_loader(digits / "val", train=False)
    for epoch in range(3):
        flat(loader.epoch(epoch))
        list(evaluation.evaluation())
    assert built == [loader._decoder, evaluation._decoder]
