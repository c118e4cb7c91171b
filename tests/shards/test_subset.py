"""Parts of shards: the same choice as lists and as new shards, and training reads both."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_train.config import DataConfig
from dist_train.data.reader import ShardReader
from dist_train.errors import DataError
from dist_train.training.preflight import open_split
from shards.__main__ import main
from shards.index import UNLABELED, Index

PER_CLASS = ["--per-class", "40"]
ALL = [*PER_CLASS, "--val-per-class", "10", "--labels-per-class", "5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits without a val split, their test split under that name, in shards of 100."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["make", "digits", str(out / "digits"), "--shard-size", "100", "--workers", "1"]) == 0
    (out / "digits" / "val").rename(out / "digits" / "test")
    return out / "digits"


def subset(whole: Path, out: Path, *options: str) -> Path:
    assert main(["subset", str(whole), str(out), *options]) == 0
    return out


def contents(split: Path) -> dict[str, tuple[int, bytes]]:
    """Label and bytes by the image's name in the source."""
    index, found = Index.load(split), {}
    reader = ShardReader(index, split)
    for sample, key in enumerate(index.key.tolist()):
        found[key.decode()[-10:]] = (int(index.label[sample]), reader.read(sample).tobytes())
    reader.close()
    return found


def test_lists_and_copies_are_the_same(whole: Path, tmp_path: Path) -> None:
    listed, copied = subset(whole, tmp_path / "list", *ALL), subset(whole, tmp_path / "copy", *ALL, "--copy")
    for split, size in (("train", 300), ("val", 100), ("test", 360)):
        assert contents(listed / split) == contents(copied / split)
        assert len(Index.load(listed / split)) == size
        assert sorted(os.listdir(listed / split)) == ["index.bin", "index.json"]
        assert (copied / split / "shard-000000.idx").exists()
    labels = Index.load(listed / "train").label
    assert np.bincount(labels[labels >= 0]).tolist() == [5] * 10
    assert (labels == UNLABELED).sum() == 250
    assert np.bincount(Index.load(listed / "val").label).tolist() == [10] * 10
    original = contents(whole / "train")
    for split in ("train", "val"):
        for name, (label, data) in contents(listed / split).items():
            assert data == original[name][1]
            assert label in (original[name][0], UNLABELED)
    assert not set(contents(listed / "train")) & set(contents(listed / "val"))


