"""The names that people give to splits: train, val and test in any spelling, of folders and in the names of tars."""

from __future__ import annotations

import re

_SPELLINGS = {
    "train": ("train", "training", "trn", "tr"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {word: split for split, words in _SPELLINGS.items() for word in words}
# What a folder's name may have beside such a word and still be a split's: train.X1, test_set, val2017, train-images.
_BESIDE = re.compile(r"set|images?|imgs?|data|dataset|split|folder|x?\d*|large|small|standard")


def split_of(name: str) -> str | None:
    """The split that a folder's name stands for in any spelling, if it does."""
    words = _words(name)
    named = [word for word in words if word in _SPLIT_OF]
    if len(named) == 1 and all(word in _SPLIT_OF or _BESIDE.fullmatch(word) for word in words):
        return _SPLIT_OF[named[0]]
    return None


def split_words(name: str) -> str | None:
    """The split that a name has a word for, whatever else it has: train for ``imagenet1k-train-0000``."""
    named = {_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF}
    return named.pop() if len(named) == 1 else None


def _words(name: str) -> list[str]:
    # val2017 is two words. trainval, as VOC calls the two together, is what one trains on.
    words = re.split(r"[\W_]+|(?<=[a-z])(?=\d)", name.lower().replace("trainval", "train"))
    return [word.removesuffix("set") if word.removesuffix("set") in _SPLIT_OF else word for word in words if word]
