"""Damaged and hostile inputs by seed, given to make, index and check; run as a program it tries a range of seeds.

One line of JSON per seed: what was done, the exit code, what was said, and whether what came out is right.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from shards.__main__ import main
from shards.index import Index
from shards.make import Sample, ShardSize, make_samples

CLASSES = ("cat", "dog", "owl")
SECONDS = 60


def picture(rng: random.Random) -> bytes:
    size = (rng.randrange(4, 40), rng.randrange(4, 40), 3)
    file = io.BytesIO()
    pixels = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size)
    Image.fromarray(pixels).save(file, rng.choice(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]))
    return file.getvalue()


def jpeg(rng: random.Random) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(rng.randbytes(300), np.uint8).reshape(10, 10, 3)).save(file, "JPEG")
    return file.getvalue()


def flipped(rng: random.Random, data: bytes, count: int = 3) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def zeroed(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes(min(600, len(data) - place)) + data[place + 600 :]


def grown(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.choice([1, 512, 5000])) + data[place:]


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (flipped, cut, zeroed, grown)


def bomb(rng: random.Random) -> bytes:
    """A small image whose header says that it is huge."""
    size = rng.choice([(60000, 60000), (1, 60000), (2**31 - 1, 1), (0, 5), (30000, 20000)])
    if rng.random() < 0.5:
        head = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    data = jpeg(rng)
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", size[1] % 65536, size[0] % 65536) + data[place + 4 :]


STRANGE = (
    b"caf\xe9.jpg",
    b"a\nb.jpg",
    b"-rf.jpg",
    b"x" * 250 + b".jpg",
    b"'$(reboot)'.jpg",
    "日本.jpg".encode(),
    b"\xff\xfe",
    b"a\\b.jpg",
    b" .jpg",
)


def spoil_folder(rng: random.Random, folder: Path) -> str:
    """Something that folders may hold."""
    place = folder / rng.choice(CLASSES)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    what = rng.choice(["damage", "bomb", "name", "pipe", "link", "loop", "folder", "class", "empty", "deep"])
    if what == "damage":
        file = rng.choice(files)
        file.write_bytes(rng.choice(DAMAGES)(rng, file.read_bytes()))
    elif what == "bomb":
        (place / "bomb.png").write_bytes(bomb(rng))
    elif what == "name":
        (place / os.fsdecode(rng.choice(STRANGE))).write_bytes(picture(rng))
    elif what == "pipe":
        os.mkfifo(place / f"pipe{rng.randrange(10**9)}.jpg")
    elif what == "link":
        (place / f"link{rng.randrange(10**9)}.jpg").symlink_to(
            rng.choice(["/dev/zero", "nowhere", "/proc/self/mem", str(files[0])])
        )
    elif what == "loop":
        (place / f"loop{rng.randrange(10**9)}").symlink_to(rng.choice([".", "..", "loop"]))
    elif what == "folder":
        (place / "folder.jpg").mkdir(exist_ok=True)
    elif what == "class":
        name = os.fsdecode(rng.choice(STRANGE))
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "1.jpg").write_bytes(picture(rng))
    elif what == "empty":
        (place / "empty.jpg").touch()
    else:
        deep = place / "/".join(["d" * 20] * 40)
        deep.mkdir(parents=True, exist_ok=True)
        (deep / "1.jpg").write_bytes(picture(rng))
    return what


def lay_folder(rng: random.Random, folder: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(4):
            (folder / name / f"{number}.jpg").write_bytes(picture(rng))


def tar(files: list[tuple[str, bytes]], form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def lying(rng: random.Random, data: bytes) -> bytes:
    """A tar with a header that says something else, its checksum being right."""
    changed = bytearray(data)
    heads = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    place = rng.choice(heads)
    field, value = rng.choice(
        [
            (slice(124, 136), b"77777777777\0"),
            (slice(124, 136), b"\x80" + b"\xff" * 11),
            (slice(124, 136), b"-0000000001\0"),
            (slice(156, 157), rng.choice([b"1", b"2", b"3", b"5", b"6", b"L", b"K", b"x", b"g", b"S", b"Z"])),
            (slice(0, 12), b"../../../etc"),
            (slice(0, 2), b"\xff\xfe"),
            (slice(124, 136), b"00000000000\0"),
            (slice(0, 100), bytes(100)),
        ]
    )
    changed[place + field.start : place + field.stop] = value
    changed[place + 148 : place + 156] = b" " * 8
    changed[place + 148 : place + 156] = b"%06o\0 " % sum(changed[place : place + 512])
    return bytes(changed)


def images_are_from(split: Path, known: set[bytes]) -> bool:
    """Whether every image that was stored is one that was given, or was made of a format that is converted."""
    index = Index.load(split)
    for shard, offset, size, ext in zip(index.shard, index.offset, index.size, index.ext):
        data = (split / index.shards[shard].name).read_bytes()[offset : offset + size]
        if data not in known and ext != b"png":
            return False
    return True


def run_folder(rng: random.Random, place: Path) -> tuple[str, list[str], Callable[[], bool]]:
    lay_folder(rng, place / "in")
    spoilt = [spoil_folder(rng, place / "in")]
    if rng.random() < 0.5 and not {"link", "loop"} & set(spoilt):
        spoilt.append(spoil_folder(rng, place / "in"))
    what = "+".join(spoilt)
    known = {path.read_bytes() for path in (place / "in").rglob("*") if path.is_file() and not path.is_symlink()}
    return (
        f"folder {what}",
        ["make", "folder", str(place / "in"), str(place / "out")],
        lambda: images_are_from(place / "out/train", known),
    )


def run_tar(rng: random.Random, place: Path) -> tuple[str, list[str], Callable[[], bool]]:
    files = [(f"{name}/{number}.jpg", picture(rng)) for name in CLASSES for number in range(4)]
    if rng.random() < 0.3:
        files[0] = (os.fsdecode(rng.choice(STRANGE)), files[0][1])
    whole = tar(
        files,
        rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        if files[0][0].isascii() and len(files[0][0]) < 90
        else tarfile.GNU_FORMAT,
    )
    damage = rng.choice([*DAMAGES, lying, lying])
    data = damage(rng, whole)
    if rng.random() < 0.3:
        data = damage(rng, gzip.compress(whole)) if damage is not lying else gzip.compress(data)
    (place / "in.tar").write_bytes(data)
    # What lies in a damaged tar is not known, but it is as long as it was.
    return (
        f"tar {damage.__name__}",
        ["make", "folder", str(place / "in.tar"), str(place / "out")],
        lambda: len(Index.load(place / "out/train")) <= 13,
    )


def run_cifar(rng: random.Random, place: Path) -> tuple[str, list[str], Callable[[], bool]]:
    files = {"batches.meta": pickle.dumps({b"label_names": [b"c%d" % n for n in range(10)]}, 2)}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        pixels = np.frombuffer(rng.randbytes(10 * 3072), np.uint8).reshape(10, 3072)
        files[name] = pickle.dumps({b"data": pixels, b"labels": list(range(10))}, 2)
    name = rng.choice(sorted(files))
    damage = rng.choice(DAMAGES)
    files[name] = damage(rng, files[name])
    (place / "in").mkdir()
    for file, data in files.items():
        (place / "in" / file).write_bytes(data)
    return (
        f"cifar {damage.__name__}",
        ["make", "cifar10", str(place / "in"), str(place / "out")],
        lambda: len(Index.load(place / "out/train")) == 50,
    )


def run_index(rng: random.Random, place: Path) -> tuple[str, list[str], Callable[[], bool]]:
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    files = []
    for number in range(8):
        label = rng.choice([("cls", b"%d" % (number % 3)), ("json", json.dumps({"label": number % 3}).encode())])
        files += [
            (f"{number:05d}.jpg", bomb(rng) if rng.random() < 0.05 else jpeg(rng)),
            (f"{number:05d}.cls", label[1] if label[0] == "cls" else b"1"),
        ]
    if rng.random() < 0.2:
        files[rng.randrange(len(files))] = (
            (rng.choice(["x.y.jpg", "/abs.jpg", "a/../b.cls", "é.jpg", ".jpg", "n" * 200 + ".jpg"]), b"1")
            if form != tarfile.USTAR_FORMAT
            else ("00000.txt", b"{" * 5000)
        )
    whole = tar(files, form)
    damage = rng.choice([*DAMAGES, lying, lying])
    (place / "in").mkdir()
    (place / "in/0.tar").write_bytes(damage(rng, whole))
    before = (place / "in/0.tar").read_bytes()

    def right() -> bool:
        index = Index.load(place / "in/train")
        index.verify("hash")
        return len(index) <= 8 and (place / "in/0.tar").read_bytes() == before

    return f"index {damage.__name__}", ["index", str(place / "in")], right


def run_check(rng: random.Random, place: Path) -> tuple[str, list[str], Callable[[], bool]]:
    samples = [Sample(f"{n}", CLASSES[n % 3], jpeg(rng)) for n in range(12)]
    make_samples(samples, place / "out", ShardSize(samples=5))
    train = place / "out/train"
    name = rng.choice(["shard-000000.tar", "shard-000001.tar", "index.json", "index.bin", "index.json", "index.bin"])
    whole, damage = (train / name).read_bytes(), rng.choice(DAMAGES)
    (train / name).write_bytes(damage(rng, whole))
    if rng.random() < 0.2:
        (train / "quarantine.json").write_bytes(rng.choice([b"{", b"[" * 100_000, b'{"samples": 3}', b"\xff"]))
    same = (train / name).read_bytes() == whole
    return (
        f"check {name} {damage.__name__}",
        ["check", str(place / "out")],
        lambda: same,
    )  # else it must have been found


def run_parquet(rng: random.Random, place: Path) -> tuple[str, list[str], Callable[[], bool]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rows = [{"bytes": bomb(rng) if rng.random() < 0.1 else picture(rng), "path": f"{n}"} for n in range(20)]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "label": [n % 3 for n in range(20)]}), file, write_page_checksum=True)
    damage = rng.choice(DAMAGES)
    (place / "in.parquet").write_bytes(damage(rng, file.getvalue()))
    return (
        f"parquet {damage.__name__}",
        ["make", "parquet", str(place / "in.parquet"), str(place / "out")],
        lambda: len(Index.load(place / "out/train")) <= 20,
    )


KINDS = (run_folder, run_folder, run_tar, run_tar, run_index, run_index, run_check, run_cifar, run_parquet)


def attempt(seed: int, place: Path) -> dict[str, object]:
    """One input, and what became of it."""
    rng = random.Random(seed)
    place.mkdir()
    what, words, right = KINDS[seed % len(KINDS)](rng, place)
    errors, start = io.StringIO(), time.perf_counter()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main([*words, "--workers", "1"])
        said, correct = errors.getvalue(), code != 0 or right()
    except BaseException:
        code, said, correct = -1, traceback.format_exc(), False
    signal.alarm(0)
    shutil.rmtree(place)
    return {
        "seed": seed,
        "what": what,
        "code": code,
        "said": said,
        "right": correct,
        "seconds": time.perf_counter() - start,
    }


def hang(*_: object) -> None:
    raise TimeoutError(f"no end after {SECONDS} s")


if __name__ == "__main__":
    first, end, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_DATA, (2_000_000_000, 2_000_000_000))
    signal.signal(signal.SIGALRM, hang)
    for number in range(first, end):
        print(json.dumps(attempt(number, root / f"{number}")), flush=True)
