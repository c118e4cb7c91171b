"""A run on a mixture of splits: the order is exact, whoever reads it, and what cannot be mixed is one line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dist_train.config import Config
from dist_train.config_file import dump_config, load_config, make_config
from dist_train.data.split import open_split, open_training
from dist_train.errors import CheckpointError
from dist_train.training.preflight import check_start
from shards.index import Index
from tests.common import SMALL_MODEL, cpu_loader, train_all


def settings(digits: Path, runs: Path, name: str, train: Any, **fields: Any) -> Config:
    return make_config(
        {
            "name": name,
            "runs": str(runs),
            "data": {"shards": str(digits), "flip": False, "train": train},
            "model": SMALL_MODEL,
            "optim": {"lr": 0.005},  # so low that steps do not magnify what sums in another order round to
            "tracking": {"log_every": 1, "uri": "off"},
            "train": {
                "global_batch": 64,
                "micro_batch": 16,
                "precision": "fp32",
                "epochs": 2,
                "zero_stage": 0,
                **fields,
            },
        }
    )


def parts(digits: Path) -> list[dict[str, Any]]:
    """Zeros and ones three times in two epochs, and of the other digits the half that takes more bytes."""
    few = 'class_name in ["0", "1"]'
    middle = int(np.median(Index.load(digits / "train").size))
    return [
        {"shards": str(digits), "weight": 1.5, "where": few},
        {"shards": str(digits), "where": f"not {few} and bytes > {middle}"},
    ]


def test_a_run_on_a_mixture_reads_each_image_by_its_weight_and_resumes_on_any_number_of_ranks(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    whole = settings(digits, tmp_path, "whole", parts(digits))
    cut = [settings(digits, tmp_path, "cut", parts(digits), max_steps=steps) for steps in (9, None)]
    index = Index.load(digits / "train")
    few = index.label < 2
    many = ~few & (index.size > np.median(index.size))
    assert 0 < many.sum() < (~few).sum()
    steps = (int(1.5 * few.sum()) + int(many.sum())) // 64
    assert ranks(train_all, 1, [whole, cut[0]]) == [[2 * steps, 9]]
    assert ranks(train_all, 2, [cut[1]]) == [[2 * steps]] * 2
    one, two = (load_file(tmp_path / name / "checkpoints/latest/model.safetensors") for name in ("whole", "cut"))
    for key, value in one.items():
        if "running" in key or "num_batches" in key:  # every rank has its own, of its own micro batches
            continue
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)

    # Which images they were: the loader's own ids over both epochs, for one rank and for two.
    joined = open_training(whole.data, index.classes)
    read = [[seen for rank in range(size) for seen in images_of(whole, joined, rank, size)] for size in (1, 2)]
    assert sorted(read[0]) == sorted(read[1])
    times = Counter(key for _, key in read[0])
    assert set(times) <= {key for key, chosen in zip(index.key, few | many) if chosen}
    # Of two epochs the incomplete last batches are left out, fewer than 64 images each.
    assert 2 * int(many.sum()) + 3 * int(few.sum()) - sum(times.values()) < 128
    assert max(times.values()) == 3
    assert load_config(tmp_path / "whole" / "config.yaml").data.train == whole.data.train


def images_of(config: Config, index: Index, rank: int, size: int) -> list[tuple[int, bytes]]:
    """(batch, key) of everything that a rank reads in the two epochs."""
    loader = cpu_loader(
        index,
        config.data.training_locations[0],
        config.data,
        train=True,
        seed=config.seed,
        global_batch=64,
        micro_batch=16,
        rank=rank,
        world_size=size,
    )
    try:
        return [
            (100 * epoch + batch.number, index.key[sample])
            for epoch in (0, 1)
            for batch in loader.epoch(epoch)
            for micro in batch
            for sample in micro.ids.tolist()
        ]
    finally:
        loader.close()


def test_the_same_data_as_a_mixture_is_the_same_run(ranks: Any, digits: Path, tmp_path: Path) -> None:
    plain = settings(digits, tmp_path, "plain", "train", max_steps=4)
    mixed = settings(digits, tmp_path, "mixed", [{"shards": str(digits)}], max_steps=4)
    ranks(train_all, 1, [plain, mixed])
    one, two = (load_file(c.folder / "checkpoints/latest/model.safetensors") for c in (plain, mixed))
    assert all(one[key].equal(two[key]) for key in one)


def test_another_weight_or_condition_is_other_data_for_a_run_that_goes_on(
    digits: Path, tmp_path: Path, ranks: Any
) -> None:
    begun = settings(digits, tmp_path, "begun", parts(digits), max_steps=2)
    ranks(train_all, 1, [begun])
    config = tmp_path / "config.yaml"
    for change in ({"weight": 2.0}, {"where": "width > 1"}):
        first, second = parts(digits)
        config.write_text(dump_config(settings(digits, tmp_path, "begun", [first | change, second])))
        with pytest.raises(CheckpointError, match="was trained on other data"):
            check_start(str(config), [], 1)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([], "data.train"),
        ([{"shards": "/nowhere"}], "/nowhere/train: no such folder of shards"),
        ([{"shards": "DIGITS", "weight": 0}], "data.train"),
        ([{"shards": "DIGITS", "weigth": 1}], "weigth"),
        ([{"shards": "DIGITS", "where": "import os"}], "is not an expression"),
        ([{"shards": "DIGITS", "where": "width > 9999"}], "none of its 1437 samples meets"),
        ([{"shards": "DIGITS", "split": "nosuch"}], "nosuch: no such folder of shards"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(digits: Path, tmp_path: Path, refused: Any, train: Any, said: str) -> None:
    text = json.dumps({"name": "bad", "runs": str(tmp_path), "data": {"shards": str(digits), "train": train}})
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("DIGITS", str(digits)))
    line = refused("train", config)
    assert said in line


def test_the_quarantine_of_a_part_is_kept_and_its_growth_is_said(digits: Path, tmp_path: Path) -> None:
    from dist_train.data.split import KeptQuarantine
    from shards.quarantine import Bad

    shutil.copytree(digits, tmp_path / "digits")
    config = settings(digits, tmp_path, "run", [{"shards": str(tmp_path / "digits")}, {"shards": str(digits)}])
    (tmp_path / "run").mkdir()
    kept = KeptQuarantine(tmp_path / "run")
    val = open_split(config.data, "val")
    before = open_training(config.data, val.classes)
    kept.keep(before, val)
    split = Index.load(tmp_path / "digits" / "train")
    split.save_quarantine([Bad(3, split.key[3].decode(), "damaged")])
    after = open_training(config.data, val.classes, kept.read())
    assert after.fingerprint == before.fingerprint
    (line,) = kept.changes(after, val)
    assert line.startswith(f"{tmp_path / 'digits' / 'train'}: 1 images are in its quarantine list by now")
    fresh = open_training(config.data, val.classes)
    assert len(fresh) == len(before) - 1
    assert fresh.quarantine_notes == [f"{tmp_path / 'digits' / 'train'}: 1 images are left out, by quarantine.json"]
