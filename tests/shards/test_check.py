"""Checking shards: what it finds, and that training leaves it out."""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.errors import DataError
from shards.__main__ import main
from shards.index import Index
from shards.make import Sample, ShardSize, make_samples


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """40 pictures of two classes in four shards, and 6 of them once more: 4 in val, 2 in train with another label."""
    images = [picture(seed) for seed in range(40)]
    samples = [Sample(f"a{n}", "ab"[n % 2], image) for n, image in enumerate(images)]
    samples += [Sample(f"again{n}", "ba"[n % 2], images[n]) for n in (3, 4)]
    samples += [Sample(f"v{n}", "ab"[n % 2], images[n], "val") for n in (5, 6, 7, 8)]
    make_samples(samples, tmp_path / "out", ShardSize(samples=11))
    return tmp_path / "out"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_duplicates_are_found_within_and_between_splits(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = said(capsys, "check", out, "--workers", 2)
    assert (code, errors) == (0, "")
    assert "train: 2 images are there more than once, 2 of them with another label" in printed
    assert "train and val: share 4 images" in printed
    assert "21 images of every class" in printed
    assert not (out / "train" / "quarantine.json").exists()


def test_a_single_copy_is_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample(f"{n}", "ab"[n % 2], picture(n % 3)) for n in range(4)]
    samples.append(Sample("v", "a", picture(2), "val"))
    make_samples(samples, tmp_path / "out", ShardSize())
    printed = said(capsys, "check", tmp_path / "out")[1]
    assert "train: 1 image is there more than once, 1 of them with another label" in printed
    assert "train and val: share 1 image (" in printed


def damage(folder: Path, sample: int, at: int, data: bytes) -> str:
    index = Index.load(folder, quarantine=False)
    with open(folder / index.shards[index.shard[sample]].name, "r+b") as file:
        file.seek(int(index.offset[sample]) + at)
        file.write(data)
    return str(index.key[sample].decode())


def test_what_cannot_be_used_goes_into_quarantine(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train = out / "train"
    assert main(["subset", str(out), str(tmp_path / "part"), "--per-class", "20"]) == 0
    whole = Index.load(train)
    bad = [
        damage(train, 7, 100, bytes(900)),  # amid the pixels: decoding finds it, the header does not
        damage(train, 20, 0, b"no image"),
        damage(train, 30, size_of_label(whole, 30), b"9"),
    ]
    code, printed, errors = said(capsys, "check", out)
    assert code == 2
    assert "3 images are in quarantine.json, training leaves them out" in printed
    for number in (0, 1, 2):
        assert f"shard-00000{number}.tar: has SHA-256" in errors
    assert f"{bad[0]}: the checksum of its IDAT chunk is wrong" in errors
    assert f"{bad[1]}: not an image" in errors
    assert f"{bad[2]}: its label is '9' in the tar" in errors
    left = Index.load(train)
    assert (len(left), left.left_out) == (39, 3)
    assert sorted(set(whole.key.tolist()) - set(left.key.tolist())) == sorted(key.encode() for key in bad)
    assert left.fingerprint != whole.fingerprint
    part = Index.load(tmp_path / "part" / "train")
    assert len(part) + part.left_out == 40
    assert part.left_out > 0
    assert not set(part.key.tolist()) & {key.encode() for key in bad}
    assert "3 images are left out, by quarantine.json" in said(capsys, "info", train)[1]


def test_an_image_that_making_took_by_its_header_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = picture(1)
    start = whole.index(b"IDAT")
    end = start + 4 + int.from_bytes(whole[start - 4 : start], "big")
    chunk = whole[start : start + 100] + bytes(900) + whole[start + 1000 : end]
    hurt = whole[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[end + 4 :]
    samples = [Sample("good", "a", picture(2)), Sample("hurt", "a", hurt)]
    (made,) = make_samples(samples, tmp_path / "out")
    assert len(made.index) == 2
    code, _, errors = said(capsys, "check", tmp_path / "out")
    assert code == 2
    assert "hurt: broken" in errors
    assert [key[9:] for key in Index.load(made.folder).key.tolist()] == [b"good"]


def size_of_label(index: Index, sample: int) -> int:
    """From an image's first byte to its label's, in the tar."""
    return int(-(-index.size[sample] // 512) * 512 + 512)


def test_a_quarantine_of_other_shards_is_refused(out: Path) -> None:
    path = out / "train" / "quarantine.json"
    fingerprint = Index.load(out / "train").fingerprint
    for content, message in (
        ({"fingerprint": "0", "samples": []}, "was written for other shards; run `python -m shards check"),
        ({"fingerprint": fingerprint, "samples": [{"id": 42, "key": "a", "why": "x"}]}, "for other shards"),
        ([1], "is malformed"),
        ({"fingerprint": fingerprint, "samples": [{"id": n, "key": "a", "why": "x"} for n in range(42)]}, "all of its"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            Index.load(out / "train")
    shutil.copytree(out / "val", out / "other")
    path.unlink()
    assert len(Index.load(out / "train")) == 42


def test_shards_that_are_gone_or_cut_are_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "train" / "shard-000001.tar").unlink()
    (out / "train" / "shard-000000.tar").unlink()
    os.mkfifo(out / "train" / "shard-000000.tar")
    os.truncate(out / "train" / "shard-000002.tar", 0)
    os.truncate(out / "train" / "shard-000003.tar", 10_000)
    code, printed, errors = said(capsys, "check", out / "train")
    assert code == 2
    assert "shard-000000.tar: has 0 bytes" in errors
    assert "shard-000001.tar: cannot be read (" in errors
    assert "shard-000002.tar: has 0 bytes" in errors
    assert "shard-000003.tar: has 10000 bytes" in errors
    assert "Traceback" not in errors + printed


def test_images_without_any_label_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_samples([Sample(f"x{n}", None, picture(n)) for n in range(3)], tmp_path / "out")
    for verb in ("info", "check"):
        code, printed, errors = said(capsys, verb, tmp_path / "out")
        assert (code, errors) == (0, "")
        assert "3 images without a label, and no classes" in printed
    code, _, errors = said(capsys, "subset", tmp_path / "out", tmp_path / "part", "--per-class", 1)
    assert (code, errors) == (2, "shards: --per-class is given, but no image of the source has a class\n")


def test_a_manifest_that_was_changed_is_one_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{", "{}"):
        (out / "train" / "manifest.json").write_text(content)
        code, _, errors = said(capsys, "info", out / "train")
        assert code == 2
        assert "manifest.json: is malformed" in errors
        assert errors.count("\n") == 1