def test_the_seed_chooses(whole: Path, tmp_path: Path) -> None:
    folders = [
        subset(whole, tmp_path / name, *ALL, "--seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    for split, most in (("train", 200), ("val", 60)):
        a, b, c = (contents(folder / split) for folder in folders)
        assert a == b
        assert len(set(a) & set(c)) < most
    assert contents(folders[0] / "test") == contents(folders[2] / "test")
    hold_out = [subset(whole, tmp_path / f"val{seed}", "--val-per-class", "10", "--seed", seed) for seed in "12"]
    assert len(set.intersection(*(set(contents(folder / "val")) for folder in hold_out))) < 30


def test_training_opens_a_list_like_any_split(whole: Path, tmp_path: Path) -> None:
    listed = subset(whole, tmp_path / "list", *ALL)
    index = open_split(DataConfig(shards=listed, verify="hash"), "train")
    assert index.fingerprint == Index.load(listed / "train").fingerprint != Index.load(whole / "train").fingerprint
    assert index.shard_sizes.min() > 0
    assert index.shard_sizes.sum() == 300
    of_list = subset(listed, tmp_path / "list-of-list", "--per-class", "3")
    small = contents(of_list / "train")
    assert len(small) == 30
    assert all(contents(listed / "train")[name] == value for name, value in small.items())
    assert main(["check", str(listed)]) == 0


def test_a_split_that_stays_whole_keeps_its_fingerprint(whole: Path, tmp_path: Path) -> None:
    """So runs on full data and on a part of it are evaluated on the same images, and can be compared."""
    few, copy = subset(whole, tmp_path / "few", *PER_CLASS), subset(whole, tmp_path / "copy", *PER_CLASS, "--copy")
    prints = {Index.load(folder / "test").fingerprint for folder in (whole, few)}
    assert len(prints) == 1
    assert len({Index.load(folder / "train").fingerprint for folder in (whole, few, copy)}) == 3
    # Without one of its images it is the same as the whole split without that image.
    for folder in (whole, few):
        index = Index.load(folder / "test", quarantine=[3])
        prints.add(index.fingerprint)
    assert len(prints) == 2


def test_a_list_moves_with_its_shards_and_misses_them_otherwise(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "a" / "digits")
    subset(tmp_path / "a" / "digits", tmp_path / "a" / "list", *PER_CLASS)
    before = contents(tmp_path / "a" / "list" / "train")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b" / "list")
    assert contents(tmp_path / "link" / "train") == before
    (tmp_path / "b" / "digits" / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"refers to the shards in .*b/digits/train, which are not there; move them back"
    ):
        Index.load(tmp_path / "b" / "list" / "train")
    shutil.copytree(tmp_path / "b" / "digits" / "test", tmp_path / "b" / "digits" / "train")
    with pytest.raises(DataError, match="are others now; make the subset again"):
        Index.load(tmp_path / "b" / "list" / "train")


def test_a_list_that_was_changed_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = subset(whole, tmp_path / "list", *PER_CLASS) / "train"
    content = (folder / "index.bin").read_bytes()
    rows = np.frombuffer(content, "<i8").copy()
    for at, value, message in (
        (5, 10**6, "must rise"),
        (3, rows[2], "must rise"),
        (401, 10, "has label 10"),
        (401, (rows[401] + 1) % 10, "fingerprint"),
    ):
        changed = rows.copy()
        changed[at] = value
        (folder / "index.bin").write_bytes(changed.tobytes())
        with pytest.raises(DataError, match=message):
            Index.load(folder)
    (folder / "index.bin").write_bytes(content)
    tree = json.loads((folder / "index.json").read_text())
    assert tree["rule"] == {"per_class": 40, "seed": 0}
    del tree["of_fingerprint"]
    (folder / "index.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="malformed"):
        Index.load(folder)


BAD = {
    "nothing chosen": ([], "nothing is chosen"),
    "too many": (["--per-class", "200"], "--per-class is 200, but class '8' has 138 images; use at most 138"),
    "too many held out": (["--val-per-class", "138"], "use at most 137"),
    "too many labels": (["--per-class", "5", "--labels-per-class", "6"], "has 5 images; use at most 5"),
    "re-encoding a list": (["--per-class", "5", "--max-size", "9"], "are for new shards; give --copy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = BAD[case]
    capsys.readouterr()
    assert main(["subset", str(whole), str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subset(whole, tmp_path / "out", *PER_CLASS)
    assert main(["subset", str(whole), str(tmp_path / "out"), "--per-class", "5"]) == 2
    assert "out/test: is there already" in capsys.readouterr().err
    assert main(["subset", str(whole / "train"), str(tmp_path / "new"), "--per-class", "5"]) == 2
    assert "is one split; give the folder that holds its splits" in capsys.readouterr().err
    assert len(Index.load(tmp_path / "out" / "train")) == 400
    assert sorted(os.listdir(tmp_path / "out")) == ["test", "train"]


def test_lists_are_written_all_or_none(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that somebody else makes between the check and the end is in the way of the last split."""
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        if target.name == "train" and (tmp_path / "out" / "test").exists():
            (target / "theirs").mkdir(parents=True)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert main(["subset", str(whole), str(tmp_path / "out"), *PER_CLASS]) == 2
    assert "out: cannot be written (Directory not empty)" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["train"]
    assert os.listdir(tmp_path / "out" / "train") == ["theirs"]
