from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data import augment
from dist_train.data.passes import epoch_order
from dist_train.data.pipeline import GlobalBatch, Loader, MicroBatch
from shards import sources
from shards.index import UNLABELED, Index
from shards.make import ShardSize, make

MakeLoader = Callable[..., Loader]


def flat(batches: Iterable[GlobalBatch]) -> list[MicroBatch]:
    return [micro for batch in batches for micro in batch]


def images(micros: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([micro.images for micro in micros])


def ids(micros: list[MicroBatch]) -> list[int]:
    return torch.cat([micro.ids for micro in micros]).tolist() if micros else []


def test_epoch_follows_the_order_with_the_right_labels(digits: Path, make_loader: MakeLoader) -> None:
    loader = make_loader(digits / "train", shuffle_shards=3)
    index = Index.load(digits / "train")
    batches = list(loader.epoch(4))
    assert [batch.number for batch in batches] == list(range(loader.order.steps_per_epoch)) == list(range(1437 // 48))
    assert all(batch.labeled == 48 for batch in batches)
    micros = flat(loader.epoch(4))
    expected = epoch_order(index.shard_sizes, 5, 4, 3)[: 48 * 29]
    assert ids(micros) == expected.tolist()
    assert torch.cat([micro.labels for micro in micros]).tolist() == index.label[expected].tolist()
    first = micros[0]
    assert first.images.shape == (16, 3, 32, 32)
    assert first.images.dtype == torch.float32
    assert first.labels.dtype == first.ids.dtype == torch.int64
    assert first.images.is_contiguous(memory_format=torch.channels_last)


def test_wrap_fills_the_last_batch_from_the_start(digits: Path, make_loader: MakeLoader) -> None:
    read = ids(flat(make_loader(digits / "train", last_batch="wrap").epoch(0)))
    assert len(read) == 48 * 30
    assert sorted(read[:1437]) == list(range(1437))
    assert read[1437:] == read[:3]


@pytest.mark.parametrize(
    "other",
    [
        {"micro_batch": 48},
        {"micro_batch": 5},
        {"threads": 3},
        {"prefetch": 1},
        {"prefetch": 5},
        {"global_batch": 36, "micro_batch": 12},
    ],
)
def test_pixels_do_not_depend_on_how_they_are_batched(
    digits: Path, make_loader: MakeLoader, other: dict[str, int]
) -> None:
    plain = flat(make_loader(digits / "train").epoch(2))
    varied = flat(make_loader(digits / "train", **other).epoch(2))
    number = min(len(ids(plain)), len(ids(varied)))
    assert ids(plain)[:number] == ids(varied)[:number]
    assert torch.equal(images(plain)[:number], images(varied)[:number])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_same_micro_batches(digits: Path, make_loader: MakeLoader, world_size: int) -> None:
    alone = flat(make_loader(digits / "train", micro_batch=8).epoch(1))
    loaders = [
        make_loader(digits / "train", micro_batch=8, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    together = [micro for group in zip(*(loader.epoch(1) for loader in loaders)) for micro in flat(group)]
    assert [micro.ids.tolist() for micro in together] == [micro.ids.tolist() for micro in alone]
    assert torch.equal(images(together), images(alone))


def test_an_epoch_goes_on_where_it_was_left(digits: Path, make_loader: MakeLoader) -> None:
    whole = flat(make_loader(digits / "train").epoch(3))
    loader = make_loader(digits / "train")
    begun = []
    for batch in loader.epoch(3):
        begun += list(batch)
        if batch.number == 6:
            break
    rest = flat(make_loader(digits / "train").epoch(3, start_batch=7))
    assert ids(begun) + ids(rest) == ids(whole)
    assert torch.equal(torch.cat([images(begun), images(rest)]), images(whole))
    # The loader that was left midway begins anew, and a second pass is like the first one.
    for _ in range(2):
        assert torch.equal(images(flat(loader.epoch(3))), images(whole))
    assert list(loader.epoch(3, start_batch=29)) == []


def test_a_batch_that_is_not_used_up_does_not_shift_the_next(digits: Path, make_loader: MakeLoader) -> None:
    whole = flat(make_loader(digits / "train").epoch(0))
    firsts = [next(iter(batch)).ids.tolist() for batch in make_loader(digits / "train").epoch(0)]
    assert firsts == [micro.ids.tolist() for micro in whole[::3]]


def test_epochs_and_seeds_give_other_pixels(digits: Path, make_loader: MakeLoader) -> None:
    loader = make_loader(digits / "train")
    by_epoch = []
    for epoch in (0, 1):
        micros = flat(loader.epoch(epoch))
        by_epoch.append(dict(zip(ids(micros), images(micros))))
    both = by_epoch[0].keys() & by_epoch[1].keys()
    same = sum(torch.equal(by_epoch[0][sample], by_epoch[1][sample]) for sample in both)
    assert same < 0.02 * len(both)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_counts_each_image_once(digits: Path, make_loader: MakeLoader, world_size: int) -> None:
    index = Index.load(digits / "val")
    read, pixels = [], []
    for rank in range(world_size):
        loader = make_loader(digits / "val", train=False, rank=rank, world_size=world_size)
        for _ in range(2):
            micros = list(loader.evaluation())
        assert all(len(micro.ids) <= 16 for micro in micros)
        assert all(np.array_equal(micro.labels, index.label[micro.ids]) for micro in micros)
        read += ids(micros)
        pixels.append(images(micros))
    assert read == list(range(360))
    assert torch.allclose(torch.cat(pixels)[::50], reference(digits / "val", range(0, 360, 50)), atol=1e-6)


def test_a_rank_without_a_share_gets_nothing(tmp_path: Path, make_loader: MakeLoader) -> None:
    (tmp_path / "images" / "one").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "images" / "one" / f"{number}.png")
    make(sources.folder(tmp_path / "images"), tmp_path / "shards", ShardSize(samples=9))
    read = []
    for rank in range(3):
        micros = list(make_loader(tmp_path / "shards" / "train", train=False, rank=rank, world_size=3).evaluation())
        read.append(ids(micros))
    assert sorted(len(share) for share in read) == [0, 1, 1]
    assert read[0] + read[1] + read[2] == [0, 1]


def test_labeled_samples_are_counted_over_all_ranks(digits: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    index = Index.load(digits / "train")
    label = np.where(np.arange(len(index)) % 3 == 0, index.label, UNLABELED)
    for path in (digits / "train").glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    replace(index, label=label).save(tmp_path)
    for rank in range(2):
        whole = flat(make_loader(tmp_path).epoch(0))
        counts = [batch.labeled for batch in make_loader(tmp_path, rank=rank, world_size=2, micro_batch=12).epoch(0)]
        labels = torch.cat([micro.labels for micro in whole]).reshape(-1, 48)
        assert counts == (labels != UNLABELED).sum(1).tolist()
        assert len(set(counts)) > 1


def test_training_and_evaluation_take_turns(digits: Path, make_loader: MakeLoader) -> None:
    plain = flat(make_loader(digits / "train").epoch(0))
    train, val = make_loader(digits / "train"), make_loader(digits / "val", train=False)
    micros = []
    for batch in train.epoch(0):
        micros += list(batch)
        if batch.number % 10 == 0:
            assert len(ids(list(val.evaluation()))) == 360
    assert torch.equal(images(micros), images(plain))


def reference(folder: Path, samples: Iterable[int]) -> torch.Tensor:
    """Images as they are, normalised, by PIL and numpy."""
    index, data = Index.load(folder), DataConfig(shards=folder)
    pictures = []
    for sample in samples:
        with open(folder / index.shards[index.shard[sample]].name, "rb") as file:
            file.seek(index.offset[sample])
            raw = file.read(index.size[sample])
        path = folder.parent / "picture"
        path.write_bytes(raw)
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
        pictures.append((pixels - 255 * np.float32(data.mean)) / (255 * np.float32(data.std)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def test_pad_crop_mirrors_and_shifts_over_the_mean_colour(digits: Path, make_loader: MakeLoader) -> None:
    micro = flat(make_loader(digits / "train", crop_padding=4).epoch(1))[0]
    plain = reference(digits / "train", micro.ids.tolist())
    flips = augment.flips(5, 1, micro.ids.numpy())
    shifts = augment.shifts(5, 1, micro.ids.numpy(), 4)
    assert set(flips.tolist()) == {0, 1}
    for image, source, flip, (y, x) in zip(micro.images, plain, flips, shifts):
        padded = torch.nn.functional.pad(source.flip(2) if flip else source, (4, 4, 4, 4))
        expected = padded[:, 4 + y : 36 + y, 4 + x : 36 + x]
        assert torch.equal(image == 0, expected == 0)
        assert torch.allclose(image, expected, atol=1e-6)


def test_augment_none_is_the_evaluation_view(digits: Path, make_loader: MakeLoader) -> None:
    micros = flat(make_loader(digits / "train", augment="none").epoch(1))[:2]
    assert torch.allclose(images(micros), reference(digits / "train", ids(micros)), atol=1e-6)


def test_orientation_tags_are_not_applied(tmp_path: Path, make_loader: MakeLoader) -> None:
    (tmp_path / "images" / "one").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "images" / "one" / "turned.jpg", exif=exif, quality=100)
    make(sources.folder(tmp_path / "images"), tmp_path / "shards", ShardSize(samples=9))
    index = Index.load(tmp_path / "shards" / "train")
    assert (index.width[0], index.height[0]) == (40, 24)
    (micro,) = make_loader(tmp_path / "shards" / "train", train=False, image_size=24).evaluation()
    whole = reference(tmp_path / "shards" / "train", [0])
    assert torch.allclose(micro.images, whole[..., 8:32], atol=1e-6)


def test_mixed_repeated_batches_are_the_same_on_any_number_of_ranks_and_resumed(
    digits: Path, tmp_path: Path, make_loader: MakeLoader
) -> None:
    index = Index.load(digits / "train")
    for path in (digits / "train").glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    replace(index, label=np.where(np.arange(len(index)) % 5 == 0, index.label, UNLABELED)).save(tmp_path)
    options = {"labeled_fraction": 0.25, "repeated_augment": 2, "class_balanced": True, "micro_batch": 8}
    batches = [(batch.labeled, list(batch)) for batch in make_loader(tmp_path, **options).epoch(1)]
    assert {labeled for labeled, _ in batches} == {12}
    whole = [micro for _, micros in batches for micro in micros]
    labels = torch.cat([micro.labels for micro in whole]).reshape(-1, 48)
    assert set((labels != UNLABELED).sum(1).tolist()) == {12}
    # The second half of a global batch has the images of the first in other variations.
    twins = [torch.cat([micro.images for micro in whole[number : number + 6]]) for number in range(0, 12, 6)]
    assert [micro.ids.tolist() for micro in whole[:3]] == [micro.ids.tolist() for micro in whole[3:6]]
    for images_of_batch in twins:
        assert sum(torch.equal(a, b) for a, b in zip(images_of_batch[:24], images_of_batch[24:])) <= 2

    loaders = [make_loader(tmp_path, rank=rank, world_size=3, **options) for rank in range(3)]
    together = [micro for group in zip(*(loader.epoch(1) for loader in loaders)) for micro in flat(group)]
    assert ids(together) == ids(whole)
    assert torch.equal(images(together), images(whole))
    rest = flat(make_loader(tmp_path, **options).epoch(1, start_batch=4))
    assert torch.equal(images(rest), images(whole)[4 * 48 :])
