"""Images of extreme shapes take the memory of their window, and the window is that of the whole resized image."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data.augment import parameters
from dist_train.data.decode import Decoder
from tests.common import ROOT

LONG = """
import io, json, resource
import numpy as np, torch
from PIL import Image
from dist_train.config import DataConfig
from dist_train.data.augment import parameters
from dist_train.data.decode import Decoder

def png(width, height):
    file = io.BytesIO()
    grey = np.linspace(0, 255, width * height).astype(np.uint8).reshape(height, width)
    Image.fromarray(grey).convert("RGB").save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)

def run(data, train, shapes):
    sizes = np.array([(h, w) for w, h in shapes], np.int64)
    columns = parameters(data, train, 0, 0, np.arange(len(sizes)), sizes)
    decoder = Decoder(data, tuple(columns), len(sizes), torch.device("cpu"), threads=1, depth=1)
    (images,) = decoder.run([{"raw": [png(w, h) for w, h in shapes], **columns}])
    if isinstance(images, RuntimeError):
        raise images
    return images.mean(dim=(1, 2, 3)).tolist()

data = DataConfig(shards="x", image_size=224, eval_resize=256, mean=(0, 0, 0), std=(1, 1, 1))
run(data, False, [(300, 200)] * 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
means = run(data, False, [(20000, 1), (1, 20000)] * 4) + run(data, True, [(20000, 1), (1, 20000)] * 4)
print(json.dumps({"means": means, "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3}))
"""


def test_a_line_of_pixels_takes_no_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout)
    print(f"16 images of 20,000 x 1 pixels: {found['megabytes']:.0f} MB more")
    assert found["megabytes"] < 300
    assert np.allclose(found["means"], 0.5, atol=0.01)  # the middle of the line, whichever way it lies


@pytest.mark.parametrize("mode", ["none", "pad_crop"])
def test_the_window_is_that_of_the_whole_image(mode: str) -> None:
    rng = np.random.default_rng(0)
    shapes = [(90, 40), (41, 97), (300, 17), (64, 64), (33, 200)]
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for w, h in shapes]
    raw = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        raw.append(np.frombuffer(file.getvalue(), np.uint8))
    data = DataConfig(shards=Path("x"), image_size=32, eval_resize=40, augment=mode, mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]
    sizes = np.array([(h, w) for w, h in shapes], np.int64)
    columns = parameters(data, mode == "pad_crop", 3, 1, np.arange(5), sizes)
    (images,) = Decoder(data, tuple(columns), 5, torch.device("cpu"), threads=1, depth=1).run([{"raw": raw, **columns}])
    assert isinstance(images, torch.Tensor)
    mirror = columns.get("mirror", np.zeros(5))
    for found, picture, size, (y, x), mirrored in zip(
        images, pictures, columns["size"], columns["anchor"].tolist(), mirror
    ):
        whole = (
            np.asarray(picture.resize((int(size[1]), int(size[0])), Image.Resampling.BILINEAR), dtype=np.float64) / 255
        )
        whole = whole[:, ::-1] if mirrored else whole
        canvas = np.pad(whole, ((8, 8), (8, 8), (0, 0)))
        expected = canvas[y + 8 : y + 40, x + 8 : x + 40]
        difference = np.abs(found.permute(1, 2, 0).numpy() - expected)
        # PIL rounds otherwise at the edges; in noise, a window one pixel off would differ by 80 levels on average.
        assert difference.mean() < 0.5 / 255
        assert difference.max() < 30 / 255


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("mode", "decoder"), [("pad_crop", "auto"), ("resized_crop", "auto"), ("pad_crop", "cpu")])
def test_on_a_gpu_only_images_are_there_and_no_argument_has_to_come_back(mode: str, decoder: str, train: bool) -> None:
    data = DataConfig(shards=Path("x"), augment=mode, decoder=decoder, random_erasing=0.5)  # type: ignore[arg-type]
    columns = parameters(data, train, 0, 0, np.arange(2), np.full((2, 2), 48))
    pipeline = Decoder(data, tuple(columns), 2, torch.device("cuda", 0), threads=1, depth=1).define()
    pipeline._build_graph()  # which needs no GPU, as pipeline.build() does
    images = {"ExternalSource", "Image", "ImageSlice", "Resize", "CropMirrorNormalize", "Slice", "Erase", "Copy"}
    fed = {edge.name for operator in pipeline._ops for edge in operator.inputs if edge.device == "gpu"}
    assert fed
    assert {name.strip("_").rpartition("_")[0] for name in fed} <= images
    decoded = next(operator for operator in pipeline._ops if "Image" in operator.name)
    assert [edge.device for edge in decoded.outputs] == ["cpu" if decoder == "cpu" else "gpu"]
