from __future__ import annotations

from shards.split_names import split_of


def test_names_of_splits_in_any_spelling() -> None:
    spelled = {
        "train": ["train", "Training", "TRAIN", "train.X1", "train_set", "trainset", "train-images", "train2017", "trainval"],
        "val": ["val", "valid", "Validation", "dev", "val.X", "val2017", "val_256", "valset"],
        "test": ["test", "Testing", "test_images", "test1"],
        None: ["cat", "trainer", "train station", "test tube", "valley", "developer", "n01440764", "0", "steam train", "tests of time"],
    }  # fmt: skip
    for split, names in spelled.items():
        assert {name: split_of(name) for name in names} == dict.fromkeys(names, split)
