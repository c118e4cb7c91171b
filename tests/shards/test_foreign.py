"""WebDatasets made elsewhere: their index says what ours would, whatever form their labels have."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.foreign import index_folder
from shards.index import Index
from shards.make import Sample, ShardSize, make_samples
from tests.common import refusal, tree

Files = Sequence[tuple[str, "bytes | str"]]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 11, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def pack(path: Path, files: Files, form: int = tarfile.GNU_FORMAT, compression: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{compression}", format=form) as tar:  # type: ignore[call-overload]
        for name, content in files:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def rows(split: Path) -> list[tuple[bytes, str | None]]:
    """Image and class of every sample, None without one, in the order of the index."""
    index = Index.load(split)
    found = []
    for shard, offset, size, label in zip(index.shard, index.offset, index.size, index.label):
        data = (split / index.shards[shard].name).read_bytes()
        found.append((data[offset : offset + size], index.classes[label] if label >= 0 else None))
    return found


def test_the_index_of_our_own_shards_is_the_one_they_had(jpegs: list[bytes], tmp_path: Path) -> None:
    samples = [Sample(f"x{n}", "abc"[n % 3], image, "val" if n % 4 == 0 else "train") for n, image in enumerate(jpegs)]
    make_samples([*samples, Sample("nobody", None, picture(1))], tmp_path / "ours", ShardSize(samples=7))
    for split in ("train", "val"):
        (tmp_path / "foreign" / split).mkdir(parents=True)
        for path in (tmp_path / "ours" / split).glob("*.tar"):
            shutil.copy(path, tmp_path / "foreign" / split)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    before = tree(tmp_path / "foreign")
    words = ["index", str(tmp_path / "foreign"), "--classes", str(tmp_path / "classes.txt"), "--workers", "2"]
    assert main(words) == 0
    for split in ("train", "val"):
        ours, theirs = Index.load(tmp_path / "ours" / split), Index.load(tmp_path / "foreign" / split)
        assert theirs.fingerprint == ours.fingerprint
        for name in ("index.bin", "shard-000000.idx"):
            assert (tmp_path / "foreign" / split / name).read_bytes() == (tmp_path / "ours" / split / name).read_bytes()
    after = tree(tmp_path / "foreign")
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "foreign").glob(".*"))


IMAGES = [picture(n) for n in range(6)]
ONE_TAR = {
    "cls, numbers": ([f"{n % 3}" for n in range(6)], "cls", [], ["0", "1", "2"] * 2),
    "cls, names": (["cat", "dog", "owl"] * 2, "cls", [], ["cat", "dog", "owl"] * 2),
    "txt": (["cat\n", "dog\n"] * 3, "txt", [], ["cat", "dog"] * 3),
    "json": ([json.dumps({"label": n % 2, "width": 9}) for n in range(6)], "json", [], ["0", "1"] * 3),
    "json, other field": (
        [json.dumps({"meta": {"species": "ab"[n % 2]}}) for n in range(6)],
        "json",
        ["--label-key", "meta.species"],
        ["a", "b"] * 3,
    ),
    "json and names": (
        [json.dumps({"label": n % 2}) for n in range(6)],
        "json",
        ["--classes", "{names}"],
        ["zebra", "ape"] * 3,
    ),
    "an ending in capitals": ([f"{n % 3}" for n in range(6)], "CLS", [], ["0", "1", "2"] * 2),
    "capitals, as asked for": (
        [json.dumps({"label": n % 2}) for n in range(6)],
        "JSON",
        ["--label-from", "json"],
        ["0", "1"] * 3,
    ),
    "names in another order": (["ape", "zebra"] * 3, "cls", ["--classes", "{names}"], ["ape", "zebra"] * 3),
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("case", ONE_TAR)
def test_every_form_of_labels(case: str, form: int, tmp_path: Path) -> None:
    labels, ext, options, classes = ONE_TAR[case]
    (tmp_path / "names").write_text(json.dumps({"0": ["zebra", "Zebra"], "1": ["ape", "Ape"]}))
    files: list[tuple[str, bytes | str]] = []
    for n, (image, label) in enumerate(zip(IMAGES, labels)):
        pair = [(f"part/{n:09d}.jpg", image), (f"part/{n:09d}.{ext}", label), (f"part/{n:09d}.seg.png", b"x")]
        files += pair if n % 2 else pair[::-1]
    pack(tmp_path / "in" / "00000.tar", files, form)
    words = [word.replace("{names}", str(tmp_path / "names")) for word in options]
    assert main(["index", str(tmp_path / "in"), *words]) == 0
    assert rows(tmp_path / "in" / "train") == list(zip(IMAGES, classes))
    assert main(["check", str(tmp_path / "in")]) == 0
    if "names" in case and "--classes" in options:
        assert Index.load(tmp_path / "in" / "train").classes == ("zebra", "ape")


def samples(first: int, count: int, kinds: str = "jpg", padding: int = 8) -> Iterator[tuple[str, bytes | str]]:
    for n in range(first, first + count):
        yield f"{n:0{padding}d}.{kinds}", picture(n)
        yield f"{n:0{padding}d}.cls", str(n % 5)


@pytest.mark.parametrize("unlabeled", ["-1", "-100"])
def test_names_that_are_digits_are_looked_up_beside_images_without_a_label(unlabeled: str, tmp_path: Path) -> None:
    labels = ["1", "2", unlabeled, "1"]
    files = [part for n in range(4) for part in ((f"{n}.jpg", IMAGES[n]), (f"{n}.cls", labels[n]))]
    pack(tmp_path / "in/a.tar", files)
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbf1\r\n2\r\n3\r\n")  # as Windows writes it
    assert main(["index", str(tmp_path / "in"), "--classes", str(tmp_path / "names")]) == 0
    assert Index.load(tmp_path / "in/train").classes == ("1", "2", "3")
    assert rows(tmp_path / "in/train") == list(zip(IMAGES, ["1", "2", None, "1"]))


def test_a_folder_in_an_old_kind_of_tar_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in [("set/", b""), ("set/0.jpg", IMAGES[0]), ("set/0.cls", b"dog")]:
            info = tarfile.TarInfo(name)
            info.type, info.size = tarfile.AREGTYPE, len(content)
            tar.addfile(info, io.BytesIO(content))
    assert main(["index", str(tmp_path / "in")]) == 0
    assert rows(tmp_path / "in/train") == [(IMAGES[0], "dog")]


def test_splits_by_the_tars_names_and_an_index_elsewhere(tmp_path: Path) -> None:
    pack(tmp_path / "in/imagenet1k-train-0000.tar", list(samples(0, 10)))
    pack(tmp_path / "in/imagenet1k-train-0001.tar", list(samples(0, 7, "JPEG")))  # the same keys once more
    pack(tmp_path / "in/imagenet1k-validation-00.tar", list(samples(30, 5, "png")))
    before = tree(tmp_path / "in")
    assert main(["index", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "in") == before
    assert rows(tmp_path / "out/train") == [(picture(n), str(n % 5)) for n in (*range(10), *range(7))]
    assert rows(tmp_path / "out/val") == [(picture(n), str(n % 5)) for n in range(30, 35)]
    assert Index.load(tmp_path / "out/val").classes == ("0", "1", "2", "3", "4")
    Index.load(tmp_path / "out/train").verify("hash")
    assert main(["check", str(tmp_path / "out")]) == 0
    for options in ([], ["--copy"]):
        part = tmp_path / f"part{len(options)}"
        assert main(["subset", str(tmp_path / "out"), str(part), "--per-class", "2", *options]) == 0
        assert sorted(label for _, label in rows(part / "train")) == sorted("0011223344")
    assert main(["check", str(tmp_path / "part0")]) == 0
    assert sorted(rows(tmp_path / "part0/train")) == sorted(rows(tmp_path / "part1/train"))


def test_dalis_reader_takes_its_index(tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    pack(tmp_path / "in/train/0.tar", list(samples(0, 6)), tarfile.PAX_FORMAT)
    (made,) = index_folder(tmp_path / "in")

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> object:
        paths = {"paths": [str(tmp_path / "in/train/0.tar")], "index_paths": [str(made.folder / "0.idx")]}
        return tuple(fn.readers.webdataset(**paths, ext=["jpg", "cls"]))

    pipe = pipeline()
    pipe.build()
    images, labels = pipe.run()
    assert [np.asarray(image).tobytes() for image in images] == [picture(n) for n in range(6)]
    assert [np.asarray(label).tobytes().decode() for label in labels] == [str(n % 5) for n in range(6)]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [*samples(0, 5), ("5.jpg", picture(5)[:-9]), ("5.cls", "1"), ("6.jpg", picture(6, "GIF")), ("6.cls", "1")]
    pack(tmp_path / "in/0.tar", [("._0.jpg", b"x"), *files])
    assert main(["index", str(tmp_path / "in")]) == 0
    assert rows(tmp_path / "in/train") == [(picture(n), str(n % 5)) for n in range(5)]
    manifest = json.loads((tmp_path / "in/train/manifest.json").read_text())
    assert manifest["skipped"] == [
        ["0.tar: 5.jpg", "the file is truncated"],
        ["0.tar: 6.jpg", "is GIF, which training cannot decode"],
    ]
    assert "2 skipped, see manifest.json (0.tar: 5.jpg: the file is truncated; ...)" in capsys.readouterr().out


def test_an_index_is_resumed_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(4):
        pack(tmp_path / f"in/{n}.tar", list(samples(10 * n, 5)))
    whole = (tmp_path / "in/2.tar").read_bytes()
    (tmp_path / "in/2.tar").write_bytes(whole[:3000])
    assert refusal(capsys, "index", tmp_path / "in", "--workers", 1) == (
        f"shards: {tmp_path}/in/2.tar: is damaged or cut off at byte 3000; fetch it again\n".replace("3000", "2560")
    )
    done = list((tmp_path / "in/.making/index/tars").iterdir())
    assert len(done) == 2
    times = {path: path.stat().st_mtime_ns for path in done}
    # Only the first tar is looked into again.  Were this one read, what lies there now would be refused; its time and size are as they were.
    shutil.move(tmp_path / "in/1.tar", tmp_path / "kept")
    (tmp_path / "in/1.tar").write_bytes(b"x" * (tmp_path / "kept").stat().st_size)
    os.utime(tmp_path / "in/1.tar", ns=(0, (tmp_path / "kept").stat().st_mtime_ns))
    (tmp_path / "in/2.tar").write_bytes(whole)
    form = ("--label-from", "cls")
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert main(["index", str(tmp_path / "in"), *form]) == 0
    shutil.move(tmp_path / "kept", tmp_path / "in/1.tar")
    assert rows(tmp_path / "in/train") == [
        (picture(n), str(n % 5)) for first in (0, 10, 20, 30) for n in range(first, first + 5)
    ]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["0.tar", "1.tar", "2.tar", "3.tar", "train"]
    assert refusal(capsys, "index", tmp_path / "in") == (
        f"shards: {tmp_path}/in/train: has an index already; remove its index.json to make it again\n"
    )
