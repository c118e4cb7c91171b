"""Mixtures and conditions: which samples come out, with which labels, and what is refused in one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_train.errors import ConfigError, DataError
from shards.index import UNLABELED, Index, Shard
from shards.mixture import Part, mix
from shards.where import select


def split(folder: str, classes: str, labels: list[int], widths: list[int]) -> Index:
    """An index of two shards without tars."""
    number = len(labels)
    half = number // 2
    columns = {
        "key": [f"{folder}{i}" for i in range(number)],
        "ext": ["jpg"] * number,
        "size": range(100, 100 + number),
        "offset": [1000 * i for i in range(number)],
        "label": labels,
        "width": widths,
        "height": [64] * number,
        "shard": [0] * half + [1] * (number - half),
    }
    shards = [Shard(f"{i}.tar", 100_000, "0" * 64, n) for i, n in enumerate((half, number - half))]
    index = Index.from_columns(list(classes), shards, columns)
    object.__setattr__(index, "folder", Path("/nowhere") / folder)
    return index


A = split("A", "xyz", [0, 1, 2, UNLABELED, 1, 0], [32, 64, 96, 128, 256, 512])
B = split("B", "zx", [0, 1, 1, 0], [32, 500, 600, 700])


@pytest.mark.parametrize(
    ("condition", "ids"),
    [
        ("width >= 96", [2, 3, 4, 5]),
        ("min(width, height) >= 64", [1, 2, 3, 4, 5]),
        ("max(width, height, 100) > 128", [4, 5]),
        ("96 <= width < 300", [2, 3, 4]),
        ('class_name == "y"', [1, 4]),
        ('class_name in ["x", "z"] and not width == 32', [2, 5]),
        ('class_name not in ("x", "z")', [1, 3, 4]),
        ("labeled", [0, 1, 2, 4, 5]),
        ("not labeled or bytes < 101", [0, 3]),
        ("width / height * 2 - 1 > 2.5 + -0.5", [3, 4, 5]),
        ('key == "A3"', [3]),
        ("width > 100000", []),
    ],
)
def test_a_condition_selects_what_it_says(condition: str, ids: list[int]) -> None:
    assert select(A, condition).tolist() == ids


def test_the_arithmetic_of_a_condition_does_not_overflow() -> None:
    photos = replace(A, width=np.full(len(A), 6000, np.int32), height=np.full(len(A), 4000, np.int32))
    assert len(select(photos, "width * height * 100 > 0")) == len(A)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("width >", "is not an expression"),
        ("", "is not an expression"),
        ("wide > 3", "'wide' is not known"),
        ("width", "no condition on samples"),
        ("True", "no condition on samples"),
        ("width and labeled", "take conditions"),
        ('width == "96"', "a text is compared with a number"),
        ('class_name in ["x", 3]', "a text is compared with a number"),
        ("width is 3", "'is' is not known"),
        ("width / 0 > 'a'", "a text is compared"),
        ("1 / 0 > width", "division by zero"),
        ('"a" * 10000000000 == key', "take numbers"),
        ("__import__('os').system('true')", "is not known"),
        ("(lambda: 1)() > width", "is not known"),
        ("width.tofile('x')", "is not known"),
        ("key[0] == 'a'", "is not known"),
        ("2 ** 10 ** 10 > width", "is not known"),
        ("(" * 300 + "width" + ")" * 300, "is not an expression"),
        ("-" * 100000 + "width > 3", ""),
    ],
)
def test_what_is_no_condition_is_one_line_and_runs_nothing(condition: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        select(A, condition)
    assert said in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_a_mixture_joins_classes_by_name_and_keeps_every_sample_where_it_lies() -> None:
    mixed = mix([Part(A, 2.0, "width != 64"), Part(B)], "xyz")
    assert mixed.classes == ("x", "y", "z")
    assert mixed.key.tolist() == [b"A0", b"A2", b"A3", b"A4", b"A5", b"B0", b"B1", b"B2", b"B3"]
    assert mixed.label.tolist() == [0, 2, UNLABELED, 1, 0, 2, 0, 0, 2]
    assert mixed.weight is not None
    assert mixed.weight.tolist() == [2.0] * 5 + [1.0] * 4
    assert [shard.name for shard in mixed.shards] == [f"/nowhere/{name}.tar" for name in ("A/0", "A/1", "B/0", "B/1")]
    assert mixed.shard_sizes.tolist() == [shard.samples for shard in mixed.shards] == [2, 3, 2, 2]
    place = {key: offset for part in (A, B) for key, offset in zip(part.key, part.offset)}
    assert all(place[key] == offset for key, offset in zip(mixed.key, mixed.offset))
    assert mixed.splits == (A, B)


def test_another_mixture_has_another_fingerprint() -> None:
    made = [
        mix(parts, "xyz").fingerprint
        for parts in ([Part(A)], [Part(A, 2.0)], [Part(A), Part(B)], [Part(B), Part(A)], [Part(A, 1.0, "width > 32")])
    ]
    assert len(set(made)) == 5
    assert mix([Part(A)], "xyz").fingerprint == made[0]
    assert mix([Part(A)], "zxy").fingerprint != made[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="/nowhere/A: has the class 'y', which the validation split has not"):
        mix([Part(A)], "xz")
    assert len(mix([Part(A, 1.0, "class_name != 'y'")], "xz")) == 4
    with pytest.raises(DataError, match="/nowhere/B: where is 'width > 1000', which none of its 4 samples meets"):
        mix([Part(A), Part(B, 1.0, "width > 1000")], "xyz")
