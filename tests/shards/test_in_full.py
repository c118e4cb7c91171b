"""Nothing of a source is left out, or taken for something else, without a word."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shards import pack as pack_module
from shards.__main__ import main
from shards.index import Index
from shards.quarantine import Bad
from shards.source import Item, read_file
from tests.common import refusal
from tests.shards.test_foreign import pack, rows, samples
from tests.shards.test_foreign import picture as image
from tests.shards.trees import lay, pictures, stored


def packed(tmp_path: Path, *options: str) -> dict[str, str]:
    """The class of every image of train, by its name in ``in``, which is that of its picture."""
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    by_bytes = stored(tmp_path / "out")["train"]
    files = {path.read_bytes(): str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*.*g")}
    return {files[data]: label for data, label in by_bytes.items()}


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line with which ``make folder`` refuses ``in``."""

    def line(*options: object, verb: Sequence[str] = ("make", "folder")) -> str:
        return refusal(capsys, *verb, tmp_path / "in", *([tmp_path / "out"] if "make" in verb else []), *options)

    return line


def test_a_readme_beside_class_folders_does_not_make_them_one_class(tmp_path: Path, refused: Refused) -> None:
    lay(
        tmp_path / "in",
        pictures("sup/{animals,plants}/{x,y}/1.png") | {"sup/animals/README.txt": "a", "sup/plants/l.csv": "b"},
    )
    assert "give --depth 2 if these are classes" in refused()


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ("{Bacteria,Fungi}/{1,2}.png", [], {f"{c}/{n}.png": c for c in ("Bacteria", "Fungi") for n in (1, 2)}),
        ("{Aves,Fungi}/{Other,x}/1.png", [], {f"{c}/{s}/1.png": f"{c}/{s}" for c in ("Aves", "Fungi") for s in ("Other", "x")}),
        ("{Aves,Fungi}/a/{f,m}/1.jpg", ["--depth", "1"], {f"{c}/a/{s}/1.jpg": c for c in ("Aves", "Fungi") for s in "fm"}),
    ],
)  # fmt: skip
def test_folders_called_like_kingdoms_are_read_as_others_are(
    names: str, options: list[str], said: dict[str, str], tmp_path: Path
) -> None:
    lay(tmp_path / "in", pictures(names))
    assert packed(tmp_path, *options) == said


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("{Bacteria,Fungi}/{1,2}.png", "{Bacteria,Fungi}/closeup/3.png"), "but holds images beside the folders of species"),
        (("{Aves,Fungi}/robin/{male,female}/1.jpg",), "but holds folders in the folders of species"),
    ],
)  # fmt: skip
def test_kingdoms_that_are_not_inaturalist_are_refused(
    names: tuple[str, ...], said: str, tmp_path: Path, refused: Refused
) -> None:
    lay(tmp_path / "in", pictures(*names))
    text = refused()
    assert said in text
    assert "--depth" in text


def test_an_entry_labels_no_image_of_another_folder(tmp_path: Path, refused: Refused) -> None:
    lay(tmp_path / "in", pictures("b/{1,2}.jpg"))
    for entries in ("a/1.jpg,cat\nb/2.jpg,dog\n", "a/1.jpg,cat\n"):
        (tmp_path / "l.csv").write_text(entries)
        assert "names a/1.jpg, of which there is no image" in refused("--labels", str(tmp_path / "l.csv"))


