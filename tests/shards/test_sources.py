"""Every source in its official form, built from real JPEGs: what goes in comes out."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shards.__main__ import main
from shards.index import Index
from shards.make import Sample, ShardSize, make_samples
from tests.common import refusal, tree

SYNSETS = ("n01440764", "n01494475", "n01514859", "n02096177")


def pack(files: Mapping[str, bytes], compression: str = "") -> bytes:
    """A tar of files; names that end in a slash are folders."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def stored(split: Path) -> dict[str, list[bytes]]:
    """The encoded images of a split by class."""
    index = Index.load(split)
    images: dict[str, list[bytes]] = {name: [] for name in index.classes}
    labeled = index.label >= 0
    columns = (index.shard, index.offset, index.size, index.label)
    for shard, offset, size, label in zip(*(column[labeled] for column in columns)):
        with open(split / index.shards[shard].name, "rb") as file:
            file.seek(offset)
            images[index.classes[label]].append(file.read(size))
    return {name: sorted(found) for name, found in images.items()}


class Originals:
    """The archives of ILSVRC 2012 with four classes, as they are published."""

    def __init__(self, folder: Path, jpegs: list[bytes]) -> None:
        from scipy.io import savemat  # type: ignore[import-untyped]

        self.folder = folder
        self.train = {name: jpegs[8 * n : 8 * n + 8] for n, name in enumerate(SYNSETS)}
        inner = {
            f"{name}.tar": pack({f"{name}_{number}.JPEG": image for number, image in enumerate(images)})
            for name, images in self.train.items()
        }
        (folder / "ILSVRC2012_img_train.tar").write_bytes(pack(inner))
        # In the archive in another order than that of the names, which the ground truth has.
        self.val = {f"ILSVRC2012_val_{n:08d}.JPEG": jpegs[32 + n - 1] for n in (3, 1, 2, 8, 4, 5, 7, 6)}
        (folder / "ILSVRC2012_img_val.tar").write_bytes(pack(self.val))
        # The devkit numbers the synsets in another order than the alphabet's, and has inner nodes.
        self.numbers = {SYNSETS[0]: 3, SYNSETS[1]: 1, SYNSETS[2]: 4, SYNSETS[3]: 2, "n00001740": 5}
        self.truth = [SYNSETS[n] for n in (0, 1, 2, 3, 3, 2, 1, 0)]
        rows = np.zeros((5, 1), [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
        for row, (name, number) in zip(rows, self.numbers.items()):
            row[0] = (float(number), name, "words")
        file = io.BytesIO()
        savemat(file, {"synsets": rows})
        self.meta = file.getvalue()
        self.lines = "".join(f"{self.numbers[name]}\n" for name in self.truth).encode()

    def by_class(self) -> dict[str, list[bytes]]:
        images = [self.val[name] for name in sorted(self.val)]
        return {name: sorted(i for i, t in zip(images, self.truth) if t == name) for name in SYNSETS}

    def devkit(self) -> None:
        kit = "ILSVRC2012_devkit_t12"
        truth, meta = f"{kit}/data/ILSVRC2012_validation_ground_truth.txt", f"{kit}/data/meta.mat"
        (self.folder / f"{kit}.tar.gz").write_bytes(pack({f"{kit}/": b"", truth: self.lines, meta: self.meta}, "gz"))


@pytest.fixture
def originals(tmp_path: Path, jpegs: list[bytes]) -> Originals:
    (tmp_path / "in").mkdir()
    return Originals(tmp_path / "in", jpegs)


def test_imagenet_from_the_original_archives(originals: Originals, tmp_path: Path) -> None:
    originals.devkit()
    command = ["make", "imagenet", str(originals.folder)]
    assert main([*command, str(tmp_path / "out"), "--shard-size", "7", "--workers", "2"]) == 0
    assert stored(tmp_path / "out" / "train") == {name: sorted(found) for name, found in originals.train.items()}
    assert stored(tmp_path / "out" / "val") == originals.by_class()
    assert main([*command, str(tmp_path / "again"), "--shard-size", "7", "--workers", "1"]) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def synset_lines(o: Originals) -> list[str]:
    (o.folder / "synsets.txt").write_text("\n".join(o.truth))
    return ["--val-labels", str(o.folder / "synsets.txt")]


def kaggle(o: Originals) -> list[str]:
    rows = [f"ILSVRC2012_val_{n:08d},{name} 10 20 300 400 " for n, name in enumerate(o.truth, start=1)]
    (o.folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)))
    return []


