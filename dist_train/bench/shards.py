"""``dist-train bench shards``: making, checking and opening shards, against tar, webdataset's writer and plain decoding."""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dist_train.arguments import Parser, positive
from dist_train.bench import writable
from dist_train.errors import DataError
from shards import sources
from shards.check import check
from shards.index import Index, Shard
from shards.make import ShardSize, make

CLASSES = 10
SHARD_BYTES = 16_000_000
INDEX_SAMPLES = 14_000_000


@dataclass
class ShardsRow:
    """One way, median over interleaved rounds."""

    way: str
    seconds: float
    cpu_seconds: float
    """User and system time of all its processes."""
    images_per_second: float
    images_per_cpu_second: float
    megabytes_per_cpu_second: float


def run(arguments: Sequence[str] | None = None) -> int:
    """The verb ``dist-train bench shards``."""
    parser = Parser("dist-train bench shards", description=__doc__)
    parser.add_argument(
        "--images", type=Path, metavar="PATH", help="tar or folder of JPEGs (default: drawn ones of 110 KB)"
    )
    parser.add_argument(
        "--count",
        type=positive,
        default=2000,
        metavar="N",
        help="images, repeated until there are N (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="rounds over all ways (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where it is written (default: the temporary folder)"
    )
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the measurements to this file")
    options = parser.parse_args(arguments)
    bench_shards(options.images, options.count, options.rounds, options.folder, options.json)
    return 0


def bench_shards(
    images: Path | None = None,
    count: int = 2000,
    rounds: int = 3,
    folder: Path | None = None,
    json_path: Path | None = None,
) -> list[ShardsRow]:
    """Measure all ways in turn, round by round, print a table, and write the rows to a JSON file.

    Raises:
        DataError: there are no JPEGs in ``images``.
    """
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench-shards-", dir=folder) as place:
        root = Path(place)
        total = _lay_out(_photos(images), count, root / "in")
        ways = _ways(root, cores)
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, work in ways.items():
                figures = _measure(root, work)
                if number:  # the first round warms caches
                    taken[way].append(figures)
        index_seconds = _index_seconds(root, INDEX_SAMPLES)
    rows = []
    for way, measured in taken.items():
        wall, cpu = statistics.median(wall for wall, _ in measured), statistics.median(cpu for _, cpu in measured)
        rows.append(ShardsRow(way, wall, cpu, count / wall, count / cpu, total / cpu / 1e6))
    title = (
        f"{count} JPEGs, {total / count / 1e3:.0f} kB each, {cores} cores, {platform.processor() or platform.machine()}"
    )
    ratios = _ratios({row.way: row for row in rows}, cores)
    _print(title, rows, ratios)
    print(f"an index of {INDEX_SAMPLES} samples is loaded and checked in {index_seconds:.2f} s")
    if json_path is not None:
        document = {
            "title": title,
            "rounds": rounds,
            "rows": [asdict(row) for row in rows],
            "ratios": ratios,
            "index_samples": INDEX_SAMPLES,
            "index_seconds": index_seconds,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    return rows


def _ways(root: Path, cores: int) -> dict[str, Callable[[], None]]:

    def ours(workers: int) -> None:
        make(sources.folder(root / "in"), root / "out", ShardSize(bytes=SHARD_BYTES), workers)

    def tar(command: str) -> None:
        (root / "out").mkdir()
        subprocess.run(["sh", "-c", command], cwd=root, check=True, stdout=subprocess.DEVNULL)

    ways: dict[str, Callable[[], None]] = {
        "tar": lambda: tar("tar -cf out/plain.tar in"),
        # What making does beyond tar: flushed to disk, and hashed.
        "tar, sync, sha256sum": lambda: tar(
            "tar -cf out/plain.tar in && sync out/plain.tar && sha256sum out/plain.tar"
        ),
        "make, 1 worker": lambda: ours(1),
        "webdataset.ShardWriter": lambda: _webdataset(root),
        "decode with PIL": lambda: _decode(root / "in"),
    }
    if cores > 1:
        ways[f"make, {cores} workers"] = lambda: ours(cores)
    make(sources.folder(root / "in"), root / "made", ShardSize(bytes=SHARD_BYTES), cores)
    ways["check, 1 worker"] = lambda: _no_fault(check(root / "made" / "train", 1).bad)
    return ways


def _ratios(rows: dict[str, ShardsRow], cores: int) -> dict[str, float]:
    made, checked = rows["make, 1 worker"], rows["check, 1 worker"]
    ratios = {
        **{
            f"make / {tar}, per core": made.images_per_cpu_second / rows[tar].images_per_cpu_second
            for tar in ("tar", "tar, sync, sha256sum")
        },
        "make / webdataset.ShardWriter, per core": made.images_per_cpu_second
        / rows["webdataset.ShardWriter"].images_per_cpu_second,
        "check / decode, per core": checked.images_per_cpu_second / rows["decode with PIL"].images_per_cpu_second,
    }
    if cores > 1:
        ratios[f"make, {cores} workers / 1 worker"] = (
            rows[f"make, {cores} workers"].images_per_second / made.images_per_second
        )
    return ratios


def _measure(root: Path, work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall clock, and of all processes' processors, of work that may fill a new folder ``out``."""

    def cpu() -> float:
        uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(use.ru_utime + use.ru_stime for use in uses)

    shutil.rmtree(root / "out", ignore_errors=True)
    os.sync()  # or one would pay for writing what another has left
    start, before = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - start, cpu() - before


def _webdataset(root: Path) -> None:
    import webdataset

    target = root / "out"
    target.mkdir()
    with webdataset.ShardWriter(f"{target}/shard-%06d.tar", maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, path in enumerate(sorted((root / "in").glob("*/*.jpg"))):
            writer.write({"__key__": f"{number:08d}", "jpg": path.read_bytes(), "cls": int(path.parent.name)})


def _decode(folder: Path) -> None:
    from PIL import Image

    for path in folder.glob("*/*.jpg"):
        with Image.open(path) as image:
            image.load()


def _no_fault(bad: Sequence[object]) -> None:
    assert not bad, "what was just made is whole"


def _photos(images: Path | None) -> list[bytes]:
    """JPEGs from a tar or a folder, or drawn ones."""
    if images is None:
        return [_draw(seed) for seed in range(50)]
    if images.is_dir():
        found = [path.read_bytes() for path in sorted(images.rglob("*")) if path.is_file()]
    else:
        try:
            with tarfile.open(images) as tar:
                found = [file.read() for member in tar if (file := tar.extractfile(member))]
        except (OSError, tarfile.TarError):
            raise DataError(f"{images}: is neither a folder nor a tar of JPEGs") from None
    jpegs = [data for data in found if data.startswith(b"\xff\xd8")]
    if not jpegs:
        raise DataError(f"{images}: holds no JPEG; give a folder or a tar of some")
    return jpegs


def _index_seconds(folder: Path, samples: int) -> float:
    """Seconds to load and check a synthetic index of so many samples of ImageNet's size in shards of 1,000."""
    numbers = np.arange(samples)
    shard = numbers // 1000
    columns = {
        "key": np.char.add(np.char.zfill(numbers.astype("S8"), 8), b"-n01440764_10026"),
        "ext": np.full(samples, b"jpg"),
        "shard": shard,
        "offset": numbers % 1000 * 112_000,
        "label": numbers % 1000,
        "size": np.full(samples, 110_000),
        "width": np.full(samples, 500),
        "height": np.full(samples, 375),
    }
    counts = np.bincount(shard).tolist()
    shards = [Shard(f"shard-{number:06d}.tar", 112_000_000, "0" * 64, count) for number, count in enumerate(counts)]
    Index.from_columns([f"n{number:08d}" for number in range(1000)], shards, columns).save(folder)
    del columns, numbers, shard
    times = []
    for _ in range(3):
        start = time.perf_counter()
        Index.load(folder)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _draw(seed: int) -> bytes:
    """A picture of ImageNet's usual size that takes as many bytes as its usual photo."""
    from PIL import Image

    noise = np.random.default_rng(seed).normal(128, 40, (375, 500, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    # Halved and enlarged again: noise of single pixels would make a file much larger than a photo's.
    Image.fromarray(noise).resize((250, 188)).resize((500, 375)).save(file, "JPEG", quality=96)
    return file.getvalue()


def _lay_out(photos: Sequence[bytes], count: int, folder: Path) -> int:
    """Write ``count`` files in class folders; returns their bytes."""
    for number in range(CLASSES):
        (folder / str(number)).mkdir(parents=True)
    total = 0
    for number in range(count):
        data = photos[number % len(photos)]
        total += (folder / str(number % CLASSES) / f"{number:06d}.jpg").write_bytes(data)
    return total


def _print(title: str, rows: Sequence[ShardsRow], ratios: dict[str, float]) -> None:
    print(f"{title}\n{'':<26}{'images/s':>10}{'images/CPU s':>14}{'MB/CPU s':>10}")
    for row in rows:
        print(
            f"{row.way:<26}{row.images_per_second:>10.0f}{row.images_per_cpu_second:>14.0f}"
            f"{row.megabytes_per_cpu_second:>10.0f}"
        )
    for name, ratio in ratios.items():
        print(f"{name:<50}{ratio:>6.2f}")