def test_an_entry_names_an_image_by_the_end_of_its_path_or_from_further_up(tmp_path: Path, refused: Refused) -> None:
    lay(tmp_path / "in", pictures("images/{cat,dog}/0.jpg"))
    wanted = {"images/cat/0.jpg": "a", "images/dog/0.jpg": "b"}
    for above in ("", "images/", "set/images/", "./"):
        (tmp_path / "l.csv").write_text(f"{above}cat/0.jpg,a\n{above}dog/0.jpg,b\n")
        assert packed(tmp_path, "--labels", str(tmp_path / "l.csv")) == wanted, above
        shutil.rmtree(tmp_path / "out")
    (tmp_path / "l.csv").write_text('images/cat/0.jpg,"a\n' + "x" * 200_000)
    assert "is not CSV" in refused("--labels", str(tmp_path / "l.csv"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [("0 1 2 10 -1 -100 3", "0 1 2 3 4 5 6 7 8 9 10"), ("cat dog -1 cat dog -100 cat", "cat dog")],
)
def test_a_negative_label_of_a_webdataset_is_none(labels: str, classes: str, tmp_path: Path) -> None:
    texts = labels.split()
    pack(
        tmp_path / "in" / "0.tar",
        [f for n, text in enumerate(texts) for f in ((f"{n}.jpg", image(n)), (f"{n}.cls", text))],
    )
    assert main(["index", str(tmp_path / "in")]) == 0
    index = Index.load(tmp_path / "in" / "train")
    assert index.classes == tuple(classes.split())
    found = ["none" if label < 0 else index.classes[label] for label in index.label.tolist()]
    assert found == ["none" if text.startswith("-") else text for text in texts]
    assert main(["check", str(tmp_path / "in")]) == 0


def test_no_tar_of_a_webdataset_is_left_out(tmp_path: Path, refused: Refused) -> None:
    for name in ("train/0.tar", "validation/0.tar"):
        pack(tmp_path / "in" / name, list(samples(0 if "train" in name else 6, 6)))
    (tmp_path / "in" / "train" / "0.tar.md5").write_text("not compressed")
    assert main(["index", str(tmp_path / "in")]) == 0
    assert [len(rows(tmp_path / "in" / split)) for split in ("train", "val")] == [6, 6]
    for name in ("train/more/1.tar", "extra/0.tar"):
        pack(tmp_path / "in" / name, list(samples(20, 2)))
        assert f"holds {name}, which would be left out" in refused(verb=["index"])
        shutil.rmtree((tmp_path / "in" / name).parent)
    pack(tmp_path / "in" / "val" / "1.tar", list(samples(20, 2)))
    assert "are both called like val" in refused(verb=["index"])


def joined(tar: Path) -> bytes:
    return tar.read_bytes() * 2


def half_there(tar: Path) -> bytes:
    """As where a download had reserved the space for the whole file."""
    data = tar.read_bytes()
    return data[: len(data) // 1024 * 512] + bytes(2 << 20)


@pytest.mark.parametrize("damage", [joined, half_there])
def test_a_tar_that_goes_on_behind_its_end_is_refused(damage: object, tmp_path: Path, refused: Refused) -> None:
    assert callable(damage)
    pack(tmp_path / "one.tar", [(f"cat/{n}.jpg", image(n)) for n in range(20)])
    (tmp_path / "in").write_bytes(damage(tmp_path / "one.tar"))
    assert any(text in refused() for text in ("goes on behind its end", "cut off", "damaged"))
    pack(tmp_path / "two.tar", list(samples(0, 20)))
    (tmp_path / "in").unlink()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(damage(tmp_path / "two.tar"))
    text = refused(verb=["index"])
    assert any(word in text for word in ("goes on behind its end", "cut off", "damaged"))


def test_a_hard_link_in_a_tar_is_the_image_that_it_links_to(tmp_path: Path) -> None:
    lay(tmp_path / "folder", pictures("{cat,dog}/{1,2}.jpg"))
    (tmp_path / "folder" / "owl").mkdir()
    os.link(tmp_path / "folder/cat/1.jpg", tmp_path / "folder/owl/1.jpg")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(tmp_path / "folder", "x")
    counts = []
    for source in ("folder", "in.tar"):
        assert main(["make", "folder", str(tmp_path / source), str(tmp_path / f"out-{source}")]) == 0
        manifest = json.loads((tmp_path / f"out-{source}" / "train" / "manifest.json").read_text())
        counts.append((manifest["per_class"], manifest["skipped"]))
    assert counts == [({"cat": 2, "dog": 2, "owl": 1}, [])] * 2


def test_a_folder_of_a_pax_tar_gives_no_name_to_what_follows(tmp_path: Path) -> None:
    (tmp_path / "Übersicht").mkdir()
    for name, data in samples(0, 4):
        (tmp_path / "Übersicht" / name).write_bytes(data.encode() if isinstance(data, str) else data)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tmp_path / "Übersicht", "Übersicht", recursive=False)
        for path in sorted((tmp_path / "Übersicht").iterdir()):
            tar.add(path, path.name)
    assert main(["index", str(tmp_path / "in")]) == 0
    assert len(Index.load(tmp_path / "in" / "train")) == 4


def test_a_lost_source_ends_the_command_which_goes_on_where_it_was(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that is gone for a while costs no image, and no shard that was finished."""
    lay(tmp_path / "in", pictures("{a,b,c}/{1,2,3,4,5,6,7,8}.jpg"))
    words = ["make", "folder", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-size", "4", "--workers", "1"]
    assert main([*words[:3], str(tmp_path / "whole"), *words[4:]]) == 0
    reads = 0

    def lost(root: Path, item: Item) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 9:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_file(root, item)

    monkeypatch.setattr("shards.sources.read_file", lost)
    text = refused("--shard-size", 4, "--workers", 1)
    assert "cannot be read (Stale file handle)" in text
    assert "run the same command again" in text
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(".making/*/train/*.tar")}
    assert len(finished) == 2
    monkeypatch.setattr("shards.sources.read_file", read_file)
    monkeypatch.setattr(pack_module, "draft_of", counting(pack_module.draft_of, written := []))
    assert main(words) == 0
    assert len([path for path in written if path.suffix == ".tar"]) == 6 - 2
    whole, again = (sorted((tmp_path / name / "train").glob("*.tar")) for name in ("whole", "out"))
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in again]


def counting(function, calls):  # type: ignore[no-untyped-def]
    def counted(path):  # type: ignore[no-untyped-def]
        calls.append(path)
        return function(path)

    return counted


def test_a_list_over_a_list_leaves_out_what_either_has_in_quarantine(tmp_path: Path) -> None:
    pack(
        tmp_path / "in" / "train" / "0.tar",
        [f for n in range(20) for f in ((f"{n:02d}.jpg", image(n)), (f"{n:02d}.json", json.dumps({"label": n % 2})))],
    )
    assert main(["index", str(tmp_path / "in")]) == 0
    for source, out, count in (("in", "once", "9"), ("once", "twice", "8")):
        assert main(["subset", str(tmp_path / source), str(tmp_path / out), "--per-class", count]) == 0
    assert main(["check", str(tmp_path / "twice")]) == 0  # also of labels that stand in JSON
    base, twice = (Index.load(tmp_path / name / "train") for name in ("in", "twice"))
    bad = [sample for sample in range(20) if base.key[sample] in set(twice.key[:5].tolist())]
    base.save_quarantine([Bad(sample, base.key[sample].decode(), "blurred") for sample in bad])
    assert [len(Index.load(tmp_path / name / "train")) for name in ("in", "twice")] == [15, 11]
    assert main(["subset", str(tmp_path / "once"), str(tmp_path / "again"), "--per-class", "5"]) == 0
    keys = set(Index.load(tmp_path / "again" / "train", quarantine=False).key.tolist())
    assert not keys & {base.key[sample] for sample in bad}


def test_a_sheet_is_not_that_of_an_index_that_was_removed(tmp_path: Path) -> None:
    files = [
        f
        for n in range(8)
        for f in ((f"{n}.jpg", image(n)), (f"{n}.json", json.dumps({"label": n % 2, "other": n // 4})))
    ]
    pack(tmp_path / "in" / "train" / "0.tar", files)
    sheets = []
    for key in ("label", "other"):
        assert main(["index", str(tmp_path / "in"), "--label-key", key]) == 0
        assert main(["info", str(tmp_path / "in")]) == 0
        sheets.append((tmp_path / "in" / "train" / "sheet.png").read_bytes())
        (tmp_path / "in" / "train" / "index.json").unlink()
    assert sheets[0] != sheets[1]


def test_what_was_unpacked_is_kept_for_the_command_that_the_refusal_asks_for(tmp_path: Path, refused: Refused) -> None:
    lay(tmp_path / "folder", pictures("{a,b}/{x,y}/1.jpg"))
    with tarfile.open(tmp_path / "in", "w:gz") as tar:
        tar.add(tmp_path / "folder", "x")
    assert "--depth 2" in refused()
    (kept,) = (tmp_path / "out" / ".making" / "source").iterdir()
    before = kept.stat().st_mtime_ns
    os.utime(kept, ns=(before, before))
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out"), "--depth", "2"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