def kit_folder(o: Originals) -> list[str]:
    data = o.folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_bytes(o.lines)
    (data / "meta.mat").write_bytes(o.meta)
    return []


def numbers_and_meta(o: Originals) -> list[str]:
    (o.folder / "ILSVRC2012_validation_ground_truth.txt").write_bytes(o.lines)
    (o.folder / "meta.mat").write_bytes(o.meta)
    return []


def unpacked(o: Originals) -> list[str]:
    for name, images in o.train.items():
        (o.folder / "train" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            (o.folder / "train" / name / f"{name}_{number}.JPEG").write_bytes(image)
    (o.folder / "val").mkdir()
    for file, image in o.val.items():
        (o.folder / "val" / file).write_bytes(image)
    for path in o.folder.glob("*.tar"):
        path.unlink()
    return synset_lines(o)


def val_by_classes(o: Originals) -> list[str]:
    for name, images in o.by_class().items():
        (o.folder / "val" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            (o.folder / "val" / name / f"{number}.JPEG").write_bytes(image)
    (o.folder / "ILSVRC2012_img_val.tar").unlink()
    return []


@pytest.mark.parametrize("form", [synset_lines, kaggle, kit_folder, numbers_and_meta, unpacked, val_by_classes])
def test_imagenet_in_its_other_forms(
    form: Callable[[Originals], list[str]], originals: Originals, tmp_path: Path
) -> None:
    words = form(originals)
    assert main(["make", "imagenet", str(originals.folder), str(tmp_path / "out"), *words, "--workers", "1"]) == 0
    assert stored(tmp_path / "out" / "train") == {name: sorted(found) for name, found in originals.train.items()}
    assert stored(tmp_path / "out" / "val") == originals.by_class()


def test_what_is_wrong_with_imagenet_is_one_line(
    originals: Originals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["make", "imagenet", originals.folder, tmp_path / "out"]
    train, truth = originals.folder / "ILSVRC2012_img_train.tar", originals.folder / "truth.txt"
    assert "the classes of its images are not known; put ILSVRC2012_devkit" in refusal(capsys, *command)
    command += ["--val-labels", truth]
    assert "truth.txt: cannot be read (No such file" in refusal(capsys, *command)
    truth.write_text("\n".join(originals.truth[1:]))
    assert "has 7 entries, " in refusal(capsys, *command)
    truth.write_text("\n".join(["n99999999", *originals.truth[1:]]))
    assert "its class n99999999 is none of the 4 of train" in refusal(capsys, *command)
    truth.write_bytes(originals.lines)
    assert "devkit's meta.mat, which must lie beside" in refusal(capsys, *command)
    truth.write_bytes(b"\xff\xd8 an image")
    assert "truth.txt: is no text" in refusal(capsys, *command)
    truth.write_bytes(originals.lines)
    (originals.folder / "meta.mat").write_bytes(originals.meta[:200])
    assert "meta.mat of the devkit: cannot be understood" in refusal(capsys, *command)
    truth.write_text("\n".join(originals.truth))
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    assert "is cut off in n0" in refusal(capsys, *command)
    train.write_bytes(b"<html>not found</html>" * 100)
    assert "is an HTML page, not a tar; fetch it again" in refusal(capsys, *command)
    train.write_bytes(pack({"n01440764/1.JPEG": b"x"}))
    assert "not one tar per class" in refusal(capsys, *command)
    train.write_bytes(pack({"n01440764.tar": pack({})}))
    assert "n01440764.tar is empty" in refusal(capsys, *command)
    assert "has neither ILSVRC2012_img_train.tar nor" in refusal(capsys, "make", "imagenet", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
@pytest.mark.parametrize("top", ["", "photos/2024/"])
def test_a_tar_gives_what_its_folder_gives(compression: str, top: str, jpegs: list[bytes], tmp_path: Path) -> None:
    files = {
        f"{split}/{name}/{n}.jpg": jpegs[n + 8 * (split == "val")]
        for split in ("train", "val")
        for name in ("a", "b")
        for n in range(8)
    }
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    hidden = {"train/a/._1.jpg": b"x", "__MACOSX/train/a/1.jpg": b"x"}
    packed = {f"{top or './'}{name}": content for name, content in (files | hidden).items()}
    (tmp_path / "in.tar").write_bytes(pack(packed, compression))
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert main(["make", "folder", str(tmp_path / "in.tar"), str(tmp_path / "tar"), "--workers", "2"]) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "tar")


def test_what_is_wrong_with_a_tar_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "in.tar", gzip.compress(b"x" * 5000)
    whole = pack({"cat/1.jpg": picture, "cat/2.jpg": picture})
    second = whole.index(b"cat/2.jpg")
    for content, message in (
        (b"no archive" * 100, "is not a tar archive"),
        (pack({"cat/1.jpg": b"x", "dog/": b""}), "dog: is empty"),
        (pack({"cat/1.jpg": b"x", "Cat/1.jpg": b"x"}), "the classes 'Cat' and 'cat' collide"),
        (pack({"1.jpg": b"x"}), "has no class folders"),
        (pack({"train/cat/1.jpg": b"x", "other/1.jpg": b"x"}), "holds train and also 'other'"),
        (gzip.compress(pack({"cat/1.jpg": picture}))[:-40], "is damaged or cut off"),
        (pack({"cat/1.jpg": picture})[:600], "unexpected end of data"),
        (whole[:second], f"is damaged or cut off at byte {second}"),
        (whole[: second + 100], f"is damaged or cut off at byte {second}"),
        (whole[:second] + bytes(range(256)) * 2 + whole[second + 512 :], f"is damaged or cut off at byte {second}"),
    ):
        path.write_bytes(content)
        assert message in refusal(capsys, "make", "folder", path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


Batch = tuple[NDArray[np.uint8], list[int]]


@pytest.fixture(scope="module")
def batches(jpegs: list[bytes]) -> dict[str, Batch]:
    """Seven small batches of real images, as rows of CIFAR: all red, all green, all blue."""
    rows = []
    for image in jpegs[:35]:
        small = np.asarray(Image.open(io.BytesIO(image)).convert("RGB").resize((32, 32)))
        rows.append(small.transpose(2, 0, 1).reshape(-1))
    return {f"{n}": (np.array(rows[5 * n : 5 * n + 5]), [(3 * n + k) % 10 for k in range(5)]) for n in range(7)}


def cifar10(batches: dict[str, Batch]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The official files, python (as Python 2 pickled them, with texts as bytes) and binary."""
    python, binary = {}, {}
    for n in range(6):
        name = f"data_batch_{n + 1}" if n < 5 else "test_batch"
        pixels, labels = batches[str(n)]
        python[f"cifar-10-batches-py/{name}"] = pickle.dumps({b"data": pixels, b"labels": labels}, 2)
        binary[f"cifar-10-batches-bin/{name}.bin"] = b"".join(bytes([k]) + p.tobytes() for k, p in zip(labels, pixels))
    names = [f"class{n}" for n in range(10)]
    python["cifar-10-batches-py/batches.meta"] = pickle.dumps({b"label_names": [name.encode() for name in names]}, 2)
    binary["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*names, ""]).encode()
    return python, binary


def test_cifar10_python_and_binary_give_the_same(batches: dict[str, Batch], tmp_path: Path) -> None:
    for name, files in zip(("python", "binary"), cifar10(batches)):
        (tmp_path / name).write_bytes(pack(files, "gz"))
        assert main(["make", "cifar10", str(tmp_path / name), str(tmp_path / f"{name}-out"), "--workers", "2"]) == 0
    assert tree(tmp_path / "python-out") == tree(tmp_path / "binary-out")
    index, images = Index.load(tmp_path / "python-out" / "test"), stored(tmp_path / "python-out" / "test")
    assert index.classes == tuple(f"class{n}" for n in range(10))
    assert len(Index.load(tmp_path / "python-out" / "train")) == 25
    for row, label in zip(*batches["5"]):
        pixels = row.reshape(3, 32, 32).transpose(1, 2, 0)
        assert any(
            np.array_equal(np.asarray(Image.open(io.BytesIO(image))), pixels) for image in images[f"class{label}"]
        )


def test_cifar100_has_its_fine_labels(batches: dict[str, Batch], tmp_path: Path) -> None:
    names = [f"fine{n:02d}" for n in range(100)]
    python = {"meta": pickle.dumps({b"fine_label_names": [name.encode() for name in names]}, 2)}
    binary = {"fine_label_names.txt": "\n".join(names).encode()}
    for name, n in (("train", 0), ("test", 1)):
        pixels, labels = batches[str(n)]
        fine = [10 * label for label in labels]
        python[name] = pickle.dumps({b"data": pixels, b"fine_labels": fine, b"coarse_labels": labels}, 2)
        binary[f"{name}.bin"] = b"".join(bytes([k, 10 * k]) + p.tobytes() for k, p in zip(labels, pixels))
    for folder, files in (("python", python), ("binary", binary)):
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)
        assert main(["make", "cifar100", str(tmp_path / folder), str(tmp_path / f"{folder}-out")]) == 0
    assert tree(tmp_path / "python-out") == tree(tmp_path / "binary-out")
    assert sorted(Index.load(tmp_path / "python-out" / "train").label.tolist()) == [0, 10, 20, 30, 40]


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch harmed",)


def test_what_is_wrong_with_cifar_is_one_line(
    batches: dict[str, Batch], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    python, binary = cifar10(batches)
    batch = "cifar-10-batches-py/data_batch_3"
    for files, message in (
        ({**python, batch: pickle.dumps(Harmful())}, "it asks for posix.system, which the official files do not"),
        ({**python, batch: python[batch][:100]}, "data_batch_3 is not a pickle of CIFAR"),
        ({**python, batch: pickle.dumps({b"data": [1]})}, "data_batch_3 is malformed"),
        ({**python, batch: pickle.dumps([1])}, "a list, not a dictionary"),
        ({name: content for name, content in python.items() if name != batch}, "has no data_batch_3"),
        ({"readme": b""}, "has neither test_batch nor test_batch.bin"),
        ({**binary, "cifar-10-batches-bin/data_batch_2.bin": b"x" * 5000}, "not records of 3073"),
        ({**binary, "cifar-10-batches-bin/data_batch_2.bin": b"\x0b" * 3073}, "has label 11, train has 10 classes"),
        ({**binary, "cifar-10-batches-bin/batches.meta.txt": b"a b"}, "names 2 classes, CIFAR-10 has 10"),
    ):
        (tmp_path / "in").write_bytes(pack(files, "gz"))
        assert message in refusal(capsys, "make", "cifar10", tmp_path / "in", tmp_path / "out")
    packed = pack(python, "gz")
    for place in range(len(packed) // 8, len(packed), len(packed) // 8):  # in pixels too, where the tar shows nothing
        (tmp_path / "in").write_bytes(packed[:place] + b"\xff" * 8 + packed[place + 8 :])
        assert "in: " in refusal(capsys, "make", "cifar10", tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").write_text("no archive")
    assert "is not an archive" in refusal(capsys, "make", "cifar10", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "harmed").exists()


def test_any_iterable_in_any_order(jpegs: list[bytes], tmp_path: Path) -> None:
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    samples = [Sample(f"x{n}", "ab"[n % 2], image) for n, image in enumerate(jpegs[:20])]
    samples += [Sample("pixels", "c", pixels), Sample("picture", "c", Image.fromarray(pixels[:, :, 0]))]
    samples += [Sample("nobody", None, jpegs[21]), Sample("x1", "a", jpegs[22], "val")]
    make_samples(iter(samples), tmp_path / "out", ShardSize(samples=5))
    make_samples(reversed(samples), tmp_path / "reversed", ShardSize(samples=5), workers=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "reversed")
    train = Index.load(tmp_path / "out" / "train")
    assert train.classes == ("a", "b", "c")
    assert np.bincount(train.label + 100).nonzero()[0].tolist() == [0, 100, 101, 102]
    arrays = [np.asarray(Image.open(io.BytesIO(image))) for image in stored(tmp_path / "out" / "train")["c"]]
    assert {array.shape for array in arrays} == {(10, 10), (10, 10, 3)}
    assert next(np.array_equal(array, pixels) for array in arrays if array.ndim == 3)
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["per_class"] == {"a": 10, "b": 10, "c": 2}
