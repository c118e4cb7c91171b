"""How images are stored: kept byte for byte, plain PNG for odd modes, or re-encoded, upright and shrunk."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.images import Storing, encode
from shards.index import Index
from shards.make import Sample, make_samples

SMOOTH = np.add.outer(np.arange(40), 3 * np.arange(60)).astype(np.uint8)
"""40 rows of 60 grey levels, 0 to 216."""


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tagged(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(SMOOTH).convert("RGB"), "JPEG", quality=95, exif=exif)


def odd_images() -> dict[str, tuple[bytes, str]]:
    """An image of every odd mode, and what it is called."""
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
    odd = odd_images()
    for name, (data, _) in odd.items():
        (tmp_path / "in" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "one" / name).write_bytes(data)
    expected = {"16 bit": 1, "CMYK": 1, "alpha": 1, "animated": 2, "orientation": 1, "palette": 1}
    for out, options in (("kept", []), ("converted", ["--odd", "convert"])):
        capsys.readouterr()
        assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / out), *options]) == 0
        manifest = json.loads((tmp_path / out / "train" / "manifest.json").read_text())
        assert manifest["odd"] == expected
        assert "odd: 1 16 bit, 1 CMYK, 1 alpha, 2 animated, 1 orientation, 1 palette" in capsys.readouterr().out
        # What is no odd mode of its own, and an orientation, stay as they are in both cases.
        changed = 0 if out == "kept" else 6
        assert len(manifest["converted"]) == changed
        index = Index.load(tmp_path / out / "train")
        content = (tmp_path / out / "train" / "shard-000000.tar").read_bytes()
        images = [content[at : at + size] for at, size in zip(index.offset, index.size)]
        assert sum(image in [data for data, _ in odd.values()] for image in images) == 9 - changed


@pytest.mark.parametrize("name", [name for name, (_, what) in odd_images().items() if what])
def test_what_is_converted_looks_the_same(name: str) -> None:
    data, what = odd_images()[name]
    image = encode(data, Storing(odd="convert"))
    assert image.odd == (what,)
    if what == "orientation":
        assert image.data == data
        return
    assert (image.ext, image.converted_from, image.width, image.height) == ("png", what, 60, 40)
    pixels = np.asarray(Image.open(io.BytesIO(image.data)))
    assert pixels.shape == (40, 60, 3)
    assert np.abs(pixels.astype(int) - SMOOTH[:, :, None]).max() <= (6 if what == "CMYK" else 0)


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
    ours = np.asarray(Image.open(io.BytesIO(encode(data, Storing(odd="convert")).data)))
    assert np.abs(ours.astype(int) - np.asarray(pipe.run()[0][0]).astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_when_re_encoding(orientation: int) -> None:
    turned = {
        1: SMOOTH, 2: SMOOTH[:, ::-1], 3: SMOOTH[::-1, ::-1], 4: SMOOTH[::-1], 5: SMOOTH.T,
        6: np.rot90(SMOOTH, -1), 7: SMOOTH[::-1, ::-1].T, 8: np.rot90(SMOOTH),
    }[orientation]  # fmt: skip
    image = encode(tagged(orientation), Storing(quality=95))
    stored = Image.open(io.BytesIO(image.data))
    assert stored.getexif().get(0x0112) is None
    assert (image.height, image.width) == turned.shape
    assert np.abs(np.asarray(stored.convert("L")).astype(int) - turned).max() <= 6


def test_the_shorter_side_is_limited_and_nothing_is_enlarged() -> None:
    for size, expected in (((60, 40), (30, 20)), ((40, 60), (20, 30)), ((500, 20), (500, 20)), ((20, 20), (20, 20))):
        data = saved(Image.fromarray(np.resize(SMOOTH, (size[1], size[0]))), "PNG")
        image = encode(data, Storing(max_size=20))
        assert (image.ext, image.width, image.height) == ("jpg", *expected)
    small, large = (len(encode(tagged(1), Storing(quality=quality)).data) for quality in (30, 90))
    assert small < large
    assert len(encode(tagged(1), Storing(max_size=100)).data) == large


def test_real_photos_shrunk_are_close_to_pillow(test_data: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(test_data / "data" / "imagenet-250.tar") as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()][:30]
        samples = [Sample(name, "a", file.read()) for name, file in files if file]
    (made,) = make_samples(samples, tmp_path / "out", storing=Storing(max_size=128, quality=95), workers=2)
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
