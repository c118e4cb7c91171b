"""Columns in one file: what is written is mapped, and a file of another length is refused."""

from pathlib import Path

import numpy as np
import pytest

from shards import columns

ROWS = {
    "a": np.arange(5, dtype="<i8"),
    "b": np.array([b"x", b"yy", b"", b"z", b"zz"], dtype="S2"),
    "c": np.ones(5, "<i4"),
}
DTYPES = {name: array.dtype.str for name, array in ROWS.items()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    columns.write(tmp_path / "x.bin", ROWS)
    found = columns.read(tmp_path / "x.bin", DTYPES, 5)
    assert all(np.array_equal(found[name], ROWS[name]) for name in ROWS)
    assert not any(array.flags.writeable for array in found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_no_rows(tmp_path: Path) -> None:
    columns.write(tmp_path / "x.bin", {name: array[:0] for name, array in ROWS.items()})
    assert all(len(array) == 0 for array in columns.read(tmp_path / "x.bin", DTYPES, 0).values())


@pytest.mark.parametrize(
    ("dtypes", "rows", "said"),
    [
        (DTYPES, 4, "it has 70 bytes, 4 rows have 56"),
        ({"a": "O"}, 1, "cannot have the dtype"),
        ({"a": "<f8"}, 1, "cannot have the dtype"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, dtypes: dict[str, str], rows: int, said: str) -> None:
    columns.write(tmp_path / "x.bin", ROWS)
    with pytest.raises(ValueError, match=said):
        columns.read(tmp_path / "x.bin", dtypes, rows)
