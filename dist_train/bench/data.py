"""``dist-train bench data``: our loader against DALI's own webdataset reader and webdataset with PIL, on the same shards.

Every way yields float32 images of 224 x 224, randomly cropped, resized, mirrored and normalised, in batches; the ways
that end in "bytes" stop at the encoded images.  Each runs in a process of its own, in turns, with as many threads or workers.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_train.arguments import Parser, positive
from dist_train.bench import writable
from dist_train.config import DataConfig
from dist_train.data.augment import resized_crops
from dist_train.data.order import micro_batches
from dist_train.data.passes import epoch_order
from dist_train.data.pipeline import Loader
from dist_train.data.reader import ShardReader
from dist_train.errors import DataError, TrainingError
from shards.index import Index

BATCH = 64
SIZE = 224
OURS, DALI, PIL = "ours", "DALI's reader", "webdataset + PIL"
TARGETS = ((OURS, DALI, 0.95), (OURS, PIL, 2.0))


def run(arguments: list[str]) -> int:
    """``dist-train bench data --images TAR_OR_FOLDER [--json PATH] [--samples N] [--threads N] [--rounds N]``."""
    parser = Parser("dist-train bench data", description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, metavar="PATH", help="JPEGs: a tar, or a folder")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the figures there as well")
    parser.add_argument("--samples", type=positive, default=3000, metavar="N", help="the images repeated to so many")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="measurements of every way")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N")
    known = parser.parse_args(arguments)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        _make_shards(known.images, known.samples, Path(folder))
        for _ in range(known.rounds):
            for name in WAYS:
                words = [sys.executable, "-m", "dist_train.bench.data", name, folder, str(known.threads)]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    raise TrainingError(f"{name}: failed ({(done.stderr.splitlines() or ['no message'])[-1]})")
                rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        for name, measured in rows.items()
    }
    result = {
        "machine": platform.processor() or platform.machine(),
        "threads": known.threads,
        "samples": known.samples,
        "rounds": known.rounds,
        "ways": medians,
        "ratios": _ratios(medians),
    }
    print(_text(result))
    if known.json:
        known.json.write_text(json.dumps(result, indent=1))
    return 0


def measure(way: str, folder: Path, threads: int) -> dict[str, float]:
    """One pass over the shards after a first one that warms up: images a second, CPU seconds per image (all processes).

    The rate is that from the first batch to the last, since some ways begin a pass with batches made before it.
    """
    make_pass = WAYS[way](folder / "shards" / "train", threads)
    for _ in make_pass():
        pass
    # User and system time of this process and of its children: some ways decode in worker processes.
    cpu, batches = sum(os.times()[:4]), make_pass()
    images, start = next(batches), time.perf_counter()
    rest = sum(batches)
    seconds = time.perf_counter() - start
    cpu = (sum(os.times()[:4]) - cpu) / (images + rest)
    return {"images_per_second": rest / seconds, "cpu_seconds_per_image": cpu}


Pass = Callable[[], Iterator[int]]
"""Start a pass over the split; gives the number of images of every batch."""


def ours(folder: Path, threads: int) -> Pass:
    """The loader as training uses it."""
    import torch

    torch.set_num_threads(1)
    loader = Loader(
        Index.load(folder),
        folder,
        DataConfig(shards=folder.parent, image_size=SIZE, augment="resized_crop"),
        train=True,
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        threads=threads,
    )
    return lambda: (len(micro.ids) for batch in loader.epoch(0) for micro in batch)


def our_bytes(folder: Path, threads: int) -> Pass:
    """The order and the reader, without decoding."""
    import numpy as np

    index = Index.load(folder)
    reader = ShardReader(index, folder, threads)
    nothing = np.empty(0, dtype=np.uint8)

    def batches() -> Iterator[int]:
        for ids in micro_batches(epoch_order(index.shard_sizes, 0, 0, 16), BATCH):
            yield len(reader.read_all(ids.tolist(), failed=lambda sample: nothing))

    return batches


def dali(folder: Path, threads: int, decode: bool = True) -> Pass:
    """DALI's webdataset reader with its own random crop, as its documentation has it."""
    import nvidia.dali as nvidia_dali

    fn: Any = nvidia_dali.fn
    types: Any = nvidia_dali.types
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    indices = [str(Path(path).with_suffix(".idx")) for path in shards]

    def graph() -> Any:
        raw = fn.readers.webdataset(
            paths=shards,
            index_paths=indices,
            ext=[_extension(folder)],
            random_shuffle=True,
            initial_fill=1024,
            pad_last_batch=True,
            name="reader",
        )
        if not decode:
            return raw
        images = fn.decoders.image_random_crop(
            raw, random_area=(0.08, 1.0), random_aspect_ratio=(3 / 4, 4 / 3), adjust_orientation=False
        )
        images = fn.resize(images, size=(SIZE, SIZE))
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="HWC",
            mirror=fn.random.coin_flip(),
            # ImageNet's, in levels of 0 to 255.
            mean=[123.7, 116.3, 103.5],
            std=[58.4, 57.1, 57.4],
        )

    pipeline = nvidia_dali.pipeline_def(graph)(
        batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=2
    )
    pipeline.build()
    total = pipeline.epoch_size("reader")

    def batches() -> Iterator[int]:
        # Whole batches alone, as the other ways have them.
        for first in range(0, total - BATCH + 1, BATCH):
            (images,) = pipeline.run()
            yield min(len(images), total - first)

    return batches


