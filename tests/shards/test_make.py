from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train.errors import DataError
from shards import sources
from shards.__main__ import main
from shards.index import Index
from shards.make import Sample, ShardSize, make, make_samples
from tests.common import ROOT, tree

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "owl": (30, 30, 200)}


def draw(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 50, (size[1], size[0], 3))
    Image.fromarray((noise + np.array(colour)).astype(np.uint8)).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three classes of 8, 9 and 10 images as JPEG and PNG, some in deeper folders."""
    folder = tmp_path / "source"
    for extra, (name, colour) in enumerate(COLOURS.items()):
        for number in range(8 + extra):
            place = folder / name / "deeper" if number == 3 else folder / name
            draw(place / f"{name} {number}.v1.{'png' if number % 2 else 'jpeg'}", colour)
    return folder


def test_digits_are_split_by_class_and_smooth(tmp_path: Path) -> None:
    assert main(["make", "digits", str(tmp_path / "out")]) == 0
    train, val = Index.load(tmp_path / "out" / "train"), Index.load(tmp_path / "out" / "val")
    assert (len(train), len(val)) == (1437, 360)
    assert np.bincount(val.label).tolist() == [36] * 10
    names = [key.decode().split("-", 1)[1] for index in (train, val) for key in index.key]
    assert sorted(names) == [f"digit-{number:04d}" for number in range(1797)]
    for index, folder in ((train, "train"), (val, "val")):
        content = (tmp_path / "out" / folder / "shard-000000.tar").read_bytes()
        image = Image.open(io.BytesIO(content[index.offset[0] : index.offset[0] + index.size[0]]))
        assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")
        from sklearn.datasets import load_digits

        number = int(index.key[0].decode()[-4:])
        assert load_digits().target[number] == index.label[0]
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
        assert np.abs(small - load_digits().images[number]).mean() < 1


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("again", "1"), ("two", "2")):
        assert (
            main(["make", "folder", str(source), str(tmp_path / name), "--shard-size", "7", "--workers", workers]) == 0
        )
    first = tree(tmp_path / "one")
    assert sum(name.endswith(".tar") for name in first) == 4
    assert first == tree(tmp_path / "again") == tree(tmp_path / "two")
    assert os.stat(tmp_path / "one" / "train").st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_folder_keeps_bytes_and_shuffles_classes(source: Path, tmp_path: Path) -> None:
    assert main(["make", "folder", str(source), str(tmp_path / "out")]) == 0
    index = Index.load(tmp_path / "out" / "train")
    assert index.classes == ("cat", "dog", "owl")
    assert np.bincount(index.label).tolist() == [8, 9, 10]
    content = (tmp_path / "out" / "train" / "shard-000000.tar").read_bytes()
    stored = sorted((int(label), content[o : o + s]) for label, o, s in zip(index.label, index.offset, index.size))
    files = sorted((index.classes.index(p.relative_to(source).parts[0]), p.read_bytes()) for p in source.rglob("*.*g"))
    assert stored == files
    assert {(int(w), int(h)) for w, h in zip(index.width, index.height)} == {(20, 16)}
    assert set(index.ext.tolist()) == {b"jpg", b"png"}
    assert np.mean(index.label[1:] == index.label[:-1]) < 0.6
    assert all(b"." not in key and b" " not in key for key in index.key)


def test_splits_share_the_classes(source: Path, tmp_path: Path) -> None:
    for split, names in (("train", ("cat", "owl")), ("val", ("owl", "dog")), ("test", ("cat",))):
        for name in names:
            (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
            os.symlink(source / name, tmp_path / "in" / split / name)
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out"), "--extra-classes"]) == 0
    indices = {split: Index.load(tmp_path / "out" / split) for split in ("train", "val", "test")}
    assert {index.classes for index in indices.values()} == {("cat", "dog", "owl")}
    assert [np.bincount(index.label, minlength=3).tolist() for index in indices.values()] == [
        [8, 0, 10],
        [0, 9, 10],
        [8, 0, 0],
    ]


def test_val_per_class_holds_out_the_same_images_always(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(["make", "folder", str(source), str(tmp_path / name), "--val-per-class", "3"]) == 0
    train, val = Index.load(tmp_path / "a" / "train"), Index.load(tmp_path / "a" / "val")
    assert np.bincount(val.label).tolist() == [3, 3, 3]
    assert np.bincount(train.label).tolist() == [5, 6, 7]
    stems = [key.split(b"-", 1)[1] for index in (train, val) for key in index.key]
    assert len(set(stems)) == 27
    assert Index.load(tmp_path / "b" / "val").fingerprint == val.fingerprint


def test_per_class_takes_so_many_of_every_class_before_val_is_held_out(source: Path, tmp_path: Path) -> None:
    assert main(["make", "folder", str(source), str(tmp_path / "few"), "--per-class", "5", "--val-per-class", "2"]) == 0
    counts = [np.bincount(Index.load(tmp_path / "few" / split).label).tolist() for split in ("train", "val")]
    assert counts == [[3, 3, 3], [2, 2, 2]]


def test_labels_per_class_takes_the_labels_from_the_others_only(source: Path, tmp_path: Path) -> None:
    whole = ["make", "folder", str(source), str(tmp_path / "whole"), "--val-per-class", "2"]
    assert main(whole) == 0
    assert main([*whole[:3], str(tmp_path / "few"), *whole[4:], "--labels-per-class", "3"]) == 0
    few, all_of_them = Index.load(tmp_path / "few" / "train"), Index.load(tmp_path / "whole" / "train")
    assert np.bincount(few.label[few.label >= 0]).tolist() == [3, 3, 3]
    assert (few.label == -100).sum() == len(all_of_them) - 9
    assert (few.label[few.label >= 0] == all_of_them.label[few.label >= 0]).all()
    assert (tmp_path / "few" / "val" / "shard-000000.tar").read_bytes() == (
        tmp_path / "whole" / "val" / "shard-000000.tar"
    ).read_bytes()


def test_unreadable_files_are_skipped_and_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (source / "cat" / "cat 0.v1.jpeg").read_bytes()
    (source / "cat" / "cut.jpg").write_bytes(whole[:-20])
    (source / "cat" / "notes.txt").write_text("no image")
    (source / "dog" / "empty.png").touch()
    os.mkfifo(source / "dog" / "pipe.jpg")
    (source / "dog" / "cutoff.png").write_bytes((source / "dog" / "dog 1.v1.png").read_bytes()[:-40])
    (source / "owl" / ".hidden.jpg").write_bytes(b"x")
    (source / ".cache").mkdir()
    assert main(["make", "folder", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(Index.load(tmp_path / "out" / "train")) == 27
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["skipped"] == [
        ["cat/cut.jpg", "the file is truncated"],
        ["cat/notes.txt", "not an image"],
        ["dog/cutoff.png", "the file is truncated"],
        ["dog/empty.png", "the file is empty"],
        ["dog/pipe.jpg", "a link, a pipe or a device, not a file"],
    ]
    assert manifest["per_class"] == {"cat": 8, "dog": 9, "owl": 10}
    assert "5 skipped, see manifest.json (cat/cut.jpg: the file is truncated; ...)" in capsys.readouterr().out


def test_formats_that_dali_cannot_decode_become_png(tmp_path: Path) -> None:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 14, 3)).astype(np.uint8))
    for ending in ("gif", "tiff", "bmp", "webp"):
        (tmp_path / "in" / ending).mkdir(parents=True)
        pixels.save(tmp_path / "in" / ending / f"x.{ending}", lossless=True)
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    index = Index.load(tmp_path / "out" / "train")
    assert dict(zip(index.label.tolist(), index.ext.tolist())) == {0: b"bmp", 1: b"png", 2: b"png", 3: b"webp"}
    content = (tmp_path / "out" / "train" / "shard-000000.tar").read_bytes()
    tiff = index.label.tolist().index(2)
    stored = Image.open(io.BytesIO(content[index.offset[tiff] : index.offset[tiff] + index.size[tiff]]))
    assert np.array_equal(np.asarray(stored), np.asarray(pixels))
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["converted"] == [["gif/x.gif", "GIF"], ["tiff/x.tiff", "TIFF"]]


def test_shards_end_where_they_are_full(source: Path, tmp_path: Path) -> None:
    # 4,500,000 bytes of uncompressed images in shards of 1 MB.
    for number in range(9):
        draw(tmp_path / "in" / "one" / f"{number}.bmp", (9, 9, 9), size=(500, 333))
    make(sources.folder(tmp_path / "in"), tmp_path / "out", ShardSize.parse("1MB"))
    index = Index.load(tmp_path / "out" / "train")
    assert index.shard_sizes.tolist() == [2, 2, 2, 2, 1]
    make(sources.folder(source), tmp_path / "samples", ShardSize.parse("10"))
    assert Index.load(tmp_path / "samples" / "train").shard_sizes.tolist() == [10, 10, 7]


BAD = {
    "source missing": (["{in}/none", "{out}"], "no such folder"),
    "no images": (["{tmp}/empty", "{out}"], "has no class folders"),
    "empty class": (["{tmp}/hollow", "{out}"], "hollow/dog: is empty"),
    "class of texts": (["{tmp}/texts", "{out}"], "class 'dog' has no readable image .*a.txt: not an image"),
    "mixed": (["{tmp}/mixed", "{out}"], "holds train and also 'cat'"),
    "class too small": (["{in}", "{out}", "--val-per-class", "8"], "class 'cat' has 8 images; use at most 7"),
    "class too small to take from": (
        ["{in}", "{out}", "--per-class", "9"],
        "class 'cat' has 8 images; use at most 8",
    ),
    "val twice": (["{tmp}/split", "{out}", "--val-per-class", "1"], "has a val split"),
    "out is a file": (["{in}", "{tmp}/file/x"], "cannot be written"),
    "out is there": (["{in}", "{tmp}/done"], "done/train: is there already"),
    "out holds other shards": (["{in}", "{tmp}/other"], "other/test: is there already"),
    "no number": (["{in}", "{out}", "--val-per-class", "0"], "'0' is not a whole number above 0"),
    "a word": (["{in}", "{out}", "--per-class", "ten"], "'ten' is not a whole number above 0"),
    "no quality": (["{in}", "{out}", "--quality", "96"], "'96' is not a whole number from 1 to 95"),
    "no size": (["{in}", "{out}", "--shard-size", "5GB"], "neither a number of samples"),
    "no such option": (["{in}", "{out}", "--colour"], "unrecognized arguments: --colour"),
    "no out": (["{in}"], "required: OUT"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "done" / "train").mkdir(parents=True)
    (tmp_path / "other" / "test").mkdir(parents=True)
    (tmp_path / "other" / "test" / "index.json").touch()
    for name in ("hollow", "texts", "mixed"):
        draw(tmp_path / name / ("train/cat" if name == "mixed" else "cat") / "1.png", (1, 2, 3))
    (tmp_path / "hollow" / "dog").mkdir()
    (tmp_path / "texts" / "dog").mkdir()
    (tmp_path / "texts" / "dog" / "a.txt").write_text("text")
    (tmp_path / "mixed" / "cat").mkdir()
    for split in ("train", "val"):
        draw(tmp_path / "split" / split / "cat" / "1.png", (1, 2, 3))
    arguments, message = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    names = {"in": source, "out": tmp_path / "out", "tmp": tmp_path}
    try:
        code = main(["make", "folder", *(argument.format(**names) for argument in arguments)])
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert re.search(message, printed.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_listed_is_refused_and_not_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed, scandir = source / "dog" / "deeper", os.scandir

    def refuse(path: Any = ".") -> Any:
        if path == str(closed):  # root may list every folder
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["make", "folder", str(source), str(tmp_path / "out")]) == 2
    assert f"{closed}: cannot be read (Permission denied)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(source: Path, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = ["make", "folder", str(source), str(tmp_path / "out"), "--shard-size", "9"]
    command = [sys.executable, "-m", "shards", *words, "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files_only, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written (File too large); free space and run the same command again" in done.stderr
    assert os.listdir(tmp_path / "out") == [".making"]
    assert main(words) == 0
    assert main([*words[:3], str(tmp_path / "whole"), *words[4:]]) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_script_that_its_workers_would_run_again_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import threading\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from shards.make import Sample, ShardSize, make_samples\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "made = (Sample(str(n), 'ab'[n % 2], np.full((8, 8, 3), n, np.uint8)) for n in range(4))\n"
        f"make_samples(made, Path({str(tmp_path / 'out')!r}), ShardSize(samples=2), workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    last = done.stderr.splitlines()[-1]
    assert "DataError: a worker process ended before it had done anything" in last
    assert "if __name__ == '__main__':" in last


@pytest.mark.parametrize(
    ("sample", "line"),
    [
        (Sample("x", "a", [1, 2]), "sample x: its image is a list; give the bytes of an encoded image, a PIL image, or uint8 [H, W] or [H, W, 3]"),
        (Sample("x", "a", np.zeros((4, 4))), "sample x: its image is an array float64 [4, 4]; give uint8 [H, W] or [H, W, 3]"),
        (Sample("x", "a", np.zeros((3, 4, 4), np.uint8)), "sample x: its image is an array uint8 [3, 4, 4]; give uint8 [H, W] or [H, W, 3]"),
        (Sample("x", 3, b"x"), "sample x: its label is a int; give the class's name, or None without one"),  # type: ignore[arg-type]
        (Sample(7, "a", b"x"), "sample 7: its name is a int; give a text"),  # type: ignore[arg-type]
        (Sample("x", "a", b"x", "valid"), "sample x: its split is 'valid'; allowed are train, val, test"),
        ("x", "a sample is a str; give Sample(name, label, image, split)"),
    ],
)  # fmt: skip
def test_a_sample_of_a_wrong_type_is_refused_when_it_comes(sample: Sample, line: str, tmp_path: Path) -> None:
    later = []

    def given():  # type: ignore[no-untyped-def]
        yield sample
        later.append(1)

    with pytest.raises(DataError) as error:
        make_samples(given(), tmp_path / "out")
    assert (str(error.value), later) == (line, [])
    assert not (tmp_path / "out").exists()
