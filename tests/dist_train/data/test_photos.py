from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dist_train.config import DataConfig
from dist_train.data import augment
from dist_train.data.decode import Decoder
from dist_train.data.pipeline import Loader
from dist_train.data.reader import ShardReader
from shards.index import Index

MakeLoader = Callable[..., Loader]
MEAN, STD = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255


def picture(index: Index, reader: ShardReader, sample: int) -> Image.Image:
    return Image.open(io.BytesIO(reader.read(sample).tobytes())).convert("RGB")


def levels(images: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: [N, S, S, 3] in levels of 0 to 255."""
    return images.permute(0, 2, 3, 1).numpy() * STD + MEAN


def compare(found: np.ndarray, expected: list[Image.Image]) -> tuple[float, float, float]:
    """Mean difference, largest one, and largest one off the outer ring of pixels, in levels of 255."""
    difference = np.abs(found - np.stack([np.asarray(image, dtype=np.float64) for image in expected]))
    return difference.mean(), difference.max(), difference[:, 1:-1, 1:-1].max()


def test_decoding_a_window_is_pil_to_the_bit(photos: Path) -> None:
    index = Index.load(photos)
    reader = ShardReader(index, photos)
    assert len(index) == 250
    sizes = np.stack([index.height, index.width], axis=1).astype(np.int64)
    assert (sizes >= 64).all()
    anchor = augment.centre((sizes - 64) // 3).astype(np.int32)
    columns = {
        "raw": [reader.read(sample) for sample in range(250)],
        "anchor": anchor,
        "shape": np.full((250, 2), 64, dtype=np.int32),
    }
    data = DataConfig(shards=photos, image_size=64)
    (images,) = Decoder(data, ("anchor", "shape"), 250, torch.device("cpu"), threads=1, depth=1).run([columns])
    assert isinstance(images, torch.Tensor)
    pictures = [picture(index, reader, sample) for sample in range(250)]
    assert {Image.open(io.BytesIO(raw.tobytes())).mode for raw in columns["raw"]} >= {"RGB", "L"}
    cut = [image.crop((x, y, x + 64, y + 64)) for image, (y, x) in zip(pictures, anchor.tolist())]
    assert np.array_equal(np.rint(levels(images)), np.stack([np.asarray(image) for image in cut]))


def test_resized_crops_agree_with_pil(photos: Path, make_loader: MakeLoader) -> None:
    index = Index.load(photos)
    reader = ShardReader(index, photos)
    loader = make_loader(photos, image_size=96, augment="resized_crop", global_batch=50, micro_batch=25)
    micros = [micro for batch in loader.epoch(2) for micro in batch]
    samples = torch.cat([micro.ids for micro in micros]).numpy()
    sizes = np.stack([index.height, index.width], axis=1)[samples].astype(np.int64)
    anchors, shapes = augment.resized_crops(5, 2, samples, sizes, (0.08, 1.0), (3 / 4, 4 / 3))
    flips = augment.flips(5, 2, samples)
    expected = []
    for sample, (y, x), (height, width), flip in zip(samples, anchors.tolist(), shapes.tolist(), flips):
        image = picture(index, reader, int(sample)).crop((x, y, x + width, y + height))
        image = image.resize((96, 96), Image.Resampling.BILINEAR)
        expected.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)
    mean, largest, inside = compare(levels(torch.cat([micro.images for micro in micros])), expected)
    print(f"resized crop against PIL, of 255: mean {mean:.3f}, largest {largest:.1f}, off the edge {inside:.1f}")
    assert mean < 0.35
    assert inside < 2
    assert largest < 30


def test_evaluation_view_agrees_with_pil(photos: Path, make_loader: MakeLoader) -> None:
    index = Index.load(photos)
    reader = ShardReader(index, photos)
    loader = make_loader(photos, train=False, image_size=224, eval_resize=256, micro_batch=32)
    expected, found = [], []
    for micro in loader.evaluation():
        found.append(levels(micro.images))
        for sample in micro.ids.tolist():
            image = picture(index, reader, sample)
            width, height = image.size
            short = min(width, height)
            image = image.resize((int(256 * width / short), int(256 * height / short)), Image.Resampling.BILINEAR)
            left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
            expected.append(image.crop((left, top, left + 224, top + 224)))
    mean, largest, inside = compare(np.concatenate(found), expected)
    print(f"evaluation view against PIL, of 255: mean {mean:.3f}, largest {largest:.1f}, off the edge {inside:.1f}")
    assert mean < 0.35
    assert inside < 2
    assert largest < 30


def test_pad_crop_of_other_sizes_shows_what_lies_beside_the_centre(photos: Path, make_loader: MakeLoader) -> None:
    index = Index.load(photos)
    reader = ShardReader(index, photos)
    micro = next(iter(next(iter(make_loader(photos, image_size=32, crop_padding=4, flip=False).epoch(0)))))
    shifts = augment.shifts(5, 0, micro.ids.numpy(), 4)
    for image, sample, (shift_y, shift_x) in zip(levels(micro.images), micro.ids.tolist(), shifts.tolist()):
        whole = picture(index, reader, sample)
        short = min(whole.size)
        whole = whole.resize((int(32 * whole.width / short), int(32 * whole.height / short)), Image.Resampling.BILINEAR)
        y, x = round((whole.height - 32) / 2) + shift_y, round((whole.width - 32) / 2) + shift_x
        canvas = np.pad(np.asarray(whole, dtype=np.float64), ((4, 4), (4, 4), (0, 0)), constant_values=np.nan)
        canvas = np.where(np.isnan(canvas), MEAN, canvas)
        expected = canvas[4 + y : 36 + y, 4 + x : 36 + x]
        assert np.abs(image - expected).mean() < 0.5


@pytest.mark.parametrize("other", [{"micro_batch": 7, "global_batch": 49}, {"threads": 3}, {"prefetch": 4}])
def test_pixels_of_photos_do_not_depend_on_batching(
    photos: Path, make_loader: MakeLoader, other: dict[str, int]
) -> None:
    def by_id(**options: int) -> dict[int, torch.Tensor]:
        varied = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "rand_augment": (2, 9), "random_erasing": 0.5}
        loader = make_loader(photos, image_size=64, augment="resized_crop", **varied, **options)
        return {
            sample: image
            for batch in loader.epoch(1)
            for micro in batch
            for sample, image in zip(micro.ids.tolist(), micro.images)
        }

    plain, varied = by_id(), by_id(**other)
    both = plain.keys() & varied.keys()
    assert len(both) > 180
    assert all(torch.equal(plain[sample], varied[sample]) for sample in both)


def equalized(image: Image.Image) -> Image.Image:
    """Histogram equalisation as OpenCV defines it, which DALI follows; PIL rounds its steps to whole pixels."""
    channels = []
    for channel in image.split():
        ranks = np.cumsum(channel.histogram())
        first = ranks[ranks > 0][0]
        table = np.rint(np.maximum(0, ranks - first) * 255 / (ranks[-1] - first))
        channels.append(channel.point(table.astype(int).tolist()))
    return Image.merge("RGB", channels)


def test_rand_augment_does_what_pil_does(photos: Path) -> None:
    index, reader = Index.load(photos), ShardReader(Index.load(photos), photos)
    data = DataConfig(shards=photos, image_size=64, augment="resized_crop", rand_augment=(1, 20))
    window = {"anchor": np.full((14, 2), 40, dtype=np.int32), "shape": np.full((14, 2), 64, dtype=np.int32)}
    columns = {"raw": [reader.read(3)] * 14, **window}
    columns |= {"operations": np.arange(14, dtype=np.int32)[:, None], "signs": np.zeros((14, 1), dtype=np.int32)}
    (images,) = Decoder(data, list(columns)[1:], 14, torch.device("cpu"), threads=1, depth=1).run([columns])
    assert isinstance(images, torch.Tensor)
    image = picture(index, reader, 3).crop((40, 40, 104, 104))
    shift, shear, grey = 20 / 30 * round(64 * 100 / 224), 0.2, (128, 128, 128)

    def moved(matrix: tuple[float, ...]) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey)

    expected = [
        moved((1, 0, -shift, 0, 1, 0)),
        moved((1, 0, 0, 0, 1, -shift)),
        moved((1, -shear, 0, 0, 1, 0)),
        moved((1, 0, 0, -shear, 1, 0)),
        image.rotate(20, Image.Resampling.BILINEAR, fillcolor=grey),
        ImageEnhance.Brightness(image).enhance(1.6),
        ImageEnhance.Contrast(image).enhance(1.6),
        ImageEnhance.Color(image).enhance(1.6),
        ImageEnhance.Sharpness(image).enhance(1.6),
        ImageOps.posterize(image, 5),
        ImageOps.solarize(image, round(256 / 3)),
        equalized(image),
        ImageOps.autocontrast(image),
        image,
    ]
    found = levels(images)[:, 4:-4, 4:-4]
    apart = [np.abs(a - np.asarray(b, dtype=np.float64)[4:-4, 4:-4]).mean() for a, b in zip(found, expected)]
    print("mean difference from PIL by operation:", np.round(apart, 2).tolist())
    assert max(apart) < 1
    changed = [np.abs(a - found[-1]).mean() for a in found[:-1]]
    assert min(changed) > 1