def pil(folder: Path, threads: int, decode: bool = True) -> Pass:
    """The webdataset package with PIL in the workers of a torch DataLoader."""
    import torch
    import webdataset
    from torch.utils.data import DataLoader

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000)
    torch.set_num_threads(1)
    if decode:
        stages = dataset.map(_PilCrop(_extension(folder))).batched(BATCH, collation_fn=torch.stack, partial=False)
    else:
        stages = dataset.to_tuple(_extension(folder)).batched(BATCH, collation_fn=list, partial=False)
    loader: Any = DataLoader(stages, batch_size=None, num_workers=threads, prefetch_factor=2)
    return lambda: (len(batch) for batch in loader)


WAYS: dict[str, Callable[[Path, int], Pass]] = {
    OURS: ours,
    DALI: dali,
    PIL: pil,
    "ours, bytes": our_bytes,
    "DALI's reader, bytes": lambda folder, threads: dali(folder, threads, decode=False),
    "webdataset, bytes": lambda folder, threads: pil(folder, threads, decode=False),
}


class _PilCrop:
    """Random resized crop, mirroring and normalisation of a sample with PIL and torch, as it is usually written."""

    def __init__(self, extension: str) -> None:
        self.extension = extension

    def __call__(self, sample: dict[str, Any]) -> Any:
        import io

        import numpy as np
        import torch
        from PIL import Image

        image = Image.open(io.BytesIO(sample[self.extension])).convert("RGB")
        # A new id each time: crops are a function of the id, and would otherwise be the same in every pass.
        number = np.array([np.random.default_rng().integers(2**31)])
        (anchor,), (shape,) = resized_crops(
            0, 0, number, np.array([[image.height, image.width]]), (0.08, 1), (3 / 4, 4 / 3)
        )
        top, left, bottom, right = (float(edge) for edge in (*anchor, *(anchor + shape)))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        if number[0] % 2:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return pixels.sub_(mean[:, None, None]).div_(std[:, None, None])


def _make_shards(images: Path, samples: int, folder: Path) -> None:
    """Shards of the images, repeated to so many samples, mixed."""
    source = images
    if images.is_file():
        source = folder / "unpacked"
        try:
            with tarfile.open(images) as tar:
                tar.extractall(source, filter="data")
        except tarfile.TarError:
            raise DataError(f"{images}: is not a tar; give --images a tar or a folder of JPEGs") from None
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise DataError(f"{images}: no JPEGs there; give --images a tar or a folder of JPEGs")
    (folder / "images" / "all").mkdir(parents=True)
    for number in range(samples):
        path = found[number % len(found)]
        (folder / "images" / "all" / f"{number:07d}.jpg").symlink_to(path.resolve())
    words = [sys.executable, "-m", "shards", "make", "folder", str(folder / "images"), str(folder / "shards")]
    subprocess.run([*words, "--shard-size", "250"], check=True, stdout=subprocess.DEVNULL)


def _extension(folder: Path) -> str:

    extension: str = Index.load(folder).ext[0].decode()
    return extension


def _ratios(ways: dict[str, dict[str, float]]) -> dict[str, float]:
    """Images a second against images a second, and CPU seconds against CPU seconds: above 1 the first one is better."""
    ratios = {}
    for first, second, _ in TARGETS:
        a, b = ways[first], ways[second]
        ratios[f"{first} / {second}"] = a["images_per_second"] / b["images_per_second"]
        ratios[f"{first} / {second}, per CPU second"] = b["cpu_seconds_per_image"] / a["cpu_seconds_per_image"]
    return ratios


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['samples']} JPEGs to {SIZE} x {SIZE}, {result['threads']} threads or workers, median of {result['rounds']}"
    ]
    for name, row in result["ways"].items():
        lines.append(
            f"  {name:<22} {row['images_per_second']:9.1f} images/s  {1e3 * row['cpu_seconds_per_image']:7.3f} CPU ms/image"
        )
    return "\n".join(lines + [f"  {name:<44} {ratio:.2f}" for name, ratio in result["ratios"].items()])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
