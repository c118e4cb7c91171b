"""How images are stored: kept byte for byte, plain PNG for unusual modes, or re-encoded, upright and shrunk."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data.decode import Decoder
from shards.__main__ import main
from shards.images import Encoding, Unreadable, decoded_size, encode
from shards.index import Index
from shards.make import Sample, make_samples
from tests.common import saved

SMOOTH = np.add.outer(np.arange(40), 3 * np.arange(60)).astype(np.uint8)
"""40 rows of 60 grey levels, 0 to 216."""


def tagged(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(SMOOTH).convert("RGB"), "JPEG", quality=95, exif=exif)


def odd_images() -> dict[str, tuple[bytes, str]]:
    """An image of every unusual mode, and what it is called."""
    grey = Image.fromarray(SMOOTH)
    colour = grey.convert("RGB")
    deep = Image.fromarray(SMOOTH.astype(np.uint16) * 257)
    alpha = colour.copy()
    alpha.putalpha(100)
    frames = [colour, colour.rotate(180)]
    return {
        "cmyk.jpg": (saved(colour.convert("CMYK"), "JPEG", quality=95), "CMYK"),
        "palette.png": (saved(grey.convert("P"), "PNG"), "palette"),
        "deep.png": (saved(deep, "PNG"), "16 bit"),
        "alpha.png": (saved(alpha, "PNG"), "alpha"),
        "animated.webp": (saved(colour, "WEBP", lossless=True, save_all=True, append_images=frames[1:]), "animated"),
        "animated.png": (saved(colour, "PNG", save_all=True, append_images=frames[1:]), "animated"),
        "turned.jpg": (tagged(6), "orientation"),
        "grey.jpg": (saved(grey, "JPEG"), ""),
        "plain.jpg": (saved(colour, "JPEG"), ""),
    }


def test_odd_modes_are_counted_and_kept_or_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unusual = odd_images()
    for name, (data, _) in unusual.items():
        (tmp_path / "in" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "one" / name).write_bytes(data)
    expected = {"16 bit": 1, "CMYK": 1, "alpha": 1, "animated": 2, "orientation": 1, "palette": 1}
    for out, options in (("kept", []), ("converted", ["--unusual", "convert"])):
        capsys.readouterr()
        assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / out), *options]) == 0
        manifest = json.loads((tmp_path / out / "train" / "manifest.json").read_text())
        assert manifest["unusual"] == expected
        assert "unusual: 1 16 bit, 1 CMYK, 1 alpha, 2 animated, 1 orientation, 1 palette" in capsys.readouterr().out
        # What is no unusual mode of its own, and an orientation, stay as they are in both cases.
        changed = 0 if out == "kept" else 6
        assert len(manifest["converted"]) == changed
        index = Index.load(tmp_path / out / "train")
        content = (tmp_path / out / "train" / "shard-000000.tar").read_bytes()
        images = [content[at : at + size] for at, size in zip(index.offset, index.size)]
        assert sum(image in [data for data, _ in unusual.values()] for image in images) == 9 - changed


@pytest.mark.parametrize("name", [name for name, (_, what) in odd_images().items() if what])
def test_what_is_converted_looks_the_same(name: str) -> None:
    data, what = odd_images()[name]
    image = encode(data, Encoding(unusual="convert"))
    assert image.unusual == (what,)
    if what == "orientation":
        assert image.data == data
        return
    assert (image.ext, image.converted_from, image.width, image.height) == ("png", what, 60, 40)
    pixels = np.asarray(Image.open(io.BytesIO(image.data)))
    assert pixels.shape == (40, 60, 3)
    assert np.abs(pixels.astype(int) - SMOOTH[:, :, None]).max() <= (6 if what == "CMYK" else 0)


@pytest.mark.parametrize(("mode", "colour"), [("L", 0), ("RGB", (0, 0, 0)), ("P", 0)])
def test_a_colour_that_was_transparent_is_converted_to_one_that_is_not(mode: str, colour: Any) -> None:
    data = saved(Image.fromarray(SMOOTH).convert(mode), "PNG", transparency=colour)
    image = encode(data, Encoding(unusual="convert"))
    assert "transparency" not in Image.open(io.BytesIO(image.data)).info
    assert encode(image.data, Encoding(unusual="convert")).unusual == ()


def test_sixteen_bits_are_scaled_as_dali_does() -> None:
    from nvidia.dali import fn, pipeline_def, types

    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    data = saved(Image.fromarray(deep), "PNG")

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> object:
        raw = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], dtype=types.UINT8)
        return fn.decoders.image(raw, output_type=types.RGB)

    pipe = pipeline()
    pipe.build()
    ours = np.asarray(Image.open(io.BytesIO(encode(data, Encoding(unusual="convert")).data)))
    assert np.abs(ours.astype(int) - np.asarray(pipe.run()[0][0]).astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_when_re_encoding(orientation: int) -> None:
    turned = {
        1: SMOOTH,
        2: SMOOTH[:, ::-1],
        3: SMOOTH[::-1, ::-1],
        4: SMOOTH[::-1],
        5: SMOOTH.T,
        6: np.rot90(SMOOTH, -1),
        7: SMOOTH[::-1, ::-1].T,
        8: np.rot90(SMOOTH),
    }[orientation]
    image = encode(tagged(orientation), Encoding(quality=95))
    stored = Image.open(io.BytesIO(image.data))
    assert stored.getexif().get(0x0112) is None
    assert (image.height, image.width) == turned.shape
    assert np.abs(np.asarray(stored.convert("L")).astype(int) - turned).max() <= 6


def test_the_shorter_side_is_limited_and_nothing_is_enlarged() -> None:
    for size, expected in (((60, 40), (30, 20)), ((40, 60), (20, 30)), ((500, 20), (500, 20)), ((20, 20), (20, 20))):
        data = saved(Image.fromarray(np.resize(SMOOTH, (size[1], size[0]))), "PNG")
        image = encode(data, Encoding(max_size=20))
        assert (image.ext, image.width, image.height) == ("jpg", *expected)
    small, large = (len(encode(tagged(1), Encoding(quality=quality)).data) for quality in (30, 90))
    assert small < large
    assert len(encode(tagged(1), Encoding(max_size=100)).data) == large


def test_real_photos_shrunk_are_close_to_pillow(test_data: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(test_data / "data" / "imagenet-250.tar") as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()][:30]
        samples = [Sample(name, "a", file.read()) for name, file in files if file]
    (made,) = make_samples(samples, tmp_path / "out", encoding=Encoding(max_size=128, quality=95), workers=2)
    assert np.minimum(made.index.width, made.index.height).max() == 128
    by_key = {sample.name.partition(".")[0][:40]: sample.image for sample in samples}
    content = (made.folder / "shard-000000.tar").read_bytes()
    for key, at, size in zip(made.index.key.tolist(), made.index.offset, made.index.size):
        ours = Image.open(io.BytesIO(content[at : at + size])).convert("RGB")
        theirs = (
            Image.open(io.BytesIO(by_key[key.decode()[9:][:40]]))
            .convert("RGB")
            .resize(ours.size, Image.Resampling.LANCZOS)
        )
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 8
    assert os.listdir(tmp_path / "out") == ["train"]


def bmp(bits: int, compression: int = 0, masks: tuple[int, ...] = ()) -> bytes:
    """A BMP of 8 x 8 random pixels at this depth."""
    colours = b"".join(bytes([7 * n % 256, 3 * n % 256, n, 0]) for n in range(1 << bits)) if bits <= 8 else b""
    pixels = np.random.default_rng(bits).integers(0, 255, 8 * ((8 * bits + 31) // 32 * 4)).astype(np.uint8).tobytes()
    start = 54 + 4 * len(masks) + len(colours)
    head = struct.pack("<IHHI", start + len(pixels), 0, 0, start)
    head += struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, bits, compression, len(pixels), 2835, 2835, 0, 0)
    return b"BM" + head + struct.pack(f"<{len(masks)}I", *masks) + colours + pixels


def test_a_bmp_is_kept_where_dali_decodes_it_as_pillow_does(tmp_path: Path) -> None:
    kinds = {f"{bits} bits": bmp(bits) for bits in (1, 4, 8, 16, 24, 32)}
    kinds["565"] = bmp(16, 3, (0xF800, 0x7E0, 0x1F))
    stored = {kind: encode(data) for kind, data in kinds.items()}
    assert {kind for kind, image in stored.items() if image.ext == "png"} == {"16 bits", "565"}
    assert {image.converted_from for image in stored.values()} == {None, "16-bit or compressed BMP"}
    data = DataConfig(shards=tmp_path, image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    decoder = Decoder(data, (), len(stored), torch.device("cpu"), threads=1, depth=1)
    (decoded,) = decoder.run([{"raw": [np.frombuffer(image.data, np.uint8) for image in stored.values()]}])
    assert isinstance(decoded, torch.Tensor)
    expected = [np.asarray(Image.open(io.BytesIO(source)).convert("RGB")) for source in kinds.values()]
    assert np.array_equal((255 * decoded.permute(0, 2, 3, 1)).round().numpy(), np.stack(expected))


def test_checking_refuses_what_is_stored_in_a_form_that_training_cannot_decode() -> None:
    assert decoded_size(bmp(24)) == (8, 8)
    for data in (bmp(16), saved(Image.fromarray(SMOOTH), "GIF")):
        with pytest.raises(Unreadable, match="which training cannot decode"):
            decoded_size(data)
