"""WebDatasets made elsewhere that cannot be indexed, or were not yet: what is in the way, in one line."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_train.errors import DataError
from shards.index import Index
from tests.common import refusal
from tests.shards.test_foreign import IMAGES, Files, pack


def lying(size: int) -> bytes:
    """A tar whose only header gives another size."""
    info = tarfile.TarInfo("1.jpg")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)


def link() -> bytes:
    info = tarfile.TarInfo("1.jpg")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info.tobuf() + bytes(10240)


PAIR = [("1.jpg", IMAGES[1]), ("1.cls", "3")]
REFUSED: dict[str, tuple[Mapping[str, bytes | Files], list[str], str]] = {
    "no tars": (
        {"a.txt": b""},
        [],
        "{in}: holds no tars, nor do train/, val/ and test/ in it; give the folder of a WebDataset's tars",
    ),
    "compressed": (
        {"a.tar.gz": b"\x1f\x8b"},
        [],
        "{in}/a.tar.gz: is compressed; samples are read at their places in the tar, which a compressed one has not: uncompress it",
    ),
    "compressed, called tar": (
        {"a.tar": b"\x1f\x8b" + bytes(600)},
        [],
        "{in}/a.tar: is compressed with gzip, not a tar; uncompress it with gzip -d",
    ),
    "zip": (
        {"a.tar": b"PK\x03\x04" + bytes(600)},
        [],
        "{in}/a.tar: is a zip archive, not a tar; unpack it with unzip and give the folder",
    ),
    "some named": (
        {"train-0.tar": PAIR, "other.tar": PAIR},
        [],
        "{in}: the name of other.tar says no split, those of others do; put every split into a folder (train, val, test)",
    ),
    "beside a split": (
        {"train/0.tar": PAIR, "1.tar": PAIR},
        [],
        "{in}: holds 1.tar beside train/; put it into the folder of its split",
    ),
    "no labels": (
        {"a.tar": [("1.jpg", IMAGES[0]), ("1.npy", b"x")]},
        [],
        "{in}/a.tar: its first sample, 1, has no .cls, .json or .txt with a label",
    ),
    "a label missing": (
        {"a.tar": [*PAIR, ("2.jpg", IMAGES[2])]},
        [],
        "{in}/a.tar: sample 2 has no .cls; add it, or give another --label-from",
    ),
    "no image": (
        {"a.tar": [*PAIR, ("2.cls", "1")]},
        [],
        "{in}/a.tar: sample 2 has no image (cls); images end in jpg, jpeg, png, webp",
    ),
    "two images": (
        {"a.tar": [*PAIR, ("1.png", IMAGES[2])]},
        [],
        "{in}/a.tar: sample 1 has several images (jpg, png); keep one of them",
    ),
    "a key twice": (
        {"a.tar": [*PAIR, ("2.jpg", IMAGES[2]), ("2.cls", "1"), *PAIR]},
        [],
        "{in}/a.tar: has two samples of the key 1; give every sample a key of its own",
    ),
    "a file twice": ({"a.tar": [PAIR[0], *PAIR]}, [], "{in}/a.tar: holds 1.jpg twice; pack it again"),
    "img2dataset": (
        {"a.tar": [PAIR[0], ("1.json", json.dumps({"caption": "a dog", "url": "x"})), ("1.txt", "a dog")]},
        [],
        "{in}/a.tar: its samples have no .cls, and of their JSON's fields (caption, url) none is 'label'; give --label-key FIELD, or --label-from txt",
    ),
    "captions": (
        {"a.tar": [pair for n in range(101) for pair in ((f"{n}.jpg", IMAGES[0]), (f"{n}.txt", f"a photo of {n}"))]},
        [],
        "its 101 samples have 101 different labels, such as 'a photo of 0': captions, no classes; give --label-from or --label-key",
    ),
    "a field that is not there": (
        {"a.tar": [PAIR[0], ("1.json", "{}")]},
        ["--label-key", "a.b"],
        "{in}/a.tar: sample 1: its .json has no label (its JSON has no field 'a.b')",
    ),
    "a field that is no class": (
        {"a.tar": [PAIR[0], ("1.json", '{"label": [1]}')]},
        [],
        "{in}/a.tar: sample 1: its .json has no label (its field 'label' is a list, not a class)",
    ),
    "bytes for a label": (
        {"a.tar": [PAIR[0], ("1.cls", b"\xff\xfe")]},
        [],
        "{in}/a.tar: sample 1: its .cls has no label (it is no text)",
    ),
    "an empty label": (
        {"a.tar": [PAIR[0], ("1.cls", b" ")]},
        [],
        "{in}/a.tar: sample 1: its .cls has no label (it is empty)",
    ),
    "numbers that are no classes": (
        {"a.tar": [PAIR[0], ("1.cls", "123456")]},
        [],
        "its labels are 1 numbers up to 123456, which are no classes from 0 on; give --classes FILE with a name for each, or another --label-key",
    ),
    "a negative number": (
        {"a.tar": [PAIR[0], ("1.cls", "-2")]},
        [],
        "the label -2 is no class; those without one have -1 or -100, classes count from 0",
    ),
    "a number without end": (
        {"a.tar": [PAIR[0], ("1.cls", "9" * 5000)], "names.txt": b"a\nb\n"},
        ["--classes", "{in}/names.txt"],
        f"the label '{'9' * 60}' is none of the 2 classes of --classes; add it there",
    ),
    "too few names": (
        {"a.tar": PAIR, "names.txt": b"a\nb\n"},
        ["--classes", "{in}/names.txt"],
        "its labels go up to 3, --classes names 2 classes, 0 to 1",
    ),
    "a name that is none": (
        {"a.tar": [PAIR[0], ("1.cls", "cat")], "names.txt": b"a\nb\n"},
        ["--classes", "{in}/names.txt"],
        "the label 'cat' is none of the 2 classes of --classes; add it there",
    ),
    "a name twice": (
        {"a.tar": PAIR, "names.txt": b"a\nb\na\n"},
        ["--classes", "{in}/names.txt"],
        "{in}/names.txt: names the class 'a' twice",
    ),
    "a class only in val": (
        {"train/a.tar": [PAIR[0], ("1.cls", "cat")], "val/a.tar": [PAIR[0], ("1.cls", "dog")]},
        [],
        "val has the class 'dog', which train lacks; give --classes FILE with all classes",
    ),
    "nothing readable": (
        {"a.tar": [("1.jpg", b"x"), ("1.cls", "1")]},
        [],
        "no image in these tars can be read; `python -m shards index` needs some",
    ),
    "a header that lies": ({"a.tar": lying(1 << 40)}, [], "{in}/a.tar: is cut off at byte 0; fetch it again"),
    "a link": ({"a.tar": link()}, [], "{in}/a.tar: holds 1.jpg, a link; pack it again with plain files"),
    "rubbish": (
        {"a.tar": bytes(range(256)) * 20},
        [],
        "{in}/a.tar: is not a tar, or is damaged at byte 0; fetch it again",
    ),
    "key and other source": (
        {"a.tar": PAIR},
        ["--label-key", "x", "--label-from", "txt"],
        "--label-key x is for labels in JSON, --label-from is txt; leave one of them out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_in_the_way_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, options, line = REFUSED[case]
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (tmp_path / "in" / name).write_bytes(content)
        else:
            pack(tmp_path / "in" / name, content)
    words = [word.replace("{in}", str(tmp_path / "in")) for word in options]
    said = refusal(capsys, "index", tmp_path / "in", "--workers", 1, *words)
    assert said == f"shards: {line.replace('{in}', str(tmp_path / 'in'))}\n"
    assert not list(tmp_path.rglob("index.json"))


def test_training_on_tars_without_an_index_names_the_command(tmp_path: Path) -> None:
    pack(tmp_path / "in/00000.tar", PAIR)
    pack(tmp_path / "splits/train/00000.tar", PAIR)
    pack(tmp_path / "several/train/00000.tar", PAIR)
    pack(tmp_path / "several/val/00000.tar", PAIR)
    for split, tars, whole in (
        (tmp_path / "in/train", tmp_path / "in", tmp_path / "in"),
        (tmp_path / "splits/train", tmp_path / "splits/train", tmp_path / "splits/train"),
        (tmp_path / "several/val", tmp_path / "several/val", tmp_path / "several"),
    ):
        with pytest.raises(DataError) as error:
            Index.load(split)
        assert str(error.value) == (
            f"{split}: has no index.json, but {tars} holds tars; index them with `python -m shards index {whole}`"
        )
