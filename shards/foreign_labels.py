"""The labels of WebDatasets made elsewhere: where a sample has its own, and which class it means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import DataError
from shards.index import UNLABELED
from shards.source import read_path, shown

NO_CLASS = ("-1", "-100")
"""Labels that mean that there is none: torchvision's and timm's, and what torch's losses ignore."""


@dataclass(frozen=True)
class LabelForm:
    """Where a sample's label stands: in the file KEY.``ext``; of JSON, in its field ``field`` (``a.b`` for b in a)."""

    ext: str
    field: str | None = None

    def means(self, data: bytes, label: int, classes: Sequence[str]) -> bool:
        """Whether a sample's label is the class of this number, by its number or its name."""
        try:
            text = self.read(data)
        except ValueError:
            return False
        return text == classes[label] or (_is_number(text) and int(text) == label)

    def read(self, data: bytes) -> str:
        """The label as a text; raises ValueError if it has none."""
        if self.ext.lower() != "json":
            return data.decode().strip()
        value: Any = json.loads(data)
        for part in (self.field or "label").split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"its JSON has no field '{self.field or 'label'}'")
            value = value[part]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"its field '{self.field or 'label'}' is a {type(value).__name__}, not a class")
        return str(value).strip()


@dataclass(frozen=True)
class ForeignLabels:
    """The classes of all splits, and which of them a label means."""

    classes: tuple[str, ...]
    number: Mapping[str, int]
    form: LabelForm

    @classmethod
    def of(
        cls, found: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str] | None, form: LabelForm
    ) -> ForeignLabels:
        """From what was found in the tars of every split, and the names of the classes where they are given.

        Raises:
            DataError: the labels are no classes, or not those that are named.
        """
        texts = {
            split: Counter(text for part in parts for text in part["columns"]["text"]) for split, parts in found.items()
        }
        every = {text for counts in texts.values() for text in counts}
        images = sum(sum(counts.values()) for counts in texts.values())
        if not images:
            raise DataError("no image in these tars can be read; `python -m shards index` needs some")
        labeled = every.difference(NO_CLASS)
        if negative := sorted(text for text in labeled if text[:1] == "-" and _is_number(text[1:])):
            raise DataError(
                f"the label {negative[0]} is no class; those without one have {' or '.join(NO_CLASS)}, classes count from 0"
            )
        numbers = all(map(_is_number, labeled))
        # Names may be digits themselves, as those of handwritten digits; then they are looked up, not counted.
        if numbers and not (names and labeled and labeled <= set(names)):
            return cls._of_numbers({text: int(text) for text in every}, names, form)
        if names is None:
            if len(every) > max(100, images // 2):
                raise DataError(
                    f"its {images} samples have {len(every)} different labels, such as '{shown(min(every))[:40]}': captions, no classes; "
                    "give --label-from or --label-key"
                )
            cls._refuse_extra(texts)
            names = sorted(labeled)
        unknown = sorted(labeled.difference(names))
        if unknown:
            raise DataError(
                f"the label '{shown(unknown[0])[:60]}' is none of the {len(names)} classes of --classes; add it there"
            )
        number = dict.fromkeys(NO_CLASS, UNLABELED) | {name: number for number, name in enumerate(names)}
        return cls(tuple(names), number, form)

    @classmethod
    def _of_numbers(cls, numbers: dict[str, int], names: Sequence[str] | None, form: LabelForm) -> ForeignLabels:
        largest = max(numbers.values())
        if largest < 0:
            raise DataError("all of its labels are negative, which means that there is none; give another --label-key")
        if names is None:
            # Ids of something else: the network would get an output for every number up to the largest.
            if largest >= max(1000, 100 * len(numbers)):
                raise DataError(
                    f"its labels are {len(numbers)} numbers up to {largest}, which are no classes from 0 on; give --classes FILE with a name for each, or another --label-key"
                )
            names = [str(number) for number in range(largest + 1)]
        elif largest >= len(names):
            raise DataError(
                f"its labels go up to {largest}, --classes names {len(names)} classes, 0 to {len(names) - 1}"
            )
        return cls(tuple(names), {text: number if number >= 0 else UNLABELED for text, number in numbers.items()}, form)

    @staticmethod
    def _refuse_extra(texts: Mapping[str, Counter[str]]) -> None:
        for split, counts in texts.items():
            # Without a train split no class can be one that it lacks.
            extra = sorted(set(counts).difference(NO_CLASS, texts.get("train", counts)))
            if extra:
                raise DataError(
                    f"{split} has the class '{shown(extra[0])[:60]}', which train lacks; give --classes FILE with all classes"
                )


def _is_number(text: str) -> bool:
    """Whether it is a natural number that fits into the index; Python refuses to read one of thousands of digits."""
    return text.isdecimal() and len(text) <= 18


def read_classes(path: Path) -> list[str]:
    """Class names in the order of their numbers: one a line, or JSON, a list or ``{"0": name}``.

    Raises:
        DataError: it cannot be read, is neither, or names a class twice.
    """
    try:
        text = read_path(path).decode("utf-8-sig")  # Windows puts a byte order mark first
        if text.lstrip().startswith(("[", "{")):
            tree = json.loads(text)
            if isinstance(tree, dict):
                tree = [tree[str(number)] for number in range(len(tree))]
            # imagenet_class_index.json has {"0": ["n01440764", "tench"]}: the synset comes first.
            names = [str(name[0]) if isinstance(name, list) else str(name) for name in tree]
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, IndexError, RecursionError) as error:
        raise DataError(
            f"{path}: is neither a text with a class's name on every line nor JSON with them ({error})"
        ) from None
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{path}: names the class '{shown(twice)}' twice")
    return names
