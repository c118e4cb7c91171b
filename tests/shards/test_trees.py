"""Folders and archives with links, pipes, strange names and other contents than images: read, or refused in one line."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dist_train.errors import DataError
from shards import sources
from shards.__main__ import main
from shards.index import Index
from tests.common import refusal
from tests.shards.trees import lay, picture, pictures

PLAIN = pictures("{cat,dog}/{1,2}.jpg")


def test_links_are_followed(tmp_path: Path) -> None:
    lay(tmp_path / "elsewhere", pictures("owls/{1,2}.jpg", "more/3.jpg"))
    lay(tmp_path / "in", PLAIN)
    os.symlink(tmp_path / "elsewhere/owls", tmp_path / "in/owl")
    os.symlink(tmp_path / "elsewhere/more", tmp_path / "in/cat/more")
    os.symlink(tmp_path / "elsewhere/more/3.jpg", tmp_path / "in/dog/3.jpg")
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    index = Index.load(tmp_path / "out" / "train")
    assert dict(zip(index.classes, np.bincount(index.label).tolist())) == {"cat": 3, "dog": 3, "owl": 2}


def test_links_that_lead_nowhere_or_in_a_circle_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN)
    link, command = tmp_path / "in" / "owl", ("make", "folder", tmp_path / "in", tmp_path / "out")
    for target, why in (
        (tmp_path / "gone", f"is a link to {tmp_path}/gone, which cannot be followed (No such file or directory); restore what it leads to, or remove it"),
        (link, f"is a link to {link}, which cannot be followed (Too many levels of symbolic links); restore what it leads to, or remove it"),
        (tmp_path / "in", "is a link to a folder that it lies in; remove the link"),
    ):  # fmt: skip
        os.symlink(target, link)
        assert refusal(capsys, *command) == f"shards: {link}: {why}\n"
        link.unlink()


def test_pipes_and_names_of_any_bytes_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN)
    os.mkfifo(tmp_path / "in/cat/pipe.jpg")
    strange = os.fsdecode(b"caf\xe9 \n.jpg")
    (tmp_path / "in/cat" / strange).write_bytes(picture("strange"))
    (tmp_path / "in/dog" / os.fsdecode(b"\xff.jpg")).write_bytes(b"no image")
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert len(Index.load(tmp_path / "out/train")) == 5
    assert (
        "2 skipped, see manifest.json (cat/pipe.jpg: a link, a pipe or a device, not a file; ...)"
        in capsys.readouterr().out
    )
    (tmp_path / "in" / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / "in" / os.fsdecode(b"caf\xe9") / "1.jpg").write_bytes(picture("x"))
    assert refusal(capsys, "make", "folder", tmp_path / "in", tmp_path / "again") == (
        "shards: the class 'caf\\xe9': its name is not UTF-8; rename it, for instance with convmv\n"
    )
    os.mkfifo(tmp_path / "in.tar")
    with open(tmp_path / "in/cat/video.jpg", "wb") as file:
        file.truncate(3_000_000_000)
    shutil.rmtree(tmp_path / "in" / os.fsdecode(b"caf\xe9"))
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "again")]) == 0
    assert "video.jpg: 3000000000 bytes, more than an image can have" in (
        tmp_path / "again/train/manifest.json"
    ).read_text().replace('",\n   "', ": ")
    for file in ("/dev/zero", tmp_path / "in/cat/pipe.jpg"):
        line = refusal(capsys, "make", "folder", tmp_path / "in", tmp_path / "other", "--labels", file)
        assert line == f"shards: {file}: cannot be read (a link, a pipe or a device, not a file)\n"
    for kind in ("folder", "cifar10"):
        line = refusal(capsys, "make", kind, tmp_path / "in.tar", tmp_path / "other")
        assert line == f"shards: {tmp_path}/in.tar: is neither a folder nor a file\n"


def test_an_output_in_the_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN)
    os.symlink(tmp_path / "in", tmp_path / "link")
    for out in (tmp_path / "in", tmp_path / "in/shards", tmp_path / "link/deep/shards"):
        assert refusal(capsys, "make", "folder", tmp_path / "in", out) == (
            f"shards: {out}: lies in {tmp_path}/in, whose images are to be packed; choose a folder outside of it\n"
        )


@pytest.mark.parametrize(
    ("head", "line"),
    [
        (b"PK\x03\x04", "is a zip archive, not a tar; unpack it with unzip and give the folder"),
        (b"\x28\xb5\x2f\xfd", "is compressed with zstd, not a tar; uncompress it with zstd -d"),
        (b"PAR1", "is a Parquet file, not a tar; use `python -m shards make parquet`"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive, not a tar; unpack it with 7z x and give the folder"),
    ],
)
def test_other_archives_are_named(head: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.tar").write_bytes(head + bytes(5000))
    for kind in ("folder", "cifar10"):
        assert (
            refusal(capsys, "make", kind, tmp_path / "in.tar", tmp_path / "out")
            == f"shards: {tmp_path}/in.tar: {line}\n"
        )


def test_tars_with_names_and_files_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(*names: str, kind: bytes = tarfile.REGTYPE) -> None:
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size, info.type = len(picture(name)), kind
                tar.addfile(info, io.BytesIO(picture(name)))

    command = ("make", "folder", tmp_path / "in.tar", tmp_path / "out")
    write("cat/1.jpg", "../dog/1.jpg")
    assert refusal(capsys, *command) == (
        f"shards: {tmp_path}/in.tar: holds ../dog/1.jpg, which lies outside of the archive; pack it again from within its folder\n"
    )
    write("././cat/1.jpg", ".//dog/1.jpg", "./owl/./1.jpg", "/tit/1.jpg")
    assert main([str(word) for word in command]) == 0
    assert Index.load(tmp_path / "out/train").classes == ("cat", "dog", "owl", "tit")
    sparse = tmp_path / "sparse.jpg"
    with open(sparse, "wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "in.tar", "-C", tmp_path, "sparse.jpg"], check=True)
    assert refusal(capsys, *command) == (
        f"shards: {tmp_path}/in.tar: holds sparse.jpg as a sparse file; pack it again without --sparse\n"
    )


def test_a_folder_of_shards_is_no_folder_of_images(tmp_path: Path) -> None:
    lay(tmp_path / "in", PLAIN)
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    with pytest.raises(DataError, match=r"is shards already; use `python -m shards info`"):
        sources.folder(tmp_path / "out" / "train")
