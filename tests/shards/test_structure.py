"""Whole pictures are kept, whatever lies behind them; broken ones are told from them as DALI, which trains on them, does."""

from __future__ import annotations

import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.images import Unreadable, decoded_size, encode
from tests.common import saved

Decode = Callable[[bytes], "tuple[int, int] | None"]
VIDEO = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(range(256)) * 200


@pytest.fixture(scope="module")
def photos(test_data: Path) -> list[Image.Image]:
    """40 real photos, small."""
    with tarfile.open(test_data / "data" / "imagenet-250.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()][:40]
        return [Image.open(file).convert("RGB").resize((90, 70)) for file in files if file]


@pytest.fixture(scope="module")
def dali() -> Decode:
    """Width and height as the decoder of training finds them, None where it refuses the image."""
    from nvidia.dali import fn, pipeline_def, types

    fed: list[np.ndarray] = []  # type: ignore[type-arg]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def graph() -> object:
        raw = fn.external_source(lambda: [fed[-1]], dtype=types.UINT8)
        return fn.decoders.image(raw, output_type=types.RGB, adjust_orientation=False)

    def build() -> object:
        pipe = graph()
        pipe.build()
        return pipe

    pipes = [build()]

    def decode(data: bytes) -> tuple[int, int] | None:
        fed.append(np.frombuffer(data, np.uint8))
        try:
            height, width, _ = np.asarray(pipes[-1].run()[0][0]).shape  # type: ignore[attr-defined]
        except RuntimeError:
            pipes.append(build())
            return None
        return width, height

    return decode


def pictures_with_something_behind(photo: Image.Image) -> dict[str, bytes]:
    jpeg, png = saved(photo, "JPEG"), saved(photo, "PNG")
    exif = Image.Exif()
    exif[0x010E] = "thumbnail: " + saved(photo.resize((8, 8)), "JPEG").decode("latin1")
    mpo = saved(photo, "MPO", save_all=True, append_images=[photo.rotate(180)])
    return {
        "motion photo": jpeg + VIDEO,
        "progressive motion photo": saved(photo, "JPEG", progressive=True) + VIDEO,
        "with a thumbnail": saved(photo, "JPEG", exif=exif) + VIDEO,
        "zeros": jpeg + bytes(3000),
        "MPO with a cut second picture": mpo[: -len(jpeg) // 3],
        "restart markers": saved(photo, "JPEG", restart_marker_blocks=2) + VIDEO,
        "PNG": png + VIDEO,
        "PNG, zeros": png + bytes(5),
    }


@pytest.mark.parametrize("kind", pictures_with_something_behind(Image.new("RGB", (90, 70))))
def test_what_lies_behind_a_picture_does_not_count(kind: str, photos: list[Image.Image], dali: Decode) -> None:
    data = pictures_with_something_behind(photos[0])[kind]
    image = encode(data)
    assert (image.data, image.width, image.height) == (data, 90, 70)
    assert decoded_size(data) == dali(data) == (90, 70)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cut_first_picture_is_truncated_whatever_lies_behind_it(share: float, photos: list[Image.Image]) -> None:
    for data in (saved(photos[1], "JPEG"), saved(photos[1], "JPEG", progressive=True), saved(photos[1], "PNG")):
        for behind in (b"", bytes(1000)):
            with pytest.raises(Unreadable, match=r"the file is truncated|checksum of its IDAT"):
                encode(data[: int(share * len(data))] + behind)


def broken_chunk(png: bytes, kind: bytes) -> bytes:
    start = png.index(kind)
    end = start + 4 + struct.unpack(">I", png[start - 4 : start])[0]
    return png[:end] + b"\1\2\3\4" + png[end + 4 :]


def test_checksums_count_where_dali_compares_them(photos: list[Image.Image], dali: Decode) -> None:
    png = saved(photos[2], "PNG")
    text = b"tEXt" + b"a\0b"
    with_text = png[:33] + struct.pack(">I", 3) + text + struct.pack(">I", zlib.crc32(text)) + png[33:]
    bad = broken_chunk(png, b"IDAT")
    assert dali(bad) is None
    for function in (encode, decoded_size):
        with pytest.raises(Unreadable, match=r"^the checksum of its IDAT chunk is wrong$"):
            function(bad)  # type: ignore[operator]
    noted = broken_chunk(with_text, b"tEXt")
    assert dali(noted) == decoded_size(noted) == (90, 70)
    assert encode(noted).data == noted


@pytest.mark.parametrize(("kind", "count"), [("JPEG", 400), ("PNG", 60), ("WEBP", 60), ("BMP", 60)])
def test_check_refuses_what_training_refuses(kind: str, count: int, photos: list[Image.Image], dali: Decode) -> None:
    rng = random.Random(kind)
    differing, refused = [], 0
    for number in range(count):
        data = bytearray(saved(photos[number % 40], kind))
        place = rng.randrange(2, len(data))
        match rng.choice(["flip", "cut", "zero"]):
            case "flip":
                data[place] ^= 1 << rng.randrange(8)
            case "cut":
                del data[place:]
            case _:
                data[place : place + 50] = bytes(len(data[place : place + 50]))
        try:
            found = decoded_size(bytes(data))
        except Unreadable:
            refused += 1
            continue
        if found != dali(bytes(data)):
            differing.append((number, found, dali(bytes(data))))
    assert differing == []
    assert count / 5 < refused < count


def twelve_bits(jpeg: bytes) -> bytes:
    place = jpeg.index(b"\xff\xc0") + 4
    return jpeg[:place] + b"\x0c" + jpeg[place + 1 :]


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header says a size that it has not."""
    png = saved(Image.new("RGB", (9, 9)), "PNG")
    head = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (
            b"\0\0\0\x18ftypheic" + bytes(99),
            "a HEIC photo, not an image that can be read; convert it to JPEG, for instance with heif-convert or sips",
        ),
        (b"\0\0\0\x18ftypmp42" + bytes(99), "a video, not an image that can be read; extract its frames with ffmpeg"),
        (b"\n <!DOCTYPE html><html>", "an HTML page, not an image that can be read; fetch it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer, not an image that can be read; fetch the file itself with git lfs pull",
        ),
        (b"\xff\x0a" + bytes(99), "a JPEG XL image, not an image that can be read; convert it to JPEG or PNG"),
        (
            twelve_bits(saved(Image.new("RGB", (9, 9)), "JPEG")),
            "a JPEG with 12 bits per channel, which no decoder here reads; convert it to 8 bits, for instance with ImageMagick: convert IN -depth 8 OUT.png",
        ),
        (saved(Image.new("RGB", (20000, 1)), "PNG"), "20000 x 1 pixels; one side may be at most 100 times the other"),
        (saved(Image.new("RGB", (4, 401)), "JPEG"), "4 x 401 pixels; one side may be at most 100 times the other"),
        (claiming(60000, 60000), "60000 x 60000 pixels; shrink it to at most 178956970"),
        (b"no image", "not an image"),
    ],
)
def test_what_cannot_be_used_is_named(data: bytes, why: str) -> None:
    for function in (encode, decoded_size):
        with pytest.raises(Unreadable) as error:
            function(data)  # type: ignore[operator]
        assert str(error.value) == why
