"""Parquet files as Hugging Face has them: the same images and labels come out, row by row and without a file in memory."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from PIL import Image

from shards.__main__ import main
from shards.index import Index


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 11, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def table(
    first: int, labels: list[Any], names: list[str] | None = None, column: str = "label", **more: Any
) -> pa.Table:
    images = [{"bytes": picture(first + n), "path": f"n0144_{n}.JPEG"} for n in range(len(labels))]
    found = pa.table({"image": images, column: labels, **more})
    if names is None:
        return found
    features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def rows(split: Path) -> dict[bytes, str | None]:
    index = Index.load(split)
    tars = [(split / shard.name).read_bytes() for shard in index.shards]
    columns = zip(index.shard, index.offset, index.size, index.label)
    return {tars[s][at : at + size]: index.classes[label] if label >= 0 else None for s, at, size, label in columns}


def test_hugging_faces_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["tench", "goldfish", "great white shark"]
    (tmp_path / "in/data").mkdir(parents=True)
    pq.write_table(table(0, [0, 1, 2, 2], names), tmp_path / "in/data/train-00000-of-00002.parquet", row_group_size=2)
    pq.write_table(table(10, [1, 0], names), tmp_path / "in/data/train-00001-of-00002.parquet")
    pq.write_table(table(20, [2, 1], names), tmp_path / "in/data/validation-00000-of-00001.parquet")
    pq.write_table(table(30, [-1, -1], names), tmp_path / "in/data/test-00000-of-00001.parquet")
    assert main(["make", "parquet", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "2"]) == 0
    assert Index.load(tmp_path / "out/train").classes == tuple(names)
    assert rows(tmp_path / "out/train") == {
        picture(n): names[label] for n, label in ((0, 0), (1, 1), (2, 2), (3, 2), (10, 1), (11, 0))
    }
    assert rows(tmp_path / "out/val") == {picture(20): names[2], picture(21): names[1]}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert (
        "read as Parquet, images from 'image' and labels from 'label': train 6 rows, val 2 rows; left out: test (no labels)"
        in capsys.readouterr().out
    )
    assert main(["make", "parquet", str(tmp_path / "in/data"), str(tmp_path / "again"), "--workers", "1"]) == 0
    tars = [(tmp_path / out / "train/shard-000000.tar").read_bytes() for out in ("out", "again")]
    assert tars[0] == tars[1]


@pytest.mark.parametrize(
    ("data", "options", "labels"),
    [
        (table(0, ["owl", "cat", None]), [], ["owl", "cat", None]),
        (table(0, [1, 0, 3]), [], ["1", "0", "3"]),
        (pa.table({"jpg": [picture(0), picture(1), picture(2)], "label": [1, 0, 0]}), [], ["1", "0", "0"]),
        (table(0, [0, 1, 1], column="kind", other=[5, 6, 7]), ["--label-column", "kind"], ["0", "1", "1"]),
        (
            pa.table({"a": [b"x"] * 3, "b": [picture(0), picture(1), picture(2)], "label": ["q"] * 3}),
            ["--image-column", "b"],
            ["q"] * 3,
        ),
        (table(0, pa.array(["x", "y", "x"]).dictionary_encode()), [], ["x", "y", "x"]),  # type: ignore[arg-type]
    ],
)
def test_other_forms(data: pa.Table, options: list[str], labels: list[str | None], tmp_path: Path) -> None:
    pq.write_table(data, tmp_path / "some.parquet")
    assert main(["make", "parquet", str(tmp_path / "some.parquet"), str(tmp_path / "out"), *options]) == 0
    assert rows(tmp_path / "out/train") == {picture(n): label for n, label in enumerate(labels)}


def test_a_url_whose_driver_is_installed(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://set/train.parquet", "wb") as file:
        pq.write_table(table(0, ["a", "b"]), file)
    assert main(["make", "parquet", "memory://set", str(tmp_path / "out")]) == 0
    assert rows(tmp_path / "out/train") == {picture(0): "a", picture(1): "b"}


def test_what_was_read_is_found_again(tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    (tmp_path / "in").mkdir()
    pq.write_table(table(0, [0, 1] * 7), tmp_path / "in/a.parquet")
    words = ["make", "parquet", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "shards", *words],
        capture_output=True,
        text=True,
        preexec_fn=small_files_only,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot be written (File too large); free space and run the same command again" in done.stderr
    (spill,) = (tmp_path / "out/.making/source").glob("*.json")
    written = spill.stat().st_mtime_ns
    seen: list[int] = []
    from shards import parquet

    original = parquet._source

    def look(*arguments: Any) -> Any:
        seen.append(spill.stat().st_mtime_ns)
        return original(*arguments)

    parquet._source = look
    try:
        assert main(words) == 0
    finally:
        parquet._source = original
    assert seen == [written]
    assert len(rows(tmp_path / "out/train")) == 14


def test_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(300_000)
    images = [{"bytes": picture(n) + noise, "path": None} for n in range(1000)]
    pages = {"use_dictionary": False, "write_batch_size": 8}
    pq.write_table(
        pa.table({"image": images, "label": [0] * 1000}), tmp_path / "a.parquet", row_group_size=1000, **pages
    )
    del images
    code = (
        "import re, sys; from shards.__main__ import main; main(sys.argv[1:]); "
        "print('MB', int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1000)"
    )
    words = ["make", "parquet", str(tmp_path / "a.parquet"), str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "1000 images" in done.stdout
    megabytes = int(done.stdout.split("MB")[-1])
    print(f"300 MB of images in one row group: {megabytes} MB of memory")
    assert megabytes < 350


def test_files_of_the_same_name_in_two_folders_keep_their_rows_apart(tmp_path: Path) -> None:
    for number, label in enumerate(("dog", "cat")):
        (tmp_path / f"in/{number}").mkdir(parents=True)
        pq.write_table(table(10 * number, [label] * 2), tmp_path / f"in/{number}/0.parquet")
    assert main(["make", "parquet", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    index = Index.load(tmp_path / "out/train")
    assert len(set(index.key.tolist())) == 4
    assert rows(tmp_path / "out/train") == {
        picture(0): "dog",
        picture(1): "dog",
        picture(10): "cat",
        picture(11): "cat",
    }


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "dog", "owl"], None])
def test_files_with_other_classes_are_no_data_set(
    names: list[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(table(0, [0, 1], ["cat", "dog"]), tmp_path / "in/train-0.parquet")
    pq.write_table(table(10, [0, 1], names), tmp_path / "in/train-1.parquet")
    assert main(["make", "parquet", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "train-1.parquet: has" in said
    assert "give files of one data set" in said
    assert said.count("\n") == 1


REFUSED: list[tuple[pa.Table | bytes, list[str], str]] = [
    (b"PAR1 no", [], "{in}/a.parquet: is not a Parquet file, or a damaged one ("),
    (
        pa.table({"label": [1]}),
        [],
        "{in}: none of its columns is known to hold images; give --image-column with bytes of encoded images, of label",
    ),
    (
        table(0, [1], column="kind"),
        [],
        "{in}: which of its columns (image, kind) has the class is not clear; give --label-column",
    ),
    (
        table(0, [1], fine_label=[2]),
        [],
        "{in}: which of its columns (image, label, fine_label) has the class is not clear; give --label-column",
    ),
    (table(0, [1]), ["--label-column", "x"], "--label-column x: there is no such column; {in} has image, label"),
    (
        table(0, [1]),
        ["--image-column", "label"],
        "{in}: its column 'label' is int64; give --image-column with bytes of encoded images, of image, label",
    ),
    (
        table(0, [[1, 2]]),
        [],
        "{in}: its column 'label' is list<element: int64>; give --label-column with a number or a name",
    ),
    (table(0, [7], ["a", "b"]), [], "{in}/a.parquet: row 0 has the label 7, allowed are 0 to 1, or -1 without one"),
    (
        pa.table(
            {"image": [{"bytes": None, "path": "x/1.jpg"}], "label": [0]},
            schema=pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}),
        ),
        [],
        "{in}/a.parquet: its images are not in it, only their paths (x/1.jpg); use `python -m shards make folder` on these",
    ),
    (
        table(0, [5, 70_000]),
        [],
        "{in}: its labels in 'label' are 2 numbers up to 70000, which are no classes from 0 on; give another --label-column",
    ),
    (table(0, []).slice(0, 0).cast(table(0, [1]).schema), [], "{in}/a.parquet: has no rows; give files that have some"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_is_in_the_way_is_one_line(case: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, options, line = REFUSED[case]
    (tmp_path / "in").mkdir()
    if isinstance(data, bytes):
        (tmp_path / "in/a.parquet").write_bytes(data)
    else:
        pq.write_table(data, tmp_path / "in/a.parquet")
    assert main(["make", "parquet", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"shards: {line.replace('{in}', str(tmp_path / 'in'))}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for source, why in ((tmp_path / "gone", "holds no Parquet file"), ("nothing://x", "cannot be opened (")):
        assert main(["make", "parquet", str(source), str(tmp_path / "out")]) == 2
        assert why in capsys.readouterr().err


def test_a_file_cut_or_changed_in_its_middle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(table(0, [0, 1] * 50), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for place in (100, 3000, len(whole) // 2, len(whole) - 300):
        (tmp_path / "a.parquet").write_bytes(whole[:place] + bytes(64) + whole[place + 64 :])
        code = main(["make", "parquet", str(tmp_path / "a.parquet"), str(tmp_path / f"out{place}")])
        said = capsys.readouterr().err
        assert code == 0 or said.count("\n") == 1
        (tmp_path / "a.parquet").write_bytes(whole[:place])
        assert main(["make", "parquet", str(tmp_path / "a.parquet"), str(tmp_path / "cut")]) == 2
        assert "is not a Parquet file, or a damaged one" in capsys.readouterr().err
